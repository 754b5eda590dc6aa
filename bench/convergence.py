"""The same training with other kernels: loss curves side by side, and the whole step's time, in one process.

    python -m bench.convergence --kernels auto auto,attention=compiled --steps 300 --data-path data
    python -m bench.convergence --kernels auto compiled --seeds 1337 1338 --steps 1000 --data-path data

Seed settings on one GPU (preset one-gpu): real text in the same order, 98,304 tokens a step, recurrence from the middle
of the run on, so both depths are in it; optimizer, clip and EMA included. Two runs agree where they differ by no more
than two seeds of one implementation do. With --tokenizer-path the EMA weights are scored as well, plainly, on the
folder's validation tokens. Writes bench/results/convergence-<gpu>.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import COLORS, write_result
from gpt.capture import micro_step
from gpt.config import Config, build_config
from gpt.data import TrainLoader, load_validation
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.optimizer import Optimizer
from gpt.score import score, validation_text
from gpt.tokenizer import Tokenizer
from kernels import select


def run(config: Config, kernels: str, ranks: Ranks, steps: int, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Train `steps` steps from the start; with a tokenizer, score. Compiling happens in steps that no median sees."""
    model = GPT(config, select(kernels, ranks.device), ranks.dtype).initialise(config.seed).to(ranks.device)
    optimizer = Optimizer(model, config, ranks)
    forward_backward = micro_step(model, model.rotary(config.train_seq_len), [config.depth(x) for x in (False, True)])
    losses, events = [], [torch.cuda.Event(enable_timing=True)]
    begin = time.perf_counter()
    with TrainLoader(config, 0, 1, ranks.device) as loader:
        events[0].record()
        for step in range(steps):
            losses.append(forward_backward(*next(loader), config.depth_at(step), 1.0))
            optimizer.step(step, 1.0)
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            if step == 0:
                torch.cuda.synchronize()
                first = time.perf_counter() - begin
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    bpb = None
    if tokenizer:
        del forward_backward  # its graphs hold the memory of a whole step
        model.load_state_dict(optimizer.ema_state())
        tokens = load_validation(config.data_path, config.vocab_size)
        text, context = validation_text(tokens, tokenizer.byte_table(), ranks.device), config.context
        depth, batch = config.depth_at(steps - 1), config.val_batch_size
        bpb = score(model, text, depth, ranks, context=context, stride=context, batch_tokens=batch).bpb
    switch = config.recur_start_step
    ms = [round(statistics.median(part), 2) for part in (times[:switch], times[switch:])]
    return {
        "op": "convergence", "case": f"{steps}-steps", "impl": kernels, "seed": config.seed,
        "ms": ms[1], "ms_by_layers": {"11": ms[0], "14": ms[1]},
        "ms_switch": round(times[switch], 2), "first_step_s": round(first, 1), "bpb": bpb and round(bpb, 5),
        "losses": [round(loss, 4) for loss in torch.stack(losses).tolist()],
    }  # fmt: skip


def differences(rows: Sequence[dict[str, Any]], window: int) -> list[str]:
    """Every run against the first: mean difference of the last steps, and the worst of any window's means."""
    lines = []
    base = torch.tensor(rows[0]["losses"], dtype=torch.float64)
    for row in rows:
        delta = torch.tensor(row["losses"], dtype=torch.float64) - base
        worst = delta.unfold(0, window, window).mean(1).abs().max().item()
        lines.append(
            f"{row['impl']:44s} seed {row['seed']}  {row['ms_by_layers']['11']:8.2f}{row['ms_by_layers']['14']:8.2f} ms"
            f"  last loss {sum(row['losses'][-window:]) / window:.4f}  difference {delta[-window:].mean().item():+.4f}"
            f"  worst {worst:.4f}" + (f"  BPB {row['bpb']:.4f}" if row.get("bpb") else "")
        )
    return lines


def apart(a: Sequence[float], b: Sequence[float], window: int = 25, since: int = 200) -> float:
    """Root mean square of the differences of two curves' means of `window` steps, from step `since` on."""
    means = (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).unfold(0, window, 1).mean(1)
    return means[since:].square().mean().sqrt().item()


def noise(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far implementations are apart, and seeds of one: by how much the former may differ."""
    lines = []
    for a, b in itertools.combinations(rows, 2):
        if (a["impl"] == b["impl"]) != (a["seed"] == b["seed"]):
            what = f"{a['impl']} and {b['impl']}, seed {a['seed']}"
            if a["impl"] == b["impl"]:
                what = f"{a['impl']}, seeds {a['seed']} and {b['seed']}"
            since = min(200, len(a["losses"]) // 2)
            lines.append(f"{what}: {apart(a['losses'], b['losses'], since=since):.4f} nats apart from step {since} on")
    return lines


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path, window: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    base = torch.tensor(rows[0]["losses"], dtype=torch.float64)
    for index, row in enumerate(rows):
        losses = torch.tensor(row["losses"], dtype=torch.float64)
        smooth = losses.unfold(0, window, 1).mean(1)
        label, color = f"{row['impl']}, seed {row['seed']}", COLORS[index % len(COLORS)]
        left.plot(range(window, len(losses) + 1), smooth.tolist(), linewidth=1, color=color, label=label)
        delta = (losses - base).unfold(0, window, 1).mean(1)
        right.plot(range(window, len(losses) + 1), delta.tolist(), linewidth=1, color=color)
    left.set_ylabel(f"training loss (nats per token), mean of {window}")
    right.set_ylabel("difference from the first")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description="Loss curves of two kernel sets.")
    parser.add_argument("--kernels", nargs="+", default=["auto", "compiled"], help="as train.py's --kernels")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with fineweb_train_*.bin")
    parser.add_argument("--tokenizer-path", type=Path, help="score the weights that come out, too")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/convergence-<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.convergence: wants an NVIDIA GPU, found none", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high")
    ranks, rows = Ranks(0, 1, torch.device("cuda", 0)), []
    tokenizer = Tokenizer(options.tokenizer_path) if options.tokenizer_path else None
    for seed in options.seeds:
        for kernels in options.kernels:
            config = build_config(
                preset="one-gpu", seed=seed, data_path=options.data_path, recur_start_step=options.steps // 2
            )
            rows.append(run(config, kernels, ranks, options.steps, tokenizer))
            torch.cuda.empty_cache()
            print(differences(rows, 25)[-1], flush=True)
    command = "python -m bench.convergence " + " ".join(arguments)
    path, _ = write_result("convergence", command, {}, rows, options.out)
    draw(rows, f"{options.steps} steps, one-gpu, {torch.cuda.get_device_name()}", path.with_suffix(".png"), 25)
    print("\n".join([*differences(rows, 25), *noise(rows)]))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
