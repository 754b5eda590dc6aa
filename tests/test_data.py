"""Shards, batches, byte accounting and the commands of ``python -m gpt.data``."""

from __future__ import annotations

import gzip
import http.server
import itertools
import json
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from gpt import data, prepare
from gpt.config import BOS, ROOT, Config, ConfigError, build_config
from gpt.data import (
    BatchSource,
    DataError,
    Tokenizer,
    TrainLoader,
    calibration_batches,
    held_out_rows,
    open_shard,
    write_shard,
)
from gpt.tokenizer import token_bytes, train_tokenizer

SAMPLE = ROOT / "data/sample"
SEQ = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SAMPLE / "tokenizer.model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training shards and one of validation; every token is its position in its split, so places can be told."""
    start = 0
    for number, size in enumerate((203, 97, 150)):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", np.arange(start, start + size, dtype=np.uint16))
        start += size
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(40, dtype=np.uint16))
    return tmp_path


def settings(folder: Path, **changes: object) -> Config:
    return build_config(
        **{
            "data_path": folder,
            "vocab_size": 1024,
            "train_seq_len": SEQ,
            "train_batch_tokens": 8 * SEQ,
            "micro_batch_tokens": 8 * SEQ,
            "eval_stride": 1,
            "train_order": "shuffled",
            **changes,
        }
    )


def rows_of(source: BatchSource, step: int) -> list[int]:
    """First tokens of the rows of a step on one rank."""
    return [int(row[0]) for micro in range(source.accumulation) for row in source.batch(step, micro)[0]]


# Shards.


def test_shard_round_trip_is_the_documented_layout(tmp_path: Path) -> None:
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.array([1, 7, 65535], dtype=np.uint16))
    raw = path.read_bytes()
    assert struct.unpack("<3i", raw[:12]) == (20240520, 1, 3)
    assert raw[12:1024] == bytes(1012)
    assert struct.unpack("<3H", raw[1024:]) == (1, 7, 65535)
    assert open_shard(path).tolist() == [1, 7, 65535]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_shards_are_mapped_not_read(folder: Path) -> None:
    assert isinstance(open_shard(folder / "fineweb_val_000000.bin"), np.memmap)
    big = folder / "fineweb_train_000009.bin"
    count = 2_000_000_000  # a sparse file of 4 GB: reading it whole would show
    with big.open("wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, count, *[0] * 253))
        file.truncate(1024 + 2 * count)
    assert open_shard(big)[count - 2 :].tolist() == [0, 0]
    x, _ = BatchSource(settings(folder, train_order="sequential"), 0, 1).batch(10_000_000, 0)
    assert x.shape == (8, SEQ)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-2], r"truncated: 1102 bytes, wanted 1104 for the 40 tokens"),
        (lambda raw: raw + b"xx", r"damaged: 1106 bytes, wanted 1104"),
        (lambda raw: b"\0" * 4 + raw[4:], r"magic 0, version 1; wanted 20240520, 1"),
        (lambda raw: raw[:4] + b"\2\0\0\0" + raw[8:], r"magic 20240520, version 2; wanted 20240520, 1"),
        (lambda raw: raw[:8] + b"\0" * 4 + raw[12:], r"0 tokens by its header"),
        (lambda raw: raw[:500], r"500 bytes, wanted at least the header of 1024"),
        (lambda raw: b"", r"0 bytes, wanted at least the header of 1024"),
    ],
)
def test_damaged_shard(folder: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(str(path)) + ": " + message):
        data.load_validation(folder)


def test_two_thousand_mutations(tmp_path: Path) -> None:
    """An error, or as many tokens, all of the vocabulary. The format has no checksum."""
    path, chance = tmp_path / "fineweb_val_000000.bin", random.Random(1)
    write_shard(path, np.array([chance.randrange(1000) for _ in range(3000)], np.uint16))
    whole, loaded = path.read_bytes(), 0
    for number in range(2000):
        changed = bytearray(whole)
        match number % 6:
            case 0:  # flips in the header, or among the tokens
                changed[chance.randrange(12)] ^= 1 << chance.randrange(8)
            case 1:
                changed[chance.randrange(1024, len(whole))] ^= 1 << chance.randrange(8)
            case 2:
                del changed[chance.randrange(len(whole)) :]
            case 3:
                changed += chance.randbytes(chance.randint(1, 40))
            case 4:
                a, b, c, d = sorted(chance.randrange(len(whole) + 1) for _ in range(4))
                changed = changed[:a] + changed[c:d] + changed[b:c] + changed[a:b] + changed[d:]
            case 5:  # magic, version or count
                struct.pack_into("<I", changed, chance.choice([0, 4, 8]), (1 << chance.randint(0, 32)) - 1)
        path.write_bytes(changed)
        try:
            tokens = data.load_validation(tmp_path, 1024)
        except DataError:
            assert changed != whole
            continue
        loaded += 1
        assert tokens.size == 3000
        assert tokens.max() < 1024
        assert changed[:12] == whole[:12]
    assert 200 < loaded < 1000


def test_missing_shards_name_the_command(folder: Path) -> None:
    (folder / "fineweb_val_000000.bin").unlink()
    with pytest.raises(DataError, match=r"no fineweb_val_\*\.bin there; `python -m gpt\.data download`"):
        data.val_shards(folder)
    with pytest.raises(DataError, match=r"no fineweb_train_\*\.bin"):
        data.train_shards(folder / "nowhere")
    with pytest.raises(DataError, match="no such shard"):
        open_shard(folder / "other.bin")


def test_validation_is_all_shards_in_order(folder: Path) -> None:
    write_shard(folder / "fineweb_val_000001.bin", np.arange(40, 45, dtype=np.uint16))
    tokens = data.load_validation(folder, vocab_size=45)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(range(45))
    with pytest.raises(DataError, match=r"fineweb_val_000001\.bin: token 3 has id 43, wanted less than vocab_size=43"):
        data.load_validation(folder, vocab_size=43)


# Tokenizer and bytes.


def test_tokenizer_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.require(1024)
    with pytest.raises(DataError, match=r"tokenizer\.model: 1024 pieces, wanted vocab_size=8192"):
        tokenizer.require(8192)
    with pytest.raises(DataError, match=r"no tokenizer there; wanted .*`python -m gpt\.data download`"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def test_byte_rule(tokenizer: Tokenizer) -> None:
    table = tokenizer.byte_table()
    piece = tokenizer.processor.piece_to_id
    the, space, e, raw = piece("\u2581the"), piece("\u2581"), piece("e"), piece("<0xE2>")
    assert table.base_bytes.dtype == torch.int16
    assert table.base_bytes.shape == (1024,)
    cases = [  # previous, target, bytes
        (e, the, 4),
        (BOS, the, 3),
        (3, the, 3),
        (0, the, 3),
        (e, e, 1),
        (BOS, e, 1),
        (e, raw, 1),
        (raw, the, 4),
        (e, space, 1),
        (BOS, space, 0),
        (e, BOS, 0),
        (e, 0, 0),
        (e, 2, 0),
        (e, 3, 0),
    ]
    previous, targets, wanted = (torch.tensor(column) for column in zip(*cases, strict=True))
    assert token_bytes(previous, targets, table).tolist() == wanted.tolist()


def plain_bytes(tokenizer: Tokenizer, tokens: list[int]) -> int:
    """Bytes of the documents' text, from SentencePiece's own decoding."""
    size, start = 0, 0
    for end in [i for i in range(1, len(tokens)) if tokens[i] == BOS] + [len(tokens)]:
        assert tokens[start] == BOS
        size += len(tokenizer.decode(tokens[start + 1 : end]).encode())
        start = end
    return size


def test_bytes_are_those_of_the_decoded_text(tokenizer: Tokenizer) -> None:
    tokens = data.load_validation(SAMPLE, tokenizer.vocab_size)
    wide = torch.from_numpy(tokens.astype(np.int64))
    counted = int(token_bytes(wide[:-1], wide[1:], tokenizer.byte_table()).sum())
    assert counted == plain_bytes(tokenizer, tokens.tolist()) == 216_311
    reports = list(data.check_shards(data.val_shards(SAMPLE), tokenizer, chunk=1000))
    assert [(r.tokens, r.documents, r.bytes) for r in reports] == [(81_414, 44, 216_311)]


def test_bytes_of_rare_text(tokenizer: Tokenizer) -> None:
    for text in ("naïve café “quoted” 数学 🙂 x²", "1234 5678", "a  b\n\nc", " leading", ""):
        ids = torch.tensor([BOS, *tokenizer.encode(text)])
        size = int(token_bytes(ids[:-1], ids[1:], tokenizer.byte_table()).sum())
        assert size == len(tokenizer.decode(ids[1:].tolist()).encode())


@pytest.mark.parametrize(("targets", "wanted"), [(100_000, 379_352), (2_541_568, 9_627_756), (2_543_579, 9_635_160)])
def test_byte_totals_of_the_development_validation(targets: int, wanted: int) -> None:
    """Totals that the seed's own code computes; needs the shards (GOLDEN_DATA) and their model (GOLDEN_TOKENIZER)."""
    if "GOLDEN_DATA" not in os.environ or "GOLDEN_TOKENIZER" not in os.environ:
        pytest.skip("GOLDEN_DATA and GOLDEN_TOKENIZER name no development data")
    model = Tokenizer(os.environ["GOLDEN_TOKENIZER"])
    tokens = data.load_validation(os.environ["GOLDEN_DATA"], model.vocab_size)
    if tokens.size != 2_543_580 or not model.sha256.startswith("e817293cb5377489"):
        pytest.skip("other validation shards than those of the totals")
    wide = torch.from_numpy(tokens.astype(np.int64))
    assert int(token_bytes(wide[:targets], wide[1 : targets + 1], model.byte_table()).sum()) == wanted


def test_sample_splits_share_no_document(tokenizer: Tokenizer) -> None:
    split = {}
    for name, paths in (("train", data.train_shards(SAMPLE)), ("val", data.val_shards(SAMPLE))):
        tokens = np.concatenate([open_shard(path) for path in paths])
        split[name] = {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])}
    assert (len(split["train"]), len(split["val"])) == (1027, 44)
    assert not split["train"] & split["val"]


def test_sample_readme_states_the_unigram_entropy(tokenizer: Tokenizer) -> None:
    train = np.concatenate([open_shard(path) for path in data.train_shards(SAMPLE)])
    counts = np.bincount(train, minlength=1024) + 1
    tokens = data.load_validation(SAMPLE)
    bits = -np.log2(counts[tokens[1:]] / counts.sum()).sum() / plain_bytes(tokenizer, tokens.tolist())
    assert f"**{bits:.4f} bits per\nbyte**" in (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert tokenizer.sha256.startswith("3f30eabe")


# Batches.


def test_shuffled_step_does_not_depend_on_world_size_or_accumulation(folder: Path) -> None:
    for step in (0, 5, 11):  # 55 rows: an epoch ends within step 6
        wanted = rows_of(BatchSource(settings(folder), 0, 1), step)
        for world_size in (1, 2, 3, 5, 7, 8):
            for micro_rows in (2, 8):
                config = settings(folder, micro_batch_tokens=micro_rows * SEQ)
                sources = [BatchSource(config, rank, world_size) for rank in range(world_size)]
                ranks = [rows_of(source, step) for source in sources]
                assert sorted(itertools.chain(*ranks)) == sorted(wanted)
                shapes = {s.batch(step, m).shape for s in sources for m in range(s.accumulation)}
                counts = [rows for _, rows, _ in shapes]
                assert max(counts) <= min(micro_rows, min(counts) + 1)


def test_shuffled_epoch_has_each_row_once_and_no_row_crosses_a_shard(folder: Path) -> None:
    sizes, starts = (203, 97, 150), (0, 203, 300)
    every = {s + SEQ * j for s, size in zip(starts, sizes, strict=True) for j in range((size - 1) // SEQ)}
    source = BatchSource(settings(folder, train_batch_tokens=SEQ * len(every), micro_batch_tokens=999), 0, 1)
    epochs = [rows_of(source, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(every)
        assert set(epoch) == every
    assert epochs[0] != epochs[1] != epochs[2] != sorted(every)
    x, y = source.batch(0, 0)
    assert x.dtype == np.int32
    assert (y == x + 1).all()
    assert (np.diff(x) == 1).all()
    assert epochs[0] == rows_of(BatchSource(source.config, 0, 1), 0)
    other = settings(folder, train_batch_tokens=SEQ * len(every), micro_batch_tokens=999, seed=7)
    assert epochs[0] != rows_of(BatchSource(other, 0, 1), 0)


def test_shuffled_batch_larger_than_the_corpus(folder: Path) -> None:
    source = BatchSource(settings(folder, train_batch_tokens=128 * SEQ, micro_batch_tokens=128 * SEQ), 0, 1)
    taken = rows_of(source, 0)
    assert sorted(taken[:55]) == sorted(taken[55:110])
    assert len(set(taken)) == 55


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_ranks_are_disjoint_within_a_step(folder: Path, order: str) -> None:
    config = settings(folder, train_order=order)
    ranks = [rows_of(BatchSource(config, rank, 4), 1) for rank in range(4)]
    assert len(set(itertools.chain(*ranks))) == 8


def test_sequential_is_the_seeds_stream(folder: Path) -> None:
    """Against the seed's reader in plain Python: take spans one after the other, going round the shards."""
    everything = list(range(450))
    for world_size, micro_rows in ((1, 8), (2, 2), (4, 1), (3, 2)):  # 3 ranks take 1, 1, 2, 1, 1 and 2 rows
        config = settings(folder, train_order="sequential", micro_batch_tokens=micro_rows * SEQ)
        sources = [BatchSource(config, rank, world_size) for rank in range(world_size)]
        place = 0
        for step in range(12):
            for micro in range(sources[0].accumulation):
                for source in sources:
                    x, y = source.batch(step, micro)
                    span = x.size + 1
                    tokens = [everything[(place + i) % 450] for i in range(span)]
                    place += span
                    assert x.ravel().tolist() == tokens[:-1]
                    assert y.ravel().tolist() == tokens[1:]
                    assert x.shape == y.shape
                    assert x.shape[0] in ((1, 2) if world_size == 3 else (micro_rows,))
        assert place > 450  # went round


def take(loader: TrainLoader, count: int) -> list[torch.Tensor]:
    return [torch.stack(next(loader)) for _ in range(count)]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_loader_equals_its_source_and_resumes(folder: Path, order: str) -> None:
    config = settings(folder, train_order=order, micro_batch_tokens=2 * SEQ)
    source = BatchSource(config, 1, 2)
    assert source.accumulation == 2
    with TrainLoader(config, 1, 2, "cpu") as loader:
        whole = take(loader, 20)
    for number, batch in enumerate(whole):
        assert batch.dtype == torch.int64
        assert batch.numpy().tolist() == source.batch(*divmod(number, 2)).tolist()
    with TrainLoader(config, 1, 2, "cpu", start_step=7) as loader:
        assert all(torch.equal(a, b) for a, b in zip(take(loader, 6), whole[14:], strict=True))


def test_loader_reads_only_a_few_batches_ahead_and_closes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    batch = BatchSource.batch

    def counted(self: BatchSource, step: int, micro: int) -> np.ndarray:
        asked.append((step, micro))
        return batch(self, step, micro)

    monkeypatch.setattr(BatchSource, "batch", counted)
    threads = threading.active_count()
    loader = TrainLoader(settings(folder), 0, 1, "cpu")
    x, y = next(loader)
    assert x.is_contiguous()
    assert y.is_contiguous()
    loader.close()
    loader.close()
    assert (0, 0) in asked
    assert len(asked) <= 1 + data.AHEAD
    assert threading.active_count() == threads


@pytest.mark.parametrize(("order", "world_size"), [("shuffled", 1), ("sequential", 2)])
def test_token_outside_the_vocabulary_reaches_the_consumer(folder: Path, order: str, world_size: int) -> None:
    config = settings(folder, train_order=order, vocab_size=250)
    with TrainLoader(config, 0, world_size, "cpu") as loader:
        messages = []
        for _ in range(2):  # it stays: no batch is skipped
            with pytest.raises(DataError, match="wanted less than vocab_size=250") as caught:
                take(loader, 8)
            messages.append(str(caught.value))
    assert messages[0] == messages[1]
    shard, position, token = map(int, re.findall(r"train_(\d+)\.bin: token (\d+) has id (\d+)", messages[0])[0])
    assert token == (0, 203, 300)[shard] + position >= 250


def test_batch_with_fewer_rows_than_ranks(folder: Path) -> None:
    with pytest.raises(ConfigError, match="world size 9 is too large for the batch"):
        TrainLoader(settings(folder), 0, 9, "cpu")


def test_corpus_shorter_than_a_row(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(SEQ, dtype=np.uint16))
    with pytest.raises(DataError, match="8 training tokens in 1 shards, wanted at least one row of 9"):
        BatchSource(settings(tmp_path), 0, 1)


def test_calibration_batches(folder: Path) -> None:
    config = settings(folder, micro_batch_tokens=3 * SEQ + 1)
    whole = [batch.tolist() for batch in calibration_batches(config, 6, 0, 1, "cpu")]
    assert len(whole) == 6
    assert all(len(batch) == 3 and len(batch[0]) == SEQ + 1 for batch in whole)
    firsts = [row[0] for batch in whole for row in batch]
    assert len(set(firsts)) == 18
    assert max(firsts) > 300
    assert min(firsts) < 203
    for world_size in (2, 4):
        for rank in range(world_size):
            own = [batch.tolist() for batch in calibration_batches(config, 6, rank, world_size, "cpu")]
            assert own == whole[rank::world_size]
    with pytest.raises(DataError, match="55 rows of 8 tokens to calibrate with, wanted 19 batches of 3"):
        next(calibration_batches(config, 19, 0, 1, "cpu"))


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_held_out_rows_are_in_no_batch(folder: Path, order: str) -> None:
    config = settings(folder, train_order=order, pre_quant="train", pre_quant_rows=5)
    held = held_out_rows(config, torch.device("cpu"))
    assert held.tolist() == [list(range(409 + SEQ * row, 409 + SEQ * row + SEQ + 1)) for row in range(5)]
    source = BatchSource(config, 0, 1)
    seen = {int(token) for step in range(30) for token in source.batch(step, 0).ravel()}
    assert max(seen) < 409
    assert len(seen) > 380
    assert all(int(batch.max()) < 409 for batch in calibration_batches(config, 5, 0, 1, "cpu"))
    with pytest.raises(DataError, match="150 tokens, wanted more than the 161 held out"):
        BatchSource(settings(folder, pre_quant="train", pre_quant_rows=20), 0, 1)


# Text to shards.


TEXTS = [
    f"Document {n} of the collection: {word} and more words, {n * n} of them."
    for n, word in enumerate(["river", "mountain", "letter", "engine", "garden"] * 12)
]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in [*TEXTS, TEXTS[3], "  "]))
    return path


def documents_of(paths: list[Path], tokenizer: Tokenizer) -> list[str]:
    tokens = np.concatenate([open_shard(path) for path in paths])
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]


def command(*arguments: object) -> int:
    return prepare.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("choice", [("--val-docs", 7), ("--val-fraction", 0.2), ("--val-first", 7)])
def test_tokenize(text_file: Path, tmp_path: Path, tokenizer: Tokenizer, choice: tuple[str, float]) -> None:
    for name in ("one", "two"):
        assert (
            command(
                "tokenize",
                text_file,
                "--out",
                tmp_path / name,
                "--tokenizer",
                tokenizer.path,
                *choice,
                "--shard-tokens",
                300,
            )
            == 0
        )
    train = documents_of(data.train_shards(tmp_path / "one"), tokenizer)
    val = documents_of(data.val_shards(tmp_path / "one"), tokenizer)
    assert sorted(train + val) == sorted([*TEXTS, TEXTS[3]])
    assert not set(train) & set(val)
    assert train == [text for text in [*TEXTS, TEXTS[3]] if text in train]  # in the order of the input
    assert len(set(val)) == 7 if choice[0] != "--val-fraction" else 0 < len(val) < 30
    if choice[0] == "--val-first":
        assert set(val) == set(TEXTS[:7])
        assert len(val) == 8
    sizes = [open_shard(path).size for path in data.train_shards(tmp_path / "one")]
    assert len(sizes) > 2
    assert set(sizes[:-1]) == {300}
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all(re.fullmatch(r"fineweb_(train|val)_\d{6}\.bin", name) for name in names[:-1])
    assert list(prepare.read_checksums(tmp_path / "one")) == names[:-1]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_tokenize_with_a_new_tokenizer(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "new/own.model"
    arguments = (
        "tokenize",
        text_file,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        model,
        "--val-docs",
        5,
        "--train-tokenizer",
        "--vocab-size",
        320,
    )
    assert command(*arguments) == 0
    own = Tokenizer(model)
    sp = own.processor
    assert own.vocab_size == 320
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert own.encode("Å") == [sp.piece_to_id("<0xC3>"), sp.piece_to_id("<0x85>")]  # byte fallback of the normal form
    assert not sp.id_to_piece(own.encode("river")[0]).startswith("\u2581")  # no dummy prefix
    assert len(own.encode("1234")) >= 4  # split digits
    assert command("check", tmp_path / "out", "--tokenizer", model) == 0
    assert command(*arguments) == 1
    assert "own.model: exists" in capsys.readouterr().err
    val = documents_of(data.val_shards(tmp_path / "out"), own)
    seen = [text for text in TEXTS if text not in val]
    assert train_tokenizer([*seen, TEXTS[3]] if TEXTS[3] in seen else seen, 320) == model.read_bytes()
    with pytest.raises(DataError, match="training a tokenizer of 5000 pieces"):
        train_tokenizer([], 5000)


def test_text_formats(tmp_path: Path) -> None:
    line = json.dumps({"text": "in a line"}) + "\n"
    (tmp_path / "a.jsonl").write_text(line)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(line)
    with lzma.open(tmp_path / "c.jsonl.xz", "wt") as file:
        file.write(line)
    (tmp_path / "d.txt").write_text("a whole\nfile")
    found = list(prepare.read_documents(sorted(tmp_path.iterdir())))
    assert found == ["in a line"] * 3 + ["a whole\nfile"]
    for bad in ("{", "[1]", '{"body": "x"}', '{"text": 3}'):
        (tmp_path / "a.jsonl").write_text(line + bad + "\n")
        with pytest.raises(DataError, match=r'a\.jsonl, line 2: wanted a JSON object with a string "text"'):
            list(prepare.read_documents([tmp_path / "a.jsonl"]))


def test_tokenize_errors(
    text_file: Path, tmp_path: Path, tokenizer: Tokenizer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*arguments: object) -> str:
        assert command("tokenize", *arguments, "--tokenizer", tokenizer.path) == 1
        return capsys.readouterr().err

    assert "holds shards already" in failing(text_file, "--out", folder, "--val-docs", 1)
    assert "60 distinct documents, wanted more than 60" in failing(text_file, "--out", tmp_path / "o", "--val-docs", 60)
    assert "no such text file" in failing(tmp_path / "none.jsonl", "--out", tmp_path / "o", "--val-first", 1)
    with pytest.raises(SystemExit):  # no default split: one has leaked validation documents into training
        command("tokenize", text_file, "--out", tmp_path / "o")
    assert "--val-docs" in capsys.readouterr().err


# Check.


def test_check(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert command("check", SAMPLE, "--tokenizer", tokenizer.path) == 0
    output = capsys.readouterr().out
    assert "val, 1 shards: 81414 tokens, 44 documents, 216311 bytes of text" in output
    assert "train, 1 shards: 2105091 tokens, 1027 documents, 5568739 bytes of text" in output
    for name in ("train", "val"):
        shutil.copy(SAMPLE / f"fineweb_{name}_000000.bin", tmp_path)
    tokens = np.array(open_shard(tmp_path / "fineweb_val_000000.bin"))
    faults: list[tuple[int, int, str]] = [
        (777, 1024, "fineweb_val_000000.bin: token 777 has id 1024, wanted less than vocab_size=1024"),
        (0, 5, r"fineweb_val_000000.bin: starts with token 5, wanted BOS (1)"),
    ]
    for position, token, message in faults:
        spoiled = tokens.copy()
        spoiled[position] = token
        write_shard(tmp_path / "fineweb_val_000000.bin", spoiled)
        assert command("check", tmp_path, "--tokenizer", tokenizer.path) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_checksums(
    repository: Repository, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what came; `check` sees a token that changed since, and says where it cannot."""
    prepare.download("sp1024", 1, tmp_path / "data", repository.fetch)
    folder = (tmp_path / "data" / WANTED[0]).parent
    write_shard(folder / "fineweb_train_000000.bin", np.array(open_shard(SAMPLE / "fineweb_val_000000.bin")))
    assert command("check", folder, "--tokenizer", tokenizer.path) == 1  # another shard than came
    assert "fineweb_train_000000.bin: damaged: sha256 " in capsys.readouterr().err
    prepare.write_checksums(folder, ["fineweb_train_000000.bin"])
    assert command("check", folder, "--tokenizer", tokenizer.path) == 0
    assert "shards.sha256: 2 shards are as it says\n" in capsys.readouterr().out
    subprocess.run(["sha256sum", "-c", prepare.CHECKSUMS], cwd=folder, check=True, capture_output=True)

    path = folder / "fineweb_val_000000.bin"
    tokens = np.array(open_shard(path))
    tokens[7] ^= 1
    write_shard(path, tokens)
    prepare.download("sp1024", 2, tmp_path / "data", repository.fetch)  # a shard more: what was noted stays
    assert command("check", folder, "--tokenizer", tokenizer.path) == 1
    assert "fineweb_val_000000.bin: damaged: sha256 " in capsys.readouterr().err
    (folder / prepare.CHECKSUMS).unlink()
    assert command("check", folder, "--tokenizer", tokenizer.path) == 0
    printed = capsys.readouterr().out
    assert f"shards.sha256: none in {folder}" in printed
    assert "would not be seen: fineweb_train_000000.bin, fineweb_train_000001.bin, fineweb_val_000000.bin" in printed
    (folder / prepare.CHECKSUMS).write_text("nonsense\n")
    assert command("check", folder, "--tokenizer", tokenizer.path) == 1
    assert "shards.sha256, line 1: 'nonsense', wanted a SHA-256" in capsys.readouterr().err


def test_check_follows_documents_across_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = data.load_validation(SAMPLE)
    paths = [tmp_path / f"fineweb_val_{n:06d}.bin" for n in range(3)]
    for path, part in zip(paths, np.split(whole, [501, 40_000]), strict=True):
        write_shard(path, part)
    reports = list(data.check_shards(paths, tokenizer, chunk=777))
    assert [sum(column) for column in zip(*(r[1:] for r in reports), strict=True)] == [81_414, 44, 216_311]


def test_program(tmp_path: Path) -> None:
    assert all(name in prepare.parser().format_help() for name in ("download", "tokenize", "check"))
    shutil.copy(SAMPLE / "fineweb_train_000000.bin", tmp_path)
    raw = (SAMPLE / "fineweb_val_000000.bin").read_bytes()
    (tmp_path / "fineweb_val_000000.bin").write_bytes(raw[:5000])
    model = str(SAMPLE / "tokenizer.model")
    program = [sys.executable, "-m", "gpt.data", "check", str(tmp_path), "--tokenizer", model]
    failed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert re.fullmatch(r"error: .*fineweb_val_000000\.bin: truncated: 5000 bytes, wanted 163852 .*\n", failed.stderr)


# Download.


class Repository:
    """Stands for a repository: files in a folder, fetched by copying, with the calls counted and faults to order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.fail_at = ""

    def fetch(self, name: str, staging: Path) -> Path:
        self.asked.append(name)
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(self.fail_at or "\0"):
            target.with_name(target.name + ".incomplete").write_bytes((self.folder / name).read_bytes()[:100])
            raise DataError(f"{name}: connection lost")
        shutil.copy(self.folder / name, target)
        return target


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """An export sp1024 of three training shards, whose canonical validation is the sample's."""
    root = tmp_path / "remote/datasets"
    shards = root / "datasets/fineweb10B_sp1024"
    shards.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    shutil.copy(SAMPLE / "tokenizer.model", root / "tokenizers/fineweb_1024_bpe.model")
    shutil.copy(SAMPLE / "fineweb_val_000000.bin", shards)
    for number in range(3):
        write_shard(shards / f"fineweb_train_{number:06d}.bin", np.arange(100 + number, dtype=np.uint16))
    (root / "docs_selected.jsonl").write_text('{"text": "x"}\n')
    (root / "docs_selected.source_manifest.json").write_text("{}")
    (root / "manifest.json").write_text(
        json.dumps(
            {
                "datasets": [
                    {
                        "name": "fineweb10B_sp1024",
                        "tokenizer_name": "sp_bpe_1024",
                        "stats": {"files_train": 3, "files_val": 1},
                    }
                ],
                "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
            }
        )
    )
    monkeypatch.setitem(prepare.CANONICAL, "sp1024", (81_413 // 2048 * 2048,))
    return Repository(tmp_path / "remote")


def files_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


WANTED = [
    "datasets/fineweb10B_sp1024/fineweb_train_000000.bin",
    "datasets/fineweb10B_sp1024/fineweb_train_000001.bin",
    "datasets/fineweb10B_sp1024/fineweb_val_000000.bin",
    "datasets/fineweb10B_sp1024/shards.sha256",
    "tokenizers/fineweb_1024_bpe.model",
]


@pytest.mark.parametrize("skip_manifest", [False, True])
def test_download(
    repository: Repository, tmp_path: Path, skip_manifest: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    prepare.download("sp1024", 2, root, repository.fetch, skip_manifest=skip_manifest)
    assert files_of(root) == WANTED
    assert ("datasets/manifest.json" in repository.asked) != skip_manifest
    assert "validation: 81414 tokens, 79872 scored in rows of 2048: the field's figure" in capsys.readouterr().out
    repository.asked.clear()  # a second call, for one more shard and the text
    prepare.download("sp1024", 3, root, repository.fetch, skip_manifest=True, with_docs=True)
    assert repository.asked == [
        "datasets/docs_selected.jsonl",
        "datasets/docs_selected.source_manifest.json",
        "datasets/datasets/fineweb10B_sp1024/fineweb_train_000002.bin",
    ]
    with pytest.raises(DataError, match="sp1024: 3 training shards in the repository, wanted 4"):
        prepare.download("sp1024", 4, root, repository.fetch)
    with pytest.raises(DataError, match=r"no fineweb10B_sp4096 among its datasets: fineweb10B_sp1024"):
        prepare.download("sp4096", 1, root, repository.fetch)


def test_download_goes_on_after_an_interruption(repository: Repository, tmp_path: Path) -> None:
    root = tmp_path / "data"
    repository.fail_at = "train_000001.bin"
    with pytest.raises(DataError, match="connection lost"):
        prepare.download("sp1024", 2, root, repository.fetch)
    named = [name for name in files_of(root) if not name.startswith(".download/")]
    assert named == [name for name in WANTED if "000001" not in name and "sha256" not in name]
    repository.fail_at = ""
    repository.asked.clear()
    prepare.download("sp1024", 2, root, repository.fetch)
    assert files_of(root) == WANTED
    assert [name.rsplit("/", 1)[1] for name in repository.asked] == ["manifest.json", "fineweb_train_000001.bin"]


def test_download_refuses_a_truncated_shard(repository: Repository, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard = repository.folder / "datasets" / WANTED[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: truncated"):
        prepare.download("sp1024", 2, root, repository.fetch)
    assert not (root / WANTED[1]).exists()
    assert not list(root.rglob("fineweb_train_000001*"))
    shard.write_bytes(whole)
    (root / WANTED[0]).write_bytes(b"")  # spoiled since: it is fetched again
    prepare.download("sp1024", 2, root, repository.fetch)
    assert files_of(root) == WANTED
    assert open_shard(root / WANTED[0]).size == 100


def test_download_of_another_validation(repository: Repository, tmp_path: Path) -> None:
    shard = repository.folder / "datasets" / WANTED[2]
    write_shard(shard, np.array(open_shard(shard)[:60_000]))
    with pytest.raises(DataError, match=r"validation of sp1024: 60000 tokens, 59392 scored .* wanted 79872 scored"):
        prepare.download("sp1024", 2, tmp_path / "data", repository.fetch)
    assert files_of(tmp_path / "data") == WANTED


def test_canonical_counts() -> None:
    assert "the field's figure" in prepare.check_canonical("sp8192", 40_541_185)
    for tokens in (9_662_465, 40_546_305, 40_548_353):  # a truncated shard and two other exports that were scored
        with pytest.raises(DataError, match="wanted 40540160 scored"):
            prepare.check_canonical("sp8192", tokens)
    assert "no figure for sp512" in prepare.check_canonical("sp512", 100)


@pytest.mark.parametrize(
    ("variant", "name", "wanted"),
    [
        ("sp8192", "", "kevclark/parameter-golf"),
        ("sp4096", "", "kevclark/parameter-golf"),
        ("sp1024", "", "willdepueoai/parameter-golf"),
        ("sp8192", "someone/export", "someone/export"),
    ],
)
def test_download_repository(monkeypatch: pytest.MonkeyPatch, variant: str, name: str, wanted: str) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    if name:
        monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", name)
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "elsewhere")
    monkeypatch.setattr(prepare, "hub_fetch", lambda repository: repository)
    monkeypatch.setattr(prepare, "download", lambda *arguments: calls.append(arguments))
    assert command("download", "--variant", variant, "--train-shards", 1, "--skip-manifest") == 0
    assert calls == [(variant, 1, Path("data"), wanted, "elsewhere", True, False)]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a Hugging Face server as a download needs: redirects to a store, which breaks off each answer."""

    folder: ClassVar[Path]
    most: ClassVar[int]  # bytes of one answer
    starts: ClassVar[list[int]]  # where the answers began
    tokens: ClassVar[set[str | None]]
    ranges: ClassVar[bool]  # whether the store knows them

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/datasets/some/export/resolve/main/(.*)", self.path):
            Hub.tokens.add(self.headers.get("Authorization"))
            self.send_response(302)
            self.send_header("Location", f"/store/{found[1]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = Hub.folder / self.path.removeprefix("/store/")
        if not path.is_file():
            self.send_error(404)
            return
        assert "Authorization" not in self.headers
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if Hub.ranges else None
        start = int(asked[1]) if asked else 0
        Hub.starts.append(start)
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + Hub.most])


@pytest.fixture
def hub(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[prepare.Fetch]:
    Hub.folder, Hub.most, Hub.starts, Hub.tokens, Hub.ranges = repository.folder, 1 << 30, [], set(), True
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield prepare.hub_fetch("some/export")
        server.shutdown()
        thread.join()


def test_fetch_goes_on_where_the_server_broke_off(
    hub: prepare.Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    Hub.most = 100_000
    prepare.download("sp1024", 2, tmp_path / "data", hub)
    assert files_of(tmp_path / "data") == WANTED
    assert [start for start in Hub.starts if start] == [100_000, 200_000, 100_000]  # the tokenizer, the validation
    assert (tmp_path / "data" / WANTED[4]).read_bytes() == (SAMPLE / "tokenizer.model").read_bytes()
    assert (tmp_path / "data" / WANTED[2]).read_bytes() == (SAMPLE / "fineweb_val_000000.bin").read_bytes()
    assert Hub.tokens == {"Bearer secret"}


def test_fetch_goes_on_in_a_later_call(hub: prepare.Fetch, tmp_path: Path) -> None:
    name = "datasets/tokenizers/fineweb_1024_bpe.model"
    partial = tmp_path / (name + ".part")
    partial.parent.mkdir(parents=True)
    partial.write_bytes((SAMPLE / "tokenizer.model").read_bytes()[:1234])
    Hub.most = 0  # a server that accepts and says nothing
    with pytest.raises(DataError, match="broken off at 1234 of 254621 bytes; the same command goes on"):
        hub(name, tmp_path)
    Hub.most, Hub.starts = 1 << 30, []
    assert hub(name, tmp_path).read_bytes() == (SAMPLE / "tokenizer.model").read_bytes()
    assert Hub.starts == [1234]
    assert not partial.exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_starts_anew_where_it_has_to(hub: prepare.Fetch, tmp_path: Path, ranges: bool) -> None:
    """The part that is there is longer than the file, or the server knows no ranges."""
    name = "datasets/tokenizers/fineweb_1024_bpe.model"
    partial = tmp_path / (name + ".part")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(300_000))
    Hub.ranges = ranges
    assert hub(name, tmp_path).read_bytes() == (SAMPLE / "tokenizer.model").read_bytes()


def test_fetch_of_a_missing_file(hub: prepare.Fetch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"resolve/main/nothing\.bin: HTTP Error 404"):
        hub("nothing.bin", tmp_path)


def test_download_command(
    hub: prepare.Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/export")
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    assert command("download", "--variant", "sp1024", "--train-shards", 2, "--out", tmp_path / "data") == 0
    assert files_of(tmp_path / "data") == WANTED
    assert command("download", "--variant", "sp1024", "--train-shards", 9, "--out", tmp_path / "data") == 1
    assert "error: sp1024: 3 training shards in the repository, wanted 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("download", "--variant", "gpt2")
