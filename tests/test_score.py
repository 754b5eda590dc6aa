"""Scoring against its definition, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt.data import ByteTable, DataError, token_bytes
from gpt.score import Score, ValidationText, rows_of_documents, score, validation_text
from tests.tiny import ALONE, CPU, Meeting, ThreadRanks, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 64
TABLE = ByteTable(
    torch.cat((torch.zeros(4), torch.arange(VOCAB - 4) % 5 + 1)).short(),
    torch.arange(VOCAB) % 3 == 0,
    torch.arange(VOCAB) < 4,
)


def text_of(tokens: Tensor) -> ValidationText:
    return validation_text(tokens.numpy().astype(np.uint16), TABLE, CPU)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(
    ("count", "stride", "context"),
    [
        (64, 16, 16), (65, 16, 16), (70, 16, 16), (70, 4, 16), (69, 4, 16), (71, 5, 16), (9, 4, 16), (17, 1, 16),
        (150, 64, 64), (150, 24, 64),  # longer than rows in training
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [1, 5])  # 5: a text that begins within a document
def test_score_is_its_definition(first: int, document_mask: bool, count: int, stride: int, context: int) -> None:
    config = tiny_config(document_mask=document_mask)
    model, depth = tiny_model(config), config.depth(True)
    tokens = random_tokens(count, VOCAB)
    tokens[0] = first
    tokens[3::7] = 1  # documents that are packed together
    found = score(model, text_of(tokens), depth, ALONE, context=context, stride=stride, batch_tokens=64)
    nats = 0.0
    size = 0
    for t in range(1, count):
        # The first window on the grid of strides that reaches the token.
        start = stride * math.ceil(max(0, t - context) / stride)
        row = tokens[None, start:t]
        with torch.no_grad():
            logits = model.logits(row, depth, model.rotary(row.size(1)))[0].double()
        nats -= float(logits.log_softmax(-1)[tokens[t]])
        size += int(token_bytes(tokens[t - 1], tokens[t], TABLE))
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert (found.tokens, found.bytes) == (count - 1, size)
    assert found.bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found.nats_per_token == pytest.approx(nats / (count - 1), rel=1e-6)


def counting(seen: list[int]) -> object:
    """Losses of 1 that note how often each target was asked for; targets are told apart by their id."""

    def losses(tokens: Tensor, targets: Tensor, depth: Sequence[int], rotary: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(targets.numel())
        return targets.double() ** 2

    return losses


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("stride", [3, 8, 16])
def test_each_token_once_on_any_number_of_ranks(world_size: int, stride: int, document_mask: bool) -> None:
    config = tiny_config(document_mask=document_mask)
    model, text = tiny_model(config), text_of(random_tokens(150, VOCAB))
    model.ops = replace(model.ops, names={"mlp": "compiled"})  # so that shapes matter
    meeting = Meeting(world_size)
    shapes: list[list[int]] = [[] for _ in range(world_size)]

    def run(rank: int) -> Score:
        return score(
            model,
            text,
            config.depth(True),
            ThreadRanks(rank, meeting),
            context=16,
            stride=stride,
            batch_tokens=48,
            losses=counting(shapes[rank]),  # type: ignore[arg-type]
        )

    with ThreadPoolExecutor(world_size) as threads:
        found = list(threads.map(run, range(world_size)))
    for result in found:
        assert result.tokens == 149
        assert result.nats == float((text.tokens[1:].double() ** 2).sum())
        assert result.bytes == int(text.lengths.sum())
    for seen in shapes:
        assert len(set(seen)) <= (2 if stride < 16 else 1)  # shapes to compile


@pytest.mark.parametrize("lengths", [(5, 9, 3, 30, 2, 14, 1, 1, 40, 16), (3,) * 35, (105,)])
def test_documents_share_rows(lengths: tuple[int, ...]) -> None:
    """Windows of their own are left for targets that are further into their document than a window reaches."""
    context, stride = 16, 4
    tokens = torch.cat([torch.tensor([1] + [4 + i] * (n - 1)) for i, n in enumerate(lengths)])
    config = tiny_config(document_mask=True)
    model, depth = tiny_model(config), config.depth(True)
    seen: list[tuple[int, int]] = []

    def losses(x: Tensor, y: Tensor, *rest: Any) -> Tensor:
        seen.append((x.size(0), y.size(1)))
        return model.losses(x, y, *rest)

    found = score(model, text_of(tokens), depth, ALONE, context=context, stride=stride, batch_tokens=64, losses=losses)
    far = 0  # groups with a target that is so far into its document
    start = torch.where(tokens == 1, torch.arange(tokens.numel()), 0).cummax(0).values
    for group in range(context, tokens.numel() - 1, stride):
        far += int((start[group : group + stride] < group + stride - context).any())
    assert sum(rows for rows, scored in seen if scored == stride) == far
    whole = sum(rows for rows, scored in seen if scored == context)
    assert whole <= math.ceil(1.5 * sum(min(n, context) for n in lengths) / context) + 1
    # The definition: every target in the first window of the grid that reaches it.
    for i in range(tokens.numel() - 1):
        begin = stride * math.ceil(max(0, i + 1 - context) / stride)
        row = tokens[None, begin : i + 1]
        wanted = model.losses(row, tokens[None, i + 1 : i + 2], depth, model.rotary(row.size(1))).detach()
        assert abs(float(found.log[i]) - float(wanted)) < 2e-6 * max(1, float(wanted))


def test_packing() -> None:
    spans = [(0, 0, 10), (10, 12, 13), (20, 20, 36), (40, 40, 46), (50, 50, 53), (60, 60, 61)]
    rows = rows_of_documents(spans, 16)
    assert sorted(span for row in rows for span in row) == spans
    assert all(sum(end - begin for begin, _, end in row) <= 16 for row in rows)
    assert len(rows) == 3  # 10 + 6, 16, 3 + 3 + 1
    assert rows_of_documents([], 16) == []


def test_bytes_are_those_of_the_whole_text() -> None:
    tokens = random_tokens(500, VOCAB)
    lengths = [
        int(TABLE.base_bytes[t]) + int(TABLE.has_leading_space[t] and not TABLE.is_boundary[p])
        for p, t in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
    ]
    assert text_of(tokens).lengths.tolist() == lengths


def test_unusable_text_and_stride() -> None:
    with pytest.raises(DataError, match="1 tokens, wanted at least 2"):
        text_of(torch.tensor([1]))
    with pytest.raises(DataError, match="no bytes"):
        text_of(torch.tensor([1, 1, 2]))
    config = tiny_config()
    text = text_of(random_tokens(50, VOCAB))
    with pytest.raises(ValueError, match="stride 17"):
        score(tiny_model(config), text, (0,), ALONE, context=16, stride=17, batch_tokens=64)
