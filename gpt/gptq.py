"""GPTQ: weights to integer codes such that the products with the inputs seen in calibration change least.

For a matrix W (rows, columns) with inputs X (tokens, columns), GPTQ (arXiv 2210.17323) rounds column after column and
moves each column's error onto the columns not yet rounded, through the upper Cholesky factor of H^-1 with H = X^T X.
The scale of a row is clip_sigmas * std(row) / levels (SDClip, pull request 1394 of openai/parameter-golf) to SCALE_BITS
bits, floored only against zero.

Where SDClip has one clip for all rows, `balanced_clips` gives every row its own. Rounding column i of a row off by q[i]
moves the row, once GPTQ has handed the error on, by q[i] v[i], v[i] = row i of that factor over its diagonal. To second
order errors e raise the loss by mean((g . e)^2) / 2, g the gradients of texts (Fisher information), and with q uniform
in a step s that is s^2 / 24 times the row's energy = sum over i of mean((g . v[i])^2): no assumption but that the q are
independent. A weight costs log2(1 / s) bits and a constant, so that the least loss for given bits has the same
energy[r] s[r]^2 in all rows of all parameters: s[r] ~ energy[r]^-1/2. The coder makes bits continuous in the step, so
nothing is gained by widths of 5, 6, 7 and 8 bits. No step is so fine that a weight lies beyond the largest code: to cut
one off costs more than all roundings of its row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpt.config import Config
from gpt.distributed import Ranks
from gpt.model import BANKS, GPT
from kernels import reference

IntKind = Literal["int6", "int8"]
LEVELS: dict[IntKind, int] = {"int6": 31, "int8": 127}  # largest code of a kind; the smallest is its negative
BLOCK = 128  # columns between two updates of all the columns that remain
# Significant bits of a scale, so that it is within 3% of SDClip's. What one row loses in error it gains in bytes;
# float16's eleven bits would cost 0.2% of the artifact more.
SCALE_BITS = 5
FLOOR = 0.1  # of the mean energy of a matrix, added to each: a token that no calibration text had will occur
SHARE = 3  # one row in so many of every second calibration batch is differentiated, all of a batch in one pass
DAMPING = (0.01, 0.1, 1.0)  # of the mean of diag(H), added to it: the usual one, then what is tried where that fails

# The kinds of input behind each quantised parameter: a bank holds all layers of the first kind, then of the next.
INPUTS = {
    "qo_bank": ("qkv", "o"),
    "kv_bank": ("qkv", "qkv"),
    "mlp_up_bank": ("up",),
    "mlp_down_bank": ("down",),
    "tok_emb": ("head",),
}

Energies = dict[str, Tensor]  # parameter -> (..., rows) float32
Hessians = dict[tuple[str, int], Tensor]  # (kind, physical layer) -> (columns, columns) float32


class QuantisationError(ValueError):
    """Weights or calibration inputs cannot be quantised, or the result cannot be made to fit."""


class Quantised(NamedTuple):
    """A parameter as integers: codes * scales, row by row."""

    kind: IntKind
    codes: Tensor  # (..., rows, columns) int8
    scales: Tensor  # (..., rows) float16

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:  # (..., rows, columns)
        codes = self.codes.flatten(0, -2)
        return reference.dequantise(codes, self.scales.flatten(), dtype).view_as(self.codes)


class Factor(NamedTuple):
    """What GPTQ needs of N Hessians."""

    order: Tensor  # (N, columns) int64: columns by falling diag(H)
    upper: Tensor  # (N, columns, columns) float32 U with U^T U = H^-1, in that order

    def directions(self) -> Tensor:
        """(N, columns, columns) float32: row i is how GPTQ moves a row of weights for each unit that it rounds the i-th
        column in its order off by."""
        moves = self.upper / self.upper.diagonal(dim1=-2, dim2=-1)[..., None]
        return moves.gather(2, self.order.argsort(-1)[:, None, :].expand_as(moves))


class Calibration(NamedTuple):
    """What texts say about a model."""

    hessians: Hessians
    factors: dict[str, Factor]
    energies: Energies


@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 products in float32: TF32 would keep ten bits of the errors that GPTQ hands on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gram(x: Tensor) -> Tensor:  # (tokens, columns) -> (columns, columns) float32
    # bf16 products are exact in float32, so on a GPU only the order of the float32 sum is up to the hardware.
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x.mT, x, out_dtype=torch.float32)
    return x.float().mT @ x.float()


def _eager(model: GPT) -> GPT:
    """The same parameters, to be run without a graph."""
    runner = copy.copy(model)
    runner.ops = model.ops.reproducible()
    if model.config.document_mask:
        # FlexAttention outside a graph is the slow fall-back that stores all scores.
        runner.ops = replace(runner.ops, attention=model.ops.graph(runner.ops.attention))
    return runner


@torch.no_grad()
def collect_hessians(model: GPT, depth: Sequence[int], batches: Iterable[Tensor], ranks: Ranks) -> Hessians:
    """H = X^T X of the input of every matrix of the very model that is exported, summed over batches and ranks.

    batches: this rank's, each (rows, T) int64 on the model's device. A layer that `depth` visits twice contributes both
    visits; q, k and v share the kind "qkv"; ("head", 0) is the embedding's as output head. The model runs eagerly,
    except that document-masked attention is compiled where the model's ops are. No host synchronisation a batch. Raises
    QuantisationError where no rank had a batch.
    """
    config = model.config
    columns = dict.fromkeys(("qkv", "o", "up"), config.model_dim) | {"down": config.mlp_dim}
    shapes = {(kind, layer): size for layer in range(config.num_layers) for kind, size in columns.items()}
    shapes["head", 0] = config.model_dim
    hessians = {key: torch.zeros(size, size, device=ranks.device) for key, size in shapes.items()}

    def tap(kind: str, layer: int, x: Tensor) -> None:
        hessians[kind, layer] += _gram(x.flatten(0, -2))

    runner = _eager(model)
    with _full_float32():
        for tokens in batches:
            runner.hidden(tokens, depth, model.rotary(tokens.size(1)), tap)
    for hessian in hessians.values():
        ranks.all_reduce(hessian)
    if not hessians["head", 0].any():
        raise QuantisationError("no calibration batches: wanted at least one on some rank")
    return hessians


def collect_energies(
    model: GPT, depth: Sequence[int], texts: Iterable[Tensor], factors: Mapping[str, Factor], ranks: Ranks
) -> Energies:
    """For every row of each quantised parameter the sum of squares of its gradient along the directions in which GPTQ
    errs, summed over texts and ranks: its energy but for a constant.

    texts: this rank's, each (rows, T + 1) int64 on the model's device, few: every one takes a backward pass. Their rows
    count as if each were a text, since gradients of different rows hardly correlate. Not on the tape: gradients of the
    parameters stay as they are.
    """
    runner, weights = _eager(model), [model.get_parameter(name) for name in INPUTS]
    directions = [factors[name].directions() for name in INPUTS]
    energies = [torch.zeros(weight.shape[:-1], device=ranks.device) for weight in weights]
    for tokens in texts:
        inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()  # contiguous and aligned
        loss = len(tokens) * runner(inputs, targets, depth, model.rotary(inputs.size(1)))
        for energy, along, gradient in zip(energies, directions, torch.autograd.grad(loss, weights), strict=True):
            parts = gradient.float().view(len(along), -1, gradient.size(-1)) @ along.mT
            energy += parts.square().sum(-1).view_as(energy)
    for energy in energies:
        ranks.all_reduce(energy)
    return dict(zip(INPUTS, energies, strict=True))


def calibrate(model: GPT, depth: Sequence[int], batches: Iterable[Tensor], ranks: Ranks) -> Calibration:
    """Hessians from all rows of this rank's batches, (rows, T + 1) int64 on the device; energies from the first ones of
    every second batch, one in SHARE.

    batches: of all ranks' every world_size-th from the rank-th on; the same rows count for any number of ranks. Raises
    QuantisationError where no rank had a batch, or a Hessian has no factor.
    """
    few: list[Tensor] = []

    def inputs() -> Iterator[Tensor]:
        for number, batch in enumerate(batches):
            if (ranks.rank + number * ranks.world_size) % 2 == 0:
                few.append(batch[: -(-len(batch) // SHARE)].clone())
            yield batch[:, :-1].contiguous()

    hessians = collect_hessians(model, depth, inputs(), ranks)
    factors = parameter_factors(hessians, model.config)
    return Calibration(hessians, factors, collect_energies(model, depth, few, factors, ranks))


def stacked(hessians: Hessians, config: Config) -> dict[str, Tensor]:
    """Hessians by kind: (layers, columns, columns), (1, columns, columns) for the head."""
    return {
        kind: torch.stack([hessians[kind, i] for i in range(1 if kind == "head" else config.num_layers)])
        for kind in ("qkv", "o", "up", "down", "head")
    }


def factorise(
    hessian: Tensor,  # (N, columns, columns)
) -> Factor:
    """Order of columns and U = upper Cholesky factor of (H + damping)^-1, in float64.

    With R upper triangular and R R^T = H (a Cholesky factor taken from the last column to the first), U = R^-1: one
    factorisation and no explicit inverse of H. An input that was never active has a zero row in H and so neither gives
    nor takes errors. Raises QuantisationError where H is not finite or not positive definite at any step of DAMPING.
    """
    h = hessian.double()
    if not h.isfinite().all():
        raise QuantisationError("Hessian is not finite: the model's activations on calibration data overflow")
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    mean = torch.where(mean > 0, mean, 1.0)
    order = diagonal.argsort(stable=True, dim=-1, descending=True)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device)
    for damping in DAMPING:
        damped = h + (damping * mean)[:, None, None] * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(-2, -1))
        if not failed.any():
            upper = torch.linalg.solve_triangular(lower.flip(-2, -1), eye.expand_as(h), upper=True)
            return Factor(order, upper.float().contiguous())
    raise QuantisationError(
        f"Hessian {int(failed.nonzero()[0])} of {len(h)} is not positive definite even with {DAMPING[-1]:g} of its "
        "mean diagonal added"
    )


def parameter_factors(hessians: Hessians, config: Config) -> dict[str, Factor]:
    """The factor of each quantised parameter, one Hessian a matrix. Each distinct Hessian is factorised once."""
    by_kind = {kind: factorise(hessian) for kind, hessian in stacked(hessians, config).items()}
    return {
        name: Factor(
            torch.cat([by_kind[kind].order for kind in kinds]), torch.cat([by_kind[kind].upper for kind in kinds])
        )
        for name, kinds in INPUTS.items()
    }


def balanced_clips(
    weights: Mapping[str, Tensor],  # (..., rows, columns)
    kinds: Mapping[str, IntKind],
    energies: Energies,
) -> dict[str, Tensor]:  # (..., rows) float32
    """Clips at which every bit buys the same loss, as multiples of the median over all rows of matrices.

    weights: all that are quantised. Raises QuantisationError where gradients are not finite.
    """
    clips: dict[str, Tensor] = {}
    for name, weight in weights.items():
        energy = energies[name].double()
        energy = (energy + FLOOR * energy.mean(-1, keepdim=True)).clamp_min(1e-30)
        clips[name] = LEVELS[kinds[name]] / weight.double().std(-1).clamp_min(1e-30) * energy.rsqrt()
        if not clips[name].isfinite().all():
            raise QuantisationError(f"{name}: gradients on calibration data are not finite")
    median = torch.cat([clip.flatten() for name, clip in clips.items() if name in BANKS]).median()
    return {name: (clip / median).clamp_max(1e4).float() for name, clip in clips.items()}


def finest_clips(weight: Tensor) -> Tensor:  # (..., rows, columns) -> (..., rows)
    """Clips at which the codes just reach a row's largest weight."""
    weight = weight.float()
    return weight.abs().amax(-1) / weight.std(-1).clamp_min(1e-30)


def row_scales(
    weight: Tensor,  # (..., rows, columns)
    clip_sigmas: float | Tensor,  # one, or (..., rows)
    levels: int,
) -> Tensor:  # (..., rows) float16
    """clip_sigmas * std(row) / levels to SCALE_BITS bits, at least the smallest positive float16.

    Raises QuantisationError where that is no float16 number.
    """
    mantissa, exponent = torch.frexp(clip_sigmas * weight.float().std(-1) / levels)
    scales = torch.ldexp((mantissa * 2**SCALE_BITS).round() / 2**SCALE_BITS, exponent).to(torch.float16)
    if not scales.isfinite().all():
        raise QuantisationError(f"a row of a {tuple(weight.shape)} parameter is not finite or exceeds float16's range")
    return scales.clamp_min(2.0**-24)


@torch.no_grad()
def gptq(
    weight: Tensor,  # (N, rows, columns)
    factor: Factor,
    scales: Tensor,  # (N, rows) float16
    levels: int,
    block: Callable[..., Tensor] = reference.gptq_block,
) -> Tensor:  # (N, rows, columns) int8
    """Codes of N matrices at once, on their device: for every BLOCK of columns an op and a large product."""
    rows, columns = weight.shape[1:]
    # Transposed, so that a column is contiguous.
    w = weight.float().mT.gather(1, factor.order[:, :, None].expand(-1, -1, rows))  # (N, columns, rows)
    step, upper = scales.float(), factor.upper
    codes = torch.empty_like(w, dtype=torch.int8)
    with _full_float32():
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            errors = block(w[:, start:end], upper[:, start:end, start:end], step, codes[:, start:end], levels)
            if end < columns:
                w[:, end:].baddbmm_(upper[:, start:end, end:].mT, errors, alpha=-1)
    place = factor.order.argsort(-1)[:, :, None].expand(-1, -1, rows)
    return codes.gather(1, place).mT.contiguous()


def quantise(
    weight: Tensor,  # (rows, columns) or (N, rows, columns)
    factor: Factor,
    clip_sigmas: float | Tensor,  # one, or (..., rows)
    kind: IntKind,
    block: Callable[..., Tensor] = reference.gptq_block,
) -> Quantised:  # on the CPU
    """GPTQ of a parameter with SDClip scales; block: the op of that name. Raises QuantisationError where a row is not
    finite."""
    scales = row_scales(weight, clip_sigmas, LEVELS[kind])
    bank = weight.view(-1, *weight.shape[-2:])
    codes = gptq(bank, factor, scales.view(bank.shape[:2]), LEVELS[kind], block)
    return Quantised(kind, codes.view(weight.shape).cpu(), scales.cpu())


def without_dead_neurons(up: Quantised, down: Quantised) -> Quantised:
    """`up` with zeros in the rows of neurons whose whole column of `down` is zero.

    Whatever such a neuron computes reaches nothing, so the model computes the same, bit for bit; rows of zeros, alike
    in their scale too, take next to no bytes.
    """
    dead = (down.codes == 0).all(-2)  # (layers, neurons)
    return up._replace(codes=up.codes.masked_fill(dead[..., None], 0), scales=up.scales.masked_fill(dead, 2.0**-24))


@torch.no_grad()
def output_error(
    weight: Tensor,  # (N, rows, columns)
    quantised: Tensor,  # (N, rows, columns)
    hessian: Tensor,  # (N, columns, columns)
) -> float:
    """|X (W - Wq)^T| / |X W^T|, Frobenius norms over all matrices: what GPTQ keeps small."""

    def energy(w: Tensor) -> Tensor:
        return ((w @ hessian) * w).sum(dtype=torch.float64)

    with _full_float32():
        ratio = energy(weight - quantised) / energy(weight).clamp_min(torch.finfo(torch.float64).tiny)
    return float(ratio.clamp_min(0).sqrt())
