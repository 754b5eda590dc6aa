"""What the benches decide by themselves: which values are right, which rows stay in a result file, what may fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench import common, kernels, optimizer, packed, scoring, start
from bench.common import draw_panels, peer, relative_errors, write_result
from bench.kernels import OPS, Workload, errors, phases, right
from bench.pack import by_likeness, by_size, ordered, shuffled
from bench.step import PARTS, draw, shares
from gpt.optimizer import Optimizer, coefficients
from gpt.score import ValidationText
from kernels import compiled, reference
from kernels.launch import INTERPRET
from tests.tiny import ALONE, CPU, random_tokens, tiny_config, tiny_model


def workload(**implementations: Any) -> Workload:
    """Heads of two tensors in, two tensors out."""
    generator = torch.Generator().manual_seed(0)
    qk = torch.randn(2, 3, 5, 4, generator=generator)
    q, k = (x.detach().clone().requires_grad_() for x in qk.split((4, 1), 2))
    packed = {"triton-packed": qk.requires_grad_()}
    return Workload((q, k), lambda q, k: (q * k, k.exp()), implementations, (1.0, 1.0), packed=packed)


def good(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q * k, k.exp()


def test_errors_cover_every_output_and_gradient() -> None:
    work = workload(
        triton=good,
        **{"triton-packed": lambda qk: good(*qk.split((4, 1), 2))},
        wrong_second=lambda q, k: (q * k, 2 * k.exp()),
        wrong_gradient=lambda q, k: (q * k, k.exp() * k.detach() / k),
    )
    found = errors(work)
    assert right(found["triton"])
    assert right(found["triton-packed"])
    assert found["wrong_second"][0] == pytest.approx(1.0)
    assert found["wrong_gradient"][0] < 1e-5
    assert not right(found["wrong_gradient"])
    for name in ("triton", "triton-packed"):
        calls = phases(work, name)
        assert [len(calls["_backward"]()) for _ in range(2)] == [len(work.inputs_of(name))] * 2


def test_other_arithmetic_has_its_own_specification() -> None:
    def other(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * q * k, k.exp()

    work = replace(workload(triton=good, other=other, wrong=other), exact_of={"other": other})
    found = errors(work)
    assert right(found["triton"])
    assert right(found["other"])
    assert not right(found["wrong"])


def test_nan_is_wrong_wherever_it_is() -> None:
    found = errors(
        workload(
            output=lambda q, k: (q * k, k.exp() * math.nan),
            gradient=lambda q, k: (q * k, k.exp() + (k - k.detach()).abs().sqrt()),
        )
    )
    assert math.isnan(found["output"][0])
    assert math.isnan(found["gradient"][1])
    assert found["gradient"][0] < 1e-5
    assert not right(found["output"])
    assert not right(found["gradient"])
    assert not right((0.0, math.nan))
    assert not right((math.nan, 0.0))
    assert not right((math.inf, 0.0))
    a = torch.ones(2)
    assert math.isnan(relative_errors([a, a * math.nan, a], [a, a, a]).max().item())


def test_a_peer_may_fail_and_ours_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*inputs: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    assert list(errors(workload(cudnn=fails, triton=good))) == ["triton"]
    assert "cudnn: left out: RuntimeError: no kernel" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no kernel"):
        errors(workload(**{"triton-deterministic": fails}))
    with pytest.raises(KeyboardInterrupt), peer("quack"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("op", "peers"),
    [
        ("linear_cross_entropy", {"compiled"}),
        ("newton_schulz", {"eager", "compiled"}),
        ("muon_momentum", {"eager", "compiled"}),
        ("muon_update", {"eager", "compiled"}),
        ("adamw_update", {"eager", "compiled", "torch-fused"}),
        ("gptq_block", {"eager"}),
        ("int6_dequantise", {"eager", "compiled"}),
        ("int6_linear", {"cublas"}),
        ("cached_attention", {"eager", "compiled"}),
    ],
)
def test_ops_without_a_gradient_have_right_peers(op: str, peers: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On small sizes, twice: ops that change their inputs give every implementation, and every check, the same ones."""
    config = tiny_config(muon_row_norm=False)
    for module in (kernels, optimizer, packed):
        monkeypatch.setattr(module, "DEVICE", CPU)
    monkeypatch.setattr(optimizer, "CONFIG", config)
    monkeypatch.setattr(optimizer, "COEFFICIENTS", coefficients(config.newton_schulz, config.muon_backend_steps))
    monkeypatch.setattr(packed, "SHAPES", {"up": (40, 70)})
    monkeypatch.setattr(kernels, "INT6", {"m1": 1, "m16": 16, "m98304": 80})
    monkeypatch.setattr(kernels, "CACHES", {"2048": 8, "8192": 20})
    monkeypatch.setattr(kernels, "LENGTH", 8)
    monkeypatch.setattr(kernels, "HALF", torch.float32)
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    monkeypatch.setattr(compiled, "newton_schulz", reference.newton_schulz)
    ours = {"triton"} if INTERPRET and op not in ("gptq_block", "linear_cross_entropy") else set()
    cases, build = OPS[op]
    torch.manual_seed(0)
    for case in cases[1:] if op == "linear_cross_entropy" else cases:
        made = build(case, True, None)
        work = replace(made, implementations={k: f for k, f in made.implementations.items() if k in peers | ours})
        assert set(work.implementations) == peers | ours
        for _ in range(2):
            found = errors(work)
            assert set(found) == peers | ours
            assert all(max(pair) < 1e-2 for pair in found.values()), found
        assert list(phases(work, min(peers))) == [""]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(common, "_written", set())
    monkeypatch.setenv("GIT_COMMIT", "a" * 40)
    return monkeypatch


def rows(*ops: str) -> list[dict[str, Any]]:
    return [{"op": op, "case": "seed", "impl": "triton", "ms": 1.0, "percent_of_ceiling": None} for op in ops]


def written(path: Path, command: str, *ops: str, ceiling: float = 1.0) -> tuple[list[str], str]:
    whole = write_result("kernels", command, {"copy_gb_s": ceiling}, rows(*ops), path)[1]
    record = json.loads(path.read_text())
    assert record["rows"] == whole
    return [row["op"] for row in whole], record["command"]


def test_rows_of_the_same_clean_commit_stay(tmp_path: Path, on_gpu: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernels.json"
    assert written(path, "a", "mlp", "embed") == (["mlp", "embed"], "a")
    on_gpu.setattr(common, "_written", set())  # another process
    assert written(path, "b", "mlp", ceiling=2.0) == (["embed", "mlp"], "a; b")
    assert written(path, "a", "rms_norm")[1] == written(path, "b", "rms_norm")[1] == "a; b"
    of = {row["op"]: row["ceiling"]["copy_gb_s"] for row in json.loads(path.read_text())["rows"]}
    assert of == {"embed": 1.0, "mlp": 2.0, "rms_norm": 1.0}


def test_versions_of_installed_peers_stand_in_a_result(tmp_path: Path, on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(common, "PEERS", ("numpy", "no-such-package"))
    written(tmp_path / "kernels.json", "a", "mlp")
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["peers"] == {"numpy": version("numpy")}
    assert list(record)[3:6] == ["torch", "triton", "peers"]


@pytest.mark.parametrize("commit", ["a" * 40 + "-dirty", ""])
def test_rows_of_a_dirty_commit_stay_in_one_process_only(
    commit: str, tmp_path: Path, on_gpu: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.json"
    on_gpu.setenv("GIT_COMMIT", commit)
    written(path, "a", "mlp")
    assert written(path, "a", "embed") == (["mlp", "embed"], "a")
    on_gpu.setattr(common, "_written", set())
    assert written(path, "b", "embed") == (["embed"], "b")


@pytest.mark.parametrize("what", ["commit", "gpu", "torch", "triton", "peers"], ids="of-{}".format)
def test_rows_of_other_code_or_another_card_go(what: str, tmp_path: Path, on_gpu: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernels.json"
    written(path, "a", "mlp")
    on_gpu.setattr(common, "_written", set())
    path.write_text(json.dumps(json.loads(path.read_text()) | {what: "another"}))
    assert written(path, "a", "embed") == (["embed"], "a")


def test_picture_without_a_ceiling(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_panels(rows("optimizer_step", "mlp"), "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("impl", ["eager", "torch-fused"])
def test_steps_agree_with_float64(impl: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers of the optimizer's step do the same step."""
    config = tiny_config(muon_row_norm=False)
    monkeypatch.setattr(optimizer, "DEVICE", CPU)
    monkeypatch.setattr(optimizer, "CONFIG", config)
    monkeypatch.setattr(optimizer, "COEFFICIENTS", coefficients(config.newton_schulz, config.muon_backend_steps))
    monkeypatch.setattr(compiled, "newton_schulz", reference.newton_schulz)
    monkeypatch.setattr(optimizer, "timed", lambda step: [step() for _ in range(2)])
    assert optimizer.one_step(impl, ranks)[0] < 0.05


def test_fused_step_is_the_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several steps: momentum, averages, rates and EMA too."""
    config = tiny_config()
    monkeypatch.setattr(compiled, "newton_schulz", reference.newton_schulz)
    ends = []
    for kind in (Optimizer, optimizer.Fused):
        model = tiny_model(config)
        trained = kind(model, config, ALONE)
        generator = torch.Generator().manual_seed(3)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            trained.step(step, 1.0 - 0.2 * step)
        ends.append([*model.state_dict().values(), *trained.ema])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


TTT = ("chunk,tokens=32,rows=2", "document,tokens=4,rank=2,documents=3,lr=0.01")


def bench_scoring(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code of bench.scoring with a tiny model on 200 tokens of 2 bytes each, and its result file."""
    config = tiny_config(document_mask=False)
    artifact = SimpleNamespace(config=config, depth=config.depth(True), state_dict=tiny_model(config).state_dict)
    tokenizer = SimpleNamespace(byte_table=lambda: None)
    monkeypatch.setattr(scoring, "load", lambda path: artifact)
    monkeypatch.setattr(scoring, "Tokenizer", lambda path: tokenizer)

    def text(tokens: Any, table: Any, device: torch.device) -> ValidationText:
        moved = torch.from_numpy(tokens.astype(np.int32))
        return ValidationText(moved, torch.full((moved.numel() - 1,), 2, dtype=torch.int16))

    monkeypatch.setattr(scoring, "validation_text", text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shard, out = folder / "val.bin", folder / "scoring.json"
    shard.write_bytes(bytes(1024) + random_tokens(200, 64).numpy().astype("<u2").tobytes())
    code = scoring.main([
        "--tokens", str(shard), "--artifact", "model.pga", "--tokenizer", "bpe.model", "--stride", "4",
        "--batch-tokens", "64", "--ttt-tokens", "129", "--subset", "80", "--out", str(out), *arguments,
    ])  # fmt: skip
    return code, json.loads(out.read_text())


def test_the_optimizers_cases_are_kept_as_they_come(tmp_path: Path, on_gpu: pytest.MonkeyPatch) -> None:
    """What a limit cuts short leaves a file of all that was measured before it."""
    out, seen = tmp_path / "optimizer.json", list[list[tuple[str, str]]]()

    def measure(op: str, case: str) -> list[dict[str, Any]]:
        if out.exists():
            seen.append([(row["op"], row["case"]) for row in json.loads(out.read_text())["rows"]])
        if (op, case) == ("optimizer_step", "rank-of-8"):
            raise KeyboardInterrupt
        return [{"op": op, "case": case, "impl": "triton", "ms": 1.0, "percent_of_ceiling": None}]

    on_gpu.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu.setattr(optimizer, "ceilings", lambda: {"bf16_tflops": 780.0})
    on_gpu.setattr(optimizer, "measure_newton_schulz", lambda case, ceiling: measure("newton_schulz", case))
    on_gpu.setattr(optimizer, "measure_step", lambda case: measure("optimizer_step", case))
    with pytest.raises(KeyboardInterrupt):
        optimizer.main(["--out", str(out)])
    ops = [("newton_schulz", "all-banks"), ("optimizer_step", "all-banks"), ("newton_schulz", "rank-of-8")]
    assert seen == [ops[:1], ops[:2], ops]


def test_scoring_says_gains_and_projections_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, record = bench_scoring(tmp_path, monkeypatch, "--ttt", TTT[0], "--ttt", TTT[1])
    assert code == 0
    assert record["bench"] == "scoring"
    of = {(row["op"], row["case"], row["impl"]): row for row in record["rows"]}
    sliding = of["sliding_score", "val-199", "reference"]
    assert sliding["projection"]["seconds"] == pytest.approx(sliding["seconds"] * 40_540_160 / 199 / 8, rel=0.1)
    for name, part in zip(TTT, (81, 19), strict=True):
        whole = of[f"ttt_{name}", "val-128", "reference"]
        gain = whole["sliding_nats_per_token"] - whole["nats_per_token"]
        assert whole["gain_nats_per_token"] == pytest.approx(gain, abs=1e-6)
        assert whole["gain_bpb"] == pytest.approx(gain / math.log(2) / 2, abs=1e-6)
        assert whole["projection"]["tokens"] == 40_540_160
        assert whole["settings"]["lr"] == (0.005 if part == 81 else 0.01)
        rows = [row for key, row in of.items() if key[0] == f"ttt_{name}" and row["tokens"] < 128]
        assert [row["impl"] for row in rows] == ["reference", "plain"]
        assert rows[0]["nats_off"] < 1e-5
        assert rows[0]["times_as_fast_as_plain"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"], rel=0.2)
    judged = [row["case"] for row in record["rows"] if row["op"] == "judged"]
    for what in (
        "relative difference",
        "times as fast as straightforward",
        "BPB gained over",
        "seconds for 40,540,160",
    ):
        assert sum(what in case for case in judged) == 2 + (what == "relative difference")


def test_scoring_goes_on_past_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "plain_chunk", lambda *given: [0.0])  # and its nats are wrong
    code, record = bench_scoring(tmp_path, monkeypatch, "--ttt", "chunk,tokens=8", "--ttt", TTT[0])
    assert code == 1
    assert "chunk,tokens=8: failed" in capsys.readouterr().err
    rows = [row for row in record["rows"] if row["op"] == f"ttt_{TTT[0]}"]
    assert [row["tokens"] for row in rows if row["ms"]] == [128]
    assert not any("times as fast" in row["case"] for row in record["rows"] if row["op"] == "judged")


def test_scoring_compares_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [f"{TTT[0]},lr={rate}" for rate in (0.001, 0.1)]
    code, record = bench_scoring(
        tmp_path, monkeypatch, "--subset", "0", *(x for rate in rates for x in ("--ttt", rate))
    )
    assert code == 0
    assert [row["op"] for row in record["rows"]] == ["plain_score", "sliding_score", *(f"ttt_{rate}" for rate in rates)]
    assert all("gain_nats_per_token" in row for row in record["rows"][2:])
    assert scoring.main(["--tokens", "none.bin", "--ttt", "chunk,speed=2"]) == 2


def test_parts_and_gaps_of_a_step_are_its_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = json.loads((common.RESULTS / "step-h100.json").read_text())["rows"]
    for row in rows:
        assert row["ms"] == pytest.approx(sum(row["parts_ms"].values()) + row["gaps_ms"])
        assert set(row["percent_of_floor"]) == set(PARTS)
        assert {key: row[key] for key in ("gaps_ms", "percent_of_floor")} == shares(row)
    part = rows[0]["percent_of_floor"]["attention"]
    assert part == round(100 * rows[0]["least_ms"]["attention"] / rows[0]["parts_ms"]["attention"], 1)
    older = [{key: row[key] for key in row if key not in shares(row)} for row in rows]
    draw(older, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


TRAIN = """
import json, os, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = Path(given["--runs-path"]) / given["--run-id"]
run.mkdir()
(run / "config.json").write_text(Path("CONFIG").read_text())
cache = Path(os.environ["TRITON_CACHE_DIR"])
cold = not cache.exists()
cache.mkdir(exist_ok=True)
print(f"ready after {9.5 if cold else 2.5} s, {7.0 if cold else 0.5} s of them warm-up", flush=True)
for step in range(1, int(given["--iterations"]) + 1):
    if step == int(given.get("--fail", 0)):
        sys.exit("no memory")
    layers = 14 if step > int(given["--recur-start-step"]) else 11
    ms = None if step == 1 else 80.04 if step > int(given["--recur-start-step"]) + 1 else 60.04
    entry = {"step": step, "train_loss": 1.0, "layers": layers, "ms_per_step": ms}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\\n")
    print(f"step {step}/{given['--iterations']}  loss", flush=True)
time.sleep(600)  # what follows training
"""


def test_starts_are_read_from_two_runs_with_the_same_caches(
    tmp_path: Path, on_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(tiny_config().model_dump_json())
    (tmp_path / "train.py").write_text(TRAIN.replace("CONFIG", str(tmp_path / "config.json")))
    on_gpu.setattr(start, "ROOT", tmp_path)
    out = tmp_path / "start.json"
    assert start.main(["--iterations", "6", "--out", str(out)]) == 0
    cold, warm = json.loads(out.read_text())["rows"]
    assert (cold["case"], cold["ms"], cold["warm_up_ms"]) == ("cold", 9500, 7000)
    assert (warm["case"], warm["ms"], warm["warm_up_ms"]) == ("warm", 2500, 500)
    for row in (cold, warm):
        assert row["steps_ms"] == [60.0] * 3 + [80.0] * 2
        assert row["steps_ms"][row["recurrence_from_step"] :] == [80.0] * 2
    assert start.main(["--iterations", "6", "--fail", "3"]) == 2
    assert "ended before step 6" in (said := capsys.readouterr().err)
    assert "no memory" in said


@pytest.mark.parametrize("order", [by_size, by_likeness])
def test_sorted_rows_come_back(order: Any) -> None:
    """The order is in the file, which so has all that the one in the parameter's own order has."""
    codes = (
        np.random.default_rng(0).integers(-31, 32, (2, 6, 8)).astype(np.int8) // np.arange(1, 7, dtype=np.int8)[:, None]
    )
    rows = codes.reshape(12, 8)
    content = brotli.decompress(ordered(order, codes))
    places = np.frombuffer(content[:48], np.uint8).reshape(4, 12).T.copy().view("<u4")[:, 0]
    assert sorted(places.tolist()) == list(range(12)) != places.tolist()
    assert content[48:] == shuffled(rows[places].tobytes())
    if order is by_size:
        assert (np.diff(np.abs(rows[places].astype(int)).sum(1)) >= 0).all()
