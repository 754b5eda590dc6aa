"""The README's measured figures are those of bench/results."""

from __future__ import annotations

import json
from typing import Any

from bench.common import short_name
from bench.runs import compare
from bench.scaling import INFINIBAND, NVLINK, expect
from gpt.config import PRESETS, ROOT, build_config

README = (ROOT / "README.md").read_text()


def rows(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "bench/results" / name).read_text())
    return result


def test_measured_figures_are_the_data() -> None:
    ours, seed = rows("run-one-gpu-h100.json"), rows("seed-script-h100.json")
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
        for line in README.splitlines()
        if line.count("|") == 4
    }
    for column, row in enumerate((ours["rows"][0], seed["rows"][0])):
        by_layers = " / ".join(f"{row['ms_per_step_by_layers'][layers]:.1f}" for layers in ("11", "14"))
        expected = {
            "ms a step, 11 layers / 14 layers": by_layers,
            "steps": f"{row['steps']:,}",
            "BPB of EMA weights": f"{row['bpb']['ema']:.4f}",
            "BPB of artifact, plain": f"{row['bpb']['artifact']:.4f}",
            "BPB of artifact, sliding 64": f"{row['bpb']['artifact_sliding']:.4f}",
            "artifact + code, bytes (1)": f"{row['artifact_bytes'] + row['code_bytes']:,}",
            "sliding evaluation, s": f"{row['sliding_seconds']:.1f}",
        }
        for name, figure in expected.items():
            assert cells[name][column] == figure
    differences = [
        abs(ours["rows"][0]["train_loss"][step] - loss) for step, loss in seed["rows"][0]["train_loss"].items()
    ]
    assert len(differences) == 8
    assert max(differences) < 0.011
    assert "train loss at step 2000" in compare(ours, seed)


def test_steps_are_the_data() -> None:
    def table(name: str) -> dict[tuple[str, str, str], dict[str, Any]]:
        return {(row["op"], row["case"], row["impl"]): row for row in rows(name)["rows"]}

    step, optimizer = table("step-h100.json"), table("optimizer-h100.json")

    def both(table: dict[tuple[str, str, str], dict[str, Any]], op: str, case: str, key: str, digits: int) -> str:
        return " | ".join(f"{table[op, case, name][key]:.{digits}f}".ljust(6) for name in ("triton", "compiled"))

    lines = {line.split("|")[1].strip(): line for line in README.splitlines() if line.count("|") == 4}
    for name, figures in {
        "forward + backward, 14 layers": both(step, "step_forward_backward", "14-layers", "ms", 1),
        "forward + backward, 11 layers": both(step, "step_forward_backward", "11-layers", "ms", 1),
        "forward + backward, 14 layers, documents": both(step, "step_forward_backward", "14-layers-documents", "ms", 1),
        "memory of the first, GiB": both(step, "step_forward_backward", "14-layers", "memory_gib", 1),
        "optimizer, all weights": both(optimizer, "optimizer_step", "all-banks", "ms", 2),
        "Newton-Schulz of it, five iterations": both(optimizer, "newton_schulz", "all-banks", "ms", 2),
        "optimizer, one rank's share of eight": both(optimizer, "optimizer_step", "rank-of-8", "ms", 2),
    }.items():
        assert figures in lines[name]


def test_several_gpus_are_the_data() -> None:
    found = rows("scaling-h100.json")["rows"]
    steps = [row for row in found if row["op"] == "training_step"]
    assert [(row["gpus"], row["layers"]) for row in steps] == [(1, 11), (1, 14), (2, 11), (2, 14)]
    lines = {line.split("|")[1].strip(): line.split("|")[2:4] for line in README.splitlines() if line.count("|") == 4}

    def sums(key: str) -> list[str]:
        return [f"{sum(part[key] for part in row['collectives']):.2f}" for row in steps[2:]]

    for name, figures in {
        "one GPU": [f"{row['ms']:.1f}" for row in steps[:2]],
        "two GPUs": [f"{row['ms']:.1f}" for row in steps[2:]],
        "ratio": [f"{row['ratio']:.3f}" for row in steps[2:]],
        "collectives": sums("ms"),
        "collectives, with waiting": sums("ms_with_waiting"),
    }.items():
        assert [cell.strip() for cell in lines[name]] == figures
    text = README.replace("\n", " ")
    _, again, two = (row for row in found if row["op"] == "loss_curve")
    assert f"at most {two['worst_difference']:.4f}, means of 25 steps by {two['worst_mean_difference']:.4f};" in text
    assert f"again, by {again['worst_difference']:.4f} and {again['worst_mean_difference']:.4f}." in text

    alone = (round(steps[0]["ms"], 1), round(steps[1]["ms"], 1))
    assert f"--predict {alone[0]} {alone[1]}`" in text
    config = build_config(preset="seed", max_wallclock_seconds=600.0)
    eight, sixteen = expect(config, alone, 8, NVLINK), expect(config, alone, 16, INFINIBAND)
    assert f"take {eight.ms[0]:.1f} and {eight.ms[1]:.1f} ms for the seed's" in text
    assert f"{eight.steps:,} steps in 600 s" in text
    assert f"each GPU {sixteen.ms[0]:.1f} and {sixteen.ms[1]:.1f} ms, {sixteen.steps:,} steps." in text


def test_loss_differences_are_the_data() -> None:
    def last(name: str) -> dict[tuple[str, int], float]:
        return {(row["impl"], row["seed"]): sum(row["losses"][-25:]) / 25 for row in rows(name)["rows"]}

    whole, attention = last("convergence-h100.json"), last("convergence-attention-h100.json")
    first = whole["auto", 1337]
    assert f"differs by {whole['compiled', 1337] - first:.4f} nats" in README
    assert f"differ by {whole['auto', 1338] - first:.4f} (" in README
    difference = attention["auto", 1337] - attention["auto,attention=compiled", 1337]
    assert f"300 steps, by {difference:.4f}" in README.replace("\n", " ")


def test_bytes_are_the_data() -> None:
    found = {(row["case"], row["impl"]): row["bytes"] for row in rows("pack-cpu.json")["rows"]}
    seed = found["all", "seed-method"]
    for place in (
        ("all", "seed-method"),
        ("all", "information: order 0"),
        ("all", "information: order 0, equal rows once"),
        ("all", "ours"),
        ("all, live", "ours"),
    ):
        change = "" if found[place] == seed else f"{100 * (found[place] / seed - 1):.1f}% "
        assert f"| {found[place]:,.0f} | {change}|" in README


def test_presets_and_unigram_entropy_are_named() -> None:
    assert all(f"| `{preset}` |" in README for preset in PRESETS)
    assert "3.2557 bits per" in (ROOT / "data/sample/README.md").read_text()
    assert "3.2557 bits per" in README


def test_gpus_have_short_names() -> None:
    assert short_name("NVIDIA H100 80GB HBM3") == "h100"
    assert short_name("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert short_name("x86_64 CPU, 2 threads") == "cpu"
