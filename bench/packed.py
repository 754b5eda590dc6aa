"""What runs from packed weights: int6_linear beside bf16 products, and text, a token after the other.

    python -m bench.packed

int6_linear at 1 to 64 rows and at a whole batch, on the four shapes of the banks, values first; a case without a shape
is one product of each. Weights are not in cache: calls go round copies of the matrix that exceed the L2 cache several
times, in a CUDA graph each, which take turns; launches of ours overlap (`triton-apart` forbids it, as eager ops
between them do). Before that several streams have run something (see `crowd`). Peers: `cublas`, F.linear on the
dequantised bf16 matrix; `torchao` and `gemlite`, int8 weights, where they are installed. Milliseconds are medians of
replays over calls.

sample: a token of batch 1 from the model of preset one-gpu, 14 layers, random weights, the draw included: `triton` as
quantize.py sample, packed and in a CUDA graph; `dense` the same graph on bf16 weights and eager ops; `eager` without a
graph. Writes bench/results/packed-<gpu>.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import ceilings, draw_panels, peer, write_result
from gpt.config import build_config
from gpt.generate import Decoder, generate
from gpt.gptq import INPUTS, LEVELS, IntKind, Quantised, row_scales
from gpt.model import GPT
from gpt.packed import PackedGPT
from kernels import AUTO, int6, reference, select

DEVICE = torch.device("cuda")
SHAPES = {"qo": (512, 512), "kv": (256, 512), "up": (2048, 512), "down": (512, 2048)}  # rows, columns
ROWS = (1, 4, 16, 64, 98304)
COPIES = 200 << 20  # bytes of bf16 that calls go round
LIMIT = 5e-3  # of a relative error: wrong values are not timed
LIMITS = {"torchao": 2e-2, "gemlite": 2e-2}  # of those that round the weights anew
BYTES = {"triton": 0.75, "triton-apart": 0.75, "cublas": 2.0, "torchao": 1.0, "gemlite": 1.0}  # a weight

Call = Callable[[int], Tensor]  # the product with the copy of that number


def matrices(rows: int, columns: int, copies: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = copies, rows, columns
    codes = torch.randint(-31, 32, shape, generator=generator, device=DEVICE, dtype=torch.int8)
    scales = 2.0 ** -torch.randint(4, 12, shape[:2], generator=generator, device=DEVICE).half()
    return reference.pack_codes(codes), scales


def calls(x: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[str, Call]]:
    """Each implementation on all copies."""
    columns = x.size(1)
    yield "triton", lambda i: int6.int6_linear(x, codes[i], scales[i])
    if x.size(0) <= 64:
        spacer = torch.zeros(1, device=DEVICE)

        def apart(i: int) -> Tensor:
            spacer.zero_()  # a kernel that lets nothing start before it is done
            return int6.int6_linear(x, codes[i], scales[i])

        yield "triton-apart", apart
    # One after the other, so that float32 of all copies is never there.
    dense = torch.stack(
        [reference.int6_dequantise(*pair, None, columns, x.dtype) for pair in zip(codes, scales, strict=True)]
    )
    yield "cublas", lambda i: F.linear(x, dense[i])
    with peer("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layers = nn.ModuleList(linear(weight) for weight in dense)
        quantize_(layers, Int8WeightOnlyConfig())
        yield "torchao", lambda i: layers[i](x)
    with peer("gemlite"):
        from gemlite import helper

        make = getattr(helper, "A16W8_INT8", None) or helper.A16W8
        packed = [make(device="cuda:0", dtype=x.dtype).from_linear(linear(weight)) for weight in dense]
        yield "gemlite", lambda i: packed[i](x)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.size(1), weight.size(0), bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def crowd() -> None:
    """Let three streams run something.

    From then on an H100 takes 0.35 us longer over each launch of a graph, until the process ends. With fewer streams it
    is in that state or in the quicker one, as it happens, and figures of two runs cannot be compared.
    """
    for stream in [torch.cuda.Stream() for _ in range(3)]:
        with torch.cuda.stream(stream):
            torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()


def captured(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    """A graph that goes once round the copies."""
    for i in range(3):
        call(i % copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    return graph


def in_turn(graphs: Mapping[str, torch.cuda.CUDAGraph], copies: int, rounds: int = 20) -> dict[str, list[float]]:
    """Sorted milliseconds of a call of each, one graph after the other and round again: a slower card is so for all."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)] for _ in range(rounds + 1)]
    for row in events:
        row[0].record()
        for graph, event in zip(graphs.values(), row[1:], strict=True):
            graph.replay()
            event.record()
    torch.cuda.synchronize()
    times = zip(*([a.elapsed_time(b) / copies for a, b in itertools.pairwise(row)] for row in events[1:]), strict=True)
    return {name: sorted(each) for name, each in zip(graphs, times, strict=True)}


def measure_products(rows: int, measured: dict[str, float]) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (outputs, columns) in SHAPES.items():
        copies = 2 if rows > 64 else COPIES // (2 * outputs * columns)
        codes, scales = matrices(outputs, columns, copies)
        x = torch.randn(rows, columns, device=DEVICE).bfloat16()
        few = x[:4096].double()
        exact = few @ reference.int6_dequantise(codes[0], scales[0], None, columns, x.dtype).double().mT
        small, errors, graphs = rows <= 64, {}, {}
        every = list(calls(x, codes, scales))  # kept: graphs read what they hold
        for impl, call in every:
            with peer(impl):
                errors[impl] = ((call(0)[:4096].double() - exact).norm() / exact.norm()).item()
                if not errors[impl] < LIMITS.get(impl, LIMIT):
                    raise ValueError(f"int6_linear m{rows}-{name} {impl}: wrong values, error {errors[impl]}")
                graphs[impl] = captured(call, copies)
        if small:  # what stands between the calls of triton-apart
            graphs["spacer"] = captured(torch.zeros(1, device=DEVICE).fill_, copies)
        taken = in_turn(graphs, copies)
        spacer = statistics.median(taken.pop("spacer", [0.0]))
        for impl, times in taken.items():
            low, ms, high = (
                times[int(len(times) * q)] - (spacer if impl == "triton-apart" else 0.0) for q in (0.2, 0.5, 0.8)
            )
            flops = 2.0 * rows * outputs * columns
            moved = BYTES[impl] * outputs * columns + 2.0 * rows * (outputs + columns)
            found.setdefault(impl, []).append(
                {
                    "op": "int6_linear", "case": f"m{rows}-{name}", "impl": impl,
                    "ms": round(ms, 5), "ms_p20": round(low, 5), "ms_p80": round(high, 5),
                    "tflops": None if small else round(flops / ms / 1e9, 1),
                    "gb_s": round(moved / ms / 1e6, 1) if small else None,
                    "percent_of_ceiling": round(
                        100 * (moved / ms / 1e6 / measured["copy_gb_s"] if small
                               else flops / ms / 1e9 / measured["bf16_tflops"]), 1),
                    "error": errors[impl],
                }
            )  # fmt: skip
            print(f"m{rows:<6d}{name:6s}{impl:14s}{1e3 * ms:9.2f} us   error {errors[impl]:.2e}", flush=True)
    together = []
    framework = {row["case"]: row["error"] for row in found.get("cublas", ())}
    for impl, each in found.items():
        for row in each:
            row["reference_error"] = framework.get(row["case"])
        if len(each) == len(SHAPES):
            whole = {key: round(sum(row[key] for row in each), 5) for key in ("ms", "ms_p20", "ms_p80")}
            worst = {
                "error": max(row["error"] for row in each),
                "reference_error": max(framework.values(), default=None),
            }
            rates = {"tflops": None, "gb_s": None, "percent_of_ceiling": None}
            together.append({"op": "int6_linear", "case": f"m{rows}", "impl": impl} | whole | rates | worst)
    return together + [row for each in found.values() for row in each]


class Eager(Decoder):
    """Every step launched anew."""

    def _step(self) -> Tensor:
        return self.finish(self._logits(self.state[:2], self.state[2:]))


def models() -> dict[str, GPT]:
    """The same random weights packed, and dense with eager ops."""
    config = build_config(preset="one-gpu")
    model = GPT(config, select("reference", DEVICE), torch.bfloat16).initialise(0).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Quantised | Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        tensors[name] = parameter.half()
        if name in INPUTS:
            kind: IntKind = "int8" if name == "tok_emb" else "int6"
            scales = row_scales(parameter, 12.0, LEVELS[kind])
            codes = (parameter / scales.float()[..., None]).round().clamp(-LEVELS[kind], LEVELS[kind])
            tensors[name] = quantised = Quantised(kind, codes.to(torch.int8), scales)
            parameter.copy_(quantised.dequantise())
    packed = PackedGPT(config, tensors, select(AUTO, DEVICE), DEVICE, torch.bfloat16)
    return {"packed": packed, "dense": model.to(DEVICE)}


@torch.no_grad()
def measure_sample(tokens: int) -> list[dict[str, Any]]:
    made = models()
    depth = made["dense"].config.depth(True)
    rows = []
    for impl, model, decoder in (
        ("triton", made["packed"], Decoder),
        ("dense", made["dense"], Decoder),
        ("eager", made["dense"], Eager),
    ):
        times = []
        for begun in range(6):  # the first warms up and captures
            text = generate(model, depth, [5, 6, 7], tokens, 0.8, 0.95, begun, stop=(), decoder=decoder)
            for _ in range(4):
                next(text)
            begin = time.perf_counter()
            count = sum(1 for _ in text)
            times.append((time.perf_counter() - begin) / count * 1e3)
        ms = statistics.median(times[1:])
        empty = dict.fromkeys(("tflops", "gb_s", "percent_of_ceiling", "error", "reference_error"))
        spread = {"ms": round(ms, 4), "ms_p20": round(min(times[1:]), 4), "ms_p80": round(max(times[1:]), 4)}
        rows.append({"op": "sample", "case": f"{tokens}-tokens", "impl": impl} | spread | empty)
        print(f"sample {impl:8s}{1e3 / ms:9.1f} tokens/s", flush=True)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description="Time what runs from packed weights.")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="of x")
    parser.add_argument("--text", type=int, default=200, help="tokens of a text; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/packed-<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.packed: wants an NVIDIA GPU, found none", file=sys.stderr)
        return 2
    measured = ceilings()
    crowd()
    command = " ".join(["python -m bench.packed", *arguments])
    for count in options.rows:
        path, whole = write_result("packed", command, measured, measure_products(count, measured), options.out)
    if options.text:
        path, whole = write_result("packed", command, measured, measure_sample(options.text), options.out)
    draw_panels(whole, f"ms, {torch.cuda.get_device_name()}", path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
