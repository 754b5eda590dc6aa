"""report.html from a folder as a run leaves it, and its pictures."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gpt.page
from gpt.ledger import read, seal, write
from gpt.page import COLOURS, bar, chart, histogram, page, ticks, write_page
from gpt.record import RecordError
from gpt.score import record_scores, score
from tests.test_artifact import DATA
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
    summary["leaking"] = False
    group = {"name": "qo_bank", "nbytes": 700}
    summary["artifact"] = {"sha256": "a" * 64, "nbytes": 1000, "code_nbytes": 300, "groups": [group]}
    lines = [
        {"step": n, "train_loss": 5 - n / 10, "lr_factor": 1.0 - n / 40, "ms_per_step": 90 + n % 7}
        for n in range(1, 30)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "tr')
    environment = {"world_size": 1, "device": "a <GPU>", "packages": {"torch": "2"}, "git_commit": None}
    files = {"summary": seal(summary), "environment": environment, "config": config.model_dump(mode="json")}
    files["parts"] = {
        layers: {"forward and backward": ms, "optimizer": 2.5} for layers, ms in (("11", 66.0), ("14", 83.0))
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def pictures(html: str) -> list[ET.Element]:
    return [
        ET.fromstring(part.split("</svg>")[0] + "</svg>") for part in html.replace("<svg", "\0<svg").split("\0")[1:]
    ]


def test_page(run: Path) -> None:
    html = write_page(run).read_text()
    assert len(pictures(html)) == 5  # loss, rate, times, parts, sizes
    assert "14 layers" in html
    assert "a &lt;GPU&gt;" in html
    stages = [html.index(text) for text in ("averaged weights, plain", "artifact, plain", "artifact, sliding")]
    assert stages == sorted(stages)
    assert html.count("consistent") == 3
    assert "model_dim" in html
    assert "preset sample" in html
    same = page(run, run)
    assert "<p>none</p>" in same


def test_page_shows_what_is_wrong(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    plain = summary["scores"]["artifact"] | {"leaking": False}
    other = {"artifact_sha256": "b" * 64, "leaking": False, "scores": {"plain": plain}}
    header, lines = read((run / plain["ledger"]["file"]).read_bytes())
    ledger = run / "score-plain.ledger.gz"
    ledger.write_bytes(write(header | {"artifact": "b" * 64}, lines))
    plain["ledger"] = {"file": ledger.name, "sha256": hashlib.sha256(ledger.read_bytes()).hexdigest()}
    (run / "score.json").write_text(json.dumps(seal(other)))
    summary["leaking"] = True
    (run / "summary.json").write_text(json.dumps(summary))
    html = page(run)
    for text in ("REFUSED", "the seal is not that of the record", "LEAKING", "score: plain (another artifact)"):
        assert text in html
    ledger.write_bytes(ledger.read_bytes()[:-9])
    assert "score: plain (another artifact)" not in page(run)
    # Whatever else lies in the folder.
    for number, text in enumerate(("{", "[1]", "null", '{"scores": 3}', '{"scores": {"x": null}}', "[" * 100_000)):
        (run / f"stray-{number}.json").write_text(text)
    html = page(run)
    assert [f"<td>stray-{number}</td>" in html for number in range(6)] == [False, False, False, True, True, False]
    for text in ("{", "[1]", '{"11": 3}', '{"11": {"a": null}}', '{"11": {"a": 1}, "14": {"b": 0}}'):
        (run / "parts.json").write_text(text)
        assert "Parts of a step" in page(run)
    (run / "parts.json").unlink()
    assert "not measured" in page(run)
    (run / "summary.json").write_text("[]")
    with pytest.raises(RecordError, match="no finished run"):
        page(run)


def test_page_says_what_the_artifact_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though record and ledgers agree with each other."""
    assert 'class="bad"' not in page(run)
    monkeypatch.setattr(gpt.page, "beside", lambda *_: {"artifact": "a" * 64, "leaking": True})
    assert 'class="bad">REFUSED by the audit' in page(run)
    assert "leaking False, the artifact says True" in page(run)
    monkeypatch.undo()
    (run / "model.pga").write_bytes(DATA)
    assert f"the file has {hashlib.sha256(DATA).hexdigest()}" in page(run)
    (run / "model.pga").write_bytes(DATA[:-9])
    assert "REFUSED by the audit" in page(run)


@pytest.mark.parametrize("summary", [{}, {"scores": []}, {"artifact": 3}])
def test_page_of_a_broken_record(run: Path, summary: dict[str, Any]) -> None:
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RecordError, match="not as a run leaves it"):
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


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# Runs in the page, behind its end, and leaves what it saw in the title of the document around it.
LOOK = """<script>
addEventListener("load", () => {
  const box = e => e.getBoundingClientRect(), seen = e => box(e).width > 0 && box(e).height > 0;
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement) if (p.className == "wide") return true; };
  const all = [...document.body.querySelectorAll("h1, h2, p, table, svg")];
  const marks = [...document.querySelectorAll("svg")].flatMap(svg => {
    const texts = [...svg.querySelectorAll("text")].map(box);
    return texts.flatMap((a, i) => texts.slice(i + 1).filter(b =>
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2));
  });
  parent.document.title = "SEEN" + JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, errors,
    hidden: all.filter(e => !seen(e)).map(e => e.outerHTML.slice(0, 80)),
    wide: all.filter(e => !inside(e) && box(e).right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    headings: [...document.querySelectorAll("h2")].map(e => e.textContent),
    overlaps: marks.length, bottom: Math.max(...all.map(e => box(e).bottom)),
  }) + "SEEN";
});
</script>"""
ERRORS = "<script>const errors = []; addEventListener('error', e => errors.push(e.message), true);</script>"


def browse(html: str, folder: Path, width: int, height: int) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """What headless Chromium makes of a page: what LOOK saw, and the picture, (height, width, 3).

    The page is in a frame of that width, since no window of Chromium's is narrower than 500.
    """
    file, picture = folder / f"looked-at-{width}.html", folder / f"{width}.png"
    page = html.replace("<style>", ERRORS + "<style>").replace("</html>", LOOK + "</html>")
    style = f"position: absolute; left: 0; top: 0; border: 0; width: {width}px; height: {height}px"
    file.write_text(f'<!doctype html><title></title><iframe style="{style}" srcdoc="{escape(page)}"></iframe>')
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/own",
    ]
    command += [f"--window-size={max(width, 600)},{height}", "--virtual-time-budget=2000"]
    # Not every version does both at once.
    shown = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    subprocess.run([*command, f"--screenshot={picture}", file.as_uri()], capture_output=True, timeout=60, check=True)
    from matplotlib.image import imread

    title = unescape(shown.stdout.split("<title>")[1].split("</title>")[0])
    return json.loads(title.split("SEEN")[1]), (imread(picture)[:, :width, :3] * 255).astype(np.uint8)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium): the page is not looked at")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    """Drawn whole, nothing beside the window's edge or over each other, no error, colours where pictures are."""
    pytest.importorskip("matplotlib")
    seen, picture = browse(page(run), tmp_path, width, 4000)
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert (seen["errors"], seen["hidden"], seen["wide"], seen["overlaps"]) == ([], [], [], 0)
    names = ["Scores", "Loss", "Time of a step", "Parts of a step", "Size", "Ledgers"]
    assert seen["headings"][:-1] == names
    assert seen["headings"][-1].startswith("Settings that differ")
    assert 500 < seen["bottom"] < 4000
    assert picture.shape == (4000, width, 3)
    paper = picture[-1, -1]
    drawn = (picture != paper).any(2)
    assert 0.01 < drawn[: int(seen["bottom"])].mean() < 0.5
    assert not drawn[int(seen["bottom"]) + 2 :].any()
    for colour in COLOURS[: 2 if width > 1000 else 1]:  # in a narrow window the rest is scrolled to
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
        assert (np.abs(picture.astype(int) - wanted).max(2) < 8).sum() > 20


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium): the page is not looked at")
def test_the_look_finds_faults(tmp_path: Path) -> None:
    html = (
        "<!doctype html><style></style><h1>a</h1><h2></h2><p style='width:900px'>b</p><script>nothing()</script></html>"
    )
    seen, _ = browse(html, tmp_path, 600, 300)
    assert seen["scroll"] > 600
    assert "nothing is not defined" in seen["errors"][0]
    assert len(seen["hidden"]) == len(seen["wide"]) == 1
