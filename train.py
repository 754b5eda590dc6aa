"""Train a model, quantise it, write the artifact, read it back and score it.

python train.py --preset sample              all settings: --help; the seed's environment names set them too
torchrun --standalone --nproc_per_node=8 train.py
python train.py --resume runs/NAME           go on with an interrupted run
"""

# ruff: noqa: E402 - the clock starts before imports that take seconds

from __future__ import annotations

import time

BEGIN = time.perf_counter()

import argparse
import sys
from pathlib import Path

from gpt.artifact import ArtifactError, load
from gpt.bundle import count_code
from gpt.config import ROOT, Config, ConfigError, check_environment, load_config
from gpt.data import DataError, Tokenizer, calibration_batches, load_validation
from gpt.distributed import Ranks, distributed, run_program
from gpt.gptq import QuantisationError
from gpt.model import GPT
from gpt.pack import pack
from gpt.page import write_page
from gpt.record import RecordError, Run, read_config
from gpt.report import header, summarise, table
from gpt.score import Score, record_scores, score, validation_text
from gpt.trainer import Trainer, TrainingError
from gpt.ttt import pre_quant
from kernels import KernelError, select

# What a user can mend: shown without a traceback.
ERRORS = (ArtifactError, ConfigError, DataError, KernelError, QuantisationError, RecordError, TrainingError, OSError)


def main(arguments: list[str]) -> int:
    command = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    command.add_argument("--resume", type=Path, metavar="RUN")
    own, settings = command.parse_known_args(arguments)
    try:
        if own.resume and settings:
            raise ConfigError(f"--resume takes the run's own configuration; found also {' '.join(settings)}")
        config = read_config(own.resume) if own.resume else load_config(settings)
        if own.resume:
            check_environment(config)
        with distributed(config.device) as ranks:
            run_job(config, own.resume, ranks)
    except ERRORS as error:
        print(f"train.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run_job(config: Config, resumed: Path | None, ranks: Ranks) -> None:
    """The whole job of one run, on every rank. What can be refused is refused before the run has a folder."""
    ops = select(config.kernels, ranks.device)
    model = GPT(config, ops, ranks.dtype)
    config.accumulation(ranks.world_size)
    tokenizer = Tokenizer(config.tokenizer_path)
    tokenizer.require(config.vocab_size)
    text = validation_text(load_validation(config.data_path, config.vocab_size), tokenizer.byte_table(), ranks.device)
    batches = calibration_batches(config, config.gptq_calibration_batches, ranks.rank, ranks.world_size, ranks.device)

    run = Run.resume(resumed, config, ranks) if resumed else Run.create(config, ranks)
    if ranks.main:
        print(header(config, ops, ranks, run.path), flush=True)

    def scored(model: GPT, depth: tuple[int, ...], stride: int) -> Score:
        return score(
            model, text, depth, ranks, context=config.context, stride=stride, batch_tokens=config.val_batch_size
        )

    model = model.initialise(config.seed).to(ranks.device)
    trainer = Trainer(model, config, run, ranks, text.lengths.float().mean().item())
    warmup_seconds = trainer.warm_up()
    start_seconds = time.perf_counter() - BEGIN
    if ranks.main:
        print(f"ready after {start_seconds:.1f} s, {warmup_seconds:.1f} s of them warm-up", flush=True)
    trained = trainer.train(validate=lambda depth: scored(model, depth, config.context))
    scores = {"ema": scored(model, trained.depth, config.context)}
    pre_quant_seconds = pre_quant(model, trained.depth, ranks, config)
    if pre_quant_seconds:
        scores["ema_pre_quant"] = scored(model, trained.depth, config.context)

    path = run.path / "model.pga"
    packed = pack(model, trained.depth, tokenizer.sha256, batches, path, ranks, count_code(ROOT))

    artifact = load(path)  # from here on only what was read back
    restored = artifact.model(ops, ranks.device, ranks.dtype)
    scores["artifact"] = scored(restored, artifact.depth, config.context)
    scores["artifact_sliding"] = scored(restored, artifact.depth, config.eval_stride)

    if ranks.main:
        of = {name: None if name.startswith("ema") else artifact.sha256 for name in scores}
        entries = record_scores(run.path / "summary.json", scores, text, of, config.leaking)
        summary = summarise(run, trained, packed, start_seconds, warmup_seconds, pre_quant_seconds, entries)
        run.write_json("summary.json", summary)
        write_page(run.path)
        print(f"\n{packed.table()}\n\n{table(summary)}", flush=True)


if __name__ == "__main__":
    run_program(main)
