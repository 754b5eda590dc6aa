"""The training step on 1, 2, 4 ... GPUs: its time, its collectives and how much of them is hidden, the loss curves; and
what to expect of more GPUs than there are.

    python -m bench.scaling --data-path data                      # on 1, 2, 4, 8 of the GPUs that are there
    python -m bench.scaling --data-path data --gpus 1 2 --curve 200
    torchrun --nnodes=2 --nproc_per_node=8 ... -m bench.scaling --data-path data
    python -m bench.scaling --predict 75.5 90.0                   # ms a step on one GPU, 11 and 14 layers; needs no GPU

Any other option is a setting of train.py's. A step is the training loop's, with its Optimizer and Clock, of
micro_batch_tokens (98,304) a GPU; the median of --steps, the slowest rank's, after as many that are not timed: a card
at its power limit is 3 ms a step faster in its first second. `ratio` is to the run on the fewest GPUs. Cards differ,
from each other and from minute to minute, by more than communication costs: so on several GPUs every card also makes
steps of its own, without the others, in turn with those of all: `alone_ms`, a rank each, and `ratio_to_alone`, to their
mean. Collectives are NCCL's kernels by the profiler: `ms` where a kernel was shortest, on the rank that came last and
waited for nobody; `hidden`, on the mean rank, is while another kernel ran. --curve trains so many steps, depth
recurrence from the middle on, on the same batches of micro_batch_tokens in all for every number of GPUs, and twice on
the first: that is the noise to compare with. Writes bench/results/scaling-<gpu>.json and .png.

The model, for W ranks and nothing hidden:

    T(W) = s (F t / t1 + O(W)) + C(W)
    F      forward and backward of t1 = micro_batch_tokens on one GPU; in proportion to the tokens t of a rank
    O(W)   optimizer: its passes over all weights, and Newton-Schulz times the share of its FLOPs of the rank with
           most matrices, sum_b ceil(N_b / W) f_b / sum_b N_b f_b, for banks of N_b matrices of f_b FLOPs
    C(W)   sum over collectives of a + k (W - 1) / W P / B: latency a, P bytes, bandwidth B of the bus, k = 2 for an
           all-reduce, else 1. P: of each bank a reduce-scatter and an all-gather of ceil(N_b / W) W matrices in
           bf16; an all-reduce of all other gradients in float32; two of a few numbers
    s      how much slower the slowest of several GPUs is than the one that was measured

A run takes steps of the first depth until recurrence starts, then of the second, until the cap less the reserve.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import COLORS, write_result
from gpt.capture import micro_step
from gpt.clock import Clock
from gpt.config import ROOT, Config, ConfigError, load_config
from gpt.data import TrainLoader
from gpt.distributed import Ranks, distributed
from gpt.model import BANKS, GPT
from gpt.optimizer import Optimizer
from kernels import select

FINAL = ("mlp_down_bank", "mlp_up_bank", "kv_bank", "qo_bank")  # banks as their gradients become final
TURNS = 4  # steps on all GPUs and steps of each alone take turns, so often
WINDOW = 25  # steps that differences of loss curves are averaged over


# -------------------------------------------------------------------------------------------------------- the model
@dataclass(frozen=True)
class Collective:
    name: str
    kind: str  # ReduceScatter, AllReduce or AllGather, as in the names of NCCL's kernels
    bytes: int

    def on_the_bus(self, ranks: int) -> float:
        """Bytes that each rank sends."""
        return (2 if self.kind == "AllReduce" else 1) * self.bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Links:
    name: str
    bandwidth: float  # of the bus, bytes/s: what each rank sends
    latency: float  # of one collective, s

    def seconds(self, collectives: Sequence[Collective], ranks: int) -> float:
        return sum(self.latency + c.on_the_bus(ranks) / self.bandwidth for c in collectives) if ranks > 1 else 0.0


NVLINK = Links("NVLink", 361e9, 25e-6)  # an all-reduce of 1 GiB on 8 H100, NVLS off; latency assumed
INFINIBAND = Links("InfiniBand, 8 x 400 Gb/s a node", 0.85 * 8 * 50e9, 50e-6)  # 85% of the wires; assumed
ETHERNET = Links("Ethernet, 100 Gb/s a node", 0.85 * 12.5e9, 100e-6)  # assumed
SLOWEST = 1.02  # the slowest of 8 H100 made 779 TFLOP/s in a product where the one measured made 798
NEWTON_SCHULZ, ELEMENTWISE = 0.862, 0.484  # ms of all banks on one H100, and of the rest of the optimizer's step


def shapes(config: Config) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Of the seed's model, or another: each bank's (N, rows, columns), and how many elements all the rest has."""
    with torch.device("meta"):
        model = GPT(config, select("reference", torch.device("cpu")))
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rest = sum(p.numel() for name, p in model.named_parameters() if name not in FINAL)
    return {name: sizes[name] for name in FINAL}, rest  # type: ignore[misc]


def collectives(config: Config, ranks: int, captured: bool = True) -> list[Collective]:
    """Those of one step in the order of their launches; captured: the backward is a CUDA graph, without hooks."""
    banks, rest = shapes(config)
    size = {name: -(-count // ranks) * ranks * rows * columns * 2 for name, (count, rows, columns) in banks.items()}
    largest = sorted(BANKS, key=lambda name: -math.prod(banks[name]))
    return [
        *(
            Collective(f"reduce-scatter {name}", "ReduceScatter", size[name])
            for name in (largest if captured else FINAL)
        ),
        Collective("all-reduce rest", "AllReduce", 4 * rest),
        Collective("all-reduce norm", "AllReduce", 4),
        *(Collective(f"all-gather {name}", "AllGather", size[name]) for name in largest),
        Collective("all-reduce loss", "AllReduce", 32),
    ]


def share(config: Config, ranks: int) -> float:
    """Of Newton-Schulz' FLOPs: what the rank with the most matrices computes."""
    mine = whole = 0.0
    for count, rows, columns in shapes(config)[0].values():
        short, long = min(rows, columns), max(rows, columns)
        flops = 4.0 * short * short * long + 2.0 * short**3
        mine, whole = mine - (-count // ranks) * flops, whole + count * flops
    return mine / whole


@dataclass(frozen=True)
class Expected:
    ranks: int
    links: Links
    tokens: int  # of a rank
    communication: float  # ms
    ms: tuple[float, float]  # of a step, at both depths
    ratio: float  # to one GPU with as many tokens, at the second
    steps: int  # of a run


def expect(config: Config, alone: tuple[float, float], ranks: int, links: Links) -> Expected:
    """config: its batch and cap are the run's. alone: ms a step of micro_batch_tokens on one GPU, at both depths."""
    optimizer = ELEMENTWISE + NEWTON_SCHULZ * share(config, ranks)
    tokens = config.train_batch_tokens // (ranks * config.accumulation(ranks))
    communication = 1e3 * links.seconds(collectives(config, ranks), ranks)
    slowest = SLOWEST if ranks > 1 else 1.0

    def step(ms: float, portion: float) -> float:
        return slowest * ((ms - ELEMENTWISE - NEWTON_SCHULZ) * portion + optimizer) + communication

    portion = tokens / config.micro_batch_tokens
    first, second = (step(ms, portion * config.accumulation(ranks)) for ms in alone)
    seconds = config.max_wallclock_seconds - config.gptq_reserve_seconds
    early = min(config.recur_start_step, int(1e3 * seconds / first))
    steps = early + int((1e3 * seconds - early * first) / second)
    return Expected(ranks, links, tokens, communication, (first, second), step(alone[1], 1.0) / alone[1], steps)


def forecast(config: Config, alone: tuple[float, float]) -> str:
    """What to expect of one and two nodes of 8 GPUs, and the assumptions."""
    config = config.model_copy(update={"max_wallclock_seconds": 600.0})
    places = [(8, NVLINK), (16, INFINIBAND), (16, ETHERNET)]
    lines = [
        f"A run of {config.train_batch_tokens:,} tokens a step and 600 s, {config.gptq_reserve_seconds:.0f} of them in "
        f"reserve, recurrence from step {config.recur_start_step};",
        f"one GPU: {alone[0]:.1f} and {alone[1]:.1f} ms a step of {config.micro_batch_tokens:,} tokens, of it "
        f"{ELEMENTWISE + NEWTON_SCHULZ:.2f} ms optimizer.",
        f"Assumed: forward and backward in proportion to the tokens, the slowest GPU {100 * SLOWEST - 100:.0f}% slower "
        "than that one, no communication hidden,",
        *(
            f"  {links.name}: {links.bandwidth / 1e9:.0f} GB/s on the bus, {1e6 * links.latency:.0f} us a collective"
            for links in (NVLINK, INFINIBAND, ETHERNET)
        ),
        "",
        f"{'GPUs':>5s}  {'links':32s}{'tokens a GPU':>13s}{'MB sent':>9s}{'comm., ms':>11s}{'ms a step':>16s}"
        f"{'of one GPU':>12s}{'steps':>8s}",
    ]
    for ranks, links in places:
        e = expect(config, alone, ranks, links)
        sent = sum(c.on_the_bus(ranks) for c in collectives(config, ranks)) / 1e6
        lines.append(
            f"{ranks:5d}  {links.name:32s}{e.tokens:13,d}{sent:9.0f}{e.communication:11.2f}"
            f"{e.ms[0]:8.1f}{e.ms[1]:8.1f}{e.ratio:12.3f}{e.steps:8,d}"
        )
    return "\n".join([*lines, "(of one GPU: with as many tokens a GPU, at the second depth)"])


# ---------------------------------------------------------------------------------------------------- one world size
class Bench:
    """The training loop without its record, on every rank."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        model = GPT(config, select(config.kernels, ranks.device), ranks.dtype)
        self.model = model.initialise(config.seed).to(ranks.device)
        self.optimizer = Optimizer(self.model, config, ranks)
        self.forward_backward = micro_step(
            self.model, self.model.rotary(config.train_seq_len), [config.depth(x) for x in (False, True)]
        )
        self.loader = TrainLoader(config, ranks.rank, ranks.world_size, ranks.device)
        self.clock, self.done, self.losses = Clock(ranks), 0, list[float]()
        self.clock.start()

    def step(self, depth: tuple[int, ...]) -> None:
        """As Trainer does it, without accumulation."""
        x, y = next(self.loader)
        weight = x.numel() * self.ranks.world_size / self.config.train_batch_tokens
        with self.optimizer.sending(last=True):
            loss = self.forward_backward(x, y, depth, weight)
        norm = self.optimizer.step(self.done, 1.0)
        self.clock.push(self.done, self.clock.elapsed, loss, norm)
        self.done += 1
        self.losses += [report.loss for report in self.clock.collect()]

    def run(self, depth: tuple[int, ...], steps: int) -> list[float]:
        """Milliseconds of each of so many steps."""
        cuda = self.ranks.device.type == "cuda"
        marks: list[Any] = []
        for number in range(steps + 1):
            if number:
                self.step(depth)
            marks.append(torch.cuda.Event(enable_timing=True) if cuda else 1e3 * time.perf_counter())
            if cuda:
                marks[-1].record()
        self.losses += [report.loss for report in self.clock.collect(0)]
        if cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) if cuda else b - a for a, b in itertools.pairwise(marks)]


def hidden(start: float, end: float, busy: Sequence[tuple[float, float]]) -> float:
    """How much of an interval others cover, which are sorted and may overlap each other."""
    covered, reached = 0.0, start
    for a, b in busy:
        a, b = max(a, reached), min(b, end)
        if b > a:
            covered, reached = covered + b - a, b
    return covered


def profiled(bench: Bench, depth: tuple[int, ...], repeats: int) -> list[tuple[str, float, float]]:
    """This rank's NCCL kernels in order: name, ms, hidden ms."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        bench.run(depth, repeats)
    events = [e for e in profiler.events() or () if str(e.device_type).endswith("CUDA")]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    nccl = [span for span in spans if re.search("nccl.*Kernel", span[2])]
    busy = [(a, b) for a, b, name in spans if "nccl" not in name]
    return [(name, (b - a) / 1e3, hidden(a, b, busy) / 1e3) for a, b, name in nccl]


def communication(bench: Bench, depth: tuple[int, ...], repeats: int = 4) -> list[dict[str, Any]]:
    """One row a collective of a step: bytes, ms, ms with waiting, hidden share. Empty where nothing is profiled."""
    ranks = bench.ranks
    expected = collectives(bench.config, ranks.world_size, bench.model.ops.capturable)
    found = ranks.gather(profiled(bench, depth, repeats))
    if not found[0]:
        return []
    rows = []
    for place, wanted in enumerate(expected):
        mine = [calls[place :: len(expected)] for calls in found]
        names = {name for calls in mine for name, _, _ in calls}
        if any(len(calls) != repeats for calls in mine) or any(wanted.kind not in name for name in names):
            # A profiler may lose kernels; the times of the steps stand without them.
            print(f"collective {place} of a step is {names}, wanted {repeats} of {wanted.kind} on every rank: left out")
            return []
        steps = list(zip(*mine, strict=True))  # of each: name, ms and hidden ms by rank
        ms = statistics.median(min(call[1] for call in step) for step in steps)
        whole, away = (statistics.median(statistics.mean(call[k] for call in step) for step in steps) for k in (1, 2))
        rows.append(
            {
                "name": wanted.name, "bytes": wanted.bytes,
                "ms": round(ms, 4), "ms_with_waiting": round(whole, 4), "hidden_ms": round(away, 4),
                "bus_gb_s": round(wanted.on_the_bus(ranks.world_size) / ms / 1e6, 1),
            }
        )  # fmt: skip
    return rows


def measure(config: Config, ranks: Ranks, steps: int) -> Iterator[dict[str, Any]]:
    """Rows of both depths with micro_batch_tokens a rank."""
    config = config.model_copy(update={"train_batch_tokens": config.micro_batch_tokens * ranks.world_size})
    bench = Bench(config, ranks)
    benches, turns = [bench], min(TURNS, steps)
    if ranks.world_size > 1:
        lonely = config.model_copy(update={"train_batch_tokens": config.micro_batch_tokens})
        benches.append(Bench(lonely, Ranks(0, 1, ranks.device)))
    with ExitStack() as stack:
        for one in benches:
            stack.enter_context(one.loader)
        for recurrent in (False, True):
            depth = config.depth(recurrent)
            times: list[list[float]] = [[] for _ in benches]
            for turn in range(2 * turns):
                for one, mine in zip(benches, times, strict=True):
                    ranks.gather(None)  # so that all begin together
                    one.run(depth, 1)  # captures, or meets the others
                    found = one.run(depth, -(-steps // turns))
                    mine += found if turn >= turns else []
            each, *others = (ranks.gather(sorted(mine)) for mine in times)
            low, ms, high = (max(mine[int(len(mine) * q)] for mine in each) for q in (0.2, 0.5, 0.8))
            alone = [mine[len(mine) // 2] for mine in others[0]] if others else [ms]
            parts = communication(bench, depth) if ranks.world_size > 1 and ranks.device.type == "cuda" else []
            yield {
                "op": "training_step", "case": f"{ranks.world_size}-gpu" + ("" if recurrent else ", first depth"),
                "impl": config.kernels, "layers": len(depth), "gpus": ranks.world_size,
                "ms": round(ms, 3), "ms_p20": round(low, 3), "ms_p80": round(high, 3),
                "tflops": None, "gb_s": None, "percent_of_ceiling": None,
                "tokens_per_second": round(1e3 * config.train_batch_tokens / ms),
                "alone_ms": [round(each, 3) for each in alone],
                "ratio_to_alone": round(ms / statistics.mean(alone), 4),
                "collectives": parts,
            }  # fmt: skip


def curve(config: Config, ranks: Ranks, steps: int) -> dict[str, Any]:
    """Losses with micro_batch_tokens in all."""
    config = config.model_copy(update={"train_batch_tokens": config.micro_batch_tokens, "train_order": "shuffled"})
    bench = Bench(config, ranks)
    with bench.loader:
        first = bench.run(config.depth(False), steps // 2)
        times = bench.run(config.depth(True), steps - len(first))
    return {
        "op": "loss_curve", "case": f"{config.train_batch_tokens} tokens, {steps} steps, {ranks.world_size} GPUs",
        "impl": config.kernels, "gpus": ranks.world_size, "ms": round(statistics.median(times), 3),
        "percent_of_ceiling": None, "losses": [round(loss, 6) for loss in bench.losses],
    }  # fmt: skip


def work(config: Config, options: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """Everything of this world size; rows that rank 0 has."""
    rows: list[dict[str, Any]] = []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        if ranks.main:
            print(f"{row['case']}: {row['ms']:.2f} ms", flush=True)

    if options.curve:
        done(curve(config, ranks, options.curve))
        if ranks.world_size == options.gpus[0]:
            again = curve(config, ranks, options.curve)
            done(again | {"case": again["case"] + ", again"})
    for row in measure(config, ranks, options.steps):
        done(row)
    return rows


# ------------------------------------------------------------------------------------------------------- all of them
def compare(rows: list[dict[str, Any]]) -> None:
    """Add each step's ratio to the fewest GPUs, and each curve's differences from the first."""
    for op in ("training_step", "loss_curve"):
        first: dict[int, dict[str, Any]] = {}
        for row in (row for row in rows if row["op"] == op):
            base = first.setdefault(row.get("layers", 0), row)
            if op == "training_step":
                row["ratio"] = round(row["ms"] / base["ms"], 4)
            else:
                delta = torch.tensor(row["losses"], dtype=torch.float64) - torch.tensor(base["losses"]).double()
                windows = delta.unfold(0, min(WINDOW, len(delta)), 1).mean(1)
                row["worst_difference"] = round(delta.abs().max().item(), 6)
                row["worst_mean_difference"] = round(windows.abs().max().item(), 6)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'GPUs':>5s}{'layers':>8s}{'ms a step':>11s}{'ratio':>8s}{'to alone':>10s}{'tokens/s':>13s}{'comm., ms':>11s}"
        f"{'hidden':>8s}"
    ]
    for row in (row for row in rows if row["op"] == "training_step"):
        total = sum(part["ms_with_waiting"] for part in row["collectives"])
        away = f"{100 * sum(part['hidden_ms'] for part in row['collectives']) / total:7.0f}%" if total else f"{'-':>8s}"
        lines.append(
            f"{row['gpus']:5d}{row['layers']:8d}{row['ms']:11.2f}{row['ratio']:8.3f}{row['ratio_to_alone']:10.3f}"
            f"{row['tokens_per_second']:13,d}{sum(part['ms'] for part in row['collectives']):11.3f}{away}"
        )
        if row["gpus"] > 1:
            lines.append(f"{'':13s}each card alone: {', '.join(f'{ms:.2f}' for ms in row['alone_ms'])} ms")
        for part in row["collectives"]:
            times = f"{part['ms']:.4f} ms, {part['ms_with_waiting']:.4f} with waiting, hidden {part['hidden_ms']:.4f}"
            size = f"{part['bytes'] / 1e6:.2f} MB"
            lines.append(f"{'':13s}{part['name']:30s}{size:>10s}  {times}, {part['bus_gb_s']:.0f} GB/s")
    for row in (row for row in rows if row["op"] == "loss_curve"):
        lines.append(
            f"{row['case']:44s}{row['ms']:8.2f} ms  last loss {row['losses'][-1]:.4f}  worst difference "
            f"{row['worst_difference']:.6f}, of means of {WINDOW} steps {row['worst_mean_difference']:.6f}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Times by number of GPUs; communication, hidden and not; differences of loss curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    steps = [row for row in rows if row["op"] == "training_step"]
    names = [f"{row['gpus']} GPUs\n{row['layers']} layers" for row in steps]
    left.bar(names, [row["ms"] for row in steps], color=COLORS[0])
    for index, row in enumerate(steps):
        left.text(index, row["ms"], f"{row['ms']:.1f}\n{row['ratio']:.3f}", ha="center", va="bottom", fontsize=7)
    left.set_ylabel("ms a step; ratio to the first")
    left.margins(y=0.15)
    away = [sum(part["hidden_ms"] for part in row["collectives"]) for row in steps]
    whole = [sum(part["ms_with_waiting"] for part in row["collectives"]) for row in steps]
    middle.bar(names, away, color=COLORS[2], label="hidden")
    middle.bar(names, [b - a for a, b in zip(away, whole, strict=True)], bottom=away, color=COLORS[4], label="not")
    middle.set_ylabel("collectives, ms a step, with waiting")
    middle.legend(frameon=False)
    curves = [row for row in rows if row["op"] == "loss_curve"]
    for row in curves[1:]:
        delta = torch.tensor(row["losses"]).double() - torch.tensor(curves[0]["losses"]).double()
        right.plot(delta.tolist(), linewidth=1, label=row["case"])
    right.set_ylabel("loss, difference from the first (nats)")
    right.set_xlabel("step")
    if curves[1:]:
        right.legend(frameon=False, fontsize=6)
    for axis in (left, middle):
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def finish(config: Config, rows: list[dict[str, Any]], arguments: list[str], out: Path | None) -> None:
    """Compare, print, write and draw."""
    compare(rows)
    print(table(rows), flush=True)
    command, gpus = " ".join(["python -m bench.scaling", *arguments]), max(row["gpus"] for row in rows)
    path, rows = write_result("scaling", command, {}, rows, out, gpus)
    draw(rows, f"{config.micro_batch_tokens:,} tokens a GPU", path.with_suffix(".png"))
    print(path)
    alone = {row["layers"]: row["ms"] for row in rows if row["op"] == "training_step" and row["gpus"] == 1}
    if len(alone) == 2 and torch.cuda.is_available():
        print("\n" + forecast(config, (alone[min(alone)], alone[max(alone)])))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description="Time the training step on several GPUs.", allow_abbrev=False,
        epilog="any other option is a setting of train.py's: --data-path, --preset, --kernels ...",
    )  # fmt: skip
    parser.add_argument("--gpus", nargs="+", type=int, help="default: 1, 2, 4 ... of those that are there")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each depth")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="compare loss curves of so many steps")
    parser.add_argument("--predict", nargs=2, type=float, metavar="MS", help="only the model, from a step on one GPU")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/scaling-<gpu>.json")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # where one of several world sizes puts its rows
    options, settings = parser.parse_known_args(arguments)
    try:
        config = load_config(settings)
    except ConfigError as error:
        print(f"bench.scaling: {error}", file=sys.stderr)
        return 2
    if options.predict:
        print(forecast(config, tuple(options.predict)))
        return 0
    there = torch.cuda.device_count()
    options.gpus = options.gpus or [n for n in (1, 2, 4, 8, 16) if n <= max(there, 1)]
    if "RANK" in os.environ:
        with distributed(config.device) as ranks:
            rows = work(config, options, ranks)
            if ranks.main and options.rows:
                options.rows.write_text(json.dumps(rows))
            elif ranks.main:
                finish(config, rows, arguments, options.out)
        return 0
    if config.device != "cpu" and max(options.gpus) > there:
        print(f"bench.scaling: wants {max(options.gpus)} GPUs, found {there}; or --device cpu", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.gpus:
            file = Path(folder) / f"{count}.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            given = [*arguments, "--gpus", *map(str, options.gpus), "--rows", str(file)]
            done = subprocess.run([*launch, "-m", "bench.scaling", *given], cwd=ROOT, check=False)
            if done.returncode:
                print(f"bench.scaling: {count} processes ended with {done.returncode}", file=sys.stderr)
                break
            rows += json.loads(file.read_text())
    if rows:
        finish(config, rows, arguments, options.out)
    return 0 if len({row["gpus"] for row in rows}) == len(options.gpus) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
