"""Bits per byte of a model on the validation tokens: every token after the first exactly once.

Target i is token i + 1, predicted from tokens 0..i. Windows of `context` tokens start every `stride` tokens. The first
window scores all its targets, each later one its last `stride` targets, so a token is predicted from at least
context - stride tokens before it, where there are as many. With stride == context the rows do not overlap: plain
scoring. Smaller strides are sliding scoring. Documents need no care here: a model with a document mask finds their
starts by itself, from BOS. gpt/ttt.py scores in the same windows with weights that learn on the way.

What is shared, exactly: a target's document may begin within its window, and then nothing before that reaches it, so
that every window from there on gives it the same probability (rotary knows distances alone). Where documents are masked
such targets are scored once, in rows that documents are packed into, and windows are left for those further than a
window into their document. Between windows that begin inside of a document nothing can be shared but the first layer's
product: from there on every position knows how far back its window reaches. What each window leaves out is the last
layer of the positions that it does not score (`GPT.hidden`).
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import BOS
from gpt.data import ByteTable, DataError, token_bytes
from gpt.distributed import Ranks
from gpt.ledger import Ledger, fingerprint, save, tokens_sha256
from gpt.model import GPT

Losses = Callable[[Tensor, Tensor, Sequence[int], tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class Score:
    """Sums over all scored tokens, and how they were scored."""

    nats: float
    tokens: int
    bytes: int
    context: int
    stride: int
    seconds: float  # of scoring, without compiling
    form: str  # plain, sliding, or one of gpt/ttt.py
    ledger: Ledger = field(repr=False, compare=False)
    log: Tensor = field(repr=False, compare=False)  # (tokens,) float32: nats of each target
    settings: dict[str, float] = field(default_factory=dict)  # of test-time training

    def as_dict(self) -> dict[str, Any]:
        """For a record, as JSON can hold it."""
        names = ("nats", "tokens", "bytes", "context", "stride", "seconds", "form", "settings", "bpb", "nats_per_token")
        return {name: getattr(self, name) for name in names}

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / self.bytes


class ValidationText(NamedTuple):
    """Validation tokens on a device, where windows are cut from them."""

    tokens: Tensor  # (count,) int32
    lengths: Tensor  # (count - 1,) int16: bytes of text of each token after the first

    @property
    def targets(self) -> int:
        return self.lengths.numel()


def validation_text(tokens: NDArray[np.uint16], table: ByteTable, device: torch.device) -> ValidationText:
    """Move (count,) tokens to a device and look up their bytes there.

    Raises DataError where there are fewer than two tokens, or where they stand for no text at all.
    """
    if tokens.size < 2:
        raise DataError(f"validation has {tokens.size} tokens, wanted at least 2")
    moved = torch.from_numpy(tokens.astype(np.int32)).to(device)
    lengths = token_bytes(moved[:-1], moved[1:], table.to(device))
    if not lengths.any():
        raise DataError(f"the {tokens.size} validation tokens stand for no bytes of text")
    return ValidationText(moved, lengths)


def moved(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device, without waiting for what that is at."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class TokenLog:
    """Nats of every target on the device, and how often each was scored."""

    def __init__(self, count: int, device: torch.device) -> None:
        # One place more, where padding goes: a mask would need a host synchronisation.
        self.count = count
        self.nats = torch.zeros(count + 1, device=device)
        self.times = torch.zeros(count + 1, dtype=torch.uint8, device=device)

    def put(self, targets: Tensor, valid: Tensor, nats: Tensor) -> None:
        """Note the nats of the valid ones among targets; all three have one shape."""
        place = torch.where(valid, targets, self.count).flatten()
        self.nats.scatter_(0, place, nats.detach().float().flatten())
        self.times.scatter_add_(0, place, torch.ones_like(place, dtype=torch.uint8))

    def collect(self, ranks: Ranks) -> Tensor:
        """(count,) nats, of all ranks together. Raises RuntimeError where a target was not scored exactly once."""
        nats, times = self.nats[: self.count], self.times[: self.count].int()
        ranks.all_reduce(nats)
        ranks.all_reduce(times)
        wrong = int((times != 1).sum())
        if wrong:
            raise RuntimeError(f"{wrong} of {self.count} targets were not scored once each")
        return nats


Span = tuple[int, int, int]  # (begin, scored, end): tokens begin..end-1 of a row, targets scored..end-1 of them


def rows_of_documents(spans: Sequence[Span], context: int) -> list[list[Span]]:
    """Pack spans of at most `context` tokens into few rows: longest first, each where the least space is left over."""
    rows: list[list[Span]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for span in sorted(spans, key=lambda span: span[0] - span[2]):
        size = span[2] - span[0]
        place = bisect.bisect_left(space, (size, -1))
        free, row = space.pop(place) if place < len(space) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(span)
        if free > size:
            bisect.insort(space, (free - size, row))
    return rows


class Windows:
    """Scores ranges of targets in windows, into a log; each rank takes windows in turn.

    One forward pass has at most batch_tokens // context windows. Where graphs are compiled it is padded, so that there
    is one shape to compile for windows, and a second one for whole rows. segment: targets of the longest range that
    will be asked for. Raises ValueError where the stride is not one of 1..context.
    """

    def __init__(
        self,
        model: GPT,
        text: ValidationText,
        depth: Sequence[int],
        ranks: Ranks,
        *,
        context: int,
        stride: int,
        batch_tokens: int,
        segment: int | None = None,
        losses: Losses | None = None,
    ) -> None:
        if not 1 <= stride <= context:
            raise ValueError(f"stride {stride}: wanted 1 to the context, {context}")
        self.text, self.depth, self.ranks, self.context, self.stride = text, depth, ranks, context, stride
        self.losses = losses or model.ops.graph(model.losses)
        self.log = TokenLog(text.targets, ranks.device)
        share = math.ceil(math.ceil((segment or text.targets) / stride) / ranks.world_size)
        passes = math.ceil(share / max(1, batch_tokens // context))
        self.rows = math.ceil(share / passes)  # with as little padding as can be
        self.padded = "compiled" in model.ops.names.values()
        self.rotary = model.rotary(context)
        self.documents = None  # first token of each, where windows share them; the text's own first token begins one
        if model.config.document_mask and stride < context:
            begins = (text.tokens == BOS).nonzero().flatten().cpu().numpy()
            self.documents = np.union1d(0, begins)
            self.headless = self.documents.size > begins.size  # the text begins within a document

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile on a GPU, before the clock starts and not on validation tokens."""
        if self.ranks.device.type != "cuda":
            return
        for scored in dict.fromkeys((self.context, self.stride)):
            inputs, targets = (
                torch.full((self.rows, size), BOS, device=self.ranks.device) for size in (self.context, scored)
            )
            self.losses(inputs, targets, self.depth, self.rotary)
        torch.cuda.synchronize()

    @torch.no_grad()
    def score(self, first: int, last: int) -> None:
        """Score targets first..last-1; call on every rank, each scores its share.

        Raises ValueError where the range begins inside of the first window: that one scores its targets all at once.
        """
        if first and first + self.stride < self.context:
            raise ValueError(f"targets from {first} on: wanted 0, or at least {self.context - self.stride}")
        whole = min(self.context, last) if first == 0 and self.stride < self.context else first
        groups = np.arange(whole, last, self.stride)
        rows = [[(0, 0, whole)]] if whole > first else []
        if self.documents is not None:
            alone, spans = self._shared(self.documents, first, whole, last)
            # A document without a BOS would run on from whatever stands before it: its spans, the first, stay apart.
            apart = sum(span[0] == 0 for span in spans) if self.headless else 0
            rows = [[span] for span in spans[:apart]] + rows_of_documents(spans[apart:], self.context)
            groups = groups[alone]
        mine = slice(self.ranks.rank, None, self.ranks.world_size)
        rows, groups = rows[mine], groups[mine]
        for begin in range(0, len(rows), self.rows):
            self._add_rows(rows[begin : begin + self.rows])
        for batch in np.array_split(groups, math.ceil(groups.size / self.rows)) if groups.size else ():
            self._add_windows(batch, last)

    def _shared(
        self, documents: NDArray[np.int64], first: int, whole: int, last: int
    ) -> tuple[NDArray[np.bool_], list[Span]]:
        """Which groups of targets from `whole` on need a window of their own; spans of documents with all others."""
        places = np.arange(first, last)
        of = np.searchsorted(documents, places, side="right") - 1
        # A group's first target is in the earliest of its documents: where that begins in the window, all do.
        begins = np.arange(whole, last, self.stride) + self.stride - self.context
        alone = documents[of[whole - first :: self.stride]] < begins
        free = np.ones(last - first, dtype=bool)
        free[whole - first :] = ~alone.repeat(self.stride)[: last - whole]
        places, of = places[free], of[free]
        cuts = np.flatnonzero((np.diff(places) > 1) | (np.diff(of) > 0)) + 1
        heads, tails = np.append(0, cuts), np.append(cuts, places.size)
        spans = zip(documents[of[heads]], places[heads], places[tails - 1] + 1, strict=True) if places.size else ()
        return alone, [(int(begin), int(scored), int(end)) for begin, scored, end in spans]

    def _add_rows(self, rows: Sequence[Sequence[Span]]) -> None:
        """Score whole rows: of every span the targets from `scored` on."""
        shape = self.rows if self.padded else len(rows), self.context
        index, wanted = np.full(shape, -1), np.zeros(shape, dtype=bool)
        for number, spans in enumerate(rows):
            place = 0
            for begin, scored, end in spans:
                index[number, place : place + end - begin] = np.arange(begin, end)
                wanted[number, place + scored - begin : place + end - begin] = True
                place += end - begin
        targets = moved(index, self.ranks.device)
        # What a row is filled up with comes last: causality hides it.
        inputs = torch.where(targets < 0, BOS, self.text.tokens[targets.clamp_min(0)].long())
        nats = self.losses(inputs, self.text.tokens[targets + 1].long(), self.depth, self.rotary)
        self.log.put(targets, moved(wanted, self.ranks.device), nats)

    def _add_windows(self, groups: NDArray[np.int64], last: int) -> None:
        """Score groups of `stride` targets, by their first; each is what its window ends with."""
        count = self.text.targets
        padding = np.full(self.rows - groups.size if self.padded else 0, last)
        index = moved(np.append(groups, padding), self.ranks.device)[:, None]
        ahead = torch.arange(self.context, device=self.ranks.device)
        targets = index + ahead[: self.stride]
        # Whatever is read instead of what lies past the end comes after every scored position.
        inputs = self.text.tokens[(index + self.stride - self.context + ahead).clamp_max(count)].long()
        nats = self.losses(inputs, self.text.tokens[(targets + 1).clamp_max(count)].long(), self.depth, self.rotary)
        self.log.put(targets, targets < last, nats)


def finished(
    log: TokenLog,
    ledger: Ledger,
    text: ValidationText,
    ranks: Ranks,
    context: int,
    stride: int,
    form: str,
    begin: float,
    settings: Mapping[str, float] | None = None,
) -> Score:
    """The score that a log amounts to, on every rank; closes the ledger. begin: time.perf_counter() at the start."""
    nats_of = log.collect(ranks)
    nats, size = ledger.close(nats_of, text.lengths)
    seconds = time.perf_counter() - begin
    return Score(nats, text.targets, size, context, stride, seconds, form, ledger, nats_of, dict(settings or {}))


def score(
    model: GPT,
    text: ValidationText,
    depth: Sequence[int],
    ranks: Ranks,
    *,
    context: int,
    stride: int,
    batch_tokens: int,
    losses: Losses | None = None,
) -> Score:
    """Score `text` with the weights as they are; call on every rank, each gets the whole result.

    losses: what stands for model.losses; by default it is compiled as model.ops say. Raises ValueError where the
    stride is not one of 1..context.
    """
    windows = Windows(
        model, text, depth, ranks, context=context, stride=stride, batch_tokens=batch_tokens, losses=losses
    )
    windows.warm_up()
    begin = time.perf_counter()
    windows.score(0, text.targets)
    ledger = Ledger(fingerprint(model.parameters()))
    ledger.scored_in_lines(0, text.targets, ledger.base)
    form = "plain" if stride == context else "sliding"
    return finished(windows.log, ledger, text, ranks, context, stride, form, begin)


def record_scores(
    path: Path, scores: Mapping[str, Score], text: ValidationText, artifact: Mapping[str, str | None], leaking: bool
) -> dict[str, Any]:
    """The entry "scores" of the record that `path` will hold; writes their ledgers beside it.

    artifact: SHA-256 of the one that each score is of, or None; leaking: Config.leaking.
    """
    shards = tokens_sha256(text.tokens.cpu().numpy().astype(np.uint16))
    entries: dict[str, Any] = {}
    for name, score in scores.items():
        names = ("form", "context", "stride", "nats", "tokens", "bytes")
        header = {key: getattr(score, key) for key in names} | {"artifact": artifact[name], "shards": shards}
        file = path.with_name(f"{path.stem}-{name}.ledger.gz")
        kept = save(file, header | {"leaking": leaking, "settings": score.settings}, score.ledger)
        entries[name] = score.as_dict() | {"leaking": leaking, "ledger": kept}
    return entries
