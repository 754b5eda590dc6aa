"""Muon against the seed's own numbers, and what a step does to weights, EMA and state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gpt.config import Config, build_config
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.optimizer import Optimizer, _Bank, coefficients
from gpt.trainer import lr_factor
from kernels import CLASSIC, POLAR_EXPRESS, select
from tests.golden import GOLDEN, fill

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
TINY: dict[str, Any] = {
    "preset": "sample",
    "vocab_size": 64,
    "model_dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "recur_layers": (1,),
    "train_seq_len": 16,
    "train_batch_tokens": 64,
    "micro_batch_tokens": 64,
    "eval_stride": 8,
}


def tiny_model(config: Config, seed: int = 0) -> GPT:
    return GPT(config, select("reference", CPU)).initialise(seed)


def backward(model: GPT, seed: int, scale: float = 1.0) -> None:
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    depth = model.config.depth(True)
    (scale * model(tokens[:, :-1], tokens[:, 1:], depth, model.rotary(16))).backward()


def golden_bank(shape: tuple[int, int, int], seed: int) -> _Bank:
    return _Bank(fill(shape, seed, 0.05), torch.zeros(shape), max(1.0, shape[1] / shape[2]) ** 0.5)


@pytest.mark.parametrize(
    ("name", "shape", "bank_seed", "gradient_seeds", "weight_decay"),
    [("muon", (3, 256, 512), 501, (600, 601), 0.095), ("muon_tall", (2, 512, 128), 502, (602,), 0.0)],
)
def test_muon_makes_the_seeds_updates(
    name: str, shape: tuple[int, int, int], bank_seed: int, gradient_seeds: tuple[int, ...], weight_decay: float
) -> None:
    """Newton-Schulz in bf16 as in the seed: norms within 0.2%, single numbers within its own noise."""
    golden = GOLDEN[name]
    optimizer = cast(Any, Optimizer.__new__(Optimizer))
    optimizer.config = build_config(matrix_lr=golden["lr"], muon_wd=weight_decay)
    optimizer.model = SimpleNamespace(dtype=torch.bfloat16, ops=select("reference", CPU))
    optimizer.ranks, optimizer.coefficients = ALONE, coefficients("classic", 5)
    bank = golden_bank(shape, bank_seed)
    before = bank.parameter.clone()
    for seed in gradient_seeds:
        update = optimizer._direction(bank, fill(shape, seed, 0.01), golden["momentum"])
        optimizer._apply(bank, update, None, 1.0)
    delta = bank.parameter - before
    assert delta.norm().item() == pytest.approx(golden["delta_norm"], rel=2e-3)
    if "param_norm" in golden:
        assert bank.parameter.norm().item() == pytest.approx(golden["param_norm"], rel=1e-4)
    rms = delta.square().mean().sqrt().item()
    assert delta.flatten()[:6].tolist() == pytest.approx(golden["delta_first"], abs=0.1 * rms)


def test_coefficients_repeat_the_last() -> None:
    assert coefficients("classic", 3) == (CLASSIC,) * 3
    assert coefficients("polar-express", 7) == (*POLAR_EXPRESS, POLAR_EXPRESS[-1], POLAR_EXPRESS[-1])


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters() -> None:
    """A gradient a thousand times as large makes the same step once both are clipped."""
    config = build_config(**TINY, grad_clip_norm=1e-3)
    results = []
    for scale in (1.0, 1000.0):
        model = tiny_model(config)
        optimizer = Optimizer(model, config, ALONE)
        backward(model, 1, scale)
        expected = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
        norm = optimizer.step(0, 1.0)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert all(p.grad is None for p in model.parameters())
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_row_norm_feeds_newton_schulz_rows_of_one_length() -> None:
    seen: list[Tensor] = []

    def spy(g: Tensor, table: Any) -> Tensor:
        seen.append(g)
        return g

    for row_norm in (False, True):
        config = build_config(**TINY, muon_row_norm=row_norm)
        model = tiny_model(config)
        model.ops = cast(Any, SimpleNamespace(**{**vars(model.ops), "newton_schulz": spy}))
        optimizer = Optimizer(model, config, ALONE)
        backward(model, 1)
        optimizer.step(0, 1.0)
    plain, scaled = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for p, s in zip(plain, scaled, strict=True):
        torch.testing.assert_close(s, p / (p.norm(dim=-1, keepdim=True) + 1e-7))


def test_ema_follows_the_weights() -> None:
    config = build_config(**TINY, ema_decay=0.9)
    model = tiny_model(config)
    optimizer = Optimizer(model, config, ALONE)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        backward(model, step)
        optimizer.step(step, 1.0)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for found, wanted in zip(optimizer.ema_state().values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_state_is_taken_over_and_training_goes_on_the_same() -> None:
    config = build_config(**TINY)
    straight, stopped = tiny_model(config), tiny_model(config)
    one, two = Optimizer(straight, config, ALONE), Optimizer(stopped, config, ALONE)
    for step in range(2):
        for model, optimizer in ((straight, one), (stopped, two)):
            backward(model, step)
            optimizer.step(step, 1.0)
    resumed = tiny_model(config, seed=9)
    resumed.load_state_dict(stopped.state_dict())
    three = Optimizer(resumed, config, ALONE)
    three.load_state_dict(two.state_dict())
    for model, optimizer in ((straight, one), (resumed, three)):
        backward(model, 2)
        optimizer.step(2, 0.5)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    for e, f in zip(one.ema, three.ema, strict=True):
        assert torch.equal(e, f)


def test_every_share_of_the_momentum_comes_back_in_any_world() -> None:
    config = build_config(**TINY)
    model = tiny_model(config)
    optimizer = Optimizer(model, config, ALONE)
    backward(model, 0)
    optimizer.step(0, 1.0)
    state = optimizer.state_dict()
    for world_size in (2, 3, 4, 8):
        shares = []
        for rank in range(world_size):
            other = Optimizer(tiny_model(config), config, Ranks(rank, world_size, CPU))
            other.load_state_dict(state)
            shares.append([bank.momentum for bank in other.banks])
        for bank, parts in zip(optimizer.banks, zip(*shares, strict=True), strict=True):
            assert torch.equal(torch.cat(parts)[: bank.count], bank.momentum)


def test_reset_restores_the_state_before_the_first_step() -> None:
    config = build_config(**TINY)
    model = tiny_model(config)
    fresh = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, config, ALONE)
    backward(model, 0)
    optimizer.step(0, 1.0)
    with torch.no_grad():
        for p, saved in zip(model.parameters(), fresh, strict=True):
            p.copy_(saved)
    optimizer.reset()
    untouched = Optimizer(tiny_model(config), config, ALONE)
    for m, o in ((model, optimizer), (untouched.model, untouched)):
        backward(m, 5)
        o.step(0, 1.0)
    for p, q in zip(model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedules() -> None:
    config = build_config(warmdown_frac=0.5, min_lr=0.0)
    assert [lr_factor(config, p) for p in (0.0, 0.5, 0.75, 1.0, 1.2)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert lr_factor(build_config(warmdown_frac=0.5, min_lr=0.1), 0.99) == 0.1
    assert lr_factor(build_config(warmdown_frac=0.0), 0.99) == 1.0
    optimizer = cast(Any, Optimizer.__new__(Optimizer))
    optimizer.config = build_config()
    assert [optimizer.momentum_at(s) for s in (0, 750, 1500, 9999)] == pytest.approx([0.92, 0.955, 0.99, 0.99])
