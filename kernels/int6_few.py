"""The products of `int6.py` for a few rows of x, in Gluon, where operands of the tensor cores never leave registers.

The sum over columns does not care for their order, as long as both operands agree. So a thread loads K_WIDTH neighbours
of each plane, 4 to 16 bytes, unpacks four quarters of the row from them, loads the same columns of x, and calls what it
has the fragments of an mma.sync: no shared memory, no shuffles, no conversion of layouts. Each warp has its own share
of the columns; they add up once, at the end, in shared memory.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.launch import gpu


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


@gluon.jit(do_not_specialize=["M"])
def int6_few_kernel(
    x, codes, scales, gain, out, M, N, K,
    Q: gl.constexpr, SIX: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CHUNK: gl.constexpr, K_WIDTH: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """SPLIT warps, CHUNK bytes of a plane's row each at a time."""
    PLANES: gl.constexpr = 3 if SIX else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLIT, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, K_WIDTH)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, K_WIDTH)
    gdc_launch_dependents()
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
    b_acc = gl.zeros([SPLIT, BLOCK_M, BLOCK_N], gl.float32, mma)
    for start in gl.static_range(0, Q, SPLIT * CHUNK):
        o_q = start + o_wq
        m_q = m_n & (o_q < Q)
        b_first = gl.load(p_codes + o_q, mask=m_q, other=0)
        b_second = b_first
        b_high = b_first
        if SIX:
            b_second = gl.load(p_codes + (o_q + Q), mask=m_q, other=0)
            b_high = gl.load(p_codes + (o_q + 2 * Q), mask=m_q, other=0)
        if start == 0:
            gdc_wait()
        for i in gl.static_range(4 if SIX else 1):
            o_q = start + o_xq
            b_x = gl.load(p_x + (o_q + i * Q), mask=m_m & (o_q < Q) & (o_q + i * Q < K), other=0.0)
            if SIX:
                b_w = int6_weights(b_first if i < 2 else b_second, b_high, b_scale, b_gain, i)
            else:
                b_w = dequantised(b_first.to(gl.float32), b_scale, b_gain)
            b_acc = mma_v2(b_x, b_w.to(b_x.dtype), b_acc)
    b_out = gl.sum(b_acc, 0)
    flat: gl.constexpr = gl.SliceLayout(0, mma)
    o_m = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, flat))[:, None]
    o_n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, flat))[None, :]
    gl.store(out + o_m.to(gl.int64) * N + o_n, b_out.to(out.dtype.element_ty), mask=(o_m < M) & (o_n < N))


def launch(
    x: torch.Tensor,  # (M, K)
    codes: torch.Tensor,  # of `int6.py`
    scales: torch.Tensor,  # (N,)
    gain: torch.Tensor | None,  # (N,)
    out: torch.Tensor,  # (M, N), written
    config: dict[str, int],
) -> None:
    (rows, columns), count = x.shape, codes.shape[0]
    grid = triton.cdiv(count, config["BLOCK_N"]), triton.cdiv(rows, config["BLOCK_M"])
    # As measured: with one to four programs a processor, programs of the next launch that wait beside them cost more
    # than their early start gains.
    programs, processors = grid[0] * grid[1], gpu(x.device)[1]
    early = not processors < programs <= 4 * processors
    int6_few_kernel[grid](
        x, codes, scales, gain, out, rows, count, columns,
        Q=codes.shape[-1], SIX=codes.dim() == 3, **config, num_warps=config["SPLIT"], launch_pdl=early,
    )  # fmt: skip
