"""The quantiser against GPTQ written out plainly, its Hessians against inputs caught in flight, and the size search."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt import artifact, pack
from gpt.gptq import (
    FLOOR,
    INPUTS,
    LEVELS,
    SCALE_BITS,
    Calibration,
    QuantisationError,
    Quantised,
    balanced_clips,
    calibrate,
    collect_energies,
    collect_hessians,
    factorise,
    finest_clips,
    gptq,
    output_error,
    parameter_factors,
    quantise,
    row_scales,
    without_dead_neurons,
)
from gpt.model import BANKS
from tests.tiny import ALONE, Meeting, ThreadRanks, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(matrices: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights (N, rows, columns) and Hessians (N, columns, columns) of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(matrices, rows, columns, generator=generator) * 0.05
    mix = torch.randn(matrices, columns // 4, columns, generator=generator)
    x = torch.randn(matrices, 4 * columns, columns // 4, generator=generator) @ mix
    x += 0.5 * torch.randn(x.shape, generator=generator)
    x *= torch.rand(columns, generator=generator) + 0.1
    return weight, x.mT @ x


def round_to_nearest(weight: Tensor, scales: Tensor, levels: int) -> Tensor:
    return (weight / scales.float()[..., None]).round().clamp(-levels, levels).to(torch.int8)


def plain_gptq(weight: Tensor, hessian: Tensor, scales: Tensor, levels: int) -> Tensor:
    """One matrix, one column at a time, in float64."""
    w, h, s = weight.double().clone(), hessian.double().clone(), scales.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    order = hessian.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(h)).mT
    codes = torch.zeros_like(w)
    for j in range(w.size(1)):
        codes[:, j] = (w[:, j] / s).round().clamp(-levels, levels)
        error = (w[:, j] - codes[:, j] * s) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
    return codes[:, order.argsort()].to(torch.int8)


def test_gptq_is_plain_gptq() -> None:
    weight, hessian = correlated(2, 40, 300)  # two whole blocks of columns and a part
    scales = row_scales(weight, 12.85, 31)
    codes = gptq(weight, factorise(hessian), scales, 31)
    plain = torch.stack([plain_gptq(w, h, s, 31) for w, h, s in zip(weight, hessian, scales, strict=True)])
    # Rounding differs where float32 and float64 fall on two sides of a tie, and the errors handed on after it.
    assert (codes != plain).float().mean() < 0.01
    found, wanted = (output_error(weight, c.float() * scales.float()[..., None], hessian) for c in (codes, plain))
    assert found == pytest.approx(wanted, rel=0.01)


def test_gptq_beats_rounding_on_the_output() -> None:
    weight, hessian = correlated(3, 64, 256)
    scales = row_scales(weight, 12.85, 31)
    step = scales.float()[..., None]
    ours = output_error(weight, gptq(weight, factorise(hessian), scales, 31) * step, hessian)
    rounded = output_error(weight, round_to_nearest(weight, scales, 31) * step, hessian)
    assert ours < 0.6 * rounded


def test_scales_follow_the_row_without_floor() -> None:
    sizes = torch.tensor([1e-4, 1e-2, 1.0, 0.0])
    weight = sizes[:, None] * torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    scales = row_scales(weight, 12.85, 31)
    torch.testing.assert_close(scales.float()[:3], 12.85 * weight.std(-1)[:3] / 31, rtol=2**-SCALE_BITS, atol=0)
    assert ((torch.frexp(scales.float())[0] * 2**SCALE_BITS) % 1 == 0).all()
    assert 0 < scales[3] < 1e-7
    assert scales.dtype == torch.float16
    quantised = quantise(weight, factorise(torch.eye(512)[None]), 12.85, "int6")
    error = (quantised.dequantise() - weight).norm(dim=-1) / weight.norm(dim=-1)
    assert (error[:3] < 0.15).all()
    assert not quantised.codes[3].any()


def test_dead_inputs_round_to_nearest_and_disturb_nothing() -> None:
    weight, hessian = correlated(1, 16, 64)
    dead = torch.tensor([3, 40])
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    scales = row_scales(weight, 9.5, 31)
    codes = gptq(weight, factorise(hessian), scales, 31)
    assert torch.equal(codes[..., dead], round_to_nearest(weight, scales, 31)[..., dead])
    nothing = gptq(weight, factorise(torch.zeros_like(hessian)), scales, 31)
    assert torch.equal(nothing, round_to_nearest(weight, scales, 31))


def test_bad_hessians() -> None:
    x = torch.randn(4, 32)
    good = x.mT @ x  # rank 4 of 32: the usual damping is enough
    assert factorise(good[None]).upper.isfinite().all()
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.05  # lowest eigenvalue -0.05: needs the second step of damping
    assert factorise(indefinite[None]).upper.isfinite().all()
    indefinite[0, 1] = indefinite[1, 0] = 9.0
    with pytest.raises(QuantisationError, match="Hessian 1 of 2 is not positive definite"):
        factorise(torch.stack([torch.eye(8), indefinite]))
    with pytest.raises(QuantisationError, match="not finite"):
        factorise(torch.full((1, 8, 8), torch.nan))
    with pytest.raises(QuantisationError, match="not finite"):
        row_scales(torch.full((2, 8), torch.inf), 9.5, 31)


class LinearInputs(TorchFunctionMode):
    """Inputs of every F.linear, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            self.inputs.append(args[0].flatten(0, -2))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("document_mask", [False, True])
def test_hessians_are_those_of_the_running_model(document_mask: bool) -> None:
    config = tiny_config(document_mask=document_mask)
    model, depth = tiny_model(config), config.depth(True)
    batches = [random_tokens(64, 64, seed).view(4, 16) for seed in range(3)]
    hessians = collect_hessians(model, depth, batches, ALONE)
    wanted: dict[tuple[str, int], Tensor] = {}
    for tokens in batches:
        with LinearInputs() as caught, torch.no_grad():
            head = model.hidden(tokens, depth, model.rotary(16)).flatten(0, -2)
        kinds = [(kind, layer) for layer in depth for kind in ("qkv", "o", "up", "down")]
        for key, x in zip([*kinds, ("head", 0)], [*caught.inputs, head], strict=True):
            wanted[key] = wanted.get(key, 0) + x.double().mT @ x.double()
    assert hessians.keys() == wanted.keys()
    for key, hessian in hessians.items():
        torch.testing.assert_close(hessian.double(), wanted[key], rtol=1e-4, atol=1e-4 * float(wanted[key].abs().max()))
    # Layer 1 runs twice: twice the inputs of its neighbours, whose every input has the same norm.
    ratio = hessians["qkv", 1].trace() / (2 * hessians["qkv", 2].trace() * 3 / 2)
    assert float(ratio) == pytest.approx(1.0, rel=1e-3)


def test_no_calibration_batch_is_an_error() -> None:
    config = tiny_config()
    with pytest.raises(QuantisationError, match="no calibration batches"):
        collect_hessians(tiny_model(config), config.depth(True), [], ALONE)


def test_energies_are_squared_gradients_along_the_directions_of_errors() -> None:
    config = tiny_config()
    model, depth = tiny_model(config), config.depth(True)
    texts = [random_tokens(17 * rows, 64, rows).view(rows, 17) for rows in (1, 2)]
    hessians = collect_hessians(model, depth, texts, ALONE)
    factors = parameter_factors(hessians, config)
    energies = collect_energies(model, depth, texts, factors, ALONE)
    assert all(parameter.grad is None for parameter in model.parameters())
    wanted = {name: torch.zeros(energy.shape) for name, energy in energies.items()}
    for tokens in texts:
        model.zero_grad()
        (len(tokens) * model(tokens[:, :-1], tokens[:, 1:], depth, model.rotary(16))).backward()
        for name, energy in wanted.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            order, upper = factors[name]
            for sums, g, o, u in zip(
                energy.view(len(order), -1), gradient.view(len(order), -1, len(order[0])), order, upper, strict=True
            ):
                sums += ((g[:, o] @ u.mT) / u.diagonal()).square().sum(-1)
    assert energies.keys() == INPUTS.keys()
    for name, energy in energies.items():
        torch.testing.assert_close(energy, wanted[name])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_calibration_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    """Hessians of all rows; energies of the first third of every second batch, whichever rank has it."""
    config = tiny_config()
    model, depth = tiny_model(config), config.depth(True)
    batches = [random_tokens(8 * 17, 64, seed).view(8, 17) for seed in range(5)]
    hessians = collect_hessians(model, depth, [batch[:, :-1] for batch in batches], ALONE)
    factors = parameter_factors(hessians, config)
    energies = collect_energies(model, depth, [batch[:3] for batch in batches[::2]], factors, ALONE)
    meeting = Meeting(world_size)

    def one(rank: int) -> Calibration:
        return calibrate(model, depth, batches[rank::world_size], ThreadRanks(rank, meeting))

    with ThreadPoolExecutor(world_size) as threads:
        for found in threads.map(one, range(world_size)):
            for key, hessian in hessians.items():
                torch.testing.assert_close(found.hessians[key], hessian, rtol=1e-5, atol=1e-4)
            for name, energy in energies.items():
                torch.testing.assert_close(found.energies[name], energy, rtol=1e-3, atol=1e-4 * float(energy.max()))


def test_errors_go_along_their_directions() -> None:
    """What GPTQ leaves of a row is in the span of small multiples of them: each at most half a step."""
    weight, hessian = correlated(2, 24, 160)
    factor = factorise(hessian)
    scales = row_scales(weight, weight.abs().amax(-1) / weight.std(-1) * 2, 31)  # nothing is cut off
    errors = weight - gptq(weight, factor, scales, 31) * scales.float()[..., None]
    rounded = torch.linalg.solve(factor.directions().double(), errors.double(), left=False) / scales.double()[..., None]
    assert float(rounded.abs().max()) < 0.501
    assert float(rounded.square().mean()) == pytest.approx(1 / 12, rel=0.05)


def test_balanced_clips_give_every_bit_the_same_worth() -> None:
    """Predicted loss of a row: its energy times the square of its step."""
    model = tiny_model(tiny_config())
    weights = {name: model.get_parameter(name).detach() for name in INPUTS}
    generator = torch.Generator().manual_seed(2)
    energies = {name: torch.rand(weight.shape[:-1], generator=generator) + 0.1 for name, weight in weights.items()}
    clips = balanced_clips(weights, pack.KINDS, energies)
    assert float(torch.cat([clips[name].flatten() for name in BANKS]).median()) == pytest.approx(1.0)
    worths = []
    for name, weight in weights.items():
        step = clips[name] * weight.std(-1) / LEVELS[pack.KINDS[name]]
        energy = energies[name]
        worths.append((step**2 * (energy + FLOOR * energy.mean(-1, keepdim=True))).flatten())
    torch.testing.assert_close(torch.cat(worths), worths[0][0].expand(torch.cat(worths).shape), rtol=1e-4, atol=0)
    energies["kv_bank"][0, 0] = torch.nan
    with pytest.raises(QuantisationError, match="kv_bank: gradients on calibration data are not finite"):
        balanced_clips(weights, pack.KINDS, energies)


def test_the_finest_clip_cuts_nothing_off() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)) ** 3
    step = row_scales(weight, finest_clips(weight), 31).float()
    assert (weight.abs().amax(-1) / step).sub(31).abs().max() < 31 * 2.0**-SCALE_BITS


def test_a_bank_is_quantised_with_each_matrix_own_hessian() -> None:
    config = tiny_config()
    model, depth = tiny_model(config), config.depth(True)
    hessians = collect_hessians(model, depth, [random_tokens(640, 64).view(40, 16)], ALONE)
    factors = parameter_factors(hessians, config)
    for name, places in {
        "qo_bank": [("qkv", 0), ("qkv", 1), ("qkv", 2), ("o", 0), ("o", 1), ("o", 2)],
        "kv_bank": [("qkv", 0), ("qkv", 1), ("qkv", 2)] * 2,
        "mlp_down_bank": [("down", 0), ("down", 1), ("down", 2)],
        "tok_emb": [("head", 0)],
    }.items():
        weight = model.get_parameter(name).detach().view(len(places), -1, model.get_parameter(name).size(-1))
        scales = row_scales(weight, 9.5, 31)
        codes = gptq(weight, factors[name], scales, 31)
        for i, place in enumerate(places):
            assert (codes[i] != plain_gptq(weight[i], hessians[place], scales[i], 31)).float().mean() < 0.01


def test_pack_fits_reports_and_restores(tmp_path: Path) -> None:
    config = tiny_config(model_dim=64, vocab_size=128, matrix_clip_sigmas=9.5)
    model, depth = tiny_model(config), config.depth(True)
    batches = [random_tokens(640, 128).view(40, 16)]

    def packed(limit: int) -> pack.Packed:
        return pack.pack(model, depth, "0" * 64, batches, tmp_path / "model.pga", ALONE, 1000, limit)

    free = packed(10**6)
    assert (free.clip_sigmas, free.attempts) == (9.5, 1)
    assert free.path.stat().st_size == free.nbytes == free.total_nbytes - 1000
    assert sum(group.parameters for group in free.groups) == sum(
        model.get_parameter(name).numel() for name in (*BANKS, "tok_emb")
    )
    assert all(0 < group.output_error < 0.2 and 2 < group.bits < 9 for group in free.groups)
    limit = int(0.85 * free.total_nbytes)
    tight = packed(limit)
    assert tight.clip_sigmas > 9.5
    # Scales have few bits, so that the size of a model as small as this one jumps by hundreds of bytes.
    assert (1 - 5 * pack.SLACK) * limit < tight.total_nbytes <= limit
    assert tight.table().count("\n") == 9
    assert tight.as_dict()["total_nbytes"] == tight.total_nbytes

    read = artifact.load(tight.path)
    assert (read.depth, read.sha256, read.nbytes) == (depth, tight.sha256, tight.nbytes)
    weights = dict(model.named_parameters())
    for name, value in read.state_dict().items():
        assert value.shape == weights[name].shape
        error = (value - weights[name]).norm() / weights[name].norm()
        assert error < (0.9 if name in (*BANKS, "tok_emb") else 1e-3)
    with pytest.raises(QuantisationError, match="does not fit"):
        packed(9000)
    fixed = pack.pack(
        model, depth, "0" * 64, batches, tmp_path / "a", ALONE, 0, clips=dict.fromkeys(BANKS, 12.0) | {"tok_emb": 20.0}
    )
    assert fixed.attempts == 1
    for group in fixed.groups:
        assert group.clip_sigmas == pytest.approx(20.0 if group.name == "tok_emb" else 12.0)


def test_pack_cuts_no_weight_off_and_leaves_dead_neurons_out(tmp_path: Path) -> None:
    """From a clip on that would cut nearly all rows' tails off."""
    config = tiny_config(matrix_clip_sigmas=1.0)
    model, dead = tiny_model(config), torch.zeros(config.num_layers, config.mlp_dim, dtype=torch.bool)
    dead[0, 3] = dead[2, 5:9] = True
    with torch.no_grad():
        model.mlp_up_bank[dead] *= 1e-4  # hardly active, so that GPTQ hands no errors on to the zeros
        model.mlp_down_bank.masked_fill_(dead[:, None, :], 0)
    batches = [random_tokens(170, 64).view(10, 17)]
    packed = pack.pack(model, config.depth(True), "0" * 64, batches, tmp_path / "a", ALONE, 0)
    assert packed.dead_neurons == 5
    read = artifact.load(tmp_path / "a").tensors
    for name in INPUTS:
        value, weight = read[name], model.get_parameter(name).detach()
        assert isinstance(value, Quantised)
        reach = LEVELS[value.kind] * value.scales.float() / weight.abs().amax(-1)
        if name == "mlp_up_bank":
            assert torch.equal((value.codes == 0).all(-1), dead)
            assert (value.scales[dead] == 2.0**-24).all()
            reach = reach[~dead]
        assert float(reach.min()) > 1 - 2.0**-SCALE_BITS
        assert float(reach.median()) < 1.1


def test_pack_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    config = tiny_config()
    model = tiny_model(config)
    with torch.no_grad():
        model.attn_scale[1, 3] = torch.nan
    with pytest.raises(QuantisationError, match="not finite"):
        pack.pack(model, config.depth(True), "0" * 64, [random_tokens(64, 64).view(4, 16)], tmp_path / "a", ALONE, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bend", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("octave", [15_000.0, 40_000.0])
def test_search_fills_the_budget(octave: float, bend: float) -> None:
    """Also where the first guess of the slope is far too steep, or size falls more and more slowly."""

    def packed(clip: float) -> tuple[pack.Tensors, bytes]:
        octaves = math.log2(clip / 9.5)
        return {"clip": torch.tensor(clip)}, bytes(max(0, int(60_000 - 15_000 * octaves / (1 + bend * octaves))))

    clip, attempts, tensors, data = pack.fit(packed, 9.5, 40_000, octave)
    assert (1 - pack.SLACK) * 40_000 <= len(data) <= 40_000
    assert tensors["clip"] == torch.tensor(clip)
    assert len(packed(clip)[1]) == len(data)
    assert attempts <= 6
    assert pack.fit(packed, 9.5, 60_000, octave)[:2] == (9.5, 1)
    with pytest.raises(QuantisationError, match=r"does not fit: .* wanted at most -5"):
        pack.fit(packed, 9.5, -5, octave)


def test_search_where_sizes_jump() -> None:
    clip, _, _, data = pack.fit(lambda clip: ({}, bytes(5000 if clip < 20 else 3000)), 9.5, 4000, 1000.0)
    assert len(data) == 3000
    assert clip == pytest.approx(20, rel=0.1)


def test_dead_neurons_change_nothing() -> None:
    config = tiny_config()
    model, depth = tiny_model(config), config.depth(True)
    dead = torch.zeros(config.num_layers, config.mlp_dim, dtype=torch.bool)
    dead[0, 3] = dead[2, 5:9] = True
    values = {}
    for name in ("mlp_up_bank", "mlp_down_bank"):
        weight = model.get_parameter(name).detach()
        if name == "mlp_down_bank":
            weight = weight.masked_fill(dead[:, None, :], 0)
        scales = row_scales(weight, 9.5, 31)
        values[name] = Quantised("int6", round_to_nearest(weight, scales, 31), scales)
    tokens, logits = random_tokens(32, 64).view(2, 16), []
    assert not (values["mlp_up_bank"].codes == 0).all(-1).any()
    for _ in range(2):
        model.load_state_dict({name: value.dequantise() for name, value in values.items()}, strict=False)
        logits.append(model.logits(tokens, depth, model.rotary(16)))
        values["mlp_up_bank"] = without_dead_neurons(values["mlp_up_bank"], values["mlp_down_bank"])
    assert torch.equal(logits[0], logits[1])
    assert torch.equal((values["mlp_up_bank"].codes == 0).all(-1), dead)
    assert values["mlp_up_bank"].scales[dead].unique().numel() == 1


def test_levels_are_symmetric() -> None:
    assert LEVELS == {"int6": 31, "int8": 127}
    weight = torch.randn(1, 8, 64)
    codes = gptq(weight, factorise(torch.eye(64)[None]), row_scales(weight, 1.0, 31), 31)
    assert (int(codes.min()), int(codes.max())) == (-31, 31)
