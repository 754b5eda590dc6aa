"""The products of `matmul.py` for Hopper (compute capability 9.0): Gluon, warp-specialised, TMA and wgmma.

Both kernels are persistent. One warp copies operands, another what the epilogue reads (`extra`), into the buffer from
which the result leaves; each consumer warpgroup makes tiles of 64 rows.

Resident, for a short inner dimension: a program keeps a slice of BLOCK_N columns of w in shared memory for its whole
life and streams x past it. Its consumers take turns along the rows, so that one multiplies while another is in its
epilogue. All programs sweep the rows together: x comes from memory once and from the L2 cache for the other slices.

Streaming, for a long one: x and w in step, two consumers on the two halves of 128 rows.
"""

import threading

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.matmul_epilogue import activation_fp8, matmul_epilogue, row_terms, softcap_gradient
from kernels.reference import NORM_FLOOR, RMS_EPS

ROWS = gl.constexpr(64)  # rows of one warpgroup's wgmma
HEAD = gl.constexpr(64)  # columns of an attention head
EPS = gl.constexpr(RMS_EPS)
FLOOR = gl.constexpr(NORM_FLOOR)

_thread = threading.local()


@gluon.jit
def matmul_heads(b_acc, b_scale, heads, m_first, n_first, M, HALF: gl.constexpr, dtype: gl.constexpr):
    """Epilogue of attention's input: RMS norm and rotary of the q and k heads, gain of q, the row's factor of v."""
    gain, cos, sin, inv_rms, T, queries, normed = heads
    HEADS: gl.constexpr = b_acc.shape[1] // HEAD
    GROUPS: gl.constexpr = HEAD // (2 * HALF)
    # A thread holds both values of each pair. [ROWS, HEADS, GROUPS, HALF]
    b_z = b_acc.reshape([ROWS, HEADS, GROUPS, 2, HALF]).permute((0, 1, 2, 4, 3))
    b_1, b_2 = b_z.split()
    layout: gl.constexpr = b_1.type.layout
    by_head: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(2, layout))
    by_angle: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    # [ROWS, HEADS]
    o_m = m_first + gl.arange(0, ROWS, gl.SliceLayout(1, by_head))
    o_h = n_first // HEAD + gl.arange(0, HEADS, gl.SliceLayout(0, by_head))
    m_n = (o_h < normed)[None, :]
    b_s = gl.convert_layout(b_scale, by_head)
    b_inv = gl.rsqrt(gl.sum(gl.sum(b_1 * b_1 + b_2 * b_2, 2), 2) / HEAD + EPS / (b_s * b_s))
    gl.store(inv_rms + o_m[:, None].to(gl.int64) * normed + o_h[None, :], b_inv, mask=(o_m < M)[:, None] & m_n)
    b_gain = gl.load(gain + o_h, mask=o_h < queries, other=1.0)[None, :]
    b_factor = (gl.where(m_n, b_inv, b_s) * b_gain)[:, :, None][:, :, None, :]
    # [ROWS, HALF]
    o_t = (m_first + gl.arange(0, ROWS, gl.SliceLayout(1, by_angle))) % T
    o_a = o_t[:, None] * HALF + gl.arange(0, HALF, gl.SliceLayout(0, by_angle))[None, :]
    b_cos = gl.load(cos + o_a)[:, None, None, :]
    b_sin = gl.load(sin + o_a)[:, None, None, :]
    o_group = gl.arange(0, GROUPS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    m_r = m_n[:, :, None][:, :, None, :] & (o_group == 0)[None, None, :, None]
    b_y1 = gl.where(m_r, b_1 * b_cos + b_2 * b_sin, b_1) * b_factor
    b_y2 = gl.where(m_r, b_2 * b_cos - b_1 * b_sin, b_2) * b_factor
    b_out = gl.join(b_y1.to(dtype), b_y2.to(dtype)).permute((0, 1, 2, 4, 3)).reshape([ROWS, HEADS * HEAD])
    return gl.convert_layout(b_out, b_acc.type.layout)


@gluon.jit
def matmul_exclusive(b_acc, b_z, attended, m_first, n_first, M, dtype: gl.constexpr):
    """Epilogue of the gradient of attention's output: back through XSA, as attention_bwd_prepare_kernel of
    `attention.py`, for the heads of a KV head."""
    v, s, grad_v, delta, stride_v, stride_grad_v, T, H = attended
    GROUP: gl.constexpr = b_acc.shape[1] // HEAD
    # [ROWS, GROUP, HEAD]
    b_g = b_acc.reshape([ROWS, GROUP, HEAD])
    b_z = b_z.to(gl.float32).reshape([ROWS, GROUP, HEAD])
    layout: gl.constexpr = b_g.type.layout
    by_head: gl.constexpr = gl.SliceLayout(2, layout)
    by_column: gl.constexpr = gl.SliceLayout(1, layout)
    # [ROWS, HEAD]
    o_m = m_first + gl.arange(0, ROWS, gl.SliceLayout(1, by_column))
    o_d = n_first // GROUP + gl.arange(0, HEAD, gl.SliceLayout(0, by_column))
    m_m = (o_m < M)[:, None]
    o_row = o_m[:, None].to(gl.int64)
    b_v = gl.load(v + o_row * stride_v + o_d[None, :], mask=m_m, other=0.0).to(gl.float32)
    b_norm = gl.sqrt(gl.sum(b_v * b_v, 1))
    b_inverse = 1.0 / gl.maximum(b_norm, FLOOR)
    b_v = b_v * b_inverse[:, None]
    b_wide = b_v.expand_dims(1)
    # [ROWS, GROUP]; a tile is of one row of the batch.
    o_t = m_first % T + gl.arange(0, ROWS, gl.SliceLayout(1, by_head))
    o_h = m_first // T * H + n_first // HEAD + gl.arange(0, GROUP, gl.SliceLayout(0, by_head))
    o_s = o_h[None, :] * T + o_t[:, None]
    m_s = (m_first - m_first % T + o_t < M)[:, None]
    b_s = gl.load(s + o_s, mask=m_s, other=0.0)
    b_u = gl.sum(b_g * b_wide, 2)
    b_gy = (b_g - b_u.expand_dims(2) * b_wide).to(dtype)
    b_delta = gl.sum(b_gy.to(gl.float32) * (b_z + b_s.expand_dims(2) * b_wide), 2)
    gl.store(delta + o_s, b_delta, mask=m_s)
    b_x = gl.sum(b_u.expand_dims(2) * b_z + b_s.expand_dims(2) * b_g, 1)
    b_us = gl.convert_layout(gl.sum(b_u * b_s, 1), b_norm.type.layout)
    b_us = gl.where(b_norm > FLOOR, -b_us, b_us)
    b_x = -(b_x + b_us[:, None] * b_v) * b_inverse[:, None]
    gl.store(grad_v + o_row * stride_grad_v + o_d[None, :], b_x.to(dtype), mask=m_m)
    return gl.convert_layout(b_gy.reshape([ROWS, GROUP * HEAD]), b_acc.type.layout)


@gluon.jit
def load_other(other, m_first, n_first, M, N, layout: gl.constexpr):
    """What an epilogue reads beside `extra`, in the layout of the accumulators. [ROWS, BLOCK_N]"""
    o_m = m_first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_n = n_first + gl.arange(0, layout.instr_shape[1], gl.SliceLayout(0, layout))
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    return gl.load(other + o_m[:, None].to(gl.int64) * N + o_n[None, :], mask=mask, other=0.0)


@gluon.jit
def load_scale(row_scale, m_first, M, layout: gl.constexpr):
    """The factors of the rows. [ROWS, 1]"""
    o_m = m_first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return gl.load(row_scale + o_m, mask=o_m < M, other=0.0)[:, None]


@gluon.jit
def load_column_scale(column_scale, n_first, N, layout: gl.constexpr):
    """The factors of the columns. [1, BLOCK_N]"""
    o_n = n_first + gl.arange(0, layout.instr_shape[1], gl.SliceLayout(0, layout))
    return gl.load(column_scale + o_n, mask=o_n < N, other=0.0)[None, :]


@gluon.jit
def store_sums(sums, b_terms, m_first, n_first, M):
    """Sums over the columns of a tile."""
    o_m = m_first + gl.arange(0, ROWS, gl.SliceLayout(1, b_terms.type.layout))
    gl.store(sums + n_first // b_terms.shape[1] * M + o_m, gl.sum(b_terms, 1), mask=o_m < M)


@gluon.jit
def matmul_finish(
    b_acc, b_other, b_scale, sums, own, d_out, d_extra, d_small, s_tile, s_small, extra_full, extra_empty, turn,
    m_first, n_first, M, EPILOGUE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Epilogue of one tile, in the layout of its accumulators; `extra` was copied to where the result is written."""
    layout: gl.constexpr = b_acc.type.layout
    b_extra = None
    if d_extra is None:
        tma.store_wait(0)
    else:
        mbarrier.wait(extra_full, turn & 1)
        b_extra = s_tile.load(layout)
    if EPILOGUE == "heads":
        b_out = matmul_heads(b_acc, b_scale, own, m_first, n_first, M, HALF, s_tile.dtype)
    elif EPILOGUE == "exclusive":
        b_out = matmul_exclusive(b_acc, b_extra, own, m_first, n_first, M, s_tile.dtype)
    elif EPILOGUE == "activation_fp8":
        b_out, b_small = activation_fp8(b_acc, b_scale, s_tile.dtype)
        s_small.store(b_small)
    elif EPILOGUE == "softcap":
        b_out, b_e = softcap_gradient(b_acc, own, s_tile.dtype)
        store_sums(sums, b_e, m_first, n_first, M)
    else:
        b_out = matmul_epilogue(b_acc, b_extra, b_other, b_scale, EPILOGUE, s_tile.dtype)
    if d_out is not None:
        s_tile.store(b_out)
        fence_async_shared()
        tma.async_copy_shared_to_global(d_out, [m_first, n_first], s_tile)
    if d_small is not None:
        tma.async_copy_shared_to_global(d_small, [m_first, n_first], s_small)
    if sums is not None and EPILOGUE != "softcap":
        store_sums(sums, row_terms(b_acc, b_extra, b_out, EPILOGUE), m_first, n_first, M)
    if d_extra is not None:
        tma.store_wait(0)
        mbarrier.arrive(extra_empty, count=1)


# -------------------------------------------------------------------------------------------------------- resident
@gluon.jit
def resident_produce(
    d_x, d_w, buffers, barriers, tiles_m, tiles_n, ranges,
    TRANSPOSED: gl.constexpr, STEPS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_x, s_w, _s_out, _s_small = buffers
    w_full, full, empty, _extra_full, _extra_empty, _order = barriers
    n_first = gl.program_id(0) % tiles_n * BLOCK_N
    mbarrier.expect(w_full, STEPS * d_w.block_type.nbytes)
    for i in gl.static_range(STEPS):
        if TRANSPOSED:
            tma.async_copy_global_to_shared(d_w, [n_first, i * BLOCK_K], w_full, s_w.index(i))
        else:
            tma.async_copy_global_to_shared(d_w, [i * BLOCK_K, n_first], w_full, s_w.index(i))
    step = 0
    for tile in range(gl.program_id(0) // tiles_n, tiles_m, ranges):
        for k in range(STEPS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), d_x.block_type.nbytes)
            tma.async_copy_global_to_shared(d_x, [tile * ROWS, k * BLOCK_K], full.index(stage), s_x.index(stage))
            step += 1


@gluon.jit
def resident_fetch(
    d_extra, buffers, barriers, tiles_m, tiles_n, ranges, BLOCK_N: gl.constexpr
):  # fmt: skip
    _s_x, _s_w, s_out, _s_small = buffers
    _w_full, _full, _empty, extra_full, extra_empty, _order = barriers
    n_first = gl.program_id(0) % tiles_n * BLOCK_N
    count = 0
    if d_extra is not None:
        for tile in range(gl.program_id(0) // tiles_n, tiles_m, ranges):
            slot = count % 2
            mbarrier.wait(extra_empty.index(slot), ((count // 2) & 1) ^ 1)
            mbarrier.expect(extra_full.index(slot), ROWS * BLOCK_N * 2)
            tma.async_copy_global_to_shared(d_extra, [tile * ROWS, n_first], extra_full.index(slot), s_out.index(slot))
            count += 1


@gluon.jit
def resident_consume(
    d_out, d_extra, d_small, buffers, barriers, beside, own, M, N, tiles_m, tiles_n, ranges,
    INDEX: gl.constexpr, EPILOGUE: gl.constexpr, HALF: gl.constexpr, TRANSPOSED: gl.constexpr,
    STEPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_x, s_w, s_out, s_small = buffers
    w_full, full, empty, extra_full, extra_empty, order = barriers
    other, row_scale, column_scale, sums = beside
    # An instruction takes 32 bytes of a row of x.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 256 // s_x.dtype.primitive_bitwidth])
    n_first = gl.program_id(0) % tiles_n * BLOCK_N
    turn = 0
    mbarrier.wait(w_full, 0)
    for tile in range(gl.program_id(0) // tiles_n + INDEX * ranges, tiles_m, 2 * ranges):
        # Asked for before the products, so that it is there behind them.
        b_other, b_scale = None, None
        if other is not None:
            b_other = load_other(other, tile * ROWS, n_first, M, N, layout)
        if row_scale is not None:
            b_scale = load_scale(row_scale, tile * ROWS, M, layout)
        if column_scale is not None:
            b_scale = load_column_scale(column_scale, n_first, N, layout)
        step = (turn * 2 + INDEX) * STEPS
        # Not before the other's products are under way: a barrier's parity tells this round of a stage from the next,
        # not from the one after.
        mbarrier.wait(order.index(INDEX), (turn & 1) ^ (1 if INDEX == 0 else 0))
        # [ROWS, BLOCK_N]
        b_acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        for k in range(STEPS):
            stage = step % STAGES
            b_w = s_w.index(k)
            if TRANSPOSED:
                b_w = b_w.permute((1, 0))
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            b_acc = warpgroup_mma(s_x.index(stage), b_w, b_acc, use_acc=k > 0, is_async=True)
            b_acc = warpgroup_mma_wait(1, deps=[b_acc])
            # The products of the step before are done.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(order.index((INDEX + 1) % 2), count=1)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        matmul_finish(
            b_acc, b_other, b_scale, sums, own, d_out, d_extra, d_small, s_out.index(INDEX), s_small.index(INDEX),
            extra_full.index(INDEX), extra_empty.index(INDEX), turn, tile * ROWS, n_first, M, EPILOGUE, HALF,
        )  # fmt: skip
        turn += 1  # noqa: SIM113 - Triton has no enumerate
    tma.store_wait(0)


@gluon.jit
def matmul_resident_kernel(
    d_x, d_w, d_out, d_extra, d_small, beside, own, M, N, tiles_m, tiles_n, ranges,
    EPILOGUE: gl.constexpr, HALF: gl.constexpr, TRANSPOSED: gl.constexpr, STEPS: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_x.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    if TRANSPOSED:
        s_w = gl.allocate_shared_memory(dtype, [STEPS, BLOCK_N, BLOCK_K], d_w.layout)
    else:
        s_w = gl.allocate_shared_memory(dtype, [STEPS, BLOCK_K, BLOCK_N], d_w.layout)
    s_x = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], d_x.layout)
    s_out = s_x  # as good as any where nothing is written
    if d_out is not None:
        s_out = gl.allocate_shared_memory(d_out.dtype, [2, ROWS, BLOCK_N], d_out.layout)
    s_small = s_out  # as good as any where there is none
    if d_small is not None:
        s_small = gl.allocate_shared_memory(d_small.dtype, [2, ROWS, BLOCK_N], d_small.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    extra_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    extra_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(w_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(extra_full.index(i), count=1)
        mbarrier.init(extra_empty.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()
    buffers = (s_x, s_w, s_out, s_small)
    barriers = (w_full, full, empty, extra_full, extra_empty, order)
    gl.warp_specialize(
        [
            (resident_consume, (d_out, d_extra, d_small, buffers, barriers, beside, own, M, N, tiles_m, tiles_n,
                                ranges, 0, EPILOGUE, HALF, TRANSPOSED, STEPS, BLOCK_N, STAGES)),
            (resident_consume, (d_out, d_extra, d_small, buffers, barriers, beside, own, M, N, tiles_m, tiles_n,
                                ranges, 1, EPILOGUE, HALF, TRANSPOSED, STEPS, BLOCK_N, STAGES)),
            (resident_produce, (d_x, d_w, buffers, barriers, tiles_m, tiles_n, ranges,
                                TRANSPOSED, STEPS, BLOCK_N, BLOCK_K, STAGES)),
            (resident_fetch, (d_extra, buffers, barriers, tiles_m, tiles_n, ranges, BLOCK_N)),
        ],
        [4, 1, 1],
        [REGISTERS, 40, 40],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- streaming
@gluon.jit
def streaming_produce(
    d_x, d_w, buffers, barriers, tiles, tiles_n, steps,
    TRANSPOSED: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_x, s_w, _s_out, _s_small = buffers
    full, empty, _extra_full, _extra_empty = barriers
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m_first = tile // tiles_n * (2 * ROWS)
        n_first = tile % tiles_n * BLOCK_N
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), d_x.block_type.nbytes + d_w.block_type.nbytes)
            tma.async_copy_global_to_shared(d_x, [m_first, k * BLOCK_K], full.index(stage), s_x.index(stage))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(d_w, [n_first, k * BLOCK_K], full.index(stage), s_w.index(stage))
            else:
                tma.async_copy_global_to_shared(d_w, [k * BLOCK_K, n_first], full.index(stage), s_w.index(stage))
            step += 1


@gluon.jit
def streaming_fetch(d_extra, buffers, barriers, tiles, tiles_n, BLOCK_N: gl.constexpr):
    _s_x, _s_w, s_out, _s_small = buffers
    _full, _empty, extra_full, extra_empty = barriers
    turn = 0
    if d_extra is not None:
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            m_first = tile // tiles_n * (2 * ROWS)
            n_first = tile % tiles_n * BLOCK_N
            for i in gl.static_range(2):
                mbarrier.wait(extra_empty.index(i), (turn & 1) ^ 1)
                mbarrier.expect(extra_full.index(i), ROWS * BLOCK_N * 2)
                tma.async_copy_global_to_shared(
                    d_extra, [m_first + i * ROWS, n_first], extra_full.index(i), s_out.index(i)
                )
            turn += 1


@gluon.jit
def streaming_consume(
    d_out, d_extra, d_small, buffers, barriers, beside, M, N, tiles, tiles_n, steps,
    INDEX: gl.constexpr, EPILOGUE: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_x, s_w, s_out, s_small = buffers
    full, empty, extra_full, extra_empty = barriers
    other, row_scale, column_scale, sums = beside
    # An instruction takes 32 bytes of a row of x.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 256 // s_x.dtype.primitive_bitwidth])
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m_first = tile // tiles_n * (2 * ROWS) + INDEX * ROWS
        n_first = tile % tiles_n * BLOCK_N
        # Asked for before the products, so that it is there behind them.
        b_other, b_scale = None, None
        if other is not None:
            b_other = load_other(other, m_first, n_first, M, N, layout)
        if row_scale is not None:
            b_scale = load_scale(row_scale, m_first, M, layout)
        if column_scale is not None:
            b_scale = load_column_scale(column_scale, n_first, N, layout)
        # [ROWS, BLOCK_N]
        b_acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        for k in range(steps):
            stage = step % STAGES
            b_x = s_x.index(stage).slice(INDEX * ROWS, ROWS, 0)
            b_w = s_w.index(stage)
            if TRANSPOSED:
                b_w = b_w.permute((1, 0))
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            b_acc = warpgroup_mma(b_x, b_w, b_acc, use_acc=k > 0, is_async=True)
            b_acc = warpgroup_mma_wait(1, deps=[b_acc])
            # The products of the step before are done.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        matmul_finish(
            b_acc, b_other, b_scale, sums, None, d_out, d_extra, d_small, s_out.index(INDEX), s_small.index(INDEX),
            extra_full.index(INDEX), extra_empty.index(INDEX), turn, m_first, n_first, M, EPILOGUE, 0,
        )  # fmt: skip
        turn += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def matmul_streaming_kernel(
    d_x, d_w, d_out, d_extra, d_small, beside, M, N, tiles, tiles_n, steps,
    EPILOGUE: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_x.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    s_x = gl.allocate_shared_memory(dtype, [STAGES, 2 * ROWS, BLOCK_K], d_x.layout)
    if TRANSPOSED:
        s_w = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], d_w.layout)
    else:
        s_w = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], d_w.layout)
    s_out = gl.allocate_shared_memory(d_out.dtype, [2, ROWS, BLOCK_N], d_out.layout)
    s_small = s_out  # as good as any where there is none
    if d_small is not None:
        s_small = gl.allocate_shared_memory(d_small.dtype, [2, ROWS, BLOCK_N], d_small.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    extra_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    extra_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(extra_full.index(i), count=1)
        mbarrier.init(extra_empty.index(i), count=1)
    fence_async_shared()
    buffers = (s_x, s_w, s_out, s_small)
    barriers = (full, empty, extra_full, extra_empty)
    gl.warp_specialize(
        [
            (streaming_consume, (d_out, d_extra, d_small, buffers, barriers, beside, M, N, tiles, tiles_n, steps,
                                 0, EPILOGUE, TRANSPOSED, BLOCK_N, STAGES)),
            (streaming_consume, (d_out, d_extra, d_small, buffers, barriers, beside, M, N, tiles, tiles_n, steps,
                                 1, EPILOGUE, TRANSPOSED, BLOCK_N, STAGES)),
            (streaming_produce, (d_x, d_w, buffers, barriers, tiles, tiles_n, steps,
                                 TRANSPOSED, BLOCK_N, BLOCK_K, STAGES)),
            (streaming_fetch, (d_extra, buffers, barriers, tiles, tiles_n, BLOCK_N)),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- launching
def _blocks(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Copies of (rows, columns) of a matrix; what lies outside it reads as zero and is not written."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def copyable(*tensors: torch.Tensor | None) -> bool:
    """Whether TMA can address these matrices: 16-byte bases and rows."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors if x is not None)


def _bind(device: torch.device) -> None:
    """Descriptors cannot be made in a thread (autograd's, say) that has not yet used its device: any kernel will do."""
    if getattr(_thread, "device", None) != device:
        torch.zeros(1, device=device)
        _thread.device = device


def fits(inner: int, config: dict) -> bool:
    """Whether shared memory holds a slice of w: 128 KB of it, beside the tiles of x and of the result."""
    return inner * config["BLOCK_N"] <= 2**16


def launch(
    x, w, out, extra, beside: tuple, epilogue: str, transposed: bool, configs: dict, processors: int,
    own=None, half=0, small=None,
) -> None:  # fmt: skip
    """beside: `other`, `row_scale` and `column_scale`, which the epilogue reads, and the `sums` that it writes, each or
    None. own: what only the epilogues "heads", "exclusive" and "softcap" take; they are of resident products alone.
    small: an e4m3 copy of `out`, to be written, or None. out: None where sums are all that is wanted."""
    _bind(x.device)
    (rows, inner), columns = x.shape, w.shape[0 if transposed else 1]
    resident = fits(inner, configs["resident"])
    config = configs[("resident" if resident else "streaming") + ("_fp8" if x.element_size() == 1 else "")]
    block_n, block_k = config["BLOCK_N"], config["BLOCK_K"]
    tiles_n, steps = triton.cdiv(columns, block_n), triton.cdiv(inner, block_k)
    w_blocks = _blocks(w, block_n, block_k) if transposed else _blocks(w, block_k, block_n)
    written = [None if y is None else _blocks(y, 64, block_n) for y in (out, extra, small)]
    options = {"EPILOGUE": epilogue, "TRANSPOSED": transposed, **config}
    if resident:
        tiles_m = triton.cdiv(rows, 64)
        ranges = min(max(processors // tiles_n, 1), tiles_m)
        matmul_resident_kernel[(tiles_n * ranges,)](
            _blocks(x, 64, block_k), w_blocks, *written, beside, own,
            rows, columns, tiles_m, tiles_n, ranges, HALF=half, STEPS=steps, **options,
        )  # fmt: skip
        return
    tiles = triton.cdiv(rows, 128) * tiles_n
    matmul_streaming_kernel[(min(tiles, processors),)](
        _blocks(x, 128, block_k), w_blocks, *written, beside,
        rows, columns, tiles, tiles_n, steps, **options,
    )  # fmt: skip
