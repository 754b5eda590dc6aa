"""Products with weights that stay packed in memory: six bits a weight, or int8.

    out = x w^T      w_nk = round(gain_n (scale_n code_nk)), float32 rounded once to the dtype of x

x (M, K), out (M, N) bf16 or fp16, scales (N,) float16, gain (N,) float32 or None for 1. Codes of -31..31 lie as
`reference.pack_codes` puts them, (N, 3, Q) uint8: of each quarter of a row's columns four bits a code in two planes,
and the upper two of all quarters in a third. A byte of each plane so unpacks into four columns Q apart by shifts alone,
and no code has to move to another place of a register tile. Other codes are int8 (N, K), as they are. The weights are
the reference's to the bit, and products are summed in float32: the error is that of F.linear on the dequantised matrix.

Traffic: 3/4 byte a weight. Up to `rows` rows of x (kernels/configs) one launch reads the codes, all of them at once,
and before it waits for the launch ahead (programmatic dependent launch: codes, scales and gain do not depend on it).
Tensor cores multiply, `int6_few.py`, where the table has it, else, and for int8 of odd widths, plain multiply-adds.
Beyond that the matrix is dequantised and the product is cuBLAS's: at M = 98304 the former is 1% of the time.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import int6_few
from kernels.int6_few import dequantised, int6_weights
from kernels.launch import DTYPES, early, expect, settings


@triton.jit(do_not_specialize=["M"])
def int6_row_kernel(
    x, codes, scales, gain, out, M, N, K,
    Q: tl.constexpr, SIX: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One row of x and BLOCK_N of the matrix, by multiply-adds: all that a program needs is asked for at once."""
    PLANES: tl.constexpr = 3 if SIX else 1
    if EARLY:
        gdc_launch_dependents()
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m_n = o_n < N
    row = tl.program_id(1).to(tl.int64)
    p_codes = codes + o_n.to(tl.int64) * (PLANES * Q)
    b_scale = tl.load(scales + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_gain = None
    if gain is not None:
        b_gain = tl.load(gain + o_n, mask=m_n, other=0.0)
    b_acc = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for start in tl.static_range(0, Q, BLOCK_Q):
        o_q = start + tl.arange(0, BLOCK_Q)[None, :]
        m_q = m_n & (o_q < Q)
        # [BLOCK_N, BLOCK_Q]
        b_first = tl.load(p_codes + o_q, mask=m_q, other=0)
        b_second = b_first
        b_high = b_first
        if SIX:
            b_second = tl.load(p_codes + Q + o_q, mask=m_q, other=0)
            b_high = tl.load(p_codes + 2 * Q + o_q, mask=m_q, other=0)
        if EARLY and start == 0:
            gdc_wait()
        for i in tl.static_range(4 if SIX else 1):
            if SIX:
                b_w = int6_weights(b_first if i < 2 else b_second, b_high, b_scale, b_gain, i)
            else:
                b_w = dequantised(b_first.to(tl.float32), b_scale, b_gain)
            o_k = i * Q + o_q
            b_x = tl.load(x + row * K + o_k, mask=(o_q < Q) & (o_k < K), other=0.0)
            b_acc += b_w.to(b_x.dtype).to(tl.float32) * b_x.to(tl.float32)
    b_out = tl.sum(b_acc, axis=1, keep_dims=True)
    tl.store(out + row * N + o_n, b_out.to(out.dtype.element_ty), mask=m_n)


@triton.jit
def dequantise_kernel(
    codes, scales, gain, out, N, K, Q, SIX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    o_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    m_q = (o_n < N) & (o_q < Q)
    p_out = out + o_n.to(tl.int64) * K
    b_scale = tl.load(scales + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_gain = None
    if gain is not None:
        b_gain = tl.load(gain + o_n, mask=o_n < N, other=0.0)
    if SIX:
        p_codes = codes + o_n.to(tl.int64) * (3 * Q) + o_q
        b_first = tl.load(p_codes, mask=m_q, other=0)
        b_second = tl.load(p_codes + Q, mask=m_q, other=0)
        b_high = tl.load(p_codes + 2 * Q, mask=m_q, other=0)
        for i in tl.static_range(4):
            b_w = int6_weights(b_first if i < 2 else b_second, b_high, b_scale, b_gain, i)
            o_k = i * Q + o_q
            tl.store(p_out + o_k, b_w.to(out.dtype.element_ty), mask=m_q & (o_k < K))
    else:
        b_code = tl.load(codes + o_n.to(tl.int64) * Q + o_q, mask=m_q, other=0)
        b_w = dequantised(b_code.to(tl.float32), b_scale, b_gain)
        tl.store(p_out + o_q, b_w.to(out.dtype.element_ty), mask=m_q)


# ------------------------------------------------------------------------------------------------------- launching
def dequantise_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,  # (N,)
    gain: torch.Tensor | None,  # (N,)
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # (N, K)
    out = torch.empty((codes.shape[0], columns), dtype=dtype, device=codes.device)
    config = settings("int6", codes.device)["dequantise"]
    rows, width = codes.shape[0], codes.shape[-1]
    grid = triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(width, config["BLOCK_Q"])
    dequantise_kernel[grid](codes, scales, gain, out, rows, columns, width, SIX=codes.dim() == 3, **config)
    return out


def skinny_product(
    x: torch.Tensor,  # (M, K)
    codes: torch.Tensor,
    scales: torch.Tensor,  # (N,)
    gain: torch.Tensor | None,  # (N,)
) -> torch.Tensor:  # (M, N)
    (rows, columns), count, width = x.shape, codes.shape[0], codes.shape[-1]
    out = torch.empty((rows, count), dtype=x.dtype, device=x.device)
    six, configs = codes.dim() == 3, settings("int6", x.device)
    kind = ("short" if width <= configs["short"]["BLOCK_Q"] else "long") if six else "int8"
    if "few" in configs and width % 16 == 0:
        int6_few.launch(x, codes, scales, gain, out, configs["few"][kind])
    else:
        config = configs[kind]
        int6_row_kernel[(triton.cdiv(count, config["BLOCK_N"]), rows)](
            x, codes, scales, gain, out, rows, count, columns, Q=width, SIX=six, **config, **early(x.device)
        )
    return out


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::int6_dequantise", mutates_args=())
def int6_dequantise_op(
    codes: torch.Tensor, scales: torch.Tensor, gain: torch.Tensor | None, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    return dequantise_rows(codes, scales, gain, columns, dtype)


@int6_dequantise_op.register_fake
def _(codes, scales, gain, columns, dtype):
    return scales.new_empty((codes.shape[0], columns), dtype=dtype)


@torch.library.custom_op("golf::int6_linear", mutates_args=())
def int6_linear_op(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, gain: torch.Tensor | None
) -> torch.Tensor:
    rows, configs = x.flatten(0, -2), settings("int6", x.device)
    if rows.shape[0] <= configs["rows"]:
        out = skinny_product(rows, codes, scales, gain)
    else:
        out = F.linear(rows, dequantise_rows(codes, scales, gain, x.shape[-1], x.dtype))
    return out.view(*x.shape[:-1], -1)


@int6_linear_op.register_fake
def _(x, codes, scales, gain):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


# ---------------------------------------------------------------------------------------------------------- public
def _expect(
    op: str, codes: torch.Tensor, scales: torch.Tensor, gain: torch.Tensor | None, columns: int, **others: Any
) -> None:
    """Raise ValueError unless codes, packed or int8, are those of rows of `columns` weights."""
    rows = codes.shape[0] if codes.dim() else 0
    packed = (rows, 3, 16 * triton.cdiv(columns, 64)), torch.uint8
    whole = (rows, columns), torch.int8
    if (tuple(codes.shape), codes.dtype) not in (packed, whole):
        raise ValueError(
            f"{op} wants codes {packed[0]} {packed[1]} or {whole[0]} {whole[1]}; got {tuple(codes.shape)} {codes.dtype}"
        )
    expect(
        op, codes=(codes, codes.shape, codes.dtype), scales=(scales, (rows,), torch.float16),
        gain=(gain, (rows,), torch.float32), **others,
    )  # fmt: skip


def int6_dequantise(
    codes: torch.Tensor,  # (N, 3, Q) uint8 or (N, K) int8
    scales: torch.Tensor,  # (N,) float16
    gain: torch.Tensor | None,  # (N,) float32
    columns: int,  # K
    dtype: torch.dtype,
) -> torch.Tensor:  # (N, K)
    """gain * (codes * scales) in float32, rounded once to dtype: reference.int6_dequantise, bit for bit.

    codes (torch.Tensor):
        ``[N, 3, Q]`` uint8 of ``reference.pack_codes``, or ``[N, K]`` int8; contiguous.
    scales, gain (torch.Tensor):
        ``[N]`` float16; ``[N]`` float32 or ``None`` for 1.
    columns, dtype:
        K, and the dtype of the result: bf16, fp16 or float32.
    """
    if dtype not in (*DTYPES, torch.float32):
        raise ValueError(f"int6_dequantise wants dtype bf16, fp16 or float32; got {dtype}")
    _expect("int6_dequantise", codes, scales, gain, columns)
    return torch.ops.golf.int6_dequantise(codes, scales, gain, columns, dtype)


def int6_linear(
    x: torch.Tensor,  # (..., K)
    codes: torch.Tensor,  # (N, 3, Q) uint8 or (N, K) int8
    scales: torch.Tensor,  # (N,) float16
    gain: torch.Tensor | None = None,  # (N,) float32
) -> torch.Tensor:  # (..., N)
    """x times the transposed matrix that int6_dequantise gives. For inference: no gradients.

    x (torch.Tensor):
        ``[..., K]`` contiguous, bf16 or fp16.
    codes, scales, gain (torch.Tensor):
        As of int6_dequantise. On Hopper and later they are read before launches ahead on the stream are done: what
        writes them has to be done before (weights that are there when a model is made are).
    """
    if x.dim() < 2:
        raise ValueError(f"int6_linear wants x (..., K); got {tuple(x.shape)}")
    _expect("int6_linear", codes, scales, gain, x.shape[-1], x=(x, x.shape, DTYPES))
    return torch.ops.golf.int6_linear(x, codes, scales, gain)
