"""The residual stream between the products: mixing with x0 and a U-Net skip, RMS norms, and their gradients.

    s = weight * skip,  a = sigmoid(gate),  x' = s + a (x - s)          (x' = x without a skip)
    x_in = mix[0] x' + mix[1] x0                                        rounded once
    rstd = 1 / sqrt(mean(x_in^2) + eps)                                 of the rounded x_in, one float a row

An RMS norm without weights is that float a row, so it is left to the product that follows. What comes back through
[norm, product] is g, the gradient of x_in with rstd held constant; with dy, the residual stream's own gradient,

    d = dy + g - x_in mean(g x_in) rstd^2            the gradient of x_in
    dx' = mix[0] d,   dx0 += mix[1] d,   dmix = (sum d x', sum d x0)
    dx = a dx' + dx_more,   dskip = (1 - a) weight dx'
    dweight = sum (1 - a) skip dx',   dgate = sum a (1 - a) (x - s) dx'

x_in is made again from x, x0 and skip in the backward, rounded as in the forward: one pass less than reading it.

Shapes: rows (M, D) contiguous, bf16 or fp16, D a multiple of 16 up to 1024; channel vectors, rstd and the gradients of
channels float32. All arithmetic is float32 and results are rounded once, so the error against float64 is at most that
of eager ops, which round after each. Memory-bound, 2 M D bytes a pass: mix_forward 3 passes (4 with a skip),
mix_backward 7 (9; 1 less without dx0, 1 more with dx_more), norm_backward 3, norm_forward 2, row_squares 1.

Sums over rows: each of a fixed number of programs keeps float32 sums of its own rows, and one small kernel adds those
in order, so that runs agree to the bit.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import DTYPES, expect, programs, settings
from kernels.reference import RMS_EPS

MAX_DIM = 1024

_RMS_EPS = tl.constexpr(RMS_EPS)


# --------------------------------------------------------------------------------------------------------- kernels
# A tile is [ROWS, PARTS, WIDTH] with D <= PARTS * WIDTH, and a warp reads WIDTH values of one row with 16 bytes a
# thread. The compiler hands warps to the first dimension, so that the parts of a row lie in one warp and its sum needs
# no barrier.
@triton.jit
def tile_columns(D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Column of each value of a tile's row [1, PARTS, WIDTH], and whether it is one."""
    o_d = tl.arange(0, PARTS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return o_d, o_d < D


@triton.jit
def row_sum(b_x):
    """[ROWS, PARTS, WIDTH] -> [ROWS, 1, 1]."""
    return tl.sum(tl.sum(b_x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def column_sum_kernel(partial, out, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[c] = sum over rows of partial[:, c], in a fixed order."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        m_p = (o_r < rows)[:, None] & (o_c < columns)[None, :]
        b_sum += tl.load(partial + o_r[:, None] * columns + o_c[None, :], mask=m_p, other=0.0)
    tl.store(out + o_c, tl.sum(b_sum, 0), mask=o_c < columns)


@triton.jit
def mix_factors(mix, skip_weight, skip_gate, o_d, m_d, D: tl.constexpr):
    """x_in = b_of_x x + b_of_skip skip + b_of_x0 x0, for each channel."""
    b_of_x = tl.load(mix + o_d, mask=m_d, other=0.0)
    b_of_x0 = tl.load(mix + D + o_d, mask=m_d, other=0.0)
    b_of_skip = 0.0
    if skip_gate is not None:
        b_gate = tl.sigmoid(tl.load(skip_gate + o_d, mask=m_d, other=0.0))
        b_of_skip = b_of_x * ((1.0 - b_gate) * tl.load(skip_weight + o_d, mask=m_d, other=0.0))
        b_of_x *= b_gate
    return b_of_x, b_of_x0, b_of_skip


@triton.jit
def mix_fwd_kernel(
    x, x0, mix, skip, skip_weight, skip_gate, x_in, rstd, M,
    D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    b_of_x, b_of_x0, b_of_skip = mix_factors(mix, skip_weight, skip_gate, o_d, m_d, D)
    o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    m_x = (o_m < M) & m_d
    o_x = o_m * D + o_d
    # [ROWS, PARTS, WIDTH]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_in = tl.load(x0 + o_x, mask=m_x, other=0.0).to(tl.float32) * b_of_x0
    if skip is not None:
        b_in = tl.fma(tl.load(skip + o_x, mask=m_x, other=0.0).to(tl.float32), b_of_skip, b_in)
    b_in = tl.fma(b_x, b_of_x, b_in).to(x_in.dtype.element_ty)
    tl.store(x_in + o_x, b_in, mask=m_x)
    b_in = b_in.to(tl.float32)
    tl.store(rstd + o_m, tl.rsqrt(row_sum(b_in * b_in) / D + _RMS_EPS), mask=o_m < M)


@triton.jit
def mix_bwd_kernel(
    g, rstd, dy, x, x0, dx0, dx_more, mix, skip, skip_weight, skip_gate, dx, dx0_out, dskip, partial, M,
    D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial (programs, 2 or 4, D): this program's share of dmix and, with a skip, of dweight and dgate.

    All of them come from the sums of d x, d x0 and d skip."""
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    b_of_x, b_of_x0, b_of_skip = mix_factors(mix, skip_weight, skip_gate, o_d, m_d, D)
    b_sum_x = tl.zeros([ROWS, PARTS, WIDTH], tl.float32)
    b_sum_x0 = tl.zeros([ROWS, PARTS, WIDTH], tl.float32)
    if skip is not None:
        b_sum_skip = tl.zeros([ROWS, PARTS, WIDTH], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        o_m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        m_x = (o_m < M) & m_d
        o_x = o_m * D + o_d
        # [ROWS, PARTS, WIDTH]
        b_d = tl.load(dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x0 = tl.load(x0 + o_x, mask=m_x, other=0.0).to(tl.float32)
        if skip is not None:
            b_skip = tl.load(skip + o_x, mask=m_x, other=0.0).to(tl.float32)
        if dx0 is not None:
            b_dx0 = tl.load(dx0 + o_x, mask=m_x, other=0.0).to(tl.float32)
        if g is not None:
            b_g = tl.load(g + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_rstd = tl.load(rstd + o_m, mask=o_m < M, other=0.0)
            # x_in again: the same fused operations as in the forward, so that it rounds alike.
            b_in = b_x0 * b_of_x0
            if skip is not None:
                b_in = tl.fma(b_skip, b_of_skip, b_in)
            b_in = tl.fma(b_x, b_of_x, b_in).to(x.dtype.element_ty).to(tl.float32)
            b_d += b_g - b_in * (row_sum(b_g * b_in) / D * b_rstd * b_rstd)
        b_sum_x += b_d * b_x
        b_sum_x0 += b_d * b_x0
        b_dx = b_d * b_of_x
        if dx_more is not None:
            b_dx += tl.load(dx_more + o_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(dx + o_x, b_dx.to(dx.dtype.element_ty), mask=m_x)
        if skip is not None:
            b_sum_skip += b_d * b_skip
            tl.store(dskip + o_x, (b_d * b_of_skip).to(dskip.dtype.element_ty), mask=m_x)
        b_d *= b_of_x0
        if dx0 is not None:
            b_d += b_dx0
        tl.store(dx0_out + o_x, b_d.to(dx0_out.dtype.element_ty), mask=m_x)

    # [1, PARTS, WIDTH]
    b_dmix0 = tl.sum(b_sum_x, 0, keep_dims=True)
    p_out = partial + tl.program_id(0) * (2 if skip is None else 4) * D + o_d
    tl.store(p_out + D, tl.sum(b_sum_x0, 0, keep_dims=True), mask=m_d)
    if skip is not None:
        b_mix0 = tl.load(mix + o_d, mask=m_d, other=0.0)
        b_weight = tl.load(skip_weight + o_d, mask=m_d, other=0.0)
        b_gate = tl.sigmoid(tl.load(skip_gate + o_d, mask=m_d, other=0.0))
        b_dskip = tl.sum(b_sum_skip, 0, keep_dims=True)
        tl.store(p_out + 2 * D, (1.0 - b_gate) * b_mix0 * b_dskip, mask=m_d)
        tl.store(p_out + 3 * D, b_gate * (1.0 - b_gate) * b_mix0 * (b_dmix0 - b_weight * b_dskip), mask=m_d)
        b_dmix0 = b_gate * b_dmix0 + (1.0 - b_gate) * b_weight * b_dskip
    tl.store(p_out, b_dmix0, mask=m_d)


@triton.jit
def row_squares_kernel(x, squares, M, D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    # [ROWS, PARTS, WIDTH]
    b_x = tl.load(x + o_m * D + o_d, mask=(o_m < M) & m_d, other=0.0).to(tl.float32)
    tl.store(squares + o_m, row_sum(b_x * b_x), mask=o_m < M)


@triton.jit
def norm_fwd_kernel(
    x, h, rstd, scale, M, D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    m_x = (o_m < M) & m_d
    o_x = o_m * D + o_d
    # [ROWS, PARTS, WIDTH]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_rstd = tl.rsqrt(row_sum(b_x * b_x) / D + _RMS_EPS)
    tl.store(rstd + o_m, b_rstd, mask=o_m < M)
    tl.store(h + o_x, (b_x * (b_rstd * scale)).to(h.dtype.element_ty), mask=m_x)


@triton.jit
def norm_bwd_kernel(
    g, x, rstd, dx, scale, M, D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    m_x = (o_m < M) & m_d
    o_x = o_m * D + o_d
    b_rstd = tl.load(rstd + o_m, mask=o_m < M, other=0.0)
    # [ROWS, PARTS, WIDTH]
    b_g = tl.load(g + o_x, mask=m_x, other=0.0).to(tl.float32) * (b_rstd * scale)
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_g -= b_x * (row_sum(b_g * b_x) / D * b_rstd * b_rstd)
    tl.store(dx + o_x, b_g.to(dx.dtype.element_ty), mask=m_x)


# ------------------------------------------------------------------------------------------------------- launching
def tile(config: dict, dim: int) -> dict:
    """What to launch with for rows of `dim`: a configuration with a tile's shape for TILE, the number of its values."""
    block = max(16, triton.next_power_of_2(dim))
    width = min(block, 256)
    shape = {"D": dim, "PARTS": block // width, "WIDTH": width, "ROWS": max(1, config["TILE"] // block)}
    return shape | {name: value for name, value in config.items() if name not in ("TILE", "per_sm")}


def column_sum(
    partial: torch.Tensor,  # (programs, ...) float32
) -> torch.Tensor:  # (...) float32
    """The sum over the first dimension, in a fixed order."""
    out = torch.empty(partial.shape[1:], dtype=torch.float32, device=partial.device)
    config = settings("residual", partial.device)["column_sum"]
    grid = (triton.cdiv(out.numel(), config["BLOCK_C"]),)
    column_sum_kernel[grid](partial, out, partial.shape[0], out.numel(), **config)
    return out


def expect_dim(op: str, x: torch.Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] % 16 or not 16 <= x.shape[-1] <= MAX_DIM:
        raise ValueError(f"{op} wants rows of a multiple of 16 values up to {MAX_DIM}; got shape {tuple(x.shape)}")


def _expect_mix(
    op: str, x: torch.Tensor, x0: torch.Tensor, mix: torch.Tensor, skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None, skip_gate: torch.Tensor | None,
) -> None:  # fmt: skip
    expect_dim(op, x)
    if len({skip is None, skip_weight is None, skip_gate is None}) > 1:
        raise ValueError(f"{op} wants a skip, its weight and its gate together, or none of them")
    dim, floats = x.shape[-1], torch.float32
    expect(
        op, x=(x, x.shape, DTYPES), x0=(x0, x.shape, x.dtype), mix=(mix, (2, dim), floats),
        skip=(skip, x.shape, x.dtype), skip_weight=(skip_weight, (dim,), floats), skip_gate=(skip_gate, (dim,), floats),
    )  # fmt: skip


def mix_forward(
    x: torch.Tensor,  # (M, D)
    x0: torch.Tensor,  # (M, D)
    mix: torch.Tensor,  # (2, D) float32
    skip: torch.Tensor | None = None,  # (M, D)
    skip_weight: torch.Tensor | None = None,  # (D,) float32
    skip_gate: torch.Tensor | None = None,  # (D,) float32
) -> tuple[torch.Tensor, torch.Tensor]:  # x_in (M, D), rstd (M,) float32
    """x_in and the reciprocal of its rows' root mean square."""
    _expect_mix("mix_forward", x, x0, mix, skip, skip_weight, skip_gate)
    rows, dim = x.shape
    x_in, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    config = tile(settings("residual", x.device)["mix_forward"], dim)
    mix_fwd_kernel[(triton.cdiv(rows, config["ROWS"]),)](
        x, x0, mix, skip, skip_weight, skip_gate, x_in, rstd, rows, **config
    )
    return x_in, rstd


def mix_backward(
    g: torch.Tensor | None,  # (M, D), or None where no norm follows
    rstd: torch.Tensor | None,  # (M,) float32 of mix_forward; None with g
    dy: torch.Tensor,  # (M, D)
    x: torch.Tensor,  # (M, D)
    x0: torch.Tensor,  # (M, D)
    dx0: torch.Tensor | None,  # (M, D): what later layers gave, to be added; None in the last layer
    mix: torch.Tensor,  # (2, D) float32
    skip: torch.Tensor | None = None,  # (M, D)
    skip_weight: torch.Tensor | None = None,  # (D,) float32
    skip_gate: torch.Tensor | None = None,  # (D,) float32
    dx_more: torch.Tensor | None = None,  # (M, D): a gradient of x from elsewhere, to be added
) -> tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]:  # dx (M, D), dskip (M, D), dx0 (M, D), dmix (2, D), dweight (D,), dgate (D,)
    """Gradients of mix_forward's inputs. x may be x0: their gradients are then for the caller to add."""
    _expect_mix("mix_backward", x, x0, mix, skip, skip_weight, skip_gate)
    rows, dim = x.shape
    expect(
        "mix_backward", x=(x, x.shape, DTYPES), dy=(dy, x.shape, x.dtype), dx0=(dx0, x.shape, x.dtype),
        dx_more=(dx_more, x.shape, x.dtype), g=(g, x.shape, x.dtype), rstd=(rstd, (rows,), torch.float32),
    )  # fmt: skip
    dx = torch.empty_like(x)
    dskip = None if skip is None else torch.empty_like(x)
    dx0_out = torch.empty_like(x)
    wanted = settings("residual", x.device)["mix_backward" if skip is None else "mix_backward_skip"]
    config = tile(wanted, dim)
    count = programs(wanted["per_sm"], triton.cdiv(rows, config["ROWS"]), x.device)
    partial = torch.empty((count, 2 if skip is None else 4, dim), dtype=torch.float32, device=x.device)
    mix_bwd_kernel[(count,)](
        g, rstd, dy, x, x0, dx0, dx_more, mix, skip, skip_weight, skip_gate, dx, dx0_out, dskip, partial, rows,
        **config,
    )  # fmt: skip
    channels = column_sum(partial)
    if skip is None:
        return dx, None, dx0_out, channels, None, None
    return dx, dskip, dx0_out, channels[:2], channels[2], channels[3]


def norm_forward(
    x: torch.Tensor,  # (M, D)
    scale: float = 1.0,
    dtype: torch.dtype | None = None,  # of h; default: that of x
) -> tuple[torch.Tensor, torch.Tensor]:  # h (M, D), rstd (M,) float32
    """h = x * rstd * scale and rstd = 1 / sqrt(mean(x^2) + eps)."""
    expect_dim("norm_forward", x)
    expect("norm_forward", x=(x, x.shape, DTYPES))
    rows, dim = x.shape
    h, rstd = torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device)
    config = tile(settings("residual", x.device)["norm_forward"], dim)
    norm_fwd_kernel[(triton.cdiv(rows, config["ROWS"]),)](x, h, rstd, scale, rows, **config)
    return h, rstd


def norm_backward(
    g: torch.Tensor,  # (M, D)
    x: torch.Tensor,  # (M, D)
    rstd: torch.Tensor,  # (M,) float32
    scale: float = 1.0,
) -> torch.Tensor:  # (M, D)
    """The gradient of x, for g the gradient of norm_forward's h."""
    expect_dim("norm_backward", x)
    rows, dim = x.shape
    expect(
        "norm_backward", x=(x, x.shape, DTYPES), g=(g, x.shape, x.dtype), rstd=(rstd, (rows,), torch.float32)
    )  # fmt: skip
    dx = torch.empty_like(x)
    config = tile(settings("residual", x.device)["norm_backward"], dim)
    norm_bwd_kernel[(triton.cdiv(rows, config["ROWS"]),)](g, x, rstd, dx, scale, rows, **config)
    return dx


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::row_squares", mutates_args=())
def row_squares_op(x: torch.Tensor) -> torch.Tensor:
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    squares = torch.empty((1, rows), dtype=torch.float32, device=x.device)
    config = tile(settings("residual", x.device)["norm_forward"], dim)
    row_squares_kernel[(triton.cdiv(rows, config["ROWS"]),)](x, squares, rows, **config)
    return squares


@row_squares_op.register_fake
def _(x):
    return x.new_empty((1, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("golf::rms_norm", mutates_args=())
def rms_norm_op(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    h, rstd = norm_forward(x.view(-1, x.shape[-1]), scale)
    return h.view_as(x), rstd


@rms_norm_op.register_fake
def _(x, scale):
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("golf::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(g: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, scale: float) -> torch.Tensor:
    dim = x.shape[-1]
    return norm_backward(g.contiguous().view(-1, dim), x.view(-1, dim), rstd, scale).view_as(x)


@rms_norm_backward_op.register_fake
def _(g, x, rstd, scale):
    return torch.empty_like(x)


def _save_norm(ctx, inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx, g, _):
    x, rstd = ctx.saved_tensors
    return None if g is None else torch.ops.golf.rms_norm_backward(g, x, rstd, ctx.scale), None


rms_norm_op.register_autograd(_differentiate_norm, setup_context=_save_norm)


@torch.library.custom_op("golf::residual_mix", mutates_args=())
def residual_mix_op(
    x: torch.Tensor, x0: torch.Tensor, mix: torch.Tensor, skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None, skip_gate: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    rows = (None if t is None else t.view(-1, t.shape[-1]) for t in (x, x0, skip))
    x_rows, x0_rows, skip_rows = rows
    return mix_forward(x_rows, x0_rows, mix, skip_rows, skip_weight, skip_gate)[0].view_as(x)


@residual_mix_op.register_fake
def _(x, x0, mix, skip, skip_weight, skip_gate):
    return torch.empty_like(x)


@torch.library.custom_op("golf::residual_mix_backward", mutates_args=())
def residual_mix_backward_op(
    dy: torch.Tensor, x: torch.Tensor, x0: torch.Tensor, mix: torch.Tensor, skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None, skip_gate: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    rows = (None if t is None else t.contiguous().view(-1, t.shape[-1]) for t in (dy, x, x0, skip))
    dy_rows, x_rows, x0_rows, skip_rows = rows
    dx, dskip, dx0, dmix, dweight, dgate = mix_backward(
        None, None, dy_rows, x_rows, x0_rows, None, mix, skip_rows, skip_weight, skip_gate
    )
    if skip is None:
        return [dx.view_as(x), dx0.view_as(x), dmix]
    return [dx.view_as(x), dx0.view_as(x), dmix.clone(), dskip.view_as(x), dweight.clone(), dgate.clone()]


@residual_mix_backward_op.register_fake
def _(dy, x, x0, mix, skip, skip_weight, skip_gate):
    given = (x, x0, mix) if skip is None else (x, x0, mix, skip, skip_weight, skip_gate)
    return [torch.empty_like(t) for t in given]


def _save_mix(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_mix(ctx, dy):
    grads = torch.ops.golf.residual_mix_backward(dy, *ctx.saved_tensors)
    return *grads, *(None,) * (6 - len(grads))


residual_mix_op.register_autograd(_differentiate_mix, setup_context=_save_mix)


# ---------------------------------------------------------------------------------------------------------- public
def rms_norm(
    x: torch.Tensor,  # (..., D)
    scale: float = 1.0,
) -> torch.Tensor:  # (..., D)
    """reference.rms_norm, x / sqrt(mean(x^2) + eps) * scale, differentiable in x.

    x (torch.Tensor):
        ``[..., D]`` contiguous, bf16 or fp16, D a multiple of 16 up to 1024.
    """
    expect_dim("rms_norm", x)
    expect("rms_norm", x=(x, x.shape, DTYPES))
    return torch.ops.golf.rms_norm(x, scale)[0]


def row_squares(
    x: torch.Tensor,  # (..., D)
) -> torch.Tensor:  # (1, rows) float32
    """Sum of the squares of each row, without a gradient; x as of rms_norm."""
    expect_dim("row_squares", x)
    expect("row_squares", x=(x, x.shape, DTYPES))
    squares: torch.Tensor = torch.ops.golf.row_squares(x.detach())
    return squares


def residual_mix(
    x: torch.Tensor,  # (..., D)
    x0: torch.Tensor,  # (..., D)
    mix: torch.Tensor,  # (2, D) float32
    skip: torch.Tensor | None = None,  # (..., D)
    skip_weight: torch.Tensor | None = None,  # (D,) float32
    skip_gate: torch.Tensor | None = None,  # (D,) float32
) -> torch.Tensor:  # (..., D)
    """reference.residual_mix, of reference.skip_mix where a skip is given, differentiable in every tensor.

    x, x0, skip (torch.Tensor):
        ``[..., D]`` contiguous, all bf16 or all fp16, D a multiple of 16 up to 1024.
    mix, skip_weight, skip_gate (torch.Tensor):
        float32 ``[2, D]``, ``[D]`` and ``[D]``; skip, its weight and its gate go together. Default: ``None``.
    """
    _expect_mix("residual_mix", x, x0, mix, skip, skip_weight, skip_gate)
    return torch.ops.golf.residual_mix(x, x0, mix, skip, skip_weight, skip_gate)
