"""The MLP of a block with its norm and its residual, forward and backward, one op.

    r = scale / sqrt(mean(x^2) + eps)          from the sums of squares of the rows of x, float32
    a = square(leaky_relu(r x up^T, 0.5))      matmul.up_forward
    y = x + a down^T                           matmul.product_add

Backward, for the gradient dy, with u = r x up^T and du' = r du:

    du'    = r (dy down) da/du                 matmul.down_backward
    d_down = dy^T a      d_up = du'^T x        cuBLAS
    dx     = dy + g - x mean(g x) / (mean(x^2) + eps), g = du' up          matmul.up_backward

Shapes: x (..., D), up (F, D), down (D, F); contiguous, bf16 or fp16, D a multiple of 16 up to 1024. Saved: x, r and a.
Work: 4 M D F FLOPs forward, 8 M D F backward; traffic at M = 98304, D 512, F 2048, bf16: 1.1 GB forward, 2.6 GB
backward. Sums and everything within a kernel are float32, and what is rounded is rounded once: the error against
float64 stays under that of the eager chain in the same dtype, for the output and every gradient.

`mlp_fp8` multiplies e4m3 numbers forward; its backward is the same, in bf16, from the a of its own forward:

    x8, up8   = rows of x and up, brought to length 448                    residual.norm_forward
    s         = square(leaky_relu(x8 up8^T, 0.5))
    a, a8     = f s and s / 448^3, f_j = (scale |up_j|)^2 D / 448^4        matmul.up_forward_fp8
    down8     = rows of 448^3 f down, brought to length 448                down_fp8_kernel
    y         = x + g a8 down8^T, g_i = |448^3 f down_i| / 448             matmul.product_add_fp8

By Cauchy and Schwarz nothing is above 448, whatever the numbers are: no scale has to be measured or guessed.
Work as before at twice the rate of the tensor cores; traffic forward 1.25 GB: 0.15 for x8, 0.65 for up, 0.40 for down.
Relative error of a product of such numbers: about 0.04. Sums of Hopper's fp8 instructions keep 14 bits.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import DTYPES, expect, settings
from kernels.matmul import (
    down_backward,
    norm_factor,
    product_add,
    product_add_fp8,
    up_backward,
    up_forward,
    up_forward_fp8,
)
from kernels.reference import E4M3_MAX, RMS_EPS
from kernels.residual import expect_dim, norm_forward, row_squares

_RMS_EPS = tl.constexpr(RMS_EPS)
_E4M3_MAX = tl.constexpr(E4M3_MAX)


# --------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def down_fp8_kernel(down, up_rstd, down8, of_up, of_down, scale, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """A row of down: its e4m3 numbers and its factor g. The first program writes f, too."""
    o_f = tl.arange(0, BLOCK)
    mask = o_f < F
    b_root = scale * (D / (_E4M3_MAX * _E4M3_MAX)) / tl.load(up_rstd + o_f, mask=mask, other=1.0)
    p_down = tl.program_id(0) * F + o_f
    b_down = tl.load(down + p_down, mask=mask, other=0.0).to(tl.float32)
    b_down *= b_root * b_root * (_E4M3_MAX * _E4M3_MAX * _E4M3_MAX)
    b_unit = tl.sqrt((tl.sum(b_down * b_down, 0) / F + _RMS_EPS) * F) / _E4M3_MAX
    tl.store(down8 + p_down, (b_down / b_unit).to(down8.dtype.element_ty), mask=mask)
    tl.store(of_down + tl.program_id(0), b_unit)
    tl.store(of_up + o_f, b_root * b_root, mask=mask & (tl.program_id(0) == 0))


def _unit_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (M, D) -> (M, D) e4m3, rstd (M,) float32
    """reference.unit_rows; x in units of them is sqrt(D) / (448 rstd)."""
    return norm_forward(x, E4M3_MAX / x.shape[1] ** 0.5, torch.float8_e4m3fn)


def _down_fp8(
    down: torch.Tensor,  # (D, F)
    up_rstd: torch.Tensor,  # (F,) float32
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (D, F) e4m3, f (F,), g (D,)
    (dim, hidden), down8 = down.shape, torch.empty_like(down, dtype=torch.float8_e4m3fn)
    of_up, of_down = (torch.empty(n, dtype=torch.float32, device=down.device) for n in (hidden, dim))
    config = settings("mlp", down.device)["down_fp8"]
    down_fp8_kernel[(dim,)](
        down, up_rstd, down8, of_up, of_down, scale, D=dim, F=hidden, BLOCK=triton.next_power_of_2(hidden), **config
    )
    return down8, of_up, of_down


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::mlp", mutates_args=())
def mlp_op(
    x: torch.Tensor, squares: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.flatten(0, -2)
    r = norm_factor(squares, x.shape[-1], scale)
    a = up_forward(rows, up, r)
    return product_add(a, down, rows)[0].view_as(x), a, r


@mlp_op.register_fake
def _fake(x, squares, up, down, scale):
    return torch.empty_like(x), x.new_empty((squares.shape[1], up.shape[0])), torch.empty_like(squares[0])


@torch.library.custom_op("golf::mlp_backward", mutates_args=())
def mlp_backward_op(
    dy: torch.Tensor, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, a: torch.Tensor, r: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    x_rows, dy_rows = x.flatten(0, -2), dy.contiguous().flatten(0, -2)
    du, sums = down_backward(dy_rows, down, a, r)
    d_down, d_up = dy_rows.T @ a, du.T @ x_rows
    return up_backward(du, up, x_rows, dy_rows, sums, r, scale).view_as(x), d_up, d_down


@mlp_backward_op.register_fake
def _(dy, x, up, down, a, r, scale):
    return torch.empty_like(x), torch.empty_like(up), torch.empty_like(down)


def _save(ctx, inputs, output):
    x, _, up, down, ctx.scale = inputs
    ctx.save_for_backward(x, up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    if dy is None:
        return None, None, None, None, None
    dx, d_up, d_down = torch.ops.golf.mlp_backward(dy, *ctx.saved_tensors, ctx.scale)
    return dx, None, d_up, d_down, None


mlp_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("golf::mlp_fp8", mutates_args=())
def mlp_fp8_op(
    x: torch.Tensor, squares: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.flatten(0, -2)
    r = norm_factor(squares, x.shape[-1], scale)
    (x8, _), (up8, up_rstd) = _unit_rows(rows), _unit_rows(up)
    down8, of_up, of_down = _down_fp8(down, up_rstd, scale)
    a, a8 = up_forward_fp8(x8, up8, of_up, x.dtype)
    return product_add_fp8(a8, down8, of_down, rows).view_as(x), a, r


mlp_fp8_op.register_fake(_fake)
mlp_fp8_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------- public
def mlp(
    x: torch.Tensor,  # (..., D)
    up: torch.Tensor,  # (F, D)
    down: torch.Tensor,  # (D, F)
    scale: float = 1.0,
    squares: torch.Tensor | None = None,  # (parts, rows) float32
) -> torch.Tensor:  # (..., D)
    """x + square(leaky_relu(rms_norm(x, scale) up^T, 0.5)) down^T, differentiable in x, up and down.

    x, up, down (torch.Tensor):
        Contiguous, all bf16 or all fp16, D a multiple of 16 up to 1024.
    scale (float):
        Factor of the norm. Default: 1.
    squares (torch.Tensor):
        Sums of squares of the rows of x as `linear_add` returns them with x, in any number of parts. Default: ``None``,
        and they are computed.
    """
    out: torch.Tensor = torch.ops.golf.mlp(x, _checked("mlp", x, up, down, squares), up, down, scale)[0]
    return out


def mlp_fp8(
    x: torch.Tensor,  # (..., D)
    up: torch.Tensor,  # (F, D)
    down: torch.Tensor,  # (D, F)
    scale: float = 1.0,
    squares: torch.Tensor | None = None,  # (parts, rows) float32
) -> torch.Tensor:  # (..., D)
    """`mlp`, its forward products of e4m3 numbers: reference.mlp_fp8. Arguments, gradients and errors are mlp's."""
    out: torch.Tensor = torch.ops.golf.mlp_fp8(x, _checked("mlp_fp8", x, up, down, squares), up, down, scale)[0]
    return out


def _checked(
    op: str, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, squares: torch.Tensor | None
) -> torch.Tensor:
    """The squares of the rows of x, as they were given or computed."""
    if x.dim() < 2 or up.dim() != 2 or up.shape[1] != x.shape[-1] or down.shape != up.shape[::-1]:
        raise ValueError(
            f"{op} wants x (..., D), up (F, D), down (D, F); "
            f"got x {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
        )
    expect_dim(op, x)
    expect(op, x=(x, x.shape, DTYPES), up=(up, up.shape, x.dtype), down=(down, down.shape, x.dtype))
    rows = x.numel() // x.shape[-1]
    if squares is None:
        squares = row_squares(x)
    elif squares.dim() != 2:
        raise ValueError(f"{op} wants squares (parts, {rows}); got {tuple(squares.shape)}")
    expect(op, x=(x, x.shape, DTYPES), squares=(squares, (squares.shape[0], rows), torch.float32))
    return squares
