"""What quantising a finished run's weights costs, beside the seed's method on the same weights.

    python -m bench.quantise RUN
    python -m bench.quantise RUN --limit 1103589      of artifact and code: where the run's model would fill no 16 MB

Writes bench/results/quantise-<gpu>.json, a row for each of: the EMA weights as they are ("trained"); the seed's method,
a clip of 12.85 standard deviations for all rows of matrices and 20 for the embedding's, codes shuffled with a stride of
2 and compressed by Brotli 11; clips in the same proportion, searched until the artifact fills the limit, with our coder
("one clip a kind"); and ours, a clip for every row. `bpb` is plain scoring of what was read back, on all validation
tokens; `bytes` are the artifact's, `bytes_with_code` are to be compared with the limit; `calibrate_s` is how long
training data was read.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.common import RESULTS, short_name, write_result
from bench.pack import PROGRAMS
from gpt.artifact import load
from gpt.bundle import count_code
from gpt.config import ARTIFACT_LIMIT, ROOT
from gpt.data import calibration_batches, load_validation
from gpt.distributed import Ranks, distributed
from gpt.gptq import Quantised
from gpt.model import BANKS, GPT
from gpt.pack import Packed, pack
from gpt.record import Run, read_config
from gpt.score import score, validation_text
from gpt.tokenizer import Tokenizer
from kernels import select
from quantize import ERRORS

SEED = dict.fromkeys(BANKS, 12.85) | {"tok_emb": 20.0}


def collect(path: Path, ranks: Ranks, limit: int = ARTIFACT_LIMIT) -> list[dict[str, Any]]:
    """All rows. Raises RecordError where the run has not finished."""
    config = read_config(path)
    state = Run(path, config, ranks).load_finished()
    tokenizer, code = Tokenizer(config.tokenizer_path), count_code(ROOT)
    ops = select(config.kernels, ranks.device)
    model = GPT(config, ops, ranks.dtype)
    model.load_state_dict(state["optimizer"]["ema"])
    model.to(ranks.device)
    depth = config.depth_at(max(state["step"] - 1, 0))
    tokens = load_validation(config.data_path, config.vocab_size)
    text = validation_text(tokens, tokenizer.byte_table(), ranks.device)

    def bpb(scored: GPT) -> float:
        context = config.context
        found = score(scored, text, depth, ranks, context=context, stride=context, batch_tokens=config.val_batch_size)
        return found.bpb

    def packed(clips: dict[str, float] | None, limit: int = limit) -> tuple[Packed, dict[str, Any]]:
        batches = calibration_batches(config, config.gptq_calibration_batches, 0, 1, ranks.device)
        made = pack(model, depth, tokenizer.sha256, batches, Path(folder) / "a", ranks, code, limit, clips)
        row = {
            "bytes": made.nbytes,
            "bytes_with_code": made.total_nbytes,
            "bpb": bpb(load(made.path).model(ops, ranks.device, ranks.dtype)),
            "attempts": made.attempts,
            "clip": {group.name: group.clip_sigmas for group in made.groups},
            "bits": {group.name: group.bits for group in made.groups},
            "output_error": {group.name: group.output_error for group in made.groups},
        }
        return made, row | {f"{name}_s": seconds for name, seconds in made.seconds.items()}

    rows: dict[str, dict[str, Any]] = {"trained": {"bpb": bpb(model)}}
    with TemporaryDirectory() as folder:
        made, row = packed(SEED, 2 * ARTIFACT_LIMIT)
        ours = sum(group.nbytes for group in made.groups)
        theirs = 0
        for value in load(made.path).tensors.values():
            if isinstance(value, Quantised):
                codes = value.codes.numpy().reshape(-1, *value.codes.shape[-2:])
                theirs += len(PROGRAMS["seed-method"][0](codes))
        rows["seed-method"] = row | {"bytes": row["bytes"] - ours + theirs, "bytes_by_our_coder": row["bytes"]}
        rows["seed-method"]["bytes_with_code"] += theirs - ours
        finer = config.matrix_clip_sigmas / SEED[BANKS[0]]
        rows["one clip a kind"] = packed({name: finer * clip for name, clip in SEED.items()})[1]
        rows["ours"] = packed(None)[1]
    return [
        {"op": "quantise", "case": path.name, "impl": name, **row, "bpb_lost": row["bpb"] - rows["trained"]["bpb"]}
        for name, row in rows.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "bytes_with_code": "16,d", "bpb": "10.5f", "bpb_lost": "10.5f",
        "calibrate_s": "12.2f", "quantise_s": "11.2f", "compress_s": "11.2f",
    }  # fmt: skip
    widths = {name: int(form.split(",")[0].split(".")[0]) for name, form in columns.items()}
    lines = [f"{'':18s}" + "".join(f"{name:>{width}s}" for name, width in widths.items())]
    for row in rows:
        cells = [f"{row[name]:{form}}" if name in row else " " * widths[name] for name, form in columns.items()]
        lines.append(f"{row['impl']:18s}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantise", description="Measure what quantising costs.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--limit", type=int, default=ARTIFACT_LIMIT, help="bytes of artifact and code")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    options = parser.parse_args(arguments)
    try:
        with distributed("auto") as ranks:
            rows = collect(options.run, ranks, options.limit)
    except ERRORS as error:
        print(f"bench.quantise: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "bench.quantise", *arguments])
    name = short_name(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    write_result("quantise", command, {}, rows, options.results / f"quantise-{name}.json")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
