"""From the residual stream to attention, one op: skip and residual mix, norm, qkv product, head norms, rotary, gain.

    x' = skip_mix(x, skip, weight, gate)          in the layers that have a skip
    x  = mix_0 x' + mix_1 x0
    qkv = rms_norm(x, scale) W^T,  q and k: rms_norm of each head, rotary, gain of q

The norm of x is one number a row: q and k, normalised again head by head, do not feel it, and v is multiplied by it
after the product; so the normalised x is never written, and head norms, rotary and gain are in the product's epilogue
(`matmul.qkv_forward`). Backward, with r = 1 / rms(x) and every gradient of qkv before
its head norms already multiplied by the row's own factor:

    g = dqkv W,   dx = dy + g - x mean(g x) r^2,   dW = dqkv^T x

where dy is the gradient of the mixed stream itself, then back through the mixes. x0 is handed on from layer to layer,
so that its gradient gathers in one buffer instead of one addition a layer.

`attention_layer` is this with `attention` and its output product behind it, one op to autograd: the gradient of
attention's output goes back through XSA in the epilogue of the product that it comes from; q's goes from attention's
float32 sums through gain, rotary and head norms, k's goes through them in place, and v's has its row's factor when it
is written. So qkv has one gradient instead of two, and those of q and of attention's output are rounded once less.

Streams of (B T, D) read and written, qkv being (H + 2 G) d / D of them: forward 4 + qkv; backward 9 + 5 qkv, within a
layer 9 + 4 qkv and those sums; one product forward, `matmul.qkv_forward`, two backward, cuBLAS's; a layer's output
takes one more forward and two more backward. Source: the seed of this project, parameter-golf pull request 1517.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import attention, matmul, residual, rotary
from kernels.launch import DTYPES
from kernels.rotary import expect_rotary


@torch.library.custom_op("golf::attention_input", mutates_args=())
def attention_input_op(
    x: Tensor, x0: Tensor, mix: Tensor, skip: Tensor | None, skip_weight: Tensor | None, skip_gate: Tensor | None,
    weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """qkv (B, T, H + 2 G, d), mixed x (B, T, D), and float32 1 / rms of its rows (B T,) and of each q and k head."""
    batch, length, dim = x.shape
    heads = gain.size(0)
    head_dim = dim // heads
    kv_heads = (weight.size(0) // head_dim - heads) // 2
    flat_skip = None if skip is None else skip.view(-1, dim)
    mixed, rstd = residual.mix_forward(x.view(-1, dim), x0.view(-1, dim), mix, flat_skip, skip_weight, skip_gate)
    qkv, inverse = matmul.qkv_forward(mixed, weight, rstd * scale, gain, cos, sin, kv_heads, length)
    return qkv.view(batch, length, -1, head_dim), mixed.view_as(x), rstd, inverse


@attention_input_op.register_fake
def _(x, x0, mix, skip, skip_weight, skip_gate, weight, gain, cos, sin, scale):
    batch, length, dim = x.shape
    heads = gain.shape[0]
    head_dim = dim // heads
    total = weight.shape[0] // head_dim
    rows = batch * length
    qkv = x.new_empty((batch, length, total, head_dim))
    rstd = x.new_empty(rows, dtype=torch.float32)
    return qkv, torch.empty_like(x), rstd, x.new_empty((rows, (total + heads) // 2), dtype=torch.float32)


@torch.library.custom_op("golf::heads_backward", mutates_args=())
def heads_backward_op(
    g: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, inverse: Tensor, scale: float,
    document_starts: Tensor | None, z: Tensor | None, s: Tensor | None, lse: Tensor | None, output: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the raw product, shaped as qkv, and of gain; from that of qkv or, with attention's z and output
    matrix, from that of the stream behind it."""
    heads, length = gain.size(0), qkv.size(1)
    kv_heads, row_scale, rows = (qkv.size(2) - heads) // 2, rstd * scale, qkv.flatten(0, 1)
    if z is None or s is None or lse is None:
        draw, dgain = rotary.qkv_backward(g.flatten(0, 1), rows, gain, cos, sin, inverse, row_scale, kv_heads, length)
        return draw.view_as(qkv), dgain
    draw = torch.empty_like(qkv)
    parts, gradients = attention.parts(qkv, kv_heads), attention.parts(draw, kv_heads)
    sums = attention.backward(g, *parts, document_starts, z, s, lse, deterministic, *gradients, row_scale, output)
    raw = draw.flatten(0, 1)
    return draw, rotary.qkv_backward_(raw, sums, rows, gain, cos, sin, inverse, row_scale, kv_heads, length)


@heads_backward_op.register_fake
def _(g, qkv, gain, *_):
    return torch.empty_like(qkv), torch.empty_like(gain)


@torch.library.custom_op("golf::attention_input_backward", mutates_args=())
def attention_input_backward_op(
    draw: Tensor, dy: Tensor, dx0: Tensor | None, dx_more: Tensor | None, x: Tensor, x0: Tensor, mix: Tensor,
    skip: Tensor | None, skip_weight: Tensor | None, skip_gate: Tensor | None, weight: Tensor, mixed: Tensor,
    rstd: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, x0, mix and weight; then of skip, its weight and its gate, if any.

    dx0 and dx_more: what x0 and x have from elsewhere so far."""
    dim = x.size(2)
    rows = [None if t is None else t.view(-1, dim) for t in (dy, x, x0, dx0, dx_more, skip, mixed)]
    dy_rows, x_rows, x0_rows, dx0_rows, more_rows, skip_rows, mixed_rows = rows
    draw = draw.view(-1, weight.size(0))
    dweight, g = torch.mm(draw.t(), mixed_rows), torch.mm(draw, weight)
    dx, dskip, dx0_out, dmix, dskip_weight, dskip_gate = residual.mix_backward(
        g, rstd, dy_rows, x_rows, x0_rows, dx0_rows, mix, skip_rows, skip_weight, skip_gate, more_rows
    )
    grads = [dx.view_as(x), dx0_out.view_as(x), dmix.clone(), dweight]
    if dskip is not None and dskip_weight is not None and dskip_gate is not None:
        grads += [dskip.view_as(x), dskip_weight.clone(), dskip_gate.clone()]
    return grads


@attention_input_backward_op.register_fake
def _(draw, dy, dx0, dx_more, x, x0, mix, skip, skip_weight, skip_gate, weight, *_):
    given = [x, x0, mix, weight, *([] if skip is None else [skip, skip_weight, skip_gate])]
    return [torch.empty_like(t) for t in given]


class _AttentionLayer(torch.autograd.Function):
    """attention_layer or, where output is None, attention_input. x and x0 come out as they went in, which an op of
    torch.library may not do: their gradients meet here."""

    @staticmethod
    def forward(
        ctx: Any, output, document_starts, deterministic, x, x0, mix, skip, skip_weight, skip_gate, weight, gain,
        cos, sin, scale,
    ):  # fmt: skip
        inputs = x, x0, mix, skip, skip_weight, skip_gate, weight, gain, cos, sin
        qkv, mixed, rstd, inverse = torch.ops.golf.attention_input(*inputs, scale)
        z = s = lse = None
        first, second = qkv, mixed
        if output is not None:
            kv_heads = (qkv.size(2) - gain.size(0)) // 2
            z, s, lse = torch.ops.golf.attention_qkv(qkv, kv_heads, document_starts, deterministic)
            first, second = torch.ops.golf.linear_add(mixed, z.flatten(2), output)
            ctx.mark_non_differentiable(second)
        ctx.scale, ctx.deterministic = scale, deterministic
        ctx.save_for_backward(*inputs, qkv, mixed, rstd, inverse, document_starts, z, s, lse, output)
        ctx.set_materialize_grads(False)
        return first, second, x0, x

    @staticmethod
    def backward(ctx: Any, g, dy, dx0, dx_more):
        *inputs, qkv, mixed, rstd, inverse, starts, z, s, lse, output = ctx.saved_tensors
        x, x0, mix, *skip, weight, gain, cos, sin = inputs
        g = torch.zeros_like(qkv if output is None else x) if g is None else g.contiguous()
        doutput = None
        if output is not None:
            dy, doutput = g, torch.mm(g.flatten(0, 1).t(), z.flatten(2).flatten(0, 1))
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dx0, dx_more = (None if t is None else t.contiguous() for t in (dx0, dx_more))
        draw, dgain = torch.ops.golf.heads_backward(
            g, qkv, gain, cos, sin, rstd, inverse, ctx.scale, starts, z, s, lse, output, ctx.deterministic
        )
        dx, dx0, dmix, dweight, *others = torch.ops.golf.attention_input_backward(
            draw, dy, dx0, dx_more, x, x0, mix, *skip, weight, mixed, rstd
        )
        return doutput, None, None, dx, dx0, dmix, *(others or (None,) * 3), dweight, dgain, None, None, None


def attention_input(
    x: Tensor,  # (B, T, D)
    x0: Tensor,  # (B, T, D)
    mix: Tensor,  # (2, D) float32
    skip: tuple[Tensor, Tensor, Tensor] | None,  # (B, T, D), weight (D,) float32, gate (D,) float32
    weight: Tensor,  # ((H + 2 G) d, D)
    gain: Tensor,  # (H,) float32
    cos: Tensor,  # (T, R/2) float32
    sin: Tensor,  # (T, R/2) float32
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # qkv (B, T, H + 2 G, d), mixed x, x0 and x as it came (B, T, D)
    """reference.attention_input, differentiable in everything but cos, sin and scale.

    x, x0, the skip and weight are contiguous and of one dtype, bf16 or fp16; mix, gain, the skip's weight and gate,
    cos and sin are float32. Raises ValueError, naming what was found and what was wanted.
    """
    return _apply("attention_input", x, x0, mix, skip, weight, gain, cos, sin, scale)


def attention_layer(
    x: Tensor,  # (B, T, D)
    x0: Tensor,  # (B, T, D)
    mix: Tensor,  # (2, D) float32
    skip: tuple[Tensor, Tensor, Tensor] | None,  # (B, T, D), weight (D,) float32, gate (D,) float32
    weight: Tensor,  # ((H + 2 G) d, D)
    gain: Tensor,  # (H,) float32
    cos: Tensor,  # (T, R/2) float32
    sin: Tensor,  # (T, R/2) float32
    scale: float,
    output: Tensor,  # (D, H d)
    document_starts: Tensor | None = None,  # (B, T) int32
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # x behind attention (B, T, D), its squares, x0 and x as it came (B, T, D)
    """reference.attention_layer: attention_input, whose arguments it takes, `attention` and XSA of its heads, and
    linear_add of these and output to the mixed x. The squares (parts, B T) float32 are those that linear_add returns.

    output is of the dtype of x and contiguous; document_starts and deterministic are those of `attention.attention`.
    """
    arguments = (x, x0, mix, skip, weight, gain, cos, sin, scale)
    return _apply("attention_layer", *arguments, output, document_starts, deterministic)


def _apply(
    op: str, x: Tensor, x0: Tensor, mix: Tensor, skip: tuple[Tensor, Tensor, Tensor] | None, weight: Tensor,
    gain: Tensor, cos: Tensor, sin: Tensor, scale: float,
    output: Tensor | None = None, document_starts: Tensor | None = None, deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dim() != 3 or x0.shape != x.shape or gain.dim() != 1 or x.size(-1) % max(gain.size(0), 1):
        raise ValueError(
            f"{op} wants x and x0 (B, T, D), gain (H,) with H a divisor of D; "
            f"got x {tuple(x.shape)}, x0 {tuple(x0.shape)}, gain {tuple(gain.shape)}"
        )
    head_dim = x.size(-1) // gain.size(0)
    rows = weight.size(0)
    if weight.dim() != 2 or rows <= x.size(-1) or (rows - x.size(-1)) % (2 * head_dim) or weight.size(1) != x.size(-1):
        raise ValueError(
            f"{op} wants weight ((H + 2 G) {head_dim}, {x.size(-1)}) for H = {gain.size(0)} heads of "
            f"{head_dim} and any G; got {tuple(weight.shape)}"
        )
    if skip is not None and len(skip) != 3:
        raise ValueError(f"{op} wants skip (saved x, weight, gate) or None; got {len(skip)} of them")
    saved, skip_weight, skip_gate = skip or (None, None, None)
    vector = x.shape[-1:]
    expect_rotary(
        op, head_dim, gain, cos, sin, x.size(1),
        x=(x, x.shape, DTYPES),
        x0=(x0, x.shape, x.dtype),
        mix=(mix, (2, *vector), torch.float32),
        skip=(saved, x.shape, x.dtype),
        skip_weight=(skip_weight, vector, torch.float32),
        skip_gate=(skip_gate, vector, torch.float32),
        weight=(weight, weight.shape, x.dtype),
        output=(output, (x.size(-1), x.size(-1)), x.dtype),
        document_starts=(document_starts, x.shape[:2], torch.int32),
    )  # fmt: skip
    kv_heads = (rows // head_dim - gain.size(0)) // 2
    if output is not None and gain.size(0) % kv_heads:
        raise ValueError(f"{op} wants H a multiple of G; got {gain.size(0)} query and {kv_heads} KV heads")
    if output is not None and (x.size(1) > attention.longest(head_dim) or x.size(1) * rows >= 2**31):
        raise ValueError(
            f"{op} wants rows of at most {attention.longest(head_dim):,} tokens and fewer than 2**31 elements of qkv; "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    # torch.compile takes a tensor only once among the inputs of a Function: x is x0 in the first layer, and what was
    # saved last in the first layer that has a skip.
    if x is x0:
        x = x.view_as(x)
    if saved is x:
        saved = x.view_as(x)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _AttentionLayer.apply(
        output, document_starts, deterministic,
        x, x0, mix, saved, skip_weight, skip_gate, weight, gain, cos, sin, scale,
    )  # fmt: skip
    return outputs
