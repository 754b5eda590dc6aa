"""Attention of one new token to a row's earlier ones, whose keys and values are kept; with XSA.

    q, k = R(rms_norm(q)) gain, R(rms_norm(k))       rotary R at the token's position p
    keys[p], values[p] = k, v
    y = softmax(q keys[:p + 1]^T / sqrt(D)) values[:p + 1],   y - (y.u) u with u = v / |v|

Shapes: qkv (1, H + 2G, D), the rows of a product; keys, values (C, G, D), written at p; bf16 or fp16. p is read on the
device, so that one CUDA graph serves every position. Sums are float32; keys and values are rounded as the cache holds
them, but the token's own, which stay in registers. Several tokens at once, a prompt, are the reference's: they come
once a text.

Keys are shared out (split-KV, Flash-Decoding, Dao et al. 2023), in two launches. Of S = C / BLOCK_C programs, rounded
up, a KV head in the first, each takes BLOCK_C earlier keys for its H / G queries, or leaves at once where p is not that
far; so all is asked for at the same time. The first program also notes the new key and value and takes their score.
Each leaves

    m = max_c score_c,   l = sum_c 2^(score_c - m),   sum_c 2^(score_c - m) values_c        scores in base 2

in float32. The second launch, a program a query, adds up n = p / BLOCK_C of these, rounded up and at least 1, in their
order, and takes XSA. Traffic: 4 p G D bytes, and 8 n H (D + 2) of what programs leave, which stays in the L2 cache: a
sixteenth at BLOCK_C 64 and H = 2G.

Either launch may start before the one ahead of it is done (programmatic dependent launch, Hopper and later). The first
reads nothing before that: what a caller launched last may have written the position, or the cache. It waits for memory
twice, for p, then for all else; the second once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import reference
from kernels.launch import DTYPES, HEAD_DIMS, early, expect, settings

_RMS_EPS = tl.constexpr(reference.RMS_EPS)
_NORM_FLOOR = tl.constexpr(reference.NORM_FLOOR)


@triton.jit
def heads_at(p_head, o_d, m, HALF: tl.constexpr):
    """Heads z at p_head + o_d, and what rotary mixes them with."""
    o_other = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)
    b_z = tl.load(p_head + o_d, mask=m, other=0.0)
    return b_z, tl.load(p_head + o_other, mask=m & (o_d < 2 * HALF), other=0.0)


@triton.jit
def normed_rotated(b_z, b_other, b_cos, b_sin, D: tl.constexpr):
    """R(rms_norm(z)) in float32."""
    b_z = b_z.to(tl.float32)
    b_rotated = b_z * b_cos + b_other.to(tl.float32) * b_sin
    return b_rotated * tl.rsqrt(tl.sum(b_z * b_z, axis=1, keep_dims=True) / D + _RMS_EPS)


@triton.jit
def cached_attention_kernel(
    qkv, gain, cos, sin, position, keys, values, parts, QUERIES, KV_HEADS,
    D: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts: float32, of H queries and S splits: D weighted values each; then all maxima; then all sums."""
    ROWS: tl.constexpr = 16  # at least GROUP: what a product takes
    if EARLY:
        gdc_wait()
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p = tl.load(position).to(tl.int32)
    first = split == 0
    if (split * BLOCK_C >= p) & (split > 0):
        return
    o_d = tl.arange(0, D)[None, :]
    o_h = tl.arange(0, ROWS)[:, None]
    m_h = o_h < GROUP
    m_new = first & (o_d < D)
    queries = head * GROUP
    dtype = keys.dtype.element_ty
    # [BLOCK_C, D]
    o_c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c[:, None] < p
    o_kv = (o_c[:, None].to(tl.int64) * KV_HEADS + head) * D + o_d
    b_keys = tl.load(keys + o_kv, mask=m_c)
    b_values = tl.load(values + o_kv, mask=m_c)
    # [ROWS, D]; [1, D], zeros in all but a head's first program
    b_q, b_q_other = heads_at(qkv + (queries + o_h) * D, o_d, m_h & (o_d < D), HALF)
    b_k, b_k_other = heads_at(qkv + (QUERIES + head) * D, o_d, m_new, HALF)
    b_v = tl.load(qkv + (QUERIES + KV_HEADS + head) * D + o_d, mask=m_new, other=0.0)
    b_gain = tl.load(gain + queries + o_h, mask=m_h, other=0.0)
    o_angle = p * HALF + o_d % HALF
    b_cos = tl.load(cos + o_angle, mask=o_d < 2 * HALF, other=1.0)
    b_sin = tl.load(sin + o_angle, mask=o_d < 2 * HALF, other=0.0)
    if EARLY:
        gdc_launch_dependents()  # also keeps the compiler from moving loads behind the wait for others

    b_sin = tl.where(o_d < HALF, b_sin, -b_sin)
    b_q = normed_rotated(b_q, b_q_other, b_cos, b_sin, D) * b_gain
    b_k = normed_rotated(b_k, b_k_other, b_cos, b_sin, D)
    o_new = (p.to(tl.int64) * KV_HEADS + head) * D + o_d
    tl.store(keys + o_new, b_k.to(dtype), mask=m_new)
    tl.store(values + o_new, b_v, mask=m_new)
    # Only here: the compiler puts a product's operand into shared memory as soon as it is known.
    b_keys = tl.where(m_c, b_keys, 0.0)
    b_values = tl.where(m_c, b_values, 0.0)

    scale = 1.4426950408889634 / tl.sqrt(float(D))  # softmax in base 2
    b_own = tl.where(first, tl.sum(b_q * b_k, axis=1) * scale, float("-inf"))
    b_score = tl.dot(b_q.to(dtype), b_keys.T, input_precision="ieee") * scale
    b_score = tl.where(o_c[None, :] < p, b_score, float("-inf"))
    b_max = tl.maximum(tl.max(b_score, axis=1), b_own)
    b_p = tl.exp2(b_score - b_max[:, None])
    b_own = tl.exp2(b_own - b_max)
    b_y = b_own[:, None] * b_v.to(tl.float32)
    b_y = tl.dot(b_p.to(dtype), b_values, b_y, input_precision="ieee")
    o_part = (queries + o_h) * splits + split
    tl.store(parts + o_part * D + o_d, b_y, mask=m_h)
    p_max = parts + QUERIES * splits * D + o_part
    tl.store(p_max, b_max[:, None], mask=m_h)
    tl.store(p_max + QUERIES * splits, (tl.sum(b_p, axis=1) + b_own)[:, None], mask=m_h)


@triton.jit
def cached_attention_merge_kernel(
    qkv, position, parts, out, SPLITS, KV_HEADS,
    D: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    query, queries = tl.program_id(0), tl.num_programs(0)
    o_d = tl.arange(0, D)[None, :]
    # Not written by the first launch, and when this one starts, all that was ahead of that is done: every program there
    # waits for it before it ends or lets this one start.
    p = tl.load(position).to(tl.int32)
    b_v = tl.load(qkv + (queries + KV_HEADS + query // GROUP) * D + o_d).to(tl.float32)
    b_u = b_v / tl.maximum(tl.sqrt(tl.sum(b_v * b_v, axis=1, keep_dims=True)), _NORM_FLOOR)
    count = tl.maximum(tl.cdiv(p, BLOCK_C), 1)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    b_max = tl.full([1, 1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1, 1], tl.float32)
    b_y = tl.zeros([1, D], tl.float32)
    for start in range(0, count, BLOCK_S):
        # [BLOCK_S, 1] and [BLOCK_S, D]
        o_s = start + tl.arange(0, BLOCK_S)[:, None]
        o_part = query * SPLITS + o_s
        p_max = parts + queries * SPLITS * D + o_part
        b_part = tl.load(parts + o_part * D + o_d, mask=o_s < count, other=0.0)
        b_maxima = tl.load(p_max, mask=o_s < count, other=float("-inf"))
        b_sums = tl.load(p_max + queries * SPLITS, mask=o_s < count, other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_maxima, axis=0, keep_dims=True))
        b_weight = tl.exp2(b_maxima - b_new)
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_weight * b_sums, axis=0, keep_dims=True)
        b_y = b_y * b_old + tl.sum(b_weight * b_part, axis=0, keep_dims=True)
        b_max = b_new
    b_y = b_y / b_sum
    b_y -= tl.sum(b_y * b_u, axis=1, keep_dims=True) * b_u
    tl.store(out + query * D + o_d, b_y.to(out.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::cached_attention", mutates_args=("keys", "values"))
def cached_attention_op(
    qkv: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    (context, kv_heads, dim), queries = keys.shape, gain.numel()
    config = settings("cached_attention", qkv.device)
    split, merge = config["split"], config["merge"]
    splits = triton.cdiv(context, split["BLOCK_C"])
    shape = {"D": dim, "GROUP": queries // kv_heads} | early(qkv.device)
    parts = torch.empty(queries * splits * (dim + 2), dtype=torch.float32, device=qkv.device)
    out = torch.empty((1, queries, dim), dtype=qkv.dtype, device=qkv.device)
    cached_attention_kernel[(kv_heads, splits)](
        qkv, gain, cos, sin, position, keys, values, parts, queries, kv_heads,
        HALF=cos.shape[1], **shape, **split,
    )  # fmt: skip
    cached_attention_merge_kernel[(queries,)](
        qkv, position, parts, out, splits, kv_heads, BLOCK_C=split["BLOCK_C"], **shape, **merge
    )
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
    """reference.cached_attention: one new token in two launches, several by the reference. For inference: no gradients.

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
