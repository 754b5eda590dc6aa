"""Scoring in every form, beside straightforward implementations, and what it would take for all of FineWeb.

    python -m bench.scoring --tokens data/fineweb_val_000000.bin --artifact runs/NAME/model.pga --tokenizer BPE.model
    python -m bench.scoring --tokens data/fineweb_train_000000.bin --count 1000000       a model with random weights

`triton` is ours. `plain` is the straightforward implementation beside it, on the first --subset tokens, where ours runs
once more: eager ops, 32 windows at a time, logits of every position, the host waiting for each loss; for `document` one
document after the other, its whole matrices made for every piece. Values come first: no speed is printed where the two
disagree by more than 0.3% of the nats (bf16; in float32 tests/test_score.py and tests/test_ttt.py compare to 1e-6).

The projection is for 40,540,160 tokens on 8 GPUs, from what was measured on one, compiling not counted:

    sliding     seconds * (40,540,160 / tokens) / 8
    chunk       that, and 40,540,160 / 32,768 chunks * 3 epochs * (a step of 2 rows + its all-reduce). A step: chunks of
                4,096 tokens in steps of 2 rows, less the seconds of sliding over the same text, by the number of steps.
                All-reduce: 2 * 7/8 * 4 bytes of every weight at --bus GB/s, an assumption, not a measurement
    document    at most 40,540,160 / 64 pieces * (seconds of a piece whose window is full) / 8, as if no window of any
                document were shorter than the context. A full piece: --long documents of twice the context, less those
                of one context, by the number of pieces between

Writes bench/results/scoring-<gpu>.json: seconds, tokens/s, nats per token, BPB, and FLOPs of products and attention.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import ceilings, read_tokens, write_result
from gpt.artifact import load
from gpt.config import BOS, build_config
from gpt.distributed import Ranks
from gpt.model import GPT, Matrices
from gpt.score import Score, ValidationText, score, validation_text
from gpt.tokenizer import Tokenizer
from gpt.ttt import Chunk, Document, Form, adapt, documents_of, parse_form
from kernels import select

FINEWEB, GPUS = 40_540_160, 8
TOLERANCE = 3e-3


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

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, device = options, torch.device("cuda", 0)
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
        self.case = "documents" if self.config.document_mask else "seed"
        self.context = self.config.context
        self.model, self.plain = (self._model(kernels, state) for kernels in ("auto", "reference"))
        size = (options.tokens.stat().st_size - 1024) // 2
        self.tokens = read_tokens(options.tokens, min(size, options.count or size)).to(device)
        self.measured = ceilings()
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        print(f"{torch.cuda.get_device_name()}: {self.measured}; {self.tokens.numel():,d} tokens, "
              f"{len(documents_of(self.text(self.tokens)))} documents, {self.case}", flush=True)  # fmt: skip

    def _model(self, kernels: str, state: dict[str, Tensor]) -> GPT:
        model = GPT(self.config, select(kernels, self.ranks.device), torch.bfloat16)
        model.load_state_dict(state)
        return model.to(self.ranks.device).eval().requires_grad_(False)

    def text(self, tokens: Tensor) -> ValidationText:
        """With the bytes of each token; 1 for each where no tokenizer is given."""
        if self.options.tokenizer:
            table = Tokenizer(self.options.tokenizer).byte_table()
            return validation_text(tokens.cpu().numpy().astype(np.uint16), table, self.ranks.device)
        return ValidationText(tokens.int(), torch.ones(tokens.numel() - 1, dtype=torch.int16, device=tokens.device))

    def score(self, tokens: Tensor, form: Form | None = None, stride: int | None = None) -> Score:
        text, stride, batch = self.text(tokens), stride or self.options.stride, self.options.batch_tokens
        where = (self.model, text, self.depth, self.ranks)
        if form is None:
            return score(*where, context=self.context, stride=stride, batch_tokens=batch)
        return adapt(*where, form, context=self.context, stride=stride, batch_tokens=batch)

    def note(self, op: str, impl: str, seconds: float, nats: Sequence[float] | Tensor, work: float = 0.0) -> None:
        nats = torch.as_tensor(nats, dtype=torch.float64).cpu()
        size = int(self.text(self.tokens[: nats.numel() + 1]).lengths.sum()) if self.options.tokenizer else 0
        bpb = float(nats.sum()) / np.log(2) / size if size else None
        tflops = work / seconds / 1e12
        self.rows.append({
            "op": op, "case": self.case if nats.numel() == self.tokens.numel() - 1 else f"{self.case}-{nats.numel()}",
            "impl": impl, "ms": round(1e3 * seconds, 1), "tflops": round(tflops, 1) if work else None, "gb_s": None,
            "percent_of_ceiling": round(100 * tflops / self.measured["bf16_tflops"], 1) if work else None,
            "seconds": round(seconds, 3), "tokens": nats.numel(), "tokens_per_s": round(nats.numel() / seconds),
            "nats_per_token": round(float(nats.mean()), 6), "bpb": bpb,
        })  # fmt: skip
        print(f"{op:18s}{self.rows[-1]['case']:18s}{impl:8s}{seconds:9.3f} s {nats.numel():10,d} tokens "
              f"{nats.numel() / seconds:12,.0f} tokens/s  {float(nats.mean()):9.5f} nats/token"
              + (f"  {bpb:8.5f} BPB" if bpb else "") + (f"  {tflops:5.0f} TFLOP/s" if work else ""),
              flush=True)  # fmt: skip

    def beside(self, op: str, plain: Any, form: Form | None = None) -> None:
        """A straightforward implementation, a function of a model and tokens, and ours on the same tokens."""
        subset = self.tokens[: self.options.subset]
        self.score(subset[: 2 * self.context + 1], form)  # the first of a kind pays for allocations
        ours = self.score(subset, form)
        weights = list(self.plain.parameters())
        saved = [weight.detach().clone() for weight in weights]
        for tokens in (subset[: self.context + 65], subset):  # the first to warm up
            for weight, value in zip(weights, saved, strict=True):
                weight.requires_grad_(False).copy_(value).requires_grad_(isinstance(form, Chunk))
            torch.cuda.synchronize()
            begin = time.perf_counter()
            found = plain(self.plain, tokens)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        for weight, value in zip(weights, saved, strict=True):
            weight.requires_grad_(False).copy_(value).grad = None
        off = abs(float(ours.log.double().sum()) / sum(found) - 1)
        worst = float((ours.log.cpu() - torch.tensor(found)).abs().max())
        print(f"{op}: nats differ by {100 * off:.4f}% in all, by {worst:.4f} at a token")
        if not off < TOLERANCE:
            raise SystemExit(f"bench.scoring: {op}: the two disagree; no speeds")
        self.note(op, "triton", ours.seconds, ours.log)
        self.note(op, "plain", seconds, found)
        print(f"{op}: {seconds / ours.seconds:.2f} times as fast as the straightforward implementation", flush=True)

    def sliding(self) -> None:
        options, count = self.options, self.tokens.numel() - 1
        self.beside("sliding_score", lambda model, tokens: plain_windows(
            model, tokens, self.depth, self.context, options.stride, 0, tokens.numel() - 1))  # fmt: skip
        for op, stride in (("plain_score", self.context), ("sliding_score", options.stride)):
            found = self.score(self.tokens, stride=stride)
            rows = max(1, count // stride)
            work = flops(self.model, self.depth, rows, self.context, stride) if not self.config.document_mask else 0.0
            self.note(op, "triton", found.seconds, found.log, work)
            self.seconds[op] = found.seconds
        whole = self.seconds["sliding_score"] * FINEWEB / count / GPUS
        print(f"FineWeb on {GPUS} GPUs, sliding: {self.seconds['sliding_score']:.2f} s * {FINEWEB:,d} / {count:,d} / "
              f"{GPUS} = {whole:.0f} s", flush=True)  # fmt: skip

    def form(self, name: str) -> None:
        form, tokens = parse_form(name), self.tokens[: self.options.form_count]
        op = f"ttt_{form.name}"
        if isinstance(form, Chunk):
            self.beside(op, lambda model, text: plain_chunk(
                model, text, self.depth, self.context, self.options.stride, form), form)  # fmt: skip
        elif isinstance(form, Document):
            self.beside(op, lambda model, text: plain_document(
                model, text, self.depth, self.context, documents_of(self.text(text)), form), form)  # fmt: skip
        found = self.score(tokens, form)
        self.note(op, "triton", found.seconds, found.log)
        sliding = self.score(tokens)
        gain = (float(sliding.log.double().sum()) - float(found.log.double().sum())) / found.log.numel()
        print(f"{op}: {gain:+.5f} nats a token less than sliding, BPB {found.bpb - sliding.bpb:+.5f}"
              + ("" if self.options.tokenizer else " (bits a token)"), flush=True)  # fmt: skip
        if isinstance(form, Chunk):
            self._project_chunk(form)
        elif isinstance(form, Document):
            self._project_document(form)

    def _project_chunk(self, form: Chunk) -> None:
        rows = max(1, form.rows // GPUS)
        part = self.tokens[: 16 * 2 * self.context + 1]
        small = replace(form, rows=rows, tokens=rows * self.context)
        seconds = self.score(part, small).seconds - self.score(part).seconds
        step = seconds / (form.epochs * ((part.numel() - 1) // small.tokens - 1))
        reduce = 2 * (GPUS - 1) / GPUS * 4e-9 * sum(p.numel() for p in self.model.parameters()) / self.options.bus
        sliding = self.seconds["sliding_score"] * FINEWEB / (self.tokens.numel() - 1) / GPUS
        steps = FINEWEB // form.tokens * form.epochs * -(-form.tokens // self.context // form.rows)
        print(f"FineWeb on {GPUS} GPUs, chunk: {sliding:.0f} s of sliding + {steps:,d} steps * ({1e3 * step:.1f} ms of "
              f"{rows} rows + {1e3 * reduce:.1f} ms all-reduce at {self.options.bus:.0f} GB/s) = "
              f"{sliding + steps * (step + reduce):.0f} s", flush=True)  # fmt: skip

    def _project_document(self, form: Document) -> None:
        form, seconds = replace(form, documents=self.options.long), []
        for contexts in (1, 2):
            lines = self.tokens[: self.options.long * (contexts * self.context)].view(self.options.long, -1).clone()
            lines = torch.where(lines == BOS, BOS + 1, lines)
            lines[:, 0] = BOS
            seconds.append(self.score(lines.flatten(), form).seconds)
        pieces = self.options.long * self.context // form.tokens
        piece = (seconds[1] - seconds[0]) / pieces
        total = FINEWEB / form.tokens * piece / GPUS
        print(f"FineWeb on {GPUS} GPUs, document, at most: {FINEWEB:,d} / {form.tokens} pieces * {1e3 * piece:.3f} ms "
              f"of a full window ({self.context / piece:,.0f} tokens/s forward and backward) / {GPUS} = {total:.0f} s",
              flush=True)  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description="Time every form of scoring.")
    parser.add_argument("--tokens", type=Path, required=True, help="a token shard")
    parser.add_argument("--count", type=int, help="tokens of it; default: all")
    parser.add_argument("--subset", type=int, default=65_537, help="tokens for the straightforward implementations")
    parser.add_argument("--artifact", type=Path, help="model.pga; default: random weights, of the preset one-gpu")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, for BPB")
    parser.add_argument("--documents", action="store_true", help="mask documents, whatever the artifact says")
    parser.add_argument("--forms", nargs="+", default=["chunk", "document"], help="as quantize.py's --ttt")
    parser.add_argument("--form-count", type=int, help="tokens for these; default: --count")
    parser.add_argument("--long", type=int, default=64, help="documents side by side for the projection")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=524_288)
    parser.add_argument("--bus", type=float, default=100.0, help="GB/s of an all-reduce, for the projection")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/scoring-<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.scoring: wants an NVIDIA GPU, found none", file=sys.stderr)
        return 2
    bench, command = Bench(options), "python -m bench.scoring " + " ".join(arguments)
    for form in (None, *options.forms):
        if form is None:
            bench.sliding()
        else:
            bench.form(form)
        path, _ = write_result("scoring", command, bench.measured, bench.rows, options.out)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
