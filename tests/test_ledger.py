"""The ledger's audit: what a fair score shows, and every way of doctoring it, each refused with its own message."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import random
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt.ledger import (
    Findings,
    LedgerError,
    audit,
    audit_record,
    fingerprint,
    read,
    seal,
    tokens_sha256,
    version_name,
    write,
)
from gpt.score import Score, record_scores, score
from gpt.ttt import adapt, parse_form
from tests.test_score import text_of
from tests.tiny import ALONE, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 400
TOKENS = random_tokens(COUNT, 64).numpy().astype(np.uint16)
TEXT = text_of(torch.from_numpy(TOKENS.astype(np.int64)))
FORMS = {
    "plain": "",
    "chunk": "chunk,tokens=64,rows=2,epochs=1",
    "document": "document,tokens=4,rank=2,lr=0.01",
    "phased": "phased,documents=20,rows=2",
}


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    config = tiny_config()
    model, depth = tiny_model(config), config.depth(True)
    made = {"plain": score(model, TEXT, depth, ALONE, context=16, stride=16, batch_tokens=64)}
    for name in ("chunk", "document", "phased"):
        form = parse_form(FORMS[name])
        made[name] = adapt(model, TEXT, depth, ALONE, form, context=16, stride=4, batch_tokens=64)
    return made


def write_record(folder: Path, scores: dict[str, Score], leaking: bool = False) -> Path:
    path = folder / "score.json"
    entries = record_scores(path, scores, TEXT, dict.fromkeys(scores, "a" * 64), leaking)
    record = {"artifact_sha256": "a" * 64, "leaking": leaking, "scores": entries}
    path.write_text(json.dumps(seal(record)))
    return path


@pytest.fixture
def record(tmp_path: Path, scores: dict[str, Score]) -> Path:
    return write_record(tmp_path, scores)


def shards() -> dict[str, Any]:
    return {"tokens": TOKENS, "lengths": TEXT.lengths.numpy()}


def test_a_fair_record_passes(record: Path, scores: dict[str, Score]) -> None:
    found = audit_record(record, "a" * 64, leaking=False, **shards())
    assert found.keys() == FORMS.keys()
    assert found["plain"] == Findings(lines=1, versions=1, trained=0, weights=False, shards=True, leaking=False)
    assert found["chunk"] == Findings(lines=13, versions=7, trained=384, weights=False, shards=True, leaking=False)
    assert found["document"].versions > 50
    assert found["phased"].versions == 4
    assert found["chunk"].verdict == "NOT PROVEN, weights not at hand"
    assert audit_record(record)["chunk"].verdict == "NOT PROVEN, weights and shards not at hand"
    base = scores["chunk"].ledger.base
    assert audit_record(record, "a" * 64, base, **shards())["chunk"].verdict == "fair"


def test_ledger_and_log_agree(scores: dict[str, Score]) -> None:
    for made in scores.values():
        log = made.log.tolist()
        for kind, first, last, *_, nats, size in (line for line in made.ledger.lines if line[0] == "score"):
            assert kind == "score"
            assert nats == pytest.approx(math.fsum(log[first:last]), rel=1e-12)
            assert size == int(TEXT.lengths[first:last].sum())


# Doctoring. A story is what a ledger tells, with weights by number; `told` makes the ledger of it, all names, sums and
# seals right, so that only the story itself is wrong.

FAIR: tuple[tuple[Any, ...], ...] = (
    ("score", 0, 100, 0),
    ("train", 0, 100, 0, 1),
    ("score", 100, 200, 1),
    ("train", 100, 200, 1, 2),
    ("score", 200, 300, 2),
    ("train", 200, 300, 2, 3),
    ("score", 300, 399, 3),
)
BASE = "0123456789abcdef"


def told(*story: tuple[Any, ...], form: str = "chunk") -> tuple[dict[str, Any], list[list[Any]]]:
    names, lines = {0: BASE}, []
    lengths = TEXT.lengths.long()
    for kind, first, last, weights, *made in story:
        name = names.get(weights, "f" * 16)
        if kind == "score":
            lines.append([kind, first, last, name, float(last - first), int(lengths[first:last].sum())])
        else:
            lines.append([kind, first, last, name, f"{made[0]:016x}"])
            names[made[0]] = version_name(name, first, last, f"{made[0]:016x}")
    header = {"ledger": 1, "artifact": "a" * 64, "base": BASE, "form": form, "settings": {"tokens": 100}}
    header |= {"context": 100, "stride": 100} if form == "document" else {"context": 20, "stride": 4}
    header |= {"leaking": False, "tokens": COUNT - 1, "shards": tokens_sha256(TOKENS)}
    scores = [line for line in lines if line[0] == "score"]
    return header | {"nats": math.fsum(s[4] for s in scores), "bytes": sum(s[5] for s in scores)}, lines


def without(*numbers: int) -> list[tuple[Any, ...]]:
    return [event for number, event in enumerate(FAIR) if number not in numbers]


STORIES: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "scored late": (
        [FAIR[1], ("score", 0, 100, 1), *FAIR[2:4], ("score", 200, 300, 2), *FAIR[5:]],
        "targets 0 to 99 were scored with weights .*, after line 2 had trained on them: late",
    ),
    "scored late, through an ancestor": (
        [
            *FAIR[:2],
            ("train", 100, 200, 1, 2),
            ("train", 200, 300, 2, 3),
            *[("score", *r, 3) for r in ((100, 200), (200, 300), (300, 399))],
        ],
        "targets 100 to 199 were scored with weights .*, after line 4 had trained on them: late",
    ),
    "scored twice": ([*FAIR[:3], ("score", 100, 200, 1), *FAIR[3:]], "targets 100 to 199 were scored before: twice"),
    "overlapping": ([*FAIR[:2], ("score", 90, 200, 1), *FAIR[3:]], "targets 90 to 99 were scored before: twice"),
    "never scored": ([*FAIR[:2], ("score", 110, 200, 1), *FAIR[3:]], "targets 100 to 109 were never scored"),
    "missing chunk": (without(2, 3), "targets 100 to 199 were never scored"),
    "shortened": (without(5, 6), "targets 300 to 398 were never scored: the end is missing"),
    "beyond the end": ([*FAIR, ("score", 399, 405, 3)], "scored, the header says 399"),
    "reordered": ([FAIR[2], *FAIR[:2], *FAIR[3:]], "which no line before it made"),
    "out of order": (
        [("score", 100, 200, 0), ("score", 0, 100, 0), ("train", 0, 100, 0, 2), *FAIR[4:]],
        "target 100 follows -1: out of order",
    ),
    "trained before scored": ([FAIR[1], FAIR[0], *FAIR[2:]], "trained on targets that no line before it had scored"),
    "trained on unscored": (
        [FAIR[0], ("train", 50, 101, 0, 1), ("score", 100, 200, 0), ("score", 200, 399, 1)],
        "line 3: trained on targets that no line before it had scored",
    ),
    "wrong weights": ([*FAIR[:4], ("score", 200, 300, 1), *FAIR[5:]], "line 5: its weights"),
    "weights from nowhere": ([*FAIR[:2], ("score", 100, 200, 9), *FAIR[3:]], "weights ffffffffffffffff, which no line"),
    "weights made twice": ([*FAIR[:2], FAIR[1], *FAIR[2:]], "are reused"),
    "trained for nothing": ([*FAIR, ("train", 300, 399, 3, 4)], "scored nothing"),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_doctored_story_is_refused(name: str) -> None:
    story, message = STORIES[name]
    audit(*told(*FAIR), **shards())
    header, lines = told(*story)
    with pytest.raises(LedgerError, match=message):
        audit(*read(write(header, lines)))


def test_late_scoring_in_documents_is_refused() -> None:
    """Where documents are side by side, lines come in any order, and versions alone say what was trained on what."""
    late = [("score", 0, 100, 0), ("score", 100, 200, 0), ("score", 200, 300, 0), ("train", 200, 300, 0, 1)]
    header, lines = told(*late, ("score", 300, 399, 1), form="document")
    audit(header, lines)
    header, lines = told(("score", 300, 399, 0), ("train", 300, 399, 0, 1), ("score", 0, 300, 1), form="document")
    with pytest.raises(LedgerError, match="were trained on later targets, up to 398"):
        audit(header, lines)
    with pytest.raises(LedgerError, match="score across the border of a document"):
        audit(*told(("score", 0, 399, 0), form="document"), **shards())
    starts = [0, *(np.flatnonzero(TOKENS == 1)[1:3]).tolist()]
    across = [("score", starts[0], starts[1], 0), ("train", starts[0], starts[1], 0, 1)]
    header, lines = told(*across, ("score", starts[1], 399, 1), form="document")
    with pytest.raises(LedgerError, match="across the border of a document"):
        audit(header, lines, **shards())
    # An adapter that begins as that of the document before.
    a, b, c = starts
    middle = (b + c) // 2
    story = [("score", a, b, 0), ("train", a, b, 0, 1), ("score", b, middle, 0), ("train", b, middle, 1, 2)]
    header, lines = told(*story, ("score", middle, c, 2), ("score", c, 399, 0), form="document")
    with pytest.raises(LedgerError, match="line 5: train across the border of a document"):
        audit(header, lines, **shards())


EDITS: dict[str, tuple[Callable[[dict[str, Any], list[list[Any]]], Any], str]] = {
    "bytes of a line": (lambda h, lines: lines[0].__setitem__(5, lines[0][5] + 1), "bytes of the lines add up to"),
    "bytes moved between lines": (
        lambda h, lines: (lines[0].__setitem__(5, lines[0][5] + 1), lines[2].__setitem__(5, lines[2][5] - 1)),
        "bytes, the shards have",
    ),
    "bytes of the header": (lambda h, lines: h.update(bytes=h["bytes"] * 2), "bytes of the lines add up to"),
    "nats": (lambda h, lines: lines[4].__setitem__(4, 50.0), "nats of the lines add up to"),
    "nats of the header": (lambda h, lines: h.update(nats=1.0), "nats of the lines add up to"),
    "negative nats": (lambda h, lines: lines[4].__setitem__(4, -1.0), "neither a score nor a training"),
    "not a line": (lambda h, lines: lines.insert(1, ["rescore", 0, 1]), "neither a score nor a training"),
    "fewer tokens": (lambda h, lines: h.update(tokens=300), "300 tokens, the shards have 399"),
    "other shards": (lambda h, lines: h.update(shards="0" * 64), "not that of the shards"),
    "another form": (lambda h, lines: h.update(form="sliding"), "a training, in sliding scoring"),
    "no form": (lambda h, lines: h.update(form="magic"), 'header: form "magic"'),
    "another artifact": (lambda h, lines: h.update(artifact="b" * 64), "header: of artifact b"),
    "other first weights": (lambda h, lines: h.update(base="0" * 16), "the artifact has 0123456789abcdef"),
    "leak made unclear": (lambda h, lines: h.update(leaking="no"), 'header: leaking "no"'),
    "no tokens": (lambda h, lines: h.update(tokens=0), "header: tokens 0"),
    "more tokens than there can be": (lambda h, lines: h.update(tokens=10**15), "header: tokens 10000"),
    "a chunk's setting": (lambda h, lines: h.update(settings={"tokens": 120}), "not the training of 0 to 119"),
    "no setting": (lambda h, lines: h.update(settings={}), "settings: no tokens"),
    "a stride above the context": (lambda h, lines: h.update(stride=21), "chunk with context 20 and stride 21"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_ledger_is_refused(name: str) -> None:
    edit, message = EDITS[name]
    header, lines = told(*FAIR)
    edit(header, lines)
    with pytest.raises(LedgerError, match=message):
        audit(*read(write(header, lines)), artifact="a" * 64, base=BASE, **shards())


def test_a_changed_file_is_refused() -> None:
    header, lines = told(*FAIR)
    text = gzip.decompress(write(header, lines)).replace(b'["score", 0, 100', b'["score", 0, 101')
    for data, message in (
        (gzip.compress(text), "the seal in the last line"),
        (b"nothing", "not a ledger"),
        (write({"ledger": 2}, []), "no header of format 1"),
        (write({"ledger": 1}, []), "header: no artifact"),
    ):
        with pytest.raises(LedgerError, match=message):
            audit(*read(data))


def test_no_more_is_unpacked_than_a_ledger_holds(tmp_path: Path) -> None:
    """A file of a few kilobytes can unpack to gigabytes; what lies in several streams adds up."""
    bomb = gzip.compress(b"[" + b" " * 2**25)
    for data in (bomb, gzip.compress(b"") + bomb, gzip.compress(b" " * 2**19) * 3):
        assert len(data) < 40_000
        tracemalloc.start()
        with pytest.raises(LedgerError, match=rf"^not a ledger: {len(data)} bytes unpack to more than \d{{7}}$"):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()
    digits = random.Random(0)
    lines = [["score", i, i + 64, f"{digits.getrandbits(64):016x}", 100 * digits.random(), 250] for i in range(20_000)]
    assert len(gzip.decompress(write({"ledger": 1}, lines))) > 2**20
    assert read(write({"ledger": 1}, lines))[1] == lines


def test_form_and_settings_are_those_of_the_lines() -> None:
    whole = [("score", 0, 399, 0)]
    phased = [("score", 0, 210, 0), ("train", 0, 200, 0, 1), ("score", 210, 399, 1)]

    def of(form: str, story: Iterable[tuple[Any, ...]], **changes: Any) -> tuple[dict[str, Any], list[list[Any]]]:
        header, lines = told(*story, form=form)
        return header | changes, lines

    audit(*of("plain", whole, stride=20, settings={}))
    audit(*of("sliding", whole, settings={}))
    audit(*of("phased", phased, settings={"phases": 1}))
    starts = np.flatnonzero(TOKENS == 1).tolist()
    begin, end = next((a, b) for a, b in itertools.pairwise(starts) if b - a > 4)
    parts = [part for part in itertools.pairwise([*starts, 399]) if part[0] != begin]
    parts += [(begin, begin + 2), (begin + 2, end)]
    for found, message in (
        (of("plain", whole, settings={}), "plain with context 20 and stride 4"),
        (of("sliding", whole, settings={}, stride=20), "sliding with context 20 and stride 20"),
        (of("sliding", whole), "settings .*, in sliding scoring"),
        (of("chunk", whole), "0 trainings, settings: tokens 100: wanted 3"),
        (of("phased", phased, settings={"phases": 0}), "settings: phases 0"),
        (of("phased", [*phased[:1], ("train", 0, 210, 0, 1), *phased[2:]], settings={"phases": 1}), "wanted rows"),
        (of("document", whole), "score of 399, settings: tokens 100"),
        (of("document", whole, stride=4), "stride 4, settings: tokens 100"),
        (of("document", [("score", *part, 0) for part in parts]), "inside of a document, whose beginning trained noth"),
    ):
        with pytest.raises(LedgerError, match=message):
            audit(*found, **(shards() if "inside" in message else {}))


def edited(record: Path, edit: Callable[[dict[str, Any]], Any], sealed: bool = True) -> Path:
    content = json.loads(record.read_text())
    edit(content)
    record.write_text(json.dumps(seal(content) if sealed else content))
    return record


RECORD_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "bpb": (lambda r: r["scores"]["chunk"].update(bpb=1.0), "score 'chunk': record: bpb 1.0, the ledger has"),
    "nats": (lambda r: r["scores"]["chunk"].update(nats=1.0), "record: nats 1.0, the ledger has"),
    "tokens": (lambda r: r["scores"]["plain"].update(tokens=1), "record: tokens 1, the ledger has 399"),
    "form": (lambda r: r["scores"]["chunk"].update(form="plain"), "form chunk, the record says plain"),
    "settings": (lambda r: r["scores"]["chunk"]["settings"].update(lr=9.0), "the record says {'lr': 9.0"),
    "name": (lambda r: r["scores"].update(artifact_sliding=r["scores"].pop("chunk")), "by the name of artifact_slid"),
    "another name": (lambda r: r["scores"].update(best=r["scores"].pop("plain")), "by the name of best"),
    "context": (lambda r: r["scores"]["plain"].update(context=8), "context 16, the record says 8"),
    "other ledger": (
        lambda r: r["scores"]["chunk"].update(ledger=r["scores"]["plain"]["ledger"]),
        'header: form "plain" by the name of chunk',
    ),
    "sha256 of the ledger": (lambda r: r["scores"]["chunk"]["ledger"].update(sha256="0"), "the record names 0"),
    "no ledger": (lambda r: r["scores"]["chunk"].pop("ledger"), "score 'chunk': no ledger"),
    "artifact": (lambda r: r.update(artifact_sha256="b" * 64), "of artifact b"),
    "leaking": (lambda r: r.update(leaking=True), "leaking True, the artifact says False"),
    "leak of one score": (lambda r: r["scores"]["chunk"].update(leaking=True), "leaking: False in the ledger, True"),
    "no scores": (lambda r: r.update(scores={}), "no scores"),
    "nothing": (lambda r: r.clear(), "no record of scores"),
}


@pytest.mark.parametrize("name", RECORD_EDITS)
def test_an_edited_record_is_refused(name: str, record: Path) -> None:
    edit, message = RECORD_EDITS[name]
    edited(record, edit)
    with pytest.raises(LedgerError, match=message):
        audit_record(record, "a" * 64, leaking=False, **shards())


def test_an_unsealed_record_is_refused(record: Path) -> None:
    with pytest.raises(LedgerError, match="the seal is not that of the record"):
        audit_record(edited(record, lambda r: r["scores"]["chunk"].update(seconds=0.1), sealed=False))


def test_a_leak_cannot_be_edited_away(tmp_path: Path, scores: dict[str, Score]) -> None:
    record = write_record(tmp_path, scores, leaking=True)
    assert audit_record(record, "a" * 64, leaking=True)["chunk"].leaking
    edited(record, lambda r: r.update(leaking=False))
    with pytest.raises(LedgerError, match="True in the ledger, True in the score, False in the record"):
        audit_record(record)
    edited(record, lambda r: [entry.update(leaking=False) for entry in r["scores"].values()])
    with pytest.raises(LedgerError, match="True in the ledger, False in the score"):
        audit_record(record)
    # Who doctors the ledgers as well still has the artifact's own word against him.
    clean = write_record(tmp_path, scores, leaking=False)
    with pytest.raises(LedgerError, match="leaking False, the artifact says True"):
        audit_record(clean, "a" * 64, leaking=True)


def test_fingerprints_tell_weights_apart() -> None:
    weights = [torch.randn(3, 5), torch.randn(7)]
    seen = {int(fingerprint(weights))}
    for tensor in weights:
        for place in range(tensor.numel()):
            other = [t.clone() for t in weights]
            changed = other[[t is tensor for t in weights].index(True)].view(-1)
            changed[place] = torch.nextafter(changed[place], torch.tensor(9.0))
            seen.add(int(fingerprint(other)))
    swapped = [weights[0][[1, 0, 2]], weights[1]]
    seen |= {int(fingerprint(swapped)), int(fingerprint(weights[::-1]))}
    assert len(seen) == 1 + 22 + 2
    batch = [torch.stack([t, t + 1]) for t in weights]
    assert fingerprint(batch, batched=True).tolist() == [
        int(fingerprint(weights)),
        int(fingerprint([t + 1 for t in weights])),
    ]


def test_scores_of_one_record_are_of_one_text_and_one_model(tmp_path: Path, scores: dict[str, Score]) -> None:
    record = write_record(tmp_path, scores)
    file = tmp_path / "score-phased.ledger.gz"  # the last one
    kept, told_of = file.read_bytes(), record.read_text()
    for name, value, message in (
        ("shards", "0" * 64, "shards 000.*, another score of the record has"),
        ("base", "0" * 16, "weights .*, which no line before it made"),
        ("artifact", None, "of artifact None, not aaa"),
    ):
        header, lines = read(kept)
        record.write_text(told_of)
        relink(record, file, header | {name: value}, lines)
        with pytest.raises(LedgerError, match=message):
            audit_record(record)
    record.write_text(told_of)
    header, lines = read((tmp_path / "score-plain.ledger.gz").read_bytes())
    lines[0][3] = header["base"] = "0" * 16
    relink(record, tmp_path / "score-plain.ledger.gz", header, lines)
    with pytest.raises(LedgerError, match=r"'chunk': header: base .*, another score of the record has 0000"):
        audit_record(record)


def relink(record: Path, file: Path, header: Any, lines: list[Any]) -> None:
    """Put a ledger in the place of another, with the record's hash and seal made right."""
    data = write(header, lines) if isinstance(header, dict) else gzip.compress(b"")
    file.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    def edit(content: dict[str, Any]) -> None:
        for entry in content["scores"].values():
            if entry["ledger"]["file"] == file.name:
                entry["ledger"]["sha256"] = digest

    edited(record, edit)


VALUES: tuple[Any, ...] = (
    None, True, "", "x", "\ud800", "a\0b", [], [1], {}, {"x": None}, [[]], -1, 0, 2**70, 10**15, 10**400, 0.5,
    1e308, math.nan, math.inf, "a" * 64, "0" * 16, "plain",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything within a JSON value, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*path, key), *places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def test_whatever_stands_in_it_is_refused_or_proven_and_never_breaks(tmp_path: Path, scores: dict[str, Score]) -> None:
    """Every entry of a record and of a ledger with a value of another kind: an audit says no; it does not fall over."""
    choice = random.Random(0)
    record = write_record(tmp_path, {name: scores[name] for name in ("plain", "chunk")})
    kept = record.read_text()
    refused = 0
    for place in places(json.loads(kept)):
        for value in choice.sample(VALUES, 8):
            record.write_text(kept)
            edited(record, lambda r: put(r, place, value))  # noqa: B023
            try:
                audit_record(record, **shards())
            except LedgerError as error:
                str(error).encode(errors="surrogatepass")
                refused += 1
    for text in ("", "[]", "null", "3", '{"scores": []}', "[" * 100_000, '{"seal": 1' + "0" * 5000 + "}"):
        record.write_text(text)
        with pytest.raises(LedgerError):
            audit_record(record)
    file = tmp_path / "score-chunk.ledger.gz"
    header, lines = read(file.read_bytes())
    lines = lines[:5] + lines[-2:]
    for place in places([header, *lines[:3]]):
        for value in choice.sample(VALUES, 6):
            changed = json.loads(json.dumps([header, *lines]))
            put(changed, place, value)
            record.write_text(kept)
            relink(record, file, changed[0], changed[1:])
            with pytest.raises(LedgerError):
                audit_record(record)
            refused += 1
    assert refused > 400
    file.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(range(200)))
    with pytest.raises(LedgerError, match="not a ledger"):
        read(file.read_bytes())
