"""The MLP of a block with its norm and its residual, forward and backward, one op.

    r = scale / sqrt(mean(x^2) + eps)          rms_rows, one float32 a row
    a = square(leaky_relu(r x up^T, 0.5))      matmul.up_forward
    y = x + a down^T                           matmul.product_add

Backward, for the gradient dy, with u = r x up^T, du' = r du and 1/rms = r / scale:

    du'    = r (dy down) da/du                 matmul.down_backward
    d_down = dy^T a      d_up = du'^T x        cuBLAS
    g      = du' up                            cuBLAS
    dx     = dy + g - x mean(g x) / rms^2      rms_backward

Shapes: x (..., D), up (F, D), down (D, F); contiguous, bf16 or fp16. Saved: x, r and a. Work: 4 M D F FLOPs forward,
8 M D F backward; traffic at M = 98304, D 512, F 2048, bf16: 1.1 GB forward, 2.9 GB backward. Sums and everything within
a kernel are float32, and what is rounded is rounded once: the error against float64 stays under that of the eager chain
in the same dtype, for the output and every gradient.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.matmul import check, config, down_backward, product_add, up_forward
from kernels.reference import RMS_EPS


# --------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def rms_rows_kernel(x, row_scale, M, D, scale, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_x = o_m[:, None].to(tl.int64) * D + o_d
    b_x = tl.load(x + o_x, mask=(o_m[:, None] < M) & (o_d < D), other=0.0).to(tl.float32)
    tl.store(row_scale + o_m, scale / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps), mask=o_m < M)


@triton.jit
def rms_backward_kernel(g, x, row_scale, dy, dx, M, D, scale, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_x = o_m[:, None].to(tl.int64) * D + o_d
    m_x = (o_m[:, None] < M) & (o_d < D)
    b_g = tl.load(g + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_r = tl.load(row_scale + o_m, mask=o_m < M, other=0.0) / scale
    b_along = tl.sum(b_g * b_x, 1) / D * b_r * b_r
    tl.store(dx + o_x, (b_dy + b_g - b_x * b_along[:, None]).to(dx.dtype.element_ty), mask=m_x)


# ------------------------------------------------------------------------------------------------------- launching
def rms_rows(
    x: torch.Tensor,  # (M, D)
    scale: float = 1.0,
) -> torch.Tensor:  # (M,) float32
    """scale / sqrt(mean(x^2) + eps) of each row."""
    rows, dim = x.shape
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch = config(x)["rms_rows"]
    rms_rows_kernel[(triton.cdiv(rows, launch["BLOCK_M"]),)](
        x, row_scale, rows, dim, scale, RMS_EPS, BLOCK_D=triton.next_power_of_2(dim), **launch
    )
    return row_scale


def rms_backward(
    g: torch.Tensor,  # (M, D), gradient of the normalised x, times row_scale
    x: torch.Tensor,  # (M, D)
    row_scale: torch.Tensor,  # (M,) float32, of rms_rows
    dy: torch.Tensor,  # (M, D), gradient that reaches x past the norm
    scale: float = 1.0,  # of rms_rows
) -> torch.Tensor:  # (M, D)
    """dy + g - x mean(g x) (row_scale / scale)^2."""
    rows, dim = x.shape
    dx = torch.empty_like(x)
    launch = config(x)["rms_backward"]
    rms_backward_kernel[(triton.cdiv(rows, launch["BLOCK_M"]),)](
        g, x, row_scale, dy, dx, rows, dim, scale, BLOCK_D=triton.next_power_of_2(dim), **launch
    )
    return dx


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::mlp", mutates_args=())
def mlp_op(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.flatten(0, -2)
    row_scale = rms_rows(rows, scale)
    a = up_forward(rows, up, row_scale)
    return product_add(a, down, rows).view_as(x), a, row_scale


@mlp_op.register_fake
def _(x, up, down, scale):
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty((rows, up.shape[0])), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("golf::mlp_backward", mutates_args=())
def mlp_backward_op(
    dy: torch.Tensor, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, a: torch.Tensor, row_scale: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    x_rows, dy_rows = x.flatten(0, -2), dy.contiguous().flatten(0, -2)
    du = down_backward(dy_rows, down, a, row_scale)
    d_down, d_up = dy_rows.T @ a, du.T @ x_rows
    dx = rms_backward(du @ up, x_rows, row_scale, dy_rows, scale)
    return dx.view_as(x), d_up, d_down


@mlp_backward_op.register_fake
def _(dy, x, up, down, a, row_scale, scale):
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
        Contiguous, all bf16 or all fp16.
    scale (float):
        Factor of the norm, finite and not zero. Default: 1.
    """
    if x.dim() < 2 or up.dim() != 2 or up.shape[1] != x.shape[-1] or down.shape != up.shape[::-1]:
        raise ValueError(
            "mlp wants x (..., D), up (F, D), down (D, F); "
            f"got x {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
        )
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"mlp wants a scale that is finite and not zero; got {scale}")
    check("mlp", x=x, up=up, down=down)
    return torch.ops.golf.mlp(x, up, down, scale)[0]
