"""Every op of the model in eager torch: the specification.

What the CPU runs, what tests compare with, what the documentation cites. Tensors are (batch B, tokens T, ...), heads
(B, T, heads, D). Every op keeps the dtype of its input and works in float64, float32, bfloat16 and float16.
The model calls the larger ones, from `embed` to `linear_cross_entropy`: each is what one fused kernel set absorbs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# F.rms_norm's default for half types is float32's epsilon; written out so that no version of torch can change it.
RMS_EPS = torch.finfo(torch.float32).eps
NORM_FLOOR = 1e-12  # of XSA's |v|: F.normalize's default, written out like it

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448

# Newton-Schulz coefficients, one (a, b, c) an iteration. Classic: Muon's, for every iteration. Polar Express (arXiv
# 2505.16932): minimax for these five in this order, as in pull request 1344; its last one serves any further iteration.
CLASSIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def rms_norm(
    x: Tensor,  # (..., D)
    scale: float = 1.0,
) -> Tensor:  # (..., D)
    """x / sqrt(mean(x^2) + eps) * scale, without learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS) * scale


def smear(
    x: Tensor,  # (B, T, D)
    gate: Tensor,  # (D,)
    starts: Tensor | None = None,  # (B, T) bool, True on the first token of a document
) -> Tensor:  # (B, T, D)
    """(1 - g) x_t + g x_{t-1} with g = sigmoid(gate); nothing comes before a row or, with `starts`, a document."""
    g = torch.sigmoid(gate).to(x.dtype)
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    if starts is not None:
        previous = previous.masked_fill(starts[..., None], 0.0)
    return (1 - g) * x + g * previous


def residual_mix(
    x: Tensor,  # (B, T, D)
    x0: Tensor,  # (B, T, D)
    mix: Tensor,  # (2, D)
) -> Tensor:  # (B, T, D)
    """mix[0] x + mix[1] x0."""
    mix = mix.to(x.dtype)
    return mix[0] * x + mix[1] * x0


def skip_mix(
    x: Tensor,  # (B, T, D)
    skip: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    gate: Tensor,  # (D,)
) -> Tensor:  # (B, T, D)
    """s + g (x - s) with s = weight * skip and g = sigmoid(gate): the U-Net skip."""
    s = weight.to(x.dtype) * skip
    return torch.lerp(s, x, torch.sigmoid(gate).to(x.dtype))


def rotary_table(
    length: int,
    rope_dims: int,
    base: float,
    context: int,
    device: torch.device | str | None = None,
    train_length: int = 1024,
) -> tuple[Tensor, Tensor]:  # cos, sin: (length, rope_dims / 2) float32
    """Rotary angles of positions 0..length-1, NTK-rescaled where the context is longer than `train_length`."""
    if context > train_length:
        base = base * (context / train_length) ** (rope_dims / (rope_dims - 2))
    frequency = base ** (-torch.arange(0, rope_dims, 2, dtype=torch.float64, device=device) / rope_dims)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def embed(
    tokens: Tensor,  # (B, T) int64
    weight: Tensor,  # (V, D)
    gate: Tensor,  # (D,)
    starts: Tensor | None,  # (B, T) bool, True on the first token of a document
    dtype: torch.dtype,
) -> Tensor:  # (B, T, D)
    """smear(rms_norm(rows of weight)), in dtype."""
    return smear(rms_norm(F.embedding(tokens, weight).to(dtype)), gate, starts)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def qk_norm_rotary(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, G, D)
    gain: Tensor,  # (H,)
    cos: Tensor,  # (T, R/2)
    sin: Tensor,  # (T, R/2)
) -> tuple[Tensor, Tensor]:  # q (B, T, H, D), k (B, T, G, D)
    """RMS norm of each head, rotary on its first R dimensions (pairs j, j + R/2), then the gain of each head of q."""
    q, k = _rotate(rms_norm(q), cos, sin), _rotate(rms_norm(k), cos, sin)
    return q * gain.to(q.dtype)[:, None], k


def attention_input(
    x: Tensor,  # (B, T, D)
    x0: Tensor,  # (B, T, D)
    mix: Tensor,  # (2, D)
    skip: tuple[Tensor, Tensor, Tensor] | None,  # (B, T, D), weight (D,), gate (D,)
    weight: Tensor,  # ((H + 2 G) d, D): rows of q, then k, then v
    gain: Tensor,  # (H,)
    cos: Tensor,  # (T, R/2)
    sin: Tensor,  # (T, R/2)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # qkv (B, T, H + 2 G, d), mixed x, x0 and x as it came (B, T, D)
    """From the residual stream to attention: skip and residual mix; norm, product, q/k norm, rotary and gain.

    Returns the mixed stream too, and x0 and x as they came: who goes on with these has their gradients gather here.
    """
    came = x
    if skip is not None:
        x = skip_mix(x, *skip)
    x = residual_mix(x, x0, mix)
    heads, head_dim = gain.size(0), x.size(-1) // gain.size(0)
    kv_heads = (weight.size(0) // head_dim - heads) // 2
    qkv = F.linear(rms_norm(x, scale), weight).unflatten(-1, (-1, head_dim))
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    return torch.cat((*qk_norm_rotary(q, k, gain, cos, sin), v), dim=2), x, x0, came


def attention_mask(
    starts: Tensor,  # (B, T) bool, True on the first token of a document
) -> Tensor:  # (B, 1, T, T) bool
    """True where a query (third axis) may see a key: not later, and of the same document."""
    document = starts.cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


def exclusive(
    y: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, G, D)
) -> Tensor:  # (B, T, H, D)
    """Exclusive self-attention (arXiv 2603.09078): y without its component along the same token's value."""
    u = F.normalize(v, dim=-1, eps=NORM_FLOOR).unsqueeze(3)
    heads = y.unflatten(2, (v.size(2), -1))
    return (heads - (heads * u).sum(-1, keepdim=True) * u).flatten(2, 3)


def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, G, D)
    v: Tensor,  # (B, T, G, D)
    mask: Tensor | None = None,  # of attention_mask; None: causal over the whole row
) -> Tensor:  # (B, T, H, D)
    """Causal grouped-query attention, softmax scale 1/sqrt(D), with XSA on its output."""
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return exclusive(y.transpose(1, 2), v)


def attention_qkv(
    qkv: Tensor,  # (B, T, H + 2 G, D): q heads, then k, then v
    kv_heads: int,
    mask: Tensor | None = None,  # of attention_mask
) -> Tensor:  # (B, T, H, D)
    """attention of packed heads."""
    q, k, v = qkv.split((qkv.size(2) - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    return attention(q, k, v, mask)


def attention_layer(
    x: Tensor,  # (B, T, D)
    x0: Tensor,  # (B, T, D)
    mix: Tensor,  # (2, D)
    skip: tuple[Tensor, Tensor, Tensor] | None,  # (B, T, D), weight (D,), gate (D,)
    weight: Tensor,  # ((H + 2 G) d, D): rows of q, then k, then v
    gain: Tensor,  # (H,)
    cos: Tensor,  # (T, R/2)
    sin: Tensor,  # (T, R/2)
    scale: float,
    output: Tensor,  # (D, H d)
    mask: Any = None,  # of attention_mask
    parts: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # x (B, T, D), of linear_add; x0 and x as it came (B, T, D)
    """linear_add, to the mixed x, of attention of attention_input's heads; or other implementations of these three."""
    of_stream, of_heads, add = parts or (attention_input, attention_qkv, linear_add)
    heads, mixed, x0, came = of_stream(x, x0, mix, skip, weight, gain, cos, sin, scale)
    y = of_heads(heads, (heads.size(2) - gain.size(0)) // 2, mask)
    return *add(mixed, y.flatten(2), output), x0, came


def attention_tail(
    qkv: Tensor,  # (B, T, H + 2 G, D): q heads, then k, then v
    kv_heads: int,
    count: int,  # N, at most T
    starts: Tensor | None = None,  # (B, T) bool, True on the first token of a document
) -> Tensor:  # (B, N, H, D)
    """The last `count` queries of attention_qkv, over all keys: what a row needs of whose end alone is asked.

    Queries that share a head of keys stand in one matrix, below each other, so that no backend has to know of groups.
    """
    q, k, v = qkv.split((qkv.size(2) - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    length, group = qkv.size(1), q.size(2) // kv_heads
    rows = q[:, -count:].unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, group N, D)
    mask = q.new_ones(count, length, dtype=torch.bool).tril(length - count)[None]
    if starts is not None:
        document = starts.cumsum(1)
        mask = mask & (document[:, -count:, None] == document[:, None, :])
    mask = mask.repeat(1, group, 1)[:, None]
    y = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    y = y.unflatten(2, (group, count)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return exclusive(y, v[:, -count:])


def cached_attention(
    qkv: Tensor,  # (T, H + 2 G, D) of a row's new tokens: rows of q, then k, then v, as the product gives them
    gain: Tensor,  # (H,)
    cos: Tensor,  # (C, R/2) of all positions
    sin: Tensor,  # (C, R/2)
    position: Tensor,  # (T,) int64
    keys: Tensor,  # (C, G, D) of earlier positions, finite; written at the new ones
    values: Tensor,  # (C, G, D), as keys
) -> Tensor:  # (T, H, D)
    """attention of new tokens to themselves and all before them, after qk_norm_rotary."""
    q, k, v = qkv[None].split((gain.size(0), keys.size(1), keys.size(1)), dim=2)
    q, k = qk_norm_rotary(q, k, gain, cos[position], sin[position])
    keys.index_copy_(0, position, k[0])
    values.index_copy_(0, position, v[0])
    seen = torch.arange(keys.size(0), device=keys.device) <= position[:, None]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys[None].transpose(1, 2), values[None].transpose(1, 2), seen, enable_gqa=True
    )
    return exclusive(y.transpose(1, 2), v)[0]


def linear_add(
    x: Tensor,  # (..., N)
    y: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor | None]:  # (..., N)
    """x + y weight^T; and what a kernel knows of its rows, for `mlp`: sums of their squares. None here."""
    return x + F.linear(y, weight), None


def mlp_hidden(
    x: Tensor,  # (..., D)
    up: Tensor,  # (F, D)
) -> Tensor:  # (..., F)
    """leaky_relu(x up^T, 0.5)^2."""
    return F.leaky_relu(F.linear(x, up), 0.5).square()


def mlp(
    x: Tensor,  # (..., D)
    up: Tensor,  # (F, D)
    down: Tensor,  # (D, F)
    scale: float,
    squares: Tensor | None = None,  # of linear_add; not needed here
) -> Tensor:  # (..., D)
    """x + leaky_relu(rms_norm(x, scale) up^T, 0.5)^2 down^T."""
    return linear_add(x, mlp_hidden(rms_norm(x, scale), up), down)[0]


def e4m3(x: Tensor) -> Tensor:  # as x, and of its dtype
    """The nearest number of fp8's e4m3, which ends at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def unit_rows(
    x: Tensor,  # (..., D)
) -> tuple[Tensor, Tensor]:  # (..., D), (..., 1)
    """What a product in fp8 takes for x: e4m3 of rows brought to length 448; and what x is in units of those.

    No number of such a row is above 448, and no product of two rows above 448^2, whatever they are: nothing saturates,
    no scale has to be measured, kept or guessed."""
    unit = (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt() * (x.size(-1) ** 0.5 / E4M3_MAX)
    return e4m3(x / unit), unit


def mlp_fp8(
    x: Tensor,  # (..., D)
    up: Tensor,  # (F, D)
    down: Tensor,  # (D, F)
    scale: float,
    squares: Tensor | None = None,  # of linear_add; not needed here
) -> Tensor:  # (..., D)
    """mlp with both products of e4m3 numbers, in float32 or wider, rounded once; its gradient is that of mlp as if they
    were exact.

    a = leaky_relu(u, 0.5)^2 is divided by what it would be of parallel x and row of up, over 448; the columns of down
    are multiplied by as much.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, up, down = x.to(wide), up.to(wide), down.to(wide)
    x8, _ = unit_rows(x)
    up8, unit = unit_rows(up)
    factor = unit[:, 0] * (scale * x.size(-1) ** 0.5 / E4M3_MAX)
    u = _valued(F.linear(rms_norm(x, scale), up), F.linear(x8, up8) * factor)
    a, a_unit = F.leaky_relu(u, 0.5).square(), factor.square() * E4M3_MAX**3
    down8, unit = unit_rows(down * a_unit)
    y = _valued(F.linear(a, down), F.linear(e4m3(a / a_unit), down8) * unit[:, 0])
    return (x + y).to(dtype)


def _valued(exact: Tensor, value: Tensor) -> Tensor:
    """value, with the gradient of exact."""
    return exact + (value - exact).detach()


def logits(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    softcap: float,
) -> Tensor:  # (..., V) float32; float64 of float64
    """softcap * tanh(x weight^T / softcap) in that dtype."""
    return softcapped(F.linear(x, weight), softcap)


def softcapped(
    x: Tensor,  # (..., V)
    softcap: float,
) -> Tensor:  # (..., V) float32; float64 of float64
    """softcap * tanh(x / softcap) in that dtype."""
    return softcap * torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32)) / softcap)


def linear_cross_entropy(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) int64
    softcap: float,
    reduction: str = "mean",
) -> Tensor:  # () or, with reduction "none", (...) float32
    """Cross-entropy in nats of the softcapped logits."""
    losses = F.cross_entropy(logits(x, weight, softcap).flatten(0, -2), targets.flatten(), reduction=reduction)
    return losses if reduction == "mean" else losses.view_as(targets)


def newton_schulz(
    banks: Sequence[Tensor],  # (N, rows, columns) each
    coefficients: Sequence[tuple[float, float, float]],
) -> list[Tensor]:  # as banks
    """Nearest semi-orthogonal matrices, roughly: X <- a X + (b A + c A^2) X with A = X X^T, from X = g / |g|_F.

    Works on the side with fewer rows. Singular values end near 1, within the band of the coefficients.
    """
    found = []
    for g in banks:
        tall = g.size(-2) > g.size(-1)
        x = g.mT if tall else g
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        found.append(x.mT if tall else x)
    return found


def pack_codes(
    codes: Tensor,  # (..., rows, columns) int8 in -31..31
) -> Tensor:  # (..., rows, 3, Q) uint8, Q = 16 ceil(columns / 64)
    """Six bits a code, which is kept with 32 added. A row's columns, filled up with code 0 to 4 Q, are four quarters.

    Byte j of plane 0 holds the low four bits of the codes j and Q + j, the former in its lower half; byte j of plane 1
    those of 2 Q + j and 3 Q + j; byte j of plane 2 the high two bits of all four, the first in its lowest bits.
    Raises ValueError where a code is out of range.
    """
    least, most = (int(x) for x in codes.aminmax()) if codes.numel() else (0, 0)
    if least < -31 or most > 31:
        raise ValueError(f"pack_codes wants codes in -31..31; got {least} to {most}")
    stride = 16 * -(-codes.size(-1) // 64)
    codes = F.pad(codes, (0, 4 * stride - codes.size(-1))) + 32
    a, b, c, d = codes.view(torch.uint8).unflatten(-1, (4, stride)).unbind(-2)
    low = (x & 15 for x in (a, b, c, d))
    high = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6
    first, second, third, fourth = low
    return torch.stack((first | second << 4, third | fourth << 4, high), dim=-2)


def unpack_codes(
    packed: Tensor,  # (..., rows, 3, Q) uint8
    columns: int,
) -> Tensor:  # (..., rows, columns) int8
    """The codes that pack_codes packed."""
    first, second, high = packed.unbind(-2)
    low = (first & 15, first >> 4, second & 15, second >> 4)
    codes = torch.cat([x | (high >> 2 * i & 3) << 4 for i, x in enumerate(low)], dim=-1)
    return codes[..., :columns].view(torch.int8) - 32


def dequantise(
    codes: Tensor,  # (rows, columns) int8
    scales: Tensor,  # (rows,)
    dtype: torch.dtype,
) -> Tensor:  # (rows, columns)
    """codes * scales, multiplied in float32."""
    return (codes.float() * scales.float()[:, None]).to(dtype)


def int6_dequantise(
    codes: Tensor,  # (rows, 3, Q) uint8 of pack_codes, or (rows, columns) int8
    scales: Tensor,  # (rows,)
    gain: Tensor | None,  # (rows,) float32; None: 1
    columns: int,
    dtype: torch.dtype,
) -> Tensor:  # (rows, columns)
    """gain * (codes * scales), multiplied in float32."""
    codes = unpack_codes(codes, columns) if codes.dtype == torch.uint8 else codes
    weight = dequantise(codes, scales, torch.float32)
    return (weight if gain is None else gain[:, None] * weight).to(dtype)


def int6_linear(
    x: Tensor,  # (..., columns)
    codes: Tensor,  # (rows, 3, Q) uint8 of pack_codes, or (rows, columns) int8
    scales: Tensor,  # (rows,)
    gain: Tensor | None = None,  # (rows,) float32
) -> Tensor:  # (..., rows)
    """x times the transposed dequantised matrix."""
    return F.linear(x, int6_dequantise(codes, scales, gain, x.size(-1), x.dtype))


def gptq_block(
    w: Tensor,  # (N, B, rows) float32: a column a row
    upper: Tensor,  # (N, B, B) float32, upper triangular
    scales: Tensor,  # (N, rows) float32
    codes: Tensor,  # (N, B, rows) int8, written
    levels: int,
) -> Tensor:  # errors (N, B, rows) float32
    """GPTQ of B columns, one after the other: each is rounded, less its share of the errors of those before it.

    An error is what rounding changed, over the column's place on upper's diagonal.
    """
    weights_of = upper.mT.contiguous()  # row j: what column j takes of the errors before it
    errors, step = torch.empty_like(w), scales[:, None]
    for j in range(w.size(1)):
        column = w[:, j : j + 1]
        if j:
            column = torch.baddbmm(column, weights_of[:, j : j + 1, :j], errors[:, :j], alpha=-1)
        code = (column / step).round_().clamp_(-levels, levels)
        codes[:, j : j + 1] = code
        pivot = upper[:, j, j, None, None]
        torch.div(torch.addcmul(column, code, step, value=-1), pivot, out=errors[:, j : j + 1])
    return errors


def muon_momentum(
    gradients: Sequence[Tensor],  # (N, rows, columns) each
    momenta: Sequence[Tensor],  # as gradients, float32, changed in place
    clip: Tensor,  # () float32
    mu: float,
    row_norm: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # as gradients, of dtype
    """m <- mu m + g and Nesterov's u = g + mu m, with g = clip * gradient; row_norm: each row of u over its length."""
    found = []
    for gradient, momentum in zip(gradients, momenta, strict=True):
        g = gradient.to(momentum.dtype) * clip
        momentum.mul_(mu).add_(g)
        u = g.add(momentum, alpha=mu)
        if row_norm:
            u = u / (u.norm(dim=-1, keepdim=True) + 1e-7)
        found.append(u.to(dtype))
    return found


def muon_update(
    parameters: Sequence[Tensor],  # float32, changed in place
    updates: Sequence[Tensor],  # as parameters
    emas: Sequence[Tensor],  # as parameters, changed in place
    lr: float,
    weight_decay: float,
    scales: Sequence[float],  # one a parameter
    ema_decay: float,
) -> None:
    """p <- (1 - lr weight_decay) p - lr scale u; then the EMA, e <- e + (1 - ema_decay) (p - e)."""
    for parameter, update, ema, scale in zip(parameters, updates, emas, scales, strict=True):
        parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(update.to(parameter.dtype), alpha=-lr * scale)
        ema.lerp_(parameter, 1.0 - ema_decay)


def adamw_update(
    parameters: Sequence[Tensor],  # float32, changed in place
    gradient: Tensor,  # flat: of all parameters, one after the other
    average: Tensor,  # flat, changed in place, as square and ema
    square: Tensor,
    ema: Tensor,
    clip: Tensor,  # () float32
    lrs: Sequence[float],  # one a parameter
    weight_decays: Sequence[float],  # one a parameter
    betas: tuple[float, float],
    eps: float,
    step: int,  # 1 for the first
    ema_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101) on clip * gradient, as torch.optim.AdamW; then the EMA."""
    beta1, beta2 = betas
    sizes = [p.numel() for p in parameters]
    g = gradient.to(average.dtype) * clip
    average.lerp_(g, 1.0 - beta1)
    square.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    change = (average / (square.sqrt() / (1.0 - beta2**step) ** 0.5 + eps)).split(sizes)
    for p, x, e, lr, decay in zip(parameters, change, ema.split(sizes), lrs, weight_decays, strict=True):
        p.mul_(1.0 - lr * decay).add_(x.view_as(p), alpha=-lr / (1.0 - beta1**step))
        e.lerp_(p.flatten(), 1.0 - ema_decay)
