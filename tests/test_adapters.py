"""Low-rank adapters side by side against whole matrices, one row at a time; and their Triton ops against the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt.adapters import Adapted, Adapters, linear
from gpt.model import GPT
from kernels import select
from kernels.launch import INTERPRET
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, SCALE, ROWS = 3, 1.5, 2


def learnt(adapters: Adapters) -> dict[str, Tensor]:
    """Adapters of ROWS rows, all different, as after some training."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, start in adapters.start.items():
        change = 0.02 * torch.randn(ROWS, *start.shape, generator=generator, dtype=torch.float64)
        found[name] = (start + change.to(start)).requires_grad_()
    return found


def text(length: int, scored: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(4, 64, (ROWS, length + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1].contiguous(), tokens[:, 1:][:, -scored:].contiguous()


def whole_matrices(model: GPT, adapters: dict[str, Tensor], row: int) -> GPT:
    """A model of the row alone, W + SCALE B A in the place of W."""
    layers = model.config.num_layers
    places = {"kv_bank": slice(0, layers), "qo_bank": slice(layers, None), "mlp_up_bank": slice(None)}
    for name, place in (places | {"mlp_down_bank": slice(None)}).items():
        whole = getattr(model, name).detach().clone()
        whole[place] += SCALE * adapters[f"{name}.b"][row] @ adapters[f"{name}.a"][row]
        delattr(model, name)
        setattr(model, name, whole)
    return model


@pytest.mark.parametrize("scored", [1, 5, 16])
def test_every_row_has_matrices_of_its_own(scored: int) -> None:
    config = tiny_config(document_mask=False)
    adapters = Adapters(tiny_model(config, torch.float64), RANK, SCALE, 0)
    values, depth = learnt(adapters), config.depth(True)
    inputs, targets = text(16, scored)
    found = adapters.losses(values, inputs, targets, depth)
    gradients = torch.autograd.grad(found.square().sum(), list(values.values()))
    rows = []
    for row in range(ROWS):
        model = whole_matrices(tiny_model(config, torch.float64), values, row)
        rows.append(model.losses(inputs[row, None], targets[row, None], depth, model.rotary(16)))
    wanted = torch.cat(rows)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients, torch.autograd.grad(wanted.square().sum(), list(values.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_they_begin_with_the_model_itself() -> None:
    config = tiny_config(document_mask=False)
    model, (inputs, targets) = tiny_model(config), text(16, 4)
    adapters = Adapters(model, RANK, SCALE, 0)
    start = {name: value.expand(ROWS, *value.shape) for name, value in adapters.start.items()}
    found = adapters.losses(start, inputs, targets, config.depth(True))
    torch.testing.assert_close(found, model.losses(inputs, targets, config.depth(True), model.rotary(16)).detach())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("first", "changed"), [(0, 6), (2, 3)])
def test_a_product_alone(first: int, changed: int, residual: bool) -> None:
    shapes = ((2, 5, 4), (2, 3, 4), (2, changed, 3), (2, 5, 6))
    x, a, b, added = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight = torch.randn(6, 4, dtype=torch.float64)

    def ours(x: Tensor, a: Tensor, b: Tensor, added: Tensor) -> Tensor:
        return linear(x, Adapted(weight, a, b, first), added if residual else None)

    assert torch.autograd.gradcheck(ours, (x, a, b, added))
    whole = weight + torch.nn.functional.pad(b @ a, (0, 0, first, 6 - first - changed))
    torch.testing.assert_close(ours(x, a, b, added), x @ whole.mT + (added if residual else 0))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_triton_ops_compute_the_same(device: str) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("wants TRITON_INTERPRET=1")
    target, dtype = torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16
    config = tiny_config(document_mask=False, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8)
    ours = "triton,int6_linear=reference"
    found = []
    for kernels, kind in ((ours, dtype), ("reference", dtype), ("reference", torch.float32)):
        model = tiny_model(config).to(target)
        model.ops, model.dtype = select(kernels, target), kind
        adapters = Adapters(model, RANK, SCALE, 0)
        values = learnt(adapters)
        inputs, targets = (tokens.to(target) for tokens in text(16, 4))
        losses = adapters.losses(values, inputs, targets, config.depth(True))
        found.append([losses.detach(), *torch.autograd.grad(losses.mean(1).sum(), list(values.values()))])
    for one, eager, exact in zip(*found, strict=True):
        bound = 1e-4 if device == "cpu" else 1.5 * float((eager - exact).norm() / exact.norm()) + 2e-3
        assert float((one - exact).norm() / exact.norm()) < bound
