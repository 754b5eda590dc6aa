"""The model against the seed's own numbers, and its switches against plain re-computations."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest
import torch

from gpt.capture import Captured, micro_step
from gpt.clock import Clock
from gpt.config import Config, build_config
from gpt.distributed import Ranks
from gpt.model import GPT, orthogonal_
from gpt.optimizer import Optimizer
from kernels import KernelError, Ops, reference, select
from tests.golden import GOLDEN, fill_model, golden_tokens, seed_parameter

CPU = torch.device("cpu")
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def ops() -> Ops:
    return select("reference", CPU)


def seed_config(length: int = 2048) -> Config:
    return build_config(train_seq_len=length, train_batch_tokens=length, micro_batch_tokens=length, eval_stride=1)


def tiny(**settings: Any) -> Config:
    base: dict[str, Any] = {
        "preset": "sample",
        "vocab_size": 64,
        "model_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_dims": 4,
        "train_seq_len": 32,
        "train_batch_tokens": 64,
        "micro_batch_tokens": 64,
        "eval_stride": 8,
    }
    return build_config(**{**base, **settings})


def random_model(config: Config, ops: Ops, seed: int = 0) -> GPT:
    """A float64 model with every parameter random, so that nothing is hidden by an initial zero or one."""
    model = GPT(config, ops, torch.float64).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + (p.mean() == 1).double())
    return model


def test_seed_has_its_parameters_and_builds_quickly(ops: Ops) -> None:
    begin = time.process_time()
    model = GPT(build_config(preset="seed"), ops).initialise(1337)
    assert time.process_time() - begin < 30
    assert sum(p.numel() for p in model.parameters()) == 35_941_976
    assert model.tok_emb.std().item() == pytest.approx(0.005, rel=0.01)
    q, o = model.qo_bank.detach().split(11)
    assert torch.allclose(q @ q.mT, torch.eye(512).expand(11, 512, 512), atol=1e-4)
    assert not o.any()
    assert not model.mlp_down_bank.any()


def test_golden_parameters_are_filled_as_the_seed_was(ops: Ops) -> None:
    model = GPT(seed_config(), ops)
    fill_model(model)
    for name, wanted in GOLDEN["parameters"].items():
        parameter, layer = seed_parameter(model, name)
        found = (parameter if layer is None else parameter[layer]).detach().double()
        assert found.norm().item() == pytest.approx(wanted["norm"], rel=1e-6), name
        assert found.sum().item() == pytest.approx(wanted["sum"], rel=1e-5, abs=1e-2), name
        assert found.flatten()[:3].tolist() == pytest.approx(wanted["first"], rel=1e-5), name


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['tokens']}-{'recurrence' if c['recurrence'] else 'plain'}"
)
def test_golden_loss_logits_and_gradients(case: dict[str, Any], ops: Ops) -> None:
    length = case["tokens"]
    config = seed_config(length)
    model = GPT(config, ops, torch.float64).double()
    fill_model(model)
    tokens, targets = golden_tokens(length)
    depth, rotary = config.depth(case["recurrence"]), model.rotary(length)

    loss = model(tokens, targets, depth, rotary)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    with torch.no_grad():
        logits = model.logits(tokens, depth, rotary)[0, :8]
    assert logits.tolist() == pytest.approx(case["logits_last_first8"], abs=1e-4)
    assert len(case["grad_norm"]) == len(GOLDEN["parameters"])
    for name, wanted in case["grad_norm"].items():
        parameter, layer = seed_parameter(model, name)
        assert parameter.grad is not None
        found = parameter.grad if layer is None else parameter.grad[layer]
        assert found.norm().item() == pytest.approx(wanted, rel=1e-3, abs=1e-12), name


def test_depth_is_a_list_of_layers() -> None:
    config = build_config(preset="seed")
    assert config.depth(False) == tuple(range(11))
    assert config.depth(True) == (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert config.depth_at(2999) == config.depth(False)
    assert config.depth_at(3000) == config.depth_at(9000) == config.depth(True)


def test_documents_of_one_row_are_read_as_if_alone(ops: Ops) -> None:
    """With the document mask, losses inside a packed row equal those of each document in a row of its own.

    Rotary positions differ by a constant, which attention does not feel; nothing else may differ.
    """
    config = tiny(document_mask=True)
    model = random_model(config, ops)
    first = torch.tensor([1, 5, 9, 33, 2, 60, 17])
    second = torch.tensor([1, 8, 8, 21, 40, 3, 50, 12, 63])
    packed = torch.cat((first, second))[None]
    depth = config.depth(True)
    together = model.hidden(packed, depth, model.rotary(packed.size(1)))[0]
    for document, begin in ((first, 0), (second, len(first))):
        alone = model.hidden(document[None], depth, model.rotary(len(document)))[0]
        torch.testing.assert_close(together[begin : begin + len(document)], alone, rtol=1e-5, atol=1e-6)

    unmasked = random_model(tiny(document_mask=False), ops)
    crossing = unmasked.hidden(packed, depth, unmasked.rotary(packed.size(1)))[0]
    torch.testing.assert_close(crossing[: len(first)], together[: len(first)])
    assert (crossing[len(first) :] - together[len(first) :]).abs().max() > 1e-3


@pytest.mark.parametrize("document_mask", [True, False])
def test_no_position_sees_a_later_token(document_mask: bool, ops: Ops) -> None:
    config = tiny(document_mask=document_mask)
    model = random_model(config, ops)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 10] = 1
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % 64
    depth, rotary = config.depth(True), model.rotary(24)
    before, after = model.hidden(tokens, depth, rotary), model.hidden(changed, depth, rotary)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_losses_are_those_of_the_mean_and_of_the_last_positions(ops: Ops) -> None:
    config = tiny()
    model = random_model(config, ops)
    tokens = torch.randint(64, (3, 33), generator=torch.Generator().manual_seed(2))
    x, y, depth, rotary = tokens[:, :-1], tokens[:, 1:], config.depth(True), model.rotary(32)
    each = model.losses(x, y, depth, rotary)
    assert each.mean().item() == pytest.approx(model(x, y, depth, rotary).item(), rel=1e-6)
    for count in (1, 5, 31):
        torch.testing.assert_close(model.losses(x, y[:, -count:], depth, rotary), each[:, -count:])


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_last_layer_only_where_it_is_wanted(ops: Ops, document_mask: bool) -> None:
    config = tiny(document_mask=document_mask, num_layers=3, recur_layers=(1,))
    model = random_model(config, ops)
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    tokens[:, 7], tokens[1, 29] = 1, 1
    for depth in (config.depth(True), (0,)):
        whole, gradients = model.hidden(tokens, depth, model.rotary(32)), []
        for count in (1, 6, 31):
            found = model.hidden(tokens, depth, model.rotary(32), last=count)
            torch.testing.assert_close(found, whole[:, -count:])
            for x in (found, whole[:, -count:]):
                gradients.append(torch.autograd.grad(x.square().sum(), model.kv_bank, retain_graph=True)[0])
            torch.testing.assert_close(*gradients[-2:])


@pytest.mark.skipif(not COMPILER, reason="torch.compile wants a C++ compiler on a CPU")
def test_compiled_graph_computes_the_same(ops: Ops) -> None:
    """The whole forward and backward is one graph (a break is an error) and computes what the eager model does."""
    config = tiny(num_layers=2, recur_layers=(1,))
    plain = GPT(config, ops).initialise(3)
    model = GPT(config, select("compiled", CPU)).initialise(3)
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(4))
    tokens[:, 7] = 1
    x, y, depth = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), config.depth(True)
    wanted = plain(x, y, depth, plain.rotary(32))
    found = model.ops.graph(model)(x, y, depth, model.rotary(32))
    wanted.backward()
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def small_config(document_mask: bool) -> Config:
    """With heads of 64, for a GPU."""
    return build_config(
        num_layers=4,
        recur_layers=(2,),
        document_mask=document_mask,
        train_seq_len=512,
        train_batch_tokens=4096,
        micro_batch_tokens=2048,
        vocab_size=1024,
        model_dim=256,
        num_heads=4,
        num_kv_heads=2,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "compiled"])
def test_kernels_on_a_gpu_are_as_near_float64_as_the_reference(kernels: str, document_mask: bool) -> None:
    """In bf16, with heads of 64 and packed documents: loss and every gradient against the reference in float64."""
    device = torch.device("cuda")
    config = small_config(document_mask)
    tokens = torch.randint(2, 1024, (4, 513), generator=torch.Generator().manual_seed(5)).to(device)
    tokens[:, 0] = tokens[0, 100] = tokens[0, 101] = tokens[1, 300] = tokens[3, 511] = 1
    x, y, depth = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), config.depth(True)

    def run(kernels: str, dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
        model = GPT(config, select(kernels, device), dtype).initialise(3)
        with torch.no_grad():
            model.tok_emb.mul_(20)
            for bank in (model.qo_bank[4:], model.mlp_down_bank):
                bank.copy_(torch.randn(bank.shape, generator=torch.Generator().manual_seed(6)) * 0.05)
        model = (model.double() if dtype == torch.float64 else model).to(device)
        loss = model.ops.graph(model)(x, y, depth, model.rotary(512))
        loss.backward()
        return loss.item(), [p.grad.double() for p in model.parameters() if p.grad is not None]

    exact, exact_gradients = run("reference", torch.float64)
    plain, plain_gradients = run("reference", torch.bfloat16)
    found, gradients = run(kernels, torch.bfloat16)
    assert abs(found - exact) <= 2 * abs(plain - exact) + 1e-3
    names = [name for name, _ in GPT(config, select("reference", device)).named_parameters()]
    errors = {
        name: tuple(((g - wanted).norm() / wanted.norm()).item() for g in (ours, theirs))
        for name, wanted, ours, theirs in zip(names, exact_gradients, gradients, plain_gradients, strict=True)
    }
    total, peer_total = (
        sum((g - wanted).square().sum() for g, wanted in zip(found, exact_gradients, strict=True)) ** 0.5
        for found in (gradients, plain_gradients)
    )
    assert total <= 1.1 * peer_total
    # One vector of a few hundred numbers is a small sample of rounding errors: the bound is wide for each alone.
    assert {name: pair for name, pair in errors.items() if pair[0] > 3 * pair[1] + 1e-3} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
def test_no_step_waits_for_the_device(document_mask: bool) -> None:
    """Forward, backward, optimizer and what the clock notes, warm, before and after the layers change."""
    device = torch.device("cuda")
    config, ranks = small_config(document_mask), Ranks(0, 1, device)
    model = GPT(config, select("auto", device), torch.bfloat16).initialise(3).to(device)
    optimizer, clock = Optimizer(model, config, ranks), Clock(ranks)
    depths = config.depth(False), config.depth(True)
    run = micro_step(model, model.rotary(512), depths)
    tokens = torch.randint(2, 1024, (4, 513), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def steps() -> None:
        for i, depth in enumerate((*depths, *depths)):
            loss = run(x, y, depth, 1.0)
            clock.push(i, 0.0, torch.stack([loss]).sum(), optimizer.step(i, 1.0))

    clock.start()
    steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(clock.stop()) == 8


@pytest.mark.gpu
@pytest.mark.parametrize(("document_mask", "kernels"), [(False, "auto"), (True, "auto"), (True, "auto,mlp=fp8")])
def test_a_captured_micro_step_is_the_same_as_launched_ones(document_mask: bool, kernels: str) -> None:
    """Loss and gradients of several steps, two micro-steps each, weights changing between them, both depths."""
    device = torch.device("cuda")
    config = small_config(document_mask)
    model = GPT(config, select(kernels, device), torch.bfloat16).initialise(3).to(device)
    rotary = model.rotary(512)
    captured = micro_step(model, rotary, (config.depth(False), config.depth(True)))
    assert isinstance(captured, Captured)
    generator = torch.Generator().manual_seed(5)
    for step, depth in enumerate((config.depth(False), config.depth(True), config.depth(False), config.depth(True))):
        batches = torch.randint(2, 1024, (2, 4, 513), generator=generator).to(device)
        batches[0, 0, 100] = batches[1, 3, 1] = 1
        with torch.no_grad():
            model.mlp_down_bank.add_(0.05 * torch.randn(model.mlp_down_bank.shape, generator=generator).to(device))
        micro = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in batches]
        losses = [captured(*tensors, depth, 0.5) for tensors in micro]
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        wanted = []
        for tensors in micro:
            loss = model(*tensors, depth, rotary) * 0.5
            loss.backward()
            wanted.append(loss.detach())
        del loss  # a graph of autograd that lives would join its stream to the next capture's
        assert torch.equal(torch.stack(losses), torch.stack(wanted)), step
        for (name, parameter), gradient in zip(model.named_parameters(), found, strict=True):
            torch.testing.assert_close(
                gradient, parameter.grad, rtol=2e-2, atol=2e-3 * gradient.abs().max().item(), msg=name
            )
        model.zero_grad(set_to_none=True)


def test_fp8_trains_and_does_not_score(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(num_layers=2, recur_layers=(1,))
    model, plain = (GPT(config, select(kernels, CPU)).initialise(3) for kernels in ("auto,mlp=fp8", "reference"))
    with torch.no_grad():
        for each in (model, plain):
            each.qo_bank[2:].copy_(each.qo_bank[:2])
            each.mlp_down_bank.copy_(each.mlp_up_bank.mT)
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(4))
    x, y, depth, rotary = tokens[:, :-1], tokens[:, 1:], config.depth(True), model.rotary(32)
    found, exact = model(x, y, depth, rotary), plain(x, y, depth, rotary)
    assert found != exact
    assert found.item() == pytest.approx(exact.item(), rel=0.02)
    found.backward()
    exact.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() <= 0.3 * q.grad.norm(), name
    with torch.no_grad():
        assert torch.equal(model.losses(x, y, depth, rotary), plain.losses(x, y, depth, rotary))

    assert model.ops.names["mlp"] == "fp8"
    for kernels in ("fp8", "auto,linear_add=fp8"):
        with pytest.raises(KernelError, match="has no fp8; wanted BASE,mlp=fp8"):
            select(kernels, CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select("auto,mlp=fp8", cuda).capturable
    assert not select("compiled,mlp=fp8", cuda).capturable
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(KernelError, match=r"capability 8.9 or later; found 8\.6"):
        select("auto,mlp=fp8", cuda)


def test_fp8_products_never_saturate() -> None:
    """Rows that are parallel, alone in one place, huge, tiny or zero: nothing above 448, the error that of rounding."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(24, 32, generator=generator, dtype=torch.float64)
    up[3], up[4] = torch.eye(32)[7], 0.0
    x = torch.cat((up[:4] * 1e6, -up[:4] * 1e-3, torch.zeros(1, 32), torch.randn(55, 32, generator=generator)))
    x8, unit = reference.unit_rows(x)
    assert x8.abs().max() == 448
    assert ((x8 * unit - x).norm(dim=1) <= 0.04 * x.norm(dim=1)).all()
    down = torch.randn(32, 24, generator=generator, dtype=torch.float64)
    exact, found = (op(x, up, down, 0.7) - x for op in (reference.mlp, reference.mlp_fp8))
    assert ((found - exact).norm(dim=1) <= 0.15 * exact.norm(dim=1)).all()


def test_orthogonal_banks() -> None:
    for shape in ((3, 8, 32), (3, 32, 8), (2, 16, 16)):
        bank = torch.empty(shape)
        orthogonal_(bank, torch.Generator().manual_seed(0))
        narrow = bank if shape[1] <= shape[2] else bank.mT
        torch.testing.assert_close(
            narrow @ narrow.mT, torch.eye(min(shape[1:])).expand(shape[0], -1, -1), atol=1e-5, rtol=0
        )
    assert not torch.equal(bank[0], bank[1])


def test_exclusive_attention_has_nothing_along_its_own_value() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 5, 4, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 5, 2, 8, generator=generator, dtype=torch.float64)
    v[0, 0] = 0.0
    out = reference.exclusive(y, v)
    along = (out.unflatten(2, (2, 2)) * v.unsqueeze(3)).sum(-1)
    assert along.abs().max() < 1e-12
    assert torch.equal(out[0, 0], y[0, 0])


def test_newton_schulz_brings_singular_values_near_one() -> None:
    g = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    for table in ((reference.CLASSIC,) * 5, reference.POLAR_EXPRESS):
        values = torch.linalg.svdvals(reference.newton_schulz([g], table)[0])
        assert values.min() > 0.6
        assert values.max() < 1.3
        tall = reference.newton_schulz([g.mT], table)[0]
        torch.testing.assert_close(tall, reference.newton_schulz([g], table)[0].mT)


def test_an_explicit_choice_of_kernels_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select("auto", torch.device("cuda")).names["mlp"] == "triton"
    without = select("auto,attention=compiled", torch.device("cuda")).names
    assert (without["attention"], without["attention_mask"], without["mlp"]) == ("compiled", "compiled", "triton")
    assert select("auto", torch.device("cuda")).fused_layer
    for part in ("auto,attention=compiled", "auto,attention_input=reference", "compiled,attention=triton"):
        assert select(part, torch.device("cuda")).fused_layer is None
    limits = (
        ({"num_heads": 1, "num_kv_heads": 1, "model_dim": 256}, "heads of 256.*attention, attention_input"),
        ({"num_heads": 3, "num_kv_heads": 3, "model_dim": 72}, "heads of 24"),
        ({"logit_softcap": 80.0}, "logit_softcap=80.0.*linear_cross_entropy want at most 64"),
    )
    for settings, found in limits:
        config = tiny(**{"rope_dims": 8, "model_dim": 64, **settings})
        with pytest.raises(KernelError, match=found):
            GPT(config, select("auto", torch.device("cuda")))
        GPT(config, select("reference", CPU))
    with pytest.raises(KernelError, match=r"Triton kernels run on a GPU, or interpreted.*found device cpu"):
        select("compiled,attention=triton", CPU)
    assert select("compiled,attention=triton", torch.device("cuda")).names["attention"] == "triton"
    with pytest.raises(KernelError, match=r"'cuda'.*reference, compiled, triton, fp8"):
        select("cuda", CPU)
    with pytest.raises(KernelError, match="no op 'nope'"):
        select("compiled,nope=reference", CPU)
    with pytest.raises(KernelError, match="nothing is compiled on a reference base"):
        select("reference,mlp=compiled", CPU)
    with monkeypatch.context() as empty:
        empty.setenv("PATH", "")
        empty.delenv("CXX", raising=False)
        with pytest.raises(KernelError, match=r"C\+\+ compiler"):
            select("compiled", CPU)
        select("reference", CPU)
    if not COMPILER:
        return
    chosen = select("compiled,attention=reference", CPU)
    assert chosen.names["attention"] == chosen.names["attention_mask"] == "reference"
    assert chosen.names["mlp"] == "compiled"
    assert "attention             reference" in chosen.describe()
