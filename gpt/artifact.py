"""The artifact: a model in one file, with all that scoring needs but text and tokenizer. Nothing in it is executable.

    24 bytes   magic "GPTGOLF\\n", format version (uint32), bytes of the header and of the payload (uint32, uint64)
    header     JSON, Brotli: configuration, depth, tokenizer, streams and the table of tensors (class Header)
    payload    the streams one after another
    32 bytes   SHA-256 of everything before

Numbers are little-endian. There is a stream for each quantised parameter, of its codes as gpt/entropy.py writes them,
and one Brotli stream of all scales and vectors, byte planes apart: the low bytes of float16 are noise, the high ones
compress. Version 1 had the codes in Brotli, version 2 in streams without sizes of rows; they are not read any more.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import brotli
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gpt import entropy
from gpt.config import MACHINE, Config
from gpt.entropy import CodingError, decompress, interleaved, planes
from gpt.gptq import INPUTS, LEVELS, Quantised
from gpt.model import GPT
from gpt.packed import PackedGPT
from gpt.record import write_atomic
from kernels import Ops, select

MAGIC, VERSION = b"GPTGOLF\n", 3
PREFIX = struct.Struct("<8sIIQ")
DIGEST = 32
# Bounds on what a file may ask for, far above any model that fits in 16 MB.
MAX_BYTES = 1 << 27  # of the file, and of all streams decoded
# A byte of the file may stand for so many codes, which trained weights' are far from, and any file may have as many
# as FREE; a row, however short, counts as LANES codes, since it takes as long to decode.
EXPANSION, FREE = 64, 1 << 22
MAX_LAYERS = 1 << 8
MAX_HEADER = 1 << 20  # bytes of JSON
MAX_TOKENS = 1 << 20  # of a row
MAX_BATCH = 1 << 24  # tokens
MAX_DEPTH = 1 << 10  # virtual layers

Read = TypeVar("Read")
Kind = Literal["int6", "int8", "float16", "float32"]
DTYPES: dict[Kind, str] = {"int6": "<i1", "int8": "<i1", "float16": "<f2", "float32": "<f4"}
Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]


class ArtifactError(ValueError):
    """A file is no artifact, is damaged or asks for too much; the message says what was found and what was wanted."""


class StreamEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    bytes: Size  # in the file
    size: Size  # decoded


class TensorEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str  # of the parameter; its scales are NAME.scales
    kind: Kind
    shape: tuple[Size, ...]
    stream: Size
    offset: Size  # in the decoded stream

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.kind]).itemsize


class Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    config: Config  # without the fields of MACHINE
    depth: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=MAX_DEPTH)]
    """Physical index of each virtual layer in scoring."""
    tokenizer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    streams: tuple[StreamEntry, ...]
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Artifact:
    """A model as read from a file."""

    header: Header
    tensors: dict[str, Quantised | Tensor]  # by parameter, on the CPU
    sha256: str  # of the whole file
    nbytes: int

    @property
    def config(self) -> Config:
        return self.header.config

    @property
    def depth(self) -> tuple[int, ...]:
        return self.header.depth

    def state_dict(self) -> dict[str, Tensor]:
        """Dequantised float32 weights."""
        return {
            name: value.dequantise() if isinstance(value, Quantised) else value.float()
            for name, value in self.tensors.items()
        }

    def model(self, ops: Ops, device: torch.device, dtype: torch.dtype) -> GPT:
        """The model in eval mode, without gradients; dtype is that of its activations."""
        model = GPT(self.config, ops, dtype)
        model.load_state_dict(self.state_dict())
        return model.to(device).eval().requires_grad_(False)

    def packed_model(self, ops: Ops, device: torch.device, dtype: torch.dtype) -> PackedGPT:
        """The same on the codes as they are. Raises QuantisationError where a matrix is not quantised."""
        return PackedGPT(self.config, self.tensors, ops, device, dtype)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a configuration's model; no memory is taken for them."""
    with torch.device("meta"):
        model = GPT(config, select("reference", torch.device("cpu")))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Writing.


def serialise(
    config: Config, depth: Sequence[int], tokenizer_sha256: str, tensors: Mapping[str, Quantised | Tensor]
) -> bytes:
    """The file's bytes. tensors: every parameter, quantised or as float16 or float32, on the CPU."""
    streams: list[bytes] = []
    sizes: list[int] = []
    entries: list[TensorEntry] = []
    others: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Quantised):
            others[name] = value
            continue
        others[f"{name}.scales"] = value.scales
        shape = tuple(value.codes.shape)
        entries.append(TensorEntry(name=name, kind=value.kind, shape=shape, stream=len(streams), offset=0))
        streams.append(entropy.encode(entropy.plan(value.codes.numpy(), LEVELS[value.kind])))
        sizes.append(value.codes.numel())
    shared = b""
    for name, values in others.items():
        kind: Kind = "float16" if values.dtype == torch.float16 else "float32"
        shape, stream = tuple(values.shape), len(streams)
        entries.append(TensorEntry(name=name, kind=kind, shape=shape, stream=stream, offset=len(shared)))
        data = values.numpy().astype(DTYPES[kind])
        shared += planes(data.tobytes(), data.itemsize)
    streams.append(brotli.compress(shared))
    sizes.append(len(shared))
    header = Header(
        config=config,
        depth=tuple(depth),
        tokenizer_sha256=tokenizer_sha256,
        tensors=tuple(entries),
        streams=tuple(StreamEntry(bytes=len(s), size=size) for s, size in zip(streams, sizes, strict=True)),
    )
    text: bytes = brotli.compress(header.model_dump_json(exclude={"config": MACHINE}).encode())
    body = PREFIX.pack(MAGIC, VERSION, len(text), sum(map(len, streams))) + text + b"".join(streams)
    return body + hashlib.sha256(body).digest()


def save(path: str | Path, data: bytes) -> None:
    """Write an artifact whole or not at all."""
    write_atomic(Path(path), data)


# Reading.


def _want(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(message)


def _read_header(text: bytes) -> Header:
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"header: {place}: {first['msg']}; found {str(first['input'])[:80]}") from None
    config = header.config
    moved = sorted(MACHINE & config.model_fields_set)
    _want(not moved, f"header: settings of a machine: {', '.join(moved)}")
    _want(max(config.train_seq_len, config.eval_seq_len) <= MAX_TOKENS, f"header: a context of {config.context} tokens")
    _want(config.val_batch_size <= MAX_BATCH, f"header: val_batch_size {config.val_batch_size}")
    # Before anything is made from the shapes.
    _want(config.num_layers <= MAX_LAYERS, f"header: {config.num_layers} layers, wanted at most {MAX_LAYERS}")
    weights = config.model_dim * (config.vocab_size + config.num_layers * (config.model_dim + config.mlp_dim))
    _want(weights <= MAX_BYTES, f"header: a model of more than {weights} weights, wanted at most {MAX_BYTES}")
    _want(
        max(header.depth) < config.num_layers,
        f"header: depth {header.depth} names a layer outside 0..{config.num_layers - 1}",
    )
    return header


def _check_table(header: Header, nbytes: int) -> None:
    """Every entry against the shapes that the configuration implies; entries have to fill the streams without gaps,
    and the file of nbytes may not ask for more than such a file can hold."""
    wanted, work = parameter_shapes(header.config), 0
    sizes = [0] * len(header.streams)
    seen: dict[str, TensorEntry] = {}
    for entry in header.tensors:
        what = f"tensor {entry.name!r}"
        _want(entry.name not in seen, f"{what}: twice in the table")
        parameter = entry.name.removesuffix(".scales")
        _want(parameter in wanted, f"{what}: no parameter of this configuration")
        shape, kinds = wanted[parameter], set(DTYPES)
        if entry.name != parameter:
            _want(parameter in seen and seen[parameter].kind in LEVELS, f"{what}: without codes before it")
            shape, kinds = shape[:-1], {"float16"}
        elif parameter not in INPUTS:
            kinds -= set(LEVELS)
        _want(entry.shape == shape, f"{what}: shape {entry.shape}, wanted {shape}")
        _want(entry.kind in kinds, f"{what}: {entry.kind}, wanted one of {', '.join(sorted(kinds))}")
        _want(entry.stream < len(sizes), f"{what}: in stream {entry.stream} of {len(sizes)}")
        _want(
            entry.offset == sizes[entry.stream],
            f"{what}: at byte {entry.offset} of stream {entry.stream}, wanted {sizes[entry.stream]}",
        )
        work += math.prod(shape[:-1]) * max(shape[-1], entropy.LANES) if entry.kind in LEVELS else entry.nbytes
        sizes[entry.stream] += entry.nbytes
        seen[entry.name] = entry
    needed = set(wanted) | {f"{name}.scales" for name, entry in seen.items() if entry.kind in LEVELS}
    _want(needed == set(seen), f"table of tensors: no {', '.join(sorted(needed - set(seen)))}")
    for number, (stream, size) in enumerate(zip(header.streams, sizes, strict=True)):
        inside = [entry.kind for entry in header.tensors if entry.stream == number]
        _want(
            len(inside) == 1 or (bool(inside) and LEVELS.keys().isdisjoint(inside)),
            f"stream {number}: of {len(inside)} tensors, wanted codes on their own or any number of others",
        )
        _want(stream.size == size, f"stream {number}: {stream.size} bytes declared, wanted {size} for its tensors")
    most = min(MAX_BYTES, FREE + EXPANSION * nbytes)
    _want(work <= most, f"streams: {work} bytes to decode, wanted at most {most} from a file of {nbytes}")


def _read_stream(data: bytes, size: int, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
    """The tensors of one stream. Raises CodingError or ArtifactError."""
    if entries[0].kind in LEVELS:
        codes = entropy.decode(data, entries[0].shape, LEVELS[entries[0].kind])
        return {entries[0].name: torch.from_numpy(codes)}
    content, tensors = decompress(data, size), {}
    for entry in entries:
        dtype = np.dtype(DTYPES[entry.kind])
        part = interleaved(content[entry.offset : entry.offset + entry.nbytes], dtype.itemsize)
        values = np.frombuffer(part, dtype).reshape(entry.shape).astype(dtype.newbyteorder("="))
        tensors[entry.name] = tensor = torch.from_numpy(values)
        _want(bool(tensor.isfinite().all()), f"tensor {entry.name!r}: numbers that are not finite")
    return tensors


def _open(data: bytes) -> tuple[Header, int]:
    """The header of a whole file's bytes, and where its streams begin. Raises ArtifactError."""
    smallest = PREFIX.size + DIGEST
    _want(len(data) >= smallest, f"{len(data)} bytes, wanted an artifact of at least {smallest}")
    magic, version, header_bytes, payload_bytes = PREFIX.unpack_from(data)
    _want(magic == MAGIC, f"starts with {magic!r}, wanted {MAGIC!r}: not an artifact")
    _want(version <= VERSION, f"format version {version}: written by a later program; this one reads version {VERSION}")
    _want(version == VERSION, f"format version {version}, wanted {VERSION}")
    wanted = smallest + header_bytes + payload_bytes
    _want(len(data) == wanted, f"{len(data)} bytes, wanted the {wanted} that the file's lengths add up to")
    _want(hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:], "checksum does not match: the file is damaged")
    begin = PREFIX.size + header_bytes
    try:
        header = _read_header(decompress(data[PREFIX.size : begin], MAX_HEADER, exact=False))
    except CodingError as error:
        raise ArtifactError(f"header: {error}") from None
    stored = sum(stream.bytes for stream in header.streams)
    _want(stored == payload_bytes, f"streams of {stored} bytes, wanted the {payload_bytes} of the payload")
    _check_table(header, len(data))
    return header, begin


def configuration(data: bytes) -> Config:
    """That of an artifact's bytes, whole by their checksum; no weights are decoded. Raises ArtifactError."""
    return _open(data)[0].config


def parse(data: bytes) -> Artifact:
    """An artifact from a file's bytes. Raises ArtifactError where they are anything else."""
    header, begin = _open(data)
    read: dict[str, Tensor] = {}
    for number, stream in enumerate(header.streams):
        entries = [entry for entry in header.tensors if entry.stream == number]
        try:
            read |= _read_stream(data[begin : begin + stream.bytes], stream.size, entries)
        except CodingError as error:
            raise ArtifactError(f"stream {number}: {error}") from None
        begin += stream.bytes
    tensors: dict[str, Quantised | Tensor] = {
        entry.name: Quantised(entry.kind, read[entry.name], read[f"{entry.name}.scales"])
        if entry.kind in LEVELS
        else read[entry.name]
        for entry in header.tensors
        if not entry.name.endswith(".scales")
    }
    return Artifact(header, tensors, hashlib.sha256(data).hexdigest(), len(data))


def beside(record: Path, named: str | None = None) -> dict[str, Any]:
    """What `ledger.audit_record` wants to know of the model.pga beside a record: SHA-256 and stamp.

    Nothing where there is no such file or, with `named`, where it is not the artifact of that SHA-256. No weights are
    decoded. Raises ArtifactError where it is damaged.
    """
    path = record.with_name("model.pga")
    if not path.is_file():
        return {}
    sha256, config = _of_file(path, lambda data: (hashlib.sha256(data).hexdigest(), configuration(data)))
    return {"artifact": sha256, "leaking": config.leaking} if named in (None, sha256) else {}


def load(path: str | Path) -> Artifact:
    """An artifact from a file. Raises ArtifactError where the file is missing, damaged or anything else."""
    return _of_file(Path(path), parse)


def _of_file(path: Path, read: Callable[[bytes], Read]) -> Read:
    try:
        size = path.stat().st_size
        _want(size <= MAX_BYTES, f"{size} bytes, wanted at most {MAX_BYTES}")
        return read(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
