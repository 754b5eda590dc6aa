"""bench.compare: Student's distribution against tables, Welch's test against a published example."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compare import incomplete_beta, main, t_cdf, welch
from gpt.artifact import load
from gpt.ledger import Ledger, save, seal
from tests.test_artifact import DATA


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (6.313752, 1, 0.95),
        (31.820516, 1, 0.99),
        (2.919986, 2, 0.95),
        (4.604095, 4, 0.995),
        (1.812461, 10, 0.95),
        (2.763769, 10, 0.99),
        (1.697261, 30, 0.95),
        (1.659, 110, 0.95),
        (1.644854, 1e7, 0.95),
        (0.0, 3.7, 0.5),
    ],
)
def test_students_distribution(t: float, freedom: float, p: float) -> None:
    assert t_cdf(t, freedom) == pytest.approx(p, abs=2e-5)
    assert t_cdf(-t, freedom) == pytest.approx(1 - p, abs=2e-5)


def test_students_distribution_in_closed_form() -> None:
    for t in (-40.0, -3.0, -0.1, 0.2, 1.0, 7.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-13)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-13)


def test_incomplete_beta() -> None:
    for x in (0.0, 0.01, 0.3, 0.77, 0.999, 1.0):
        assert incomplete_beta(1, 1, x) == pytest.approx(x, abs=1e-14)
        assert incomplete_beta(2, 3, x) == pytest.approx(x * x * (6 - 8 * x + 3 * x * x), abs=1e-14)
        assert incomplete_beta(0.5, 0.5, x) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), abs=1e-13)


def test_welch() -> None:
    """R's own example, t.test(extra ~ group, data = sleep): t = -1.8608, df = 17.776, two-sided p = 0.07939."""
    a = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = welch(a, b)
    assert found.t == pytest.approx(1.8608, abs=5e-5)
    assert found.freedom == pytest.approx(17.776, abs=5e-4)
    assert 2 * found.p == pytest.approx(0.07939, abs=5e-6)
    small = welch([1.0, 3.0, 5.0, 7.0], [8.0, 9.0, 10.0])
    assert small.t == pytest.approx(5 / math.sqrt(20 / 3 / 4 + 1 / 3))
    assert small.freedom == pytest.approx((5 / 3 + 1 / 3) ** 2 / ((5 / 3) ** 2 / 3 + (1 / 3) ** 2 / 2))
    assert small.p == pytest.approx(t_cdf(-small.t, small.freedom))
    assert welch([1.0, 1.0], [2.0, 2.0]).p == 0.0
    assert welch([1.0, 1.0], [2.0, 2.0], margin=1.5).p == 1.0
    with pytest.raises(ValueError, match="at least two"):
        welch([1.0], [2.0, 3.0])


CHUNK: dict[str, Any] = {"form": "chunk", "settings": {"tokens": 2048}}


def runs(
    folder: Path, name: str, nats: list[float], how: dict[str, Any] | None = None, leaking: bool = False
) -> list[str]:
    """Folders of runs with one score of one line each, which the audit passes."""
    paths = []
    for seed, value in enumerate(nats):
        path = folder / f"{name}{seed}"
        path.mkdir(parents=True)
        sha256 = hashlib.sha256(path.name.encode()).hexdigest()
        said: dict[str, Any] = {
            "nats": value * 1000,
            "tokens": 1000,
            "bytes": 3700,
            "form": "sliding",
            "context": 2048,
            "stride": 64,
        }
        said |= {"settings": {}, "leaking": leaking} | (how or {})
        header = {"shards": "0" * 64} | said | {"artifact": sha256}
        said.pop("shards", None)
        ledger = Ledger(torch.tensor(1))
        ledger.lines = [["score", 0, 1000, ledger.base, said["nats"], 3700]]
        score = "artifact_sliding" if said["form"] == "sliding" else "artifact_ttt"
        figures = {"bpb": said["nats"] / math.log(2) / 3700, "nats_per_token": said["nats"] / 1000, "seconds": 1.0}
        record = {"seed": seed, "artifact": {"sha256": sha256}, "leaking": leaking}
        record["scores"] = {score: said | figures | {"ledger": save(path / "l.gz", header, ledger)}}
        (path / "summary.json").write_text(json.dumps(seal(record)))
        paths.append(str(path))
    return paths


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = runs(tmp_path, "a", [2.780, 2.781, 2.779]), runs(tmp_path, "b", [2.790, 2.791, 2.789])
    assert main([*good, "--", *bad]) == 0
    printed = capsys.readouterr().out
    assert "A is better by +0.010000 nats per token, +0.003899 BPB" in printed
    assert "t = 12.247, 4.00 degrees of freedom, p = 0.00013" in printed
    assert "p < 0.01: met" in printed
    assert main([*bad, "--", *good]) == 0
    assert "NOT met" in capsys.readouterr().out
    assert main([good[0], "--", *bad]) == 0
    assert "not tested" in capsys.readouterr().out
    leak = runs(tmp_path / "leak", "l", [1.0, 1.1], leaking=True)
    assert main([*leak, "--", *bad]) == 0
    assert "nothing above counts" in capsys.readouterr().out
    for arguments, message in (
        ([*good, "--", *bad, "--score", "chunk"], "no score 'chunk'; it has artifact_sliding"),
        ([good[0], good[0], "--", *bad], "they are one result"),
        ([*good, "--", str(tmp_path / "none")], "No such file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"form": "phased", "settings": {"phases": 1}},
            "different form, wanted one: chunk of .*; phased of .*b0, .*b1",
        ),
        ({"context": 1024}, "scores of different context, wanted one: 2048 of .*; 1024 of"),
        ({"stride": 128}, "scores of different stride, wanted one: 64 of .*; 128 of"),
    ],
)
def test_scores_of_another_kind_are_refused(
    how: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = (runs(tmp_path, name, [2.78, 2.79], CHUNK | change) for name, change in (("a", {}), ("b", how)))
    assert main([*good, "--", *other, "--score", "artifact_ttt"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_settings_may_differ_between_the_sets_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        runs(tmp_path, name, [2.78, 2.79], CHUNK | {"settings": {"lr": lr, "tokens": 2048}})
        for name, lr in (("a", 0.01), ("b", 0.02))
    )
    assert main([*a, "--", *b, "--score", "artifact_ttt"]) == 0
    assert main([a[0], b[1], "--", b[0], "--score", "artifact_ttt"]) == 2
    assert "scores in A with different settings of chunk" in capsys.readouterr().err


def test_a_record_that_was_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = runs(tmp_path, "a", [2.78, 2.79]), runs(tmp_path, "b", [2.78, 2.79], leaking=True)
    file = Path(bad[1]) / "summary.json"
    leaks = json.loads(file.read_text())
    clean = json.loads(json.dumps(leaks).replace('"leaking": true', '"leaking": false'))
    better = json.loads(json.dumps(leaks))
    better["scores"]["artifact_sliding"]["nats"] *= 0.9
    for record, message in (
        (leaks | {"leaking": False}, "the seal is not that of the record: it was changed"),
        ({name: value for name, value in leaks.items() if name != "seal"}, "the seal is not that of the record"),
        (seal(clean), "leaking: True in the ledger, False in the score"),
        (seal(better), "record: nats 2511.0, the ledger has 2790.0"),
        (3, "no record of scores"),
    ):
        file.write_text(json.dumps(record))
        assert main([*good, "--", *bad]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(file) in error


def test_the_artifact_beside_a_record_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever record and ledger say together."""
    good, bad = runs(tmp_path, "a", [2.78, 2.79]), runs(tmp_path, "b", [2.78, 2.79])
    (Path(bad[1]) / "model.pga").write_bytes(DATA)
    assert main([*good, "--", *bad]) == 2
    assert f"the file has {load(Path(bad[1]) / 'model.pga').sha256}" in capsys.readouterr().err


def test_texts_of_the_same_size_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = runs(tmp_path, "a", [2.78, 2.79]), runs(tmp_path, "b", [2.78, 2.79], {"shards": "1" * 64})
    assert main([*good, "--", *other]) == 2
    assert "scores of different texts: 1,000 tokens of 3,700 bytes, sha256 0000" in capsys.readouterr().err
    assert main([*good, "--", good[0]]) == 2
    assert "they are one result" in capsys.readouterr().err
