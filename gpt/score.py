"""Bits per byte of a model on the validation tokens: every token after the first exactly once.

Windows of `context` tokens start every `stride` tokens. The first window scores all its targets, each later one its
last `stride` targets, so a token is predicted from at least context - stride tokens before it, where there are as many.
With stride == context the rows do not overlap: plain scoring. Smaller strides are sliding scoring. Documents need no
care here: a model with a document mask finds their starts by itself, from BOS.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import BOS
from gpt.data import ByteTable, DataError, token_bytes
from gpt.distributed import Ranks
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

    def as_dict(self) -> dict[str, float]:
        """For a record, as JSON can hold it."""
        return asdict(self) | {"bpb": self.bpb, "nats_per_token": self.nats_per_token}

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


@torch.no_grad()
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
    """Score `text`; call on every rank, each gets the whole result.

    Ranks take windows in turn and sums are float64. One forward pass has batch_tokens // context windows, padded, so
    that there is one shape to compile, and a second one for the first window of sliding scoring. losses: what stands
    for model.losses; by default it is compiled as model.ops say. Raises ValueError where the stride is not one of
    1..context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: wanted 1 to the context, {context}")
    losses = losses or model.ops.graph(model.losses)
    count = text.tokens.numel()
    windows = 1 + math.ceil(max(0, count - 1 - context) / stride)
    share = math.ceil(windows / ranks.world_size)
    rows = max(1, min(batch_tokens // context, share))
    rotary = model.rotary(context)
    ahead = torch.arange(context, device=ranks.device)
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # nats, tokens, bytes

    def add(indices: Sequence[int], scored: int) -> None:
        """Score the last `scored` targets of these windows."""
        padding = [windows] * (rows - len(indices))  # starts where nothing is left to score
        index = torch.tensor([*indices, *padding]).to(ranks.device, non_blocking=True)
        positions = (index * stride)[:, None] + ahead  # of inputs; the target of each is the next
        # Whatever is read instead of what lies past the end comes after every scored position: causality hides it.
        inputs = text.tokens[positions.clamp_max(count - 1)].long()
        targets = positions[:, context - scored :]
        valid = (targets < count - 1) & (index < windows)[:, None]
        targets = targets.clamp_max(count - 2)
        nats = losses(inputs, text.tokens[targets + 1].long(), depth, rotary)
        sums[0] += torch.where(valid, nats.double(), 0.0).sum()
        sums[1] += valid.sum()
        sums[2] += torch.where(valid, text.lengths[targets], 0).sum()

    shapes = dict.fromkeys([context] * (ranks.rank == 0) + [stride] * (windows > 1))
    if ranks.device.type == "cuda":
        for scored in shapes:  # compile before the clock starts, and not on validation tokens
            inputs, targets = (torch.full((rows, size), BOS, device=ranks.device) for size in (context, scored))
            losses(inputs, targets, depth, rotary)
        torch.cuda.synchronize()
    begin = time.perf_counter()
    mine = range(ranks.rank, windows, ranks.world_size)
    if stride < context and ranks.rank == 0:
        add(mine[:1], context)
        mine = mine[1:]
    for first in range(0, len(mine), rows):
        add(mine[first : first + rows], stride)
    ranks.all_reduce(sums)
    nats, tokens, size = sums.tolist()
    if tokens != count - 1:
        raise RuntimeError(f"{tokens:.0f} targets were scored, wanted each of {count - 1} once")
    return Score(nats, int(tokens), int(size), context, stride, time.perf_counter() - begin)
