"""The training program as a user runs it: on one process and more, killed and resumed, and set up wrongly."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt.trainer
from gpt.artifact import load
from gpt.capture import MicroStep, micro_step
from gpt.config import BOS, ROOT, build_config
from gpt.data import open_shard, write_shard
from gpt.distributed import Ranks
from gpt.ledger import seal
from gpt.model import GPT
from gpt.record import RecordError, Run
from gpt.tokenizer import Tokenizer, train_tokenizer
from gpt.trainer import Trainer, TrainingError
from kernels import select
from tests.tiny import ALONE, CPU, tiny_config

SAMPLE = ROOT / "data/sample"
# A model small enough for a test, by the seed's own environment names.
SMALL = {
    "NUM_LAYERS": "4",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "RECUR_LAYERS": "1,2",
    "RECUR_START_STEP": "3",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "768",
    "MICRO_BATCH_TOKENS": "384",
    "VAL_BATCH_SIZE": "2048",
    "EVAL_STRIDE": "32",
    "ITERATIONS": "8",
    "WARMUP_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "GPTQ_CALIBRATION_BATCHES": "3",
    "TRAIN_LOG_EVERY": "1",
    "VAL_LOSS_EVERY": "4",
    "CHECKPOINT_EVERY": "2",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's training shard with a validation of a few thousand tokens."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(SAMPLE / "fineweb_train_000000.bin", folder)
    write_shard(folder / "fineweb_val_000000.bin", np.array(open_shard(SAMPLE / "fineweb_val_000000.bin")[:3000]))
    return folder


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def command(processes: int, arguments: tuple[str, ...]) -> list[str]:
    return [*(torchrun(processes) if processes > 1 else [sys.executable]), str(ROOT / "train.py"), *arguments]


def environ(settings: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **settings}


def run_program(arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environ(settings), capture_output=True, text=True, timeout=300, check=False)


def train(settings: dict[str, str], *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run_program(command(processes, arguments), settings)


def quantize(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, str(ROOT / "quantize.py"), *map(str, arguments)], {})


def small(data: Path, runs: Path, name: str, **settings: str) -> dict[str, str]:
    return {**SMALL, "PRESET": "sample", "DATA_PATH": str(data), "RUNS_PATH": str(runs), "RUN_ID": name, **settings}


def metrics(run: Path, *keys: str) -> list[tuple[Any, ...]]:
    """The given keys of every line of a run's metrics; -1 where a line has not got one."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key, -1) for key in keys) for line in lines]


CURVE = ("step", "train_loss", "gradient_norm", "lr_factor", "layers", "val_loss", "val_bpb")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run's folder and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    done = train(small(data, runs, "whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "whole", done.stdout


def test_triton_kernels_train_the_same_model(tmp_path: Path) -> None:
    """The whole program on the kernels that a GPU gets, interpreted: warm-up, a step, calibration, scoring.

    With few pieces in the vocabulary, each of which takes the embedding's backward a while there.
    """
    ids = open_shard(SAMPLE / "fineweb_val_000000.bin")[:3000].tolist()
    text = re.sub("[^a-z]+", " ", Tokenizer(SAMPLE / "tokenizer.model").decode(ids).lower())
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer([text], 304))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    tokens = np.array([BOS, *tokenizer.encode_many([text])[0]], dtype=np.uint16)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[:50])
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    tiny = {
        "TOKENIZER_PATH": str(tokenizer.path), "VOCAB_SIZE": str(tokenizer.vocab_size),
        "NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "RECUR_LAYERS": "",
        "ROPE_DIMS": "8", "TRAIN_SEQ_LEN": "16", "TRAIN_BATCH_TOKENS": "32", "MICRO_BATCH_TOKENS": "32",
        "VAL_BATCH_SIZE": "64", "EVAL_STRIDE": "8", "ITERATIONS": "1", "VAL_LOSS_EVERY": "1", "DEVICE": "cpu",
        "GPTQ_CALIBRATION_BATCHES": "1", "TRITON_INTERPRET": "1",
    }  # fmt: skip
    curves = []
    for name, kernels in (("plain", "reference"), ("triton", "triton")):
        done = train(small(tmp_path, tmp_path, name, KERNELS=kernels, **tiny))
        assert done.returncode == 0, done.stdout + done.stderr
        scores = json.loads((tmp_path / name / "summary.json").read_text())["scores"]
        curve = metrics(tmp_path / name, "train_loss", "gradient_norm", "val_loss")
        curves.append([*(value for line in curve for value in line), *(scores[key]["bpb"] for key in sorted(scores))])
    assert curves[1] == pytest.approx(curves[0], rel=2e-4)


def test_one_command_trains_quantises_and_scores(whole: tuple[Path, str]) -> None:
    run, printed = whole
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "curves.png",
        "model.pga",
        "parts.json",
        "summary.json",
        "summary-ema.ledger.gz",
        "summary-artifact.ledger.gz",
        "summary-artifact_sliding.ledger.gz",
        "report.html",
        "lock",
    }
    parts = json.loads((run / "parts.json").read_text())
    assert [(layers, list(part)) for layers, part in parts.items()] == [
        (layers, ["forward and backward", "optimizer"]) for layers in ("4", "6")
    ]
    assert all(ms > 0.0 for part in parts.values() for ms in part.values())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["depth"] == [0, 1, 2, 1, 2, 3]
    scores = summary["scores"]
    assert {score["tokens"] for score in scores.values()} == {2999}
    assert len({score["bytes"] for score in scores.values()}) == 1
    assert abs(scores["artifact"]["bpb"] - scores["ema"]["bpb"]) < 0.05
    assert (run / "model.pga").stat().st_size == summary["artifact"]["nbytes"]
    for text in (
        "BPB of EMA weights",
        "BPB of artifact, plain",
        "BPB of artifact, sliding 32",
        "16,000,000 bytes",
        "ms a step",
        "tokens/s",
        "attention             reference",
        "recur_layers                (1, 2)",
    ):
        assert text in printed
    assert json.loads((run / "config.json").read_text())["model_dim"] == 64
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["world_size"] == 1
    assert [entry for entry in metrics(run, "step", "layers") if entry[1] > 0] == [
        (n, 4 if n <= 3 else 6) for n in range(1, 9)
    ]
    losses = [loss for (loss,) in metrics(run, "train_loss") if loss > 0]
    assert losses[-1] < losses[0] - 0.3
    assert load(run / "model.pga").depth == (0, 1, 2, 1, 2, 3)


def test_the_artifact_alone_scores_what_the_run_scored(whole: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    run, _ = whole
    done = quantize("score", run / "model.pga", "--data-path", data, "--json", tmp_path / "score.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((run / "summary.json").read_text())["scores"]
    for text in (f"{scores['artifact']['bpb']:.5f}", f"{scores['artifact_sliding']['bpb']:.5f}"):
        assert text in done.stdout


def test_a_run_is_audited_and_shown(whole: tuple[Path, str], data: Path) -> None:
    run, _ = whole
    done = quantize("audit", run)  # against the shards that its configuration names
    assert done.returncode == 0, done.stderr
    assert "artifact_sliding: fair. 1 versions of the weights, 0 tokens trained some" in done.stdout
    assert "ema: consistent; of weights before quantising" in done.stdout
    assert f"shards    {data}: the ones that were scored" in done.stdout
    page = (run / "report.html").read_text()
    scores = json.loads((run / "summary.json").read_text())["scores"]
    shown = [f"{score['bpb']:.5f}" for score in scores.values()]
    for text in (*shown, "<polyline", "histogram of", "consistent", "preset sample", "model_dim"):
        assert text in page
    assert "LEAKING" not in page
    assert not re.search(r"(src|href)=|https?://|<script", page)


def test_fine_tuning_is_within_the_time(data: Path, tmp_path: Path) -> None:
    """Longer than what is reserved for calibration, so that training has to end earlier by it."""
    clock = {"MAX_WALLCLOCK_SECONDS": "9", "GPTQ_RESERVE_SECONDS": "2", "ITERATIONS": "100000", "VAL_LOSS_EVERY": "0"}
    fine_tuning = {"PRE_QUANT": "train", "PRE_QUANT_ROWS": "32", "PRE_QUANT_EPOCHS": "12", "CHECKPOINT_EVERY": "0"}
    done = train(small(data, tmp_path, "tuned", **clock, **fine_tuning, TRAIN_LOG_EVERY="50"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "tuned/summary.json").read_text())
    trained, tuned, calibrated = (summary[f"{name}seconds"] for name in ("", "pre_quant_", "calibration_"))
    assert summary["steps"] > 1
    assert trained < 9 - 2 - tuned / 2  # what is measured beforehand may be off
    assert trained + tuned + calibrated < 9
    assert "within the cap of 9 s" in done.stdout
    done = train(small(data, tmp_path, "long", **clock, **fine_tuning | {"PRE_QUANT_EPOCHS": "100000"}))
    assert done.returncode == 2
    assert re.search(r"TrainingError: fine-tuning, pre_quant=train, would take \d+\.\d s of the 7 s", done.stderr)


def test_a_leaking_run_says_so_everywhere(data: Path, tmp_path: Path) -> None:
    leak = {"PRE_QUANT": "validation", "ALLOW_LEAK": "1", "PRE_QUANT_EPOCHS": "1"}
    done = train(small(data, tmp_path, "leak", **leak))
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "leak"
    assert done.stdout.count("LEAKING") == 2
    assert "LEAKING" in (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["leaking"]
    assert all(score["leaking"] for score in summary["scores"].values())
    assert summary["scores"]["ema_pre_quant"]["bpb"] < summary["scores"]["ema"]["bpb"]
    assert load(run / "model.pga").config.leaking
    done = quantize("audit", run)
    assert done.returncode == 2
    assert "worth nothing" in done.stderr
    done = quantize("score", run / "model.pga", "--data-path", data, "--plain", "--json", tmp_path / "score.json")
    assert "LEAKING" in done.stdout
    assert json.loads((tmp_path / "score.json").read_text())["leaking"]
    # Edited and sealed again, it is still the artifact's word against the record's.
    summary["leaking"] = False
    for score in summary["scores"].values():
        score["leaking"] = False
    (run / "summary.json").write_text(json.dumps(seal(summary)))
    done = quantize("audit", run)
    assert done.returncode == 2
    assert "the artifact says True" in done.stderr


def test_fine_tuning_on_held_out_rows_is_fair(data: Path, tmp_path: Path) -> None:
    done = train(small(data, tmp_path, "held", PRE_QUANT="train", PRE_QUANT_ROWS="24", PRE_QUANT_EPOCHS="2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BPB fine-tuned" in done.stdout
    assert "LEAKING" not in done.stdout
    assert quantize("audit", tmp_path / "held").returncode == 0


def test_three_processes_train_the_same_model(whole: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    """Over gloo, in float32: 12 rows a step in all, one loss curve, one job to the end.

    Sums in another order differ by 3e-7 of the first gradient, by 1e-4 three steps later: Newton-Schulz makes up to 7
    times as much of it, the model the rest. So does one process with three micro-steps: 8e-7 of the loss. That several
    processes do the same thing, and not only nearly, is for the next test.
    """
    settings = small(data, tmp_path, "ranks", MICRO_BATCH_TOKENS="256")
    done = train(settings, processes=3)
    assert done.returncode == 0, done.stdout + done.stderr
    for alone, together in zip(metrics(whole[0], *CURVE), metrics(tmp_path / "ranks", *CURVE), strict=True):
        assert together == pytest.approx(alone, rel=2e-5)
    losses = [metrics(run, "train_loss", "val_loss") for run in (whole[0], tmp_path / "ranks")]
    for alone, together in zip(*losses, strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    one, many = (json.loads((run / "summary.json").read_text()) for run in (whole[0], tmp_path / "ranks"))
    assert many["scores"]["artifact_sliding"]["tokens"] == 2999
    assert many["scores"]["artifact"]["bpb"] == pytest.approx(one["scores"]["artifact"]["bpb"], abs=2e-3)


def test_any_number_of_processes_is_one_to_the_last_bits_of_float64(data: Path, tmp_path: Path) -> None:
    """13 rows a step, so that ranks have 3 or 4, or 4 or 5, and banks of 8 and 4 matrices: losses, norms, all state.

    What differs by more than 1e-12 is another computation: a wrong weight or share, or something rounded on its way.
    """
    states = []
    for processes, rows in ((1, 13), (2, 4), (3, 5)):
        name = f"exact-{processes}"
        settings = small(
            data, tmp_path, name, TRAIN_BATCH_TOKENS="832", MICRO_BATCH_TOKENS=str(64 * rows), WARMUP_STEPS="0",
            ITERATIONS="5", VAL_LOSS_EVERY="0", CHECKPOINT_EVERY="0", PYTHONPATH=str(ROOT),
        )  # fmt: skip
        done = run_program([*torchrun(processes), "-m", "tests.exact"], settings)
        assert done.returncode == 0, done.stdout + done.stderr
        state = torch.load(tmp_path / name / "checkpoint.pt")
        of_optimizer = state["optimizer"]
        adamw = of_optimizer["adamw"]
        curve = torch.tensor(metrics(tmp_path / name, "train_loss", "gradient_norm"), dtype=torch.float64)
        weights = (*state["model"].values(), *of_optimizer["ema"].values())
        states.append((curve, *weights, *of_optimizer["momentum"], adamw["average"], adamw["square"]))
    alone, *others = states
    assert len(alone) == 1 + 2 * 12 + 4 + 2
    assert alone[0].shape == (5, 2)
    for together in others:
        for a, b in zip(alone, together, strict=True):
            assert a.dtype == b.dtype == torch.float64
            assert (a - b).norm() <= 1e-12 * a.norm()


def test_the_seeds_own_command_runs(data: Path, tmp_path: Path) -> None:
    """The seed's names and stream with two processes through gloo; only size and text are the test's."""
    seed = {
        "QK_GAIN_INIT": "5.25",
        "RECUR_LAYERS": "3,4,5",
        "RECUR_START_STEP": "2",
        "MUON_WD": "0.095",
        "EMA_DECAY": "0.9965",
        "WARMDOWN_FRAC": "0.72",
        "TTT_ENABLED": "0",
        "SEED": "1337",
    }
    size = {**SMALL, "VOCAB_SIZE": "1024", "NUM_LAYERS": "11", "ITERATIONS": "3", "MAX_WALLCLOCK_SECONDS": "300"}
    place = {
        "DATA_PATH": str(data),
        "TOKENIZER_PATH": str(SAMPLE / "tokenizer.model"),
        "RUNS_PATH": str(tmp_path),
        "RUN_ID": "seed",
    }
    done = train({**size, **place, **seed}, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "seed/config.json").read_text())
    assert (config["preset"], config["train_order"], config["document_mask"]) == ("seed", "sequential", False)
    assert [layers for (layers,) in metrics(tmp_path / "seed", "layers") if layers > 0] == [11, 11, 14]


def test_killed_at_any_moment_it_resumes_to_the_same_curve(whole: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    """SIGKILL once early, once late, then to the end: every logged number is that of the uninterrupted run."""
    settings = small(data, tmp_path, "killed")
    run = tmp_path / "killed"
    for number, arguments in ((3, ()), (6, ("--resume", str(run)))):
        process = subprocess.Popen(
            command(1, arguments),
            env=environ(settings if not arguments else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 200
        log = run / "metrics.jsonl"
        while not (log.exists() and f'"step": {number}, "train_loss"' in log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train_lo')  # what a kill may leave
    done = train({}, "--resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(run, *CURVE) == metrics(whole[0], *CURVE)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (whole[0], run))
    assert one["artifact"]["sha256"] == other["artifact"]["sha256"]
    assert len((run / "resumed.jsonl").read_text().splitlines()) == 2


def test_a_time_cap_ends_the_run_and_its_schedule(data: Path, tmp_path: Path) -> None:
    settings = small(
        data,
        tmp_path,
        "timed",
        ITERATIONS="100000",
        MAX_WALLCLOCK_SECONDS="4",
        GPTQ_RESERVE_SECONDS="1",
        VAL_LOSS_EVERY="0",
        WARMDOWN_FRAC="0.5",
        CHECKPOINT_EVERY="0",
    )
    done = train(settings)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "timed/summary.json").read_text())
    launches = [seconds for (seconds,) in metrics(tmp_path / "timed", "elapsed")]
    longest = max(b - a for a, b in pairwise(launches))
    assert 3.0 - longest - 0.05 < summary["seconds"] < 3.0 + longest + 0.05
    factors = [factor for (factor,) in metrics(tmp_path / "timed", "lr_factor")]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx((1.0 - launches[-1] / 3.0) / 0.5, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NUM_HEADS": "7"}, "ConfigError: model_dim=64 is not a multiple of num_heads=7"),
        ({"VOCAB_SIZE": "8192"}, "DataError: .*1024.*8192"),
        ({"DATA_PATH": "/nonexistent"}, "DataError: /nonexistent"),
        ({"KERNELS": "triton"}, "KernelError: .*Triton kernels run on a GPU"),
        ({"TTT_ENABLED": "1"}, "ConfigError: TTT_ENABLED=1"),
        ({"TRAIN_BATCH_TOKENS": "100"}, "ConfigError: train_batch_tokens=100"),
        ({"RUN_ID": "taken"}, "RecordError: run folder .*taken exists"),
        ({"DEVICE": "cuda"}, "ConfigError: device=cuda"),
        ({"GPTQ_CALIBRATION_BATCHES": "100000"}, "DataError: .*wanted 100000 batches"),
        ({"RUNS_PATH": "/dev/null"}, "(NotADirectoryError|RecordError)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    change: dict[str, str],
    message: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from train import main

    if "DEVICE" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "taken").mkdir()
    before = set(tmp_path.iterdir())
    for name, value in {**small(data, tmp_path, "wrong"), **change}.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert set(tmp_path.iterdir()) == before  # nothing in the way of the corrected command


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_it_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import main

    for name, value in small(data, tmp_path, "wild", CHECKPOINT_EVERY="1", SCALAR_LR="1e30", ADAM_WD="0").items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    run = tmp_path / "wild"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"TrainingError: step 2: loss \S+, gradient norm \S+; wanted finite ones. .*wild", line), line
    state = torch.load(run / "checkpoint.pt")
    assert state["step"] == 1
    assert all(np.isfinite(entry).all() for entry in metrics(run, "train_loss", "gradient_norm"))
    assert metrics(run, "step")[-1] == (1,)


@pytest.mark.parametrize(("bad", "nonfinite"), [({2}, "skip"), ({2}, "stop"), (set(range(2, 99)), "skip")])
def test_a_step_that_is_not_finite_is_skipped_by_option(
    bad: set[int], nonfinite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-step of a step makes NaN: the run goes on without that step, or ends; ten in a row end it anyway."""
    config = tiny_config(
        data_path=SAMPLE, runs_path=tmp_path, run_id="run", train_batch_tokens=128, iterations=14, val_loss_every=0,
        vocab_size=1024, warmup_steps=0, max_wallclock_seconds=0, train_log_every=1, checkpoint_every=1,
        nonfinite=nonfinite,
    )  # fmt: skip
    monkeypatch.setattr(gpt.trainer, "micro_step", lambda *given: spoilt(micro_step(*given)))
    calls = 0

    def spoilt(function: MicroStep) -> MicroStep:
        def made(tokens: Tensor, targets: Tensor, depth: tuple[int, ...], weight: float) -> Tensor:
            nonlocal calls
            calls += 1
            return function(tokens, targets, depth, weight if calls % 2 or calls // 2 not in bad else math.nan)

        return made

    model = GPT(config, select("reference", CPU)).initialise(0)
    run = Run.create(config, ALONE)
    trainer = Trainer(model, config, run, ALONE, bytes_per_token=1.0)
    if nonfinite == "skip" and len(bad) == 1:
        trained = trainer.train(validate=None)  # type: ignore[arg-type]
        assert trained.steps == 14
        assert math.isfinite(trained.train_loss)
        assert all(p.isfinite().all() for p in model.parameters())
    else:
        with pytest.raises(TrainingError, match=f"step {2 if len(bad) == 1 else 11}: loss nan, gradient norm nan"):
            trainer.train(validate=None)  # type: ignore[arg-type]
    state = torch.load(run.path / "checkpoint.pt")
    assert all(weight.isfinite().all() for weight in (*state["model"].values(), *state["optimizer"]["ema"].values()))
    assert state["optimizer"]["adamw"]["steps"] == (13 if state["finished"] else 1)
    said = {entry["step"]: entry["skipped"] for entry in run.metrics() if "skipped" in entry}
    assert set(said.values()) <= {"skipped: loss nan, gradient norm nan"}
    assert list(said) == ([] if nonfinite == "stop" else [2] if len(bad) == 1 else list(range(2, 11)))


def test_training_leaves_calibration_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a trial of it, the first, which compiles, not counted, is longer than what is reserved."""
    now = 0.0

    def stub(model: GPT, depth: tuple[int, ...], batches: list[Tensor], ranks: Ranks) -> None:
        nonlocal now
        now += (0.5 if now else 100.0) + 0.25 * len(batches)

    monkeypatch.setattr(gpt.trainer, "calibrate", stub)
    monkeypatch.setattr(gpt.trainer, "time", SimpleNamespace(perf_counter=lambda: now))
    takes = 1.1 * (0.5 + 9 * 0.25)
    for name, limit, reserve, cap in (("a", 10, 2, 10 - takes), ("b", 10, 4, 6), ("c", 0, 0, 0), ("d", 3, 2, None)):
        config = tiny_config(
            runs_path=tmp_path, run_id=name, train_batch_tokens=64, warmup_steps=1, gptq_calibration_batches=9,
            max_wallclock_seconds=limit, gptq_reserve_seconds=reserve,
        )  # fmt: skip
        now = 0.0
        model = GPT(config, select("reference", CPU)).initialise(0)
        trainer = Trainer(model, config, Run.create(config, ALONE), ALONE, bytes_per_token=1.0)
        if cap is None:
            with pytest.raises(TrainingError, match=r"batches=9, would take 3\.0 s of max_wallclock_seconds=3"):
                trainer.warm_up()
        else:
            trainer.warm_up()
            assert trainer.cap == pytest.approx(cap)


def interrupt(process: subprocess.Popen[str], run: Path, step: int, what: signal.Signals, rank: bool) -> str:
    """Send a signal once a step is logged, to the launcher or to its second rank; what was said until all had ended."""
    deadline, log = time.monotonic() + 200, run / "metrics.jsonl"
    while not (log.exists() and f'"step": {step}, "train_loss"' in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]) if rank else process.pid, what)
    return process.communicate(timeout=45)[1]


def test_interrupted_in_every_way_it_resumes_on_any_number_of_processes(
    whole: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    """A rank is killed, the launcher told to stop, the disk full; five processes, of 2 or 3 rows each, end the run."""
    run = tmp_path / "interrupted"

    def start(*arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(2, arguments), env=environ(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start(**small(data, tmp_path, run.name))
    said = interrupt(process, run, 3, signal.SIGKILL, rank=True)
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL) received by PID" in said
    assert f"train.py --resume {run}" in said

    process = start("--resume", str(run))
    said = interrupt(process, run, 5, signal.SIGTERM, rank=False)
    assert process.returncode == 1
    step = torch.load(run / "checkpoint.pt")["step"]
    assert 5 <= step < 8
    assert f"TrainingError: SIGTERM after step {step}; go on with train.py --resume {run}" in said

    before = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt.part").symlink_to("/dev/full")
    done = train({}, "--resume", str(run))
    assert done.returncode == 2
    assert "was not written: [Errno 28] No space left on device; the one before stands" in done.stderr
    assert (run / "checkpoint.pt").read_bytes() == before

    done = train({}, "--resume", str(run), processes=5)
    assert done.returncode == 0, done.stdout + done.stderr
    for alone, together in zip(metrics(whole[0], *CURVE), metrics(run, *CURVE), strict=True):
        assert together == pytest.approx(alone, rel=2e-5)


def test_a_checkpoint_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small file system")
    try:
        run = Run(tmp_path, build_config(preset="sample"), Ranks(0, 1, torch.device("cpu")))
        with pytest.raises(RecordError, match="No space left on device; there is none before it"):
            run.save_checkpoint({"step": 0, "weights": torch.randn(1_000_000)}, wait=True)
        run.save_checkpoint({"step": 1, "weights": torch.randn(500_000)}, wait=True)
        run.save_checkpoint({"step": 2, "weights": torch.randn(500_000)})
        with pytest.raises(RecordError, match="No space left on device; the one before stands"):
            run.join()
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]  # and room for a last word
        found = run.load_checkpoint()
        assert found
        assert found["step"] == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_another_node_does_not_see_is_refused(tmp_path: Path) -> None:
    class Apart(Ranks):
        def broadcast_text(self, text: str) -> str:
            return text

        def gather(self, value: Any) -> list[Any]:
            return [value, False]

    config = build_config(preset="sample", runs_path=tmp_path)
    with pytest.raises(
        RecordError, match=rf"rank 1 does not see {tmp_path}/.*; wanted a runs_path that all nodes share"
    ):
        Run.create(config, Apart(0, 2, CPU))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_packed_again(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Once to the same bytes, twice coarser."""
    sizes = []
    for arguments in ((), ("--clip-sigmas", "20"), ("--sdclip", "20", "30")):
        out = tmp_path / "again.pga"
        done = quantize("pack", whole[0], "--out", out, *arguments)
        assert done.returncode == 0, done.stderr
        assert load(out).sha256 in done.stdout
        sizes.append(out.stat().st_size)
        if not arguments:
            assert out.read_bytes() == (whole[0] / "model.pga").read_bytes()
    assert max(sizes[1:]) < 0.95 * sizes[0]
    for out, message in ((tmp_path / "none/a.pga", "its folder does not exist"), (tmp_path, "is a folder, wanted")):
        done = quantize("pack", tmp_path / "no run", "--out", out)  # nothing is read before
        assert done.returncode == 2
        assert f"ConfigError: --out {out}: {message}" in done.stderr


def test_a_run_from_another_machine_is_packed_and_measured(whole: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    """Its configuration names places that are not here."""
    moved, out = tmp_path / "moved", tmp_path / "again.pga"
    shutil.copytree(whole[0], moved)
    config = json.loads((moved / "config.json").read_text())
    config |= {"data_path": "/elsewhere/data", "tokenizer_path": "/elsewhere/tokenizer.model"}
    (moved / "config.json").write_text(json.dumps(config))
    assert "DataError: /elsewhere/tokenizer.model: no tokenizer" in quantize("pack", moved, "--out", out).stderr
    places = ("--data-path", data, "--tokenizer-path", SAMPLE / "tokenizer.model")
    done = quantize("pack", moved, "--out", out, *places)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (whole[0] / "model.pga").read_bytes()
    pytest.importorskip("triton")
    done = run_program([sys.executable, "-m", "bench.quantise", str(moved), "--results", str(tmp_path)], {})
    assert done.returncode == 2
    assert done.stderr.startswith("bench.quantise: DataError: /elsewhere/tokenizer.model: no tokenizer")
    assert done.stderr.count("\n") == 1


def test_quantising_is_measured(whole: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run_program([sys.executable, "-m", "bench.quantise", str(whole[0]), "--results", str(tmp_path)], {})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "quantise-cpu.json").read_text())
    rows = {row["impl"]: row for row in result["rows"]}
    assert list(rows) == ["trained", "seed-method", "one clip a kind", "ours"]
    summary = json.loads((whole[0] / "summary.json").read_text())
    assert rows["trained"]["bpb"] == pytest.approx(summary["scores"]["ema"]["bpb"], abs=1e-6)
    assert rows["ours"]["bpb"] == pytest.approx(summary["scores"]["artifact"]["bpb"], abs=1e-6)
    assert rows["ours"]["bytes"] == summary["artifact"]["nbytes"]
    for name, row in rows.items():
        assert row["bpb_lost"] == pytest.approx(row["bpb"] - rows["trained"]["bpb"])
        assert name in done.stdout


def test_a_run_is_resumed_only_as_it_was(whole: tuple[Path, str], tmp_path: Path) -> None:
    assert (
        "ConfigError: --resume takes the run's own configuration"
        in train({}, "--resume", str(whole[0]), "--seed", "1").stderr
    )
    changed = train({"SEED": "5"}, "--resume", str(whole[0]))
    assert "--resume takes the run's own seed=1337; the environment sets SEED=5" in changed.stderr
    assert f"RecordError: {tmp_path} is not a run's folder" in train({}, "--resume", str(tmp_path)).stderr
    with (whole[0] / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another process" in train({}, "--resume", str(whole[0])).stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(whole[0], damaged)
    earlier = torch.load(damaged / "checkpoint.pt")
    wanted = earlier.pop("format")
    torch.save(earlier, damaged / "checkpoint.pt")
    refused = f"RecordError: checkpoint of an earlier version of this program: {damaged} has format 1, wanted {wanted}"
    assert refused in train({}, "--resume", str(damaged)).stderr
    content = bytearray((damaged / "checkpoint.pt").read_bytes())
    (damaged / "checkpoint.pt").write_bytes(bytes(content[: len(content) // 2]))
    assert "cannot be read as a checkpoint" in train({}, "--resume", str(damaged)).stderr
