"""Scoring in every form, beside straightforward implementations, and what it would take for all of FineWeb.

    python -m bench.scoring --tokens data/fineweb_val_000000.bin --artifact runs/NAME/model.pga --tokenizer BPE.model
    python -m bench.scoring --tokens data/fineweb_train_000000.bin --limit-tokens 1000000     with random weights
    python -m bench.scoring --tokens TRAIN_SHARD --limit-tokens 262145 --artifact ... --tokenizer ... --subset 0 \\
        --ttt chunk,lr=0.002 --ttt chunk,lr=0.01 --ttt document,lr=2e-4 --out sweep.json      what settings gain

Sliding and plain scoring run over all tokens, test-time training on the first --ttt-tokens: their gain is over sliding
on the same tokens. `plain` is the straightforward implementation beside each, on the first tokens alone (--subset; for
`chunk` at least two chunks that train; for `document` a quarter, since it takes one after the other), where ours runs
once more: eager ops, 32 windows at a time, logits of every position, the host waiting for each loss; for `document` its
whole matrices made for every piece. Both have run on the first part of them, a step of training included, before they
are timed. There is no speed where the two disagree by more than 0.3% of the nats (bf16; in float32 tests/test_score.py
compares to 1e-6, in float64 tests/test_ttt.py to 1e-6 nats a token).

The projection is for 40,540,160 tokens on 8 GPUs, from what was measured on one, compiling not counted:

    sliding     seconds * (40,540,160 / tokens) / 8
    chunk       that, and 40,540,160 / 32,768 chunks * 3 epochs * (a step of 2 rows + its all-reduce). A step: chunks of
                4,096 tokens in steps of 2 rows, less the seconds of sliding over the same text, by the number of steps.
                All-reduce: 2 * 7/8 * 4 bytes of every weight at 100 GB/s, an assumption, not a measurement
    document    40,540,160 / 64 pieces * (seconds of a piece whose window is full) / 8, as if no window of any document
                were shorter than the context: an estimate, since documents end in pieces that are not whole, and
                batches do not stay full. A full piece: documents of 1 1/4 contexts, less those of one, by the number
                of pieces between. Beside it `as_measured_s`: the seconds of the tokens at hand, scaled

Writes bench/results/scoring-<gpu>.json after each part: seconds, tokens/s, nats per token, BPB, FLOPs of products and
attention; in a form's row its gain and projection; and a row `judged` for each figure that something is asked of. A
part that fails is said and left out, and the exit code is 1 then, or where the two disagree.
"""

from __future__ import annotations

import argparse
import math
import operator
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import ceilings, read_tokens, write_result
from gpt.artifact import ArtifactError, load
from gpt.config import BOS, ConfigError, build_config
from gpt.data import DataError
from gpt.distributed import Ranks
from gpt.model import GPT, Matrices
from gpt.score import Score, ValidationText, score, validation_text
from gpt.tokenizer import Tokenizer
from gpt.ttt import Chunk, Document, Form, Phased, adapt, documents_of, parse_form
from kernels import select

FINEWEB, GPUS, LIMIT = 40_540_160, 8, 400.0  # tokens, and the seconds that they may take with test-time training
BUS = 100.0  # GB/s of an all-reduce, for the projection
SEED_TOKENS, SEED_SECONDS = 2_543_580, 64.8  # sliding in the seed's script: bench/results/seed-script-h100.json
TOLERANCE, DISAGREEMENT = 3e-3, "relative difference of nats from straightforward"
Plain = Callable[[GPT, ValidationText], list[float]]


# The straightforward implementations. Each returns nats of every target, and keeps no ledger.


def plain_windows(
    model: GPT, tokens: Tensor, depth: Sequence[int], context: int, stride: int, first: int, last: int
) -> list[float]:
    """Nats of targets first..last-1: 32 windows at a time, all their logits, of which each gives its last ones."""
    found: list[float] = []
    groups = list(range(first if first else context, last, stride))
    windows = [(0, 0, min(context, last))] if first == 0 else []
    windows += [(group + stride - context, group, min(group + stride, last)) for group in groups]
    for begin in range(0, len(windows), 32):
        batch = windows[begin : begin + 32]
        index = torch.tensor([window[0] for window in batch], device=tokens.device)[:, None]
        index = index + torch.arange(context, device=tokens.device)
        inputs, targets = (tokens[(index + ahead).clamp_max(tokens.numel() - 1)] for ahead in (0, 1))
        with torch.no_grad():
            losses = model.losses(inputs, targets, depth, model.rotary(context))
        for row, (start, low, high) in enumerate(batch):
            found += losses[row, low - start : high - start].tolist()
    return found


def plain_chunk(
    model: GPT, tokens: Tensor, depth: Sequence[int], context: int, stride: int, form: Chunk
) -> list[float]:
    """Chunks scored in windows, then torch.optim.SGD on their rows."""
    count, found = tokens.numel() - 1, list[float]()
    optimizer = torch.optim.SGD(model.parameters(), form.lr, form.momentum)
    ends = [*range(form.tokens, count, form.tokens), count]
    for number, end in enumerate(ends):
        start = ends[number - 1] if number else 0
        found += plain_windows(model, tokens, depth, context, stride, start, end)
        if end == count:
            break
        rate = form.lr * 0.5 * (1 + np.cos(np.pi * number / (len(ends) - 1)))
        rows = tokens[start : end + 1].unfold(0, context + 1, context)
        for _ in range(form.epochs):
            for part in rows.split(form.rows):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                loss = model(part[:, :-1], part[:, 1:], depth, model.rotary(context))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), form.clip)
                optimizer.step()
                loss.item()
    return found


def plain_document(
    model: GPT, tokens: Tensor, depth: Sequence[int], context: int, documents: list[tuple[int, int]], form: Document
) -> list[float]:
    """One document after the other: W + scale B A whole, every piece of it forward and backward, torch.optim.Adam."""
    config, found = model.config, list[float]()
    dim, layers, device = config.model_dim, config.num_layers, tokens.device
    base = Matrices(*([x.detach() for x in part] for part in model.matrices()))
    shapes = [(config.num_kv_heads * config.head_dim, dim), (dim, dim), (config.mlp_dim, dim), (dim, config.mlp_dim)]
    generator = torch.Generator().manual_seed(form.seed)
    random = [torch.randn(layers, form.rank, n, generator=generator).to(device) * n**-0.5 for _, n in shapes]
    for first, last in documents:
        a = [x.clone().requires_grad_() for x in random]
        b = [torch.zeros(layers, m, form.rank, device=device, requires_grad=True) for m, _ in shapes]
        optimizer = torch.optim.Adam([*a, *b], form.lr, betas=(form.beta1, form.beta2), eps=1e-8)
        for start in range(first, last, form.tokens):
            end = min(start + form.tokens, last)
            k, o, up, down = (form.scale * y @ x for x, y in zip(a, b, strict=True))
            k = torch.nn.functional.pad(k, (0, 0, dim, k.size(1)))
            o, down = model.attn_scale[:, :, None] * o, model.mlp_scale[:, :, None] * down
            changes = (x.to(model.dtype).unbind() for x in (k, o, up, down))
            weights = Matrices(
                *([w + c for w, c in zip(*pair, strict=True)] for pair in zip(base, changes, strict=True))
            )
            row = tokens[None, max(first, start + form.tokens - context) : end]
            x = model.hidden(row, depth, model.rotary(row.size(1)), matrices=weights)[:, start - end :]
            losses = model.ops.linear_cross_entropy(
                x, model.tok_emb.to(model.dtype), tokens[None, start + 1 : end + 1], config.logit_softcap, "none"
            )
            found += losses[0].tolist()
            if end < last:
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
    return found


# Measuring.


def flops(model: GPT, depth: Sequence[int], rows: int, context: int, scored: int) -> float:
    """Products and causal attention of a forward pass, the last layer and the head where they are wanted."""
    config = model.config
    dim, kv = config.model_dim, 2 * config.num_kv_heads * config.head_dim
    layer = 2 * dim * (2 * dim + kv + 2 * config.mlp_dim) + 2 * dim * (context + 1)
    last = 2 * dim * (dim + kv) * context + (2 * dim * (dim + 2 * config.mlp_dim) + 4 * dim * context) * scored
    return rows * ((len(depth) - 1) * layer * context + last + 2 * dim * config.vocab_size * scored)


class Bench:
    """What is measured, on what, and the rows so far."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.ours = "triton" if device.type == "cuda" else "reference"  # what `auto` is there
        torch.set_float32_matmul_precision("high")
        self.ranks = Ranks(0, 1, device)
        if options.artifact:
            artifact = load(options.artifact)
            self.config, self.depth, state = artifact.config, artifact.depth, artifact.state_dict()
        else:
            self.config = build_config(preset="one-gpu")
            self.depth = self.config.depth(True)
            made = GPT(self.config, select("reference", torch.device("cpu"))).initialise(0)
            with torch.no_grad():  # zero at first, and nothing would depend on anything
                for bank in (made.qo_bank[self.config.num_layers :], made.mlp_down_bank):
                    bank.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
            state = made.state_dict()
        if options.documents:
            self.config = self.config.model_copy(update={"document_mask": True})
        self.context = self.config.context
        self.model, self.plain = (self._model(kernels, state) for kernels in ("auto", "reference"))
        size = (options.tokens.stat().st_size - 1024) // 2
        tokens = read_tokens(options.tokens, min(size, options.limit_tokens or size))
        if options.tokenizer:
            table = Tokenizer(options.tokenizer).byte_table()
            self.text = validation_text(tokens.numpy().astype(np.uint16), table, device)
        else:
            self.text = unmeasured(tokens.to(device))
        self.measured = ceilings() if device.type == "cuda" else {}
        self.rows: list[dict[str, Any]] = []
        self.sliding: Score | None = None  # over all tokens
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{name}: {self.measured}; {tokens.numel():,d} tokens, {len(documents_of(self.text))} documents"
              f"{', masked' if self.config.document_mask else ''}", flush=True)  # fmt: skip

    def _model(self, kernels: str, state: dict[str, Tensor]) -> GPT:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = GPT(self.config, select(kernels, self.device), dtype)
        model.load_state_dict(state)
        return model.to(self.device).eval().requires_grad_(False)

    def first(self, tokens: int) -> ValidationText:
        return ValidationText(self.text.tokens[:tokens], self.text.lengths[: tokens - 1])

    def score(self, text: ValidationText, form: Form | None = None, stride: int | None = None) -> Score:
        stride, batch = stride or self.options.stride, self.options.batch_tokens
        where = (self.model, text, self.depth, self.ranks)
        if form is None:
            return score(*where, context=self.context, stride=stride, batch_tokens=batch)
        return adapt(*where, form, context=self.context, stride=stride, batch_tokens=batch)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bpb(self, nats: Tensor) -> float | None:
        """Of the first targets, from the nats of each; None without a tokenizer."""
        size = int(self.text.lengths[: nats.numel()].sum())
        return float(nats.double().sum()) / math.log(2) / size if self.options.tokenizer else None

    def note(self, op: str, impl: str, seconds: float | None, nats: Tensor, work: float = 0.0) -> dict[str, Any]:
        """Add a row, which it returns; seconds: None where there is no speed to speak of."""
        count, bpb = nats.numel(), self.bpb(nats)
        tflops = work / seconds / 1e12 if seconds else 0.0
        ceiling = self.measured.get("bf16_tflops")
        row = {
            "op": op, "case": f"{self.options.tokens.stem}-{count}{'-masked' if self.config.document_mask else ''}",
            "impl": impl, "ms": round(1e3 * seconds, 1) if seconds else None,
            "tflops": round(tflops, 1) if tflops else None, "gb_s": None,
            "percent_of_ceiling": round(100 * tflops / ceiling, 1) if tflops and ceiling else None,
            "seconds": round(seconds, 3) if seconds else None, "tokens": count,
            "tokens_per_s": round(count / seconds) if seconds else None,
            "nats_per_token": round(float(nats.double().mean()), 6), "bpb": bpb,
        }  # fmt: skip
        self.rows.append(row)
        speed = f"{seconds:9.3f} s {count / seconds:12,.0f} tokens/s" if seconds else f"{'no speed':>31s}"
        print(f"{op:28s} {row['case']:36s} {impl:9s}{speed}  {row['nats_per_token']:9.5f} nats/token"
              + (f"  {bpb:8.5f} BPB" if bpb else "") + (f"  {tflops:5.0f} TFLOP/s" if tflops else ""),
              flush=True)  # fmt: skip
        return row

    def judge(self, what: str, found: float, sign: str, wanted: float) -> None:
        """A row that says whether a figure is what was wanted."""
        met = {"<": operator.lt, ">": operator.gt, ">=": operator.ge}[sign](found, wanted)
        self.rows.append({
            "op": "judged", "case": what, "impl": self.ours, "ms": None, "tflops": None, "gb_s": None,
            "percent_of_ceiling": None, "found": found, "wanted": f"{sign} {wanted:g}", "met": met,
        })  # fmt: skip
        print(f"{what}: {found:.4g}, wanted {self.rows[-1]['wanted']}: {'met' if met else 'NOT met'}", flush=True)

    def project(self, row: dict[str, Any], seconds: float, formula: str, **numbers: float) -> None:
        row["projection"] = {
            "tokens": FINEWEB, "gpus": GPUS, "seconds": round(seconds, 2), "formula": formula, **numbers
        }  # fmt: skip
        print(f"{FINEWEB:,d} tokens on {GPUS} GPUs, {row['op']}: {formula} = {seconds:.0f} s; {numbers}", flush=True)
        if row["op"] != "sliding_score":
            self.judge(f"{row['op']}: seconds for {FINEWEB:,d} tokens on {GPUS} GPUs", round(seconds, 2), "<", LIMIT)

    def beside(self, op: str, plain: Plain, part: int, warm: int, form: Form | None = None) -> None:
        """A straightforward implementation and ours on the first `part` tokens, both run on `warm` of them before."""
        text = self.first(part)
        self.score(self.first(warm), form)
        ours = self.score(text, form)
        weights = list(self.plain.parameters())
        saved = [weight.detach().clone() for weight in weights]
        try:
            for tokens in (self.first(warm), text):
                for weight, value in zip(weights, saved, strict=True):
                    weight.requires_grad_(False).copy_(value).requires_grad_(isinstance(form, Chunk))
                self.synchronize()
                begin = time.perf_counter()
                found = plain(self.plain, tokens)
                self.synchronize()
                seconds = time.perf_counter() - begin
        finally:
            for weight, value in zip(weights, saved, strict=True):
                weight.requires_grad_(False).copy_(value).grad = None
        exact = torch.tensor(found, dtype=torch.float64)
        log = ours.log.double().cpu()
        off = abs(float(log.sum() / exact.sum()) - 1)
        right = off < TOLERANCE  # not where it is NaN
        row = self.note(op, self.ours, ours.seconds if right else None, log)
        self.note(op, "plain", seconds if right else None, exact)
        row["nats_off"], row["worst_nats_off"] = off, float((log - exact).abs().max())
        print(f"{op}: nats differ by {100 * off:.4f}% in all, by {row['worst_nats_off']:.4f} at a token", flush=True)
        self.judge(f"{op}: {DISAGREEMENT}", off, "<", TOLERANCE)
        if right:
            row["times_as_fast_as_plain"] = round(seconds / ours.seconds, 2)
            print(f"{op}: {row['times_as_fast_as_plain']} times as fast as the straightforward one", flush=True)
            if form is not None:
                self.judge(f"{op}: times as fast as straightforward", row["times_as_fast_as_plain"], ">=", 2)

    def sliding_whole(self) -> None:
        count = self.text.targets
        for op, stride in (("plain_score", self.context), ("sliding_score", self.options.stride)):
            found = self.score(self.text, stride=stride)
            rows = max(1, count // stride)
            work = flops(self.model, self.depth, rows, self.context, stride) if not self.config.document_mask else 0.0
            row = self.note(op, self.ours, found.seconds, found.log, work)
        self.sliding = found
        self.project(row, found.seconds * FINEWEB / count / GPUS, "seconds * fineweb / tokens / gpus")
        if count + 1 == SEED_TOKENS:
            row["times_as_fast_as_the_seeds_script"] = round(SEED_SECONDS / found.seconds, 2)
            self.judge(f"sliding_score: times as fast as the seed's script, {SEED_SECONDS} s on one H100",
                       SEED_SECONDS / found.seconds, ">=", 3)  # fmt: skip

    def sliding_beside(self) -> None:
        self.beside("sliding_score", lambda model, text: plain_windows(
            model, text.tokens.long(), self.depth, self.context, self.options.stride, 0, text.targets),
            self.options.subset, min(self.options.subset, 2 * self.context + 1))  # fmt: skip

    def form(self, name: str, form: Form) -> None:
        """Score the tokens for test-time training and say what is gained over sliding, whose windows are the same."""
        found = self.score(self.first(self.options.ttt_tokens), form)
        op = f"ttt_{name}"
        row = self.note(op, self.ours, found.seconds, found.log)
        row["settings"] = found.settings
        if self.sliding is None:
            raise RuntimeError("sliding was not measured, nothing to compare with")
        sliding = self.sliding.log[: found.tokens]
        row["sliding_nats_per_token"], row["sliding_bpb"] = float(sliding.double().mean()), self.bpb(sliding)
        row["gain_nats_per_token"] = float((sliding.double() - found.log.double()).mean())
        bits = row["sliding_bpb"] - row["bpb"] if row["bpb"] else None
        row["gain_bpb"] = bits
        print(f"{op}: {row['gain_nats_per_token']:.5f} nats a token"
              + (f", {bits:.5f} BPB" if bits is not None else "") + " better than sliding", flush=True)  # fmt: skip
        if self.options.subset and bits is not None:
            self.judge(f"{op}: BPB gained over sliding, on {found.tokens:,d} tokens", bits, ">", 0)

    def form_beside(self, name: str, form: Form) -> None:
        part, op = self.options.subset, f"ttt_{name}"
        if isinstance(form, Chunk):  # two chunks that train, where the subset has them
            warm = form.tokens + self.context + 1
            self.beside(op, lambda model, text: plain_chunk(
                model, text.tokens.long(), self.depth, self.context, self.options.stride, form),
                max(part, 2 * form.tokens + self.context + 1), warm, form)  # fmt: skip
        elif isinstance(form, Document):
            part = max(2, part // 4)  # a document at a time takes long
            self.beside(op, lambda model, text: plain_document(
                model, text.tokens.long(), self.depth, self.context, documents_of(text), form),
                part, min(part, 8 * form.tokens + 1), form)  # fmt: skip

    def project_form(self, name: str, form: Chunk | Document) -> None:
        row = next((row for row in self.rows if row["op"] == f"ttt_{name}"), None)
        if row is None:
            raise RuntimeError(f"{name} was not measured, nothing to project")
        if isinstance(form, Chunk):
            self.project_chunk(row, form)
        else:
            self.project_document(row, form)

    def project_chunk(self, row: dict[str, Any], form: Chunk) -> None:
        if self.sliding is None:
            raise RuntimeError("sliding was not measured")
        rows = max(1, form.rows // GPUS)
        part = self.first(16 * rows * self.context + 1)
        small = replace(form, rows=rows, tokens=rows * self.context)
        chunks = len(range(small.tokens, part.targets, small.tokens))  # that train
        seconds = self.score(part, small).seconds - self.score(part).seconds
        step = seconds / (form.epochs * chunks)
        reduce = 2 * (GPUS - 1) / GPUS * 4e-9 * sum(p.numel() for p in self.model.parameters()) / BUS
        sliding = self.sliding.seconds * FINEWEB / self.sliding.tokens / GPUS
        steps = FINEWEB // form.tokens * form.epochs * -(-form.tokens // self.context // form.rows)
        self.project(
            row, sliding + steps * (step + reduce), "sliding_s + steps * (step_s + all_reduce_s)",
            sliding_s=sliding, steps=steps, step_s=step, all_reduce_s=reduce, rows_per_gpu=rows, assumed_bus_gb_s=BUS,
        )  # fmt: skip

    def project_document(self, row: dict[str, Any], form: Document) -> None:
        more, seconds = max(1, self.context // form.tokens // 4), []
        for length in (self.context, self.context + more * form.tokens):
            lines = torch.randint(BOS + 1, self.config.vocab_size, (form.documents, length), device=self.device)
            lines[:, 0] = BOS
            seconds.append(self.score(unmeasured(lines.flatten()), form).seconds)
        piece = (seconds[1] - seconds[0]) / (form.documents * more)
        self.project(
            row, FINEWEB / form.tokens * piece / GPUS, "fineweb / piece_tokens * full_piece_s / gpus, an estimate",
            piece_tokens=form.tokens, full_piece_s=piece,
            as_measured_s=row["seconds"] * FINEWEB / row["tokens"] / GPUS,
        )  # fmt: skip


def unmeasured(tokens: Tensor) -> ValidationText:
    """Text whose bytes nobody asks for."""
    return ValidationText(tokens.int(), torch.ones(tokens.numel() - 1, dtype=torch.int16, device=tokens.device))


def parts(bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, in order of what is needed most: each is written down before the next."""
    options = bench.options
    yield "sliding", bench.sliding_whole
    if options.subset:
        yield "sliding beside straightforward windows", bench.sliding_beside
    for name in options.ttt:
        form = parse_form(name)
        yield name, partial(bench.form, name, form)
        if options.subset and not isinstance(form, Phased):
            yield f"{name}, projected", partial(bench.project_form, name, form)
            yield f"{name} beside the straightforward implementation", partial(bench.form_beside, name, form)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description="Time every form of scoring.")
    parser.add_argument("--tokens", type=Path, required=True, help="a token shard")
    parser.add_argument("--limit-tokens", type=int, help="tokens of it; default: all")
    parser.add_argument("--ttt", action="append", metavar="FORM", help="as quantize.py's, several times; "
                        "default: chunk and document")  # fmt: skip
    parser.add_argument("--ttt-tokens", type=int, default=524_289, help="of these, for test-time training")
    parser.add_argument("--subset", type=int, default=65_537, help="tokens for the straightforward implementations; "
                        "0: neither these nor projections")  # fmt: skip
    parser.add_argument("--artifact", type=Path, help="model.pga; default: random weights, of the preset one-gpu")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, for BPB")
    parser.add_argument("--documents", action="store_true", help="mask documents, whatever the artifact says")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=524_288)
    parser.add_argument("--out", type=Path, help="result file; default bench/results/scoring-<gpu>.json")
    options = parser.parse_args(arguments)
    options.ttt = list(dict.fromkeys(options.ttt or ["chunk", "document"]))
    command, failed = "python -m bench.scoring " + " ".join(arguments), False
    try:
        for name in options.ttt:
            parse_form(name)  # before anything is measured
        bench = Bench(options, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    except (ArtifactError, ConfigError, DataError, OSError) as error:
        print(f"bench.scoring: {error}", file=sys.stderr)
        return 2
    for what, part in parts(bench):
        begin = time.perf_counter()
        try:
            part()
        except Exception:  # what was measured before is kept, and what comes behind may be well
            failed = True
            print(f"bench.scoring: {what}: failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if bench.rows:
            path, _ = write_result("scoring", command, bench.measured, bench.rows, options.out)
            print(f"    {what}: {time.perf_counter() - begin:.1f} s in all; {path}", flush=True)
    disagree = any(DISAGREEMENT in row["case"] and not row["met"] for row in bench.rows if row["op"] == "judged")
    return int(failed or disagree)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
