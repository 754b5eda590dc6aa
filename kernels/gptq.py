"""GPTQ of a block of columns, where each column takes the errors of those before it.

For column j of B, in float32, with row j of U = upper Cholesky factor of H^-1:

    c_j = clamp(round(w_j / s), -levels, levels)       round half to even
    e_j = (w_j - s c_j) / U_jj
    w_k = w_k - e_j U_jk                               k > j

Shapes: w (N, B, rows) float32, transposed so that a column is contiguous, B up to 128; upper (N, B, B) float32; scales
s (N, rows) float32. Returns codes (N, B, rows) int8 and errors e (N, B, rows) float32; columns beyond the block are the
caller's, one product. Rows are independent: a program keeps all columns of a few of them in registers and runs through
the columns alone. Work N B^2 rows multiply-adds, and as many selections: column j of a tile in registers is a sum under
a mask. Traffic 9 bytes a weight. Codes are those of the eager loop but for sums in another order: where that falls on
the two sides of a tie, and what follows from it.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import expect_one_gpu, settings

WIDTH = 128  # columns that fit in registers


@triton.jit
def gptq_block_kernel(
    w, upper, scales, codes, errors, ROWS, COLUMNS, stride_w, stride_un, stride_uj, LEVELS,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, WIDTH)
    m_r = o_r < ROWS
    o_w = o_c[:, None] * ROWS + o_r[None, :]
    # [WIDTH, BLOCK_R]
    b_w = tl.load(w + matrix * stride_w + o_w, mask=(o_c < COLUMNS)[:, None] & m_r[None, :], other=0.0)
    b_step = tl.load(scales + matrix * ROWS + o_r, mask=m_r, other=1.0)
    p_upper = upper + matrix * stride_un
    p_codes = codes + matrix * stride_w + o_r
    p_errors = errors + matrix * COLUMNS * ROWS + o_r
    for j in range(COLUMNS):
        b_column = tl.sum(tl.where((o_c == j)[:, None], b_w, 0.0), axis=0)
        b_code = tl.minimum(tl.maximum(tl.div_rn(b_column, b_step), -LEVELS), LEVELS)
        # Rounds half to even: beyond 2^23 float32 has integers alone.
        b_code = (b_code + 12582912.0) - 12582912.0
        b_error = tl.div_rn(b_column - b_code * b_step, tl.load(p_upper + j * stride_uj + j))
        b_upper = tl.load(p_upper + j * stride_uj + o_c, mask=o_c < COLUMNS, other=0.0)  # 0 before j
        b_w -= b_upper[:, None] * b_error[None, :]
        tl.store(p_codes + j * ROWS, b_code.to(tl.int8), mask=m_r)
        tl.store(p_errors + j * ROWS, b_error, mask=m_r)


def gptq_block(
    w: torch.Tensor,  # (N, B, rows) float32
    upper: torch.Tensor,  # (N, B, B) float32
    scales: torch.Tensor,  # (N, rows) float32
    codes: torch.Tensor,  # (N, B, rows) int8, written
    levels: int,
) -> torch.Tensor:  # errors (N, B, rows) float32
    """reference.gptq_block in one launch.

    w, codes (torch.Tensor):
        ``[N, B, rows]``, B up to 128, blocks of columns of contiguous ``[N, columns, rows]``: strides columns * rows,
        rows and 1. Codes are written in place.
    upper (torch.Tensor):
        ``[N, B, B]``, upper triangular, last stride 1.
    scales (torch.Tensor):
        ``[N, rows]`` contiguous, positive.
    levels (int):
        Largest code, at most 127.
    """
    matrices, columns, rows = w.shape
    for name, x, shape, dtype in (
        ("w", w, w.shape, torch.float32),
        ("codes", codes, w.shape, torch.int8),
        ("upper", upper, (matrices, columns, columns), torch.float32),
        ("scales", scales, (matrices, rows), torch.float32),
    ):
        if x.shape != shape or x.dtype != dtype or 0 in x.shape or x.stride(-1) != 1:
            raise ValueError(
                f"gptq_block wants {name} {tuple(shape)} {dtype}, none empty, last stride 1; "
                f"got {tuple(x.shape)} {x.dtype} with strides {x.stride()}"
            )
    if w.stride()[1:] != (rows, 1) or codes.stride() != w.stride() or not scales.is_contiguous():
        raise ValueError(
            "gptq_block wants w and codes as blocks of columns of contiguous tensors, scales contiguous; "
            f"got strides {w.stride()}, {codes.stride()} and {scales.stride()}"
        )
    if columns > WIDTH or not 0 < levels <= 127:
        raise ValueError(f"gptq_block wants up to {WIDTH} columns and levels in 1..127; got {columns} and {levels}")
    expect_one_gpu("gptq_block", {"w": w, "upper": upper, "scales": scales, "codes": codes})
    errors = w.new_empty(w.shape)
    config = settings("gptq", w.device)["block"]
    gptq_block_kernel[(triton.cdiv(rows, config["BLOCK_R"]), matrices)](
        w, upper, scales, codes, errors, rows, columns, w.stride(0), upper.stride(0), upper.stride(1), float(levels),
        WIDTH=max(16, triton.next_power_of_2(columns)), **config,
    )  # fmt: skip
    return errors
