"""Muon against the seed's own numbers, what a step does to weights, EMA and state; the kernels of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import gpt.optimizer
from gpt.config import Config, build_config
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.optimizer import Optimizer, coefficients
from gpt.record import RecordError
from gpt.trainer import lr_factor
from kernels import CLASSIC, POLAR_EXPRESS, reference, select
from kernels.launch import configs
from tests.aot import compile_for_h100
from tests.golden import GOLDEN, fill
from tests.kernel_tools import compiled, gpu, interpreted

CPU = torch.device("cpu")
FINAL = ("mlp_down_bank", "mlp_up_bank", "kv_bank", "qo_bank")  # banks as their gradients become final
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


@pytest.mark.parametrize(
    ("name", "shape", "bank_seed", "gradient_seeds", "weight_decay"),
    [("muon", (3, 256, 512), 501, (600, 601), 0.095), ("muon_tall", (2, 512, 128), 502, (602,), 0.0)],
)
def test_muon_makes_the_seeds_updates(
    name: str, shape: tuple[int, int, int], bank_seed: int, gradient_seeds: tuple[int, ...], weight_decay: float
) -> None:
    """Newton-Schulz in bf16 as in the seed: norms within 0.2%, single numbers within its own noise."""
    golden = GOLDEN[name]
    parameter, momentum = fill(shape, bank_seed, 0.05), torch.zeros(shape)
    before, ema = parameter.clone(), parameter.clone()
    for seed in gradient_seeds:
        gradient, clip = fill(shape, seed, 0.01), torch.ones(())
        u = reference.muon_momentum([gradient], [momentum], clip, golden["momentum"], False, torch.bfloat16)
        update = reference.newton_schulz(u, coefficients("classic", 5))
        scale = max(1.0, shape[1] / shape[2]) ** 0.5
        reference.muon_update([parameter], update, [ema], golden["lr"], weight_decay, [scale], 0.9)
    delta = parameter - before
    assert delta.norm().item() == pytest.approx(golden["delta_norm"], rel=2e-3)
    if "param_norm" in golden:
        assert parameter.norm().item() == pytest.approx(golden["param_norm"], rel=1e-4)
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


def test_a_step_is_skipped_by_option_and_leaves_everything() -> None:
    """NaN or infinity in one gradient: weights, EMA, moments and the count of steps as before; the next is made."""
    config = build_config(**TINY, nonfinite="skip")
    model, other = tiny_model(config), tiny_model(config)
    one, two = (Optimizer(m, config, ALONE) for m in (model, other))
    for bad in (float("nan"), float("inf")):
        for m, o in ((model, one), (other, two)):
            backward(m, 1)
            assert o.step(0, 1.0).isfinite()
        backward(model, 2)
        assert model.tok_emb.grad is not None
        model.tok_emb.grad[3, 5] = bad
        assert not one.step(1, 1.0).isfinite()
        assert all(p.grad is None for p in model.parameters())
        assert one.steps == two.steps
        state = one.state_dict(), two.state_dict()
        for a, b in zip(*([*s["momentum"], s["adamw"]["square"], *s["ema"].values()] for s in state), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


class Sent:
    """A collective that is done."""

    def wait(self) -> None:
        pass


def test_accumulation_sends_each_bank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four backwards, one reduce-scatter a bank, of the sum, in the last one and in the order of the graph."""
    sent: list[Tensor] = []

    def reduce_scatter(shard: Tensor, whole: Tensor, **options: Any) -> Sent:
        assert options == {"op": torch.distributed.ReduceOp.AVG, "async_op": True}
        sent.append(whole.clone())
        return Sent()

    monkeypatch.setattr(gpt.optimizer, "_reduce_scatter", reduce_scatter)
    config = build_config(**TINY)
    model = tiny_model(config)
    optimizer = Optimizer(model, config, Ranks(0, 2, CPU))
    for micro in range(4):
        assert not sent
        with optimizer.sending(last=micro == 3):
            backward(model, micro)
    parameters = dict(model.named_parameters())
    assert len(sent) == len(FINAL)
    for name, whole in zip(FINAL, sent, strict=True):
        gradient = parameters[name].grad
        assert gradient is not None
        assert torch.equal(whole[: len(gradient)], gradient)
        assert not whole[len(gradient) :].any()


def test_row_norm_feeds_newton_schulz_rows_of_one_length() -> None:
    seen: list[Tensor] = []

    def spy(banks: list[Tensor], table: Any) -> list[Tensor]:
        seen.extend(banks)
        return banks

    for row_norm in (False, True):
        config = build_config(**TINY, muon_row_norm=row_norm)
        model = tiny_model(config)
        model.ops = replace(model.ops, newton_schulz=spy)
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


def test_a_state_of_other_parameters_is_refused_before_anything_is_copied() -> None:
    config = build_config(**TINY)
    one = Optimizer(tiny_model(config), config, ALONE)
    backward(one.model, 0)
    one.step(0, 1.0)
    state = one.state_dict()
    first, second, *others = state["layout"]
    two = Optimizer(tiny_model(config), config, ALONE)
    for layout in ([second, first, *others], [first, second], [*state["layout"], ("more", (3,))]):
        with pytest.raises(RecordError, match=r"the optimizer's state is of .*, wanted "):
            two.load_state_dict({**state, "layout": layout})
    assert two.steps == 0
    assert not any(x.any() for x in (two.average, two.square, *(bank.momentum for bank in two.banks)))
    two.load_state_dict(state)
    assert torch.equal(two.square, one.square)
    assert [shape for _, shape in one.layout] == [
        tuple(p.shape) for p in (*(b.parameter for b in one.banks), *one.rest)
    ]


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


def test_adamw_is_torchs() -> None:
    """Ten steps of two parameters with rates and decays of their own: the weights of torch.optim.AdamW."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator) for shape in ((7, 5), (3,))]
    theirs = [p.clone().requires_grad_() for p in ours]
    groups = [{"params": [p], "lr": lr, "weight_decay": wd} for p, lr, wd in zip(theirs, (0.1, 0.02), (0.3, 0.0))]  # noqa: B905
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    average, square, ema = torch.zeros(38), torch.zeros(38), torch.zeros(38)
    for step in range(1, 11):
        gradient = torch.randn(38, generator=generator)
        for p, g in zip(theirs, gradient.split([35, 3]), strict=True):
            p.grad = 0.5 * g.view_as(p)
        optimizer.step()
        clip = torch.tensor(0.5)
        reference.adamw_update(
            ours, gradient, average, square, ema, clip, (0.1, 0.02), (0.3, 0.0), (0.9, 0.95), 1e-8, step, 0.9
        )
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=2e-6, atol=1e-6)


# ----------------------------------------------------------------------------------- the kernels, against float64
BANK_SHAPES = ((3, 16, 24), (2, 40, 7), (1, 5, 64))
REST_SHAPES = ((50, 24), (7,), (3, 2, 24), (4, 3))


def normal(shapes: Any, device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def close(found: list[Tensor], wanted: list[Tensor], error: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= error * b.norm()


def check_kernels(device: str, shapes: Any, gradient_dtype: torch.dtype, u_dtype: torch.dtype) -> None:
    """Two steps of each op beside the reference in float64, from the same float32 (or bf16) inputs."""
    from kernels import optimizer as kernels

    clip = torch.tensor(0.37, device=device)
    for row_norm in (False, True):
        momenta = normal(shapes, device, 1)
        exact = [m.double() for m in momenta]
        for step in range(2):
            gradients = [g.to(gradient_dtype) for g in normal(shapes, device, 2 + step)]
            u = kernels.muon_momentum(gradients, momenta, clip, 0.95, row_norm, u_dtype)
            wanted = reference.muon_momentum(gradients, exact, clip.double(), 0.95, row_norm, torch.float64)
            close(momenta, exact, 3e-7)
            close(u, wanted, 3e-7 if u_dtype == torch.float32 else 2e-3)

    parameters, emas = normal(shapes, device, 5), normal(shapes, device, 6)
    updates = [u.to(u_dtype) for u in normal(shapes, device, 7)]
    exact_p, exact_e = [p.double() for p in parameters], [e.double() for e in emas]
    scales = [1.0 + i for i in range(len(parameters))]
    for _ in range(2):
        kernels.muon_update(parameters, updates, emas, 0.02, 0.1, scales, 0.99)
        reference.muon_update(exact_p, updates, exact_e, 0.02, 0.1, scales, 0.99)
    close(parameters, exact_p, 3e-7)
    close(emas, exact_e, 3e-7)

    parameters = normal(REST_SHAPES, device, 8)
    size = sum(p.numel() for p in parameters)
    average, square, ema, gradient = normal([(size,)] * 4, device, 9)
    square.abs_()
    gradient = gradient.to(gradient_dtype)
    exact_p = [p.double() for p in parameters]
    exact_average, exact_square, exact_ema = exact_flat = [x.double() for x in (average, square, ema)]
    lrs, decays = [0.03, 0.01, 0.02, 0.01], [0.1, 0.0, 0.2, 0.3]
    for step in (1, 2, 100):
        settings = (lrs, decays, (0.9, 0.95), 1e-8, step, 0.99)
        kernels.adamw_update(parameters, gradient, average, square, ema, clip, *settings)
        reference.adamw_update(exact_p, gradient, exact_average, exact_square, exact_ema, clip.double(), *settings)
    close([*parameters, average, square, ema], [*exact_p, *exact_flat], 1e-6)


@interpreted
def test_interpreted_kernels(poisoned: None) -> None:
    check_kernels("cpu", BANK_SHAPES, torch.float32, torch.float32)
    check_kernels("cpu", BANK_SHAPES[:1], torch.float32, torch.float32)


@gpu
@compiled
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(gradient_dtype: torch.dtype, poisoned: None) -> None:
    check_kernels("cuda", BANK_SHAPES, gradient_dtype, torch.bfloat16)
    check_kernels("cuda", ((3, 512, 512), (2, 512, 2048), (2, 2048, 512)), gradient_dtype, torch.bfloat16)


@gpu
@compiled
def test_a_step_on_a_gpu_is_that_of_the_reference() -> None:
    """Same gradients, both implementations: the same norm, weights within the noise of Newton-Schulz in bf16."""
    cuda = torch.device("cuda")
    config = build_config(**TINY)
    results = []
    chosen = ",".join(f"{op}=triton" for op in ("newton_schulz", "muon_momentum", "muon_update", "adamw_update"))
    for kernels in ("reference", f"reference,{chosen}"):
        model = GPT(config, select(kernels, cuda), torch.bfloat16).initialise(0).to(cuda)
        optimizer = Optimizer(model, config, Ranks(0, 1, cuda))
        before = [p.detach().clone() for p in model.parameters()]
        for step in range(2):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + step)).to(cuda)
            norm = optimizer.step(step, 1.0)
        results.append((norm, [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)], optimizer.ema))
    (norm, changes, emas), (other_norm, other_changes, other_emas) = results
    torch.testing.assert_close(other_norm, norm, rtol=1e-5, atol=0.0)
    for a, b in zip((*other_changes, *other_emas), (*changes, *emas), strict=True):
        assert (a - b).norm() <= 0.04 * b.norm()


@interpreted
def test_registration_of_the_kernels() -> None:
    import kernels.optimizer  # noqa: F401

    ops, clip = torch.ops.golf, torch.tensor(0.5)
    x, y, z = normal([(2, 4, 8)] * 3, "cpu", 0)
    torch.library.opcheck(ops.muon_momentum.default, ([x], [y], clip, 0.9, True, torch.float32))
    torch.library.opcheck(ops.muon_update.default, ([x], [y], [z], [0.1], 0.9, 0.1))
    flat = normal([(64,)] * 4, "cpu", 1)
    torch.library.opcheck(
        ops.adamw_update.default, ([x], *flat, clip, [0.1], [0.9], 0.9, 0.95, 1.0, 1e-8, 0.1), test_utils="test_schema"
    )


@interpreted
def test_errors_of_the_kernels_name_what_was_found() -> None:
    from kernels import optimizer as kernels

    x, clip = torch.zeros(2, 4, 8), torch.ones(())
    with pytest.raises(ValueError, match="for each of 1, at least one; got 2"):
        kernels.muon_momentum([x, x], [x], clip, 0.9, False, torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        kernels.muon_momentum([x[..., 0]], [x], clip, 0.9, False, torch.float32)
    with pytest.raises(ValueError, match="clip as one float32"):
        kernels.muon_momentum([x], [x], clip.double(), 0.9, False, torch.float32)
    with pytest.raises(ValueError, match=r"strides \(32, 1, 4\)"):
        kernels.muon_update([x], [torch.zeros(2, 8, 4).mT], [x], 0.1, 0.0, [1.0], 0.9)
    with pytest.raises(ValueError, match="scale a parameter"):
        kernels.muon_update([x], [x], [x], 0.1, 0.0, [], 0.9)
    flat = torch.zeros(65)
    with pytest.raises(ValueError, match="each of 64"):
        kernels.adamw_update([x], flat, flat, flat, flat, clip, [0.1], [0.0], (0.9, 0.95), 1e-8, 1, 0.9)


@compiled
@pytest.mark.parametrize("op", ["momentum", "update", "adamw"])
def test_kernels_compiled_for_h100(op: str) -> None:
    from kernels import optimizer as kernels

    four, eight = ("*fp32",) * 4, ("*fp32",) * 8
    scalars = ("average_weight", "beta2", "square_weight", "inverse_correction", "eps", "ema_weight")
    flat = dict.fromkeys(("clip", "gradient", "average", "square", "ema"), "*fp32")
    cases: dict[str, Any] = {
        "momentum": (
            kernels.muon_momentum_kernel,
            {"gradients": four, "momenta": four, "clip": "*fp32", "mu": "fp32", "rows": ("i32:16",) * 4}
            | {"heights": ("i32:16",) * 4},
            {"COLUMNS": (512, 512, 512, 2048), "ROW_NORM": True},
        ),
        "update": (
            kernels.muon_update_kernel,
            {"parameters": four, "updates": ("*bf16",) * 4, "emas": four, "sizes": ("i32:16",) * 4}
            | {"rates": ("fp32",) * 4, "shrink": "fp32", "ema_weight": "fp32"},
            {},
        ),
        "adamw": (
            kernels.adamw_update_kernel,
            {"parameters": eight, "sizes": ("i32:16",) * 8, "rates": ("fp32",) * 8, "shrinks": ("fp32",) * 8}
            | flat
            | dict.fromkeys(scalars, "fp32"),
            {},
        ),
    }
    kernel, types, constants = cases[op]
    built = compile_for_h100(kernel, types, constants, configs("h100")["optimizer"][op])
    assert built.stack == 0
    assert built.registers <= 80
    assert "LDG.E.128" in built.sass
    assert "STG.E.128" in built.sass
