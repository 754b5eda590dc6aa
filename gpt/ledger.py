"""The ledger of a score: which tokens were scored with which weights, and which tokens had trained those.

A gzip file of JSON lines, in the order of what happened (RECORD-SCORE.ledger.gz beside the record; `zcat` shows it):

    {"ledger": 1, "form": ..., "tokens": ..., "bytes": ..., "nats": ..., "base": ..., ...}    what it is of, and totals
    ["score", first, last, version, nats, bytes]      targets first..last-1 were scored with these weights
    ["train", first, last, parent, fingerprint]       then `parent`, trained on those targets, became a new version
    "<sha256 of all lines before>"

Target i is token i + 1 of the validation shards. Versions make a tree: the name of one is a hash of its parent's name,
of the targets that trained it and of the fingerprint of its weights (`version_name`), so that no line can name weights
that no line before it made. The fingerprint is 64 bits of the weights themselves: it tells weights apart, and whoever
scores again with the same machine can compare it; it is no cryptographic hash. What ties a ledger to a model is the
SHA-256 of the artifact in its first line. `audit` is the proof that a reviewer runs; it needs no GPU.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gpt.record import write_atomic

FORMAT = 1
PIECE = 4096  # weights of one inner sum of a fingerprint
LINE = 32_768  # targets of a line, where nothing else divides them
FIXED = ("plain", "sliding")  # forms that train nothing
FORMS = (*FIXED, "chunk", "document", "phased")
HEADER = ("artifact", "base", "bytes", "context", "form", "leaking", "ledger", "nats", "shards", "stride", "tokens")


class LedgerError(ValueError):
    """A ledger contradicts itself, its record or the shards; the message says which line, and how."""


def fingerprint(tensors: Iterable[Tensor], batched: bool = False) -> Tensor:
    """() int64 or, batched, (n,) int64 of n models whose tensors are (n, ...): a hash of every bit of float32 weights.

    A sum of the bits times odd numbers that depend on the place, modulo 2^64: exact in any order on any device.
    """
    total: Tensor | None = None
    for number, tensor in enumerate(tensors):
        flat = tensor.detach().float().reshape(tensor.size(0) if batched else 1, -1)
        flat = F.pad(flat, (0, -flat.size(1) % PIECE)).view(torch.int32)
        bits = flat.view(flat.size(0), -1, PIECE).long()
        pieces = bits.mul_(_odd(PIECE, 0, bits.device)).sum(2)
        part = (pieces * _odd(pieces.size(1), 1 + number, bits.device)).sum(1)
        total = part if total is None else total + part
    assert total is not None
    return total if batched else total[0]


def _odd(count: int, number: int, device: torch.device) -> Tensor:
    """(count,) odd int64 numbers that look random; arithmetic wraps."""
    x = (torch.arange(count, device=device) + (number << 40)) * 0x5851F42D4C957F2D
    return (x ^ (x >> 29)) * 0x14057B7EF767814F | 1


def _hex(value: int) -> str:
    return f"{value % 2**64:016x}"


def version_name(parent: str, first: int, last: int, print_of_weights: str) -> str:
    """Name of the weights that came out of training `parent` on targets first..last-1."""
    return hashlib.sha256(f"{parent} {first} {last} {print_of_weights}".encode()).hexdigest()[:16]


def tokens_sha256(tokens: NDArray[np.uint16]) -> str:
    """Of the validation tokens, little-endian, all shards in order."""
    return hashlib.sha256(tokens.astype("<u2", copy=False).tobytes()).hexdigest()


Version = str | int  # a name, or the number of the fingerprint that one will be made of


class Ledger:
    """Taken down while scoring, without waiting for the device: `settle` puts in names of weights, `close` figures."""

    def __init__(self, base: Tensor) -> None:
        self.base = _hex(int(base))
        self.lines: list[list[Any]] = []
        self._prints: list[Tensor] = []
        self._count = 0

    def scored(self, first: int, last: int, version: Version) -> None:
        self.lines.append(["score", first, last, version])

    def scored_in_lines(self, first: int, last: int, version: Version) -> None:
        """A long range as lines of LINE targets."""
        for begin in range(first, last, LINE):
            self.scored(begin, min(begin + LINE, last), version)

    def fingerprints(self, prints: Tensor) -> int:
        """Keep () or (n,) int64 fingerprints, on whatever device; returns the number of the first."""
        self._prints.append(prints.reshape(-1))
        self._count += prints.numel()
        return self._count - prints.numel()

    def trained(self, first: int, last: int, parent: Version, number: int) -> Version:
        """Note the training of a version; returns what it became, whose weights have the fingerprint of that number."""
        self.lines.append(["train", first, last, parent, number])
        return number

    def settle(self) -> None:
        """Put the names of versions into the lines. Waits for the device."""
        values = torch.cat(self._prints).tolist() if self._prints else []
        names: dict[Version, str] = {}
        for line in self.lines:
            line[3] = names.get(line[3], line[3])
            if line[0] == "train" and isinstance(line[4], int):
                _, first, last, parent, number = line
                line[4] = found = _hex(values[int(number)])
                names[number] = version_name(str(parent), first, last, found)
        self._prints, self._count = [], 0

    def close(self, nats: Tensor, lengths: Tensor) -> tuple[float, int]:
        """Put nats and bytes into the lines, of (count,) of each target; returns their totals."""
        self.settle()
        lines = sorted((line for line in self.lines if line[0] == "score"), key=lambda line: line[1])
        starts = [line[1] for line in lines]
        if [*starts, nats.numel()] != [0, *(line[2] for line in lines)]:
            raise RuntimeError("the ledger's lines are no partition of the targets")
        sums = np.add.reduceat(nats.double().cpu().numpy(), starts).tolist()
        sizes = np.add.reduceat(lengths.long().cpu().numpy(), starts).tolist()
        for line, total, size in zip(lines, sums, sizes, strict=True):
            line[4:] = [total, size]
        return math.fsum(sums), sum(sizes)


def write(header: Mapping[str, Any], lines: Iterable[Any]) -> bytes:
    """The file's bytes, sealed."""
    text = b"".join(json.dumps(line).encode() + b"\n" for line in (dict(sorted(header.items())), *lines))
    return gzip.compress(text + json.dumps(hashlib.sha256(text).hexdigest()).encode() + b"\n", compresslevel=6, mtime=0)


def read(data: bytes) -> tuple[dict[str, Any], list[list[Any]]]:
    """Header and lines. Raises LedgerError where the bytes are no ledger or the seal is not theirs."""
    try:
        text = gzip.decompress(data)
        body, _, seal = text.removesuffix(b"\n").rpartition(b"\n")
        header, *lines = map(json.loads, body.splitlines())
        sealed = json.loads(seal)
    except (OSError, EOFError, ValueError) as error:
        raise LedgerError(f"not a ledger: {error}") from None
    if sealed != hashlib.sha256(body + b"\n").hexdigest():
        raise LedgerError("the seal in the last line is not that of the lines before it: the file was changed")
    if not isinstance(header, dict) or header.get("ledger") != FORMAT:
        raise LedgerError(f"the first line is no header of format {FORMAT}")
    missing = [name for name in HEADER if name not in header]
    if missing:
        raise LedgerError(f"header: no {', '.join(missing)}")
    return header, lines


# Audit.


@dataclass(frozen=True)
class _Version:
    parent: str
    first: int
    last: int
    latest: int  # one past the last target that trained it or an ancestor
    line: int


@dataclass(frozen=True)
class Findings:
    """What an audit has shown."""

    lines: int
    versions: int  # of weights, that of the artifact among them
    trained: int  # targets that some version was trained on
    shards: bool  # compared with the shards
    leaking: bool


def _want(condition: Any, message: str) -> None:
    if not condition:
        raise LedgerError(message)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check_line(number: int, line: Any) -> None:
    """Form of a line alone."""
    shapes = {"score": (int, int, str, float, int), "train": (int, int, str, str)}
    good = isinstance(line, list) and line and isinstance(line[0], str) and line[0] in shapes
    good = good and [type(item) for item in line[1:]] == list(shapes[line[0]])
    good = good and 0 <= line[1] < line[2] and all(map(_number, line[4:] if line[0] == "score" else ()))
    _want(good, f"line {number}: {json.dumps(line)[:80]} is neither a score nor a training")


def _check_coverage(scores: list[tuple[int, list[Any]]], tokens: int) -> None:
    """Every target once."""
    reached = 0
    for number, (_, first, last, *_) in sorted(scores, key=lambda item: item[1][1:3]):
        _want(first <= reached, f"targets {reached} to {first - 1} were never scored")
        _want(first >= reached, f"line {number}: targets {first} to {min(reached, last) - 1} were scored before: twice")
        reached = last
    _want(reached >= tokens, f"targets {reached} to {tokens - 1} were never scored: the end is missing")
    _want(reached == tokens, f"targets up to {reached - 1} were scored, the header says {tokens}")


def _check_order(header: Mapping[str, Any], lines: list[list[Any]], borders: NDArray[np.int64] | None) -> int:
    """Weights and the order of scoring and training; returns the number of versions. borders: starts of documents."""
    form, base = header["form"], header["base"]
    versions = {base: _Version("", 0, 0, 0, 0)}
    used: set[str] = set()
    scored = np.zeros(header["tokens"], dtype=bool)
    reached, early = 0, ""
    document = (lambda i: int(np.searchsorted(borders, i, side="right"))) if borders is not None else None
    for number, (kind, first, last, name, *rest) in enumerate(lines, 2):
        _want(name in versions, f"line {number}: weights {name}, which no line before it made")
        version = versions[name]
        if kind == "score":
            if version.latest > first:
                ancestor = version
                while ancestor.line and not (ancestor.first < last and first < ancestor.last):
                    ancestor = versions[ancestor.parent]
                _want(
                    not ancestor.line,
                    f"line {number}: targets {first} to {last - 1} were scored with weights {name}, after line "
                    f"{ancestor.line} had trained on them: late",
                )
                _want(False, f"line {number}: weights {name} were trained on later targets, up to {version.latest - 1}")
            if form != "document":
                _want(first == reached, f"line {number}: target {first} follows {reached - 1}: out of order")
                reached = last
            scored[first:last] = True
            used.add(name)
        else:
            _want(form not in FIXED, f"line {number}: a training, in {form} scoring")
            if not scored[first:last].all():  # said last: where it let those be scored late, that is the worse fault
                early = early or f"line {number}: trained on targets that no line before it had scored"
            made = version_name(name, first, last, rest[0])
            _want(made not in versions, f"line {number}: weights {made} are reused: another line made them before")
            versions[made] = _Version(name, first, last, max(last, version.latest), number)
            version = versions[made]
        if document and form == "document":
            places = {document(first), document(last - 1), *([document(version.first)] if version.line else [])}
            _want(len(places) == 1, f"line {number}: {kind} across the border of a document")
    _want(not early, early)
    for name, version in versions.items():
        _want(
            name in used or name == base,
            f"line {version.line}: its weights {name} scored nothing: another line names the wrong ones",
        )
    return len(versions)


def audit(
    header: Mapping[str, Any],
    lines: list[list[Any]],
    claim: Mapping[str, Any] | None = None,
    artifact: str | None = None,
    base: str | None = None,
    tokens: NDArray[np.uint16] | None = None,
    lengths: NDArray[np.integer[Any]] | None = None,
    bos: int = 1,
) -> Findings:
    """Prove from a ledger, as `read` returns it, that its score is fair. Raises LedgerError at the first fault.

    No target was scored after being trained on, or with weights that later targets had trained; none twice, none
    skipped, in order; only scored targets were trained on; the lines add up to the totals. Further, where given:
    claim, the score in the record, has the same figures; artifact is the SHA-256 and base the fingerprint of the
    weights that it began with; tokens, those of the shards, and lengths, the bytes of each after the first, are what
    was scored.
    """
    for name in ("tokens", "bytes", "context", "stride"):
        _want(
            type(header[name]) is int and header[name] > 0, f"header: {name} {header[name]!r}, wanted a number above 0"
        )
    _want(header["form"] in FORMS, f"header: form {header['form']!r}, wanted one of {', '.join(FORMS)}")
    _want(type(header["leaking"]) is bool, f"header: leaking {header['leaking']!r}, wanted true or false")
    _want(
        artifact is None or header["artifact"] == artifact, f"header: of artifact {header['artifact']}, not {artifact}"
    )
    _want(
        base is None or header["base"] == base,
        f"header: weights {header['base']} at the start, the artifact has {base}",
    )
    if claim is not None:
        for name in ("form", "context", "stride"):  # and the figures, below
            _want(claim.get(name) == header[name], f"header: {name} {header[name]}, the record says {claim.get(name)}")
    if tokens is not None:
        _want(
            header["tokens"] == tokens.size - 1,
            f"{header['tokens']} tokens, the shards have {tokens.size - 1} to score",
        )
        _want(header["shards"] == tokens_sha256(tokens), "header: sha256 of the tokens is not that of the shards")

    for number, line in enumerate(lines, 2):
        _check_line(number, line)
    scores = [(number, line) for number, line in enumerate(lines, 2) if line[0] == "score"]
    _check_coverage(scores, header["tokens"])
    borders = None if tokens is None else np.flatnonzero(tokens == bos)
    versions = _check_order(header, lines, borders)

    nats, size = math.fsum(line[4] for _, line in scores), sum(line[5] for _, line in scores)
    _want(nats == header["nats"], f"nats of the lines add up to {nats!r}, the header says {header['nats']!r}")
    _want(size == header["bytes"], f"bytes of the lines add up to {size}, the header says {header['bytes']}")
    if lengths is not None:
        for number, (_, first, last, *_, found) in scores:
            wanted = int(lengths[first:last].sum())
            _want(found == wanted, f"line {number}: {found} bytes, the shards have {wanted} there")
    if claim is not None:
        figures = {"nats": nats, "tokens": header["tokens"], "bytes": size}
        figures |= {"nats_per_token": nats / header["tokens"], "bpb": nats / math.log(2) / size}
        for name, value in figures.items():
            _want(claim.get(name) == value, f"record: {name} {claim.get(name)}, the ledger has {value}")
    trained = np.zeros(header["tokens"] + 1, dtype=np.int64)
    for kind, first, last, *_ in lines:
        if kind == "train":
            trained[first] += 1
            trained[last] -= 1
    return Findings(len(lines), versions, int((trained.cumsum() > 0).sum()), lengths is not None, header["leaking"])


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the SHA-256 of all its other entries as "seal"."""
    rest = {name: value for name, value in record.items() if name != "seal"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def save(path: Path, header: Mapping[str, Any], ledger: Ledger) -> dict[str, str]:
    """Write a ledger; returns what a record says of it."""
    data = write({**header, "ledger": FORMAT, "base": ledger.base}, ledger.lines)
    write_atomic(path, data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}


def audit_record(
    path: Path, artifact: str | None = None, base: str | None = None, leaking: bool | None = None, **shards: Any
) -> dict[str, Findings]:
    """Audit every score of a record, a JSON file with its ledgers beside it. Raises LedgerError, naming the score.

    artifact, base, leaking: SHA-256, fingerprint of the weights, and stamp of the artifact, where it is at hand;
    shards: tokens and lengths, as for `audit`.
    """
    try:
        record = json.loads(path.read_text())
        scores = record["scores"].items()
        told = record["artifact_sha256"] if "artifact_sha256" in record else record["artifact"]["sha256"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LedgerError(f"{path}: no record of scores: {type(error).__name__}: {error}") from None
    _want(json.loads(json.dumps(seal(record))) == record, f"{path}: the seal is not that of the record: it was changed")
    _want(artifact in (None, told), f"{path}: of artifact {told}, the file has {artifact}")
    _want(
        leaking in (None, record.get("leaking")),
        f"{path}: leaking {record.get('leaking')}, the artifact says {leaking}",
    )
    _want(scores, f"{path}: no scores")
    findings = {}
    for name, claim in scores:
        try:
            of_artifact = not name.startswith("ema")  # the weights before they were quantised
            _want("ledger" in claim, "no ledger")
            data = (path.parent / Path(claim["ledger"]["file"]).name).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            wanted = claim["ledger"]["sha256"]
            _want(found == wanted, f"the ledger has sha256 {found}, the record names {wanted}")
            header, lines = read(data)
            _want(
                header["leaking"] == claim.get("leaking") == record.get("leaking"),
                f"leaking: {header['leaking']} in the ledger, {claim.get('leaking')} in the score, "
                f"{record.get('leaking')} in the record",
            )
            _want(of_artifact == bool(header["artifact"]), f"header: of artifact {header['artifact']}")
            known = (told, base) if of_artifact else (None, None)
            findings[name] = audit(header, lines, claim, *known, **shards)
        except (LedgerError, OSError) as error:
            raise LedgerError(f"{path}: score {name!r}: {error}") from None
    return findings
