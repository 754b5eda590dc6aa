"""The scaling bench: what it reads off a profile, its model, and its program on processes of a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from bench import scaling
from bench.scaling import INFINIBAND, NVLINK, collectives, communication, compare, expect, hidden, share
from gpt.config import ROOT, build_config
from gpt.model import BANKS
from gpt.optimizer import Optimizer
from tests.tiny import ALONE, tiny_config, tiny_model

SEED = build_config(preset="seed")


def test_hidden_time_counts_each_moment_once() -> None:
    busy = [(0.0, 2.0), (1.0, 3.0), (3.5, 4.0), (3.6, 3.8), (6.0, 9.0)]
    assert hidden(0.5, 7.0, busy) == pytest.approx(2.5 + 0.5 + 1.0)
    assert hidden(4.0, 6.0, busy) == 0.0
    assert hidden(7.0, 8.0, busy) == 1.0


def test_collectives_are_the_optimizers() -> None:
    """Bytes of the banks' buffers with their padding, and of the bucket."""
    config = tiny_config()
    of = {c.name: c.bytes for c in collectives(config, 2)}
    optimizer = Optimizer(tiny_model(config), config, ALONE)
    names = {id(p): name for name, p in optimizer.model.named_parameters()}
    for bank in optimizer.banks:
        padded = (bank.count + bank.count % 2) * bank.parameter[0].numel() * 2
        name = names[id(bank.parameter)]
        assert of[f"reduce-scatter {name}"] == of[f"all-gather {name}"] == padded
    gathered = [c.name.removeprefix("all-gather ") for c in collectives(config, 2) if c.kind == "AllGather"]
    assert gathered == [names[id(bank.parameter)] for bank in optimizer.banks]
    assert set(scaling.FINAL) == set(BANKS)
    assert of["all-reduce rest"] == 4 * optimizer.bucket.numel()


def test_banks_become_final_in_the_order_that_is_claimed() -> None:
    model, seen = tiny_model(tiny_config()), list[str]()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    model(tokens[:, :-1], tokens[:, 1:], model.config.depth(True), model.rotary(16)).backward()
    assert [name for name in seen if name in BANKS] == list(scaling.FINAL)


def test_the_models_figures() -> None:
    assert share(SEED, 1) == 1.0
    assert share(SEED, 22) == pytest.approx(1 / 22 * 22 / 22 + 1 / 22, abs=0.03)  # MLP banks have 11 matrices
    alone = (75.0, 90.0)
    one, eight = expect(SEED, alone, 1, NVLINK), expect(SEED, alone, 8, NVLINK)
    assert one.communication == 0.0
    assert one.ratio == pytest.approx(1.0)
    # Eight forward passes for one optimizer step.
    assert one.ms[1] == pytest.approx(8 * 90.0 - 7 * (scaling.ELEMENTWISE + scaling.NEWTON_SCHULZ))
    # By hand: 16 + 16 MLP matrices of 2 MB, 24 of 0.5 MB and 24 of 0.25 MB, twice; 4.2 million floats, twice.
    sent = 7 / 8 * (2 * (32 * 2**21 + 24 * 2**19 + 24 * 2**18) + 2 * 4 * 4_222_552)
    assert eight.communication == pytest.approx(1e3 * (11 * 25e-6 + sent / 361e9), rel=1e-3)
    assert 1.0 < eight.ratio < 1.03
    seconds = SEED.max_wallclock_seconds - SEED.gptq_reserve_seconds
    assert (3000 * eight.ms[0] + (eight.steps - 3000) * eight.ms[1]) / 1e3 == pytest.approx(seconds, abs=0.1)
    sixteen = expect(SEED, alone, 16, INFINIBAND)
    assert (eight.tokens, sixteen.tokens) == (98_304, 49_152)
    assert 1.8 * eight.steps < sixteen.steps < 2 * eight.steps


def test_a_profile_is_read_collective_by_collective(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = [
        (f"ncclDevKernel_{c.kind}_Sum_bf16_RING_LL(x)", 0.1 * (i + 1), 0.01 * i)
        for i, c in enumerate(collectives(SEED, 2))
    ]
    slower = [(name, 3.0 * ms, 2.0 * away) for name, ms, away in kernels]
    monkeypatch.setattr(scaling, "profiled", lambda *_: [])
    ranks = SimpleNamespace(world_size=2, gather=lambda _: [kernels * 4, slower * 4])
    model = SimpleNamespace(ops=SimpleNamespace(capturable=True))
    bench = cast(Any, SimpleNamespace(config=SEED, ranks=ranks, model=model))
    rows = communication(bench, (0,))
    assert [row["name"] for row in rows] == [c.name for c in collectives(SEED, 2)]
    assert [row["ms"] for row in rows] == pytest.approx([0.1 * (i + 1) for i in range(11)])
    assert [row["ms_with_waiting"] for row in rows] == pytest.approx([0.2 * (i + 1) for i in range(11)])
    assert [row["hidden_ms"] for row in rows] == pytest.approx([0.015 * i for i in range(11)])
    ranks.gather = lambda _: [kernels[1:] * 4, kernels[1:] * 4]
    assert communication(bench, (0,)) == []
    assert re.search(r"collective 0 of a step is .*AllReduce.*wanted 4 of ReduceScatter", capsys.readouterr().out)


def test_the_program_on_processes_of_a_cpu(tmp_path: Path) -> None:
    tiny = {
        "preset": "sample", "device": "cpu", "num-layers": 2, "model-dim": 32, "num-heads": 2, "num-kv-heads": 1,
        "recur-layers": 1, "train-seq-len": 64, "micro-batch-tokens": 256, "rope-dims": 8, "eval-stride": 64,
    }  # fmt: skip
    options = [text for name, value in tiny.items() for text in (f"--{name}", str(value))]
    options += ["--gpus", "1", "2", "--steps", "2", "--curve", "4", "--out", str(tmp_path / "scaling.json")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.scaling", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert (record["gpus"], record["gpu"]) == (2, "CPU")
    steps = [row for row in record["rows"] if row["op"] == "training_step"]
    assert [(row["gpus"], row["layers"]) for row in steps] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    assert [row["ratio"] for row in steps] == [1.0, 1.0, *(pytest.approx(b["ms"] / a["ms"], abs=1e-4) for a, b in
                                                           zip(steps[:2], steps[2:], strict=True))]  # fmt: skip
    for row in steps:
        assert len(row["alone_ms"]) == row["gpus"]
        assert row["ratio_to_alone"] == pytest.approx(row["ms"] * row["gpus"] / sum(row["alone_ms"]), abs=1e-3)
    assert done.stdout.count("each card alone") == 2
    one, again, two = (row for row in record["rows"] if row["op"] == "loss_curve")
    assert len(one["losses"]) == 4
    assert one["losses"][-1] != one["losses"][0]
    assert again["worst_difference"] == 0.0
    assert two["worst_difference"] <= 2e-5
    assert f"{two['worst_difference']:.6f}" in done.stdout
    assert (tmp_path / "scaling.png").stat().st_size


def test_differences_are_those_of_the_first() -> None:
    rows: list[dict[str, Any]] = [
        {"op": "loss_curve", "losses": [1.0, 2.0, 3.0]},
        {"op": "loss_curve", "losses": [1.5, 1.5, 3.0]},
    ]
    compare(rows)
    assert [row["worst_difference"] for row in rows] == [0.0, 0.5]
    assert [row["worst_mean_difference"] for row in rows] == [0.0, 0.0]
