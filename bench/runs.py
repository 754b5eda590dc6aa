"""Keep finished training runs as data, and compare them with the seed's own script.

    python -m bench.runs RUN...      folders of one preset and GPU, one a seed

Writes bench/results/run-<preset>-<gpu>.json and a picture of the loss curves. Where bench/results has the seed script's
run of the same preset, prints both side by side and draws both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.common import RESULTS, short_name
from gpt.record import write_atomic


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Environment and one result row of a run's folder."""
    environment, summary = (json.loads((path / f"{name}.json").read_text()) for name in ("environment", "summary"))
    entries = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    by_layers: dict[str, list[float]] = {}
    for entry in entries:
        if "train_loss" in entry and entry["step"] > 100 and entry["ms_per_step"]:
            by_layers.setdefault(str(entry["layers"]), []).append(entry["ms_per_step"])
    scores, artifact = summary["scores"], summary["artifact"]
    row = {
        "seed": summary["seed"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "calibration_seconds": summary["calibration_seconds"],
        "warmup_seconds": summary["warmup_seconds"],
        "ms_per_step": summary["ms_per_step"],
        "ms_per_step_by_layers": {layers: statistics.median(times) for layers, times in by_layers.items()},
        "bpb": {
            name: scores[name]["bpb"] if name in scores else None
            for name in ("ema", "artifact", "artifact_sliding", "artifact_ttt")
        },
        "artifact_bytes": artifact["nbytes"],
        "code_bytes": artifact["code_nbytes"],
        "artifact_sha256": artifact["sha256"],
        "clip_sigmas": artifact["clip_sigmas"],
        "sliding_seconds": scores["artifact_sliding"]["seconds"],
        "pack_seconds": artifact["seconds"],
        "fingerprint": summary["fingerprint"],
        "train_loss": {str(e["step"]): e["train_loss"] for e in entries if "train_loss" in e},
        "val_bpb": {str(e["step"]): e["val_bpb"] for e in entries if "val_bpb" in e},
    }
    return {**environment, "preset": summary["preset"]}, row


def collect(paths: list[Path]) -> dict[str, Any]:
    """The result file of runs that differ in their seed alone. Raises ValueError where they differ in more."""
    runs = [read_run(path) for path in paths]
    first = runs[0][0]
    for environment, _ in runs[1:]:
        for key in ("preset", "device", "world_size"):
            if environment[key] != first[key]:
                raise ValueError(
                    f"{key}: {environment[key]} beside {first[key]}; wanted runs of one preset and machine"
                )
    return {
        "bench": "run",
        "preset": first["preset"],
        "impl": "ours",
        "gpu": first["device"],
        "gpus": first["world_size"],
        "torch": first["packages"]["torch"],
        "triton": first["packages"]["triton"],
        "commit": first["git_commit"],
        "command": first["command"],
        "date": first["started"][:10],
        "rows": [row for _, row in runs],
    }


def compare(ours: dict[str, Any], seed: dict[str, Any]) -> str:
    """Our first run beside the seed script's."""
    a, b = ours["rows"][0], seed["rows"][0]
    lines = [f"{'':28s}{'ours':>12s}{'seed':>12s}{'difference':>12s}"]

    def line(name: str, mine: float, theirs: float, form: str = ".4f") -> None:
        lines.append(f"{name:28s}{mine:>12{form}}{theirs:>12{form}}{mine - theirs:>+12{form}}")

    for step, loss in b["train_loss"].items():
        if step in a["train_loss"]:
            line(f"train loss at step {step}", a["train_loss"][step], loss)
    for layers, ms in b["ms_per_step_by_layers"].items():
        if layers in a["ms_per_step_by_layers"]:
            line(f"ms a step, {layers} layers", a["ms_per_step_by_layers"][layers], ms, ".1f")
    line("steps", a["steps"], b["steps"], ".0f")
    for name, bpb in b["bpb"].items():
        if bpb is not None and a["bpb"][name] is not None:
            line(f"BPB {name}", a["bpb"][name], bpb)
    line("artifact + code bytes", a["artifact_bytes"] + a["code_bytes"], b["artifact_bytes"] + b["code_bytes"], ".0f")
    line("sliding evaluation, s", a["sliding_seconds"], b["sliding_seconds"], ".1f")
    return "\n".join(lines)


def draw(ours: dict[str, Any], seed: dict[str, Any] | None, path: Path) -> None:
    """Training loss and validation BPB by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, bpb = figure.subplots(1, 2)
    for result, style, color in ((ours, "-", "#4477aa"), (seed, "o", "#cc3311")):
        for row in result["rows"] if result else ():
            label = f"ours, seed {row['seed']}" if result is ours else "the seed's script"
            for axis, key in ((loss, "train_loss"), (bpb, "val_bpb")):
                points = sorted((int(step), value) for step, value in row[key].items() if int(step) >= 100)
                axis.plot(*zip(*points, strict=True), style, color=color, markersize=4, linewidth=1, label=label)
    for axis, name in ((loss, "training loss (nats per token)"), (bpb, "validation BPB")):
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(f"{ours['preset']}, {ours['gpus']} x {ours['gpu']}")
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs", description="Keep finished runs as data.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    options = parser.parse_args(arguments)
    try:
        ours = collect(options.runs)
    except (OSError, ValueError) as error:
        print(f"bench.runs: {error}", file=sys.stderr)
        return 2
    name = f"run-{ours['preset']}-{short_name(ours['gpu'])}" + (f"x{ours['gpus']}" if ours["gpus"] > 1 else "")
    write_atomic(options.results / f"{name}.json", (json.dumps(ours, indent=1) + "\n").encode())
    seed_file = RESULTS / "seed-script-h100.json"
    seed = json.loads(seed_file.read_text())
    same = all(seed[key] == ours[key] for key in ("preset", "gpu", "gpus"))
    seed = seed if same else None
    draw(ours, seed, options.results / f"{name}.png")
    print(options.results / f"{name}.json")
    if seed:
        print(compare(ours, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
