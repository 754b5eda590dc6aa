"""Newton-Schulz of all banks of matrices in one launch: the nearest semi-orthogonal matrices, roughly.

For each matrix G with sides S <= L, from X = G / (|G|_F + 1e-7), for each (a, b, c) of the coefficients:

    A = X X^T          (S, S), over the long side: X^T X where G is taller than wide
    B = b A + c A A    (S, S)
    X = a X + B X      (a X + X B where tall)

Shapes: banks (N, rows, columns), any of them tall or wide, bf16, any sizes; where all sides are multiples of the tile,
without masks and fast. Work: the symmetric A and B are computed as upper triangles of tiles and mirrored, so that an
iteration of a matrix takes about S^2 L + S^3 + 2 S^2 L FLOPs instead of 4 S^2 L + 2 S^3. Memory: beside the banks and
the result one buffer of their size and two of all A's; for one rank of eight all of it stays in the L2 cache.
The norm is folded in: |G|_F^2 is the trace of the first A, and the first iteration scales by it in its epilogues, so
there is no pass over G before it and G is not rounded a second time. Every product takes bf16 and sums in float32, as
eager bmm; A, B and X are rounded to bf16 between products, so singular values end in the same band as eager bf16's.
|G|_F has to be between 1e-9 and 1e9: its fourth power is formed in float32.

One launch does all 3 x iterations products. The tiles of one iteration stand in a table (`_plan`), products one after
the other, the longest tiles first. Programs draw numbers from a counter; a drawn tile waits until the tiles that its
matrix needs from the product before are done (a count of finished tiles a matrix). Numbers are drawn in order, so what
a tile waits for is always in the hands of a running program: this needs no cooperative launch, leaves no program idle
at the end of a product, and runs in Triton's interpreter as it stands. Every tile is computed by one program in a fixed
order: results repeat to the bit. Symmetric tiles after modded-nanogpt and microsoft/dion, the rest is our own.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.launch import INTERPRET, expect_one_gpu, gpu, settings

# The three products of an iteration: A, B and X.
_GRAM, _SQUARE, _UPDATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def newton_schulz_product(
    p_a, p_b, o_m, o_n, stride_a, stride_b, M, N, K,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_k a[m, k] b[k, n]. A_ROWS: the rows of memory are m, else k; B_ROWS: they are k, else n."""
    o_k = tl.arange(0, BLOCK_K)
    # [BLOCK, BLOCK_K]
    if A_ROWS:
        p_a += o_m[:, None] * stride_a + o_k[None, :]
    else:
        p_a += o_k[None, :] * stride_a + o_m[:, None]
    # [BLOCK_K, BLOCK]
    if B_ROWS:
        p_b += o_k[:, None] * stride_b + o_n[None, :]
    else:
        p_b += o_n[None, :] * stride_b + o_k[:, None]
    b_acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            b_a = tl.load(p_a)
            b_b = tl.load(p_b)
        else:
            m_k = k + o_k < K
            b_a = tl.load(p_a, mask=(o_m < M)[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_k[:, None] & (o_n < N)[None, :], other=0.0)
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision="ieee")
        p_a += BLOCK_K if A_ROWS else BLOCK_K * stride_a
        p_b += BLOCK_K * stride_b if B_ROWS else BLOCK_K
    return b_acc


@triton.jit
def newton_schulz_kernel(
    g, out, spare, gram, poly, traces, counters, tiles, coefficients, iterations, tile_count,
    TRACES: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """counters, zero at the start: numbers drawn, then each matrix's finished tiles. traces (matrices, TRACES): of the
    diagonal tiles of A in the first iteration."""
    number = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while number < iterations * tile_count:
        iteration = number // tile_count
        p_tile = tiles + (number % tile_count) * 11
        product = tl.load(p_tile)
        tall = tl.load(p_tile + 1) != 0
        o_x = tl.load(p_tile + 2)
        o_a = tl.load(p_tile + 3)
        short = tl.load(p_tile + 4).to(tl.int32)
        long = tl.load(p_tile + 5).to(tl.int32)
        m_tile = tl.load(p_tile + 6).to(tl.int32)
        n_tile = tl.load(p_tile + 7).to(tl.int32)
        matrix = tl.load(p_tile + 8)
        needed = tl.load(p_tile + 9).to(tl.int32) + iteration * tl.load(p_tile + 10).to(tl.int32)
        if EVEN:
            o_x = tl.multiple_of(o_x, 64)
            o_a = tl.multiple_of(o_a, 64)
            short = tl.multiple_of(short, 64)
            long = tl.multiple_of(long, 64)
        o_m = m_tile * BLOCK + tl.arange(0, BLOCK)
        o_n = n_tile * BLOCK + tl.arange(0, BLOCK)
        stride_x = short if tall else long
        p_gram = gram + o_a
        p_poly = poly + o_a
        p_coefficient = coefficients + iteration * 3

        # X goes to and fro between two buffers, so that the last iteration writes out.
        p_x = g
        p_next = out
        to_spare = (iterations - 1 - iteration) % 2 != 0
        if iteration > 0:
            p_x = out
            if not to_spare:
                p_x = spare
        if to_spare:
            p_next = spare
        p_x += o_x
        p_next += o_x

        while tl.atomic_add(counters + 1 + matrix, 0, sem="acquire", scope="gpu") < needed:
            pass
        # What other programs wrote is read past the L1 cache.
        scale = 1.0
        if (iteration == 0) & (product != _GRAM):
            o_t = tl.arange(0, TRACES)
            m_t = o_t < tl.cdiv(short, BLOCK)
            b_t = tl.load(traces + matrix * TRACES + o_t, mask=m_t, other=0.0, cache_modifier=".cg")
            scale = 1.0 / (tl.sqrt(tl.sum(b_t)) + 1e-7)

        if product == _UPDATE:
            M = long if tall else short
            N = stride_x
            if tall:
                b_acc = newton_schulz_product(
                    p_x, p_poly, o_m, o_n, short, short, M, N, short, True, False, EVEN, BLOCK, BLOCK_K
                )
            else:
                b_acc = newton_schulz_product(
                    p_poly, p_x, o_m, o_n, short, long, M, N, short, True, True, EVEN, BLOCK, BLOCK_K
                )
            o_out = o_m[:, None] * N + o_n[None, :]
            m_out = (o_m < M)[:, None] & (o_n < N)[None, :] | EVEN
            b_x = tl.load(p_x + o_out, mask=m_out, cache_modifier=".cg").to(tl.float32)
            b_x = scale * (tl.load(p_coefficient) * b_x + b_acc)
            tl.store(p_next + o_out, b_x.to(out.dtype.element_ty), mask=m_out)
        else:
            p_from = p_x
            stride = stride_x
            inner = long
            if product == _SQUARE:
                p_from = p_gram
                stride = short
                inner = short
            if (product == _GRAM) & tall:
                b_acc = newton_schulz_product(
                    p_from, p_from, o_m, o_n, stride, stride, short, short, inner, False, True, EVEN, BLOCK, BLOCK_K
                )
            else:
                b_acc = newton_schulz_product(
                    p_from, p_from, o_m, o_n, stride, stride, short, short, inner, True, False, EVEN, BLOCK, BLOCK_K
                )
            o_out = o_m[:, None] * short + o_n[None, :]
            m_out = (o_m < short)[:, None] & (o_n < short)[None, :] | EVEN
            p_to = p_gram
            if product == _SQUARE:
                p_to = p_poly
                b_a = tl.load(p_gram + o_out, mask=m_out, cache_modifier=".cg").to(tl.float32)
                square = scale * scale
                b_acc = tl.load(p_coefficient + 2) * square * b_acc + tl.load(p_coefficient + 1) * b_a
                b_acc = square * b_acc
            elif (iteration == 0) & (m_tile == n_tile):
                trace = tl.sum(tl.where(o_m[:, None] == o_n[None, :], b_acc, 0.0))
                tl.store(traces + matrix * TRACES + m_tile, trace)
            b_out = b_acc.to(out.dtype.element_ty)
            tl.store(p_to + o_out, b_out, mask=m_out)
            if m_tile != n_tile:
                o_mirror = o_n[:, None] * short + o_m[None, :]
                m_mirror = (o_n < short)[:, None] & (o_m < short)[None, :] | EVEN
                tl.store(p_to + o_mirror, tl.trans(b_out), mask=m_mirror)
        tl.debug_barrier()
        tl.atomic_add(counters + 1 + matrix, 1, sem="release", scope="gpu")
        number = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")


# ------------------------------------------------------------------------------------------------------- launching
@functools.cache
def _plan(
    shapes: tuple[tuple[int, int, int], ...], block: int, device: torch.device
) -> tuple[torch.Tensor, int, int]:  # (tiles, 11) int64; matrices; elements of all A's
    """The tiles of one iteration, each: product, tall, offset of X, offset of A, short side, long side, tile row, tile
    column, matrix, the matrix's tiles to wait for, its tiles an iteration."""
    products: tuple[list[tuple[int, ...]], ...] = ([], [], [])
    matrix = o_x = o_a = 0
    for count, rows, columns in shapes:
        short, long = min(rows, columns), max(rows, columns)
        side = triton.cdiv(short, block)
        triangle = [(i, j) for i in range(side) for j in range(i, side)]
        whole = [(i, j) for i in range(triton.cdiv(rows, block)) for j in range(triton.cdiv(columns, block))]
        needed = 0, len(triangle), 2 * len(triangle)
        total = needed[2] + len(whole)
        for _ in range(count):
            for product, places in enumerate((triangle, triangle, whole)):
                products[product].extend(
                    (product, rows > columns, o_x, o_a, short, long, i, j, matrix, needed[product], total)
                    for i, j in places
                )
            matrix, o_x, o_a = matrix + 1, o_x + rows * columns, o_a + short * short
    for tiles in products:
        tiles.sort(key=lambda tile: -tile[5])  # stable: the longest sums first
    table = [tile for tiles in products for tile in tiles]
    return torch.tensor(table, dtype=torch.int64, device=device), matrix, o_a


@functools.cache
def _table(coefficients: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(coefficients, dtype=torch.float32, device=device)


def _launch(
    flat: torch.Tensor,  # all banks, one after the other
    shapes: tuple[tuple[int, int, int], ...],
    coefficients: tuple[float, ...],
) -> torch.Tensor:  # as flat
    processors = gpu(flat.device)[1] if flat.is_cuda else 1
    configs = settings("newton_schulz", flat.device)
    # `few`: not enough tiles for two programs a processor; `any`: sides that the tile does not divide.
    kind = "even" if flat.numel() >= 4 * processors * configs["even"]["BLOCK"] ** 2 else "few"
    even = all(side % configs[kind]["BLOCK"] == 0 for shape in shapes for side in shape[1:])
    config = dict(configs[kind if even else "any"])
    block = config["BLOCK"]
    tiles, matrices, elements = _plan(shapes, block, flat.device)
    out, spare = torch.empty_like(flat), torch.empty_like(flat)
    gram, poly = flat.new_empty(elements), flat.new_empty(elements)
    width = triton.next_power_of_2(triton.cdiv(max(min(shape[1:]) for shape in shapes), block))
    traces = torch.empty((matrices, width), dtype=torch.float32, device=flat.device)
    counters = torch.zeros(1 + matrices, dtype=torch.int32, device=flat.device)
    newton_schulz_kernel[(min(config.pop("per_processor") * processors, len(tiles)),)](
        flat, out, spare, gram, poly, traces, counters, tiles, _table(coefficients, flat.device),
        len(coefficients) // 3, len(tiles), TRACES=width, EVEN=even, **config,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------- registration
torch.library.define("golf::newton_schulz", "(Tensor flat, int[] sizes, float[] coefficients) -> Tensor")


@torch.library.impl("golf::newton_schulz", ("cpu", "cuda"))
def _newton_schulz(flat: torch.Tensor, sizes: list[int], coefficients: list[float]) -> torch.Tensor:
    shapes = tuple(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    return _launch(flat, shapes, tuple(coefficients))


@torch.library.register_fake("golf::newton_schulz")
def _(flat, sizes, coefficients):
    return torch.empty_like(flat)


# ---------------------------------------------------------------------------------------------------------- public
def _joined(banks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The banks in one buffer: the one they are views of, where they lie in it one after the other."""
    if not torch.compiler.is_compiling():
        first, end = banks[0], banks[0].storage_offset()
        for bank in banks:
            if bank.storage_offset() != end or bank.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                break
            end += bank.numel()
        else:
            return first.as_strided((end - first.storage_offset(),), (1,))
    return torch.cat([bank.flatten() for bank in banks])


def newton_schulz(
    banks: Sequence[torch.Tensor],  # (N, rows, columns) each
    coefficients: Sequence[tuple[float, float, float]],
) -> list[torch.Tensor]:  # as banks
    """Nearest semi-orthogonal matrices, roughly, of every matrix of every bank: reference.newton_schulz in one launch.

    banks (list of torch.Tensor):
        bf16 ``[N, rows, columns]`` on one GPU, contiguous. Views of one buffer, one after the other (as muon_momentum
        returns them), are read where they are; others are first copied together.
    coefficients (list of tuple):
        (a, b, c) of each iteration.

    The first call for a list of shapes puts its table of tiles on the GPU, so it cannot be within a graph capture.
    """
    dtype = torch.float32 if INTERPRET else torch.bfloat16
    for bank in banks:
        if bank.dim() != 3 or 0 in bank.shape or bank.dtype != dtype or not bank.is_contiguous():
            raise ValueError(
                f"newton_schulz wants contiguous {dtype} banks (N, rows, columns), none empty; "
                f"got {bank.dtype} {tuple(bank.shape)} with strides {bank.stride()}"
            )
    if not banks or not coefficients or any(len(triple) != 3 for triple in coefficients):
        raise ValueError(
            "newton_schulz wants at least one bank and one (a, b, c); "
            f"got {len(banks)} banks and coefficients {list(coefficients)}"
        )
    expect_one_gpu("newton_schulz", {f"banks[{i}]": bank for i, bank in enumerate(banks)})
    sizes = [size for bank in banks for size in bank.shape]
    out = torch.ops.golf.newton_schulz(_joined(banks), sizes, [x for triple in coefficients for x in triple])
    parts = out.split([bank.numel() for bank in banks])
    return [part.view(bank.shape) for part, bank in zip(parts, banks, strict=True)]
