"""Forward and backward of a whole training step, beside the compiled peer, and where the time goes.

    python -m bench.step --tokens data/fineweb_val_000000.bin

One GPU's share of the seed's step: 48 rows of 2048 tokens, 11 or 14 layers, dense or document-masked attention, bf16.
`triton` is ours, replayed as a CUDA graph as in training, and `triton-fp8`, on demand, ours with mlp=fp8; `compiled` is
torch.compile of the reference with cuDNN attention and mix-order reduction off. Steps of all implementations of a case
alternate in one process; figures are medians. Parts (`parts_ms`) are the profiler's kernel times, means of three steps
after those, which took `profiled_ms`. `gaps_ms` is the timed step less the sum of its parts: time in which no kernel
ran, and what the profiled steps took more or less than the timed ones, by which it can be negative. The least that
parts can take (`least_ms`): products and attention, their FLOPs at the measured rate of an 8192^3 product;
percent_of_ceiling is the sum of both over the whole time. Beside glue and loss stands no such bound but the traffic of
our own schedule (`schedule_ms`), its passes over rows of the residual stream at the speed of a copy: softcap and
exponentials are in the head product. `percent_of_floor` is the share of each part that these are. Writes
bench/results/step-<gpu>.json and .png.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import COLORS, ceilings, document_starts, milliseconds, read_tokens, write_result
from gpt.capture import micro_step
from gpt.config import Config, build_config
from gpt.model import GPT
from kernels import AUTO, select

ROWS, LENGTH = 48, 2048
CASES = {"14-layers": (True, False), "11-layers": (False, False), "14-layers-documents": (True, True)}
IMPLEMENTATIONS = {"triton": AUTO, "compiled": "compiled", "triton-fp8": f"{AUTO},mlp=fp8"}
PARTS = ("products", "attention", "glue", "loss")
BOUNDED = ("products", "attention")  # parts with a least time that no schedule can change
# The first pattern that a kernel's name matches says its part.
KERNELS = (
    ("attention", r"attention_|cudnn|fmha|flash|sdpa|flex"),
    ("loss", r"cross_entropy|log_softmax|nll_loss"),
    ("products", r"gemm|nvjet|cutlass|xmma|matmul|splitK"),
)


def part_of(kernel: str) -> str:
    return next((part for part, pattern in KERNELS if re.search(pattern, kernel)), "glue")


def least_times(config: Config, layers: int, pairs: int, measured: dict[str, float]) -> dict[str, float]:
    """Least milliseconds of each part, of glue and loss the traffic of our schedule.

    pairs: (query, key) pairs of all rows that attention sees.
    """
    tokens, dim = ROWS * LENGTH, config.model_dim
    width = dim + 2 * config.num_kv_heads * config.head_dim  # of q, k and v
    weights = layers * dim * (width + dim + 2 * config.mlp_dim) + config.vocab_size * dim
    flops, stream = 1e9 * measured["bf16_tflops"], tokens * dim * 2 / (1e6 * measured["copy_gb_s"])
    # mix (x, x0 -> x); back: product, residual, x, x0 and its gradient -> two; rotary and head norms: q, k, the float32
    # sums of q's gradient and k's read, both written. A skip is read, and back again, and its gradient written.
    skips = min(config.num_skips, layers // 2)
    passes = 3 + 7 + (2 * dim + 2 * width - config.num_kv_heads * config.head_dim) / dim + 3 * skips / layers
    return {
        "products": 6 * tokens * weights / flops,
        "attention": 14 * pairs * config.num_heads * config.head_dim * layers / flops,
        # x, r x, dx in float32 and rounded; sums of 128 columns
        "loss": 5 * stream + tokens * config.vocab_size / 32 / (1e6 * measured["copy_gb_s"]),
        "glue": (passes * layers + 10) * stream,  # the ten: embedding and last norm, forward and back
    }


def training_step(implementation: str, config: Config, tokens: Tensor, layers: tuple[int, ...]) -> Callable[[], Tensor]:
    """Forward and backward of (rows, length + 1) tokens; gradients are made and dropped."""
    device = tokens.device
    model = GPT(config, select(IMPLEMENTATIONS[implementation], device), torch.bfloat16).initialise(0).to(device)
    with torch.no_grad():  # output matrices are zero at first: zeros would flatter the clock
        for bank in (model.qo_bank[config.num_layers :], model.mlp_down_bank):
            bank.normal_(std=0.02)
    run = micro_step(model, model.rotary(LENGTH))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        loss = run(x, y, layers, 1.0)
        for parameter in model.parameters():
            parameter.grad = None
        return loss

    return step


def parts(step: Callable[[], Tensor], repeats: int = 3) -> tuple[dict[str, dict[str, float]], float]:
    """Part -> kernel -> milliseconds a step, and those of a whole step meanwhile."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        whole = statistics.mean(milliseconds(step, repeats, warm_up=0))
    found: dict[str, dict[str, float]] = {part: {} for part in PARTS}
    for event in profiler.key_averages():
        if event.self_device_time_total:
            found[part_of(event.key)][event.key] = event.self_device_time_total / repeats / 1e3
    return found, whole


def shares(row: dict[str, Any]) -> dict[str, Any]:
    """What follows from a row's ms, parts_ms, least_ms and schedule_ms: gaps_ms, and percent_of_floor of every part."""
    floors = row["least_ms"] | row["schedule_ms"]
    return {
        "gaps_ms": round(row["ms"] - sum(row["parts_ms"].values()), 2),
        "percent_of_floor": {part: round(100 * floors[part] / ms, 1) for part, ms in row["parts_ms"].items()},
    }


def measure(
    case: str, names: list[str], tokens: Tensor, measured: dict[str, float], kernels: int
) -> list[dict[str, Any]]:
    recurrent, documents = CASES[case]
    config = build_config(preset="seed", document_mask=documents)
    layers = config.depth(recurrent)
    pairs = tokens[:, :-1].numel() * (LENGTH + 1) // 2
    if documents:
        position = torch.arange(LENGTH, device=tokens.device)
        pairs = int((position + 1 - document_starts(tokens[:, :-1])).sum())
    least = least_times(config, len(layers), pairs, measured)
    steps, first, memory, losses = {}, {}, {}, {}
    for name in names:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        steps[name] = training_step(name, config, tokens, layers)
        losses[name] = steps[name]().item()
        first[name] = time.perf_counter() - begin
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(3):
        for name in names:
            times[name] += milliseconds(steps[name], repeats=8, warm_up=2)
    rows = []
    for name in names:
        low, ms, high = (sorted(times[name])[int(len(times[name]) * q)] for q in (0.2, 0.5, 0.8))
        found, profiled = parts(steps[name])
        sums = {part: sum(found[part].values()) for part in PARTS}
        row: dict[str, Any] = {
            "op": "step_forward_backward", "case": case, "impl": name, "ms": round(ms, 2),
            "ms_p20": round(low, 2), "ms_p80": round(high, 2),
            "tflops": round((least["products"] + least["attention"]) * measured["bf16_tflops"] / ms, 1),
            "gb_s": None,
            "percent_of_ceiling": round(100 * sum(least[part] for part in BOUNDED) / ms, 1),
            "parts_ms": {part: round(sums[part], 2) for part in PARTS},
            "profiled_ms": round(profiled, 2),
            "least_ms": {part: round(least[part], 2) for part in BOUNDED},
            "schedule_ms": {part: round(least[part], 2) for part in PARTS if part not in BOUNDED},
            "memory_gib": round(memory[name], 1), "first_step_s": round(first[name], 1),
            "loss": round(losses[name], 4),
        }  # fmt: skip
        row |= shares(row)
        rows.append(row)
        print(f"\n{case}, {name}: {ms:.2f} ms ({low:.2f} to {high:.2f}), {memory[name]:.1f} GiB, "
              f"first step after {first[name]:.1f} s, loss {losses[name]:.4f}")  # fmt: skip
        print(f"  {'part':12s}{'ms':>8s}{'least':>8s}{'least / ms':>12s}")
        for part in PARTS:
            print(f"  {part:12s}{sums[part]:8.2f}{least[part]:8.2f}{row['percent_of_floor'][part]:11.0f}%"
                  + ("" if part in BOUNDED else "   (traffic of this schedule, not a least)"))  # fmt: skip
            for kernel, each in sorted(found[part].items(), key=lambda item: -item[1])[:kernels]:
                print(f"      {each:8.3f}  {kernel[:90]}")
        print(f"  {'gaps':12s}{row['gaps_ms']:8.2f}", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """One stacked bar a case and implementation; beside them the least times and the traffic of our schedule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        for row in mine:
            gaps = max(shares(row)["gaps_ms"], 0.0)
            bars.append((f"{case}\n{row['impl']}", row["parts_ms"] | {"gaps": gaps}, row["ms"]))
        least = mine[0]["least_ms"] | mine[0]["schedule_ms"]
        bars.append((f"{case}\nleast; glue,\nloss: traffic", least | {"gaps": 0.0}, sum(least.values())))
    figure = Figure(figsize=(1.3 * len(bars) + 2, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    base = [0.0] * len(bars)
    for part, color in zip((*PARTS, "gaps"), (*COLORS[:4], COLORS[6]), strict=True):
        heights = [bar[1][part] for bar in bars]
        axis.bar(range(len(bars)), heights, bottom=base, color=color, label=part, width=0.7)
        base = [a + b for a, b in zip(base, heights, strict=True)]
    for index, (_, _, total) in enumerate(bars):
        axis.text(index, base[index] + 1, f"{total:.1f}", ha="center")
    axis.set_xticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axis.set_ylabel("ms, forward + backward")
    axis.legend(frameon=False, ncols=len(PARTS) + 1)
    axis.set_ylim(0, 1.15 * max(base))
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description="Time the training step and its parts.")
    parser.add_argument("--tokens", type=Path, required=True, help="a token shard: its first rows are the batch")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--impl", nargs="+", default=["triton", "compiled"], choices=IMPLEMENTATIONS)
    parser.add_argument("--kernels", type=int, default=0, help="longest kernels to list in each part")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/step-<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.step: wants an NVIDIA GPU, found none", file=sys.stderr)
        return 2
    tokens = read_tokens(options.tokens, ROWS * (LENGTH + 1)).view(ROWS, LENGTH + 1).cuda()
    measured = ceilings()
    print(f"{torch.cuda.get_device_name()}: {measured}")
    rows = [row for case in options.cases for row in measure(case, options.impl, tokens, measured, options.kernels)]
    path, rows = write_result("step", "python -m bench.step " + " ".join(arguments), measured, rows, options.out)
    draw(rows, f"{ROWS} x {LENGTH} tokens, {torch.cuda.get_device_name()}", path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
