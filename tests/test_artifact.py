"""The container: exact round trip, and refusal of everything else."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from torch import Tensor

from gpt import artifact, entropy
from gpt.artifact import DIGEST, PREFIX, ArtifactError
from gpt.config import ROOT, Config
from gpt.gptq import INPUTS, Quantised
from kernels import select
from tests.tiny import CPU, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

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
        (edit("config", "num_layers", value=10**12), "layers, wanted at most 256"),
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


def lying(padding: int = 0, **settings: Any) -> bytes:
    """A whole file of a large model that it says next to nothing about: all codes are 0 for sure, and take no bytes."""
    header, payload, scales = parts()[0], b"", 0
    header["config"].update(settings)
    header["depth"] = [0]
    header["tensors"], header["streams"] = [], []
    others = []
    for name, shape in artifact.parameter_shapes(Config(**header["config"])).items():
        if name not in INPUTS:
            others.append((name, shape))
            continue
        rows, last = math.prod(shape[:-1]), len(header["streams"])
        frequencies = np.zeros((entropy.CLASSES, 63), "<u2")
        frequencies[:, 31] = 1 << entropy.PRECISION
        model = bytes([entropy.UNIT]) * rows + bytes(4 * rows) + entropy.planes(frequencies.tobytes(), 2)
        coded = brotli.compress(model, quality=5)
        states = np.full(min(entropy.LANES, shape[-1]), entropy.LOWEST, "<u4").tobytes()
        stream = len(coded).to_bytes(4, "little") + coded + states
        header["tensors"].append({"name": name, "kind": "int6", "shape": shape, "stream": last, "offset": 0})
        header["streams"].append({"bytes": len(stream), "size": math.prod(shape)})
        payload += stream
        others.append((f"{name}.scales", shape[:-1]))
    for name, shape in others:
        last = len(header["streams"])
        header["tensors"].append({"name": name, "kind": "float16", "shape": shape, "stream": last, "offset": scales})
        scales += 2 * math.prod(shape)
    stream = brotli.compress(bytes(scales), quality=5) + bytes(padding)
    header["streams"].append({"bytes": len(stream), "size": scales})
    return rebuilt(header, payload + stream)


@contextmanager
def frugal(seconds: float = 2.0) -> Iterator[None]:
    """Not much more memory than there is now, and little time of the processor for what is done with it."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (192 << 20), before[1]))
    begin = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - begin < seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_dim": 512, "vocab_size": 65536, "num_layers": 30, "mlp_mult": 4}, "to decode, wanted at most 4"),
        ({"model_dim": 8, "num_heads": 1, "num_kv_heads": 1, "vocab_size": 65536, "num_layers": 2}, "to decode"),
        ({"model_dim": 8, "num_heads": 1, "num_kv_heads": 1, "num_layers": 16_000}, "16000 layers, wanted at most 256"),
        (
            {"model_dim": 512, "vocab_size": 65536, "num_layers": 40, "mlp_mult": 4, "padding": 1 << 22},
            "most 134217728",
        ),
    ],
)
def test_small_files_of_large_models(settings: dict[str, Any], message: str) -> None:
    data = lying(recur_layers=(), **settings)
    assert len(data) < (1 << 22) + 20_000
    with frugal(), pytest.raises(ArtifactError, match=message):
        artifact.parse(data)


def test_what_any_file_may_ask_for_is_little() -> None:
    """All codes that a small file may have: they are decoded."""
    data = lying(recur_layers=(), vocab_size=4096)
    with frugal():
        assert not artifact.parse(data).state_dict()["tok_emb"].any()


def mutated(data: bytes, kind: str, edges: list[int], chance: random.Random) -> bytes:
    """Another file, or by chance the same. edges: where its sections begin and end."""
    changed = bytearray(data)
    if kind == "flips":
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "length":
        changed = changed[: chance.randrange(len(data))] + chance.randbytes(chance.choice([0, 0, 1, 40]))
    elif kind == "more":
        changed += chance.randbytes(chance.randint(1, 40))
    elif kind == "swapped":
        a, b, c, d = sorted(chance.choice([chance.choice(edges), chance.randrange(len(data) + 1)]) for _ in range(4))
        changed = changed[:a] + changed[c:d] + changed[b:c] + changed[a:b] + changed[d:]
    else:  # of version, header and payload
        place, form = chance.choice([(8, "<I"), (12, "<I"), (16, "<Q")])
        value = (1 << chance.randint(0, 8 * struct.calcsize(form) - 1)) - chance.randint(0, 1)
        struct.pack_into(form, changed, place, value)
    return bytes(changed)


def content(read: artifact.Artifact) -> list[Any]:
    """All that a file says."""
    tensors = [
        (
            name,
            *(x.numpy().tobytes() for x in ((value.codes, value.scales) if isinstance(value, Quantised) else [value])),
        )
        for name, value in read.tensors.items()
    ]
    return [read.config, read.depth, read.header.tokenizer_sha256, tensors]


def test_ten_thousand_mutations() -> None:
    """As they are: refused, or of the same content. Of each also under a checksum that is right: refused, or a model
    like any other. Nothing else is raised; memory and time are bounded."""
    config = tiny_config(model_dim=8, num_heads=1, num_kv_heads=1, vocab_size=16, num_layers=2, mlp_mult=1)
    data = artifact.serialise(config, config.depth(True), SHA, tensors_of(config))
    first = artifact.parse(data)
    chance, whole, loaded, slowest = random.Random(5), content(first), 0, 0.0
    sizes = [PREFIX.size, PREFIX.unpack_from(data)[2], *(stream.bytes for stream in first.header.streams), DIGEST]
    edges = [0, *itertools.accumulate(sizes)]
    assert edges[-1] == len(data)
    with frugal(60.0):
        for number in range(10_000):
            other = mutated(data, ("flips", "length", "more", "swapped", "lengths")[number % 5], edges, chance)
            for sealed in (other, resealed(other[:-DIGEST])):
                begin = time.process_time()
                try:
                    read = artifact.parse(sealed)
                except ArtifactError:
                    continue
                finally:
                    slowest = max(slowest, time.process_time() - begin)
                if sealed is other:
                    assert content(read) == whole
                    continue
                loaded += 1
                shapes = {name: tuple(value.shape) for name, value in read.state_dict().items()}
                assert shapes == artifact.parameter_shapes(read.config)
    assert loaded > 10
    assert slowest < 1


def test_mutations_of_the_header_under_a_valid_checksum() -> None:
    """Whatever the header says: an artifact or ArtifactError."""
    chance, text = random.Random(5), json.dumps(parts()[0])
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
