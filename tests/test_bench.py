"""What the benches decide by themselves: which values are right, which rows stay in a result file, what may fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench import common, optimizer
from bench.common import draw_panels, peer, relative_errors, write_result
from bench.kernels import Workload, errors, phases, right
from gpt.optimizer import Optimizer, coefficients
from kernels import compiled, reference
from tests.tiny import ALONE, CPU, tiny_config, tiny_model


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


@pytest.mark.parametrize("what", ["commit", "gpu", "torch", "triton"], ids="of-{}".format)
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
