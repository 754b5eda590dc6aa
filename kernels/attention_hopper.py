"""The kernels of `attention.py` for Hopper (compute capability 9.0): Gluon, warp-specialised, TMA and wgmma.

Both directions are persistent: each program claims tiles from a counter until none is left. One producer warp claims
and copies; the other warpgroups compute, and overlap because each is at another point of its own work.

Forward: two consumer warpgroups, each with 64 query rows of one head (of two heads of one KV group where the group is
even). For D = 64 two programs share a processor, so that one computes while the other starts or ends a tile; four
consumers in one program are slower. There p V is finished before the next scores begin: in flight together they want
more registers than two programs leave, and ptxas then waits for every single instruction.

Backward: a program owns 128 keys of one KV head and walks the query tiles of its group's heads. Each of two consumer
warpgroups owns 64 keys: scores and dP are transposed, so that p and dS feed the products for grad_v and grad_k from
registers. For D = 64 a third takes dS through shared memory and adds dS K to a float32 buffer of grad_q with vector
reductions, whose order is not fixed; `finish` rounds it, or in a training step `rotary.py`, behind the head norms. The
producers of earlier tiles have set it to zero, which costs no time of its own; of the first `ahead` KV heads it is zero
from before. For D = 128 the two need the third's registers: each adds half the dimensions of grad_q, to zeros from
before. Five products a tile pair; the deterministic path of `attention.py` needs seven.
"""

import math

import torch
import triton
import triton.language as tl
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

from kernels.reference import NORM_FLOOR

ROWS = gl.constexpr(64)  # rows of one warpgroup's wgmma
FLOOR = gl.constexpr(NORM_FLOOR)
LN2 = gl.constexpr(math.log(2))
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name since Triton 3.7
PIECE = gl.constexpr(2048)  # numbers that a producer, one warp, sets to zero at once
# PTX, lane and all: of a Gluon store ptxas keeps parts in registers, of which the producer has 24, and spills others.
ZERO = gl.constexpr(
    "{ .reg .b32 lane, zero; .reg .b64 to; mov.b32 zero, 0; mov.b32 lane, %laneid; mad.wide.u32 to, lane, 16, $1;\n"
    + "".join(f"st.global.v4.b32 [to + {4 * i}], {{zero, zero, zero, zero}};\n" for i in range(0, PIECE.value, 128))
    + "mov.b32 $0, 0; }"
)


@gluon.jit
def publish(s_tile, tile_full, tile_empty, turn, high, low, more, most):
    """Producer: hand the next tile to the other partitions, as four integers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = turn % 2
    mbarrier.wait(tile_empty.index(slot), ((turn // 2) & 1) ^ 1)
    s_tile.index(slot * 2).store(gl.full([1], (high.to(gl.int64) << 32) | low, gl.int64, layout))
    s_tile.index(slot * 2 + 1).store(gl.full([1], (most.to(gl.int64) << 32) | more, gl.int64, layout))
    mbarrier.arrive(tile_full.index(slot), count=1)


@gluon.jit
def receive(s_tile, tile_full, tile_empty, turn):
    """The four integers of the next tile."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = turn % 2
    mbarrier.wait(tile_full.index(slot), (turn // 2) & 1)
    first = gl.max(s_tile.index(slot * 2).load(layout), 0)
    second = gl.max(s_tile.index(slot * 2 + 1).load(layout), 0)
    mbarrier.arrive(tile_empty.index(slot), count=1)
    return (first >> 32).to(gl.int32), first.to(gl.int32), second.to(gl.int32), (second >> 32).to(gl.int32)


@gluon.jit
def attention_fwd_produce(
    d_q, d_k, d_v, d_own, d_starts, document_starts, counter, buffers, barriers, T, H, heads, chunk, tiles,
    GROUP: gl.constexpr, HEADS: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """Take tiles from the shared counter, longest rows first within a chunk of heads, whose keys and values stay in the
    L2 cache; tell the consumers the batch (-1 after the last tile), first head, first row and first key tile; copy.

    The keys of the first key tile come with the queries; then each stage holds the values of one key tile and the keys
    of the next, which are multiplied one after the other."""
    q_full, q_empty, kv_full, kv_empty, own_full, own_empty, tile_full, tile_empty = barriers
    s_q, s_first, s_own, s_k, s_v, _s_out, s_starts, s_tile = buffers
    TILE_M: gl.constexpr = ROWS * CONSUMERS // HEADS
    step = 0
    turn = 0
    tiles_m = gl.cdiv(T, TILE_M)
    tile = gl.program_id(0)
    while tile < tiles:
        first = (tile // (chunk * tiles_m)) * chunk
        width = gl.minimum(chunk, heads // HEADS - first)
        rest = tile % (chunk * tiles_m)
        head = (first + rest % width) * HEADS
        batch = head // H
        head = head % H
        m_first = (tiles_m - 1 - rest // width) * TILE_M
        start = 0
        if DOCUMENTS:
            start = gl.load(document_starts + batch.to(gl.int64) * T + m_first) // BLOCK_N
        publish(s_tile, tile_full, tile_empty, turn, batch, head, m_first, start)
        end = gl.cdiv(gl.minimum(m_first + TILE_M, T), BLOCK_N)
        kv_head = head // GROUP
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, (CONSUMERS * ROWS + BLOCK_N) * D * 2 + (TILE_M * 4 if DOCUMENTS else 0))
        tma.async_copy_global_to_shared(d_k, [batch, (end - 1) * BLOCK_N, kv_head, 0], q_full, s_first)
        if DOCUMENTS:
            for i in gl.static_range(TILE_M // ROWS):
                tma.async_copy_global_to_shared(d_starts, [batch * T + m_first + i * ROWS], q_full, s_starts.index(i))
        for i in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                d_q, [batch, m_first + (i // HEADS) * ROWS, head + i % HEADS, 0], q_full, s_q.index(i)
            )
        for n in range(end - 1, start - 1, -1):
            stage = step % STAGES
            mbarrier.wait(kv_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            more = n > start
            mbarrier.expect(kv_full.index(stage), 2 * BLOCK_N * D * 2, pred=more)
            mbarrier.expect(kv_full.index(stage), BLOCK_N * D * 2, pred=n == start)
            tma.async_copy_global_to_shared(
                d_v, [batch, n * BLOCK_N, kv_head, 0], kv_full.index(stage), s_v.index(stage)
            )
            tma.async_copy_global_to_shared(
                d_k, [batch, (n - 1) * BLOCK_N, kv_head, 0], kv_full.index(stage), s_k.index(stage), pred=more
            )
            step += 1
        # The queries' own values, for XSA.
        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        mbarrier.expect(own_full, CONSUMERS // HEADS * ROWS * D * 2)
        for i in gl.static_range(CONSUMERS // HEADS):
            tma.async_copy_global_to_shared(d_own, [batch, m_first + i * ROWS, kv_head, 0], own_full, s_own.index(i))
        turn += 1
        # Claimed only now, so that no program holds a tile that an idle one could take.
        tile = gl.atomic_add(counter, 1) + gl.num_programs(0)
    publish(s_tile, tile_full, tile_empty, turn, gl.to_tensor(-1), 0, 0, gl.to_tensor(0))


@gluon.jit
def attention_fwd_mask(
    b_s, o_m, b_start, row, whole, n, BLOCK_N: gl.constexpr, DOCUMENTS: gl.constexpr, layout: gl.constexpr
):
    """Hide the keys after each query and before its document, in the tiles that hold any."""
    partial = n * BLOCK_N + BLOCK_N - 1 > row
    if DOCUMENTS:
        partial = partial | (n < whole)
    if partial:
        o_n = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        m_s = o_n[None, :] <= o_m[:, None]
        if DOCUMENTS:
            m_s = m_s & (o_n[None, :] >= b_start[:, None])
        b_s = gl.where(m_s, b_s, float("-inf"))
    return b_s


@gluon.jit
def attention_fwd_consume(
    d_out, buffers, barriers, p_s, p_lse, T, T_PAD, H, scale_log2,
    INDEX: gl.constexpr, HEADS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, kv_full, kv_empty, own_full, own_empty, tile_full, tile_empty = barriers
    s_q, s_first, s_own, s_k, s_v, s_out, s_starts, s_tile = buffers
    TILE_M: gl.constexpr = ROWS * CONSUMERS // HEADS
    dtype: gl.constexpr = s_q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_operand: gl.constexpr = gl.DotOperandLayout(0, y_layout, 2)
    s_one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    step = 0
    turn = 0
    batch, head, m_first, start = receive(s_tile, tile_full, tile_empty, turn)
    while batch >= 0:
        end = gl.cdiv(gl.minimum(m_first + TILE_M, T), BLOCK_N)
        head += INDEX % HEADS
        row = m_first + (INDEX // HEADS) * ROWS
        o_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        mbarrier.wait(q_full, turn & 1)
        b_q = s_q.index(INDEX).reshape([ROWS, D])
        b_start = o_m
        whole = 0
        if DOCUMENTS:
            b_start = s_starts.index(INDEX // HEADS).load(gl.SliceLayout(1, s_layout))
            # Starts do not decrease: from the last row's on, every row of the tile sees whole key tiles.
            last = gl.max(s_starts.index(INDEX // HEADS).slice(ROWS - 1, 1).load(s_one), 0)
            whole = gl.cdiv(last, BLOCK_N)
            if row + ROWS > T:
                whole = end

        # [ROWS, BLOCK_N]
        b_s = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        b_s = warpgroup_mma(b_q, s_first.reshape([BLOCK_N, D]).permute((1, 0)), b_s, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        # Finite, for rows to which a whole tile is hidden.
        b_max = gl.full([ROWS], -1.0e30, gl.float32, gl.SliceLayout(1, s_layout))
        # A thread holds two columns of every eight of a row: sums of those here, over threads after the last tile.
        b_sum = gl.sum(gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout).reshape([ROWS, BLOCK_N // 8, 8]), 1)
        sum_layout: gl.constexpr = b_sum.type.layout
        b_acc = gl.zeros([ROWS, D], gl.float32, y_layout)
        for n in range(end - 1, start - 1, -1):
            stage = step % STAGES
            b_s = attention_fwd_mask(b_s, o_m, b_start, row, whole, n, BLOCK_N, DOCUMENTS, s_layout)
            b_new = gl.maximum(b_max, gl.max(b_s, 1))
            b_alpha = gl.exp2((b_max - b_new) * scale_log2)
            b_p = gl.exp2(b_s * scale_log2 - (b_new * scale_log2)[:, None])
            b_sum = b_sum * gl.convert_layout(b_alpha, gl.SliceLayout(1, sum_layout))[:, None]
            b_sum += gl.sum(b_p.reshape([ROWS, BLOCK_N // 8, 8]), 1)
            b_max = b_new
            b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, y_layout))[:, None]
            b_pc = gl.convert_layout(b_p.to(dtype), p_operand)
            mbarrier.wait(kv_full.index(stage), (step // STAGES) & 1)
            b_acc = warpgroup_mma(b_pc, s_v.index(stage).reshape([BLOCK_N, D]), b_acc, is_async=True)
            if D == 64:
                b_acc, b_pc = warpgroup_mma_wait(0, deps=[b_acc, b_pc])
            # The next scores; after the last key tile they are made of whatever is there and not used.
            b_s = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
            b_k = s_k.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
            b_s = warpgroup_mma(b_q, b_k, b_s, use_acc=False, is_async=True)
            b_acc, b_s, b_pc = warpgroup_mma_wait(0, deps=[b_acc, b_s, b_pc])
            mbarrier.arrive(kv_empty.index(stage), count=1)
            step += 1
        mbarrier.arrive(q_empty, count=1)
        b_sum = gl.convert_layout(gl.sum(b_sum, 1), gl.SliceLayout(1, s_layout))

        # XSA: take out of y its part along the token's own value.
        mbarrier.wait(own_full, turn & 1)
        b_v = s_own.index(INDEX // HEADS).reshape([ROWS, D]).load(y_layout).to(gl.float32)
        mbarrier.arrive(own_empty, count=1)
        b_v = b_v * (1.0 / gl.maximum(gl.sqrt(gl.sum(b_v * b_v, 1)), FLOOR))[:, None]
        b_acc = b_acc * gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, y_layout))[:, None]
        b_dot = gl.sum(b_acc * b_v, 1)
        b_z = (b_acc - b_dot[:, None] * b_v).to(dtype)
        tma.store_wait(0)
        s_out.index(INDEX).reshape([ROWS, D]).store(b_z)
        fence_async_shared()
        tma.async_copy_shared_to_global(d_out, [batch, row, head, 0], s_out.index(INDEX))
        p_row = (batch * H + head).to(gl.int64) * T_PAD
        o_y = row + gl.arange(0, ROWS, gl.SliceLayout(1, y_layout))
        gl.store(p_s + p_row + o_y, b_dot, mask=o_y < T_PAD)
        gl.store(p_lse + p_row + o_m, b_max * scale_log2 + gl.log2(b_sum), mask=o_m < T_PAD)
        turn += 1
        batch, head, m_first, start = receive(s_tile, tile_full, tile_empty, turn)
    tma.store_wait(0)


@gluon.jit
def attention_fwd_hopper_kernel(
    d_q, d_k, d_v, d_own, d_out, d_starts, document_starts, s, lse, counter,
    T, T_PAD, H, heads, chunk, tiles, scale_log2,
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = 2
    dtype: gl.constexpr = d_q.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    s_q = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, ROWS, 1, D], d_q.layout)
    s_first = gl.allocate_shared_memory(dtype, [1, BLOCK_N, 1, D], d_k.layout)
    s_own = gl.allocate_shared_memory(dtype, [CONSUMERS // HEADS, 1, ROWS, 1, D], d_own.layout)
    s_out = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, ROWS, 1, D], d_out.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], d_v.layout)
    s_tile = gl.allocate_shared_memory(gl.int64, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_starts = s_tile
    if DOCUMENTS:
        s_starts = gl.allocate_shared_memory(gl.int32, [CONSUMERS // HEADS, ROWS], d_starts.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    own_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    own_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    mbarrier.init(own_full, count=1)
    mbarrier.init(own_empty, count=CONSUMERS)
    buffers = (s_q, s_first, s_own, s_k, s_v, s_out, s_starts, s_tile)
    barriers = (q_full, q_empty, kv_full, kv_empty, own_full, own_empty, tile_full, tile_empty)
    fence_async_shared()
    gl.warp_specialize(
        [
            (attention_fwd_consume, (d_out, buffers, barriers, s, lse, T, T_PAD, H, scale_log2,
                                     0, HEADS, CONSUMERS, BLOCK_N, D, STAGES, DOCUMENTS)),
            (attention_fwd_consume, (d_out, buffers, barriers, s, lse, T, T_PAD, H, scale_log2,
                                     1, HEADS, CONSUMERS, BLOCK_N, D, STAGES, DOCUMENTS)),
            (attention_fwd_produce, (d_q, d_k, d_v, d_own, d_starts, document_starts, counter, buffers, barriers,
                                     T, H, heads, chunk, tiles,
                                     GROUP, HEADS, CONSUMERS, BLOCK_N, D, STAGES, DOCUMENTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def attention_bwd_place(tile, tiles_n, kv_heads, chunk):
    """Tile number -> KV head, of those of all rows, and tile of keys: most work first within a chunk of heads."""
    first = (tile // (chunk * tiles_n)) * chunk
    width = gl.minimum(chunk, kv_heads - first)
    rest = tile % (chunk * tiles_n)
    return first + rest % width, rest // width


@gluon.jit
def attention_bwd_zero(p_gq, piece):
    p_piece = (p_gq + piece.to(gl.int64) * PIECE).to(gl.int64)
    gl.inline_asm_elementwise(ZERO, "=r,l", [p_piece], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def attention_bwd_produce(
    d_q, d_k, d_v, d_gy, d_lse, d_delta, d_starts, document_ends, p_gq, counter, buffers, barriers,
    T, T_PAD, H, G, kv_heads, chunk, ahead, tiles,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """Take tiles from the shared counter; tell the other partitions the batch (-1 after the last tile), KV head, first
    key and end of the query tiles; copy.

    Where `ahead` is given, the sums of grad_q of all but the first `ahead` KV heads hold anything on entry. Each tile,
    in between its copies, sets to zero a share of those of the KV head `ahead` behind its own and, at its end, counts
    the share in that head's counter, behind the counter of tiles. A tile waits until all shares of its head are
    counted: only for tiles taken before it, by programs that run, and so long before that there is hardly ever anything
    to wait for. Its publishing passes on to the other partitions what it has seen."""
    s_q, s_gy, s_lse, s_delta, s_starts, s_k, s_v, _s_ds, s_tile = buffers
    q_full, q_empty, gy_full, gy_empty, kv_full, kv_empty, _ds_full, _ds_empty, tile_full, tile_empty = barriers
    step = 0
    turn = 0
    tiles_n = gl.cdiv(T, 2 * ROWS)
    blocks = gl.cdiv(T, ROWS)
    pieces = GROUP * blocks * (ROWS * D // PIECE)  # of the sums of one KV head
    share = gl.cdiv(pieces, tiles_n)
    tile = gl.atomic_add(counter, 1, sem="relaxed")
    while tile < tiles:
        place, tile_n = attention_bwd_place(tile, tiles_n, kv_heads, chunk)
        batch = place // G
        kv_head = place % G
        n_first = tile_n * 2 * ROWS
        end = blocks
        if DOCUMENTS:
            last = (gl.minimum(n_first + 2 * ROWS, T) - 1) // ROWS
            end = gl.cdiv(gl.load(document_ends + (batch.to(gl.int64) * blocks + last) * 2 + 1), ROWS)
        if ahead is not None:  # noqa: SIM102 (a compile-time condition)
            if place >= ahead:
                done = gl.atomic_add(counter + 1 + place, 0, sem="acquire")
                while done < tiles_n:
                    done = gl.atomic_add(counter + 1 + place, 0, sem="acquire")
        publish(s_tile, tile_full, tile_empty, turn, batch, kv_head, n_first, end)
        if ahead is not None:
            later = tile + ahead * tiles_n
            piece = 0
            last_piece = 0
            if later < tiles:
                place, tile_n = attention_bwd_place(later, tiles_n, kv_heads, chunk)
                piece = place * pieces + tile_n * share
                last_piece = place * pieces + gl.minimum((tile_n + 1) * share, pieces)
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        mbarrier.expect(kv_full, 2 * 2 * ROWS * D * 2)
        tma.async_copy_global_to_shared(d_k, [batch, n_first, kv_head, 0], kv_full, s_k)
        tma.async_copy_global_to_shared(d_v, [batch, n_first, kv_head, 0], kv_full, s_v)
        turn += 1
        for i in range(GROUP):
            head = kv_head * GROUP + i
            row = (batch * H + head) * T_PAD
            for m in range(n_first // ROWS, end):
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(q_empty.index(stage), phase)
                mbarrier.expect(q_full.index(stage), ROWS * D * 2 + (ROWS * 8 if DOCUMENTS else ROWS * 4))
                if DOCUMENTS:
                    tma.async_copy_global_to_shared(
                        d_starts, [batch * T + m * ROWS], q_full.index(stage), s_starts.index(stage)
                    )
                tma.async_copy_global_to_shared(d_q, [batch, m * ROWS, head, 0], q_full.index(stage), s_q.index(stage))
                tma.async_copy_global_to_shared(d_lse, [row + m * ROWS], q_full.index(stage), s_lse.index(stage))
                mbarrier.wait(gy_empty.index(stage), phase)
                mbarrier.expect(gy_full.index(stage), ROWS * D * 2 + ROWS * 4)
                tma.async_copy_global_to_shared(
                    d_gy, [batch, m * ROWS, head, 0], gy_full.index(stage), s_gy.index(stage)
                )
                tma.async_copy_global_to_shared(d_delta, [row + m * ROWS], gy_full.index(stage), s_delta.index(stage))
                step += 1
                if ahead is not None:  # noqa: SIM102 (a compile-time condition)
                    if piece < last_piece:
                        attention_bwd_zero(p_gq, piece)
                        piece += 1
        if ahead is not None:
            for left in range(piece, last_piece):
                attention_bwd_zero(p_gq, left)
            if later < tiles:
                thread_barrier()
                gl.atomic_add(counter + 1 + attention_bwd_place(later, tiles_n, kv_heads, chunk)[0], 1, sem="release")
        # Claimed only now, so that no program holds a tile that an idle one could take.
        tile = gl.atomic_add(counter, 1, sem="relaxed")
    publish(s_tile, tile_full, tile_empty, turn, gl.to_tensor(-1), 0, 0, gl.to_tensor(0))


@gluon.jit
def attention_bwd_store(
    b_gk, b_gv, p_gk, p_gv, stride_grad_kv, row_scale, batch, kv_head, n_first, T, scale,
    dtype: gl.constexpr, D: gl.constexpr, g_layout: gl.constexpr,
):  # fmt: skip
    """Write grad_k and grad_v of one consumer's keys, the latter times the row's factor, if any."""
    o_n = n_first + gl.arange(0, ROWS, gl.SliceLayout(1, g_layout))
    o_d = gl.arange(0, D, gl.SliceLayout(0, g_layout))
    o_out = ((batch.to(gl.int64) * T + o_n) * stride_grad_kv + kv_head * D)[:, None] + o_d[None, :]
    m_n = (o_n < T)[:, None]
    gl.store(p_gk + o_out, (b_gk * scale).to(dtype), mask=m_n)
    # grad_v holds XSA's part.
    b_gv += gl.load(p_gv + o_out, mask=m_n, other=0.0).to(gl.float32)
    if row_scale is not None:
        b_gv *= gl.load(row_scale + batch.to(gl.int64) * T + o_n, mask=o_n < T, other=0.0)[:, None]
    gl.store(p_gv + o_out, b_gv.to(dtype), mask=m_n)


@gluon.jit
def attention_bwd_consume(
    buffers, barriers, p_gk, p_gv, stride_grad_kv, row_scale, T, scale, scale_log2,
    INDEX: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    DOCUMENTS: gl.constexpr,
):  # fmt: skip
    s_q, s_gy, s_lse, s_delta, s_starts, s_k, s_v, s_ds, s_tile = buffers
    q_full, q_empty, gy_full, gy_empty, kv_full, kv_empty, ds_full, ds_empty, tile_full, tile_empty = barriers
    dtype: gl.constexpr = s_q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, g_layout, 2)
    s_one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    b_k = s_k.reshape([2 * ROWS, D]).slice(INDEX * ROWS, ROWS, 0)
    b_v = s_v.reshape([2 * ROWS, D]).slice(INDEX * ROWS, ROWS, 0)
    step = 0
    turn = 0
    batch, kv_head, n_first, end = receive(s_tile, tile_full, tile_empty, turn)
    while batch >= 0:
        start = n_first // ROWS
        n_first += INDEX * ROWS
        mbarrier.wait(kv_full, turn & 1)
        b_gk = gl.zeros([ROWS, D], gl.float32, g_layout)
        b_gv = gl.zeros([ROWS, D], gl.float32, g_layout)
        # The scores of a tile are made ahead, under the dS of the tile before.
        mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1)
        b_s = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
        b_q = s_q.index(step % STAGES).reshape([ROWS, D])
        b_s = warpgroup_mma(b_k, b_q.permute((1, 0)), b_s, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        m = start
        last_step = step + GROUP * (end - start) - 1
        for _ in range(GROUP * (end - start)):
            stage = step % STAGES
            b_q = s_q.index(stage).reshape([ROWS, D])
            b_lse = s_lse.index(stage).load(gl.SliceLayout(0, s_layout))
            mbarrier.wait(gy_full.index(stage), (step // STAGES) & 1)
            b_gy = s_gy.index(stage).reshape([ROWS, D])
            # [ROWS keys, ROWS queries]
            b_dp = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
            b_dp = warpgroup_mma(b_v, b_gy.permute((1, 0)), b_dp, use_acc=False, is_async=True)
            b_p = gl.exp2(b_s * scale_log2 - b_lse[None, :])
            partial = m * ROWS < n_first + ROWS - 1
            if DOCUMENTS:
                last = gl.max(s_starts.index(stage).slice(ROWS - 1, 1).load(s_one), 0)
                partial = partial | (last > n_first) | ((m + 1) * ROWS > T)
            if partial:
                o_n = n_first + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
                o_m = m * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
                m_p = o_n[:, None] <= o_m[None, :]
                if DOCUMENTS:
                    b_start = s_starts.index(stage).load(gl.SliceLayout(0, s_layout))
                    m_p = m_p & (o_n[:, None] >= b_start[None, :])
                b_p = gl.where(m_p, b_p, 0.0)
            b_delta = s_delta.index(stage).load(gl.SliceLayout(0, s_layout))
            b_dp, b_p = warpgroup_mma_wait(0, deps=[b_dp, b_p])
            b_pc = gl.convert_layout(b_p.to(dtype), operand)
            b_gv = warpgroup_mma(b_pc, b_gy, b_gv, is_async=True)
            next_stage = (step + 1) % STAGES
            mbarrier.wait(q_full.index(next_stage), ((step + 1) // STAGES) & 1, pred=step < last_step)
            b_s = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
            b_next = s_q.index(next_stage).reshape([ROWS, D])
            b_s = warpgroup_mma(b_k, b_next.permute((1, 0)), b_s, use_acc=False, is_async=True)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)
            slot = step % SLOTS
            mbarrier.wait(ds_empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            s_ds.index(slot).slice(INDEX * ROWS, ROWS, 0).store(b_ds)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(slot), count=1)
            b_dsc = gl.convert_layout(b_ds, operand)
            b_gk = warpgroup_mma(b_dsc, b_q, b_gk, is_async=True)
            b_gv, b_s, b_pc = warpgroup_mma_wait(1, deps=[b_gv, b_s, b_pc])
            mbarrier.arrive(gy_empty.index(stage), count=1)
            b_gk, b_dsc = warpgroup_mma_wait(0, deps=[b_gk, b_dsc])
            mbarrier.arrive(q_empty.index(stage), count=1)
            step += 1
            m = gl.where(m + 1 == end, start, m + 1)
        mbarrier.arrive(kv_empty, count=1)
        turn += 1

        attention_bwd_store(
            b_gk, b_gv, p_gk, p_gv, stride_grad_kv, row_scale, batch, kv_head, n_first, T, scale, dtype, D, g_layout
        )
        batch, kv_head, n_first, end = receive(s_tile, tile_full, tile_empty, turn)


@gluon.jit
def attention_bwd_add(p_tile, b_gq):
    """Add accumulators [dimensions, ROWS queries] to a tile of the sums of grad_q, kept in their order."""
    layout: gl.constexpr = b_gq.type.layout
    # A thread's accumulators of rows r, r + 8 and columns c, c + 1 are four neighbours in memory, a warp's 512 bytes.
    o_d = gl.arange(0, b_gq.shape[0], gl.SliceLayout(1, layout))[:, None]
    o_m = gl.arange(0, ROWS, gl.SliceLayout(0, layout))[None, :]
    o_gq = (((o_d // 16) * (ROWS // 8) + o_m // 8) * 32 + (o_d % 8) * 4 + (o_m % 8) // 2) * 4
    gl.inline_asm_elementwise(
        """
        {
        red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        }
        """,
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
        [(p_tile + o_gq).to(gl.int64), b_gq],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def attention_bwd_start(s_row, factor, layout: gl.constexpr):
    """A number of each query, times `factor`: what a product [ROWS keys, ROWS queries] begins its sums with."""
    b_row = s_row.load(gl.SliceLayout(0, layout)) * factor
    return gl.broadcast(b_row[None, :], gl.zeros([ROWS, ROWS], gl.float32, layout))[0]


@gluon.jit
def attention_bwd_keys(s_k, step):
    """The keys of the tile, at an address that is not known before the loop: descriptors made there take 14 registers,
    which spill."""
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [step], dtype=gl.int32, is_pure=False, pack=1)
    b_k = s_k.reshape([2 * ROWS, s_k.shape[3]])
    return b_k._reinterpret(b_k.dtype, [1, 2 * ROWS, s_k.shape[3]], b_k.layout).index(zero)


@gluon.jit
def attention_bwd_consume_wide(
    buffers, barriers, p_gq, p_gk, p_gv, stride_grad_kv, row_scale, T, H, scale_log2,
    INDEX: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """D = 128: grad_k and grad_v of 64 keys, and half the dimensions of grad_q of all 128.

    grad_k and grad_v fill 128 registers of a thread, scores and dP 64 of the other 112: so lse and delta are what those
    products start from, dS feeds grad_k from shared memory, and grad_q is summed where dP was."""
    s_q, s_gy, s_lse, s_delta, s_starts, s_k, s_v, s_ds, s_tile = buffers
    q_full, q_empty, gy_full, gy_empty, kv_full, kv_empty, ds_full, ds_empty, tile_full, tile_empty = barriers
    dtype: gl.constexpr = s_q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, g_layout, 2)
    s_one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    b_k = s_k.reshape([2 * ROWS, D]).slice(INDEX * ROWS, ROWS, 0)
    b_v = s_v.reshape([2 * ROWS, D]).slice(INDEX * ROWS, ROWS, 0)
    # [dimensions, keys]
    b_kt = s_k.reshape([2 * ROWS, D]).slice(INDEX * (D // 2), D // 2, 1).permute((1, 0))
    blocks = gl.cdiv(T, ROWS)
    step = 0
    turn = 0
    batch, kv_head, n_first, end = receive(s_tile, tile_full, tile_empty, turn)
    while batch >= 0:
        start = n_first // ROWS
        n_first += INDEX * ROWS
        mbarrier.wait(kv_full, turn & 1)
        b_gk = gl.zeros([ROWS, D], gl.float32, g_layout)
        b_gv = gl.zeros([ROWS, D], gl.float32, g_layout)
        mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1)
        b_q = s_q.index(step % STAGES).reshape([ROWS, D])
        b_s = attention_bwd_start(s_lse.index(step % STAGES), -1.0 / scale_log2, s_layout)
        b_s = warpgroup_mma(b_k, b_q.permute((1, 0)), b_s, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        m = start
        tile = (batch * H + kv_head * GROUP) * blocks + start
        for left in range(GROUP * (end - start), 0, -1):
            stage = step % STAGES
            slot = step % SLOTS
            mbarrier.wait(gy_full.index(stage), (step // STAGES) & 1)
            b_gy = s_gy.index(stage).reshape([ROWS, D])
            # [ROWS keys, ROWS queries]
            b_dp = attention_bwd_start(s_delta.index(stage), -1.0, s_layout)
            b_dp = warpgroup_mma(b_v, b_gy.permute((1, 0)), b_dp, is_async=True)
            b_p = gl.exp2(b_s * scale_log2)
            partial = m * ROWS < n_first + ROWS - 1
            if DOCUMENTS:
                last = gl.max(s_starts.index(stage).slice(ROWS - 1, 1).load(s_one), 0)
                partial = partial | (last > n_first) | ((m + 1) * ROWS > T)
            if partial:
                o_n = n_first + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
                o_m = m * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
                m_p = o_n[:, None] <= o_m[None, :]
                if DOCUMENTS:
                    b_start = s_starts.index(stage).load(gl.SliceLayout(0, s_layout))
                    m_p = m_p & (o_n[:, None] >= b_start[None, :])
                b_p = gl.where(m_p, b_p, 0.0)
            b_dp, b_p = warpgroup_mma_wait(0, deps=[b_dp, b_p])
            b_pc = gl.convert_layout(b_p.to(dtype), operand)
            b_ds = (b_p * b_dp).to(dtype)
            mbarrier.wait(ds_empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            b_own = s_ds.index(slot).slice(INDEX * ROWS, ROWS, 0)
            b_own.store(b_ds)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(slot), count=1)

            b_gv = warpgroup_mma(b_pc, b_gy, b_gv, is_async=True)
            next_stage = (step + 1) % STAGES
            mbarrier.wait(q_full.index(next_stage), ((step + 1) // STAGES) & 1, pred=left > 1)
            # The next scores, under this tile's other products.
            b_s = attention_bwd_start(s_lse.index(next_stage), -1.0 / scale_log2, s_layout)
            b_next = s_q.index(next_stage).reshape([ROWS, D])
            b_again = attention_bwd_keys(s_k, step).slice(INDEX * ROWS, ROWS, 0)
            b_s = warpgroup_mma(b_again, b_next.permute((1, 0)), b_s, is_async=True)
            b_gv, b_pc = warpgroup_mma_wait(1, deps=[b_gv, b_pc])
            mbarrier.arrive(gy_empty.index(stage), count=1)
            # The other's dS too. [dimensions, queries]
            mbarrier.wait(ds_full.index(slot), (step // SLOTS) & 1)
            b_gq = gl.zeros([D // 2, ROWS], gl.float32, s_layout)
            b_gq = warpgroup_mma(b_kt, s_ds.index(slot), b_gq, use_acc=False, is_async=True)
            b_gk = warpgroup_mma(b_own, s_q.index(stage).reshape([ROWS, D]), b_gk, is_async=True)
            b_gq, b_s = warpgroup_mma_wait(1, deps=[b_gq, b_s])
            mbarrier.arrive(ds_empty.index(slot), count=1)
            attention_bwd_add(p_gq + tile.to(gl.int64) * (ROWS * D) + INDEX * (D // 2 * ROWS), b_gq)
            b_gk = warpgroup_mma_wait(0, deps=[b_gk])
            mbarrier.arrive(q_empty.index(stage), count=1)
            step += 1
            tile += gl.where(m + 1 == end, blocks - end + start + 1, 1)
            m = gl.where(m + 1 == end, start, m + 1)
        mbarrier.arrive(kv_empty, count=1)
        turn += 1
        attention_bwd_store(
            b_gk, b_gv, p_gk, p_gv, stride_grad_kv, row_scale, batch, kv_head, n_first, T, scale_log2 * LN2,
            dtype, D, g_layout,
        )  # fmt: skip
        batch, kv_head, n_first, end = receive(s_tile, tile_full, tile_empty, turn)


@gluon.jit
def attention_bwd_add_dq(
    buffers, barriers, p_gq, T, H,
    GROUP: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    _s_q, _s_gy, _s_lse, _s_delta, _s_starts, s_k, _s_v, s_ds, s_tile = buffers
    _q_full, _q_empty, _gy_full, _gy_empty, kv_full, kv_empty, ds_full, ds_empty, tile_full, tile_empty = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    step = 0
    turn = 0
    batch, kv_head, n_first, end = receive(s_tile, tile_full, tile_empty, turn)
    while batch >= 0:
        start = n_first // ROWS
        mbarrier.wait(kv_full, turn & 1)
        # [D, keys]
        b_k = s_k.reshape([2 * ROWS, D]).permute((1, 0)).load(gl.DotOperandLayout(0, layout, 2))
        mbarrier.arrive(kv_empty, count=1)
        turn += 1
        for i in range(GROUP):
            row = (batch * H + kv_head * GROUP + i).to(gl.int64) * gl.cdiv(T, ROWS)
            for m in range(start, end):
                slot = step % SLOTS
                mbarrier.wait(ds_full.index(slot), (step // SLOTS) & 1)
                b_gq = gl.zeros([D, ROWS], gl.float32, layout)
                b_gq = warpgroup_mma(b_k, s_ds.index(slot), b_gq, use_acc=False, is_async=True)
                b_gq = warpgroup_mma_wait(0, deps=[b_gq])
                mbarrier.arrive(ds_empty.index(slot), count=1)
                attention_bwd_add(p_gq + (row + m) * (ROWS * D), b_gq)
                step += 1
        batch, kv_head, n_first, end = receive(s_tile, tile_full, tile_empty, turn)


@gluon.jit
def attention_bwd_hopper_kernel(
    d_q, d_k, d_v, d_gy, d_lse, d_delta, d_starts, document_ends, p_gq, p_gk, p_gv, row_scale, counter, stride_grad_kv,
    T, T_PAD, H, G, kv_heads, chunk, ahead, tiles, scale, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_q.dtype
    READERS: gl.constexpr = 3 if D == 64 else 2  # partitions but the producer
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, 1, D], d_q.layout)
    s_gy = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, 1, D], d_gy.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], d_lse.layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], d_delta.layout)
    s_k = gl.allocate_shared_memory(dtype, [1, 2 * ROWS, 1, D], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [1, 2 * ROWS, 1, D], d_v.layout)
    s_ds = gl.allocate_shared_memory(dtype, [SLOTS, 2 * ROWS, ROWS], ds_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    gy_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    gy_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(gy_full.index(i), count=1)
        mbarrier.init(gy_empty.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=1 if D == 64 else 2)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=READERS)
    s_tile = gl.allocate_shared_memory(gl.int64, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=READERS)
    fence_async_shared()
    s_starts = s_tile
    if DOCUMENTS:
        s_starts = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], d_starts.layout)
    buffers = (s_q, s_gy, s_lse, s_delta, s_starts, s_k, s_v, s_ds, s_tile)
    barriers = (q_full, q_empty, gy_full, gy_empty, kv_full, kv_empty, ds_full, ds_empty, tile_full, tile_empty)
    if D == 64:
        gl.warp_specialize(
            [
                (
                    attention_bwd_consume,
                    (buffers, barriers, p_gk, p_gv, stride_grad_kv, row_scale, T, scale, scale_log2,
                     0, GROUP, D, STAGES, SLOTS, DOCUMENTS),
                ),
                (
                    attention_bwd_consume,
                    (buffers, barriers, p_gk, p_gv, stride_grad_kv, row_scale, T, scale, scale_log2,
                     1, GROUP, D, STAGES, SLOTS, DOCUMENTS),
                ),
                (attention_bwd_add_dq, (buffers, barriers, p_gq, T, H, GROUP, D, SLOTS, DOCUMENTS)),
                (
                    attention_bwd_produce,
                    (d_q, d_k, d_v, d_gy, d_lse, d_delta, d_starts, document_ends, p_gq, counter, buffers, barriers,
                     T, T_PAD, H, G, kv_heads, chunk, ahead, tiles, GROUP, D, STAGES, DOCUMENTS),
                ),
            ],
            [4, 4, 1],
            [192, 104, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    attention_bwd_consume_wide,
                    (buffers, barriers, p_gq, p_gk, p_gv, stride_grad_kv, row_scale, T, H, scale_log2,
                     0, GROUP, D, STAGES, SLOTS, DOCUMENTS),
                ),
                (
                    attention_bwd_consume_wide,
                    (buffers, barriers, p_gq, p_gk, p_gv, stride_grad_kv, row_scale, T, H, scale_log2,
                     1, GROUP, D, STAGES, SLOTS, DOCUMENTS),
                ),
                (
                    attention_bwd_produce,
                    (d_q, d_k, d_v, d_gy, d_lse, d_delta, d_starts, document_ends, p_gq, counter, buffers, barriers,
                     T, T_PAD, H, G, kv_heads, chunk, ahead, tiles, GROUP, D, STAGES, DOCUMENTS),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


@triton.jit
def attention_bwd_sums(p_tile, ROWS: tl.constexpr, D: tl.constexpr):
    """A tile of the sums of grad_q, [ROWS, D], out of the order in which `attention_bwd_add` keeps it."""
    # d = (warp, half, row), query = (column block, pair, element)
    b_gq = tl.reshape(tl.load(p_tile + tl.arange(0, ROWS * D)), [D // 16, ROWS // 8, 8, 4, 2, 2])
    return tl.reshape(tl.permute(b_gq, (1, 3, 5, 0, 4, 2)), [ROWS, D])


@triton.jit
def attention_bwd_finish_kernel(p_gq, grad_q, stride_grad_q, T, H, scale, ROWS: tl.constexpr, D: tl.constexpr):
    """Sums to grad_q: scaled, rounded."""
    tile = tl.program_id(1)
    batch_head = tl.program_id(0).to(tl.int64)
    b_gq = attention_bwd_sums(p_gq + (batch_head * tl.num_programs(1) + tile) * (ROWS * D), ROWS, D)
    o_m = tile * ROWS + tl.arange(0, ROWS)[:, None]
    o_out = ((batch_head // H) * T + o_m) * stride_grad_q + batch_head % H * D + tl.arange(0, D)[None, :]
    tl.store(grad_q + o_out, (b_gq * scale).to(grad_q.dtype.element_ty), mask=o_m < T)


# ------------------------------------------------------------------------------------------------------- launching
def _rows(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Copies of `rows` rows of one head of a (B, T, heads, D) tensor; rows past T read as zero and are not written."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[3]], layout)


def _flat(x: torch.Tensor, count: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [count], layout)


def forward(q, k, v, document_starts, out, s, lse, config: dict, processors: int) -> None:
    batch, length, heads, dim = q.shape
    config = dict(config)
    group = heads // k.shape[2]
    # Two heads of one group a tile where the group allows: both then end on the same diagonal.
    pair = 2 if group % 2 == 0 else 1
    tiles = triton.cdiv(length, 128 // pair) * (batch * heads // pair)
    grid = (min(tiles, config.pop("programs") * processors),)
    starts = None if document_starts is None else _flat(document_starts, 64)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    attention_fwd_hopper_kernel[grid](
        _rows(q, 64), _rows(k, config["BLOCK_N"]), _rows(v, config["BLOCK_N"]), _rows(v, 64), _rows(out, 64), starts,
        document_starts, s, lse, counter,
        length, s.shape[-1], heads, batch * heads, config.pop("chunk"), tiles, math.log2(math.e) / math.sqrt(dim),
        GROUP=group, HEADS=pair, D=dim, DOCUMENTS=document_starts is not None, **config,
    )  # fmt: skip


def backward(
    q, k, v, document_starts, document_ends, grad_y, lse, delta, grad_k, grad_v, row_scale, config: dict,
    processors: int,
) -> torch.Tensor:  # fmt: skip
    """Writes grad_k and grad_v; the sums of grad_q, without their scale, are returned, for `finish` or others."""
    batch, length, heads, dim = q.shape
    kv = k.shape[2]
    config = dict(config)
    chunk = config.pop("chunk")
    tiles_n = triton.cdiv(length, 128)
    tiles = tiles_n * batch * kv
    # Counters, whole lines of them, and the sums. At zero begin the former and the sums of `ahead` KV heads, or of all:
    # tiles that set the others to zero are as many as the configuration says, or more, before those that add to them.
    ahead = batch * kv
    inside = "ahead" in config
    if inside:
        ahead = min(chunk * (1 + triton.cdiv(config.pop("ahead"), chunk * tiles_n)), ahead)
    counters = triton.cdiv(1 + batch * kv, 128) * 128
    sums_of_kv = heads // kv * triton.cdiv(length, 64) * 64 * dim
    room = torch.empty(counters + batch * kv * sums_of_kv, dtype=torch.float32, device=q.device)
    room[: counters + ahead * sums_of_kv].zero_()
    sums = room[counters:]
    starts = None if document_starts is None else _flat(document_starts, 64)
    attention_bwd_hopper_kernel[(min(tiles, processors),)](
        _rows(q, 64), _rows(k, 128), _rows(v, 128), _rows(grad_y, 64), _flat(lse, 64), _flat(delta, 64), starts,
        document_ends, sums, grad_k, grad_v, row_scale, room[:counters].view(torch.int32), grad_k.stride(1),
        length, lse.shape[-1], heads, kv, batch * kv, chunk, ahead if inside else None, tiles,
        1.0 / math.sqrt(dim), math.log2(math.e) / math.sqrt(dim),
        GROUP=heads // kv, D=dim, DOCUMENTS=document_starts is not None, **config,
    )  # fmt: skip
    return sums


def finish(sums: torch.Tensor, grad_q: torch.Tensor) -> None:
    """grad_q (B, T, H, D) from its sums."""
    batch, length, heads, dim = grad_q.shape
    attention_bwd_finish_kernel[(batch * heads, triton.cdiv(length, 64))](
        sums, grad_q, grad_q.stride(1), length, heads, 1.0 / math.sqrt(dim), ROWS=64, D=dim, num_warps=dim // 16
    )
