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
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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
# Scores of these names are of these forms; a name that is not here begins with its form.
NAMES: dict[str, tuple[str, ...]] = dict.fromkeys(("ema", "ema_pre_quant", "artifact"), ("plain",))
NAMES |= {"sliding": FIXED, "artifact_sliding": FIXED, "artifact_ttt": FORMS[2:]}
RATIO = 32  # of a ledger's text to its file, at most; honest ones, whose names and figures look random, take 2 to 6
MOST = 2**28  # tokens, bytes of text: six times the largest validation; a number that says more is a mistake


# The field's exports of FineWeb's validation: its first 50,000 documents. Counts are of whole rows; what is left of
# the text after the last whole row may or may not be scored.
VAL_TOKENS = {
    "sp1024": 62_021_632,
    "sp4096": 45_508_608,
    "sp8192": 40_540_160,
    "sp8192, long rows": 40_538_112,
    "sp8192 CaseOps": 47_851_520,
    "bytes": 151_130_112,
}
VAL_BYTES = 151_080_891
TAIL_TOKENS, TAIL_BYTES = 2048, 20_000


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


def base_name(weights: Iterable[Tensor]) -> str:
    """What a ledger calls the weights that it begins with."""
    return _hex(int(fingerprint(weights)))


def version_name(parent: str, first: int, last: int, print_of_weights: str) -> str:
    """Name of the weights that came out of training `parent` on targets first..last-1."""
    return hashlib.sha256(f"{parent} {first} {last} {print_of_weights}".encode()).hexdigest()[:16]


def canonical(tokens: int, size: int | None) -> bool:
    """Whether these are the counts of FineWeb's validation, up to the tail after its last whole row."""
    counted = any(0 <= tokens - count < TAIL_TOKENS for count in VAL_TOKENS.values())
    return counted and (size is None or 0 <= VAL_BYTES - size < TAIL_BYTES)


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
    """Header and lines. Raises LedgerError where the bytes are no ledger or the seal is not theirs.

    Whatever the bytes are, no more than RATIO times them and a MiB is unpacked.
    """
    limit = RATIO * len(data) + 2**20
    try:
        text = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
        _want(len(text) <= limit, f"{len(data)} bytes unpack to more than {limit}")
        body, _, seal = text.removesuffix(b"\n").rpartition(b"\n")
        header, *lines = map(json.loads, body.splitlines())
        sealed = json.loads(seal)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise LedgerError(f"not a ledger: {error}") from None
    if sealed != hashlib.sha256(body + b"\n").hexdigest():
        raise LedgerError("the seal in the last line is not that of the lines before it: the file was changed")
    if not isinstance(header, dict) or header.get("ledger") != FORMAT:
        raise LedgerError(f"the first line is no header of format {FORMAT}")
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
    weights: bool | None  # at the start, compared with the artifact's; None where no artifact has them
    shards: bool  # compared with the shards
    leaking: bool

    @property
    def verdict(self) -> str:
        """LEAKING, fair, or what is at hand proves neither; consistent at most, where no artifact has the weights."""
        if self.leaking:
            return "LEAKING"
        missing = [name for name in ("weights", "shards") if getattr(self, name) is False]
        if missing:
            return f"NOT PROVEN, {' and '.join(missing)} not at hand"
        return "fair" if self.weights else "consistent; of weights before quantising, which no artifact has"


def _want(condition: Any, message: str) -> None:
    if not condition:
        raise LedgerError(message)


Kind = tuple[Callable[[Any], bool], str]  # whether a value is of it, and its name


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15  # neither infinite nor NaN


def _hexadecimal(digits: int) -> Kind:
    return lambda x: isinstance(x, str) and bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", x)), f"{digits} hex digits"


NUMBER: Kind = _number, "a number of 0 or more"
COUNT: Kind = lambda x: type(x) is int and 0 < x <= MOST, f"a whole number of 1 to {MOST}"
TEXT: Kind = lambda x: isinstance(x, str) and x.isprintable(), "text"
TRUTH: Kind = lambda x: type(x) is bool, "true or false"
SHA256 = _hexadecimal(64)
# What header and record both say of a score.
SAID: dict[str, Kind] = {
    "bytes": COUNT,
    "context": COUNT,
    "form": (lambda x: x in FORMS, f"one of {', '.join(FORMS)}"),
    "leaking": TRUTH,
    "nats": NUMBER,
    "settings": (lambda x: isinstance(x, dict) and all(map(_number, x.values())), "numbers by name"),
    "stride": COUNT,
    "tokens": COUNT,
}
HEADER: dict[str, Kind] = SAID | {
    "artifact": (lambda x: x is None or SHA256[0](x), f"null or {SHA256[1]}"),
    "base": _hexadecimal(16),
    "shards": SHA256,
}
CLAIM: dict[str, Kind] = SAID | {"bpb": NUMBER, "nats_per_token": NUMBER, "seconds": NUMBER}


def _check_kinds(what: str, found: Any, wanted: Mapping[str, Kind]) -> None:
    """Every entry there, and of its kind."""
    _want(isinstance(found, dict), f"{what}: {_short(found)}, wanted an object")
    missing = [name for name in sorted(wanted) if name not in found]
    _want(not missing, f"{what}: no {', '.join(missing)}")
    for name, (right, kind) in wanted.items():
        _want(right(found[name]), f"{what}: {name} {_short(found[name])}, wanted {kind}")


def _short(value: Any) -> str:
    return json.dumps(value)[:80]


def _check_line(number: int, line: Any) -> None:
    """Form of a line alone."""
    shapes = {"score": (int, int, str, float, int), "train": (int, int, str, str)}
    good = isinstance(line, list) and line and isinstance(line[0], str) and line[0] in shapes
    good = good and [type(item) for item in line[1:]] == list(shapes[line[0]])
    good = good and 0 <= line[1] < line[2] <= MOST
    good = good and (all(map(_number, line[4:])) if line[0] == "score" else _hexadecimal(16)[0](line[4]))
    _want(good, f"line {number}: {_short(line)} is neither a score nor a training")


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
        if document and form == "document":
            places = {document(first), document(last - 1), *([document(version.first)] if version.line else [])}
            _want(len(places) == 1, f"line {number}: {kind} across the border of a document")
            whole = version.line or not first or document(first) > document(first - 1)
            _want(whole, f"line {number}: target {first} is inside of a document, whose beginning trained nothing")
    _want(not early, early)
    for name, version in versions.items():
        _want(
            name in used or name == base,
            f"line {version.line}: its weights {name} scored nothing: another line names the wrong ones",
        )
    return len(versions)


def _check_settings(header: Mapping[str, Any], lines: list[list[Any]]) -> None:
    """That form and settings are those by which the lines were made, as far as lines show them."""
    form, context, stride, settings = (header[name] for name in ("form", "context", "stride", "settings"))
    right = stride == context if form == "plain" else stride < context if form == "sliding" else stride <= context
    _want(right, f"header: {form} with context {context} and stride {stride}")
    if form in FIXED:
        _want(not settings, f"header: settings {_short(settings)}, in {form} scoring")
        return
    _check_kinds("settings", settings, dict.fromkeys(("phases",) if form == "phased" else ("tokens",), COUNT))
    trained = [(number, *line[1:3]) for number, line in enumerate(lines, 2) if line[0] == "train"]
    if form == "phased":
        _want(len(trained) <= settings["phases"], f"{len(trained)} trainings, settings: phases {settings['phases']}")
        for number, first, last in trained:
            _want(not first and not last % context, f"line {number}: a training on {first} to {last - 1}, wanted rows")
        return
    size = settings["tokens"]
    if form == "chunk":
        count, rows = -(-header["tokens"] // size) - 1, size // context * context
        _want(len(trained) == count, f"{len(trained)} trainings, settings: tokens {size}: wanted {count}")
        for index, (number, first, last) in enumerate(trained):
            wanted = index * size, index * size + rows
            _want((first, last) == wanted, f"line {number}: not the training of {wanted[0]} to {wanted[1] - 1}")
        return
    _want(stride == size, f"header: stride {stride}, settings: tokens {size}")
    for number, (kind, first, last, *_) in enumerate(lines, 2):
        right = last - first == size if kind == "train" else last - first <= size
        _want(right, f"line {number}: {kind} of {last - first}, settings: tokens {size}")


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
    _check_kinds("header", header, HEADER)
    if claim is not None:
        _check_kinds("record", claim, CLAIM)
    _want(
        artifact is None or header["artifact"] == artifact, f"header: of artifact {header['artifact']}, not {artifact}"
    )
    _want(
        base is None or header["base"] == base,
        f"header: weights {header['base']} at the start, the artifact has {base}",
    )
    if claim is not None:
        for name in ("form", "context", "stride", "settings"):  # and the figures, below
            _want(claim[name] == header[name], f"header: {name} {header[name]}, the record says {claim[name]}")
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
    _check_settings(header, lines)

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
            _want(claim[name] == value, f"record: {name} {claim[name]}, the ledger has {value}")
    trained = np.zeros(header["tokens"], dtype=bool)
    for kind, first, last, *_ in lines:
        if kind == "train":
            trained[first:last] = True
    known = artifact is not None and base is not None, tokens is not None and lengths is not None
    return Findings(len(lines), versions, int(trained.sum()), *known, header["leaking"])


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


def read_record(path: Path) -> dict[str, Any]:
    """A record of scores, a JSON file, every entry that an audit looks at of its kind.

    Raises LedgerError where it is none, or where its seal is not its own.
    """
    try:
        record = json.loads(path.read_text())
        _want(isinstance(record, dict) and "scores" in record, 'wanted an object with "scores"')
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{path}: no record of scores: {type(error).__name__}: {error}") from None
    try:
        artifact = record if "artifact_sha256" in record else record.get("artifact")
        _check_kinds("artifact", artifact, {"artifact_sha256" if artifact is record else "sha256": SHA256})
        _want(json.loads(json.dumps(seal(record))) == record, "the seal is not that of the record: it was changed")
        scores = record["scores"]
        _want(isinstance(scores, dict) and scores, f"no scores: {_short(scores)}, wanted an object of some")
        _check_kinds("record", record, {"leaking": TRUTH})
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from None
    return record


def artifact_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of the artifact that a record, as `read_record` gives it, is of."""
    return str(record["artifact_sha256"] if "artifact_sha256" in record else record["artifact"]["sha256"])


def audit_record(
    path: Path, artifact: str | None = None, base: str | None = None, leaking: bool | None = None, **shards: Any
) -> dict[str, Findings]:
    """Audit every score of a record, a JSON file with its ledgers beside it. Raises LedgerError, naming the score.

    All scores have to be of one text, and those of the artifact of one model. artifact, base, leaking: SHA-256,
    fingerprint of the weights (`base_name`), and stamp of the artifact, where it is at hand; shards: tokens and
    lengths, as for `audit`.
    """
    record = read_record(path)
    told = artifact_of(record)
    _want(artifact in (None, told), f"{path}: of artifact {told}, the file has {artifact}")
    _want(leaking in (None, record["leaking"]), f"{path}: leaking {record['leaking']}, the artifact says {leaking}")
    findings: dict[str, Findings] = {}
    common: dict[str, Any] = {}  # what the ledgers before said
    for name, claim in record["scores"].items():
        try:
            header, lines = ledger_of(path, claim)
            forms = NAMES.get(name, (re.split("[-_,]", name)[0],))
            _want(header.get("form") in forms, f"header: form {_short(header.get('form'))} by the name of {name}")
            of_artifact = not name.startswith("ema")  # the weights before they were quantised
            known = (artifact, base) if of_artifact else (None, None)
            found = audit(header, lines, claim, *known, **shards)
            findings[name] = found if of_artifact else replace(found, weights=None)
            _want(
                header["leaking"] == claim["leaking"] == record["leaking"],
                f"leaking: {header['leaking']} in the ledger, {claim['leaking']} in the score, "
                f"{record['leaking']} in the record",
            )
            wanted = told if of_artifact else None
            _want(header["artifact"] == wanted, f"header: of artifact {header['artifact']}, not {wanted}")
            for what in ("shards", "tokens", "bytes", *(("base",) if of_artifact else ())):
                first = common.setdefault(what, header[what])
                _want(header[what] == first, f"header: {what} {header[what]}, another score of the record has {first}")
        except (LedgerError, OSError) as error:
            raise LedgerError(f"{path}: score {name!r}: {error}") from None
    return findings


def ledger_of(path: Path, claim: Any) -> tuple[dict[str, Any], list[list[Any]]]:
    """The ledger beside the record at `path` that a score in it names. Raises LedgerError, OSError where it is not."""
    _check_kinds("record", claim, {})
    _want("ledger" in claim, "no ledger")
    _check_kinds("ledger", claim["ledger"], {"file": TEXT, "sha256": TEXT})
    data = (path.parent / Path(claim["ledger"]["file"]).name).read_bytes()
    found, wanted = hashlib.sha256(data).hexdigest(), claim["ledger"]["sha256"]
    _want(found == wanted, f"the ledger has sha256 {found}, the record names {wanted}")
    return read(data)
