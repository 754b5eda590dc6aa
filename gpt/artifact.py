"""The artifact: a model in one file, with all that scoring needs but text and tokenizer. Nothing in it is executable.

    24 bytes   magic "GPTGOLF\\n", format version (uint32), bytes of the header and of the payload (uint32, uint64)
    header     JSON, Brotli: configuration, depth, tokenizer, streams and the table of tensors (class Header)
    payload    the streams one after another, each Brotli on its own, so that threads work on them side by side
    32 bytes   SHA-256 of everything before

Numbers are little-endian. There is a stream for each quantised parameter, of its codes (int8, row-major), and one of
all scales and vectors, byte planes apart: the low bytes of float16 are noise, the high ones compress. Codes stay as
they are: parting their even and odd positions, as the seed does, changes the compressed size by less than 0.01%.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import brotli
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gpt.config import MACHINE, Config
from gpt.gptq import INPUTS, LEVELS, Quantised
from gpt.model import GPT
from gpt.record import write_atomic
from kernels import Ops, select

MAGIC, VERSION = b"GPTGOLF\n", 1
PREFIX = struct.Struct("<8sIIQ")
DIGEST = 32
# Bounds on what a file may ask for, far above any model that fits in 16 MB.
MAX_BYTES = 1 << 28  # of the file, and of all streams decompressed
MAX_HEADER = 1 << 20  # bytes of JSON
MAX_TOKENS = 1 << 20  # of a row
MAX_BATCH = 1 << 24  # tokens
MAX_DEPTH = 1 << 10  # virtual layers

Kind = Literal["int6", "int8", "float16", "float32"]
DTYPES: dict[Kind, str] = {"int6": "<i1", "int8": "<i1", "float16": "<f2", "float32": "<f4"}
Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]


class ArtifactError(ValueError):
    """A file is no artifact, is damaged or asks for too much; the message says what was found and what was wanted."""


class StreamEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    bytes: Size  # in the file
    size: Size  # decompressed


class TensorEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str  # of the parameter; its scales are NAME.scales
    kind: Kind
    shape: tuple[Size, ...]
    stream: Size
    offset: Size  # in the decompressed stream

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


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a configuration's model; no memory is taken for them."""
    with torch.device("meta"):
        model = GPT(config, select("reference", torch.device("cpu")))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Writing.


def _planes(data: bytes, width: int) -> bytes:
    """All first bytes of numbers of this width, then all second ones, ..."""
    return bytes(np.frombuffer(data, np.uint8).reshape(-1, width).T.tobytes())


def _interleaved(data: bytes, width: int) -> bytes:
    return bytes(np.frombuffer(data, np.uint8).reshape(width, -1).T.tobytes())


def _pieces(tensors: Mapping[str, Quantised | Tensor]) -> Iterator[tuple[str, Kind, Tensor, bool]]:
    """(entry, kind, values, has a stream of its own) in the order of the file."""
    for name, value in tensors.items():
        if isinstance(value, Quantised):
            yield name, value.kind, value.codes, True
    for name, value in tensors.items():
        if isinstance(value, Quantised):
            yield f"{name}.scales", "float16", value.scales, False
        else:
            yield name, "float16" if value.dtype == torch.float16 else "float32", value, False


def serialise(
    config: Config, depth: Sequence[int], tokenizer_sha256: str, tensors: Mapping[str, Quantised | Tensor]
) -> bytes:
    """The file's bytes. tensors: every parameter, quantised or as float16 or float32, on the CPU.

    Brotli 11 takes two seconds a million codes; streams are compressed in threads.
    """
    contents: list[bytes] = []
    entries: list[TensorEntry] = []
    shared = b""
    own = sum(isinstance(value, Quantised) for value in tensors.values())
    for name, kind, values, alone in _pieces(tensors):
        data = values.numpy().astype(DTYPES[kind]).tobytes()
        stream, offset = (len(contents), 0) if alone else (own, len(shared))
        entries.append(TensorEntry(name=name, kind=kind, shape=tuple(values.shape), stream=stream, offset=offset))
        if alone:
            contents.append(data)
        else:
            shared += _planes(data, np.dtype(DTYPES[kind]).itemsize)
    contents.append(shared)
    with ThreadPoolExecutor() as threads:
        streams: list[bytes] = list(threads.map(brotli.compress, contents))  # quality 11; releases the interpreter lock
    header = Header(
        config=config,
        depth=tuple(depth),
        tokenizer_sha256=tokenizer_sha256,
        tensors=tuple(entries),
        streams=tuple(StreamEntry(bytes=len(s), size=len(c)) for s, c in zip(streams, contents, strict=True)),
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


def _decompress(data: bytes, size: int, what: str, exact: bool = True) -> bytes:
    """Never holds more than `size` bytes and one buffer of the decoder.

    Raises ArtifactError where there is more or, with `exact`, less, or where the data are not one whole Brotli stream.
    """
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    total = 0
    try:
        while not decoder.is_finished():
            part = decoder.process(data if not parts else b"", output_buffer_limit=size - total + 1)
            parts.append(part)
            total += len(part)
            _want(total <= size, f"{what}: more than the {size} bytes that it may have")
            _want(bool(part) or decoder.is_finished(), f"{what}: compressed data end early")
    except brotli.error as error:
        raise ArtifactError(f"{what}: not Brotli data ({error})") from None
    _want(not exact or total == size, f"{what}: {total} bytes, wanted {size}")
    return b"".join(parts)


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
    weights = config.model_dim * (config.vocab_size + config.num_layers * (config.model_dim + config.mlp_dim))
    _want(weights <= MAX_BYTES, f"header: a model of more than {weights} weights, wanted at most {MAX_BYTES}")
    _want(
        max(header.depth) < config.num_layers,
        f"header: depth {header.depth} names a layer outside 0..{config.num_layers - 1}",
    )
    return header


def _check_table(header: Header) -> None:
    """Every entry against the shapes that the configuration implies; entries have to fill the streams without gaps."""
    wanted = parameter_shapes(header.config)
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
        sizes[entry.stream] += entry.nbytes
        seen[entry.name] = entry
    needed = set(wanted) | {f"{name}.scales" for name, entry in seen.items() if entry.kind in LEVELS}
    _want(needed == set(seen), f"table of tensors: no {', '.join(sorted(needed - set(seen)))}")
    for number, (stream, size) in enumerate(zip(header.streams, sizes, strict=True)):
        _want(stream.size == size, f"stream {number}: {stream.size} bytes declared, wanted {size} for its tensors")
    _want(sum(sizes) <= MAX_BYTES, f"streams: {sum(sizes)} bytes, wanted at most {MAX_BYTES}")


def _read_tensor(entry: TensorEntry, content: bytes) -> Tensor:
    data = content[entry.offset : entry.offset + entry.nbytes]
    dtype = np.dtype(DTYPES[entry.kind])
    if dtype.itemsize > 1:
        data = _interleaved(data, dtype.itemsize)
    values = np.frombuffer(data, dtype).reshape(entry.shape).copy()
    tensor = torch.from_numpy(values)
    if entry.kind in LEVELS:
        most = LEVELS[entry.kind]
        # Not abs(): that of -128 is -128.
        fits = tensor.numel() == 0 or bool((tensor.amax() <= most) & (tensor.amin() >= -most))
        _want(fits, f"tensor {entry.name!r}: codes outside -{most}..{most}")
    else:
        _want(bool(tensor.isfinite().all()), f"tensor {entry.name!r}: numbers that are not finite")
    return tensor


def parse(data: bytes) -> Artifact:
    """An artifact from a file's bytes. Raises ArtifactError where they are anything else."""
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
    header = _read_header(_decompress(data[PREFIX.size : begin], MAX_HEADER, "header", exact=False))
    stored = sum(stream.bytes for stream in header.streams)
    _want(stored == payload_bytes, f"streams of {stored} bytes, wanted the {payload_bytes} of the payload")
    _check_table(header)

    parts: list[bytes] = []
    for stream in header.streams:
        parts.append(data[begin : begin + stream.bytes])
        begin += stream.bytes
    with ThreadPoolExecutor() as threads:
        contents = list(
            threads.map(
                _decompress,
                parts,
                [s.size for s in header.streams],
                [f"stream {number}" for number in range(len(parts))],
            )
        )
    read = {entry.name: (entry.kind, _read_tensor(entry, contents[entry.stream])) for entry in header.tensors}
    tensors: dict[str, Quantised | Tensor] = {
        name: Quantised(kind, values, read[f"{name}.scales"][1]) if kind in LEVELS else values
        for name, (kind, values) in read.items()
        if not name.endswith(".scales")
    }
    return Artifact(header, tensors, hashlib.sha256(data).hexdigest(), len(data))


def load(path: str | Path) -> Artifact:
    """An artifact from a file. Raises ArtifactError where the file is missing, damaged or anything else."""
    path = Path(path)
    try:
        size = path.stat().st_size
        _want(size <= MAX_BYTES, f"{size} bytes, wanted at most {MAX_BYTES}")
        return parse(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
