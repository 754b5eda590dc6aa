"""Every op beside its peers: values first, then milliseconds, TFLOP/s or GB/s and percent of the card's ceiling.

    python -m bench.kernels --tokens data/fineweb_val_000000.bin            all ops
    python -m bench.kernels --ops attention --cases seed documents --tokens ...
    pytest bench/test_kernels.py                                            the same table under pytest-benchmark

Each implementation of a case is checked against the reference in float64, on a small batch or on rows of the whole one,
and then timed, forward and backward apart, in one process, as CUDA graphs (`graph` in the rows: where one cannot be
captured, the host's launches may be timed too), one implementation after the other and round again, the L2 cache
emptied before each; medians. Peers: `compiled` is torch.compile of the reference with mix-order reduction off;
`cudnn+xsa`, `fa4+xsa` (flash-attn-4) and `flex+xsa` compute attention with their own kernel and XSA with torch.compile;
`liger` and `quack`; `eager`, the reference as it stands; and for what bench.optimizer and bench.packed time in their
own ways, theirs. A peer that is not installed, raises or gives wrong values is left out with a word; ours ends the
run. `triton-packed`: q, k and v are heads of one tensor, and so are their gradients; what training calls is
`attention_layer`.
`triton-fp8` is checked against a specification of its own. `reference_error` is the error of the framework's own op:
cuDNN's, FlexAttention's for documents, else `compiled`. Writes bench/results/kernels-<gpu>.json and .png.
"""

from __future__ import annotations

import argparse
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import optimizer, packed
from bench.common import ceilings, document_starts, draw_panels, peer, read_tokens, relative_errors, write_result
from gpt.config import BOS
from kernels import (
    attention,
    attention_input,
    cached_attention,
    cross_entropy,
    embedding,
    gptq,
    int6,
    matmul,
    mlp,
    reference,
    residual,
    rotary,
)
from kernels import optimizer as updates
from kernels.compiled import attention_mask as compiled_attention_mask
from kernels.compiled import attention_qkv as compiled_attention_qkv

# The backward of one graph is timed again and again: it may not use up what the forward saved.
torch._functorch.config.donated_buffer = False

Function = Callable[..., Any]

DEVICE = torch.device("cuda")
HALF = torch.bfloat16
ROWS, LENGTH = 48, 2048
ROUNDS = 40
LIMIT = 3e-2  # of a relative error: wrong values are not timed
FRAMEWORK = ("cudnn+xsa", "flex+xsa", "compiled", "cublas")  # the first of these is the framework's own op of a case
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
    """One op at one size: the same inputs for every implementation. It returns a tensor or a tuple of tensors."""

    inputs: tuple[Tensor, ...]  # those that require a gradient come first; where none does, there is no backward
    exact: Function  # the specification; called with float64 inputs
    implementations: dict[str, Function]  # `triton` is ours
    work: tuple[float, float]  # forward and backward: FLOPs where `unit` is "tflops", else bytes
    unit: str = "tflops"
    backward_apart: bool = True  # False: only forward and backward together are a row
    # Rows of the batch, and last positions of each, on which `exact` is computed; None: a small batch stands for this.
    checked: tuple[int | None, int] | None = None
    in_place: bool = False  # changes its inputs
    # Implementations that launch CUDA graphs of their own, or wait for the device: timed as they are.
    uncaptured: frozenset[str] = frozenset()
    # Implementations that take the inputs, one behind the other along the heads, as one tensor (B, T, heads, D).
    packed: dict[str, Tensor] = field(default_factory=dict)
    # The specification of implementations that are of other arithmetic.
    exact_of: dict[str, Function] = field(default_factory=dict)

    def inputs_of(self, name: str) -> tuple[Tensor, ...]:
        return (self.packed[name],) if name in self.packed else self.inputs


ALL = None, 0  # `checked`, as it is


def compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, gradient: bool = True) -> Tensor:
    x = torch.randn(shape, device=DEVICE) * scale
    return x.to(dtype).requires_grad_(gradient)


# ------------------------------------------------------------------------------------------------------- attention
def attention_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    batch, length, heads, kv_heads, dim = ATTENTION[case]
    # Views of one packed tensor, as a fused projection leaves them.
    packed = random(batch, length, (heads + 2 * kv_heads) * dim, gradient=False)
    sizes = [n * dim for n in (heads, kv_heads, kv_heads)]
    q, k, v = (x.unflatten(-1, (-1, dim)).detach().requires_grad_() for x in packed.split(sizes, -1))
    qkv = packed.unflatten(-1, (-1, dim)).detach().requires_grad_()
    position = torch.arange(length, device=DEVICE)
    starts = torch.zeros(batch, length, dtype=torch.int32, device=DEVICE)
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
    with peer("fa4+xsa"):
        peers["fa4+xsa"] = flash_attention_4(starts if documents else None)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query]) if documents else key <= query

    with peer("flex+xsa"):
        blocks = create_block_mask(visible, batch if documents else None, None, length, length, device=DEVICE)
        flex = compiled(flex_attention)
        peers["flex+xsa"] = swapped(lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True))
    given = starts if documents else None
    return Workload(
        (q, k, v),
        exact,
        {
            "triton": lambda q, k, v: attention.attention(q, k, v, given),
            "triton-packed": lambda qkv: attention.attention_qkv(qkv, kv_heads, given),
            "triton-deterministic": lambda q, k, v: attention.attention(q, k, v, given, True),
            **{name: (lambda q, k, v, f=f: xsa(f(q, k, v), v)) for name, f in peers.items()},
        },
        (4.0 * dim * heads * pairs, 10.0 * dim * heads * pairs),
        checked=(rows, tail),
        packed={"triton-packed": qkv},
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
    first = (torch.arange(length, device=DEVICE) == starts).flatten().nonzero().flatten()
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
    if torch.cuda.get_device_capability() >= (8, 9):
        implementations["triton-fp8"] = lambda x, up, down: mlp.mlp_fp8(x, up, down, 1.0)
    return Workload(
        (x, up, down),
        lambda x, up, down: reference.mlp(x, up, down, 1.0),
        implementations,
        (flops, 2 * flops),
        exact_of={"triton-fp8": lambda x, up, down: reference.mlp_fp8(x, up, down, 1.0)},
    )


def linear_add_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, y, weight = stream(small), stream(small), random(512, 512, scale=512**-0.5)
    flops = 2.0 * x.numel() * 512

    def call(op: Function) -> Function:
        return lambda *tensors: op(*tensors)[0]

    return Workload(
        (x, y, weight),
        call(reference.linear_add),
        {"triton": call(matmul.linear_add), "compiled": compiled(call(reference.linear_add))},
        (flops, 2 * flops),
    )


def attention_input_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x, x0, skip = stream(small), stream(small), stream(small)
    mix, skip_weight, skip_gate = (random(*shape, dtype=torch.float32) for shape in ((2, 512), (512,), (512,)))
    weight, gain = random(1024, 512, scale=512**-0.5), random(8, dtype=torch.float32)
    cos, sin = reference.rotary_table(LENGTH, 16, 1e4, LENGTH, DEVICE)

    def call(op: Function) -> Function:
        def run(x: Tensor, x0: Tensor, mix: Tensor, weight: Tensor, gain: Tensor, *skip: Tensor) -> Any:
            return op(x, x0, mix, skip or None, weight, gain, cos, sin, 0.5)

        return run

    inputs = (x, x0, mix, weight, gain, *((skip, skip_weight, skip_gate) if case == "skip" else ()))
    # As the op's docstring counts, qkv being two streams: forward x and x0 read, the mix written and read, qkv written;
    # a skip is read, and backward its gradient written too.
    stream_bytes, skips = 2.0 * x.numel(), case == "skip"
    return Workload(
        inputs,
        call(reference.attention_input),
        {"triton": call(attention_input.attention_input), "compiled": compiled(call(reference.attention_input))},
        ((6 + skips) * stream_bytes, (19 + 2 * skips) * stream_bytes),
        unit="gb_s",
    )


def attention_layer_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """What training calls; `triton-apart`: its three ops, one after the other, as before they were one."""
    inputs = attention_input_workload(case, small, tokens).inputs
    inputs = *inputs[:5], random(512, 512, scale=512**-0.5), *inputs[5:]
    rows = inputs[0].size(0)
    cos, sin = reference.rotary_table(LENGTH, 16, 1e4, LENGTH, DEVICE)
    starts = exact_mask = peer_mask = None
    seen = torch.arange(1, LENGTH + 1, device=DEVICE).expand(rows, -1)
    if case == "documents":
        if tokens is None:
            raise ValueError("case documents: wants --tokens, a shard of real text")
        first = tokens[: rows * LENGTH].view(rows, LENGTH) == BOS
        starts, exact_mask = attention.document_starts(first), reference.attention_mask(first)
        peer_mask, seen = compiled_attention_mask(first), seen - starts

    def call(op: Function, mask: Any) -> Function:
        def run(x: Tensor, x0: Tensor, mix: Tensor, weight: Tensor, gain: Tensor, output: Tensor, *skip: Tensor) -> Any:
            y, _, *others = op(x, x0, mix, skip or None, weight, gain, cos, sin, 0.5, output, mask)
            return y, *others

        return run

    apart, peer = (
        partial(reference.attention_layer, parts=parts)
        for parts in (
            (attention_input.attention_input, attention.attention_qkv, matmul.linear_add),
            (reference.attention_input, compiled_attention_qkv, reference.linear_add),
        )
    )
    product, attended = 2.0 * inputs[0].numel() * (1024 + 512), 4.0 * 512 * int(seen.sum())
    return Workload(
        inputs,
        call(reference.attention_layer, exact_mask),
        {
            "triton": call(attention_input.attention_layer, starts),
            "triton-apart": call(apart, starts),
            "compiled": compiled(call(peer, peer_mask)),
        },
        (product + attended, 2 * product + 2.5 * attended),
    )


def rms_norm_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    x = stream(small)
    implementations: dict[str, Function] = {"triton": residual.rms_norm, "compiled": compiled(reference.rms_norm)}
    with peer("liger"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        implementations["liger"] = lambda x: LigerRMSNormFunction.apply(x, None, reference.RMS_EPS, 0.0, "llama", False)
    with peer("quack"):
        from quack.rmsnorm import rmsnorm

        implementations["quack"] = lambda x: rmsnorm(x, None, eps=reference.RMS_EPS)
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
    cos, sin = reference.rotary_table(LENGTH, 16, 1e4, LENGTH, DEVICE)
    implementations: dict[str, Function] = {
        "triton": lambda q, k, gain: rotary.qk_norm_rotary(q, k, gain, cos, sin),
        "compiled": compiled(lambda q, k, gain: reference.qk_norm_rotary(q, k, gain, cos, sin)),
    }
    streams = 2.0 * (q.numel() + k.numel())
    return Workload(
        (q, k, gain),
        lambda q, k, gain: reference.qk_norm_rotary(q, k, gain, cos, sin),
        implementations,
        (2 * streams, 3 * streams),
        unit="gb_s",
    )


def embed_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    rows = 2 if small else ROWS
    # Frequencies like text's: the gradient sums over the tokens of a kind.
    frequency = 1.0 / torch.arange(1.0, 8193.0, device=DEVICE)
    seeded = torch.Generator(DEVICE).manual_seed(0)
    ids = torch.multinomial(frequency, rows * LENGTH, replacement=True, generator=seeded).view(rows, LENGTH)
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
    """Loss and gradients; `none`: the loss of every token, without."""
    reduction, learns = ("none", False) if case == "none" else ("mean", True)
    x, weight = stream(small, gradient=learns), random(8192, 512, scale=0.1, gradient=learns)
    targets = torch.randint(8192, x.shape[:2], device=DEVICE)
    implementations: dict[str, Function] = {
        "triton": lambda x, weight: cross_entropy.linear_cross_entropy(x, weight, targets, 30.0, reduction),
        "compiled": compiled(lambda x, weight: reference.linear_cross_entropy(x, weight, targets, 30.0, reduction)),
    }
    with peer("liger"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger

        implementations["liger"] = lambda x, weight: liger.apply(
            x.flatten(0, 1), weight, targets.flatten(), None, None, -100, 0.0, 0.0, reduction, 30.0
        )[0].view(targets.shape if case == "none" else ())
    flops = 2.0 * x.numel() * 8192
    return Workload(
        (x, weight),
        lambda x, weight: reference.linear_cross_entropy(x, weight, targets, 30.0, reduction),
        implementations,
        (flops, 2 * flops if learns else 0.0),
        backward_apart=False,
        uncaptured=frozenset({"liger"}),
    )


# ------------------------------------------------------------------------------------------------------ optimizer
BETAS, EPS, EMA, MU = (0.9, 0.95), 1e-8, 0.9, 0.95  # an EMA that moves: its errors show


def newton_schulz_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """All banks of the seed's model."""
    shapes = [tuple(bank.parameter.shape) for bank in optimizer.seed_optimizer().banks]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = random(sum(sizes), dtype=HALF, gradient=False).split(sizes)
    return Workload(
        tuple(part.view(shape) for part, shape in zip(flat, shapes, strict=True)),
        lambda *banks: tuple(reference.newton_schulz(banks, optimizer.COEFFICIENTS)),
        {name: (lambda *banks, f=f: tuple(f(banks))) for name, f in optimizer.newton_schulz_peers().items()},
        (optimizer.newton_schulz_flops(shapes), 0.0),
        checked=ALL,
        uncaptured=frozenset({"gram-newton-schulz"}),
    )


def both(call: Function) -> dict[str, Function]:
    """The reference as it stands and compiled; call: an op -> what it is to run."""
    return {"eager": call, "compiled": compiled(call)}


def muon_momentum_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """All banks, float32 gradients; u and the momenta are what is compared."""
    shapes = [bank.parameter.shape for bank in optimizer.seed_optimizer().banks]
    inputs = [random(*shape, dtype=torch.float32, gradient=False) for shape in (*shapes, *shapes)]
    clip, row_norm = torch.tensor(0.7, device=DEVICE), optimizer.CONFIG.muon_row_norm

    def call(op: Function, dtype: torch.dtype) -> Function:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            gradients, momenta = tensors[: len(shapes)], tensors[len(shapes) :]
            return *op(gradients, momenta, clip, MU, row_norm, dtype), *momenta

        return run

    return Workload(
        tuple(inputs),
        call(reference.muon_momentum, torch.float64),
        {"triton": call(updates.muon_momentum, HALF), **both(call(reference.muon_momentum, HALF))},
        # Gradient and momentum read, momentum and u written.
        (14.0 * sum(shape.numel() for shape in shapes), 0.0),
        unit="gb_s", checked=ALL, in_place=True,
    )  # fmt: skip


def muon_update_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """All banks and their EMA, updates in the model's dtype; rates so large that errors of the change show."""
    banks = optimizer.seed_optimizer().banks
    shapes, scales = [bank.parameter.shape for bank in banks], [bank.update_scale for bank in banks]
    inputs = [
        random(*shape, dtype=dtype, gradient=False)
        for dtype in (torch.float32, HALF, torch.float32)
        for shape in shapes
    ]

    def call(op: Function) -> Function:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            parameters, changes, emas = (tensors[i : i + len(shapes)] for i in range(0, 3 * len(shapes), len(shapes)))
            op(parameters, changes, emas, 0.5, 0.1, scales, EMA)
            return *parameters, *emas

        return run

    return Workload(
        tuple(inputs),
        call(reference.muon_update),
        {"triton": call(updates.muon_update), **both(call(reference.muon_update))},
        (18.0 * sum(shape.numel() for shape in shapes), 0.0),  # p, e read and written, u read
        unit="gb_s", checked=ALL, in_place=True,
    )  # fmt: skip


def adamw_update_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """All that Muon does not train; `torch-fused` is the framework's fused AdamW, a call a rate, and a foreach EMA."""
    trained = optimizer.seed_optimizer()
    shapes = [p.shape for p in trained.rest]
    sizes, step, clip = [shape.numel() for shape in shapes], 3, torch.tensor(0.7, device=DEVICE)
    lrs, decays = [0.5 + lr for lr in trained.peak_lrs], trained.weight_decays
    parameters = [random(*shape, dtype=torch.float32, gradient=False) for shape in shapes]
    gradient, average, square, ema = (random(sum(sizes), dtype=torch.float32, gradient=False) for _ in range(4))
    steps = [torch.tensor(float(step), device=DEVICE) for _ in shapes]
    groups: dict[tuple[float, float], list[int]] = {}
    for i, settings in enumerate(zip(lrs, decays, strict=True)):
        groups.setdefault(settings, []).append(i)

    def call(op: Function) -> Function:
        def run(gradient: Tensor, average: Tensor, square: Tensor, ema: Tensor, *parameters: Tensor) -> Any:
            op(parameters, gradient, average, square, ema, clip, lrs, decays, BETAS, EPS, step, EMA)
            return *parameters, average, square, ema

        return run

    def fused(parameters: Sequence[Tensor], *flat: Any) -> None:
        gradient, *state = flat[:4]
        gradients, averages, squares, emas = (
            [part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)]
            for x in (gradient * clip, *state)
        )
        for (lr, decay), members in groups.items():
            p, g, m, v, at = ([x[i] for i in members] for x in (parameters, gradients, averages, squares, steps))
            torch._fused_adamw_(
                p, g, m, v, [], at, lr=lr, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPS, amsgrad=False,
                maximize=False,
            )  # fmt: skip
        torch._foreach_lerp_(emas, [*parameters], 1.0 - EMA)

    return Workload(
        (gradient, average, square.abs_(), ema, *parameters),
        call(reference.adamw_update),
        {"triton": call(updates.adamw_update), "torch-fused": call(fused), **both(call(reference.adamw_update))},
        (36.0 * sum(sizes), 0.0),  # p, m, v, e read and written, g read
        unit="gb_s", checked=ALL, in_place=True,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- quantising, and packed weights
def gptq_block_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """128 columns of the matrices of the seed's q and o, 62 clips a row; codes and errors are what is compared."""
    count, width, rows = 22, gptq.WIDTH, 512
    w = random(count, width, rows, dtype=torch.float32, gradient=False)
    upper = random(count, width, width, scale=0.02, dtype=torch.float32, gradient=False).triu(1)
    upper += torch.eye(width, device=DEVICE)
    scales = torch.full((count, rows), 12.85 / 31, device=DEVICE)

    def call(op: Function) -> Function:
        def run(w: Tensor, upper: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
            return op(w, upper, scales, codes, 31), codes

        return run

    return Workload(
        (w, upper, scales),
        call(reference.gptq_block),
        # Compiled, its loop over columns is a graph of minutes.
        {"triton": call(gptq.gptq_block), "eager": call(reference.gptq_block)},
        (9.0 * w.numel(), 0.0),
        unit="gb_s",
        checked=ALL,
    )


INT6 = {"m1": 1, "m16": 16, "m98304": 98304}  # rows of x
CACHES = {"2048": 2048, "8192": 8192}  # positions


def int6_dequantise_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """One matrix of the MLP's up."""
    outputs, columns = packed.SHAPES["up"]
    codes, scales = (x[0] for x in packed.matrices(outputs, columns, 1))

    def call(op: Function, dtype: torch.dtype) -> Function:
        return lambda scales: op(codes, scales, None, columns, dtype)

    return Workload(
        (scales,),
        call(reference.int6_dequantise, torch.float64),
        {"triton": call(int6.int6_dequantise, HALF), **both(call(reference.int6_dequantise, HALF))},
        (2.75 * outputs * columns, 0.0),
        unit="gb_s",
        checked=ALL,
    )


def int6_linear_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """One product with the MLP's up, from memory. gemlite, which tunes itself when first called, is in bench.packed."""
    (outputs, columns), rows = packed.SHAPES["up"], min(INT6[case], 4096 if small else INT6[case])
    codes, scales = packed.matrices(outputs, columns, 1)
    x = random(rows, columns, dtype=HALF, gradient=False)
    products = {name: call for name, call in packed.calls(x, codes, scales) if name not in ("triton-apart", "gemlite")}
    exact = reference.int6_dequantise(codes[0], scales[0], None, columns, HALF).double()
    few = rows <= 64
    traffic = packed.BYTES["triton"] * outputs * columns + 2.0 * rows * (outputs + columns)
    return Workload(
        (x,),
        lambda x: F.linear(x, exact),
        {name: (lambda x, call=call: call(0)) for name, call in products.items()},
        (traffic if few else 2.0 * rows * outputs * columns, 0.0),
        unit="gb_s" if few else "tflops",
        checked=ALL if few else None,
    )


def cached_attention_workload(case: str, small: bool, tokens: Tensor | None) -> Workload:
    """The last token of a full cache, whose keys and values are read."""
    context = CACHES[case]
    heads, kv_heads, dim = 8, 4, 64
    qkv = random(1, heads + 2 * kv_heads, dim, dtype=HALF, gradient=False)
    keys, values = (random(context, kv_heads, dim, dtype=HALF, gradient=False) for _ in range(2))
    gain = random(heads, dtype=torch.float32, gradient=False)
    cos, sin = reference.rotary_table(context, 16, 1e4, context, DEVICE)
    position = torch.tensor([context - 1], device=DEVICE)

    def call(op: Function) -> Function:
        return lambda qkv, gain, cos, sin, keys, values: op(qkv, gain, cos, sin, position, keys, values)

    return Workload(
        (qkv, gain, cos, sin, keys, values),
        call(reference.cached_attention),
        {"triton": call(cached_attention.cached_attention), **both(call(reference.cached_attention))},
        (2.0 * (keys.numel() + values.numel()), 0.0),
        unit="gb_s", checked=ALL, in_place=True,
    )  # fmt: skip


# Op -> its cases and how to set one up: (case, small, tokens) -> Workload.
OPS: dict[str, tuple[tuple[str, ...], Callable[[str, bool, Tensor | None], Workload]]] = {
    "attention": (tuple(ATTENTION), attention_workload),
    "mlp": (("seed",), mlp_workload),
    "linear_add": (("seed",), linear_add_workload),
    "attention_input": (("seed", "skip"), attention_input_workload),
    "attention_layer": (("seed", "skip", "documents"), attention_layer_workload),
    "rms_norm": (("seed",), rms_norm_workload),
    "residual_mix": (("seed",), residual_mix_workload),
    "qk_norm_rotary": (("seed",), qk_norm_rotary_workload),
    "embed": (("zipf",), embed_workload),
    "linear_cross_entropy": (("seed", "none"), linear_cross_entropy_workload),
    "muon_momentum": (("all-banks",), muon_momentum_workload),
    "muon_update": (("all-banks",), muon_update_workload),
    "adamw_update": (("rest",), adamw_update_workload),
    "gptq_block": (("qo",), gptq_block_workload),
    "int6_dequantise": (("up",), int6_dequantise_workload),
    "int6_linear": (tuple(INT6), int6_linear_workload),
    "cached_attention": (tuple(CACHES), cached_attention_workload),
    "newton_schulz": (("all-banks",), newton_schulz_workload),  # last: a peer once ended the process
}


# ------------------------------------------------------------------------------------------------------- measuring
def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def right(errors: tuple[float, float]) -> bool:
    """False for NaN too, in either place."""
    return all(error < LIMIT for error in errors)


def errors(workload: Workload) -> dict[str, tuple[float, float]]:
    """Relative Frobenius errors against float64, the worst of the outputs and of the gradients; NaN where one is."""
    rows, tail = workload.checked or (None, 0)
    exact_inputs = [x.detach()[:rows].double().requires_grad_(x.requires_grad) for x in workload.inputs]
    leaves = [x for x in exact_inputs if x.requires_grad]
    g: list[Tensor] = []
    truths, found = {}, {}
    for name, function in workload.implementations.items():
        exact = workload.exact_of.get(name, workload.exact)
        if exact not in truths:
            wanted = outputs(exact(*exact_inputs))
            if leaves:
                g = g or [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in wanted]
            truths[exact] = wanted, torch.autograd.grad(wanted, leaves, g) if leaves else ()
        wanted, truth = truths[exact]
        with peer(name):
            inputs = [x.detach().requires_grad_(x.requires_grad) for x in workload.inputs_of(name)]
            if workload.in_place:
                inputs = [x.clone() for x in inputs]
            out = outputs(function(*inputs))
            if not leaves:
                found[name] = relative_errors(out, wanted).max().item(), 0.0
                continue
            grad = [torch.zeros_like(x) for x in out]
            for a, b in zip(grad, g, strict=True):
                a[:rows, -tail:].copy_(b) if tail else a.copy_(b)
            got = torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad)
            if name in workload.packed:
                got = got[0].split([x.size(2) for x in workload.inputs], 2)
            of_outputs = relative_errors([x[:rows, -tail:] if tail else x for x in out], wanted)
            of_gradients = relative_errors([x[:rows] for x in got], truth)
            found[name] = of_outputs.max().item(), of_gradients.max().item()
    return found


def phases(workload: Workload, name: str) -> dict[str, Callable[[], Any]]:
    """What is timed of an implementation: forward and backward, apart or together. Forward runs here, if apart."""
    function, inputs = workload.implementations[name], workload.inputs_of(name)
    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return {"": lambda: function(*inputs)}
    if not workload.backward_apart:
        return {"": lambda: torch.autograd.grad(function(*inputs), leaves)}
    out = outputs(function(*inputs))
    g = [torch.randn_like(x) for x in out]
    return {
        "_forward": lambda: function(*inputs),
        "_backward": lambda: torch.autograd.grad(out, leaves, g, retain_graph=True),
    }


def replayed(call: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[Callable[[], Any], bool]:
    """`call` as a CUDA graph, whose time is the device's alone, and True; as it is, where it cannot be captured."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except Exception as failure:
        torch.cuda.set_stream(before)  # a capture that failed may have left its own, and numbers drawn for its graph
        torch.cuda.synchronize()
        numbers = torch.cuda.default_generators[torch.cuda.current_device()]
        numbers.graphsafe_set_state(numbers.clone_state())
        print(f"not captured: {type(failure).__name__}: {str(failure)[:100]}")
        return call, False

    def replay(kept: Callable[[], Any] = call) -> None:  # with it what the graph reads
        graph.replay()

    return replay, True


def prepared(workload: Workload, name: str, stream: torch.cuda.Stream) -> list[tuple[str, Callable[[], Any], bool]]:
    """An implementation's phases, each run once on the stream, what is to be timed of it, and whether it is a graph."""
    with torch.cuda.stream(stream):
        calls = phases(workload, name)
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    if name in workload.uncaptured:
        return [(phase, call, False) for phase, call in calls.items()]
    return [(phase, *replayed(call, stream)) for phase, call in calls.items()]


def in_turn(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> list[list[float]]:
    """Sorted milliseconds of each, one after the other and round again: a card that slows down does so for all.

    Nothing is in the L2 cache when a call begins, and the host is ahead of the device.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    times: list[list[float]] = [[] for _ in calls]
    with torch.cuda.stream(stream):
        for _ in range(ROUNDS):
            marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
            for call, (begin, end) in zip(calls, marks, strict=True):
                flush.zero_()
                begin.record()
                call()
                end.record()
            torch.cuda.synchronize()
            for each, (begin, end) in zip(times, marks, strict=True):
                each.append(begin.elapsed_time(end))
    return [sorted(each[ROUNDS // 5 :]) for each in times]  # the first rounds warm up


def measure(op: str, case: str, tokens: Tensor | None, measured: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of a case. Raises ValueError where our values are wrong."""
    build = OPS[op][1]
    # Cases share functions: what one compiled would count towards the limit of recompilations of the next.
    torch._dynamo.reset()
    print(f"\n{op} {case}", flush=True)
    try:
        workload = build(case, False, tokens)
    except ValueError as error:
        print(f"{op} {case}: left out: {error}")
        return []
    found = errors(workload if workload.checked else build(case, True, tokens))
    # One stream for everything: a backward runs where its forward did, and only there may it be captured.
    stream = torch.cuda.Stream()
    runs: list[tuple[str, str, Callable[[], Any], bool]] = []
    for name in (name for name in workload.implementations if name in found):
        with peer(name):
            if not right(found[name]):
                raise ValueError(f"{op} {case} {name}: wrong values, errors {found[name]}")
            runs += [(name, *run) for run in prepared(workload, name, stream)]
    times = in_turn([run for _, _, run, _ in runs], stream)
    framework = next((found[x] for x in FRAMEWORK if x in workload.implementations and x in found), None)
    unit = "TFLOP/s" if workload.unit == "tflops" else "GB/s"
    ceiling = measured["bf16_tflops" if workload.unit == "tflops" else "copy_gb_s"]
    rows = []
    for (name, phase, _, captured), each in zip(runs, times, strict=True):
        low, ms, high = (each[int(len(each) * q)] for q in (0.2, 0.5, 0.8))
        work = {"_forward": workload.work[0], "_backward": workload.work[1], "": sum(workload.work)}[phase]
        rate = work / ms / (1e9 if workload.unit == "tflops" else 1e6)
        # Forward and backward together: the worst of both.
        error_of = max if not phase else operator.itemgetter(phase == "_backward")
        rows.append(
            {
                "op": op + phase, "case": case, "impl": name,
                "ms": round(ms, 4), "ms_p20": round(low, 4), "ms_p80": round(high, 4),
                "tflops": round(rate, 1) if workload.unit == "tflops" else None,
                "gb_s": round(rate, 1) if workload.unit == "gb_s" else None,
                "percent_of_ceiling": round(100 * rate / ceiling, 1),
                "graph": captured,
                "error": error_of(found[name]), "reference_error": error_of(framework) if framework else None,
            }
        )  # fmt: skip
        print(
            f"{op + phase:30s} {case:10s} {name:22s} {ms:8.3f} ms {rate:8.1f} {unit:7s} "
            f"{100 * rate / ceiling:5.1f} %   error {error_of(found[name]):.2e}",
            flush=True,
        )
    return rows


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
    draw_panels(whole, f"ms and percent of the ceiling, {torch.cuda.get_device_name()}", path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
