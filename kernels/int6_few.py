"""The products of `int6.py` for a few rows of x, in Gluon, where operands of the tensor cores never leave registers.

The sum over columns does not care for their order, as long as both operands agree. So a thread loads K_WIDTH neighbours
of each plane, unpacks four quarters of the row from them, loads the same columns of x, and calls what it has the
fragments of an mma.sync: no shared memory, no shuffles, no conversion of layouts. SPLIT warps have each their own share
of the columns; they add up once, at the end, in shared memory. Their number, and with it the order of the sum, is the
same for every number of rows.

A product of these sizes is latency: what counts is how often a program waits for memory, and how many launches are
under way at once. A program lets the next launch start as its first act, so as many launches as processors have room
for ask for all their codes at once and unpack them; then it waits for the launch ahead, and asks for all its x at once.
`maxnreg` of kernels/configs leaves the compiler the registers for that (left alone, it saves them and loads x in four
rounds).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.launch import gpu

BLOCK_M = gl.constexpr(16)  # rows of an mma
K_WIDTH = gl.constexpr(8)  # neighbouring columns of a thread


@triton.jit
def int6_weights(b_low, b_high, b_scale, b_gain, QUARTER: tl.constexpr):
    """The weights of a quarter in float32, from bytes of its low plane and of the high one."""
    b_code = ((b_low >> (4 * (QUARTER % 2))) & 15) | (((b_high >> (2 * QUARTER)) & 3) << 4)
    # 2^23 + code as float32, and 2^23 + 32 less: no conversion.
    return dequantised((b_code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388640.0, b_scale, b_gain)


@triton.jit
def dequantised(b_code, b_scale, b_gain):
    b_w = b_code * b_scale
    if b_gain is not None:
        b_w *= b_gain
    return b_w


@triton.constexpr_function
def weights_ptx(quarter, six, gain, kind):
    """Four neighbours' weights of a quarter, as two pairs of bf16 or f16 in $0 and $1, from four bytes each of $2 and
    of $3, the high plane: int6_weights, or int8's, by a third of the instructions. Of the row: $4 its scale, $8 its
    scale times -32800, or -32896 for int8, and $12 its gain, if any.

    A code becomes the second byte of 2^15 as float32, which reads as 32768 + 32 + code, or + 128. One fused
    multiply-add is then exact, as scales have 11 bits: of (32800 + code) scale - 32800 scale, parts have 27 and 22."""
    if six:
        low = ("mov.b32 low, $2;", "shr.u32 low, $2, 4;")[quarter % 2]
        high = ("shl.b32 high, $3, 4;", "shl.b32 high, $3, 2;", "mov.b32 high, $3;", "shr.u32 high, $3, 2;")[quarter]
        code = f"{low} {high} and.b32 low, low, 0x0f0f0f0f; lop3.b32 low, high, 0x30303030, low, 0xea;"
    else:
        code = "xor.b32 low, $2, 0x80808080;"
    each = " ".join(
        f"prmt.b32 w{i}, low, magic, 0x74{i}4; fma.rn.f32 w{i}, w{i}, $4, $8;"
        + (f" mul.rn.f32 w{i}, w{i}, $12;" if gain else "")
        for i in range(4)
    )
    pairs = f"cvt.rn.{kind}x2.f32 $0, w1, w0; cvt.rn.{kind}x2.f32 $1, w3, w2;"
    return f"{{ .reg .b32 low, high, magic; .reg .b32 w<4>; mov.b32 magic, 0x47000000; {code} {each} {pairs} }}"


@gluon.jit
def few_weights(x, b_low, b_high, b_scale, b_gain, QUARTER: gl.constexpr, SIX: gl.constexpr):
    """The weights of a quarter in the dtype of x. Not pure: they are computed in front of what follows."""
    kind: gl.constexpr = "bf16" if x.dtype.element_ty == gl.bfloat16 else "f16"
    operands = (b_low, b_high, b_scale, b_scale * (-32800.0 if SIX else -32896.0))
    if b_gain is not None:
        operands += (b_gain,)
    return gl.inline_asm_elementwise(
        weights_ptx(QUARTER, SIX, b_gain is not None, kind), "=r,=r" + (10 if b_gain is None else 14) * ",r",
        operands, dtype=x.dtype.element_ty, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def int6_few_kernel(
    x, codes, scales, gain, out, M, N, K,
    Q: gl.constexpr, SIX: gl.constexpr, BLOCK_N: gl.constexpr, CHUNK: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x and BLOCK_N of the matrix. SPLIT warps share the columns, CHUNK bytes of a plane's row each."""
    gdc_launch_dependents()
    PLANES: gl.constexpr = 3 if SIX else 1
    QUARTERS: gl.constexpr = 4 if SIX else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLIT, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, K_WIDTH)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, K_WIDTH)
    # [SPLIT, BLOCK_M, CHUNK]
    o_part = gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None]
    o_m = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None]
    o_xq = o_part * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    # [SPLIT, CHUNK, BLOCK_N]
    o_part = gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None, None]
    o_n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    o_wq = o_part * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None]
    p_x = x + o_m.to(gl.int64) * K
    p_codes = codes + o_n.to(gl.int64) * (PLANES * Q)
    m_m, m_n = o_m < M, o_n < N
    b_scale = gl.load(scales + o_n, mask=m_n, other=0.0).to(gl.float32)
    b_gain = None
    if gain is not None:
        b_gain = gl.load(gain + o_n, mask=m_n, other=0.0)
    # Two sums, so that products wait for each other half as long.
    b_even = gl.zeros([SPLIT, BLOCK_M, BLOCK_N], gl.float32, mma)
    b_odd = gl.zeros([SPLIT, BLOCK_M, BLOCK_N], gl.float32, mma)
    for start in gl.static_range(0, Q, SPLIT * CHUNK):
        o_q = start + o_wq
        m_q = m_n & (o_q < Q)
        b_first = gl.load(p_codes + o_q, mask=m_q, other=0)
        b_second = b_first
        b_high = b_first
        if SIX:
            b_second = gl.load(p_codes + (o_q + Q), mask=m_q, other=0)
            b_high = gl.load(p_codes + (o_q + 2 * Q), mask=m_q, other=0)
        b_w = ()
        for i in gl.static_range(QUARTERS):
            b_code = b_first if i < 2 else b_second
            b_w += (few_weights(x, b_code, b_high, b_scale, b_gain, i, SIX),)
        if start == 0:
            # The first of the two does nothing more, but otherwise ptxas moves the unpacking behind the second.
            gdc_launch_dependents()
            gdc_wait()
        b_x = ()
        for i in gl.static_range(QUARTERS):
            o_q = start + o_xq
            b_x += (gl.load(p_x + (o_q + i * Q), mask=m_m & (o_q < Q) & (o_q + i * Q < K), other=0.0),)
        for i in gl.static_range(QUARTERS):
            if i % 2 == 0:
                b_even = mma_v2(b_x[i], b_w[i], b_even)
            else:
                b_odd = mma_v2(b_x[i], b_w[i], b_odd)
    # All parts of an output to one thread, by one trip through shared memory.
    VEC: gl.constexpr = max(1, BLOCK_M * BLOCK_N // (32 * SPLIT))
    LANES: gl.constexpr = min(32, BLOCK_N // VEC)
    flat: gl.constexpr = gl.BlockedLayout([SPLIT, 1, VEC], [1, 32 // LANES, LANES], [1, SPLIT, 1], [2, 1, 0])
    b_out = gl.sum(gl.convert_layout(b_even + b_odd, flat), 0)
    o_m = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, gl.SliceLayout(0, flat)))[:, None]
    o_n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(0, flat)))[None, :]
    gl.store(out + o_m.to(gl.int64) * N + o_n, b_out.to(out.dtype.element_ty), mask=(o_m < M) & (o_n < N))


def few_tiles(
    rows: int,
    count: int,
    processors: int,
    config: Mapping[str, int],  # of kernels/configs
) -> dict[str, int]:
    """Tiles of a product of so many rows and outputs: of 8 to WIDEST outputs, so that the programs of two launches have
    a processor each, as far as the widest allow it."""
    tiles = dict(config)
    widest = tiles.pop("WIDEST")
    each = triton.cdiv(2 * count * triton.cdiv(rows, BLOCK_M.value), processors)
    return tiles | {"BLOCK_N": min(widest, max(8, triton.next_power_of_2(each))), "num_warps": tiles["SPLIT"]}


def launch(
    x: torch.Tensor,  # (M, K)
    codes: torch.Tensor,  # of `int6.py`
    scales: torch.Tensor,  # (N,)
    gain: torch.Tensor | None,  # (N,)
    out: torch.Tensor,  # (M, N), written
    config: Mapping[str, int],
) -> None:
    (rows, columns), count = x.shape, codes.shape[0]
    tiles = few_tiles(rows, count, gpu(x.device)[1], config)
    grid = triton.cdiv(count, tiles["BLOCK_N"]), triton.cdiv(rows, BLOCK_M.value)
    int6_few_kernel[grid](
        x, codes, scales, gain, out, rows, count, columns,
        Q=codes.shape[-1], SIX=codes.dim() == 3, **tiles, launch_pdl=True,
    )  # fmt: skip
