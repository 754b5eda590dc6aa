"""Causal grouped-query attention with exclusive self-attention (XSA), forward and backward, one op.

For batch b, query head h, its KV head g = h // (H / G), position t, with c = 1 / sqrt(D):

    visible(t) = {j : document_starts[t] <= j <= t}                 (document_starts = 0 when not given)
    p_tj = exp(c q_t.k_j - lse_t),   lse_t = log sum_{j in visible(t)} exp(c q_t.k_j)
    y_t  = sum_j p_tj v_j                                           plain attention
    v^_t = v_t / max(|v_t|, 1e-12),   s_t = y_t.v^_t,   z_t = y_t - s_t v^_t      the output (arXiv 2603.09078)

Backward, for the gradient g of z, with u_t = g_t.v^_t:

    grad_y = g - u v^         delta = grad_y.y        dS = p * (grad_y V^T - delta)
    grad_q = c dS K           grad_k = c dS^T Q       grad_v = p^T grad_y + x
    x_t = -(sum_heads(u z + s g) + (sum_heads u s) v^ - [|v| > 1e-12] 2 (sum_heads u s) v^) / max(|v_t|, 1e-12)

The sums run over the query heads of the KV head. x is XSA's own gradient of v; it is written with y = z + s v^, so
that the forward keeps z, the float s and the float lse of each row and no second copy of the output.

Shapes: q (B, T, H, D), k and v (B, T, G, D), bf16 or fp16, last dimension contiguous, other strides free (views of one
fused projection); out (B, T, H, D) contiguous; document_starts int32 (B, T), non-decreasing along a row.
Work (dense): 4 D T^2 / 2 FLOPs a query head forward, 10 D T^2 / 2 backward (14 on the deterministic path, which makes
the scores twice). Traffic: q, k, v read and out written once; backward reads and writes 12 to 16 output sizes.
Tiles outside every document of their queries are skipped. Scores, softmax, sums and XSA are float32; p and dS are
rounded to the input dtype before their products, as every flash attention does, so the error against float64 stays at
or under that of torch's own kernels followed by XSA in the input dtype.

Two sets of kernels: `attention_hopper.py` (warp-specialised, TMA and wgmma) for D of 64 or 128 on a Hopper GPU, where
TMA can address the inputs (bases and strides of 16 bytes: with documents T has to be a multiple of 4); and the portable
ones below for every other D, GPU and input, for the deterministic backward, and for the interpreter.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import attention_hopper, matmul
from kernels.launch import DTYPES, HEAD_DIMS, expect_one_gpu, gpu, settings
from kernels.reference import NORM_FLOOR

LOG2E = math.log2(math.e)
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


# ----------------------------------------------------------------------------------------------- portable kernels
@triton.jit
def attention_place(program, tiles, heads, chunk):
    """Program number -> head and tile. A chunk of heads, whose rows stay in the L2 cache, is finished before the next;
    within it the tiles go in order, so the caller numbers them from the most work to the least."""
    first = program // (chunk * tiles) * chunk
    rest = program % (chunk * tiles)
    width = tl.minimum(chunk, heads - first)
    return (first + rest % width).to(tl.int64), rest // width


@triton.jit
def attention_fwd_tiles(
    b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kt, stride_vt, o_m, b_start, first, last, scale_log2, T,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [first, last)."""
    o_d = tl.arange(0, D)
    for tile in range(first, last):
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # [D, BLOCK_N]
        b_k = tl.load(p_k + o_n[None, :] * stride_kt + o_d[:, None], mask=o_n[None, :] < T, other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, b_k)
        if MASK:
            m_s = o_m[:, None] >= o_n[None, :]
            if DOCUMENTS:
                m_s = m_s & (o_n[None, :] >= b_start[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        # [BLOCK_N, D]
        b_v = tl.load(p_v + o_n[:, None] * stride_vt + o_d[None, :], mask=o_n[:, None] < T, other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def attention_fwd_kernel(
    q, k, v, document_starts, out, s, lse,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    T, T_PAD, H, heads, chunk, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    head, tile = attention_place(tl.program_id(0), tiles, heads, chunk)
    m_first = (tiles - 1 - tile) * BLOCK_M
    batch = head // H
    head = head % H
    p_q = q + batch * stride_qb + head * stride_qh
    p_k = k + batch * stride_kb + (head // GROUP) * stride_kh
    p_v = v + batch * stride_vb + (head // GROUP) * stride_vh

    o_m = m_first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
    m_m = o_m < T
    # [BLOCK_M, D]
    b_q = tl.load(p_q + o_m[:, None].to(tl.int64) * stride_qt + o_d[None, :], mask=m_m[:, None], other=0.0)

    # Key tiles in three runs: the diagonal, those that every query of the tile sees whole, and those that hold the
    # start of a document.
    diagonal = m_first // BLOCK_N
    end = tl.cdiv(tl.minimum(m_first + BLOCK_M, T), BLOCK_N)
    whole = 0
    start = 0
    b_start = o_m * 0
    if DOCUMENTS:
        p_start = document_starts + batch * T
        b_start = tl.load(p_start + o_m, mask=m_m, other=0)
        start = tl.load(p_start + m_first) // BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.load(p_start + tl.minimum(m_first + BLOCK_M, T) - 1), BLOCK_N), diagonal)
    b_acc = tl.zeros([BLOCK_M, D], tl.float32)
    b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite, for rows to which a whole tile is hidden
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc, b_max, b_sum = attention_fwd_tiles(
        b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kt, stride_vt, o_m, b_start, diagonal, end, scale_log2, T,
        D, BLOCK_N, True, DOCUMENTS,
    )  # fmt: skip
    b_acc, b_max, b_sum = attention_fwd_tiles(
        b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kt, stride_vt, o_m, b_start, whole, diagonal, scale_log2, T,
        D, BLOCK_N, False, DOCUMENTS,
    )  # fmt: skip
    if DOCUMENTS:
        b_acc, b_max, b_sum = attention_fwd_tiles(
            b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kt, stride_vt, o_m, b_start, start, whole, scale_log2, T,
            D, BLOCK_N, True, DOCUMENTS,
        )  # fmt: skip

    # XSA: take out of y its part along the token's own value.
    b_y = b_acc / b_sum[:, None]
    b_v = tl.load(p_v + o_m[:, None].to(tl.int64) * stride_vt + o_d[None, :], mask=m_m[:, None], other=0.0)
    b_v = b_v.to(tl.float32)
    b_v = b_v / tl.maximum(tl.sqrt(tl.sum(b_v * b_v, 1)), _NORM_FLOOR)[:, None]
    b_dot = tl.sum(b_y * b_v, 1)
    b_z = b_y - b_dot[:, None] * b_v
    p_out = out + ((batch * T + o_m[:, None]) * H + head) * D + o_d[None, :]
    tl.store(p_out, b_z.to(out.dtype.element_ty), mask=m_m[:, None])
    o_row = (batch * H + head) * T_PAD + o_m
    tl.store(s + o_row, b_dot, mask=o_m < T_PAD)
    tl.store(lse + o_row, b_max + tl.log2(b_sum), mask=o_m < T_PAD)


@triton.jit
def attention_bwd_prepare_kernel(
    g, v, z, s, grad_y, delta, grad_v,
    stride_gb, stride_gt, stride_gh, stride_vb, stride_vt, stride_vh, stride_grad_v,
    T, T_PAD, H, G,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Back through XSA: grad_y, delta, XSA's part of grad_v."""
    batch = (tl.program_id(0) // G).to(tl.int64)
    kv_head = (tl.program_id(0) % G).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, D)
    m_t = o_t < T
    o_t64 = o_t.to(tl.int64)
    # [BLOCK_T, D]
    b_v = tl.load(v + batch * stride_vb + o_t64[:, None] * stride_vt + kv_head * stride_vh + o_d[None, :],
                  mask=m_t[:, None], other=0.0).to(tl.float32)  # fmt: skip
    b_norm = tl.sqrt(tl.sum(b_v * b_v, 1))
    b_inverse = 1.0 / tl.maximum(b_norm, _NORM_FLOOR)
    b_v = b_v * b_inverse[:, None]
    b_x = tl.zeros([BLOCK_T, D], tl.float32)
    b_us = tl.zeros([BLOCK_T], tl.float32)
    for i in tl.static_range(GROUP):
        head = kv_head * GROUP + i
        p_out = ((batch * T + o_t64[:, None]) * H + head) * D + o_d[None, :]
        o_row = (batch * H + head) * T_PAD + o_t
        # [BLOCK_T, D]
        b_g = tl.load(g + batch * stride_gb + o_t64[:, None] * stride_gt + head * stride_gh + o_d[None, :],
                      mask=m_t[:, None], other=0.0).to(tl.float32)  # fmt: skip
        b_z = tl.load(z + p_out, mask=m_t[:, None], other=0.0).to(tl.float32)
        b_s = tl.load(s + o_row, mask=m_t, other=0.0)
        b_u = tl.sum(b_g * b_v, 1)
        b_gy = (b_g - b_u[:, None] * b_v).to(grad_y.dtype.element_ty)
        tl.store(grad_y + p_out, b_gy, mask=m_t[:, None])
        b_delta = tl.sum(b_gy.to(tl.float32) * (b_z + b_s[:, None] * b_v), 1)
        tl.store(delta + o_row, tl.where(m_t, b_delta, 0.0), mask=o_t < T_PAD)
        b_x += b_u[:, None] * b_z + b_s[:, None] * b_g
        b_us += b_u * b_s
    b_us = tl.where(b_norm > _NORM_FLOOR, -b_us, b_us)
    b_x = -(b_x + b_us[:, None] * b_v) * b_inverse[:, None]
    p_gv = grad_v + (batch * T + o_t64[:, None]) * stride_grad_v + kv_head * D + o_d[None, :]
    tl.store(p_gv, b_x.to(grad_v.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def attention_document_ends_kernel(document_starts, document_ends, T, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr):
    """Where the documents of a block's first and last key end."""
    # Starts do not decrease, so the document of key j ends after the last query whose start is at most j.
    batch = tl.program_id(0).to(tl.int64)
    key_first = tl.program_id(1) * BLOCK_T
    key_last = tl.minimum(key_first + BLOCK_T, T) - 1
    end_first = 0
    end_last = 0
    for chunk in range(tl.cdiv(T, CHUNK)):
        o_c = chunk * CHUNK + tl.arange(0, CHUNK)
        b_c = tl.load(document_starts + batch * T + o_c, mask=o_c < T, other=2147483647)
        end_first += tl.sum((b_c <= key_first).to(tl.int32))
        end_last += tl.sum((b_c <= key_last).to(tl.int32))
    p_end = document_ends + (batch * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(p_end, end_first)
    tl.store(p_end + 1, end_last)


@triton.jit
def attention_bwd_dkdv_tiles(
    b_gk, b_gv, b_k, b_v, p_q, p_gy, p_lse, p_delta, stride_qt, stride_gt, document_starts, o_n, first, last,
    scale_log2, T, D: tl.constexpr, BLOCK_M: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Add the query tiles [first, last) of one head; scores transposed, so that p and dS feed the products as is."""
    o_d = tl.arange(0, D)
    for tile in range(first, last):
        o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < T
        # [BLOCK_M, D]
        b_q = tl.load(p_q + o_m[:, None] * stride_qt + o_d[None, :], mask=m_m[:, None], other=0.0)
        # [BLOCK_M]
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=0.0)
        # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q)) * scale_log2 - b_lse[None, :])
        if MASK:
            m_p = o_m[None, :] >= o_n[:, None]
            if DOCUMENTS:
                m_p = m_p & (o_n[:, None] >= tl.load(document_starts + o_m, mask=m_m, other=0)[None, :])
            b_p = tl.where(m_p, b_p, 0.0)
        # [BLOCK_M, D]
        b_gy = tl.load(p_gy + o_m[:, None] * stride_gt + o_d[None, :], mask=m_m[:, None], other=0.0)
        b_gv = tl.dot(b_p.to(b_gy.dtype), b_gy, b_gv)
        b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
        # [BLOCK_N, BLOCK_M]
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_gy)) - b_delta[None, :])
        b_gk = tl.dot(b_ds.to(b_q.dtype), b_q, b_gk)
    return b_gk, b_gv


@triton.jit
def attention_bwd_dkdv_kernel(
    q, k, v, document_starts, document_ends, grad_y, lse, delta, grad_k, grad_v,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_grad_kv,
    T, T_PAD, H, G, kv_heads, chunk, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one key tile, over all query heads of its group. grad_v holds XSA's part on entry."""
    kv_head, tile = attention_place(tl.program_id(0), tl.cdiv(T, BLOCK_N), kv_heads, chunk)
    n_first = tile * BLOCK_N
    batch = kv_head // G
    kv_head = kv_head % G
    o_n = n_first + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, D)
    m_n = o_n[:, None] < T
    o_n64 = o_n[:, None].to(tl.int64)
    # [BLOCK_N, D]
    b_k = tl.load(k + batch * stride_kb + o_n64 * stride_kt + kv_head * stride_kh + o_d[None, :], mask=m_n, other=0.0)
    b_v = tl.load(v + batch * stride_vb + o_n64 * stride_vt + kv_head * stride_vh + o_d[None, :], mask=m_n, other=0.0)

    # Query tiles: the diagonal, those whose queries all see all of these keys, and those past the first key's document.
    diagonal = n_first // BLOCK_M
    below = tl.cdiv(tl.minimum(n_first + BLOCK_N, T), BLOCK_M)
    whole = tl.cdiv(T, BLOCK_M)
    end = whole
    p_start = document_starts
    if DOCUMENTS:
        p_start += batch * T
        blocks = tl.cdiv(T, BLOCK_T)
        p_end = document_ends + batch * blocks * 2
        block_last = (tl.minimum(n_first + BLOCK_N, T) - 1) // BLOCK_T
        end = tl.cdiv(tl.load(p_end + block_last * 2 + 1), BLOCK_M)
        whole = tl.minimum(tl.maximum(tl.load(p_end + (n_first // BLOCK_T) * 2) // BLOCK_M, below), end)
    b_gk = tl.zeros([BLOCK_N, D], tl.float32)
    b_gv = tl.zeros([BLOCK_N, D], tl.float32)
    for i in range(GROUP):
        head = kv_head * GROUP + i
        p_q = q + batch * stride_qb + head * stride_qh
        p_gy = grad_y + (batch * T * H + head) * D
        p_lse = lse + (batch * H + head) * T_PAD
        p_delta = delta + (batch * H + head) * T_PAD
        b_gk, b_gv = attention_bwd_dkdv_tiles(
            b_gk, b_gv, b_k, b_v, p_q, p_gy, p_lse, p_delta, stride_qt, H * D, p_start, o_n, diagonal, below,
            scale_log2, T, D, BLOCK_M, True, DOCUMENTS,
        )  # fmt: skip
        b_gk, b_gv = attention_bwd_dkdv_tiles(
            b_gk, b_gv, b_k, b_v, p_q, p_gy, p_lse, p_delta, stride_qt, H * D, p_start, o_n, below, whole,
            scale_log2, T, D, BLOCK_M, False, DOCUMENTS,
        )  # fmt: skip
        if DOCUMENTS:
            b_gk, b_gv = attention_bwd_dkdv_tiles(
                b_gk, b_gv, b_k, b_v, p_q, p_gy, p_lse, p_delta, stride_qt, H * D, p_start, o_n, whole, end,
                scale_log2, T, D, BLOCK_M, True, DOCUMENTS,
            )  # fmt: skip
    o_out = (batch * T + o_n64) * stride_grad_kv + kv_head * D + o_d[None, :]
    tl.store(grad_k + o_out, (b_gk * scale).to(grad_k.dtype.element_ty), mask=m_n)
    b_gv += tl.load(grad_v + o_out, mask=m_n, other=0.0).to(tl.float32)
    tl.store(grad_v + o_out, b_gv.to(grad_v.dtype.element_ty), mask=m_n)


@triton.jit
def attention_bwd_dq_tiles(
    b_gq, b_q, b_gy, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, o_m, b_start, first, last, scale_log2, T,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, D)
    for tile in range(first, last):
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n[:, None] < T
        # [BLOCK_N, D]
        b_k = tl.load(p_k + o_n[:, None] * stride_kt + o_d[None, :], mask=m_n, other=0.0)
        b_v = tl.load(p_v + o_n[:, None] * stride_vt + o_d[None, :], mask=m_n, other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)) * scale_log2 - b_lse[:, None])
        if MASK:
            m_p = o_m[:, None] >= o_n[None, :]
            if DOCUMENTS:
                m_p = m_p & (o_n[None, :] >= b_start[:, None])
            b_p = tl.where(m_p, b_p, 0.0)
        b_ds = b_p * (tl.dot(b_gy, tl.trans(b_v)) - b_delta[:, None])
        b_gq = tl.dot(b_ds.to(b_k.dtype), b_k, b_gq)
    return b_gq


@triton.jit
def attention_bwd_dq_kernel(
    q, k, v, document_starts, grad_y, lse, delta, grad_q,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_grad_q,
    T, T_PAD, H, heads, chunk, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    head, tile = attention_place(tl.program_id(0), tiles, heads, chunk)
    m_first = (tiles - 1 - tile) * BLOCK_M
    batch = head // H
    head = head % H
    p_k = k + batch * stride_kb + (head // GROUP) * stride_kh
    p_v = v + batch * stride_vb + (head // GROUP) * stride_vh
    o_m = m_first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
    m_m = o_m < T
    o_m64 = o_m[:, None].to(tl.int64)
    o_out = ((batch * T + o_m64) * H + head) * D + o_d[None, :]
    o_row = (batch * H + head) * T_PAD + o_m
    # [BLOCK_M, D]
    b_q = tl.load(q + batch * stride_qb + head * stride_qh + o_m64 * stride_qt + o_d[None, :],
                  mask=m_m[:, None], other=0.0)  # fmt: skip
    b_gy = tl.load(grad_y + o_out, mask=m_m[:, None], other=0.0)
    # [BLOCK_M]
    b_lse = tl.load(lse + o_row, mask=m_m, other=0.0)
    b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)

    diagonal = m_first // BLOCK_N
    end = tl.cdiv(tl.minimum(m_first + BLOCK_M, T), BLOCK_N)
    whole = 0
    start = 0
    b_start = o_m * 0
    if DOCUMENTS:
        p_start = document_starts + batch * T
        b_start = tl.load(p_start + o_m, mask=m_m, other=0)
        start = tl.load(p_start + m_first) // BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.load(p_start + tl.minimum(m_first + BLOCK_M, T) - 1), BLOCK_N), diagonal)
    b_gq = tl.zeros([BLOCK_M, D], tl.float32)
    b_gq = attention_bwd_dq_tiles(
        b_gq, b_q, b_gy, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, o_m, b_start, diagonal, end, scale_log2, T,
        D, BLOCK_N, True, DOCUMENTS,
    )  # fmt: skip
    b_gq = attention_bwd_dq_tiles(
        b_gq, b_q, b_gy, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, o_m, b_start, whole, diagonal, scale_log2, T,
        D, BLOCK_N, False, DOCUMENTS,
    )  # fmt: skip
    if DOCUMENTS:
        b_gq = attention_bwd_dq_tiles(
            b_gq, b_q, b_gy, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, o_m, b_start, start, whole, scale_log2, T,
            D, BLOCK_N, True, DOCUMENTS,
        )  # fmt: skip
    p_gq = grad_q + (batch * T + o_m64) * stride_grad_q + head * D + o_d[None, :]
    tl.store(p_gq, (b_gq * scale).to(grad_q.dtype.element_ty), mask=m_m[:, None])


# ------------------------------------------------------------------------------------------------------- launching
def _padded(length: int) -> int:
    """Rows a head of lse, s and delta: whole tiles, so that a copy of a tile stays within the head."""
    return triton.cdiv(length, 128) * 128


def _copyable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_starts: torch.Tensor | None) -> bool:
    """Whether TMA can address them: 16-byte bases and strides."""
    return all(
        x.data_ptr() % 16 == 0 and all(y > 0 and y * x.element_size() % 16 == 0 for y in x.stride()[:-1])
        for x in (q, k, v, document_starts)
        if x is not None
    )


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _forward(
    q: torch.Tensor,  # (B, T, H, D)
    k: torch.Tensor,  # (B, T, G, D)
    v: torch.Tensor,  # (B, T, G, D)
    document_starts: torch.Tensor | None,  # (B, T)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # z (B, T, H, D), s and lse (B, H, T padded)
    batch, length, heads, dim = q.shape
    out = torch.empty((batch, length, heads, dim), dtype=q.dtype, device=q.device)
    # Rows past the length are read, against zeros: they must be finite.
    allocate = torch.empty if length == _padded(length) else torch.zeros
    s, lse = (allocate((batch, heads, _padded(length)), dtype=torch.float32, device=q.device) for _ in range(2))
    config = settings("attention", q.device)[str(dim)]
    if "forward_hopper" in config and _copyable(q, k, v, document_starts):
        attention_hopper.forward(q, k, v, document_starts, out, s, lse, config["forward_hopper"], gpu(q.device)[1])
        return out, s, lse
    config = dict(config["forward"])
    grid = (triton.cdiv(length, config["BLOCK_M"]) * batch * heads,)
    attention_fwd_kernel[grid](
        q, k, v, document_starts, out, s, lse, *_strides(q), *_strides(k), *_strides(v),
        length, s.shape[-1], heads, batch * heads, config.pop("chunk"), LOG2E / math.sqrt(dim),
        GROUP=heads // k.shape[2], D=dim, DOCUMENTS=document_starts is not None, **config,
    )  # fmt: skip
    return out, s, lse


def backward(
    g: torch.Tensor,  # (B, T, H, D); or (B, T, N), of what `output` makes of z
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    document_starts: torch.Tensor | None,
    z: torch.Tensor,
    s: torch.Tensor,
    lse: torch.Tensor,
    deterministic: bool,
    grad_q: torch.Tensor,  # the gradients are written here; they may be parts of one tensor (B, T, heads, D)
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    row_scale: torch.Tensor | None = None,  # (B T,) float32
    output: torch.Tensor | None = None,  # (N, H D)
) -> torch.Tensor | None:
    """The portable kernels write all three. Those for Hopper write grad_k and grad_v, the latter times row_scale, if
    there is one, and the sums of grad_q are returned as `attention_hopper` keeps them."""
    batch, length, heads, dim = q.shape
    kv = k.shape[2]
    documents = document_starts is not None
    scale = 1.0 / math.sqrt(dim)
    config = settings("attention", q.device)[str(dim)]

    prepare = config["prepare"]  # its blocks of tokens are those of the Hopper kernels, where these are used
    blocks = triton.cdiv(length, prepare["BLOCK_T"])
    document_ends = None
    if documents:
        document_ends = torch.empty((batch, blocks, 2), dtype=torch.int32, device=q.device)
        attention_document_ends_kernel[(batch, blocks)](
            document_starts, document_ends, length, BLOCK_T=prepare["BLOCK_T"], CHUNK=1024
        )
    if output is not None and matmul.exclusive_fits(g, output, z, v):
        grad_y, delta = matmul.exclusive_backward(g, output, z, s, v, grad_v)
    else:
        if output is not None:
            g = torch.mm(g.flatten(0, 1), output).view_as(z)
        if g.stride(-1) != 1:
            g = g.contiguous()
        grad_y, delta = torch.empty_like(z), torch.empty_like(lse)
        attention_bwd_prepare_kernel[(batch * kv, blocks)](
            g, v, z, s, grad_y, delta, grad_v, *_strides(g), *_strides(v), grad_v.stride(1),
            length, s.shape[-1], heads, kv, GROUP=heads // kv, D=dim, **prepare,
        )  # fmt: skip
    if "backward_hopper" in config and not deterministic and _copyable(q, k, v, document_starts):
        return attention_hopper.backward(
            q, k, v, document_starts, document_ends, grad_y, lse, delta, grad_k, grad_v, row_scale,
            config["backward_hopper"], gpu(q.device)[1],
        )  # fmt: skip

    grad_kv = dict(config["grad_kv"])
    attention_bwd_dkdv_kernel[(triton.cdiv(length, grad_kv["BLOCK_N"]) * batch * kv,)](
        q, k, v, document_starts, document_ends, grad_y, lse, delta, grad_k, grad_v,
        *_strides(q), *_strides(k), *_strides(v), grad_k.stride(1),
        length, s.shape[-1], heads, kv, batch * kv, grad_kv.pop("chunk"), scale, scale * LOG2E,
        GROUP=heads // kv, D=dim, BLOCK_T=prepare["BLOCK_T"], DOCUMENTS=documents, **grad_kv,
    )  # fmt: skip
    grad_q_config = dict(config["grad_q"])
    attention_bwd_dq_kernel[(triton.cdiv(length, grad_q_config["BLOCK_M"]) * batch * heads,)](
        q, k, v, document_starts, grad_y, lse, delta, grad_q,
        *_strides(q), *_strides(k), *_strides(v), grad_q.stride(1),
        length, s.shape[-1], heads, batch * heads, grad_q_config.pop("chunk"), scale, scale * LOG2E,
        GROUP=heads // kv, D=dim, DOCUMENTS=documents, **grad_q_config,
    )  # fmt: skip
    return None


def _gradients(g, q, k, v, document_starts, z, s, lse, deterministic, grad_q, grad_k, grad_v) -> None:
    """backward, all three gradients written."""
    sums = backward(g, q, k, v, document_starts, z, s, lse, deterministic, grad_q, grad_k, grad_v)
    if sums is not None:
        attention_hopper.finish(sums, grad_q)


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::attention", mutates_args=())
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_starts: torch.Tensor | None, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(q, k, v, document_starts)


def _fake(x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, _, dim = x.shape
    rows = x.new_empty((batch, heads, (length + 127) // 128 * 128), dtype=torch.float32)
    return x.new_empty((batch, length, heads, dim)), rows, torch.empty_like(rows)


@attention_op.register_fake
def _(q, k, v, document_starts, deterministic):
    return _fake(q, q.shape[2])


@torch.library.custom_op("golf::attention_backward", mutates_args=())
def attention_backward_op(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_starts: torch.Tensor | None,
    z: torch.Tensor, s: torch.Tensor, lse: torch.Tensor, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _gradients(g, q, k, v, document_starts, z, s, lse, deterministic, *grads)
    return grads


@attention_backward_op.register_fake
def _(g, q, k, v, document_starts, z, s, lse, deterministic):
    return torch.empty_like(z), k.new_empty(k.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    q, k, v, document_starts, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, document_starts, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g, *_):
    grads = (None, None, None)
    if g is not None:
        grads = torch.ops.golf.attention_backward(g, *ctx.saved_tensors, ctx.deterministic)
    return *grads, None, None


attention_op.register_autograd(_differentiate, setup_context=_save)


def parts(qkv: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)


@torch.library.custom_op("golf::attention_qkv", mutates_args=())
def attention_qkv_op(
    qkv: torch.Tensor, kv_heads: int, document_starts: torch.Tensor | None, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(*parts(qkv, kv_heads), document_starts)


@attention_qkv_op.register_fake
def _(qkv, kv_heads, document_starts, deterministic):
    return _fake(qkv, qkv.shape[2] - 2 * kv_heads)


@torch.library.custom_op("golf::attention_qkv_backward", mutates_args=())
def attention_qkv_backward_op(
    g: torch.Tensor, qkv: torch.Tensor, document_starts: torch.Tensor | None,
    z: torch.Tensor, s: torch.Tensor, lse: torch.Tensor, kv_heads: int, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _gradients(g, *parts(qkv, kv_heads), document_starts, z, s, lse, deterministic, *parts(grad, kv_heads))
    return grad


@attention_qkv_backward_op.register_fake
def _(g, qkv, document_starts, z, s, lse, kv_heads, deterministic):
    return qkv.new_empty(qkv.shape)


def _save_qkv(ctx, inputs, output):
    qkv, ctx.kv_heads, document_starts, ctx.deterministic = inputs
    ctx.save_for_backward(qkv, document_starts, *output)
    ctx.set_materialize_grads(False)


def _differentiate_qkv(ctx, g, *_):
    grad = None
    if g is not None:
        grad = torch.ops.golf.attention_qkv_backward(g, *ctx.saved_tensors, ctx.kv_heads, ctx.deterministic)
    return grad, None, None, None


attention_qkv_op.register_autograd(_differentiate_qkv, setup_context=_save_qkv)


# ---------------------------------------------------------------------------------------------------------- public
def document_starts(
    starts: torch.Tensor,  # (B, T) bool, True on the first token of a document
) -> torch.Tensor:  # (B, T) int32
    """For each token the position in its row of the first token of its document: attention's document_starts.

    Raises ValueError, naming what was found, where starts is not bool (B, T).
    """
    if starts.dim() != 2 or starts.dtype != torch.bool:
        raise ValueError(f"document_starts wants starts (B, T) torch.bool; got {tuple(starts.shape)} {starts.dtype}")
    position = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    return torch.where(starts, position, 0).cummax(1).values


def longest(dim: int) -> int:
    """Tokens of a row for heads of `dim`: blocks of them are the second axis of a grid, which has at most 65,535."""
    return 65535 * (16 if dim < 64 else 64)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_starts: torch.Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attention wants q (B, T, H, D) and k, v (B, T, G, D); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if 0 in q.shape or 0 in k.shape or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention wants H a multiple of G, none empty; got q {tuple(q.shape)}, H {q.shape[2]}, G {k.shape[2]}"
        )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"attention wants a head dimension among {HEAD_DIMS}; got {q.shape[3]}")
    if q.shape[1] > longest(q.shape[3]) or q.shape[1] * q.shape[2] * q.shape[3] >= 2**31:
        raise ValueError(
            f"attention wants rows of at most {longest(q.shape[3]):,} tokens and fewer than 2**31 elements; "
            f"got q {tuple(q.shape)}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention wants q, k, v of one dtype among {DTYPES}; got {q.dtype}, {k.dtype}, {v.dtype}")
    tensors = {"q": q, "k": k, "v": v}
    if document_starts is not None:
        if document_starts.shape != q.shape[:2] or document_starts.dtype != torch.int32:
            raise ValueError(
                f"attention wants document_starts int32 {tuple(q.shape[:2])}; "
                f"got {document_starts.dtype} {tuple(document_starts.shape)}"
            )
        if not document_starts.is_contiguous():
            raise ValueError(f"attention wants contiguous document_starts; got strides {document_starts.stride()}")
        tensors["document_starts"] = document_starts
    expect_one_gpu("attention", tensors)
    for name, x in tensors.items():
        if x.stride(-1) != 1:
            raise ValueError(f"attention wants the last dimension contiguous; got {name} with strides {x.stride()}")
        if x.stride(1) * x.shape[1] >= 2**31:
            raise ValueError(f"attention wants rows of fewer than 2**31 elements; got {name} with strides {x.stride()}")


def attention(
    q: torch.Tensor,  # (B, T, H, D)
    k: torch.Tensor,  # (B, T, G, D)
    v: torch.Tensor,  # (B, T, G, D)
    document_starts: torch.Tensor | None = None,  # (B, T)
    deterministic: bool = False,
) -> torch.Tensor:  # (B, T, H, D)
    """Causal grouped-query attention followed by XSA, differentiable in q, k and v.

    q, k, v (torch.Tensor):
        Queries ``[B, T, H, D]``, keys and values ``[B, T, G, D]``, H a multiple of G, D 16, 32, 64 or 128, all
        bf16 or all fp16, the last dimension contiguous.
    document_starts (torch.Tensor):
        int32 ``[B, T]``, contiguous: the position in its row of the first token of each token's document, which does
        not decrease along the row. A query sees the keys of its own document only. Default: ``None``, one document a
        row.
    deterministic (bool):
        Sum the gradients in a fixed order, so that repeated runs agree to the bit. The default adds grad_q atomically
        on Hopper and is faster there; elsewhere both are the same. Default: ``False``.

    Returns ``[B, T, H, D]``, contiguous, of q's dtype. Raises ValueError, naming what was found and what was wanted,
    for other shapes, dtypes, strides or devices, and rows of more than ``longest(D)`` tokens or of 2**31 elements.
    What document_starts holds is not checked: that would wait for the GPU.
    """
    _check(q, k, v, document_starts)
    return torch.ops.golf.attention(q, k, v, document_starts, deterministic)[0]


def attention_qkv(
    qkv: torch.Tensor,  # (B, T, H + 2 G, D)
    kv_heads: int,  # G
    document_starts: torch.Tensor | None = None,  # (B, T)
    deterministic: bool = False,
) -> torch.Tensor:  # (B, T, H, D)
    """`attention` of the heads of one tensor, H of queries, G of keys, G of values; its gradient is one tensor too.

    Raises ValueError as `attention` does.
    """
    if qkv.dim() != 4 or not 0 < 2 * kv_heads < qkv.shape[2]:
        raise ValueError(
            "attention_qkv wants qkv (B, T, H + 2 G, D) and G as kv_heads; "
            f"got qkv {tuple(qkv.shape)}, kv_heads {kv_heads}"
        )
    _check(*parts(qkv, kv_heads), document_starts)
    return torch.ops.golf.attention_qkv(qkv, kv_heads, document_starts, deterministic)[0]
