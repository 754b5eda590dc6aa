"""What a run prints at its start and its end, and the summary that goes into its record."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from gpt.config import ARTIFACT_LIMIT, Config
from gpt.distributed import Ranks
from gpt.ledger import seal
from gpt.pack import Packed
from gpt.record import Run
from gpt.trainer import Trained
from kernels import Ops

LEAKING = ("LEAKING", "the weights were trained on the tokens that they are scored on: these scores are worth nothing")


def header(config: Config, ops: Ops, ranks: Ranks, path: Path) -> str:
    """The full configuration and the implementation of each op."""
    settings = "\n".join(f"  {name:28s}{value}" for name, value in config)
    return (
        f"run {path}: {ranks.world_size} process{'es' * (ranks.world_size > 1)} on {ranks.device.type}\n"
        f"configuration\n{settings}\nimplementation of each op\n{ops.describe()}"
    )


def summarise(
    run: Run,
    trained: Trained,
    packed: Packed,
    start_seconds: float,
    warmup_seconds: float,
    pre_quant_seconds: float,
    scores: dict[str, Any],
) -> dict[str, Any]:
    """summary.json: everything the run ended with. Seconds on the clock are training, fine-tuning and calibration."""
    config = run.config
    times = [entry["ms_per_step"] for entry in run.metrics() if entry.get("ms_per_step")]
    summary = {
        "run": run.path.name,
        "leaking": config.leaking,
        "preset": config.preset,
        "seed": config.seed,
        "fingerprint": config.fingerprint(),
        "steps": trained.steps,
        "seconds": round(trained.seconds, 3),
        "pre_quant_seconds": round(pre_quant_seconds, 3),
        "calibration_seconds": round(packed.seconds["calibrate"], 3),
        "cap_seconds": config.max_wallclock_seconds,
        "start_seconds": round(start_seconds, 3),
        "warmup_seconds": round(warmup_seconds, 3),
        "ms_per_step": round(1e3 * trained.seconds / trained.steps, 3) if trained.steps else None,
        "ms_per_step_median": statistics.median(times) if times else None,
        "tokens_per_second": round(trained.steps * config.train_batch_tokens / trained.seconds)
        if trained.steps
        else None,
        "train_loss": trained.train_loss if math.isfinite(trained.train_loss) else None,
        "depth": trained.depth,
        "memory_gib": None if trained.memory_gib is None else round(trained.memory_gib, 2),
        "scores": scores,
        "artifact": packed.as_dict(),
    }
    return seal(summary)


def table(summary: dict[str, Any]) -> str:
    """The one table of a run."""
    scores, artifact = summary["scores"], summary["artifact"]
    on_clock = summary["seconds"] + summary["pre_quant_seconds"] + summary["calibration_seconds"]
    cap = summary["cap_seconds"]
    within = f", {'within' if on_clock <= cap else 'OVER'} the cap of {cap:g} s" if cap else ""
    over = artifact["total_nbytes"] - ARTIFACT_LIMIT
    sliding = scores["artifact_sliding"]
    rows = [
        ("steps", f"{summary['steps']:,}"),
        ("training + calibration", f"{summary['seconds']:.1f} s + {summary['calibration_seconds']:.1f} s{within}"),
    ]
    if summary["steps"]:
        rows += [
            ("ms a step", f"{summary['ms_per_step']:.1f}"),
            ("tokens/s", f"{summary['tokens_per_second']:,}"),
        ]
    if "ema_pre_quant" in scores:
        rows += [
            ("fine-tuning on the clock", f"{summary['pre_quant_seconds']:.1f} s"),
            ("BPB fine-tuned", f"{scores['ema_pre_quant']['bpb']:.4f}"),
        ]
    rows += [
        ("BPB of EMA weights", f"{scores['ema']['bpb']:.4f}"),
        ("BPB of artifact, plain", f"{scores['artifact']['bpb']:.4f}"),
        (f"BPB of artifact, sliding {sliding['stride']}", f"{sliding['bpb']:.4f}"),
        (
            "artifact + code (LZMA)",
            f"{artifact['nbytes']:,} + {artifact['code_nbytes']:,} = {artifact['total_nbytes']:,} bytes",
        ),
        ("limit", f"{ARTIFACT_LIMIT:,} bytes, {abs(over):,} {'OVER' if over > 0 else 'to spare'}"),
        ("artifact sha256", artifact["sha256"]),
    ]
    if summary["leaking"]:
        rows.insert(0, LEAKING)
        rows.append(LEAKING)
    width = max(len(name) for name, _ in rows) + 2
    rule = "-" * (width + max(len(value) for _, value in rows))
    return "\n".join([rule, *(f"{name:{width}s}{value}" for name, value in rows), rule])
