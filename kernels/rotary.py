"""What lies between the fused qkv product and attention: RMS norm of q's and k's heads, rotary, q's gain, v's scale.

The product is taken of x_in without its norm, so its rows lack the factor s = row_scale (rstd of x_in / sqrt(layer)):
v gets it here, q and k, normalised per head, only feel it beside epsilon. For a raw head z of D values:

    q, k:  z^ = z * inv_rms,  inv_rms = 1 / sqrt(mean(z^2) + eps / s^2);  out = gain * R z^   (no gain for k)
    v:     out = s * z
    R:     (x1, x2) -> (x1 cos + x2 sin, x2 cos - x1 sin) on dims j and j + R/2 of the first R; position = row % T

Backward, for the gradient d of out, from out itself and inv_rms (R keeps dot products):

    q, k:  dz = inv_rms * R^T(gain * d - out / gain * mean(d * out)),   dgain = sum d.out / gain
    v:     dz = s * d                                  (the gradient of s belongs to the norm that made it)

Where |gain| < 1e-30 there is nothing left of z^ in out: dz is right (it is zero with the gain), but dgain is taken as
zero, so a head's gain that is exactly zero stays there. It starts at 5.25. dgain is taken from the rounded out; its
error is about half that of eager ops, which round every product.

Shapes: qkv (M, H + 2G, D) contiguous, bf16 or fp16, D 16, 32, 64 or 128, R a power of two up to D; gain, cos, sin,
row_scale, inv_rms float32. Arithmetic in float32, rounded once. Forward in place: 2 reads and writes of (M, H + 2G, D);
backward: those and q and k once more; behind attention in place, q's gradient being read from its float32 sums, and v's
left alone where it has its factor. dgain is summed in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.attention_hopper import ROWS, attention_bwd_sums
from kernels.launch import DTYPES, HEAD_DIMS, expect, expect_one_gpu, settings
from kernels.reference import RMS_EPS
from kernels.residual import column_sum

_RMS_EPS = tl.constexpr(RMS_EPS)
_GAIN_FLOOR = tl.constexpr(1e-30)


# --------------------------------------------------------------------------------------------------------- kernels
# The compiler hands lanes to the first dimension after the last: that is the chunks of a head, so that lanes lie side
# by side along it. Forward, a tile is [D / HALF, ROWS, HEADS, HALF]. A value's partner in the rotation lies in the
# other of the first two chunks of HALF = R/2 values, and is read once more, from the L1 cache.
@triton.jit
def qkv_angles(cos, sin, o_m, o_c, o_j, m_m, T, HALF: tl.constexpr):
    """cos and signed sin for each value of a row: R z = z * cos + partner * sin. 1 and 0 outside the rotated dims."""
    o_a = (o_m % T) * HALF + o_j
    m_a = m_m & (o_c < 2)
    b_sin = tl.load(sin + o_a, mask=m_a, other=0.0)
    return tl.load(cos + o_a, mask=m_a, other=1.0), tl.where(o_c == 0, b_sin, -b_sin)


@triton.jit
def qkv_fwd_kernel(
    raw, out, gain, cos, sin, row_scale, inv_rms, M, T, stride_raw, stride_out,
    QUERIES: tl.constexpr, NORMED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Heads [0, QUERIES) are queries, [QUERIES, NORMED) keys, [NORMED, HEADS) values. out may be raw."""
    o_c = tl.arange(0, D // HALF)[:, None, None, None]
    o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None, None]
    o_h = tl.arange(0, PAD)[None, None, :, None]
    o_j = tl.arange(0, HALF)[None, None, None, :]
    m_m = o_m < M
    m_h = m_m & (o_h < HEADS)
    m_n = m_m & (o_h < NORMED)
    p_raw = raw + o_m.to(tl.int64) * stride_raw + o_h * D
    # [D / HALF, ROWS, PAD, HALF]
    b_x = tl.load(p_raw + o_c * HALF + o_j, mask=m_h, other=0.0).to(tl.float32)
    b_other = tl.load(p_raw + (o_c ^ 1) * HALF + o_j, mask=m_n & (o_c < 2), other=0.0).to(tl.float32)
    b_cos, b_sin = qkv_angles(cos, sin, o_m, o_c, o_j, m_m, T, HALF)
    b_eps = _RMS_EPS
    b_scale = 1.0
    if row_scale is not None:
        b_scale = tl.load(row_scale + o_m, mask=m_m, other=1.0)
        b_eps = _RMS_EPS / (b_scale * b_scale)

    b_inv = tl.rsqrt(tl.sum(tl.sum(b_x * b_x, 3, keep_dims=True), 0, keep_dims=True) / D + b_eps)
    tl.store(inv_rms + o_m.to(tl.int64) * NORMED + o_h, b_inv, mask=m_n)
    b_rotated = b_x * b_cos + b_other * b_sin
    if gain is not None:
        b_inv *= tl.load(gain + o_h, mask=o_h < QUERIES, other=1.0)
    b_out = tl.where(o_h < NORMED, b_rotated * b_inv, b_x * b_scale).to(out.dtype.element_ty)
    tl.debug_barrier()  # in place: every partner is read before any value is overwritten
    tl.store(out + o_m.to(tl.int64) * stride_out + o_h * D + o_c * HALF + o_j, b_out, mask=m_h)


@triton.jit
def qkv_bwd_kernel(
    sums, grad, out, grad_raw, gain, cos, sin, row_scale, inv_rms, partial, sums_scale, T,
    stride_grad, stride_out, stride_raw,
    QUERIES: tl.constexpr, NORMED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of HEADS. The gradient of queries is sums_scale sums where there are any, else grad like
    that of the other heads. partial (row blocks, QUERIES): this program's share of dgain. grad_raw may be grad."""
    head = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS
    batch = block // tl.cdiv(T, ROWS)
    tile = block % tl.cdiv(T, ROWS)
    o_c = tl.arange(0, D // (2 * HALF))[:, None, None]
    o_t = (tile * ROWS + tl.arange(0, ROWS))[None, :, None]
    o_j = tl.arange(0, HALF)[None, None, :]
    o_m = batch.to(tl.int64) * T + o_t
    o_d = head * D + o_c * (2 * HALF) + o_j
    m_t = o_t < T
    m_n = m_t & (head < NORMED)
    m_g = m_t
    if sums is not None:
        m_g = m_t & (head >= QUERIES)
    # The first and the second values of pairs, of which those of chunk 0 are rotated: [D / (2 HALF), ROWS, HALF] each.
    b_d1 = tl.load(grad + o_m * stride_grad + o_d, mask=m_g, other=0.0).to(tl.float32)
    b_d2 = tl.load(grad + o_m * stride_grad + o_d + HALF, mask=m_g, other=0.0).to(tl.float32)
    b_y1 = tl.load(out + o_m * stride_out + o_d, mask=m_n, other=0.0).to(tl.float32)
    b_y2 = tl.load(out + o_m * stride_out + o_d + HALF, mask=m_n, other=0.0).to(tl.float32)
    if sums is not None:  # noqa: SIM102 (a compile-time condition)
        if head < QUERIES:
            p_sums = sums + ((batch * QUERIES + head).to(tl.int64) * tl.cdiv(T, ROWS) + tile) * (ROWS * D)
            b_d = tl.reshape(attention_bwd_sums(p_sums, ROWS, D) * sums_scale, [ROWS, D // (2 * HALF), 2, HALF])
            b_d1, b_d2 = tl.split(tl.permute(b_d, (1, 0, 3, 2)))
    b_cos = tl.load(cos + o_t * HALF + o_j, mask=m_n & (o_c == 0), other=1.0)
    b_sin = tl.load(sin + o_t * HALF + o_j, mask=m_n & (o_c == 0), other=0.0)
    b_inv = tl.load(inv_rms + o_m * NORMED + head, mask=m_n, other=0.0)
    b_gain = 1.0
    b_inverse = 1.0
    if gain is not None:
        b_gain = tl.load(gain + head, mask=head < QUERIES, other=1.0)
        b_inverse = tl.where(tl.abs(b_gain) > _GAIN_FLOOR, 1.0 / b_gain, 0.0)

    b_dot = tl.sum(tl.sum(b_d1 * b_y1 + b_d2 * b_y2, 2, keep_dims=True), 0, keep_dims=True)
    b_mean = b_dot / D * b_inverse
    b_w1 = (b_d1 * b_gain - b_y1 * b_mean) * b_inv
    b_w2 = (b_d2 * b_gain - b_y2 * b_mean) * b_inv
    b_raw1 = b_w1 * b_cos - b_w2 * b_sin
    b_raw2 = b_w2 * b_cos + b_w1 * b_sin
    if HEADS > NORMED:
        b_scale = tl.load(row_scale + o_m, mask=m_t, other=0.0)
        b_raw1 = tl.where(head < NORMED, b_raw1, b_d1 * b_scale)
        b_raw2 = tl.where(head < NORMED, b_raw2, b_d2 * b_scale)
    p_raw = grad_raw + o_m * stride_raw + o_d
    tl.store(p_raw, b_raw1.to(grad_raw.dtype.element_ty), mask=m_t)
    tl.store(p_raw + HALF, b_raw2.to(grad_raw.dtype.element_ty), mask=m_t)
    if gain is not None:
        b_dot = tl.where(m_t, b_dot, 0.0)  # sums past T need not be finite
        tl.store(partial + block * QUERIES + head, tl.sum(b_dot) * b_inverse, mask=head < QUERIES)


# ------------------------------------------------------------------------------------------------------- launching
def _shape(config: dict, queries: int, keys: int, heads: int, dim: int, half: int) -> dict:
    """What to launch with: a tile of TILE values, or of one row with as many more warps."""
    pad, wanted = triton.next_power_of_2(heads), config["TILE"]
    return {
        "QUERIES": queries, "NORMED": queries + keys, "HEADS": heads, "D": dim, "HALF": half, "PAD": pad,
        "ROWS": max(1, wanted // (pad * dim)), "num_warps": config["num_warps"] * max(1, pad * dim // wanted),
    }  # fmt: skip


def _forward(raw, out, gain, cos, sin, row_scale, queries, keys):
    """raw and out (M, heads, D), rows at any distance; the heads after the keys are values."""
    rows, heads, dim = raw.shape
    inv_rms = torch.empty((rows, queries + keys), dtype=torch.float32, device=raw.device)
    shape = _shape(settings("rotary", raw.device)["forward"], queries, keys, heads, dim, cos.shape[1])
    qkv_fwd_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        raw, out, gain, cos, sin, row_scale, inv_rms, rows, cos.shape[0], raw.stride(0), out.stride(0), **shape,
    )  # fmt: skip
    return inv_rms


def _backward(grad, out, grad_raw, gain, cos, sin, row_scale, inv_rms, queries, keys, sums=None, sums_scale=1.0):
    """grad, out and grad_raw (M, heads, D), rows at any distance; heads after the keys are values."""
    rows, heads, dim = grad.shape
    length, half = cos.shape
    blocks = rows // length * triton.cdiv(length, ROWS.value)
    partial = torch.empty((blocks, queries), dtype=torch.float32, device=grad.device)
    qkv_bwd_kernel[(blocks * heads,)](
        sums, grad, out, grad_raw, gain, cos, sin, row_scale, inv_rms, partial, sums_scale, length,
        grad.stride(0), out.stride(0), grad_raw.stride(0),
        QUERIES=queries, NORMED=queries + keys, HEADS=heads, D=dim, HALF=half, ROWS=ROWS.value,
        num_warps=max(1, settings("rotary", grad.device)["backward"]["num_warps"] * dim // 64),
    )  # fmt: skip
    return None if gain is None else column_sum(partial)


def expect_rotary(op: str, dim: int, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, length: int, **others):
    """Raise ValueError unless heads of `dim` can be rotated by these angles at `length` positions; others: `expect`."""
    half = cos.shape[-1] if cos.dim() == 2 else 0
    if dim not in HEAD_DIMS:
        raise ValueError(f"{op} wants a head dimension among {HEAD_DIMS}; got {dim}")
    if half < 1 or half & (half - 1) or 2 * half > dim:
        raise ValueError(f"{op} wants cos (T, R/2), R a power of two up to the head's {dim}; got {tuple(cos.shape)}")
    if cos.shape[0] < length:
        raise ValueError(f"{op} wants cos of at least {length} positions; got {tuple(cos.shape)}")
    floats = torch.float32
    expect(
        op, gain=(gain, (gain.numel(),), floats), cos=(cos, cos.shape, floats), sin=(sin, cos.shape, floats), **others
    )


def _expect_packed(op, qkv, gain, cos, sin, row_scale, kv_heads, length, **others):
    if qkv.dim() != 3 or gain.numel() + 2 * kv_heads != qkv.shape[1]:
        raise ValueError(
            f"{op} wants qkv (M, H + 2G, D) with H = {gain.numel()} of gain and G = {kv_heads}; got {tuple(qkv.shape)}"
        )
    expect_rotary(
        op, qkv.shape[-1], gain, cos, sin, length, qkv=(qkv, qkv.shape, DTYPES),
        row_scale=(row_scale, qkv.shape[:1], torch.float32), **others,
    )  # fmt: skip
    if qkv.shape[0] % length:
        raise ValueError(f"{op} wants M a multiple of T; got M {qkv.shape[0]}, T {length}")


def qkv_forward(
    qkv: torch.Tensor,  # (M, H + 2G, D), overwritten
    gain: torch.Tensor,  # (H,) float32
    cos: torch.Tensor,  # (T or more, R/2) float32
    sin: torch.Tensor,  # (T or more, R/2) float32
    row_scale: torch.Tensor,  # (M,) float32
    kv_heads: int,
    length: int,  # T
) -> torch.Tensor:  # inv_rms (M, H + G) float32
    """In place: the raw product becomes attention's q, k and v."""
    _expect_packed("qkv_forward", qkv, gain, cos, sin, row_scale, kv_heads, length)
    return _forward(qkv, qkv, gain, cos[:length], sin[:length], row_scale, gain.numel(), kv_heads)


def qkv_backward(
    dqkv: torch.Tensor,  # (M, H + 2G, D)
    qkv: torch.Tensor,  # (M, H + 2G, D): what qkv_forward left
    gain: torch.Tensor,  # (H,) float32
    cos: torch.Tensor,  # (T or more, R/2) float32
    sin: torch.Tensor,  # (T or more, R/2) float32
    inv_rms: torch.Tensor,  # (M, H + G) float32, of qkv_forward
    row_scale: torch.Tensor,  # (M,) float32
    kv_heads: int,
    length: int,  # T
) -> tuple[torch.Tensor, torch.Tensor]:  # draw (M, H + 2G, D), dgain (H,) float32
    """The gradient of the raw product, from that of q, k and v. row_scale is held constant."""
    heads = gain.numel()
    _expect_packed(
        "qkv_backward", qkv, gain, cos, sin, row_scale, kv_heads, length, dqkv=(dqkv, qkv.shape, qkv.dtype),
        inv_rms=(inv_rms, (qkv.shape[0], heads + kv_heads), torch.float32),
    )  # fmt: skip
    draw = torch.empty_like(dqkv)
    return draw, _backward(dqkv, qkv, draw, gain, cos[:length], sin[:length], row_scale, inv_rms, heads, kv_heads)


def qkv_backward_(
    draw: torch.Tensor,  # (M, H + 2G, D): the gradient of q, k and v, overwritten
    sums: torch.Tensor | None,  # of `attention.backward`, if q's gradient is there, and v's in draw is as it has to be
    qkv: torch.Tensor,  # (M, H + 2G, D): what qkv_forward left
    gain: torch.Tensor,  # (H,) float32
    cos: torch.Tensor,  # (T or more, R/2) float32
    sin: torch.Tensor,  # (T or more, R/2) float32
    inv_rms: torch.Tensor,  # (M, H + G) float32, of qkv_forward
    row_scale: torch.Tensor,  # (M,) float32
    kv_heads: int,
    length: int,  # T
) -> torch.Tensor:  # dgain (H,) float32
    """qkv_backward in place, of what `attention.backward` made."""
    heads, cos, sin = gain.numel(), cos[:length], sin[:length]
    if sums is None:
        return _backward(draw, qkv, draw, gain, cos, sin, row_scale, inv_rms, heads, kv_heads)
    draw, scale = draw[:, : heads + kv_heads], 1.0 / math.sqrt(qkv.shape[-1])
    return _backward(draw, qkv, draw, gain, cos, sin, None, inv_rms, heads, kv_heads, sums, scale)


# ---------------------------------------------------------------------------------------------------- registration
def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, T, heads, D) -> (B T, heads, D), a view where heads are packed and rows evenly spaced (a split of qkv)."""
    x = x.flatten(0, 1)
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@torch.library.custom_op("golf::qk_norm_rotary", mutates_args=())
def qk_norm_rotary_op(
    q: torch.Tensor, k: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_inv = _forward(_rows(q), _rows(q_out), gain, cos, sin, None, q.shape[2], 0)
    k_inv = _forward(_rows(k), _rows(k_out), None, cos, sin, None, 0, k.shape[2])
    return q_out, k_out, q_inv, k_inv


@qk_norm_rotary_op.register_fake
def _(q, k, gain, cos, sin):
    inverses = (x.new_empty((x.shape[0] * x.shape[1], x.shape[2]), dtype=torch.float32) for x in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), *inverses


@torch.library.custom_op("golf::qk_norm_rotary_backward", mutates_args=())
def qk_norm_rotary_backward_op(
    dq: torch.Tensor, dk: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor,
    q_inv: torch.Tensor, k_inv: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dq_raw, dk_raw = torch.empty_like(q_out), torch.empty_like(k_out)
    queries, keys = q_out.shape[2], k_out.shape[2]
    dgain = _backward(_rows(dq), _rows(q_out), _rows(dq_raw), gain, cos, sin, None, q_inv, queries, 0)
    _backward(_rows(dk), _rows(k_out), _rows(dk_raw), None, cos, sin, None, k_inv, 0, keys)
    return dq_raw, dk_raw, dgain


@qk_norm_rotary_backward_op.register_fake
def _(dq, dk, q_out, k_out, q_inv, k_inv, gain, cos, sin):
    return torch.empty_like(q_out), torch.empty_like(k_out), torch.empty_like(gain)


def _save(ctx, inputs, output):
    _, _, gain, cos, sin = inputs
    ctx.save_for_backward(*output, gain, cos, sin)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, dq, dk, *_):
    return *torch.ops.golf.qk_norm_rotary_backward(dq, dk, *ctx.saved_tensors), None, None


qk_norm_rotary_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------- public
def qk_norm_rotary(
    q: torch.Tensor,  # (B, T, H, D)
    k: torch.Tensor,  # (B, T, G, D)
    gain: torch.Tensor,  # (H,) float32
    cos: torch.Tensor,  # (T, R/2) float32
    sin: torch.Tensor,  # (T, R/2) float32
) -> tuple[torch.Tensor, torch.Tensor]:  # q (B, T, H, D), k (B, T, G, D)
    """reference.qk_norm_rotary, differentiable in q, k and gain (see the top of this file for a gain of zero).

    q, k (torch.Tensor):
        ``[B, T, H, D]`` and ``[B, T, G, D]``, both bf16 or both fp16, D 16, 32, 64 or 128; views of one fused
        projection are read where they lie.
    gain, cos, sin (torch.Tensor):
        float32 ``[H]``, ``[T, R/2]`` and ``[T, R/2]``, contiguous, R a power of two up to D.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise ValueError(
            "qk_norm_rotary wants q (B, T, H, D) and k (B, T, G, D) of one dtype; "
            f"got q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}"
        )
    if gain.shape != q.shape[2:3] or cos.shape[:1] != q.shape[1:2]:
        raise ValueError(
            f"qk_norm_rotary wants gain (H,) and cos (T, R/2) of q {tuple(q.shape)}; "
            f"got gain {tuple(gain.shape)}, cos {tuple(cos.shape)}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"qk_norm_rotary wants q and k of a dtype among {DTYPES}; got {q.dtype}")
    expect_rotary("qk_norm_rotary", q.shape[-1], gain, cos, sin, q.shape[1])
    expect_one_gpu("qk_norm_rotary", {"q": q, "k": k, "gain": gain})
    return torch.ops.golf.qk_norm_rotary(q, k, gain, cos, sin)[:2]
