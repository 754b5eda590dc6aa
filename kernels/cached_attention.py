"""Attention of one new token to a row's earlier ones, whose keys and values are kept; with XSA.

    q, k = R(rms_norm(q)) gain, R(rms_norm(k))       rotary R at the token's position p
    keys[p], values[p] = k, v
    y = softmax(q keys[:p + 1]^T / sqrt(D)) values[:p + 1],   y - (y.u) u with u = v / |v|

Shapes: qkv (1, H + 2G, D), the rows of a product; keys, values (C, G, D), written at p; bf16 or fp16. p is read on the
device, so that one CUDA graph serves every position. One launch, a program a KV head: its H / G queries share what is
read, 4 p G D bytes in all. Sums are float32; keys and values are rounded as the cache holds them, but the token's own,
which stay in registers. Several tokens at once, a prompt, are the reference's: they come once a text.
"""

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.launch import DTYPES, HEAD_DIMS, expect, settings

_RMS_EPS = tl.constexpr(reference.RMS_EPS)


@triton.jit
def normed_rotated(p_head, o_d, cos, sin, position, m, D: tl.constexpr, HALF: tl.constexpr):
    """R(rms_norm(z)) in float32 of heads z at p_head + o_d."""
    b_z = tl.load(p_head + o_d, mask=m, other=0.0).to(tl.float32)
    b_other = tl.load(p_head + tl.where(o_d < HALF, o_d + HALF, o_d - HALF), mask=m & (o_d < 2 * HALF), other=0.0)
    o_angle = position * HALF + o_d % HALF
    b_cos = tl.load(cos + o_angle, mask=o_d < 2 * HALF, other=1.0)
    b_sin = tl.load(sin + o_angle, mask=o_d < 2 * HALF, other=0.0)
    b_rotated = b_z * b_cos + b_other.to(tl.float32) * tl.where(o_d < HALF, b_sin, -b_sin)
    return b_rotated * tl.rsqrt(tl.sum(b_z * b_z, axis=1, keep_dims=True) / D + _RMS_EPS)


@triton.jit
def cached_attention_kernel(
    qkv, gain, cos, sin, position, keys, values, out, QUERIES, KV_HEADS,
    D: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = 16  # at least GROUP: what a product takes
    head = tl.program_id(0)
    p = tl.load(position).to(tl.int32)
    o_d = tl.arange(0, D)[None, :]
    o_h = tl.arange(0, ROWS)[:, None]
    m_h = o_h < GROUP
    queries = head * GROUP
    dtype = out.dtype.element_ty
    # [ROWS, D]
    b_q = normed_rotated(qkv + (queries + o_h) * D, o_d, cos, sin, p, m_h & (o_d < D), D, HALF)
    b_q = b_q * tl.load(gain + queries + o_h, mask=m_h, other=0.0)
    # [1, D]
    b_k = normed_rotated(qkv + (QUERIES + head) * D, o_d, cos, sin, p, o_d < D, D, HALF)
    b_v = tl.load(qkv + (QUERIES + KV_HEADS + head) * D + o_d)
    o_new = (p.to(tl.int64) * KV_HEADS + head) * D + o_d
    tl.store(keys + o_new, b_k.to(dtype))
    tl.store(values + o_new, b_v)
    b_v = b_v.to(tl.float32)

    scale = 1.4426950408889634 / tl.sqrt(float(D))  # softmax in base 2
    b_max = tl.sum(b_q * b_k, axis=1) * scale
    b_sum = tl.full([ROWS], 1.0, tl.float32)
    b_y = tl.zeros([ROWS, D], tl.float32) + b_v
    b_q = b_q.to(dtype)
    for start in range(0, p, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        o_kv = (o_c[:, None].to(tl.int64) * KV_HEADS + head) * D + o_d
        # [BLOCK_C, D]
        b_keys = tl.load(keys + o_kv, mask=o_c[:, None] < p, other=0.0)
        b_values = tl.load(values + o_kv, mask=o_c[:, None] < p, other=0.0)
        b_score = tl.dot(b_q, b_keys.T, input_precision="ieee") * scale
        b_score = tl.where(o_c[None, :] < p, b_score, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_p = tl.exp2(b_score - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
        b_y = tl.dot(b_p.to(dtype), b_values, b_y * b_old[:, None], input_precision="ieee")
        b_max = b_new
    b_y = b_y / b_sum[:, None]
    b_u = b_v / tl.maximum(tl.sqrt(tl.sum(b_v * b_v, axis=1, keep_dims=True)), 1e-12)
    b_y -= tl.sum(b_y * b_u, axis=1, keep_dims=True) * b_u
    tl.store(out + (queries + o_h) * D + o_d, b_y.to(dtype), mask=m_h)


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::cached_attention", mutates_args=("keys", "values"))
def cached_attention_op(
    qkv: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    kv_heads, dim = keys.shape[1:]
    queries = gain.numel()
    out = torch.empty((1, queries, dim), dtype=qkv.dtype, device=qkv.device)
    cached_attention_kernel[(kv_heads,)](
        qkv, gain, cos, sin, position, keys, values, out, queries, kv_heads,
        D=dim, HALF=cos.shape[1], GROUP=queries // kv_heads, **settings("cached_attention", qkv.device)["forward"],
    )  # fmt: skip
    return out


@cached_attention_op.register_fake
def _(qkv, gain, cos, sin, position, keys, values):
    return qkv.new_empty((qkv.shape[0], gain.numel(), qkv.shape[2]))


# ---------------------------------------------------------------------------------------------------------- public
def cached_attention(
    qkv: torch.Tensor,  # (T, H + 2G, D)
    gain: torch.Tensor,  # (H,) float32
    cos: torch.Tensor,  # (C, R/2) float32
    sin: torch.Tensor,  # (C, R/2) float32
    position: torch.Tensor,  # (T,) int64
    keys: torch.Tensor,  # (C, G, D)
    values: torch.Tensor,  # (C, G, D)
) -> torch.Tensor:  # (T, H, D)
    """reference.cached_attention: one new token in one launch, several by the reference. For inference: no gradients.

    qkv (torch.Tensor):
        ``[T, H + 2 G, D]`` contiguous, bf16 or fp16: rows of q, k and v as the product gives them. D is 16, 32, 64 or
        128, H a multiple of G, of at most 16 G.
    gain, cos, sin (torch.Tensor):
        float32 ``[H]``, and ``[C, R / 2]`` angles of all positions, R a multiple of 2 up to D.
    position (torch.Tensor):
        int64 ``[T]``, each below C. It is read on the device.
    keys, values (torch.Tensor):
        ``[C, G, D]`` contiguous, as qkv; of earlier positions. Written at the new ones.
    """
    if qkv.dim() != 3 or keys.dim() != 3 or qkv.shape[2] not in HEAD_DIMS or gain.dim() != 1 or cos.dim() != 2:
        raise ValueError(
            f"cached_attention wants qkv (T, H + 2G, D) with D one of {HEAD_DIMS}, gain (H,), cos (C, R/2), keys "
            f"(C, G, D); got {tuple(qkv.shape)}, {tuple(gain.shape)}, {tuple(cos.shape)} and {tuple(keys.shape)}"
        )
    (length, heads, dim), (context, kv_heads) = qkv.shape, keys.shape[:2]
    queries = heads - 2 * kv_heads
    if queries < 1 or queries % kv_heads or queries > 16 * kv_heads or cos.shape[1] > dim // 2:
        raise ValueError(
            f"cached_attention wants H a multiple of G up to 16 G, and R up to D; got {queries} query and {kv_heads} "
            f"KV heads, R {2 * cos.shape[1]} and D {dim}"
        )
    cache, angles = (context, kv_heads, dim), ((context, cos.shape[1]), torch.float32)
    expect(
        "cached_attention", qkv=(qkv, qkv.shape, DTYPES), gain=(gain, (queries,), torch.float32), cos=(cos, *angles),
        sin=(sin, *angles), position=(position, (length,), torch.int64), keys=(keys, cache, qkv.dtype),
        values=(values, cache, qkv.dtype),
    )  # fmt: skip
    if length > 1:
        return reference.cached_attention(qkv, gain, cos, sin, position, keys, values)
    return torch.ops.golf.cached_attention(qkv, gain, cos, sin, position, keys, values)
