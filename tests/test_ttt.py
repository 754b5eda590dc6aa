"""Test-time training: what it may see, what it learns, and that every rank and every form agrees with plain sums."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt import preflight
from gpt.config import BOS, ConfigError
from gpt.distributed import Ranks
from gpt.ledger import LedgerError, audit, read, tokens_sha256, write
from gpt.model import GPT
from gpt.score import Score, score, validation_text
from gpt.ttt import SGD, Document, adapt, documents_of, fine_tune, parse_form
from kernels import select
from tests.test_score import TABLE, text_of
from tests.tiny import ALONE, Meeting, ThreadRanks, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, CONTEXT = 64, 16
FORMS = preflight.scoring_forms(CONTEXT)
TIGHT = 1e-6  # nats of a token, in float64; the log of both is float32
ADAPTING = {name: form for name, form in FORMS.items() if not form.isdigit()}


def made(document_mask: bool = True, dtype: torch.dtype = torch.float32) -> tuple[GPT, tuple[int, ...]]:
    config = tiny_config(document_mask=document_mask)
    return tiny_model(config, dtype), config.depth(True)


def run(form: str, tokens: Tensor, model: GPT, depth: tuple[int, ...]) -> Score:
    return adapt(model, text_of(tokens), depth, ALONE, parse_form(form), context=CONTEXT, stride=4, batch_tokens=64)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_later_tokens_move_nothing_before_them(name: str, document_mask: bool) -> None:
    model, depth = made(document_mask)  # smear, XSA, recurrence and skips, all with weights that count
    tokens = preflight.text_with_documents(90, VOCAB, torch.Generator().manual_seed(3))
    log_of = preflight.logs(model, depth, FORMS[name], CONTEXT, ALONE)
    starts = (tokens == BOS).nonzero().flatten().tolist()
    # Before, on and behind borders of windows (16, 20), chunks (32, 64) and documents.
    near = {b + d for b in (16, 20, 64) for d in (0, 1)} | {32, *(start + 1 for start in starts), *starts[2:4]}
    past, future = preflight.future_moves_past(log_of, tokens, sorted(b for b in near if 1 <= b < 90), VOCAB)
    assert past < preflight.TOLERANCE
    assert future > 0.01


def test_the_probe_finds_a_leak() -> None:
    """Weights that were fine-tuned on the text, as the seed's were, and a model that looks ahead."""
    config = tiny_config()
    tokens = preflight.text_with_documents(64, VOCAB, torch.Generator().manual_seed(3))

    def seed_form(tokens: Tensor) -> Tensor:
        model = tiny_model(config).requires_grad_(True)
        settings = tiny_config(pre_quant="validation", allow_leak=True, pre_quant_epochs=2)
        fine_tune(model, tokens[:49].unfold(0, 17, 16), config.depth(True), ALONE, settings)
        return preflight.logs(model, config.depth(True), "4", CONTEXT, ALONE)(tokens)

    def looks_ahead(tokens: Tensor) -> Tensor:
        return tokens[1:].float() + 0.01 * tokens.roll(-3)[1:]

    for log_of in (seed_form, looks_ahead):
        assert preflight.future_moves_past(log_of, tokens, [30, 40], VOCAB)[0] > 10 * preflight.TOLERANCE


@pytest.mark.parametrize("name", FORMS)
def test_probabilities_of_a_token_sum_to_one(name: str) -> None:
    """End to end: what is scored may not depend on the token that is scored, nor on those after it."""
    config = tiny_config(vocab_size=16)
    log_of = preflight.logs(tiny_model(config), config.depth(True), FORMS[name], CONTEXT, ALONE)
    tokens = random_tokens(36, 16)
    assert preflight.probability_sum(log_of, tokens, 16) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["plain", "sliding", "document"])
def test_a_document_starts_clean(name: str) -> None:
    model, depth = made()
    tokens = preflight.text_with_documents(64, VOCAB, torch.Generator().manual_seed(4))
    log_of = preflight.logs(model, depth, FORMS[name], CONTEXT, ALONE)
    assert preflight.past_moves_document(log_of, tokens) < preflight.TOLERANCE
    unmasked = preflight.logs(*made(document_mask=False), "4", CONTEXT, ALONE)
    assert preflight.past_moves_document(unmasked, tokens) > 0.01


@pytest.mark.parametrize("name", FORMS)
def test_bpb_from_the_log_of_tokens(name: str) -> None:
    """Sums in plain Python, bytes from the piece table by the rule that defines BPB, not by the code under test."""
    model, depth = made()
    tokens = random_tokens(150, VOCAB)
    log = preflight.logs(model, depth, FORMS[name], CONTEXT, ALONE)(tokens).tolist()
    form = FORMS[name]
    found = (
        score(model, text_of(tokens), depth, ALONE, context=CONTEXT, stride=int(form), batch_tokens=64)
        if form.isdigit()
        else run(form, tokens, model, depth)
    )
    ids: list[int] = tokens.tolist()
    nats, size = 0.0, 0
    for previous, token, loss in zip(ids[:-1], ids[1:], log, strict=True):
        nats += loss
        size += int(TABLE.base_bytes[token])
        if TABLE.has_leading_space[token] and not TABLE.is_boundary[previous]:
            size += 1
    assert (found.tokens, found.bytes) == (149, size)
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found.bpb == pytest.approx(nats / 149 / math.log(2) * 149 / size, rel=1e-6)
    assert found.nats_per_token == pytest.approx(nats / 149, rel=1e-6)


def repetitive(count: int) -> Tensor:
    """Documents that each repeat a few tokens of their own."""
    generator = torch.Generator().manual_seed(5)
    parts = [
        torch.cat((torch.tensor([BOS]), torch.randint(4, VOCAB, (5,), generator=generator).repeat(10)))
        for _ in range(count // 51 + 1)
    ]
    return torch.cat(parts)[:count]


@pytest.mark.parametrize("name", ADAPTING)
def test_it_learns_and_gives_the_weights_back(name: str) -> None:
    model, depth = made()
    tokens = repetitive(600)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    sliding = score(model, text_of(tokens), depth, ALONE, context=CONTEXT, stride=4, batch_tokens=64)
    found = run(ADAPTING[name].replace("lr=0.05", "lr=0.02"), tokens, model, depth)
    assert found.bpb < sliding.bpb - 0.003
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
        assert model.get_parameter(key).grad is None
    still = run(",".join((ADAPTING[name], "lr=0")), tokens, model, depth)
    if name == "chunk":  # windows of the others are cut at documents
        assert still.nats == pytest.approx(sliding.nats, rel=1e-6)


def test_chunks_are_their_definition() -> None:
    """SGD as torch has it, by hand: score a chunk in windows, then three epochs on its rows."""
    model, depth = made(dtype=torch.float64)
    tokens, lr = random_tokens(110, VOCAB), 0.05
    found = run("chunk,tokens=48,rows=2,epochs=3,lr=0.05,clip=0.5", tokens, model, depth)
    reference = tiny_model(tiny_config(), torch.float64)
    optimizer = torch.optim.SGD(reference.parameters(), lr, momentum=0.9)
    wanted: list[Tensor] = []
    rotary = reference.rotary(CONTEXT)
    for chunk, (start, end) in enumerate(((0, 48), (48, 96), (96, 109))):
        text = text_of(tokens)
        whole = score(reference, text, depth, ALONE, context=CONTEXT, stride=4, batch_tokens=64).log
        wanted.append(whole[start:end])
        if end == 109:
            break
        rows = torch.stack([tokens[start + 16 * r : start + 16 * r + 17] for r in range(3)])
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * chunk / 2))
        for _ in range(3):
            for part in (rows[:2], rows[2:]):
                optimizer.zero_grad()
                reference(part[:, :-1], part[:, 1:], depth, rotary).backward()
                torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
                optimizer.step()
    assert torch.allclose(found.log, torch.cat(wanted), rtol=0, atol=TIGHT)
    trainings = [line for line in found.ledger.lines if line[0] == "train"]
    assert [(line[1], line[2]) for line in trainings] == [(0, 48), (48, 96)]


def test_document_adapters_are_their_definition() -> None:
    """One document alone, its adapter applied to the weights of a whole model, gradient by torch."""
    model, depth = made(dtype=torch.float64)
    tokens = torch.cat((torch.tensor([BOS]), random_tokens(60, VOCAB)[1:39].clamp_min(4)))
    form = "document,tokens=8,rank=3,lr=0.02,scale=2,beta1=0.5,beta2=0.9"
    found = run(form, tokens, model, depth)
    settings = parse_form(form)
    assert isinstance(settings, Document)
    generator = torch.Generator().manual_seed(0)
    layers = 3
    shapes = {"kv_bank": (0, 3), "qo_bank": (3, 6), "mlp_up_bank": (0, 3), "mlp_down_bank": (0, 3)}
    reference = tiny_model(tiny_config(document_mask=False), torch.float64).requires_grad_(False)
    base = {name: reference.get_parameter(name).clone() for name in shapes}
    pairs = {}
    for name, (begin, end) in shapes.items():
        rows, columns = base[name].shape[1:]
        a = torch.randn(layers, 3, columns, generator=generator) * columns**-0.5
        pairs[name] = a.requires_grad_(), torch.zeros(end - begin, rows, 3, requires_grad=True)
    flat = [tensor for pair in pairs.values() for tensor in pair]
    optimizer = torch.optim.Adam(flat, 0.02, betas=(0.5, 0.9), eps=1e-8)
    for piece in range(5):
        start, end = 8 * piece, min(8 * piece + 8, 38)
        row = tokens[max(0, start + 8 - CONTEXT) : end]
        for name, (begin, stop) in shapes.items():
            a, b = pairs[name]
            whole = base[name].clone()
            whole[begin:stop] += 2 * b @ a
            delattr(reference, name)
            setattr(reference, name, whole)
        losses = reference.losses(row[None], tokens[None, start + 1 : end + 1], depth, reference.rotary(row.numel()))[0]
        assert torch.allclose(found.log[start:end], losses.detach().float(), rtol=0, atol=TIGHT)
        if piece < 4:
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()


@pytest.mark.parametrize("name", ADAPTING)
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks(name: str, world_size: int) -> None:
    tokens = preflight.text_with_documents(150, VOCAB, torch.Generator().manual_seed(3))
    # float64: Adam's first steps have the size of its rate whatever the gradient's, so they blow a rounding up.
    alone = run(ADAPTING[name], tokens, *made(dtype=torch.float64))
    meeting = Meeting(world_size)

    def one(rank: int) -> Score:
        model, depth = made(dtype=torch.float64)
        form = parse_form(ADAPTING[name])
        ranks = ThreadRanks(rank, meeting)
        return adapt(model, text_of(tokens), depth, ranks, form, context=CONTEXT, stride=4, batch_tokens=64)

    with ThreadPoolExecutor(world_size) as threads:
        found = list(threads.map(one, range(world_size)))
    for result in found:
        assert torch.allclose(result.log, alone.log, atol=2e-3)
        assert result.nats == found[0].nats
        header = {"ledger": 1, "artifact": None, "base": result.ledger.base, "leaking": False}
        names = ("form", "context", "stride", "nats", "tokens", "bytes", "settings")
        header |= {key: getattr(result, key) for key in names}
        ids = tokens.numpy().astype(np.uint16)
        lengths = text_of(tokens).lengths.numpy()
        audit(*read(write(header | {"shards": tokens_sha256(ids)}, result.ledger.lines)), tokens=ids, lengths=lengths)


def test_documents_cover_all_targets() -> None:
    for ids in ([1, 5, 6, 1, 7, 1], [5, 6, 1, 7, 8], [1, 1, 1, 5], [5, 6]):
        text = text_of(torch.tensor([*ids]))
        ranges = documents_of(text)
        assert [i for begin, end in ranges for i in range(begin, end)] == list(range(len(ids) - 1))
        assert {begin for begin, _ in ranges} >= {i for i, token in enumerate(ids[:-1]) if token == BOS}


def test_forms_are_parsed() -> None:
    form = parse_form("chunk,lr=0.01,epochs=2")
    assert isinstance(form, SGD)
    assert (form.lr, form.epochs, form.momentum) == (0.01, 2, 0.9)
    for text, message in (
        ("magic", "'magic' is not one of chunk, document, phased"),
        ("chunk,rank=3", "chunk has no 'rank'"),
        ("chunk,lr=fast", "lr='fast' is no float"),
        ("chunk,momentum=1", "momentum='1' is no float in its range"),
        ("document,rank=0", "rank='0' is no int in its range"),
        ("chunk,lr=nan", "lr='nan'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_form(text)
    model, depth = made()
    for text, message in (("chunk,tokens=8", "chunks of 8 tokens"), ("document,tokens=32", "pieces of 32 tokens")):
        with pytest.raises(ConfigError, match=message):
            run(text, random_tokens(50, VOCAB), model, depth)


def test_short_texts() -> None:
    model, depth = made()
    for form in ADAPTING.values():
        for count in (2, 3, 17, 24, 25):
            assert run(form, random_tokens(count, VOCAB), model, depth).tokens == count - 1


def test_fine_tuning_leaves_the_first_layer_alone() -> None:
    config = tiny_config(pre_quant="validation", allow_leak=True, pre_quant_epochs=3, pre_quant_lr=1e-2)
    rows = random_tokens(161, VOCAB).unfold(0, 17, 16)
    for soup in (1, 2):
        model, before = tiny_model(config), tiny_model(config)
        settings = config.model_copy(update={"pre_quant_soup": soup})
        first, last = fine_tune(model, rows, config.depth(True), ALONE, settings)
        assert last < first
        for name, weight in model.named_parameters():
            start = before.get_parameter(name)
            assert not torch.equal(weight, start)
            if name.endswith("bank") or name in ("attn_scale", "mlp_scale", "resid_mix", "q_gain"):
                fixed = [0, 3] if name in ("qo_bank", "kv_bank") else [0]
                assert torch.allclose(weight[fixed], start[fixed], atol=1e-6)


def test_a_leak_has_to_be_allowed() -> None:
    with pytest.raises(ConfigError, match="--allow-leak"):
        tiny_config(pre_quant="validation")
    assert tiny_config(pre_quant="validation", allow_leak=True).leaking
    assert not tiny_config(pre_quant="train", allow_leak=True).leaking
    assert issubclass(LedgerError, ValueError)


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_nothing_waits_for_the_device(name: str, document_mask: bool) -> None:
    """More text, no more waiting: what there is of it is before the first window and after the last."""
    device = torch.device("cuda")
    config = tiny_config(document_mask=document_mask, model_dim=64, rope_dims=8)
    model = tiny_model(config).to(device)
    model.ops, model.dtype = select("auto", device), torch.bfloat16
    settings: dict[str, Any] = {"context": CONTEXT, "stride": 4, "batch_tokens": 64}
    ranks, form, depth = Ranks(0, 1, device), FORMS[name], config.depth(True)

    def waits(count: int) -> list[str]:
        tokens = preflight.text_with_documents(count, VOCAB, torch.Generator().manual_seed(3))
        text = validation_text(tokens.numpy().astype(np.uint16), TABLE, device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if form.isdigit():
                    score(model, text, depth, ranks, **settings | {"stride": int(form)})
                else:
                    adapt(
                        model, text, depth, ranks, parse_form(form.replace("documents=3", "documents=64")), **settings
                    )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]

    waits(300)  # compiles
    few, many = waits(300), waits(900)
    assert len(few) == len(many), many
