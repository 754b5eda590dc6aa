"""The container: exact round trip, and refusal of everything else."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
from torch import Tensor

from gpt import artifact
from gpt.artifact import DIGEST, PREFIX, ArtifactError
from gpt.config import ROOT, Config
from gpt.gptq import INPUTS, Quantised
from kernels import select
from tests.tiny import CPU, random_tokens, tiny_config, tiny_model

SHA = "ab" * 32


def tensors_of(config: Config) -> dict[str, Quantised | Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Quantised | Tensor] = {}
    for name, parameter in tiny_model(config).named_parameters():
        if name in INPUTS:
            most = 127 if name == "tok_emb" else 31
            codes = torch.randint(-most, most + 1, parameter.shape, generator=generator).to(torch.int8)
            scales = (torch.rand(parameter.shape[:-1], generator=generator) * 0.01 + 1e-3).half()
            tensors[name] = Quantised("int8" if most == 127 else "int6", codes, scales)
        else:
            tensors[name] = parameter.detach().half()
    tensors["q_gain"] = torch.full(parameter_shape(config, "q_gain"), 1e6)  # beyond float16
    return tensors


def parameter_shape(config: Config, name: str) -> tuple[int, ...]:
    return artifact.parameter_shapes(config)[name]


CONFIG = tiny_config(matrix_clip_sigmas=11.0, run_id="mine")
TENSORS = tensors_of(CONFIG)
DATA = artifact.serialise(CONFIG, CONFIG.depth(True), SHA, TENSORS)


def resealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def parts() -> tuple[dict[str, Any], bytes]:
    """Header as JSON and payload."""
    _, _, size, _ = PREFIX.unpack_from(DATA)
    begin = PREFIX.size + size
    return json.loads(brotli.decompress(DATA[PREFIX.size : begin])), DATA[begin:-DIGEST]


def rebuilt(header: Any, payload: bytes) -> bytes:
    text = brotli.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    return resealed(PREFIX.pack(artifact.MAGIC, artifact.VERSION, len(text), len(payload)) + text + payload)


def with_stream(number: int, content: bytes) -> bytes:
    """The artifact with other (compressed) bytes as a stream, all lengths and the checksum in order."""
    header, payload = parts()
    sizes = [stream["bytes"] for stream in header["streams"]]
    begin = sum(sizes[:number])
    header["streams"][number]["bytes"] = len(content)
    return rebuilt(header, payload[:begin] + content + payload[begin + sizes[number] :])


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "recur_layers": ()}, {"eval_seq_len": 32}])
def test_round_trip_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tiny_config(**settings)
    tensors, depth = tensors_of(config), config.depth(True)
    path = tmp_path / "model.pga"
    artifact.save(path, artifact.serialise(config, depth, SHA, tensors))
    read = artifact.load(path)
    assert (read.depth, read.header.tokenizer_sha256, read.nbytes) == (depth, SHA, path.stat().st_size)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.config.fingerprint() == config.fingerprint()
    assert read.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        found = read.tensors[name]
        if isinstance(value, Quantised):
            assert isinstance(found, Quantised)
            assert found.kind == value.kind
            assert torch.equal(found.codes, value.codes)
            assert torch.equal(found.scales, value.scales)
            wanted = value.codes.float() * value.scales.float()[..., None]
        else:
            assert isinstance(found, Tensor)
            assert found.dtype == value.dtype
            wanted = value.float()
        assert torch.equal(read.state_dict()[name], wanted)
    model = read.model(select("reference", CPU), CPU, torch.float32)
    tokens = random_tokens(32, 64).view(2, 16)
    assert not model.training
    assert model.losses(tokens, tokens, depth, model.rotary(16)).isfinite().all()


def test_nothing_of_the_machine_is_stored() -> None:
    header, _ = parts()
    assert not {"data_path", "tokenizer_path", "runs_path", "run_id", "device"} & header["config"].keys()
    assert header["config"]["matrix_clip_sigmas"] == 11.0
    assert str(ROOT) not in json.dumps(header)


def test_every_changed_byte_is_refused() -> None:
    for position in range(len(DATA)):
        changed = bytearray(DATA)
        changed[position] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            artifact.parse(bytes(changed))


def test_every_length_is_refused() -> None:
    for length in [*range(0, len(DATA), 37), len(DATA) - 1]:
        with pytest.raises(ArtifactError):
            artifact.parse(DATA[:length])
    with pytest.raises(ArtifactError, match="lengths add up"):
        artifact.parse(DATA + b"\0")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artifact"):
        artifact.parse(b"PK\x03\x04" + DATA)
    later = bytearray(DATA)
    for version, message in (
        (artifact.VERSION + 1, "version 4: written by a later program"),
        (1, "version 1, wanted 3"),
    ):
        later[8] = version
        with pytest.raises(ArtifactError, match=message):
            artifact.parse(resealed(bytes(later[:-DIGEST])))
    with pytest.raises(ArtifactError, match=r"none\.pga: No such file"):
        artifact.load(tmp_path / "none.pga")
    with pytest.raises(ArtifactError, match="directory"):
        artifact.load(tmp_path)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ArtifactError, match="wanted at most"):
        artifact.load(tmp_path / "huge")


def test_decompression_bombs() -> None:
    bomb = brotli.compress(b" " * (1 << 26), quality=5)
    assert len(bomb) < 1000
    last = len(parts()[0]["streams"]) - 1
    with pytest.raises(ArtifactError, match="header: more than"):
        artifact.parse(rebuilt(b" " * (1 << 26), b""))
    with pytest.raises(ArtifactError, match=f"stream {last}: more than"):
        artifact.parse(with_stream(last, bomb))
    with pytest.raises(ArtifactError, match="stream 0: more than"):
        artifact.parse(with_stream(0, len(bomb).to_bytes(4, "little") + bomb + bytes(4096)))
    with pytest.raises(ArtifactError, match=r"stream 1: .* bytes, wanted"):
        artifact.parse(with_stream(1, b"abc"))
    with pytest.raises(ArtifactError, match=rf"stream {last}: .* bytes, wanted"):
        artifact.parse(with_stream(last, brotli.compress(b"abc")))
    with pytest.raises(ArtifactError, match=f"stream {last}: compressed data end early"):
        artifact.parse(with_stream(last, brotli.compress(random.Random(0).randbytes(500))[:-9]))
    with pytest.raises(ArtifactError, match=f"stream {last}: not Brotli"):
        artifact.parse(with_stream(last, b"\xff" * 100))


def edit(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: Any) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("config", "num_layers", value=10**12), "more than .* weights"),
        (edit("config", "model_dim", value=4 * 10**9), "more than .* weights"),
        (edit("config", "train_seq_len", value=1 << 40), "header"),
        (edit("config", "eval_seq_len", value=1 << 30), "header"),
        (edit("config", "val_batch_size", value=1 << 40), "val_batch_size"),
        (edit("config", "num_layers", value=2), "outside 0..1"),
        (edit("config", "mlp_mult", value=3), "shape"),
        (edit("config", "num_heads", value=5), "num_heads"),
        (edit("config", "from_the_future", value=1), "from_the_future"),
        (edit("depth", value=[0, 3]), "outside 0..2"),
        (edit("depth", value=[]), "depth"),
        (edit("depth", value=[0] * 2000), "depth"),
        (edit("depth", value=[-1]), "depth"),
        (edit("tokenizer_sha256", value="x"), "tokenizer_sha256"),
        (edit("tensors", 0, "name", value="weights"), "no parameter"),
        (edit("tensors", 1, "name", value="tok_emb"), "twice"),
        (edit("tensors", 0, "kind", value="pickle"), "kind"),
        (edit("tensors", 0, "kind", value="float32"), "without codes|stream"),
        (edit("tensors", 0, "shape", value=[1]), "shape"),
        (edit("tensors", 0, "offset", value=1), "at byte 1"),
        (edit("tensors", 0, "offset", value=-1), "offset"),
        (edit("tensors", 0, "stream", value=17), "stream 17 of"),
        (edit("tensors", 0, "stream", value=1), "stream"),
        (edit("streams", 0, "size", value=1 << 40), "streams.0.size"),
        (edit("streams", 0, "size", value=1 << 20), "declared"),
        (edit("streams", 0, "bytes", value=3), "payload"),
        (edit("streams", value=[]), "payload"),
        (lambda header: header["tensors"].pop(), "table of tensors: no"),
        (lambda header: header.pop("depth"), "depth"),
    ],
)
def test_tables_that_lie(change: Callable[[dict[str, Any]], None], message: str) -> None:
    header, payload = parts()
    change(header)
    with pytest.raises(ArtifactError, match=message):
        artifact.parse(rebuilt(header, payload))


def test_numbers_that_are_not_finite() -> None:
    header, payload = parts()
    stream = header["streams"][-1]
    content = brotli.decompress(payload[-stream["bytes"] :])
    with pytest.raises(ArtifactError, match="not finite"):
        artifact.parse(with_stream(len(header["streams"]) - 1, brotli.compress(b"\xff" * len(content))))


def test_codes_have_streams_of_their_own() -> None:
    header, payload = parts()
    merged = header["streams"].pop(1)
    for key in ("bytes", "size"):
        header["streams"][0][key] += merged[key]
    header["tensors"][1]["offset"] = header["streams"][0]["size"] - merged["size"]
    for entry in header["tensors"][1:]:
        entry["stream"] -= 1
    with pytest.raises(ArtifactError, match="stream 0: of 2 tensors, wanted codes on their own"):
        artifact.parse(rebuilt(header, payload))
    header, payload = parts()
    header["streams"].append({"bytes": 0, "size": 0})
    with pytest.raises(ArtifactError, match=r"stream \d+: of 0 tensors"):
        artifact.parse(rebuilt(header, payload))


def test_too_many_rows_to_decode() -> None:
    header, payload = parts()
    header["config"]["num_layers"] = 1 + artifact.MAX_ROWS // (2 * CONFIG.model_dim)
    shapes = artifact.parameter_shapes(Config(**header["config"]))
    for entry in header["tensors"]:
        shape = shapes[entry["name"].removesuffix(".scales")]
        entry["shape"] = shape[: len(entry["shape"])]
    with pytest.raises(ArtifactError, match=rf"rows, wanted at most {artifact.MAX_ROWS}"):
        artifact.parse(rebuilt(header, payload))


def test_mutations_under_a_valid_checksum() -> None:
    """Whatever the bytes say: an artifact or ArtifactError."""
    chance = random.Random(5)
    for _ in range(400):
        body = bytearray(DATA[:-DIGEST])
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            artifact.parse(resealed(bytes(body)))
        except ArtifactError:
            continue
    text = json.dumps(parts()[0])
    for _ in range(300):
        changed = list(text)
        changed[chance.randrange(len(text))] = chance.choice('0123456789,:"[]{}-e.')
        try:
            artifact.parse(rebuilt("".join(changed).encode(), parts()[1]))
        except ArtifactError:
            continue


def test_saving_leaves_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "model.pga"
    path.write_bytes(b"old")
    artifact.save(path, DATA)
    assert path.read_bytes() == DATA
    assert [p.name for p in tmp_path.iterdir()] == ["model.pga"]
