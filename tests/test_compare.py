"""bench.compare: Student's distribution against tables, Welch's test against a published example."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from bench.compare import incomplete_beta, main, t_cdf, welch
from gpt.ledger import seal


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


def runs(folder: Path, name: str, nats: list[float], how: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    paths = []
    for seed, value in enumerate(nats):
        path = folder / f"{name}{seed}"
        path.mkdir(parents=True)
        score = {"nats": value * 1000, "tokens": 1000, "bytes": 3700, "form": "sliding", "context": 2048, "stride": 64}
        score |= {"settings": {}} | (how or {})
        record = {
            "seed": seed,
            "artifact": {"sha256": f"{name}{seed}"},
            "scores": {"artifact_sliding": score},
        } | changes
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
        ({"form": "chunk"}, "scores of different form, wanted one: sliding of .*a0, .*a1; chunk of .*b0, .*b1"),
        ({"context": 4096}, "scores of different context, wanted one: 2048 of .*; 4096 of"),
        ({"stride": 128}, "scores of different stride, wanted one: 64 of .*; 128 of"),
    ],
)
def test_scores_of_another_kind_are_refused(
    how: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = runs(tmp_path, "a", [2.78, 2.79]), runs(tmp_path, "b", [2.78, 2.79], how)
    assert main([*good, "--", *other]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_settings_may_differ_between_the_sets_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        runs(tmp_path, name, [2.78, 2.79], {"form": "chunk", "settings": {"lr": lr}})
        for name, lr in (("a", 0.01), ("b", 0.02))
    )
    assert main([*a, "--", *b]) == 0
    assert main([a[0], b[1], "--", b[0]]) == 2
    assert "scores in A with different settings of chunk" in capsys.readouterr().err


def test_a_record_that_was_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = runs(tmp_path, "a", [2.78, 2.79]), runs(tmp_path, "b", [2.78, 2.79], leaking=True)
    file = Path(bad[1]) / "summary.json"
    text = file.read_text()
    for record, message in (
        (json.loads(text) | {"leaking": False}, "the seal is not that of the record: it was changed"),
        ({name: value for name, value in json.loads(text).items() if name != "seal"}, "has no seal"),
    ):
        file.write_text(json.dumps(record))
        assert main([*good, "--", *bad]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(file) in error
