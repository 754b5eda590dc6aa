"""quantize.py as a user runs it, and generation."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantize
from gpt import artifact, pack
from gpt.config import BOS, ROOT
from gpt.data import open_shard, val_shards, write_shard
from gpt.generate import Decoder, draw, generate, stream_text
from gpt.ledger import seal
from gpt.model import GPT
from gpt.score import score
from gpt.tokenizer import Tokenizer
from tests.tiny import ALONE, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = Tokenizer(quantize.SAMPLE_TOKENIZER)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny artifact on the sample's tokenizer, and a folder with the start of the sample's validation text."""
    folder = tmp_path_factory.mktemp("quantize")
    config = tiny_config(vocab_size=TOKENIZER.vocab_size, train_seq_len=32, eval_stride=8, val_batch_size=512)
    batches = [random_tokens(640, TOKENIZER.vocab_size).view(20, 32)]
    path = folder / "model.pga"
    pack.pack(tiny_model(config), config.depth(True), TOKENIZER.sha256, batches, path, ALONE, 0)
    data = folder / "data"
    data.mkdir()
    write_shard(data / "fineweb_val_000000.bin", open_shard(val_shards(quantize.SAMPLE_DATA)[0])[:2001])
    return path, data


def run(*arguments: str | Path) -> int:
    return quantize.main([str(argument) for argument in arguments])


def test_score(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = made
    run("score", path, "--data-path", data, "--json", tmp_path / "score.json")
    record = json.loads((tmp_path / "score.json").read_text())
    printed = capsys.readouterr().out
    assert record["artifact_sha256"] == artifact.load(path).sha256
    assert record["artifact_bytes"] == path.stat().st_size
    plain, sliding = record["scores"]["plain"], record["scores"]["sliding"]
    assert plain["tokens"] == sliding["tokens"] == 2000
    assert plain["bytes"] == sliding["bytes"] > 2000
    assert (plain["stride"], sliding["stride"]) == (32, 8)
    assert record["depth"] == [0, 1, 1, 2]
    for shown in (f"{plain['bpb']:.5f}", f"{sliding['bpb']:.5f}", record["artifact_sha256"], "fits", "attention"):
        assert shown in printed

    run("score", path, "--data-path", data, "--packed", "--json", tmp_path / "packed.json")
    packed = json.loads((tmp_path / "packed.json").read_text())["scores"]
    assert [packed[name]["nats"] for name in ("plain", "sliding")] == [plain["nats"], sliding["nats"]]
    assert run("audit", tmp_path / "packed.json", "--artifact", path, "--data-path", data) == 0
    assert run("score", path, "--data-path", data, "--packed", "--ttt", "chunk") == 2
    assert "weights that stay packed cannot be trained" in capsys.readouterr().err

    run("score", path, "--data-path", data, "--sliding", "--stride", "16", "--json", tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())["scores"]
    assert one.keys() == {"sliding"}
    assert one["sliding"]["stride"] == 16

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--data-path", str(data), "--plain", "--device", "cpu", "--json", str(tmp_path / "two.json")]
    options += ["--ttt", "document,rank=2,tokens=16"]
    command = [*torchrun, "quantize.py", "score", str(path), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["world_size"] == 2
    assert two["scores"]["plain"]["nats"] == pytest.approx(plain["nats"], rel=1e-6)
    assert run("audit", tmp_path / "two.json", "--artifact", path, "--data-path", data) == 0


def test_test_time_training_is_audited(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = made
    monkeypatch.chdir(data.parent)
    forms = ("chunk,tokens=256", "document,rank=2,tokens=16", "phased,documents=2,phases=1")
    options = [option for form in forms for option in ("--ttt", form)]
    assert run("score", path, "--data-path", data.name, "--sliding", *options, "--json", tmp_path / "s.json") == 0
    record = json.loads((tmp_path / "s.json").read_text())
    names = ["sliding", "chunk-tokens256", "document-rank2-tokens16", "phased-documents2-phases1"]
    assert list(record["scores"]) == names
    assert record["scores"]["chunk-tokens256"]["settings"]["lr"] == 0.005
    capsys.readouterr()
    # A record names its shards, from wherever it was made.
    assert record["data_path"] == str(data)
    monkeypatch.chdir(tmp_path)
    assert run("audit", tmp_path / "s.json", "--artifact", path) == 0
    printed = capsys.readouterr().out
    assert "chunk-tokens256: fair. 8 versions of the weights, 1,792 tokens trained some; 15 lines" in printed
    assert f"shards    {data}: the ones that were scored, which the record itself names" in printed
    assert "text      2,000 tokens, " in printed
    assert " bytes: NOT FineWeb's validation, whole" in printed
    assert record["seed"] == artifact.load(path).config.seed
    assert run("audit", tmp_path / "s.json") == 1
    printed = capsys.readouterr().out
    assert "not compared" in printed
    assert "chunk-tokens256: NOT PROVEN, weights and shards not at hand. 8 versions" in printed
    assert "fair" not in printed
    # On a machine that has them elsewhere, or nowhere.
    (tmp_path / "s.json").write_text(json.dumps(seal(record | {"data_path": str(tmp_path)})))
    assert run("audit", tmp_path / "s.json", "--artifact", path) == 1
    assert "sliding: NOT PROVEN, shards not at hand." in capsys.readouterr().out
    assert run("audit", tmp_path / "s.json", "--artifact", path, "--data-path", data) == 0
    assert "sliding: fair. " in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "fineweb_val_000000.bin", open_shard(val_shards(data)[0])[:1500])
    assert run("audit", tmp_path / "s.json", "--artifact", path, "--data-path", other) == 2
    assert "2000 tokens, the shards have 1499 to score" in capsys.readouterr().err


def test_what_is_scored_and_what_is_refused_before(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = made
    assert run("score", path, "--data-path", data, "--plain", "--ttt", "chunk,tokens=4096") == 0
    assert "chunk-tokens4096: the text is too short for this form: nothing was trained" in capsys.readouterr().out
    config = artifact.load(path).config.model_copy(update={"document_mask": False})
    whole, batches = tmp_path / "whole.pga", [random_tokens(640, TOKENIZER.vocab_size).view(20, 32)]
    pack.pack(tiny_model(config), config.depth(True), TOKENIZER.sha256, batches, whole, ALONE, 0)
    seen: list[bool] = []

    def scored(model: GPT, *arguments: Any, **settings: Any) -> Any:
        seen.append(model.config.document_mask)
        return score(model, *arguments, **settings)

    monkeypatch.setattr(quantize, "score", scored)
    for more in ((), ("--documents",)):
        assert run("score", whole, "--data-path", data, "--plain", *more, "--json", tmp_path / "s.json") == 0
        assert json.loads((tmp_path / "s.json").read_text())["document_mask"] == seen[-1]
    assert seen == [False, True]
    monkeypatch.setattr(quantize, "score", lambda *_, **__: pytest.fail("scored"))
    for arguments, message in (
        (("--ttt", "chunk,tokens=8"), "chunks of 8 tokens: wanted at least the context"),
        (("--ttt", "document,tokens=4096"), "pieces of 4096 tokens: wanted at most the context"),
        (("--plain", "--stride", "8"), "rows side by side have no stride"),
    ):
        assert run("score", path, "--data-path", data, *arguments) == 2
        assert message in capsys.readouterr().err


def test_preflight(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("preflight", made[0]) == 0
    printed = capsys.readouterr().out
    assert "all checks passed" in printed
    for name in ("imports", "size", "not leaking", "builds", "forward", "distribution", "causal: rows", "BOS: sliding"):
        assert f"ok      {name}" in printed
    for form in ("plain", "sliding", "chunk", "document", "phased"):
        assert f"ok      causal: {form}" in printed


def test_preflight_refuses_a_leak(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = artifact.load(made[0])
    config = other.config.model_copy(update={"pre_quant": "validation", "allow_leak": True})
    artifact.save(tmp_path / "leak.pga", artifact.serialise(config, other.depth, TOKENIZER.sha256, other.tensors))
    assert run("preflight", tmp_path / "leak.pga") == 1
    printed = capsys.readouterr().out
    assert "FAILED  not leaking" in printed
    assert "NOT FIT TO SUBMIT" in printed


def test_sample_is_decided_by_the_seed(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        run("sample", made[0], "--prompt", "The sea", "--tokens", "12", "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("The sea")


def test_errors_are_one_line(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = made
    other = artifact.load(path)
    stranger = tmp_path / "stranger.pga"
    artifact.save(stranger, artifact.serialise(other.config, other.depth, "0" * 64, other.tensors))
    damaged = tmp_path / "damaged.pga"
    damaged.write_bytes(path.read_bytes()[:-1] + b"\0")
    for arguments, message in (
        (("score", stranger, "--tokenizer-path", TOKENIZER.path), "made with another tokenizer"),
        (("score", damaged), "damaged"),
        (("score", tmp_path / "none"), "No such file"),
        (("score", path, "--data-path", tmp_path), "no fineweb_val_"),
        (("score", path, "--data-path", data, "--context", "8", "--stride", "9"), "wanted stride <= context"),
        (("score", path, "--kernels", "magic"), "magic"),
        (("score", path, "--ttt", "chunk,rank=3"), "chunk has no 'rank'"),
        (("audit", tmp_path / "none.json"), "no record of scores"),
        (("report", tmp_path), "is not a run's folder"),
        (("score", path, "--json", tmp_path / "none/score.json"), "folder does not exist"),
        (("score", path, "--json", tmp_path), "is a folder, wanted a file"),
    ):
        assert run(*arguments) == 2
        errors = capsys.readouterr().err.strip()
        assert message in errors
        assert "\n" not in errors
    with pytest.raises(SystemExit, match="2"):
        run("sample", path, "--top-p", "1.5")


def test_a_record_that_cannot_be_written_is_not_taken_for_saved(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = made
    options = ("score", path, "--data-path", data, "--plain", "--json", tmp_path / "score.json")

    def full(*given: Any, **named: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", full)
        patch.setattr(quantize, "load", None)  # nothing is read before
        assert run(*options) == 2
        assert "cannot be written to: No space left" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "write_atomic", full)
        assert run(*options) == 2
        printed = capsys.readouterr()
        assert "score.json was NOT written: No space left" in printed.err
        assert "BPB" in printed.out  # the work is not lost
        assert "record " not in printed.out


def uncached(model: GPT, depth: tuple[int, ...], row: list[int]) -> Tensor:
    """Logits after a row, all of it computed anew, with the angles of a whole context."""
    cos, sin = model.rotary(model.config.context)
    with torch.no_grad():
        return model.logits(torch.tensor([row]), depth, (cos[: len(row)], sin[: len(row)]))[0]


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 5, "recur_layers": (1, 2, 3)}, {"eval_seq_len": 24}])
@pytest.mark.parametrize("recurrence", [False, True])
def test_cached_logits_are_the_whole_forwards(document_mask: bool, settings: dict[str, Any], recurrence: bool) -> None:
    """One token or several at a time, over document starts; in float64 nothing but rounding is left."""
    config = tiny_config(document_mask=document_mask, **settings)
    depth = config.depth(recurrence)
    tokens = random_tokens(config.context, 64).tolist()
    tokens[5] = BOS
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):  # logits are float32
        model = tiny_model(config, dtype)
        decoder, end = Decoder(model, depth), 0
        for count in (3, 1, 1, 4, 1, 1, 5):
            found = decoder.extend(tokens[end : end + count])
            end += count
            torch.testing.assert_close(found, uncached(model, depth, tokens[:end]), rtol=tolerance, atol=tolerance)
        assert end == 16


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("prompt_length", [0, 15, 40])
def test_greedy_generation_is_the_uncached_one(document_mask: bool, prompt_length: int) -> None:
    """Token by token, far past the context: a full row goes on with its last half."""
    config = tiny_config(document_mask=document_mask)
    model, depth = tiny_model(config), config.depth(True)
    prompt = [token for token in random_tokens(80, 64).tolist() if token != BOS][:prompt_length]
    tokens = list(generate(model, depth, prompt, 40, 0.0, 1.0, seed=0, stop=()))
    assert len(tokens) == 40
    row = [BOS, *prompt]
    for token in tokens:
        if len(row) > 16:
            row = row[-8:]
        assert token == int(uncached(model, depth, row).argmax())
        row = [BOS] if token == BOS and document_mask else [*row, token]
    stopped = list(generate(model, depth, prompt, 40, 0.0, 1.0, seed=0, stop=tokens[3:4]))
    assert stopped == tokens[: tokens.index(tokens[3])]
    assert list(generate(model, depth, prompt, 0, 1.0, 1.0, seed=0)) == []


def test_top_p_keeps_the_fewest_tokens() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    chances = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]

    def drawn(temperature: float, top_p: float) -> set[int]:
        return {int(draw(logits, temperature, top_p, chance[None])) for chance in chances}

    assert drawn(1.0, 0.5) == {1}
    assert drawn(1.0, 0.7) == {1, 3}
    assert drawn(1.0, 1.0) == {0, 1, 2, 3}
    assert drawn(0.0, 1.0) == {1}
    assert drawn(1.0, 0.0) == {1}
    # As often as their probability among those that are kept says.
    tokens = torch.cat([draw(logits, 1.0, 0.7, chance[None]) for chance in chances])
    assert (tokens == 1).float().mean() == pytest.approx(0.5 / 0.75, abs=0.01)


def test_the_least_temperatures_take_the_likeliest() -> None:
    logits = torch.tensor([2.0, 9.5, -3.0, 9.4])
    for temperature in (1e-30, 1e-300, 1e-310, 5e-324):
        assert int(draw(logits, temperature, 0.95, torch.tensor([0.999], dtype=torch.float64))) == 1


def whole_text(prompt: list[int], tokens: list[int]) -> list[str]:
    """What stream_text says, all decoded anew for each token."""
    shown = text = TOKENIZER.decode(prompt)
    pieces = []
    for end in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(prompt + tokens[:end])
        ready = text.rstrip("\ufffd")
        if len(ready) > len(shown):
            pieces.append(ready[len(shown) :])
            shown = ready
    return pieces + [text[len(shown) :]] * (len(text) > len(shown))


def test_streamed_text_is_that_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any tokens: pieces, bytes that are characters and bytes that are none, spaces, control tokens."""
    chance, vocab = random.Random(2), range(TOKENIZER.vocab_size)
    odd = [token for token in vocab if not TOKENIZER.processor.decode([token]).strip()]
    odd += [token for token in vocab if TOKENIZER.processor.is_byte(token)]
    characters = TOKENIZER.encode(" \u2603\U0001f642  e\u0301\ufffd ")
    for _ in range(300):
        prompt = TOKENIZER.encode(chance.choice(["", " ", "A", "A ", "\u2603"]))
        tokens: list[int] = []
        while len(tokens) < 30:
            tokens += chance.choice([[chance.choice(odd)], [chance.choice(vocab)], characters])
        assert list(stream_text(TOKENIZER, prompt, tokens)) == whole_text(prompt, tokens)
    text, lengths = open_shard(val_shards(quantize.SAMPLE_DATA)[0])[:1500].tolist(), []
    wanted, decode = whole_text([], text), TOKENIZER.decode

    def counted(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(TOKENIZER, "decode", counted)
    assert list(stream_text(TOKENIZER, [], text)) == wanted
    assert max(lengths) < 10


def test_characters_in_byte_pieces_come_whole() -> None:
    text = " caf\u00e9 \u2603 \U0001f642\U0001f680 end"
    ids = TOKENIZER.encode(text)
    assert any(TOKENIZER.processor.is_byte(i) for i in ids)
    pieces = list(stream_text(TOKENIZER, TOKENIZER.encode("A"), ids))
    assert len(pieces) > 5
    assert "".join(pieces) == TOKENIZER.decode(TOKENIZER.encode("A") + ids)[1:]
    assert not any("\ufffd" in piece for piece in pieces)
    # What never becomes a character is shown in the end.
    assert "".join(stream_text(TOKENIZER, [], ids[: ids.index(TOKENIZER.encode("\U0001f642")[-1])])).endswith("\ufffd")
