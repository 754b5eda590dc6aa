"""The MLP of a block with its norm and its residual, forward and backward, one op.

    r = scale / sqrt(mean(x^2) + eps)          residual.rms_rows, one float32 a row
    a = square(leaky_relu(r x up^T, 0.5))      matmul.up_forward
    y = x + a down^T                           matmul.product_add

Backward, for the gradient dy, with u = r x up^T, du' = r du and 1/rms = r / scale:

    du'    = r (dy down) da/du                 matmul.down_backward
    d_down = dy^T a      d_up = du'^T x        cuBLAS
    g      = du' up                            cuBLAS
    dx     = dy + g - x mean(g x) / rms^2      residual.rms_backward

Shapes: x (..., D), up (F, D), down (D, F); contiguous, bf16 or fp16, D a multiple of 16 up to 1024. Saved: x, 1/rms
and a. Work: 4 M D F FLOPs forward, 8 M D F backward; traffic at M = 98304, D 512, F 2048, bf16: 1.1 GB forward, 2.9 GB
backward. Sums and everything within a kernel are float32, and what is rounded is rounded once: the error against
float64 stays under that of the eager chain in the same dtype, for the output and every gradient.
"""

import torch

from kernels.launch import DTYPES, expect
from kernels.matmul import down_backward, product_add, up_forward
from kernels.residual import expect_dim, rms_backward, rms_rows


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::mlp", mutates_args=())
def mlp_op(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.flatten(0, -2)
    rstd = rms_rows(rows)
    a = up_forward(rows, up, rstd * scale)
    return product_add(a, down, rows).view_as(x), a, rstd


@mlp_op.register_fake
def _(x, up, down, scale):
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty((rows, up.shape[0])), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("golf::mlp_backward", mutates_args=())
def mlp_backward_op(
    dy: torch.Tensor, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, a: torch.Tensor, rstd: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    x_rows, dy_rows = x.flatten(0, -2), dy.contiguous().flatten(0, -2)
    du = down_backward(dy_rows, down, a, rstd * scale)
    d_down, d_up = dy_rows.T @ a, du.T @ x_rows
    dx = rms_backward(du @ up, x_rows, rstd, dy_rows)
    return dx.view_as(x), d_up, d_down


@mlp_backward_op.register_fake
def _(dy, x, up, down, a, rstd, scale):
    return torch.empty_like(x), torch.empty_like(up), torch.empty_like(down)


def _save(ctx, inputs, output):
    x, up, down, ctx.scale = inputs
    ctx.save_for_backward(x, up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    if dy is None:
        return None, None, None, None
    return *torch.ops.golf.mlp_backward(dy, *ctx.saved_tensors, ctx.scale), None


mlp_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------- public
def mlp(
    x: torch.Tensor,  # (..., D)
    up: torch.Tensor,  # (F, D)
    down: torch.Tensor,  # (D, F)
    scale: float = 1.0,
) -> torch.Tensor:  # (..., D)
    """x + square(leaky_relu(rms_norm(x, scale) up^T, 0.5)) down^T, differentiable in x, up and down.

    x, up, down (torch.Tensor):
        Contiguous, all bf16 or all fp16, D a multiple of 16 up to 1024.
    scale (float):
        Factor of the norm. Default: 1.
    """
    if x.dim() < 2 or up.dim() != 2 or up.shape[1] != x.shape[-1] or down.shape != up.shape[::-1]:
        raise ValueError(
            "mlp wants x (..., D), up (F, D), down (D, F); "
            f"got x {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
        )
    expect_dim("mlp", x)
    expect("mlp", x=(x, x.shape, DTYPES), up=(up, up.shape, x.dtype), down=(down, down.shape, x.dtype))
    return torch.ops.golf.mlp(x, up, down, scale)[0]
