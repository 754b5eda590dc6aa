"""Product with the head, softcap and cross-entropy as one op, forward and backward; no logits in float32.

For row m of x, target t, softcap K and the raw logits a = x weight^T:

    s_v = sigmoid(2 a_v / K),   c_v = K tanh(a_v / K) = K (2 s_v - 1)
    loss_m = log sum_v exp(c_v) - c_t                                |c| <= K, so that no maximum has to be found first
    da_v = (exp(c_v) / sum exp(c) - [v = t]) 4 s_v (1 - s_v)         4 s (1 - s) = 1 - tanh^2(a / K)
    loss = mean_m loss_m,   dx = g / M da weight,   dweight = g / M da^T x        for the gradient g of the loss

Two ways, and `matmul.softcap_fits` says which: by dtype, shapes, strides and GPU alone.

Fused (compute capability 9.0, bf16, D a multiple of 8 up to 512, V one of 128): since no maximum has to be found, the
head product's epilogue makes E_v = exp(c_v) s_v (1 - s_v) of its float32 accumulators, and sums of exp(c) over its 128
columns; no pass over the logits is made, and they are rounded nowhere. A row's factor r = 4 / sum exp(c) is known only
after them, and stays out of E: one small kernel adds the sums up in a fixed order, takes the target's logit from x and
weight again, in float32, writes E_t - sum exp(c) s_t (1 - s_t) over the target's, and r x. Then dweight = g / M E^T (r
x) and dx = g / M r (E weight), cuBLAS's. The target's is often nearly all of a row's gradient, so r is corrected by
what rounding did to it, at most 2^-8, which is the error of every other E_v anyway. For scoring only the sums are
written.

Portable: the products are cuBLAS's. Between them one kernel reads each row of logits once, keeps it in registers, and
where a gradient is wanted writes da over it; da is kept for the backward unscaled, so it neither underflows nor needs
g, and 1 / M and g ride in the products: 1 / M is a factor of the accumulators, g multiplies the weight (8 MB, not dx's
100).

Shapes: x (M, D), weight (V, D), bf16 or fp16; targets (M,) int64; losses float32. Work 6 M V D FLOPs. Traffic (M =
98304, D = 512, V = 8192, bf16), fused: E is written and read twice, 1.61 GB each time, in the products; beside them x
is read and r x written, 0.23 GB with the sums and 0.10 of the head's rows from the L2 cache, and dx goes through
float32, 0.30 GB. Portable: logits are written, read, written as da and read twice; the kernel's share is 3.22 GB, 1.07
ms at the speed of a copy; splitting the rows so that a buffer stays in the L2 cache was slower at every size. Memory:
one (M, V) buffer from forward to backward, and r x in place of x; without a gradient M V / 128 sums or, portable, a
buffer of `rows` rows.

Error, portable: logits and da are rounded to the input dtype, as in eager torch, which rounds da / M instead;
everything between is float32, and dweight is rounded once. A g that is no power of two costs dx one rounding of the
weight in bf16 (none in fp16, whose dx is scaled in float32 afterwards, since g / M would underflow). Fused: E and r x
are rounded, dx once. Emulated, M = 750, standard deviation of the logits 1 to 10: dx has 0.45 to 0.66 of eager's error,
dweight 0.62 to 0.94. Where g / M is a power of two and the logits are small, eager's da_t is near a bf16 number, and
dweight has up to 1.25 of its error. exp(c) lies in exp(-64) .. exp(64), where bf16 has all its bits.

Source: gradient in the forward and in place after Liger-Kernel (arXiv 2410.10989) and modded-nanogpt.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.launch import DTYPES, INTERPRET, expect_one_gpu, settings
from kernels.matmul import softcap_fits, softcap_forward
from kernels.matmul_epilogue import softcap_exponential

LOG2E = math.log2(math.e)
SOFTCAP_MAX = 64.0  # V exp(softcap) has to be a float32

_LN2 = tl.constexpr(math.log(2.0))


# --------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, sigmoid_log2, softcap_log2,
    V: tl.constexpr, BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The loss of one row and, over its logits, their gradient.

    Where one block holds the row, both loops are one pass and the compiler merges their loads and exponentials; it
    would not with a store between them.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row = logits + row * V
    target = tl.load(targets + row)
    m_target = (target >= 0) & (target < V)
    s_t, e_t = softcap_exponential(tl.load(p_row + target, mask=m_target, other=0.0), sigmoid_log2, softcap_log2)

    total = 0.0
    for v in range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        # [BLOCK_V]
        b_s, b_e = softcap_exponential(tl.load(p_row + o_v, mask=o_v < V, other=0.0), sigmoid_log2, softcap_log2)
        total += tl.sum(tl.where(o_v < V, b_e, 0.0))
    if GRADIENT:
        factor = 4.0 / total
        for v in range(0, V, BLOCK_V):
            o_v = v + tl.arange(0, BLOCK_V)
            # [BLOCK_V]
            b_s, b_e = softcap_exponential(tl.load(p_row + o_v, mask=o_v < V, other=0.0), sigmoid_log2, softcap_log2)
            b_da = b_e * factor * (b_s - b_s * b_s)
            tl.store(p_row + o_v, b_da.to(logits.dtype.element_ty), mask=o_v < V)
        # The target's is written over; cheaper than to compare every index with it.
        tl.debug_barrier()
        da_t = (e_t * factor - 4.0) * (s_t - s_t * s_t)
        tl.store(p_row + target, da_t.to(logits.dtype.element_ty), mask=m_target)
    loss = (tl.log2(total) - (2.0 * s_t - 1.0) * softcap_log2) * _LN2
    tl.store(losses + row, tl.where(m_target, loss, float("nan")))


@triton.jit
def cross_entropy_rows_kernel(
    x, weight, targets, sums, losses, numerators, scaled, factors, sigmoid_log2, softcap_log2, M, stride_xm,
    D: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Losses from the sums of exp(c); where a gradient is wanted, the target's numerator, r and r x."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, BLOCK_P)
    o_row = o_m.to(tl.int64)
    target = tl.load(targets + o_m, mask=o_m < M, other=-1)
    m_target = (target >= 0) & (target < V)
    m_d = o_d[None, :] < D
    # [BLOCK_M, BLOCK_D]
    b_x = tl.load(x + o_row[:, None] * stride_xm + o_d[None, :], mask=(o_m < M)[:, None] & m_d, other=0.0)
    b_w = tl.load(weight + target[:, None] * D + o_d[None, :], mask=m_target[:, None] & m_d, other=0.0)
    # [BLOCK_P, BLOCK_M]
    m_p = (o_p < PARTS)[:, None] & (o_m < M)[None, :]
    b_total = tl.sum(tl.load(sums + o_p[:, None].to(tl.int64) * M + o_m[None, :], mask=m_p, other=0.0), 0)
    b_total = tl.where(o_m < M, b_total, 1.0)
    b_x = b_x.to(tl.float32)
    b_s, b_e = softcap_exponential(tl.sum(b_x * b_w.to(tl.float32), 1), sigmoid_log2, softcap_log2)
    b_loss = (tl.log2(b_total) - (2.0 * b_s - 1.0) * softcap_log2) * _LN2
    tl.store(losses + o_m, tl.where(m_target, b_loss, float("nan")), mask=o_m < M)
    if numerators is not None:
        b_true = (b_e - b_total) * (b_s - b_s * b_s)
        b_kept = b_true.to(numerators.dtype.element_ty)
        tl.store(numerators + o_row * V + target, b_kept, mask=m_target)
        # The target's is often most of a row's gradient: its factor makes up for the rounding.
        b_kept = b_kept.to(tl.float32)
        m_near = m_target & (tl.abs(b_true - b_kept) < tl.abs(b_kept) * 0.0078125)
        b_r = tl.where(m_near, b_true / b_kept, 1.0) * (4.0 / b_total)
        tl.store(factors + o_m, b_r, mask=o_m < M)
        p_scaled = scaled + o_row[:, None] * D + o_d[None, :]
        tl.store(p_scaled, (b_x * b_r[:, None]).to(scaled.dtype.element_ty), mask=(o_m < M)[:, None] & m_d)


@triton.jit
def cross_entropy_scale_kernel(x, g, factors, out, scale, size, D: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * g * scale and, where given, the factors of rows of length D, with g read on the device."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    b_scale = tl.load(g) * scale
    if factors is not None:
        b_scale = b_scale * tl.load(factors + o_x // D, mask=o_x < size, other=0.0)
    tl.store(out + o_x, (b_x * b_scale).to(out.dtype.element_ty), mask=o_x < size)


# ------------------------------------------------------------------------------------------------------- launching
def _launch_options(config: dict, vocab: int) -> dict:
    """A row shorter than the block takes a smaller one, and no more warps than have 16 bytes a thread to load."""
    block = min(config["BLOCK_V"], triton.next_power_of_2(vocab))
    return {"V": vocab, "BLOCK_V": block, "num_warps": min(config["num_warps"], max(1, block // 256))}


def _rows_options(config: dict, vocab: int, dim: int, parts: int) -> dict:
    blocks = {"BLOCK_D": triton.next_power_of_2(dim), "BLOCK_P": triton.next_power_of_2(parts)}
    return {"D": dim, "V": vocab, "PARTS": parts, **blocks, **config}


def _forward(
    x: torch.Tensor,  # (M, D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (M,)
    softcap: float,
    gradient: bool,
) -> tuple[torch.Tensor, ...]:  # losses (M,) float32; with gradient da (M, V) and, where fused, r x and r, else (0,)
    count, vocab = x.shape[0], weight.shape[0]
    config = settings("cross_entropy", x.device)
    losses = torch.empty(count, dtype=torch.float32, device=x.device)
    factors = -2.0 * LOG2E / softcap, softcap * LOG2E
    fused = softcap_fits(x, weight)
    scaled = x.new_empty(x.shape if fused and gradient else 0)
    r = x.new_empty(count if fused and gradient else 0, dtype=torch.float32)
    if fused:
        numerators, sums = softcap_forward(x, weight, factors, gradient)
        written = (numerators, scaled, r) if gradient else (None, None, None)
        cross_entropy_rows_kernel[(triton.cdiv(count, config["rows_fused"]["BLOCK_M"]),)](
            x, weight, targets, sums, losses, *written, *factors, count, x.stride(0),
            **_rows_options(config["rows_fused"], *weight.shape, len(sums)),
        )  # fmt: skip
        return losses, numerators if gradient else x.new_empty(0), scaled, r
    options = _launch_options(config["loss"], vocab)
    rows = count if gradient else min(config["rows"], count)
    buffer = torch.empty((rows, vocab), dtype=x.dtype, device=x.device)
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        logits = buffer[: part.stop - first]
        torch.mm(x[part], weight.T, out=logits)
        cross_entropy_kernel[(len(logits),)](
            logits, targets[part], losses[part], *factors, GRADIENT=gradient, **options
        )
    return losses, buffer if gradient else x.new_empty(0), scaled, r


def _scale(
    x: torch.Tensor,  # (..., D)
    g: torch.Tensor,  # ()
    scale: float,
    dtype: torch.dtype,
    config: dict,
    factors: torch.Tensor | None = None,  # (M,) float32
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(x.numel(), config["BLOCK"]),)
    cross_entropy_scale_kernel[grid](x, g, factors, out, scale, x.numel(), D=x.shape[-1], **config)
    return out


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # float32
    return a.float() @ b.float() if INTERPRET else torch.mm(a, b, out_dtype=torch.float32)


def _backward(
    g: torch.Tensor,  # ()
    da: torch.Tensor,  # (M, V)
    x: torch.Tensor,  # (M, D), or r x
    weight: torch.Tensor,  # (V, D)
    r: torch.Tensor,  # (M,) float32, or (0,)
    want_x: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # dx (M, D), dweight (V, D); (0,) where not wanted
    config = settings("cross_entropy", x.device)["scale"]
    scale = 1.0 / x.shape[0]
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if want_x and r.numel():
        grad_x = _scale(_product(da, weight), g, scale, x.dtype, config, r)
    elif want_x and x.dtype == torch.float16:
        grad_x = _scale(_product(da, weight), g, scale, x.dtype, config)
    elif want_x:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.addmm(grad_x, da, _scale(weight, g, 1.0, weight.dtype, config), beta=0, alpha=scale, out=grad_x)
    if want_weight:
        grad_weight = _scale(_product(da.T, x), g, scale, weight.dtype, config)
    return grad_x, grad_weight


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, da, scaled, r = _forward(x, weight, targets, softcap, gradient)
    return losses.mean(), da, scaled, r


@linear_cross_entropy_op.register_fake
def _(x, weight, targets, softcap, gradient):
    fused = gradient and softcap_fits(x, weight)
    da = x.new_empty((x.shape[0], weight.shape[0]) if gradient else 0)
    scaled, r = x.new_empty(x.shape if fused else 0), x.new_empty(x.shape[0] if fused else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), da, scaled, r


@torch.library.custom_op("golf::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    g: torch.Tensor, da: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor,
    want_x: bool, want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(g, da, x, weight, r, want_x, want_weight)


@linear_cross_entropy_backward_op.register_fake
def _(g, da, x, weight, r, want_x, want_weight):
    return x.new_empty(x.shape if want_x else 0), weight.new_empty(weight.shape if want_weight else 0)


@torch.library.custom_op("golf::linear_cross_entropy_rows", mutates_args=())
def linear_cross_entropy_rows_op(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float
) -> torch.Tensor:
    return _forward(x, weight, targets, softcap, False)[0]


@linear_cross_entropy_rows_op.register_fake
def _(x, weight, targets, softcap):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, _, _, ctx.gradient = inputs
    _, da, scaled, r = output
    # r x stands in for x, which need not be kept.
    ctx.save_for_backward(da, scaled if r.numel() else x, weight, r)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g, *_):
    want_x, want_weight = ctx.needs_input_grad[:2]
    if g is None:
        return (None,) * 5
    if not ctx.gradient:
        raise RuntimeError("golf::linear_cross_entropy was called with gradient=False; it cannot be differentiated")
    dx, dweight = torch.ops.golf.linear_cross_entropy_backward(g, *ctx.saved_tensors, want_x, want_weight)
    return dx if want_x else None, dweight if want_weight else None, None, None, None


linear_cross_entropy_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------- public
def linear_cross_entropy(
    x: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (...)
    softcap: float,
    reduction: str = "mean",
) -> torch.Tensor:  # () or, with reduction "none", (...) float32
    """Cross-entropy in nats of the softcapped logits; the mean is differentiable in x and weight.

    x, weight (torch.Tensor):
        Rows ``[..., D]`` and the head ``[V, D]``, both bf16 or both fp16, the last dimension contiguous, weight
        contiguous. Rows that do not follow each other at one stride are copied.
    targets (torch.Tensor):
        int64 ``[...]``, each in 0 .. V - 1. That is not checked, since it would wait for the GPU: the loss of a target
        outside (F.cross_entropy's ignore_index too) is NaN, and so is the mean.
    softcap (float):
        In (0, 64], where exp(softcap) summed over a row is a float32.
    reduction (str):
        ``"mean"``, or ``"none"`` for the loss of each row: for scoring, without a gradient. Default: ``"mean"``.
    """
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or targets.shape != x.shape[:-1]:
        raise ValueError(
            "linear_cross_entropy wants x (..., D), weight (V, D), targets (...); "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        )
    if 0 in x.shape or 0 in weight.shape:
        raise ValueError(f"linear_cross_entropy wants none empty; got x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    if x.dtype not in DTYPES or weight.dtype != x.dtype or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy wants x, weight of one dtype among {DTYPES} and targets torch.int64; "
            f"got {x.dtype}, {weight.dtype}, {targets.dtype}"
        )
    expect_one_gpu("linear_cross_entropy", {"x": x, "weight": weight, "targets": targets})
    if x.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError(
            "linear_cross_entropy wants the last dimension of x contiguous, and weight; "
            f"got strides {x.stride()} and {weight.stride()}"
        )
    if not 0.0 < softcap <= SOFTCAP_MAX:
        raise ValueError(f"linear_cross_entropy wants a softcap in (0, {SOFTCAP_MAX:g}]; got {softcap}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'linear_cross_entropy wants reduction "mean" or "none"; got {reduction!r}')
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    rows, row_targets = x.flatten(0, -2), targets.flatten()
    if reduction == "mean":
        return torch.ops.golf.linear_cross_entropy(rows, weight, row_targets, softcap, gradient)[0]
    if gradient:
        raise ValueError(
            'linear_cross_entropy wants reduction "none" without a gradient (torch.no_grad()); '
            f"got x.requires_grad {x.requires_grad}, weight.requires_grad {weight.requires_grad}"
        )
    return torch.ops.golf.linear_cross_entropy_rows(rows, weight, row_targets, softcap).view(targets.shape)
