"""Shards of tokens, and the batches that a run trains on.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then uint16 tokens. Each document
starts with BOS (id 1) and may go on in the next shard. ``python -m gpt.data download|tokenize|check`` makes and checks
shards (gpt/prepare.py).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import BOS, Config
from gpt.tokenizer import ByteTable, DataError, Tokenizer, token_bytes

__all__ = [
    "BOS",
    "BatchSource",
    "ByteTable",
    "DataError",
    "ShardReport",
    "Tokenizer",
    "TrainLoader",
    "calibration_batches",
    "check_shards",
    "held_out_rows",
    "load_validation",
    "open_shard",
    "rows_of",
    "token_bytes",
    "train_shards",
    "val_shards",
    "write_shard",
]

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
AHEAD = 3  # batches that a loader prepares before they are asked for
CALIBRATION = 1 << 32  # second word of the calibration draw's seed; epochs, the other second words, stay below

Tokens = NDArray[np.uint16]


# Shards.


def open_shard(path: str | Path) -> Tokens:
    """The tokens of a shard, memory-mapped read-only: (count,) uint16.

    Raises DataError where magic, version or size are not those of a whole shard.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such shard")
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, wanted at least the header of {HEADER_BYTES}")
    magic, version, count = (int(word) for word in header[:3])
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path}: magic {magic}, version {version}; wanted {MAGIC}, {VERSION}")
    if count < 1:
        raise DataError(f"{path}: {count} tokens by its header, wanted at least 1")
    wanted = HEADER_BYTES + 2 * count
    if size != wanted:
        what = "truncated" if size < wanted else "damaged"
        raise DataError(f"{path}: {what}: {size} bytes, wanted {wanted} for the {count} tokens in its header")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def write_shard(path: str | Path, tokens: Tokens) -> None:
    """Writes (count,) uint16 tokens as a shard; under its name there is at any moment a whole file or none."""
    path = Path(path)
    if tokens.dtype != np.uint16 or tokens.ndim != 1 or not tokens.size:
        raise DataError(f"{path}: tokens are {tokens.dtype} {tokens.shape}, wanted uint16 (count,)")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2", copy=False).tobytes())
    partial.replace(path)


def _named(data_path: str | Path, split: str) -> list[Path]:
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise DataError(
            f"{data_path}: no fineweb_{split}_*.bin there; `python -m gpt.data download` gets them, "
            "`python -m gpt.data tokenize` makes them from text"
        )
    return paths


def train_shards(data_path: str | Path) -> list[Path]:
    """Paths of the training shards in name order. Raises DataError where there are none."""
    return _named(data_path, "train")


def val_shards(data_path: str | Path) -> list[Path]:
    """Paths of the validation shards in name order. Raises DataError where there are none."""
    return _named(data_path, "val")


def load_validation(data_path: str | Path, vocab_size: int | None = None) -> Tokens:
    """All validation tokens in shard order: (count,) uint16, in memory.

    Raises DataError where shards are missing or damaged, or a token is not below ``vocab_size``.
    """
    stream = TokenStream(val_shards(data_path), 1 << 16 if vocab_size is None else vocab_size)
    if stream.size < 2:
        raise DataError(f"{data_path}: {stream.size} validation token, wanted at least 2")
    return stream.read(0, stream.size)


class TokenStream:
    """Shards as one stream of tokens, memory-mapped; only what is read is loaded. The last held_out are left out."""

    def __init__(self, paths: Sequence[Path], vocab_size: int, held_out: int = 0) -> None:
        self.paths = list(paths)
        self.shards = [open_shard(path) for path in self.paths]
        if held_out >= self.shards[-1].size:
            raise DataError(
                f"{self.paths[-1]}: {self.shards[-1].size} tokens, wanted more than the {held_out} held out"
            )
        self.shards[-1] = self.shards[-1][: self.shards[-1].size - held_out]
        self.vocab_size = vocab_size
        self.starts = np.cumsum([0] + [shard.size for shard in self.shards])
        self.size = int(self.starts[-1])

    def read(self, position: int, count: int) -> Tokens:
        """``count`` tokens from a position on, across shard ends and from the last shard to the first: (count,) uint16.

        Raises DataError, naming shard, position and id, where a token is not below ``vocab_size``.
        """
        parts: list[Tokens] = []
        wanted = count
        while wanted:
            index, offset = self._locate(position)
            part = self.shards[index][offset : offset + wanted]
            parts.append(part)
            position += part.size
            wanted -= part.size
        tokens = np.concatenate(parts, dtype=np.uint16)
        if tokens.max() >= self.vocab_size:
            first = int(np.argmax(tokens >= self.vocab_size))
            index, offset = self._locate(position - count + first)
            raise DataError(
                f"{self.paths[index]}: token {offset} has id {tokens[first]}, wanted less than "
                f"vocab_size={self.vocab_size}: is this the tokenizer that the shards were made with?"
            )
        return tokens

    def _locate(self, position: int) -> tuple[int, int]:
        position %= self.size
        index = int(np.searchsorted(self.starts, position, side="right")) - 1
        return index, position - int(self.starts[index])


# Checks.


class ShardReport(NamedTuple):
    path: Path
    tokens: int
    documents: int  # BOS tokens
    bytes: int  # of text, as BPB counts them


def check_shards(paths: Sequence[Path], tokenizer: Tokenizer, chunk: int = 1 << 22) -> Iterator[ShardReport]:
    """Reads every token of a split's shards, in order, and yields what each holds.

    Raises DataError on the first fault: header, size, a token outside the vocabulary, a split that does not start with
    BOS.
    """
    table = tokenizer.byte_table()
    previous = BOS
    for number, path in enumerate(paths):
        stream = TokenStream([path], tokenizer.vocab_size)
        documents = size = 0
        for start in range(0, stream.size, chunk):
            part = stream.read(start, min(chunk, stream.size - start))
            if number == 0 and start == 0 and part[0] != BOS:
                raise DataError(f"{path}: starts with token {part[0]}, wanted BOS ({BOS})")
            tokens = torch.from_numpy(np.concatenate(([previous], part)).astype(np.int32))
            size += int(token_bytes(tokens[:-1], tokens[1:], table).sum())
            documents += int((part == BOS).sum())
            previous = int(part[-1])
        yield ShardReport(path, stream.size, documents, size)


# Batches.


class Rows:
    """The training shards cut into rows of seq_len tokens and one more, the last target.

    Rows follow each other by seq_len and never cross a shard's end; up to seq_len tokens at the end of each shard are
    in no row.
    """

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.firsts = np.cumsum([0] + [(shard.size - 1) // seq_len for shard in stream.shards])
        self.count = int(self.firsts[-1])
        if not self.count:
            raise DataError(
                f"{stream.paths[0].parent}: {stream.size} training tokens in {len(stream.paths)} shards, "
                f"wanted at least one row of {seq_len + 1}"
            )

    def read(self, indices: NDArray[np.int64]) -> Tokens:
        """(rows,) indices -> (rows, seq_len + 1) uint16."""
        shards = np.searchsorted(self.firsts, indices, side="right") - 1
        positions = self.stream.starts[shards] + (indices - self.firsts[shards]) * self.seq_len
        return np.stack([self.stream.read(int(position), self.seq_len + 1) for position in positions])


class BatchSource:
    """The training batches of one rank, each a pure function of step and micro-step: a resume needs only the step.

    shuffled: an epoch is a permutation of all rows, drawn from seed and epoch; a step takes the next
    train_batch_tokens / train_seq_len of them, whatever the world size and the accumulation.
    sequential: as the seed's script. All shards are one stream in name order, over and over; a micro-step takes
    world_size spans of micro_tokens + 1, rank r the r-th of them.

    Raises DataError where shards are missing, damaged or too short, ConfigError where the batch is too small.
    """

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.accumulation = config.accumulation(world_size)
        self._stream = TokenStream(train_shards(config.data_path), config.vocab_size, config.held_out_tokens)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))
        if config.train_order == "shuffled":
            self._all_rows = Rows(self._stream, config.train_seq_len)

    def batch(self, step: int, micro: int) -> NDArray[np.int32]:
        """Inputs and targets of a micro-step: (2, rows, seq_len) int32, so that ``x, y = source.batch(step, micro)``.

        Raises DataError where a token is outside the vocabulary.
        """
        seq_len = self.config.train_seq_len
        rows = self.config.train_batch_tokens // seq_len
        first, end = self.config.rows(self.rank, self.world_size, micro)
        if self.config.train_order == "sequential":
            spans, span_number = self.accumulation * self.world_size, micro * self.world_size + self.rank
            start = step * (rows * seq_len + spans) + first * seq_len + span_number  # a span has a token more
            span = self._stream.read(start, (end - first) * seq_len + 1)
            pair = [span[:-1].reshape(-1, seq_len), span[1:].reshape(-1, seq_len)]
        else:
            block = self._all_rows.read(self._shuffled(step * rows + first, end - first))
            pair = [block[:, :-1], block[:, 1:]]
        return np.stack(pair, dtype=np.int32)

    def _shuffled(self, start: int, count: int) -> NDArray[np.int64]:
        """Rows at places start..start+count of the endless shuffled order."""
        taken = []
        while count:
            epoch, offset = divmod(start, self._all_rows.count)
            if self._order[0] != epoch:
                generator = np.random.default_rng([self.config.seed, epoch])
                self._order = epoch, generator.permutation(self._all_rows.count)
            part = self._order[1][offset : offset + count]
            taken.append(part)
            start += part.size
            count -= part.size
        return np.concatenate(taken)


class TrainLoader:
    """Endless micro-batches in order from a step on, accumulation() to a step, read ahead by a thread.

    ``x, y = next(loader)``: (rows, seq_len) int64 on the device. An error of the thread is raised by ``next``. Close
    it, or use it in a ``with``. Raises what BatchSource raises.
    """

    def __init__(
        self, config: Config, rank: int, world_size: int, device: torch.device | str, start_step: int = 0
    ) -> None:
        self.source = BatchSource(config, rank, world_size)
        self.device = torch.device(device)
        self._next = start_step * self.source.accumulation  # micro-steps from the start of the run
        if str(self.device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._thread = ThreadPoolExecutor(1, "batches", self._start)
        self._ahead: deque[Future[Tensor]] = deque()
        for _ in range(AHEAD):
            self._submit()

    def _start(self) -> None:
        if self.device.type == "cuda":
            # A thread starts on GPU 0; pinning there would open a context on it from every rank.
            torch.cuda.set_device(self.device)

    def _submit(self) -> None:
        self._ahead.append(self._thread.submit(self._read, *divmod(self._next, self.source.accumulation)))
        self._next += 1

    def _read(self, step: int, micro: int) -> Tensor:
        batch = torch.from_numpy(self.source.batch(step, micro))
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = self._ahead[0].result()  # an error stays first in the queue: no batch is ever skipped
        self._ahead.popleft()
        self._submit()
        # Copied on the caller's stream, behind the work before it, and widened on the device.
        x, y = batch.to(self.device, non_blocking=True).to(torch.int64)
        return x, y

    def close(self) -> None:
        """Ends the thread. A second call does nothing."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def held_out_rows(config: Config, device: torch.device) -> Tensor:
    """The end of the training stream that training does not see: (pre_quant_rows, train_seq_len + 1) int32."""
    stream = TokenStream(train_shards(config.data_path), config.vocab_size)
    tokens = stream.read(stream.size - config.held_out_tokens, config.held_out_tokens)
    return rows_of(torch.from_numpy(tokens.astype(np.int32)).to(device), config.train_seq_len)


def rows_of(tokens: Tensor, seq_len: int) -> Tensor:
    """(count,) tokens -> (rows, seq_len + 1): rows side by side, each with its last target; the rest is left out."""
    return tokens.unfold(0, seq_len + 1, seq_len)


def calibration_batches(
    config: Config, count: int, rank: int, world_size: int, device: torch.device | str
) -> Iterator[Tensor]:
    """This rank's share of ``count`` batches of training rows for the quantiser, drawn by seed without repetition.

    Yields (rows, train_seq_len + 1) int64 on the device, each row with its last target, as many rows as
    micro_batch_tokens hold. The batches of all ranks together are the same for every world size; rank r has the r-th,
    the (r + world_size)-th and so on.
    Raises DataError, at the call, where the training shards have fewer rows; what they hold is read batch by batch.
    """
    stream = TokenStream(train_shards(config.data_path), config.vocab_size, config.held_out_tokens)
    rows = Rows(stream, config.train_seq_len)
    each = config.micro_batch_tokens // config.train_seq_len
    if rows.count < count * each:
        raise DataError(
            f"{config.data_path}: {rows.count} rows of {config.train_seq_len} tokens to calibrate with, "
            f"wanted {count} batches of {each}"
        )
    generator = np.random.default_rng([config.seed, CALIBRATION])
    drawn = generator.choice(rows.count, (count, each), replace=False)
    host = (torch.from_numpy(rows.read(batch).astype(np.int32)) for batch in drawn[rank::world_size])
    return (batch.to(device).to(torch.int64) for batch in host)


if __name__ == "__main__":
    from gpt.prepare import main

    sys.exit(main())
