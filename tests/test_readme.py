"""The README's measured figures are those of bench/results."""

from __future__ import annotations

import json
from math import ceil
from statistics import median
from typing import Any

import numpy as np

from bench import convergence
from bench.common import short_name
from bench.runs import compare
from bench.scaling import INFINIBAND, NVLINK, expect
from gpt.config import PRESETS, ROOT, build_config

PEERS = {
    "cudnn+xsa": "cuDNN",
    "fa4+xsa": "FlashAttention-4",
    "flex+xsa": "FlexAttention",
    "compiled": "compiled",
    "quack": "quack",
}
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
    assert f"by at most {max(differences):.3f} nats at steps 250 to 2,000" in README.replace("\n", " ")
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
    gram = {key: f"{row['ms']:.2f}" for key, row in table("optimizer-gram-h100.json").items()}
    all_banks, share = (
        [gram["newton_schulz", case, name] for name in ("gram-newton-schulz", "triton")]
        for case in ("all-banks", "rank-of-8")
    )
    text = README.replace("\n", " ")
    assert f"kernels takes {all_banks[0]} ms in a run where ours takes {all_banks[1]}, one rank's share" in text
    assert f"one rank's share {share[0]} and {share[1]} (" in text


def test_ops_are_the_data() -> None:
    places = {
        "attention, 48 rows of 2048": ("attention", "seed"),
        "attention, documents of 48 real rows": ("attention", "documents"),
        "attention, 1 row of 32,768": ("attention", "long"),
        "attention, 192 rows of 512": ("attention", "short"),
        "attention, 1 row of 2048": ("attention", "single"),
        "attention, 4 / 2 heads of 128": ("attention", "d128"),
        "attention, 16 / 2 heads of 64": ("attention", "h16-2"),
        "MLP: norm, products, activation, residual": ("mlp", "seed"),
        "attention's output product, residual": ("linear_add", "seed"),
        "mix, norm, qkv product, head norms, rotary": ("attention_input", "seed"),
        "all from the mix to attention's output, as the model calls it": ("attention_layer", "seed"),
        "norm": ("rms_norm", "seed"),
        "embedding, smear, norm": ("embed", "zipf"),
        "head product, softcap, loss and its gradient": ("linear_cross_entropy", "seed"),
    }
    table = rows("kernels-h100.json")["rows"] + rows("kernels-rest-h100.json")["rows"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.count("|") == 6]
    found = {cells[0]: cells[1:] for cells in lines}
    for name, (op, case) in places.items():
        cells = [""] * 4
        for column, phase in enumerate([""] if op == "linear_cross_entropy" else ["_forward", "_backward"]):
            times = {row["impl"]: row["ms"] for row in table if (row["op"], row["case"]) == (op + phase, case)}
            peers = {peer: ms for peer, ms in times.items() if not peer.startswith("triton")}
            ours = times.get("triton-packed", times["triton"])  # what the model calls
            cells[column], best = f"{ours:.3f}", min(peers, key=peers.__getitem__)
            cells[column + 2] = f"{peers[best]:.3f} {PEERS[best]}"
        assert found[name] == cells


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
    _, again, two = rows("scaling-curve-h100.json")["rows"]
    assert f"at most {two['worst_difference']:.4f}, means of 25 steps by {two['worst_mean_difference']:.4f};" in text
    assert f"again, by {again['worst_difference']:.4f} and {again['worst_mean_difference']:.4f} (" in text

    alone = (round(steps[0]["ms"], 1), round(steps[1]["ms"], 1))
    assert f"--predict {alone[0]} {alone[1]}`" in text
    config = build_config(preset="seed", max_wallclock_seconds=600.0)
    eight, sixteen = expect(config, alone, 8, NVLINK), expect(config, alone, 16, INFINIBAND)
    assert f"take {eight.ms[0]:.1f} and {eight.ms[1]:.1f} ms for the seed's" in text
    assert f"{eight.steps:,} steps in 600 s" in text
    assert f"each GPU {sixteen.ms[0]:.1f} and {sixteen.ms[1]:.1f} ms, {sixteen.steps:,} steps." in text


def test_fp8_is_the_data() -> None:
    text = README.replace("\n", " ")
    step = {(row["case"], row["impl"]): row["ms"] for row in rows("step-fp8-h100.json")["rows"]}
    assert f"14 layers {step['14-layers', 'triton-fp8']:.1f} ms beside {step['14-layers', 'triton']:.1f} in one" in text
    bf16, fp8 = rows("convergence-fp8-h100.json")["rows"]
    assert f"have {fp8['bpb']:.4f} BPB, without it {bf16['bpb']:.4f};" in text
    last = (np.array(fp8["losses"]) - np.array(bf16["losses"]))[-25:].mean()
    assert f"losses are {last:.4f} higher" in text


def test_scores_are_the_data() -> None:
    def table(name: str) -> list[dict[str, Any]]:
        return [row for row in rows(name)["rows"] if row["op"] != "judged"]

    found, text = table("scoring-h100.json"), README.replace("\n", " ")
    sliding = next(row for row in found if row["op"] == "sliding_score")
    assert f"whose sliding score is {sliding['bpb']:.4f} (" in text
    assert f"2,543,579 tokens takes {sliding['ms'] / 1e3:.1f} s," in text
    for form in ("chunk", "document"):
        whole, beside = (row for row in found if row["op"] == f"ttt_{form}" and row["impl"] == "triton")
        cells = next(line.split("|")[2:5] for line in README.splitlines() if line.startswith(f"| `{form}` "))
        figures = whole["gain_bpb"], beside["times_as_fast_as_plain"], whole["projection"]["seconds"]
        assert tuple(cell.strip() for cell in cells) == tuple(
            f"{x:.{n}f}" for x, n in zip(figures, (4, 1, 0), strict=True)
        )


def test_packed_is_the_data() -> None:
    found, text = rows("packed-h100.json")["rows"], README.replace("\n", " ")
    ours, dense, eager = (f"{1e3 / row['ms']:,.0f}" for row in found if row["op"] == "sample")
    assert f"writes {ours} tokens a second, {dense} with bf16 weights" in text
    assert f"same CUDA graph, {eager} without" in text
    ms = {(row["case"], row["impl"]): row["ms"] for row in found if row["op"] == "int6_linear" and "-" in row["case"]}

    def span(impl: str, *some: int) -> str:
        chosen = tuple(f"m{rows}-" for rows in some)
        times = [1e3 * each for (case, name), each in ms.items() if name == impl and case.startswith(chosen)]
        return f"{min(times):.1f} to {max(times):.1f}"

    def ratios(*some: int, impl: str = "triton", digits: int = 1) -> str:
        cases = [case for case, name in ms if name == "cublas" and case.startswith(tuple(f"m{rows}-" for rows in some))]
        found = [ms[case, "cublas"] / ms[case, impl] for case in cases]
        return f"{min(found):.{digits}f} to {max(found):.{digits}f}"

    few = 1, 4, 16
    assert f"of 1 to 16 rows takes {span('triton', *few)} us, of 64 rows {span('triton', 64)}, where" in text
    assert f"bf16's takes {span('cublas', *few, 64)}: {ratios(*few)} times as long, and {ratios(64)} at 64" in text
    assert f"torchao's products take {span('torchao', *few, 64)}, gemlite's {span('gemlite', *few, 64)} (" in text
    apart, apart64 = ratios(*few, impl="triton-apart"), ratios(64, impl="triton-apart")
    assert (
        f"ours take {span('triton-apart', *few, 64)}, and bf16's {apart} times as long, {apart64} at 64 rows." in text
    )
    assert f"a whole batch has {ratios(98304, digits=2)} of bf16's speed" in text
    for (case, name), each in ms.items():  # wanted: 1.5, and 0.9 of a whole batch
        least = 0.9 if case.startswith("m98304") else 1.5
        assert name != "triton" or least * each < ms[case, "cublas"]


def test_starts_are_the_data() -> None:
    cold, warm = rows("start-h100.json")["rows"]
    assert f"takes {cold['ms'] / 1e3:.1f} s with empty caches, {warm['ms'] / 1e3:.1f} s after that" in README
    later = max(max(row["steps_ms"]) / median(row["steps_ms"][row["recurrence_from_step"] :]) for row in (cold, warm))
    before = max(row["slowest_of_median"][0] for row in (cold, warm))
    assert max(before, later) < 1.2
    words = "no step takes more than {:.2f} times the later median, before it {:.2f} times the earlier"
    assert words.format(ceil(100 * later) / 100, ceil(100 * before) / 100) in README.replace("\n", " ")


def test_loss_differences_are_the_data() -> None:
    def curves(name: str) -> dict[tuple[str, int], np.ndarray]:
        return {(row["impl"], row["seed"]): np.array(row["losses"]) for row in rows(name)["rows"]}

    def means(losses: dict[tuple[str, int], np.ndarray], a: tuple[str, int], b: tuple[str, int]) -> np.ndarray:
        """Differences of means of 25 steps."""
        return np.convolve(losses[a] - losses[b], np.ones(25) / 25, "valid")

    def apart(losses: dict[tuple[str, int], np.ndarray], a: tuple[str, int], b: tuple[str, int]) -> str:
        return f"{convergence.apart(losses[a].tolist(), losses[b].tolist()):.4f}"

    whole, attention = curves("convergence-h100.json"), curves("convergence-attention-h100.json")
    implementations = [apart(whole, ("auto", seed), ("compiled", seed)) for seed in (1337, 1338)]
    seeds = [apart(whole, (name, 1337), (name, 1338)) for name in ("auto", "compiled")]
    text = README.replace("\n", " ")
    assert f"from step 200 on, differ by {' and '.join(implementations)} nats" in text
    assert f"two seeds of one differ by {' and '.join(seeds)} (" in text
    exchanged = ("auto", 1337), ("auto,attention=compiled", 1337)
    worst = np.abs(means(attention, *exchanged)).max()
    assert f"exchanged, 300 steps, they differ by {apart(attention, *exchanged)}, at most {worst:.4f} (" in text


def test_bytes_are_the_data() -> None:
    result = rows("pack-cpu.json")
    found = {(row["case"], row["impl"]): row["bytes"] for row in result["rows"]}
    seed = found["all", "seed-method"]
    for name in (
        "seed-method",
        "rows by size, seed-method",
        "rows by likeness, seed-method",
        "zstd",
        "lzma",
        "information: order 0",
        "information: order 0, equal rows once",
        "ours",
    ):
        change = "" if name == "seed-method" else f"{100 * (found['all', name] / seed - 1):+.1f}% "
        assert f"| {found['all', name]:,.0f} | {change}|" in README
    assert f"{result['dead_neurons']:,d} neurons" in README
    ours = next(row for row in result["rows"] if (row["case"], row["impl"]) == ("all", "ours"))
    assert f"Coding takes {ours['encode_s']:.1f} s on one CPU core, decoding {ours['decode_s']:.1f} s" in README


def test_quantising_is_the_data() -> None:
    found = {row["impl"]: row for row in rows("quantise-cpu.json")["rows"]}
    text = README.replace("\n", " ")
    for name, words in (("one clip a kind", "lose {:.4f} BPB in {:,} bytes"), ("ours", "these {:.4f} in {:,} (")):
        assert words.format(found[name]["bpb_lost"], found[name]["bytes"]) in text
    found = {row["impl"]: row for row in rows("quantise-h100.json")["rows"]}
    for name in ("seed-method", "one clip a kind", "ours"):
        assert f"| {found[name]['bytes_with_code']:,} | {found[name]['bpb_lost']:.4f}  |" in README
    seconds = (f"{found['ours'][f'{what}_s']:.1f} s" for what in ("calibrate", "quantise", "compress"))
    assert "calibration ({}), quantising ({}) and coding ({})".format(*seconds) in text


def test_presets_and_unigram_entropy_are_named() -> None:
    assert all(f"| `{preset}` |" in README for preset in PRESETS)
    assert "3.2557 bits per" in (ROOT / "data/sample/README.md").read_text()
    assert "3.2557 bits per" in README


def test_gpus_have_short_names() -> None:
    assert short_name("NVIDIA H100 80GB HBM3") == "h100"
    assert short_name("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert short_name("x86_64 CPU, 2 threads") == "cpu"
