"""report.html from a folder as a run leaves it, and its pictures."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from gpt.ledger import seal
from gpt.page import bar, chart, histogram, page, ticks, write_page
from gpt.record import RecordError
from gpt.score import record_scores, score
from tests.test_score import text_of
from tests.tiny import ALONE, random_tokens, tiny_config, tiny_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = tiny_config()
    model, depth, text = tiny_model(config), config.depth(True), text_of(random_tokens(100, 64))
    made = {
        name: score(model, text, depth, ALONE, context=16, stride=stride, batch_tokens=64)
        for name, stride in (("ema", 16), ("artifact_sliding", 4), ("artifact", 16))
    }
    of = {"ema": None, "artifact": "a" * 64, "artifact_sliding": "a" * 64}
    scores = record_scores(tmp_path / "summary.json", made, text, of, False)
    summary: dict[str, Any] = {"seed": 1, "steps": 3, "seconds": 1.0, "calibration_seconds": 0.1, "scores": scores}
    group = {"name": "qo_bank", "nbytes": 700}
    summary["artifact"] = {"sha256": "a" * 64, "nbytes": 1000, "code_nbytes": 300, "groups": [group]}
    lines = [
        {"step": n, "train_loss": 5 - n / 10, "lr_factor": 1.0 - n / 40, "ms_per_step": 90 + n % 7}
        for n in range(1, 30)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "tr')
    environment = {"world_size": 1, "device": "a <GPU>", "packages": {"torch": "2"}, "git_commit": None}
    files = {"summary": seal(summary), "environment": environment, "config": config.model_dump(mode="json")}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def pictures(html: str) -> list[ET.Element]:
    return [
        ET.fromstring(part.split("</svg>")[0] + "</svg>") for part in html.replace("<svg", "\0<svg").split("\0")[1:]
    ]


def test_page(run: Path) -> None:
    html = write_page(run).read_text()
    assert len(pictures(html)) == 4  # loss, rate, times, sizes
    assert "a &lt;GPU&gt;" in html
    stages = [html.index(text) for text in ("averaged weights, plain", "artifact, plain", "artifact, sliding")]
    assert stages == sorted(stages)
    assert html.count("consistent") == 3
    assert "model_dim" in html
    assert "preset sample" in html
    same = page(run, run)
    assert "<p>none</p>" in same


def test_page_shows_what_is_wrong(run: Path) -> None:
    ledger = run / "summary-artifact.ledger.gz"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    summary = json.loads((run / "summary.json").read_text())
    summary["leaking"] = True
    del summary["scores"]["ema"]["ledger"]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "score.json").write_text(json.dumps({"artifact_sha256": "b", "scores": {"chunk": summary["scores"]["ema"]}}))
    html = page(run)
    for text in ("REFUSED: not a ledger", "no ledger", "LEAKING", "score: chunk (another artifact)"):
        assert text in html
    (run / "summary.json").unlink()
    with pytest.raises(RecordError, match="no finished run"):
        page(run)


def test_pictures_of_little_data() -> None:
    assert (
        chart({"a": []}, "x", "y") == chart({"a": [(1, 2)]}, "x", "y") == chart({"a": [(1, 2), (2, 2)]}, "x", "y") == ""
    )
    assert "polyline" in chart({"a": [(1, 2), (2, 3)], "b": []}, "x", "y")
    assert histogram([5.0], "ms") == ""
    assert "all 2: 5.00 ms" in histogram([5.0, 5.0], "ms")
    for values in ([1.0, 2.0], [1.0] * 50 + [1.1] * 50 + [900.0]):
        (picture,) = pictures(histogram(values, "ms"))
        assert len(picture.findall("rect")) == 40
    (picture,) = pictures(bar({"a & b": 120.0}, 100.0, "bytes"))
    assert float(picture.findall("line")[0].attrib["x1"]) < float(picture.findall("rect")[0].attrib["width"])
    for low, high in ((0.0, 1.0), (2.9, 3.4), (1e-4, 7e-4), (0.0, 5345.0)):
        marks = ticks(low, high)
        assert 3 <= len(marks) <= 8
        assert all(low <= mark <= high or math.isclose(mark, high) for mark in marks)
