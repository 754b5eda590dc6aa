"""Handing runs in: the folder, what is refused, and the check that reads a folder's files alone."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantize
from gpt import artifact, bundle, review, submission
from gpt.config import ROOT, load_config
from gpt.data import open_shard, write_shard
from gpt.folder import seed_log, settings, submission_json
from gpt.ledger import VAL_BYTES, audit_record, canonical, read, seal
from gpt.record import RecordError, read_config
from gpt.submission import Facts, SeedRun, SubmissionError, gather, leaking
from tests.test_bundle import run_script, sample_data, script, small_run
from tests.test_ledger import relink

pytestmark = pytest.mark.usefixtures("one_thread")


def gathered(paths: Sequence[Path], **settings: Any) -> Facts:
    return gather(paths, **{"author": "A. Person", "github_id": "person", **settings})


OPTIONS = ("--author", "A. Person", "--github-id", "person", "--declare", "non-canonical")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three finished runs, seeds 7, 42 and 1000."""
    folder = tmp_path_factory.mktemp("handed-in")
    data = sample_data(folder / "data")
    return [small_run(data, folder / "runs", f"run-{seed}", SEED=seed) for seed in ("42", "7", "1000")]


@pytest.fixture(scope="module")
def handed_in(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("submissions") / "first"
    assert hand_in(*runs, "--out", out, "--artifacts", *OPTIONS) == 0
    return out


@pytest.fixture(scope="module")
def leak(runs: list[Path]) -> Path:
    """A finished run, seed 5, that was fine-tuned on validation."""
    settings = {"SEED": "5", "PRE_QUANT": "validation", "ALLOW_LEAK": "1", "PRE_QUANT_EPOCHS": "1"}
    return small_run(runs[0].parent.parent / "data", runs[0].parent, "leaks", **settings)


def hand_in(*arguments: str | Path) -> int:
    return quantize.main(["submission", *map(str, arguments)])


def doctored(run: Path, folder: Path, file: str = "", change: Callable[[dict[str, Any]], object] = dict) -> Path:
    """A copy of a run, one of its records changed, and sealed again."""
    copy = folder / run.name
    shutil.copytree(run, copy)
    if file:
        record = json.loads((copy / file).read_text())
        change(record)
        (copy / file).write_text(json.dumps(seal(record) if "seal" in record else record))
    return copy


def test_the_folder_is_what_the_field_expects(handed_in: Path, runs: list[Path]) -> None:
    logs = [f"train_seed{seed}.log" for seed in (7, 42, 1000)]
    models = [f"model_seed{seed}.pga" for seed in (7, 42, 1000)]
    assert {path.name for path in handed_in.iterdir()} == {
        "README.md", "submission.json", "requirements.txt", "train_gpt.py", *logs, *models
    }  # fmt: skip
    about = json.loads((handed_in / "submission.json").read_text())
    summaries = {run: json.loads((run / "summary.json").read_text()) for run in runs}
    bpbs = [round(summary["scores"]["artifact_sliding"]["bpb"], 8) for summary in summaries.values()]
    code = bundle.build(ROOT)
    assert (handed_in / "train_gpt.py").read_bytes() == code
    assert about["seeds"] == [7, 42, 1000]
    assert about["val_bpb"] == pytest.approx(statistics.fmean(bpbs), abs=1e-8)
    assert about["val_bpb_std"] == pytest.approx(statistics.stdev(bpbs), abs=1e-8)
    assert about["bytes_code"] == len(code)
    assert about["bytes_total"] == max((run / "model.pga").stat().st_size for run in runs) + len(code)
    assert (about["track"], about["declared"]) == ("non_record_16mb", ["non-canonical"])
    assert (about["val_tokens"], about["author"], about["github_id"]) == (2000, "A. Person", "person")
    assert not about["compliance"]["canonical_validation"]
    readme = (handed_in / "README.md").read_text()
    assert readme.startswith(
        f"# Non-record: SP1024 3L/4V 32d, depth recurrence 1, Muon banks, GPTQ int6, val_bpb {about['val_bpb']:.5f}"
    )
    for run, summary in summaries.items():
        seed, result = summary["seed"], about["seed_results"][str(summary["seed"])]
        log = (handed_in / f"train_seed{seed}.log").read_text()
        assert result["artifact_sha256"] == summary["artifact"]["sha256"]
        assert (handed_in / f"model_seed{seed}.pga").read_bytes() == (run / "model.pga").read_bytes()
        for text in (
            f"\n  seed: {seed}\n",
            f"Code size: {len(code)} bytes",
            f"Total submission size int6+rans: {result['artifact_bytes']} bytes",
            f"quantized_sliding_window val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f} tokens:2000 ",
            "step:4/4 train_loss:",
            "step:2/4 val_loss:",
            result["artifact_sha256"],
        ):
            assert text in log
        assert f"| {seed} | " in readme
        assert f"**{result['val_bpb']:.5f}**" in readme
        assert f"{result['artifact_bytes']:,}" in readme
        assert result["artifact_sha256"] in readme
    for name in ("README.md", *logs):
        assert "NON-CANONICAL VALIDATION" in (handed_in / name).read_text()
    assert "brotli==" in (handed_in / "requirements.txt").read_text()
    assert "+cu" not in (handed_in / "requirements.txt").read_text()


def test_the_readmes_command_makes_the_same_configuration(
    handed_in: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(runs[1])
    (command,) = re.findall(
        r"^    (PRESET=.*) python train_gpt.py --data-path", (handed_in / "README.md").read_text(), re.M
    )
    chosen = dict(setting.split("=", 1) for setting in command.split())
    assert chosen == {**settings(config), "SEED": "7"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert load_config([]).fingerprint() == config.fingerprint()


def test_its_own_check_finds_nothing(handed_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize.main(["check", str(handed_in)]) == 0
    printed = capsys.readouterr().out
    assert "FAIL  " not in printed
    assert re.search(r"^declared +validation", printed, re.M)
    assert re.search(r"^0 FAIL, 2 declared, 0 unknown, \d\d ok$", printed, re.M)
    # Without artifacts as well: sizes are then those of logs and JSON.
    bare = tmp_path / "bare"
    shutil.copytree(handed_in, bare, ignore=shutil.ignore_patterns("*.pga"))
    assert quantize.main(["check", str(bare)]) == 0
    for path, message in ((tmp_path / "none", "does not exist"), (handed_in / "README.md", "is a file")):
        assert quantize.main(["check", str(path)]) == 2
        assert f"check {path}: {message}, wanted a submission's folder" in capsys.readouterr().err


def edited(name: str, old: str, new: str, count: int = 1) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert re.search(old, text)
        (folder / name).write_text(re.sub(old, new, text, count=count))

    return edit


def same_scores(folder: Path) -> None:
    """One artifact scored for two seeds, as by runs that shared a file."""
    first, second = (folder / f"train_seed{seed}.log" for seed in (7, 42))
    scores = {line.split()[0]: line for line in first.read_text().splitlines() if line.startswith("quantized")}
    lines = [scores.get(line.split()[0], line) for line in second.read_text().splitlines()]
    second.write_text("\n".join(lines) + "\n")


def leaking_artifact(folder: Path) -> None:
    """One whose own configuration says so, whatever the texts beside it do."""
    path = folder / "model_seed7.pga"
    found = artifact.load(path)
    config = found.config.model_copy(update={"pre_quant": "validation", "allow_leak": True})
    artifact.save(path, artifact.serialise(config, found.depth, found.header.tokenizer_sha256, found.tensors))


@pytest.mark.parametrize(
    ("doctor", "failing"),
    [
        (lambda folder: (folder / "train_gpt.py").unlink(), {"files"}),
        (lambda folder: (folder / "submission.json").write_text("{"), {"submission.json", "fields"}),
        (edited("submission.json", r'"author": "A. Person",', ""), {"fields"}),
        (edited("train_gpt.py", r'""" *\n', '"""\nx = (\n'), {"program compiles", "code bytes, JSON"}),
        (
            edited("train_gpt.py", "import atexit\n", "import atexit, re\n"),
            {"code bytes, JSON", "code bytes, logs", "train_gpt_sha256"},
        ),
        (edited("submission.json", r'"seeds": \[\s+7,', '"seeds": [42,'), {"seeds distinct", "results of each seed"}),
        (lambda folder: (folder / "train_seed7.log").unlink(), {"log of each seed"}),
        (edited("train_seed42.log", r"  matrix_lr: \S+", "  matrix_lr: 0.5"), {"one configuration, logs"}),
        (edited("submission.json", r'"model_bytes": (\d+)', r'"model_bytes": 1\1'), {"model bytes of 7, JSON"}),
        (
            edited("submission.json", r'"artifact_bytes": (\d+)', r'"artifact_bytes": 1\1'),
            {"total bytes of 7, JSON", "bytes of 7, README"},
        ),
        (edited("train_seed7.log", r"(Serialized .*: )(\d+)", r"\g<1>1\2"), {"model bytes of 7, log"}),
        (edited("train_seed7.log", r"Artifact sha256: \w", "Artifact sha256: x"), {"sha256, logs and JSON"}),
        (
            lambda folder: shutil.copy(folder / "model_seed7.pga", folder / "model_seed42.pga"),
            {"artifacts distinct, files", "artifacts in the folder"},
        ),
        (same_scores, {"scores of seeds differ"}),
        (
            edited("submission.json", r'"val_bpb": (\d\.\d\d)\d', r'"val_bpb": \g<1>9'),
            {"val_bpb is the mean", "val_bpb in README's title", "val_bpb in README's head"},
        ),
        (edited("submission.json", r'"val_bpb_std": 0', '"val_bpb_std": 1'), {"val_bpb_std"}),
        (edited("README.md", r"val_bpb \d\.\d", "val_bpb 1.0"), {"val_bpb in README's title"}),
        (edited("README.md", r"\| 42 \|.*?\*\*\d\.\d\d", "| 42 | **1.01"), {"val_bpb of 42, README"}),
        (edited("README.md", "TRAIN_SEQ_LEN=32", "TRAIN_SEQ_LEN=64"), {"settings in README"}),
        (edited("submission.json", '"TRAIN_SEQ_LEN": "32"', '"TRAIN_SEQ_LEN": "64"'), {"settings in JSON"}),
        (edited("README.md", "NON-CANONICAL", "CANONICAL"), {"declared"}),
        (edited("submission.json", '"non_record_16mb"', '"10min_16mb"'), {"track"}),
        (edited("submission.json", r'\[\s+"non-canonical"\s+\]', "[]"), {"validation", "compliance"}),
        (edited("submission.json", '"val_bytes": ', '"val_bytes": 1'), {"validation, logs"}),
        (edited("train_seed7.log", "step:1/4 ", "LEAKING\nstep:1/4 "), {"leak stamps"}),
        (
            edited("train_seed7.log", "Code size", "ttt_adamw:epoch 1/2 loss:1.2\nCode size"),
            {"training before scoring"},
        ),
        (edited("train_seed7.log", "  pre_quant: none", "  pre_quant: validation"), {"training before scoring"}),
        (
            edited("train_seed42.log", "Code size", "ema_pre_quant val_loss:1.2 val_bpb:0.9\nCode size"),
            {"training before scoring"},
        ),
        (edited("README.md", "PRESET=", "PRE_QUANT=validation PRESET="), {"training before scoring"}),
        (edited("submission.json", '"PRESET"', '"PRE_QUANT": "validation", "PRESET"'), {"training before scoring"}),
        (leaking_artifact, {"training before scoring"}),
        (
            lambda folder: [
                edited(log.name, r"  matrix_lr: \S+", "  matrix_lr: 0.5")(folder) for log in folder.glob("*.log")
            ],
            {"configuration of 7, log", "configuration of 42, log", "configuration of 1000, log"},
        ),
        (edited("submission.json", '"PRESET"', '"MATRIX_LR": "0.5", "PRESET"'), {"configuration of 42, JSON"}),
        (edited("train_seed7.log", "code_sha256: .", "code_sha256: x"), {"code of the runs"}),
        (edited("submission.json", '"no_slot": true', '"no_slot": false'), {"compliance"}),
        (edited("submission.json", r'\[\s+"non-canonical"\s+\]', '["non-canonical", "leaking"]'), {"declared"}),
        (edited("submission.json", r'"train_time_s": ', '"train_time_s": 900'), {"training, s"}),
    ],
)
def test_the_check_sees(doctor: Callable[[Path], None], failing: set[str], handed_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "doctored"
    shutil.copytree(handed_in, folder)
    doctor(folder)
    found = review.review(folder)
    assert found.failed
    assert failing <= {row.name for row in found.rows if row.verdict == "FAIL"}
    assert all(row.name in found.table() for row in found.rows)


@pytest.mark.parametrize(
    ("old", "new", "failing"),
    [
        (r'("7": \{\s+"val_loss": )\d', r"\g<1>9", "figures of 7, JSON"),
        *(
            (rf'("{name}": )\d+(\.\d+)?,', r"\g<1>77,", "figures of 7, JSON")
            for name in ("steps", "step_avg_ms", "train_time_s", "calibration_time_s")
        ),
        (r'("eval_time_s": )\d+(\.\d+)?', r"\g<1>77", "figures of 7, JSON"),
        (r'("val_bpb": .*\n *"pre_quant_val_bpb": )\d([\d.]+,\n *"artifact_b)', r"\g<1>9\2", "figures of 7, JSON"),
        (r'("pre_quant_val_bpb": )\d', r"\g<1>9", "figures, JSON"),
        (r'("val_loss": )\d', r"\g<1>9", "figures, JSON"),
        (r'("val_loss_std": )\d', r"\g<1>9", "figures, JSON"),
        (r'("stride": )\d', r"\g<1>9", "figures, JSON"),
        (r'("date": ")\d', r"\g<1>1", "figures, JSON"),
        (r'("stamps": \[\s+")NON', r"\1", "figures, JSON"),
        (r'("hardware": ")1', r"\g<1>8", "figures, JSON"),
        (r'("pytorch_version": ")\d', r"\g<1>9", "figures, JSON"),
        (r'("cuda_version": ).*', r'\1"13.0",', "figures, JSON"),
        (r'("git_commit": ).*', r'\1"none",', "figures, JSON"),
        (r'("canonical_validation": )false', r"\1true", "figures, JSON"),
    ],
)
def test_the_check_compares_each_field(old: str, new: str, failing: str, handed_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "doctored"
    shutil.copytree(handed_in, folder, ignore=shutil.ignore_patterns("*.pga"))
    edited("submission.json", old, new)(folder)
    assert failing in {row.name for row in review.review(folder).rows if row.verdict == "FAIL"}


def test_the_check_compares_each_cell(handed_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "doctored"
    shutil.copytree(handed_in, folder, ignore=shutil.ignore_patterns("*.pga"))
    text = (folder / "README.md").read_text()

    def failing(changed: str) -> set[str]:
        (folder / "README.md").write_text(changed)
        return {row.name for row in review.review(folder).rows if row.verdict == "FAIL"}

    assert not failing(f"{text}\n## Words of the author's\n\n1.5 times as fast as 1 year ago.\n")
    cells = [
        match for line in ("7", "42", "mean", "std") for match in re.finditer(rf"^\| {line} \|(.*)\|$", text, re.M)
    ]
    places = [cells[0].start(1) + match.start() for match in re.finditer(r"(?<![\d.,])\d", cells[0][1])]
    places += [row.start(1) + next(re.finditer(r"\d", row[1])).start() for row in cells[1:]]
    for place in places:
        digit = "7" if text[place] != "7" else "3"
        assert "table of README" in failing(text[:place] + digit + text[place + 1 :])
    for old, new in ((r"^torch \d", "torch 9"), ("context 32", "context 64"), ("SEED=7", "SEED=8")):
        assert "lines of README" in failing(re.sub(old, new, text, flags=re.M))
    # The other way round: a log that says something else.
    (folder / "README.md").write_text(text)
    log = (folder / "train_seed7.log").read_text()
    for old, new in (
        (r"stopped step:4", "stopped step:5"),
        (r"(stopped .* train_time:)", r"\g<1>1"),
        (r"(quantized .* val_bpb:)\d", r"\g<1>9"),
        (r"(quantized .* eval_time:)", r"\g<1>9"),
        (r"(Total submission size .*: )", r"\g<1>1"),
        (r"(quantized_sliding_window .* context:)", r"\g<1>1"),
        (r"started ", "started at "),
    ):
        changed = re.sub(old, new, log)
        assert changed != log
        (folder / "train_seed7.log").write_text(changed)
        assert review.review(folder).failed


def test_fine_tuning_on_held_out_rows_is_no_leak(handed_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "held-out"
    shutil.copytree(handed_in, folder)
    for log in folder.glob("*.log"):
        edited(log.name, "pre_quant: none", "pre_quant: train")(folder)
        edited(log.name, "Code size", "ema_pre_quant val_loss:1.2 val_bpb:0.9\nCode size")(folder)
    found = {row.name: row.verdict for row in review.review(folder).rows}
    assert found["training before scoring"] == "ok"


def test_the_check_of_a_foreign_folder(tmp_path: Path) -> None:
    """Laid out as the field's: seeds as an object, other names of bytes, a log that starts with the program."""
    program = "import sys\n\nclass H:\n    matrix_lr: float = 0.5\n"
    (tmp_path / "train_gpt.py").write_text(program)
    size = len(program)
    seeds = {"1": (1.08209788, 15_991_018), "2": (1.08314800, 15_992_546)}
    for seed, (bpb, total) in seeds.items():
        (tmp_path / f"train_seed{seed}.log").write_text(
            f"{program}{'=' * 100}\nHyperparameters:\n  matrix_lr: 0.02\n  logfile: logs/{seed}.txt\n  seed: {seed}\n"
            f"val_loader:shards pattern=x tokens:40540160\n1/20000 train_loss: 9.0 train_time: 0.0m\n"
            f"stopping_early: wallclock_cap train_time: 588138ms step: 4988/20000\nCode size: {size} bytes\n"
            f"Serialized model quantized+brotli: {total - size} bytes\n"
            f"Total submission size quantized+brotli: {total} bytes\n"
            f"legal_ttt_exact val_loss:{2.5831 * bpb:.8f} val_bpb:{bpb:.8f}\n"
        )
    mean = statistics.fmean(bpb for bpb, _ in seeds.values())
    about = {
        "author": "x", "github_id": "x", "name": "x", "date": "2026-04-06",
        "val_bpb": round(mean, 5), "bytes_total": 15_992_546,
        "seeds": {seed: {"val_bpb": bpb, "bytes_total": total} for seed, (bpb, total) in seeds.items()},
    }  # fmt: skip
    (tmp_path / "submission.json").write_text(json.dumps(about))
    (tmp_path / "README.md").write_text(
        f"# Record: x, val_bpb {mean:.4f}\n\n| Seed | BPB | Bytes |\n|-|-|-|\n"
        + "".join(f"| {seed} | **{bpb:.5f}** | {total:,} |\n" for seed, (bpb, total) in seeds.items())
        + "\n```bash\nMATRIX_LR=0.02 SEED=1 torchrun --nproc_per_node=8 train_gpt.py\n```\n"
    )
    found = {row.name: row.verdict for row in review.review(tmp_path).rows}
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == {"number of seeds"}
    assert found["settings in README"] == found["one configuration, logs"] == found["validation"] == "ok"
    assert found["code bytes, JSON"] == found["scoring, s"] == "unknown"
    assert found["val_loss / val_bpb, logs"] == "ok"
    log = tmp_path / "train_seed1.log"
    text = log.read_text()

    def verdict(row: str, changed: str) -> str:
        log.write_text(changed)
        return {one.name: one.verdict for one in review.review(tmp_path).rows}[row]

    # The field's sp1024 ratio; another's where the log does not say of what text.
    loss = f"val_loss:{1.6885 * seeds['1'][0]:.8f}"
    other = re.sub(r"val_loss:\S+", loss, text)
    assert verdict("val_loss / val_bpb, logs", other) == "FAIL"
    other = re.sub(r"val_loss:\S+", "val_loss:2.50000000", text).replace("40540160", "40640160")
    (tmp_path / "train_seed2.log").rename(tmp_path / "away")
    assert verdict("val_loss / val_bpb, logs", other) == "unknown"
    (tmp_path / "away").rename(tmp_path / "train_seed2.log")
    # Parts of what a line tells of are no settings.
    assert verdict("settings in README", text.replace("1/20000", "matrix_lr:active=1 x=2\n1/20000")) == "ok"
    log.write_text(text)
    # A submission inside is its own.
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "submission.json").write_text("{}")
    log.rename(inner / log.name)
    rows = {row.name: row for row in review.review(tmp_path).rows}
    assert (rows["log of each seed"].verdict, rows["log of each seed"].found) == ("FAIL", "train_seed2.log")
    (inner / log.name).rename(log)
    shutil.rmtree(inner)
    # Whatever stands in the JSON: rows, no traceback.
    values: list[Any] = [None, "x", "(", [], [{}], {"1": None}, {"(": {}}, True, -1e9, 1e300, math.nan]
    for value in values:
        for name in (
            "seeds",
            "seed_results",
            "val_bpb",
            "bytes_total",
            "declared",
            "compliance",
            "stamps",
            "val_tokens",
        ):
            (tmp_path / "submission.json").write_text(json.dumps({**about, name: value}))
            assert review.review(tmp_path).table()
        changed = {
            seed: dict.fromkeys(("val_bpb", "bytes_total", "train_time_s", "artifact_sha256"), value) for seed in seeds
        }
        (tmp_path / "submission.json").write_text(json.dumps({**about, "seeds": changed}))
        assert review.review(tmp_path).table()


@pytest.mark.parametrize(
    "line",
    ["ttt_adapt", "ttt_adaptloss", "quant val_loss", "pre_quant", "Code size", "Serialized model x", "\n", " val_bpb:"],
)
def test_no_log_keeps_the_check_busy(line: str, handed_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "busy"
    shutil.copytree(handed_in, folder, ignore=shutil.ignore_patterns("*.pga"))
    log = folder / "train_seed7.log"
    log.write_text(log.read_text() + line * (200_000 // len(line)))
    (folder / "submission.json").write_text("[" * 900 + "]" * 900) if line == "\n" else None
    start = time.process_time()
    review.review(folder)
    assert time.process_time() - start < 5


def test_what_is_refused(runs: list[Path], leak: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = runs
    number = iter(range(100))

    def refusal(*paths: Path, declared: tuple[str, ...] = ("non-canonical",), **settings: Any) -> str:
        with pytest.raises(SubmissionError) as error:
            gathered(paths, declared=declared, **settings)
        return str(error.value)

    def changed(run: Path, file: str = "", change: Callable[[dict[str, Any]], object] = dict) -> Path:
        return doctored(run, tmp_path / str(next(number)), file, change)

    digest = json.loads((first / "summary.json").read_text())["artifact"]["sha256"]
    shared = changed(second, "summary.json", lambda r: r["artifact"].update(sha256=digest))
    shutil.copy(first / "model.pga", shared)
    assert re.search(rf"artifact {digest} is shared by .*run-7 and .*run-42", refusal(first, shared, third))
    swapped = changed(second)
    shutil.copy(first / "model.pga", swapped)
    said = f"{swapped}/summary.json: of artifact .*, the file has {digest}"
    assert re.search(said, refusal(first, swapped, third))
    (swapped / "model.pga").write_bytes(b"nothing")
    assert f"{swapped}/model.pga: 7 bytes, wanted an artifact" in refusal(first, swapped, third)
    better = changed(second, "summary.json", lambda r: r["scores"]["artifact"].update(bpb=1.0))
    said = f"{better}/summary.json: score 'artifact': record: bpb 1.0, the ledger has"
    assert said in refusal(first, better, third)
    assert said in refusal(first, better, third, scores=[first])  # before scores are looked at
    unsealed = changed(second)
    (unsealed / "summary.json").write_text((second / "summary.json").read_text().replace('"steps": 4', '"steps": 3'))
    assert f"{unsealed}/summary.json: the seal is not that of the record" in refusal(first, unsealed, third)
    without = changed(second)
    (without / "summary-ema.ledger.gz").unlink()
    assert f"{without}/summary.json: score 'ema': [Errno 2]" in refusal(first, without, third)
    other = changed(second, "config.json", lambda r: r.update(matrix_lr=0.5))
    assert "different configurations: matrix_lr 0.5, 0.02" in refusal(first, other, third)
    assert "seed 42 is shared by" in refusal(first, changed(first), third)
    machine = changed(second, "environment.json", lambda r: r.update(device="NVIDIA H100 80GB HBM3"))
    assert "ran on different machines: device NVIDIA H100" in refusal(first, machine, third)
    text = changed(second, "summary.json", lambda r: r["scores"]["artifact"].update(tokens=1999))
    assert "were scored differently" in refusal(first, text, third)
    unfinished = changed(second)
    (unfinished / "summary.json").unlink()
    assert "is not finished" in refusal(first, unfinished, third)
    with pytest.raises(RecordError, match="is not a run's folder"):
        gathered([tmp_path])
    edited_config = changed(second, "config.json", lambda r: r.update(seed=8))
    assert "model.pga is of another configuration" in refusal(first, edited_config, third)

    # Whatever code made it, and whatever its summary calls it.
    own = ("few-seeds", "non-canonical", "other-code")
    for change in ({"matrix_lr": 0.5, "seed": 8}, {"seed": 8}):
        alone = changed(second)
        (alone / "config.json").write_text(json.dumps(json.loads((second / "config.json").read_text()) | change))
        for file, entry in (("environment.json", "code_sha256"), ("summary.json", "fingerprint")):
            record = json.loads((alone / file).read_text()) | {entry: "0" * 64}
            (alone / file).write_text(json.dumps(seal(record) if "seal" in record else record))
        assert "model.pga is of another configuration than config.json: " in refusal(alone, declared=own)

    assert "--declare few-seeds" in refusal(first, second)
    assert "scored 2,000 tokens" in refusal(*runs, declared=())
    stamped = changed(second, "environment.json", lambda r: r.update(leaking=True))
    assert "stamped as leaking" in refusal(first, stamped, third)
    hidden = changed(leak, "summary.json", lambda r: r.update(leaking=False))
    assert f"{hidden}/summary.json: leaking False, the artifact says True" in refusal(hidden)
    rebuilt = changed(second, "environment.json", lambda r: r.update(code_sha256="0" * 64))
    assert "ran with other code than stands here" in refusal(first, rebuilt, third)
    slow = changed(second, "summary.json", lambda r: r.update(calibration_seconds=600.0))
    assert "--declare over-time" in refusal(first, slow, third)
    assert "--declare leaking: the records say nothing of the kind" in refusal(
        *runs, declared=("non-canonical", "leaking")
    )
    assert "wanted one of few-seeds" in refusal(*runs, declared=("nothing",))
    for figure in ("1.0527", "1,05", "0.99"):
        assert f"{figure} in name or blurb" in refusal(*runs, name=f"{figure} at last")
    for where in ("name", "blurb", "author", "github_id"):
        words: dict[str, Any] = {where: "x\n# y"}
        assert "'x\\n# y': wanted one line of text" in refusal(*runs, **words)
    every = refusal(leak, declared=())
    assert all(f"(--declare {kind}" in every for kind in ("few-seeds", "leaking", "non-canonical"))
    monkeypatch.setattr(submission, "ARTIFACT_LIMIT", 100_000)
    assert re.search(r"bytes of model and [\d,]+ of code are [\d,]+, wanted at most 100,000", refusal(*runs))


def test_summary_and_metrics_agree(runs: list[Path], tmp_path: Path) -> None:
    number = iter(range(100))

    def refusal(change: dict[str, Any], metrics: Callable[[str], str] = str) -> str:
        run = doctored(runs[0], tmp_path / str(next(number)), "summary.json", lambda r: r.update(change))
        (run / "metrics.jsonl").write_text(metrics((run / "metrics.jsonl").read_text()))
        with pytest.raises(SubmissionError) as error:
            gathered([run], declared=("few-seeds", "non-canonical"))
        return str(error.value)

    metrics = "summary.json and metrics.jsonl"
    assert f"{metrics}: 99999 steps, but the last line is of step 4" in refusal({"steps": 99999})
    assert f"{metrics}: 3 steps, but the last line is of step 4" in refusal({"steps": 3})
    slow = json.dumps({"elapsed": 601.0})[1:-1]
    said = refusal({"seconds": 1.0}, lambda text: re.sub(r'"elapsed": [\d.]+', slow, text))
    assert f"{metrics}: 1.0 seconds, but the last line was written after 601.0" in said
    assert f"{metrics}: 590.0 seconds, but the last line" in refusal({"seconds": 590.0})
    assert "4 steps of 0.01 ms are not" in refusal({"ms_per_step": 0.01})
    assert f"{metrics}: 4 steps, but no line of any" in refusal({}, lambda text: "")


def test_damaged_records_are_named(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the file, what was found and what was wanted."""
    run = doctored(runs[0], tmp_path)

    def without(file: str, *names: str) -> list[tuple[str, bytes, str]]:
        record = json.loads((run / file).read_text())
        texts = [json.dumps({key: value for key, value in record.items() if key != name}) for name in names]
        return [(file, text.encode(), f"no {name}") for text, name in zip(texts, names, strict=True)]

    def changed(file: str, name: str, value: Any) -> tuple[str, bytes, str]:
        record = json.loads((run / file).read_text()) | {name: value}
        return file, json.dumps(record).encode(), f"{name} {json.dumps(value)}, wanted "

    cases = [
        *without("environment.json", "packages", "device", "world_size", "cuda", "started", "python"),
        *without("summary.json", "steps", "seconds", "ms_per_step", "calibration_seconds", "depth", "fingerprint"),
        *without("summary.json", "artifact", "pre_quant_seconds", "run", "scores"),
        changed("environment.json", "device", None),
        changed("environment.json", "packages", {"numpy": "2"}),
        changed("summary.json", "steps", "many"),
        changed("summary.json", "steps", True),
        changed("summary.json", "scores", {"ema": {}}),
        ("summary.json", b'{"scores": 1}', "no artifact"),
        ("metrics.jsonl", b'{"step": 1}\n', "line 1: no elapsed"),
        ("metrics.jsonl", b'{"step": 1, "val_loss": "x", "val_bpb": 1.0}\n', 'val_loss "x", wanted a number'),
        ("metrics.jsonl", b"{", "line 1: Expecting"),
        ("resumed.jsonl", b"{}", "line 1: no started"),
    ]
    for file in ("config.json", "environment.json", "summary.json", "metrics.jsonl", "resumed.jsonl"):
        cases += [(file, b"[1]", ""), (file, b"\xff\xfe", ""), (file, b"[" * 100_000, "")]
    for file, text, said in cases:
        before = (run / file).read_bytes() if (run / file).exists() else None
        (run / file).write_bytes(text)
        assert hand_in(run, "--out", tmp_path / "out", *OPTIONS) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1
        assert str(run) in printed
        assert file in printed or file == "config.json"
        (run / file).unlink() if before is None else (run / file).write_bytes(before)
    for file in ("environment.json", "metrics.jsonl", "model.pga"):
        (run / file).rename(tmp_path / "away")
        assert hand_in(run, "--out", tmp_path / "out", *OPTIONS) == 2
        assert str(run / file) in capsys.readouterr().err
        (tmp_path / "away").rename(run / file)


def test_what_is_declared_is_stamped(leak: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    wrong = (*OPTIONS, "--declare", "few-seeds")
    assert hand_in(leak, "--out", out, *wrong) == 2
    assert "stamped as leaking" in capsys.readouterr().err
    assert not out.exists()
    assert hand_in(leak, "--out", out, *wrong, "--declare", "leaking") == 0
    assert hand_in(leak, "--out", out, *wrong, "--declare", "leaking") == 2
    assert "wanted a new folder" in capsys.readouterr().err
    for name in ("README.md", "train_seed5.log"):
        text = (out / name).read_text()
        assert all(stamp in text for stamp in ("LEAKING", "NON-CANONICAL", "FEWER THAN THREE SEEDS"))
    found = {row.name: row.verdict for row in review.review(out).rows}
    assert "FAIL" not in found.values()
    declared = ("leak stamps", "training before scoring", "number of seeds", "validation")
    assert [found[name] for name in declared] == ["declared"] * 4
    assert not list(tmp_path.glob(".out-*"))


CHUNK = "chunk,lr=0.005,momentum=0.9,epochs=1,clip=1.0,rows=4,tokens=512"
PHASED = "phased,documents=2,lr=0.5"  # too fast to gain anything


@pytest.fixture(scope="module")
def adapted(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Records of scores with test-time training, of two forms, one for each run."""
    return [scored(run, tmp_path_factory.mktemp(run.name), run.parent.parent / "data", CHUNK, PHASED) for run in runs]


def scored(run: Path, folder: Path, data: Path, *forms: str) -> Path:
    """A record by quantize.py score."""
    ttt = [word for form in forms for word in ("--ttt", form)]
    places = ["--data-path", str(data), "--json", str(folder / "score.json"), "--plain"]
    assert quantize.main(["score", str(run / "model.pga"), *places, *ttt]) == 0
    return folder / "score.json"


def test_test_time_training_is_handed_in(
    runs: list[Path], adapted: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given: list[str | Path] = [*runs, "--scores", *reversed(adapted), "--out", out, "--artifacts", *OPTIONS]
    for more, message in (
        ([], "scores with chunk, phased: wanted --form"),
        (["--form", "document"], "have chunk, phased"),
    ):
        assert hand_in(*given, *more) == 2
        assert message in capsys.readouterr().err
    assert hand_in(*given, "--form", "chunk") == 0
    about = json.loads((out / "submission.json").read_text())
    readme = (out / "README.md").read_text()
    assert about["score"] == {"name": "quantized_ttt_chunk", "context": 32, "stride": 16, "ttt": CHUNK}
    assert about["compliance"]["score_first_ttt"]
    assert about["name"].endswith("score-first TTT (chunk)")
    assert f"score-first TTT (chunk), val_bpb {about['val_bpb']:.5f}\n" in readme
    assert f"\n        --context 32 --stride 16 --ttt {CHUNK}\n" in readme
    means = {}
    for name in ("chunk", "phased"):
        scores = {}
        for run, record in zip(runs, adapted, strict=True):
            told = json.loads(record.read_text())["scores"]
            scores[json.loads((run / "config.json").read_text())["seed"]] = next(
                score for score in told.values() if score["form"] == name
            )
        means[name] = statistics.fmean(score["bpb"] for score in scores.values())
        for seed, score in scores.items():
            log = (out / f"train_seed{seed}.log").read_text()
            assert re.search(rf"^quantized_ttt_{name} .* val_bpb:{score['bpb']:.8f} .* ttt:{name},lr=", log, re.M)
            assert f"{score['bpb']:.5f}" in readme
            if name == "chunk":
                assert f"**{score['bpb']:.5f}**" in readme
    assert about["val_bpb"] == pytest.approx(means["chunk"], abs=1e-8)
    for run, record in zip(runs, adapted, strict=True):
        summary, told = (json.loads(path.read_text()) for path in (run / "summary.json", record))
        own = sum(score["seconds"] for name, score in summary["scores"].items() if name.startswith("artifact"))
        ttt = sum(score["seconds"] for score in told["scores"].values() if score["form"] != "plain")
        seed = summary["seed"]
        assert about["seed_results"][str(seed)]["eval_time_s"] == pytest.approx(own + ttt, abs=2e-3)
        kept = out / f"scores_seed{seed}" / "score.json"
        assert kept.read_bytes() == record.read_bytes()
        assert audit_record(kept, artifact=about["seed_results"][str(seed)]["artifact_sha256"], leaking=False)
    capsys.readouterr()
    assert quantize.main(["check", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^0 FAIL, 2 declared, 0 unknown, \d\d ok$", printed, re.M)
    assert len(re.findall(r"^ok +audit of \d+ +3 scores, each token scored before it trained", printed, re.M)) == 3
    assert len(re.findall(r"^ok +audited score of ", printed, re.M)) == 3

    # Records and ledgers that are not what the folder says: seven's of another artifact, forty-two's with another
    # figure, and none of the third. Where the artifact is not there, its name is.
    doctored = tmp_path / "doctored"
    shutil.copytree(out, doctored)
    (doctored / "model_seed7.pga").unlink()
    shutil.copytree(doctored / "scores_seed42", doctored / "scores_seed7", dirs_exist_ok=True)
    path = doctored / "scores_seed42/score.json"
    told = json.loads(path.read_text())
    next(score for score in told["scores"].values() if score["form"] == "chunk").update(bpb=1.0)
    path.write_text(json.dumps(seal(told)))
    shutil.rmtree(doctored / "scores_seed1000")
    rows = {row.name: row for row in review.review(doctored).rows}
    assert re.search("score.json: of artifact .*, the file has", rows["audit of 7"].found)
    assert "record: bpb 1.0, the ledger has" in rows["audit of 42"].found
    verdicts = [rows[f"audit of {seed}"].verdict for seed in (7, 42, 1000)]
    assert verdicts == ["FAIL", "FAIL", "unknown"]
    # An honest record of a score that is not the one handed in.
    edited("submission.json", r'"ttt": "chunk,lr=0.005', '"ttt": "chunk,lr=0.004')(doctored)
    shutil.copytree(out / "scores_seed42", doctored / "scores_seed42", dirs_exist_ok=True)
    rows = {row.name: row for row in review.review(doctored).rows}
    assert (rows["audit of 42"].verdict, rows["audited score of 42"].verdict) == ("ok", "FAIL")

    # Figures of another way of scoring, or other settings, than the log has.
    edited("train_seed42.log", r"(quantized_ttt_chunk .* val_bpb:\d\.\d\d)\d", r"\g<1>x")(out)
    edited("train_seed7.log", "ttt:chunk,lr=0.005", "ttt:chunk,lr=0.004")(out)
    failing = {row.name for row in review.review(out).rows if row.verdict == "FAIL"}
    assert {"val_bpb of 42, JSON", "test-time training of 7"} <= failing


def test_test_time_training_that_is_refused(runs: list[Path], adapted: list[Path], tmp_path: Path) -> None:
    number = iter(range(100))

    def refusal(*records: Path, of: Sequence[Path] = runs) -> str:
        with pytest.raises(SubmissionError) as error:
            gathered(of, declared=("non-canonical",), scores=records)
        return str(error.value)

    def changed(change: Callable[[dict[str, Any]], object], sealed: bool = True) -> Path:
        """The second record, doctored, with its ledgers."""
        copy = tmp_path / str(next(number))
        shutil.copytree(adapted[1].parent, copy)
        record = json.loads((copy / "score.json").read_text())
        change(record)
        (copy / "score.json").write_text(json.dumps(seal(record) if sealed else record))
        return copy / "score.json"

    def name_of(record: dict[str, Any], form: str) -> str:
        return next(name for name, score in record["scores"].items() if score["form"] == form)

    def chunk(record: dict[str, Any]) -> Any:
        return record["scores"][name_of(record, "chunk")]

    first, second, third = adapted
    assert f"none of {runs[1]}, artifact" in refusal(first, third)
    twice = changed(dict)
    assert f"{second} and {twice} of {runs[1]}" in refusal(first, second, third, twice)
    assert f"{third} is of artifact" in refusal(first, second, third, of=runs[:2])
    assert "summary.json: not what quantize.py score --json writes" in refusal(first, runs[1] / "summary.json", third)
    for change, sealed, wanted in (
        (lambda r: chunk(r).update(bpb=1.0), False, "the seal is not that of the record"),
        (lambda r: chunk(r).update(bpb=1.0), True, "record: bpb 1.0, the ledger has"),
        (lambda r: r.update(leaking=True), True, "leaking True, the artifact says False"),
        (lambda r: r.update(artifact_sha256=json.loads(first.read_text())["artifact_sha256"]), True, "wanted one for"),
        (lambda r: chunk(r)["settings"].update(lr=0.01), True, "settings {'lr': 0.005"),
        (lambda r: chunk(r)["settings"].update(lr=0.01), True, "the record says {'lr': 0.01, "),
        (lambda r: chunk(r).update(seconds=-1.0), True, "record: seconds -1.0, wanted a number of 0 or more"),
        (lambda r: r["scores"].update({"chunk-again": chunk(r)}), True, "several scores with chunk"),
        (
            lambda r: r["scores"].update({"ema-chunk": r["scores"].pop(name_of(r, "chunk"))}),
            True,
            'header: form "chunk" by the name of ema-chunk',
        ),
        (lambda r: r.update(scores={"plain": r["scores"]["plain"]}), True, "no score with test-time training"),
        (lambda r: r.update(document_mask=not r["document_mask"]), True, "wanted its scores without --documents"),
        (lambda r: r["environment"].update(world_size=8), True, "on another machine than"),
        (lambda r: r.pop("environment"), True, "does not say on what machine"),
        (lambda r: r["environment"].update(code_sha256="0" * 64), True, "ran with other code than stands here"),
        (lambda r: r["scores"].pop(name_of(r, "phased")), True, "were made differently"),
    ):  # fmt: skip
        record = changed(change, sealed)
        said = refusal(first, record, third)
        assert wanted in said
        assert str(record) in said
    # Settings that record and ledger agree on, but which --ttt does not take.
    record = changed(lambda r: chunk(r)["settings"].pop("lr"))
    file = record.parent / chunk(json.loads(record.read_text()))["ledger"]["file"]
    header, lines = read(file.read_bytes())
    header["settings"].pop("lr")
    relink(record, file, header, lines)
    assert re.search(rf"{record}: chunk.*: wanted all of chunk, as --ttt takes", refusal(first, record, third))
    # Honest records: of other settings, and of another text.
    forms = (CHUNK.replace("0.005", "0.01"), PHASED)
    other = scored(runs[1], tmp_path, runs[1].parent.parent / "data", *forms)
    assert re.search(
        rf"{other} and .* were made differently: chunk,lr=0.01.* and chunk,lr=0.005", refusal(first, other, third)
    )
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.array(open_shard(runs[1].parent.parent / "data/fineweb_val_000000.bin"))
    write_shard(data / "fineweb_val_000000.bin", tokens[:1001])
    short = scored(runs[1], data, data, CHUNK, PHASED)
    assert re.search(f"{short}: is of another text than {runs[1]} was", refusal(first, short, third))


def test_test_time_training_of_a_model_that_leaks(leak: Path, tmp_path: Path) -> None:
    record = scored(leak, tmp_path, leak.parent.parent / "data", CHUNK)
    owned = ("non-canonical", "few-seeds")
    with pytest.raises(SubmissionError, match="stamped as leaking"):
        gathered([leak], declared=owned, scores=[record])
    facts = gathered([leak], declared=(*owned, "leaking"), scores=[record])
    assert not facts.compliance["score_first_ttt"]
    told = json.loads(record.read_text())
    record.write_text(json.dumps(seal({**told, "leaking": False})))
    with pytest.raises(SubmissionError, match="leaking False, the artifact says True"):
        gathered([leak], declared=(*owned, "leaking"), scores=[record])


def test_a_record_needs_the_field_s_machine_and_text(runs: list[Path], tmp_path: Path) -> None:
    canonical_runs = []
    for run in runs:
        copy = doctored(
            run, tmp_path, "environment.json", lambda r: r.update(device="NVIDIA H100 80GB HBM3", world_size=8)
        )
        path, tokens, size = copy / "summary.json", 62_022_000, VAL_BYTES - 12
        for name in ("ema", "artifact", "artifact_sliding"):  # the last line goes on to the end of a longer text
            summary = json.loads(path.read_text())
            score = summary["scores"][name]
            score.update(tokens=tokens, bytes=size, nats_per_token=score["nats"] / tokens)
            score.update(bpb=score["nats"] / math.log(2) / size)
            path.write_text(json.dumps(summary))
            file = copy / score["ledger"]["file"]
            header, lines = read(file.read_bytes())
            lines[-1][2], lines[-1][5] = tokens, lines[-1][5] + size - header["bytes"]
            relink(path, file, {**header, "tokens": tokens, "bytes": size}, lines)
        canonical_runs.append(copy)
    config = read_config(canonical_runs[0])
    wide = replace(SeedRun.read(canonical_runs[0]), config=config.model_copy(update={"vocab_size": 8192}))
    assert "1.6885 nats a token for a bit a byte, wanted 2.5831 or 2.1884 of 8192" in submission._contradiction(wide)
    facts = gathered(canonical_runs)
    about = submission_json(facts)
    assert facts.record
    assert (about["track"], about["declared"], about["hardware"]) == ("10min_16mb", [], "8x H100 80GB HBM3")
    log = seed_log(facts, facts.seeds[0], SeedRun.read(canonical_runs[1]))
    assert log.count("tokens:62022000 bytes:151080879") == 3


def test_counts_and_stamps() -> None:
    assert canonical(40_540_160, 151_078_222)
    assert canonical(62_021_632, None)
    assert not canonical(40_546_304, 151_074_634)
    assert not canonical(9_662_464, None)
    assert not canonical(40_540_160, 176_000_000)
    assert leaking({"scores": [{"form": "x", "Leaking": True}]})
    assert leaking({"stamp": "LEAKING: trained on validation"})
    assert not leaking({"leaking": False, "leaks": [], "note": "leaky_relu"})


def test_the_file_alone_does_not_hand_in(tmp_path: Path) -> None:
    assert not {"gpt/submission.py", "gpt/folder.py", "gpt/review.py"} & set(
        bundle.source_files(script(tmp_path).read_bytes()) or ()
    )
    said = run_script(tmp_path / "train_gpt.py", "quantize", "--help").stdout
    assert "makes another one from a finished run." in " ".join(said.split())
    assert "submission" not in said
    assert "hand" not in said


def test_the_main_readme_s_commands_are_understood() -> None:
    section = (ROOT / "README.md").read_text().partition("## Handing in")[2].partition("\n## ")[0]
    commands = re.findall(r"^    python quantize.py ((?:[^\\\n]|\\\n)*)", section, re.M)
    parsed = [quantize.parse(shlex.split(command.replace("\\\n", ""))) for command in commands]
    assert [one.run for one in parsed] == [
        quantize.write_submission,
        quantize.check_submission,
        quantize.write_submission,
    ]
    assert parsed[0].out == parsed[1].folder
    assert len(parsed[2].scores) == len(parsed[2].runs) == 3
    assert all(kind in section for kind in submission.DECLARATIONS)
