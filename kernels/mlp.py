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
"""

import torch

from kernels.launch import DTYPES, expect
from kernels.matmul import down_backward, norm_factor, product_add, up_backward, up_forward
from kernels.residual import expect_dim, row_squares


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
def _(x, squares, up, down, scale):
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
    if x.dim() < 2 or up.dim() != 2 or up.shape[1] != x.shape[-1] or down.shape != up.shape[::-1]:
        raise ValueError(
            "mlp wants x (..., D), up (F, D), down (D, F); "
            f"got x {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
        )
    expect_dim("mlp", x)
    expect("mlp", x=(x, x.shape, DTYPES), up=(up, up.shape, x.dtype), down=(down, down.shape, x.dtype))
    rows = x.numel() // x.shape[-1]
    if squares is None:
        squares = row_squares(x)
    elif squares.dim() != 2:
        raise ValueError(f"mlp wants squares (parts, {rows}); got {tuple(squares.shape)}")
    expect("mlp", x=(x, x.shape, DTYPES), squares=(squares, (squares.shape[0], rows), torch.float32))
    out: torch.Tensor = torch.ops.golf.mlp(x, squares, up, down, scale)[0]
    return out
