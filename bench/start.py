"""From the start of a training run to its first step, with empty caches and again with those of that run; its steps.

    python -m bench.start --data-path DATA --tokenizer-path TOKENIZER

Runs train.py twice, for a few steps, the layers changing halfway. Triton's and Inductor's caches are in a folder of
their own, empty at first. `ms` is all that a run says to have taken before its first step, imports included,
`warm_up_ms` the part in which kernels are compiled and graphs captured; `steps_ms` are those of its metrics.jsonl,
all but the last, `slowest_of_median` the slowest over the median before the layers change, and from there on. A run
is ended behind its last step: what else train.py does is no start. Others go to train.py.
Writes bench/results/start-<gpu>.json.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import write_result
from gpt.config import PRESETS, ROOT
from gpt.record import read_config, read_metrics

READY = re.compile(r"ready after ([\d.]+) s, ([\d.]+) s of them warm-up")


def start(settings: list[str], iterations: int, folder: Path, case: str) -> dict[str, Any]:
    """The row of a run with the caches in `folder`. Raises RuntimeError with its last lines where it fails."""
    caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [sys.executable, str(ROOT / "train.py"), *settings, "--runs-path", str(folder), "--run-id", case]
    lines, ready = [], None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | caches
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                ready = READY.search(line) or ready
                if line.startswith(f"step {iterations}/{iterations}"):
                    break
        finally:
            process.kill()
    steps = {entry["step"]: entry for entry in read_metrics(folder / case) if "train_loss" in entry}
    if ready is None or len(steps) < iterations:
        raise RuntimeError(f"train.py ended before step {iterations}: {''.join(lines[-10:])}")
    total, warm_up = (round(1e3 * float(seconds)) for seconds in ready.groups())
    first = next((step for step in steps if steps[step]["layers"] != steps[1]["layers"]), iterations + 1)
    took = [round(steps[step]["ms_per_step"], 1) for step in range(2, iterations + 1)]
    parts = took[: first - 1], took[first - 1 :]
    return {
        "op": "start", "case": case, "impl": read_config(folder / case).kernels, "ms": total, "warm_up_ms": warm_up,
        "percent_of_ceiling": None,
        # The place in steps_ms: what stands beside a step there, is the time from the launch before to its own.
        "recurrence_from_step": first - 1,
        "slowest_of_median": [round(max(part) / statistics.median(part), 3) for part in parts if part],
        "steps_ms": took,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description="Time the start of a training run.")
    parser.add_argument("--preset", default="one-gpu", choices=PRESETS)
    parser.add_argument("--iterations", type=int, default=40, help="steps; layers change halfway")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/start-<gpu>.json")
    options, others = parser.parse_known_args(arguments)
    settings = [
        "--preset", options.preset, "--iterations", str(options.iterations),
        "--recur-start-step", str(options.iterations // 2), "--val-loss-every", "0", "--train-log-every", "1", *others,
    ]  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in ("cold", "warm"):
            try:
                rows.append(start(settings, options.iterations, Path(folder), case))
            except RuntimeError as error:
                print(f"bench.start: {error}", file=sys.stderr)
                return 2
            whole, warm_up = (rows[-1][key] / 1e3 for key in ("ms", "warm_up_ms"))
            slowest = " and ".join(f"{ratio:.2f}" for ratio in rows[-1]["slowest_of_median"])
            print(
                f"{case}: {whole:.1f} s, {warm_up:.1f} s of them warm-up; slowest steps {slowest} medians", flush=True
            )
    print(write_result("start", " ".join(["python -m bench.start", *arguments]), {}, rows, options.out)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
