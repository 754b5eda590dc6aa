"""The elementwise parts of an optimizer step, each one launch over a list of tensors: Muon's momentum before the
Newton-Schulz iteration, Muon's update with the EMA after it, and AdamW with the EMA.

    momentum   g' = clip g,  m = mu m + g',  u = g' + mu m  (Nesterov),  with row_norm u_i /= |u_i| + 1e-7 (MuonEq-R)
    update     p = (1 - lr wd) p - lr scale u,  e += (1 - decay) (p - e)
    adamw      g' = clip g,  p = (1 - lr wd) p,  m += (1 - b1) (g' - m),  v = b2 v + (1 - b2) g'^2
               p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps),  e += (1 - decay) (p - e)

Shapes: banks (N, rows, columns); AdamW's parameters any, what belongs to them in flat buffers. Masters p, m, v and e
are float32 and change in place; gradients are float32 or bf16, u bf16; all arithmetic is float32. clip is a float32
scalar on the device: the norm that it comes from never visits the host. What else changes every step (lr, mu, bias
corrections) are kernel arguments: a captured CUDA graph would repeat those of its own step.
Work: nothing beside memory traffic. Bytes an element: momentum 4 + 8 + 2 (gradients float32), update 2 + 16, adamw 36.
Error against float64: float32 rounding, a few 1e-7 of each tensor (and u's rounding to bf16).
Each element is computed by one thread in a fixed order: results repeat to the bit and agree on every rank.

A launch takes its tensors as tuples of pointers; program numbers run through the blocks of the first tensor, then of
the second, and so on. After torch's multi-tensor kernels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.launch import expect_one_gpu, settings


@triton.jit
def muon_momentum_rows(
    gradient, momentum, out, block, clip, mu, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROW_NORM: tl.constexpr
):
    """Whole rows of one bank, about BLOCK elements."""
    WIDTH: tl.constexpr = triton.next_power_of_2(COLUMNS)
    HEIGHT: tl.constexpr = triton.cdiv(BLOCK, WIDTH)
    o_row = block * HEIGHT + tl.arange(0, HEIGHT)
    o_column = tl.arange(0, WIDTH)
    m_x = (o_row < rows)[:, None] & (o_column < COLUMNS)[None, :]
    # [HEIGHT, WIDTH]
    o_x = o_row[:, None].to(tl.int64) * COLUMNS + o_column[None, :]
    b_g = tl.load(gradient + o_x, mask=m_x, other=0.0).to(tl.float32) * clip
    b_m = tl.load(momentum + o_x, mask=m_x, other=0.0) * mu + b_g
    tl.store(momentum + o_x, b_m, mask=m_x)
    b_u = b_g + mu * b_m
    if ROW_NORM:
        b_u = b_u / (tl.sqrt(tl.sum(b_u * b_u, 1)) + 1e-7)[:, None]
    tl.store(out + o_x, b_u.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def muon_momentum_kernel(
    gradients, momenta, out, clip, mu, rows, heights,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROW_NORM: tl.constexpr,
):  # fmt: skip
    """out holds the banks one after the other; heights: rows of one block."""
    block = tl.program_id(0)
    clip = tl.load(clip)
    for i in tl.static_range(len(gradients)):
        blocks = tl.cdiv(rows[i], heights[i])
        if (block >= 0) & (block < blocks):
            muon_momentum_rows(gradients[i], momenta[i], out, block, clip, mu, rows[i], COLUMNS[i], BLOCK, ROW_NORM)
        block -= blocks
        out += rows[i].to(tl.int64) * COLUMNS[i]


@triton.jit
def muon_update_kernel(parameters, updates, emas, sizes, rates, shrink, ema_weight, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    for i in tl.static_range(len(parameters)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            o_x = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m_x = o_x < sizes[i]
            b_p = tl.load(parameters[i] + o_x, mask=m_x)
            b_u = tl.load(updates[i] + o_x, mask=m_x).to(tl.float32)
            b_e = tl.load(emas[i] + o_x, mask=m_x)
            b_p = b_p * shrink - rates[i] * b_u
            tl.store(parameters[i] + o_x, b_p, mask=m_x)
            tl.store(emas[i] + o_x, b_e + ema_weight * (b_p - b_e), mask=m_x)
        block -= blocks


@triton.jit
def adamw_update_kernel(
    parameters, gradient, average, square, ema, clip, sizes, rates, shrinks,
    average_weight, beta2, square_weight, inverse_correction, eps, ema_weight, BLOCK: tl.constexpr,
):  # fmt: skip
    """rates: lr / (1 - beta1^t); shrinks: 1 - lr wd; inverse_correction: 1 / sqrt(1 - beta2^t)."""
    block = tl.program_id(0)
    b_clip = tl.load(clip)
    for i in tl.static_range(len(parameters)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            o_x = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m_x = o_x < sizes[i]
            b_g = tl.load(gradient + o_x, mask=m_x).to(tl.float32) * b_clip
            b_p = tl.load(parameters[i] + o_x, mask=m_x)
            b_m = tl.load(average + o_x, mask=m_x)
            b_v = tl.load(square + o_x, mask=m_x)
            b_e = tl.load(ema + o_x, mask=m_x)
            b_m += average_weight * (b_g - b_m)
            b_v = beta2 * b_v + square_weight * b_g * b_g
            b_p = b_p * shrinks[i] - rates[i] * b_m / (tl.sqrt(b_v) * inverse_correction + eps)
            tl.store(parameters[i] + o_x, b_p, mask=m_x)
            tl.store(average + o_x, b_m, mask=m_x)
            tl.store(square + o_x, b_v, mask=m_x)
            tl.store(ema + o_x, b_e + ema_weight * (b_p - b_e), mask=m_x)
        block -= blocks
        gradient += sizes[i]
        average += sizes[i]
        square += sizes[i]
        ema += sizes[i]


# ------------------------------------------------------------------------------------------------------- launching
def _momentum(
    gradients: list[torch.Tensor], momenta: list[torch.Tensor], clip: torch.Tensor, mu: float, row_norm: bool,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    config = settings("optimizer", clip.device)["momentum"]
    out = torch.empty(sum(m.numel() for m in momenta), dtype=dtype, device=clip.device)
    columns = tuple(m.shape[2] for m in momenta)
    rows = tuple(m.shape[0] * m.shape[1] for m in momenta)
    heights = tuple(triton.cdiv(config["BLOCK"], triton.next_power_of_2(width)) for width in columns)
    grid = (sum(map(triton.cdiv, rows, heights)),)
    muon_momentum_kernel[grid](
        tuple(gradients), tuple(momenta), out, clip, mu, rows, heights, COLUMNS=columns, ROW_NORM=row_norm, **config
    )
    return out


def _update(
    parameters: list[torch.Tensor], updates: list[torch.Tensor], emas: list[torch.Tensor], rates: list[float],
    shrink: float, ema_weight: float,
) -> None:  # fmt: skip
    config = settings("optimizer", parameters[0].device)["update"]
    sizes = tuple(p.numel() for p in parameters)
    grid = (sum(triton.cdiv(size, config["BLOCK"]) for size in sizes),)
    muon_update_kernel[grid](
        tuple(parameters), tuple(updates), tuple(emas), sizes, tuple(rates), shrink, ema_weight, **config
    )


def _adamw(
    parameters: list[torch.Tensor], gradient: torch.Tensor, average: torch.Tensor, square: torch.Tensor,
    ema: torch.Tensor, clip: torch.Tensor, rates: list[float], shrinks: list[float],
    beta1: float, beta2: float, inverse_correction: float, eps: float, ema_weight: float,
) -> None:  # fmt: skip
    config = settings("optimizer", clip.device)["adamw"]
    sizes = tuple(p.numel() for p in parameters)
    grid = (sum(triton.cdiv(size, config["BLOCK"]) for size in sizes),)
    adamw_update_kernel[grid](
        tuple(parameters), gradient, average, square, ema, clip, sizes, tuple(rates), tuple(shrinks),
        1.0 - beta1, beta2, 1.0 - beta2, inverse_correction, eps, ema_weight, **config,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- registration
# By schema: torch.library.custom_op around a list of tensors costs the host more than the launch itself.
torch.library.define(
    "golf::muon_momentum",
    "(Tensor[] gradients, Tensor(a!)[] momenta, Tensor clip, float mu, bool row_norm, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "golf::muon_update",
    "(Tensor(a!)[] parameters, Tensor[] updates, Tensor(b!)[] emas, float[] rates, float shrink, float ema_weight) "
    "-> ()",
)
torch.library.define(
    "golf::adamw_update",
    "(Tensor(a!)[] parameters, Tensor gradient, Tensor(b!) average, Tensor(c!) square, Tensor(d!) ema, Tensor clip, "
    "float[] rates, float[] shrinks, float beta1, float beta2, float inverse_correction, float eps, float ema_weight) "
    "-> ()",
)
torch.library.impl("golf::muon_momentum", ("cpu", "cuda"), _momentum)
torch.library.impl("golf::muon_update", ("cpu", "cuda"), _update)
torch.library.impl("golf::adamw_update", ("cpu", "cuda"), _adamw)


@torch.library.register_fake("golf::muon_momentum")
def _(gradients, momenta, clip, mu, row_norm, dtype):
    return clip.new_empty(sum(m.numel() for m in momenta), dtype=dtype)


@torch.library.register_fake("golf::muon_update")
def _(parameters, updates, emas, rates, shrink, ema_weight):
    return None


@torch.library.register_fake("golf::adamw_update")
def _(parameters, gradient, average, square, ema, *rest):
    return None


# ---------------------------------------------------------------------------------------------------------- public
def _check(op: str, masters: dict[str, Sequence[torch.Tensor]], others: dict[str, Sequence[torch.Tensor]]) -> None:
    """Equally many, of the same shapes, contiguous, on one GPU; masters float32."""
    wanted = next(iter(masters.values()))
    lists = masters | others
    for name, tensors in lists.items():
        if len(tensors) != len(wanted) or not tensors:
            raise ValueError(f"{op} wants one of {name} for each of {len(wanted)}, at least one; got {len(tensors)}")
        dtypes = (torch.float32,) if name in masters else (torch.float32, torch.bfloat16)
        for x, like in zip(tensors, wanted, strict=True):
            if x.shape != like.shape or x.dtype not in dtypes or not x.is_contiguous():
                raise ValueError(
                    f"{op} wants {name} contiguous, of one of {dtypes} and of shape {tuple(like.shape)}; "
                    f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()}"
                )
    expect_one_gpu(op, {f"{name}[{i}]": x for name, tensors in lists.items() for i, x in enumerate(tensors)})


def _check_clip(op: str, clip: torch.Tensor, device: torch.device) -> None:
    if clip.numel() != 1 or clip.dtype != torch.float32 or clip.device != device:
        raise ValueError(
            f"{op} wants clip as one float32 on {device}; got {clip.dtype} {tuple(clip.shape)} on {clip.device}"
        )


def muon_momentum(
    gradients: Sequence[torch.Tensor],  # (N, rows, columns) each, float32 or bf16
    momenta: Sequence[torch.Tensor],  # as gradients, float32, changed in place
    clip: torch.Tensor,  # () float32
    mu: float,
    row_norm: bool,
    dtype: torch.dtype,
) -> list[torch.Tensor]:  # as gradients, of dtype: views of one buffer, one after the other
    """reference.muon_momentum, all banks in one launch."""
    _check("muon_momentum", {"momenta": momenta}, {"gradients": gradients})
    _check_clip("muon_momentum", clip, momenta[0].device)
    if any(m.dim() != 3 for m in momenta):
        raise ValueError(f"muon_momentum wants banks (N, rows, columns); got {[tuple(m.shape) for m in momenta]}")
    flat = torch.ops.golf.muon_momentum(list(gradients), list(momenta), clip, mu, row_norm, dtype)
    parts = flat.split([m.numel() for m in momenta])
    return [part.view(m.shape) for part, m in zip(parts, momenta, strict=True)]


def muon_update(
    parameters: Sequence[torch.Tensor],  # float32, changed in place
    updates: Sequence[torch.Tensor],  # as parameters, float32 or bf16
    emas: Sequence[torch.Tensor],  # as parameters, float32, changed in place
    lr: float,
    weight_decay: float,
    scales: Sequence[float],  # one a parameter
    ema_decay: float,
) -> None:
    """reference.muon_update, all tensors in one launch."""
    _check("muon_update", {"parameters": parameters, "emas": emas}, {"updates": updates})
    if len(scales) != len(parameters):
        raise ValueError(f"muon_update wants a scale a parameter; got {len(scales)} for {len(parameters)}")
    rates = [lr * scale for scale in scales]
    torch.ops.golf.muon_update(
        list(parameters), list(updates), list(emas), rates, 1.0 - lr * weight_decay, 1.0 - ema_decay
    )


def adamw_update(
    parameters: Sequence[torch.Tensor],  # float32, changed in place
    gradient: torch.Tensor,  # flat: of all parameters, one after the other; float32 or bf16
    average: torch.Tensor,  # flat, float32, changed in place, as square and ema
    square: torch.Tensor,
    ema: torch.Tensor,
    clip: torch.Tensor,  # () float32
    lrs: Sequence[float],  # one a parameter
    weight_decays: Sequence[float],  # one a parameter
    betas: tuple[float, float],
    eps: float,
    step: int,  # 1 for the first
    ema_decay: float,
) -> None:
    """reference.adamw_update, all parameters in one launch."""
    _check("adamw_update", {"parameters": parameters}, {})
    _check("adamw_update", {"average": [average], "square": [square], "ema": [ema]}, {"gradient": [gradient]})
    _check_clip("adamw_update", clip, parameters[0].device)
    if len(lrs) != len(parameters) or len(weight_decays) != len(parameters) or step < 1:
        raise ValueError(
            f"adamw_update wants an lr and a weight decay a parameter and a step from 1; "
            f"got {len(lrs)} and {len(weight_decays)} for {len(parameters)}, step {step}"
        )
    if average.shape != (sum(p.numel() for p in parameters),) or average.device != parameters[0].device:
        raise ValueError(
            f"adamw_update wants flat tensors with an element for each of {sum(p.numel() for p in parameters)} on "
            f"{parameters[0].device}; got {tuple(average.shape)} on {average.device}"
        )
    beta1, beta2 = betas
    rates = [lr / (1.0 - beta1**step) for lr in lrs]
    shrinks = [1.0 - lr * decay for lr, decay in zip(lrs, weight_decays, strict=True)]
    torch.ops.golf.adamw_update(
        list(parameters), gradient, average, square, ema, clip, rates, shrinks,
        beta1, beta2, (1.0 - beta2**step) ** -0.5, eps, 1.0 - ema_decay,
    )  # fmt: skip
