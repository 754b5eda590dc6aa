"""Every op beside its peers: values first, then milliseconds, TFLOP/s or GB/s and percent of the card's ceiling.

    python -m bench.kernels --tokens data/fineweb_val_000000.bin            all ops
    python -m bench.kernels --ops attention --cases seed documents --tokens ...
    pytest bench/test_kernels.py                                            the same table under pytest-benchmark

Each implementation of a case is checked against the reference in float64, on a small batch or on rows of the whole one,
and then timed, forward and backward apart, in one process; medians of triton.testing.do_bench. Peers: `compiled` is
torch.compile of the reference with mix-order reduction off; `cudnn+xsa`, `fa4+xsa` (flash-attn-4) and `flex+xsa`
compute attention with their own kernel and XSA with torch.compile; `liger` and `quack` where they are installed and
have the op. Writes bench/results/kernels-<gpu>.json and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.common import COLORS, ceilings, document_starts, read_tokens, write_result
from kernels import attention, attention_input, cross_entropy, embedding, matmul, mlp, reference, residual, rotary

Function = Callable[..., Any]

ROWS, LENGTH = 48, 2048
# batch, length, query heads, KV heads, head dimension; `documents` has those of real rows
ATTENTION = {
    "seed": (48, 2048, 8, 4, 64),
    "documents": (48, 2048, 8, 4, 64),
    "long": (1, 32768, 8, 4, 64),
    "short": (192, 512, 8, 4, 64),
    "single": (1, 2048, 8, 4, 64),
    "d128": (48, 2048, 4, 2, 128),
    "h16-2": (48, 2048, 16, 2, 64),
}


@dataclass(frozen=True)
class Workload:
    """One op at one size: the same inputs for every implementation."""

    inputs: tuple[Tensor, ...]  # those that require a gradient come first
    exact: Function  # the specification; called with float64 inputs
    implementations: dict[str, Function]  # `triton` is ours
    work: tuple[float, float]  # forward and backward: FLOPs where `unit` is "tflops", else bytes
    unit: str = "tflops"
    backward_apart: bool = True  # False: only forward and backward together are a row
    # Rows of the batch, and last positions of each, on which `exact` is computed; None: a small batch stands for this.
    checked: tuple[int, int] | None = None

    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs if x.requires_grad]


def compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, gradient: bool = True) -> Tensor:
    x = torch.randn(shape, device="cuda") * scale
    return x.to(dtype).requires_grad_(gradient)


# ------------------------------------------------------------------------------------------------------- attention
def attention_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    batch, length, heads, kv_heads, dim = ATTENTION[case]
    # Views of one packed tensor, as a fused projection leaves them.
    packed = random(batch, length, (heads + 2 * kv_heads) * dim, gradient=False)
    sizes = [n * dim for n in (heads, kv_heads, kv_heads)]
    q, k, v = (x.unflatten(-1, (-1, dim)).detach().requires_grad_() for x in packed.split(sizes, -1))
    position = torch.arange(length, device="cuda")
    starts = torch.zeros(batch, length, dtype=torch.int32, device="cuda")
    documents = case == "documents"
    if documents:
        if tokens is None:
            raise ValueError("case documents: wants --tokens, a shard of real text")
        starts = document_starts(tokens[: batch * length].view(batch, length))
    pairs = int((position + 1 - starts).sum())
    rows, tail = min(batch, 2), length if length <= 4096 else 256
    seen = (position <= position[-tail:, None]) & (position >= starts[:rows, -tail:, None])

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last `tail` queries of the first rows."""
        y = F.scaled_dot_product_attention(
            q[:, -tail:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen[:, None], enable_gqa=True
        )
        return reference.exclusive(y.transpose(1, 2), v[:, -tail:])

    # XSA of a peer rounds attention's output first; compiled, it is one pass forward and one backward.
    xsa = compiled(reference.exclusive)

    def swapped(function: Function) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
            return out

        return call

    peers: dict[str, Function] = {}
    if not documents:

        def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        peers["cudnn+xsa"] = swapped(cudnn)
    if find_spec("flash_attn"):
        peers["fa4+xsa"] = flash_attention_4(starts if documents else None)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query]) if documents else key <= query

    blocks = create_block_mask(visible, batch if documents else None, None, length, length, device="cuda")
    flex = torch.compile(flex_attention)
    peers["flex+xsa"] = swapped(lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True))
    given = starts if documents else None
    return Workload(
        (q, k, v),
        exact,
        {
            "triton": lambda q, k, v: attention.attention(q, k, v, given),
            "triton-deterministic": lambda q, k, v: attention.attention(q, k, v, given, True),
            **{name: (lambda q, k, v, f=f: xsa(f(q, k, v), v)) for name, f in peers.items()},
        },
        (4.0 * dim * heads * pairs, 10.0 * dim * heads * pairs),
        checked=(rows, tail),
    )


def flash_attention_4(starts: Tensor | None) -> Function:
    """Dense, or through its variable-length interface with the documents of all rows in one long row."""
    if starts is None:
        from flash_attn.cute import flash_attn_func

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_func(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return dense
    from flash_attn.cute import flash_attn_varlen_func

    batch, length = starts.shape
    first = (torch.arange(length, device="cuda") == starts).flatten().nonzero().flatten()
    bounds = F.pad(first, (0, 1), value=batch * length).int()
    longest = int(bounds.diff().max())

    def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(
            *flat, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        return (out[0] if isinstance(out, tuple) else out).view(q.shape)

    return documents


# ------------------------------------------------------------------------------------------- the rest of the model
def stream(small: bool, dim: int = 512, gradient: bool = True) -> Tensor:
    return random(2 if small else ROWS, LENGTH, dim, gradient=gradient)


def mlp_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, up, down = stream(small), random(2048, 512, scale=512**-0.5), random(512, 2048, scale=2048**-0.5)
    flops = 4.0 * x.numel() * 2048
    implementations: dict[str, Function] = {
        "triton": lambda x, up, down: mlp.mlp(x, up, down, 1.0),
        "compiled": compiled(lambda x, up, down: reference.mlp(x, up, down, 1.0)),
    }
    return Workload(
        (x, up, down), lambda x, up, down: reference.mlp(x, up, down, 1.0), implementations, (flops, 2 * flops)
    )


def linear_add_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, y, weight = stream(small), stream(small), random(512, 512, scale=512**-0.5)
    flops = 2.0 * x.numel() * 512
    implementations: dict[str, Function] = {"triton": matmul.linear_add, "compiled": compiled(reference.linear_add)}
    return Workload((x, y, weight), reference.linear_add, implementations, (flops, 2 * flops))


def attention_input_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, x0, skip = stream(small), stream(small), stream(small)
    mix, skip_weight, skip_gate = (random(*shape, dtype=torch.float32) for shape in ((2, 512), (512,), (512,)))
    weight, gain = random(1024, 512, scale=512**-0.5), random(8, dtype=torch.float32)
    cos, sin = reference.rotary_table(LENGTH, 16, 1e4, LENGTH, "cuda")

    def call(op: Function) -> Function:
        def run(x: Tensor, x0: Tensor, mix: Tensor, weight: Tensor, gain: Tensor, *skip: Tensor) -> Tensor:
            qkv, x, x0 = op(x, x0, mix, skip or None, weight, gain, cos, sin, 0.5)
            return torch.cat((qkv.flatten(2), x, x0), -1)

        return run

    inputs = (x, x0, mix, weight, gain, *((skip, skip_weight, skip_gate) if case == "skip" else ()))
    stream_bytes, skips = 2.0 * x.numel(), case == "skip"
    return Workload(
        inputs,
        call(reference.attention_input),
        {"triton": call(attention_input.attention_input), "compiled": compiled(call(reference.attention_input))},
        ((8 + skips) * stream_bytes, (19 + 2 * skips) * stream_bytes),
        unit="gb_s",
    )


def rms_norm_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x = stream(small)
    implementations: dict[str, Function] = {"triton": residual.rms_norm, "compiled": compiled(reference.rms_norm)}
    weight = torch.ones(512, device="cuda", dtype=x.dtype)
    if find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        implementations["liger"] = lambda x: LigerRMSNormFunction.apply(
            x, weight, reference.RMS_EPS, 0.0, "llama", False
        )
    if find_spec("quack"):
        from quack.rmsnorm import rmsnorm

        implementations["quack"] = lambda x: rmsnorm(x, weight, eps=reference.RMS_EPS)
    return Workload((x,), reference.rms_norm, implementations, (4.0 * x.numel(), 6.0 * x.numel()), unit="gb_s")


def residual_mix_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, x0, skip = stream(small), stream(small), stream(small)
    mix, weight, gate = (random(*shape, dtype=torch.float32) for shape in ((2, 512), (512,), (512,)))

    def exact(x: Tensor, x0: Tensor, skip: Tensor, mix: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return reference.residual_mix(reference.skip_mix(x, skip, weight, gate), x0, mix)

    implementations: dict[str, Function] = {
        "triton": lambda x, x0, skip, mix, weight, gate: residual.residual_mix(x, x0, mix, skip, weight, gate),
        "compiled": compiled(exact),
    }
    streams = 2.0 * x.numel()
    return Workload((x, x0, skip, mix, weight, gate), exact, implementations, (4 * streams, 7 * streams), unit="gb_s")


def qk_norm_rotary_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    q, k = (stream(small, heads * 64).detach().unflatten(-1, (heads, 64)).requires_grad_() for heads in (8, 4))
    gain = random(8, dtype=torch.float32)
    cos, sin = reference.rotary_table(LENGTH, 16, 1e4, LENGTH, "cuda")
    implementations: dict[str, Function] = {
        "triton": lambda q, k, gain: rotary.qk_norm_rotary(q, k, gain, cos, sin),
        "compiled": compiled(lambda q, k, gain: reference.qk_norm_rotary(q, k, gain, cos, sin)),
    }
    streams = 2.0 * (q.numel() + k.numel())
    joined = {name: (lambda *x, f=f: torch.cat(f(*x), 2)) for name, f in implementations.items()}
    exact = lambda q, k, gain: torch.cat(reference.qk_norm_rotary(q, k, gain, cos, sin), 2)  # noqa: E731
    return Workload((q, k, gain), exact, joined, (4 * streams, 5 * streams), unit="gb_s")


def embed_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    rows = 2 if small else ROWS
    ids = torch.randint(8192, (rows, LENGTH), device="cuda")
    if tokens is not None:
        ids = tokens[: rows * LENGTH].view(rows, LENGTH)
    weight, gate = random(8192, 512, dtype=torch.float32), random(512, dtype=torch.float32)
    call = {
        name: (lambda weight, gate, f=f: f(ids, weight, gate, None, torch.bfloat16))
        for name, f in (("triton", embedding.embed), ("compiled", compiled(reference.embed)))
    }
    streams = 2.0 * rows * LENGTH * 512
    return Workload(
        (weight, gate),
        lambda weight, gate: reference.embed(ids, weight, gate, None, torch.float64),
        call,
        (streams, 2 * streams),
        unit="gb_s",
    )


def linear_cross_entropy_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, weight = stream(small), random(8192, 512, scale=0.1)
    targets = torch.randint(8192, x.shape[:2], device="cuda")
    implementations: dict[str, Function] = {
        "triton": lambda x, weight: cross_entropy.linear_cross_entropy(x, weight, targets, 30.0),
        "compiled": compiled(lambda x, weight: reference.linear_cross_entropy(x, weight, targets, 30.0)),
    }
    if find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger

        implementations["liger"] = lambda x, weight: liger.apply(
            x.flatten(0, 1), weight, targets.flatten(), None, None, -100, 0.0, 0.0, "mean", 30.0
        )[0]
    flops = 2.0 * x.numel() * 8192
    return Workload(
        (x, weight),
        lambda x, weight: reference.linear_cross_entropy(x, weight, targets, 30.0),
        implementations,
        (flops, 2 * flops),
        backward_apart=False,
    )


# Op -> its cases and how to set one up: (case, small, tokens) -> Workload.
OPS: dict[str, tuple[tuple[str, ...], Callable[[str, bool, Tensor | None], Workload]]] = {
    "attention": (tuple(ATTENTION), attention_workload),
    "mlp": (("seed",), mlp_workload),
    "linear_add": (("seed",), linear_add_workload),
    "attention_input": (("seed", "skip"), attention_input_workload),
    "rms_norm": (("seed",), rms_norm_workload),
    "residual_mix": (("seed",), residual_mix_workload),
    "qk_norm_rotary": (("seed",), qk_norm_rotary_workload),
    "embed": (("seed",), embed_workload),
    "linear_cross_entropy": (("seed",), linear_cross_entropy_workload),
}


# ------------------------------------------------------------------------------------------------------- measuring
def errors(workload: Workload) -> dict[str, tuple[float, float]]:
    """Relative Frobenius errors against float64 of the output, and the worst of the gradients."""
    rows, tail = workload.checked or (None, 0)
    exact_inputs = [x.detach()[:rows].double().requires_grad_(x.requires_grad) for x in workload.inputs]
    wanted = workload.exact(*exact_inputs)
    g = torch.randn_like(wanted) if wanted.dim() else torch.ones_like(wanted)
    leaves = [x for x in exact_inputs if x.requires_grad]
    truth = (wanted, *torch.autograd.grad(wanted, leaves, g))
    found = {}
    for name, function in workload.implementations.items():
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in workload.inputs]
        out = function(*inputs)
        grad = torch.zeros_like(out)
        grad[:rows, -tail:].copy_(g) if tail else grad.copy_(g)
        got = torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad)
        mine = (out[:rows, -tail:] if tail else out, *(x[:rows] for x in got))
        each = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(mine, truth, strict=True)]
        found[name] = (each[0], max(each[1:]))
    return found


def phases(workload: Workload, function: Function) -> dict[str, Callable[[], Any]]:
    """What is timed: forward and backward, apart or together."""
    leaves = workload.leaves()
    if not workload.backward_apart:
        return {"": lambda: torch.autograd.grad(function(*workload.inputs), leaves)}
    out = function(*workload.inputs)
    g = torch.randn_like(out)
    return {
        "_forward": lambda: function(*workload.inputs),
        "_backward": lambda: torch.autograd.grad(out, leaves, g, retain_graph=True),
    }


def measure(op: str, case: str, tokens: Tensor | None, measured: dict[str, float]) -> list[dict[str, Any]]:
    from triton.testing import do_bench

    build = OPS[op][1]
    try:
        workload = build(case, False, tokens)
    except ValueError as error:
        print(f"{op} {case}: left out: {error}")
        return []
    found = errors(workload if workload.checked else build(case, True, tokens))
    peer = next((name for name in workload.implementations if not name.startswith("triton")), None)
    rows = []
    for name, function in workload.implementations.items():
        if not max(found[name]) < 3e-2:
            print(f"{op:20s} {case:10s} {name:22s} left out: wrong values, errors {found[name]}")
            continue
        for phase, call in phases(workload, function).items():
            low, ms, high = do_bench(call, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
            work = {"_forward": workload.work[0], "_backward": workload.work[1], "": sum(workload.work)}[phase]
            rate = work / ms / (1e9 if workload.unit == "tflops" else 1e6)
            ceiling = measured["bf16_tflops" if workload.unit == "tflops" else "copy_gb_s"]
            which = 1 if phase == "_backward" else 0
            rows.append(
                {
                    "op": op + phase, "case": case, "impl": name,
                    "ms": round(ms, 4), "ms_p20": round(low, 4), "ms_p80": round(high, 4),
                    "tflops": round(rate, 1) if workload.unit == "tflops" else None,
                    "gb_s": round(rate, 1) if workload.unit == "gb_s" else None,
                    "percent_of_ceiling": round(100 * rate / ceiling, 1),
                    "error": found[name][which], "reference_error": found[peer][which] if peer else None,
                }
            )  # fmt: skip
            unit = "TFLOP/s" if workload.unit == "tflops" else "GB/s"
            print(
                f"{op + phase:30s} {case:10s} {name:22s} {ms:8.3f} ms {rate:8.1f} {unit:7s} "
                f"{100 * rate / ceiling:5.1f} %   error {found[name][which]:.2e}",
                flush=True,
            )
    return rows


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A panel an op and case: milliseconds of each implementation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["op"], row["case"]), []).append(row)
    columns = 4
    figure = Figure(figsize=(14, 1.9 * -(-len(panels) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axis, ((op, case), panel) in zip(axes, panels.items(), strict=False):
        names = [row["impl"] for row in panel]
        colors = [COLORS[0] if name.startswith("triton") else COLORS[6] for name in names]
        axis.barh(names, [row["ms"] for row in panel], color=colors)
        for index, row in enumerate(panel):
            axis.text(0, index, f" {row['ms']:.3f} ms, {row['percent_of_ceiling']:.0f}%", va="center", fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{op}, {case}", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time every op beside its peers.")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--cases", nargs="+", help="only these cases of each op")
    parser.add_argument("--tokens", type=Path, help="a token shard, for attention's case `documents`")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/kernels-<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernels: wants an NVIDIA GPU, found none", file=sys.stderr)
        return 2
    tokens = read_tokens(options.tokens, ROWS * LENGTH).cuda() if options.tokens else None
    measured = ceilings()
    print(f"{torch.cuda.get_device_name()}: {measured}")
    command = "python -m bench.kernels " + " ".join(arguments)
    for op in options.ops:
        rows = []
        for case in OPS[op][0]:
            if options.cases is None or case in options.cases:
                rows += measure(op, case, tokens, measured)
                torch.cuda.empty_cache()
        path, whole = write_result("kernels", command, measured, rows, options.out)
    draw(whole, f"ms and percent of the ceiling, {torch.cuda.get_device_name()}", path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
