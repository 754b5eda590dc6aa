"""What a reviewer checks first, without a GPU: imports, building, a forward pass, sizes, and probes of every form.

A probe changes the tokens from some place on and scores again: no probability of a token before that place may move.
The forms of scoring are probed as they are, with windows, chunks and documents small enough that the text has many
borders of each.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import gpt
from gpt.artifact import Artifact
from gpt.bundle import count_code
from gpt.config import ARTIFACT_LIMIT, BOS, ROOT, Config
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.score import ValidationText, score
from gpt.ttt import adapt, parse_form
from kernels import select

TOLERANCE = 2e-4  # nats: rounding, where another batch of documents changes the order of sums

Logs = Callable[[Tensor], Tensor]  # (count,) tokens -> (count - 1,) nats of each target


def scoring_forms(context: int, rank: int = 4) -> dict[str, str]:
    """Every form of scoring with settings that suit a text of a few contexts; "" and a number are strides."""
    return {
        "plain": str(context),
        "sliding": str(context // 4),
        "chunk": f"chunk,tokens={context * 3 // 2},rows=1,epochs=2,lr=0.05",
        "document": f"document,tokens={context // 4},rank={rank},lr=0.05,documents=3",
        "phased": "phased,phases=3,documents=6,rows=1,lr=0.05",
    }


def logs(model: GPT, depth: Sequence[int], form: str, context: int, ranks: Ranks) -> Logs:
    """A function that scores tokens in one of these forms."""

    def log_of(tokens: Tensor) -> Tensor:
        text = ValidationText(tokens.int(), torch.ones(tokens.numel() - 1, dtype=torch.int16))
        stride = int(form) if form.isdigit() else context // 4
        if form.isdigit():
            made = score(model, text, depth, ranks, context=context, stride=stride, batch_tokens=2 * context)
        else:
            form_of = parse_form(form)
            made = adapt(model, text, depth, ranks, form_of, context=context, stride=stride, batch_tokens=2 * context)
        return made.log

    return log_of


def text_with_documents(count: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """(count,) random tokens in documents of very different lengths; the first starts the text."""
    tokens = torch.randint(4, vocab_size, (count,), generator=generator)
    start = 0
    for length in (1, 9, count // 3, 2, count // 6, count // 5):
        tokens[min(start, count - 1)] = BOS
        start += length
    return tokens


def future_moves_past(log_of: Logs, tokens: Tensor, places: Sequence[int], vocab_size: int) -> tuple[float, float]:
    """Largest change of any token's nats before a place when all from it on are others, and the smallest change after.

    The second number shows that the probe bites.
    """
    before = log_of(tokens)
    generator = torch.Generator().manual_seed(1)
    past, future = 0.0, math.inf
    for place in places:
        other = tokens.clone()
        other[place:] = torch.randint(4, vocab_size, (tokens.numel() - place,), generator=generator)
        if place % 2:
            other[place] = BOS  # also: documents end or begin elsewhere
        moved = (log_of(other) - before).abs()
        past = max(past, float(moved[: place - 1].max()) if place > 1 else 0.0)
        future = min(future, float(moved[place - 1 :].max()))
    return past, future


def past_moves_document(log_of: Logs, tokens: Tensor) -> float:
    """Largest change of any token's nats behind the last BOS when all before that are others."""
    last = int((tokens == BOS).nonzero()[-1])
    other = tokens.clone()
    other[1:last] = other[1:last].flip(0)
    return float((log_of(other) - log_of(tokens))[last:].abs().max())


def probability_sum(log_of: Logs, tokens: Tensor, vocab_size: int) -> float:
    """Sum of the probabilities that the last token has, over the whole vocabulary, one scoring for each."""
    total = 0.0
    for last in range(vocab_size):
        changed = tokens.clone()
        changed[-1] = last
        total += math.exp(-float(log_of(changed)[-1]))
    return total


class Failure(Exception):
    """A check has not passed."""


def _want(condition: bool, message: str) -> str:
    if not condition:
        raise Failure(message)
    return message


def checks(config: Config, artifact: Artifact | None, ranks: Ranks) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names and functions; each returns what it found or raises Failure."""

    def imports() -> str:
        names = [f"gpt.{module.name}" for module in pkgutil.iter_modules(gpt.__path__)] + ["train", "quantize"]
        for name in names:
            importlib.import_module(name)
        return f"{len(names)} modules"

    yield "imports", imports

    def size() -> str:
        code, model = count_code(ROOT), artifact.nbytes if artifact else 0
        what = f"{model:,d} artifact + {code:,d} code = {model + code:,d} of {ARTIFACT_LIMIT:,d} bytes"
        return _want(model + code <= ARTIFACT_LIMIT, what)

    yield "size", size
    if artifact:
        yield "not leaking", lambda: _want(not config.leaking, f"pre_quant={config.pre_quant}")

    ops = select("reference", ranks.device)
    built: list[GPT] = []

    def build() -> str:
        if artifact:
            built.append(artifact.model(ops, ranks.device, torch.float32))
        else:
            model = GPT(config, ops).initialise(config.seed).eval().requires_grad_(False)
            for weight in model.parameters():  # at the start, attention and MLP say nothing: there is nothing to probe
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            built.append(model)
        return f"{sum(weight.numel() for weight in built[0].parameters()):,d} parameters"

    yield "builds", build
    depth = artifact.depth if artifact else config.depth_at(config.iterations)
    vocab_size, generator = config.vocab_size, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def forward() -> str:
        tokens = text_with_documents(config.train_seq_len + 1, vocab_size, generator)[None]
        model = built[0]
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = float(model(inputs, targets, depth, model.rotary(config.train_seq_len)))
        return _want(math.isfinite(loss), f"{config.train_seq_len} tokens, {loss:.3f} nats a token")

    yield "forward", forward

    @torch.no_grad()
    def normalised() -> str:
        tokens = text_with_documents(24, vocab_size, generator)[None]
        model = built[0]
        last = model.hidden(tokens, depth, model.rotary(24))[0, -1]
        total = 0.0
        for targets in torch.arange(vocab_size).split(1024):  # each token of the vocabulary, as the one to be scored
            nats = ops.linear_cross_entropy(
                last.expand(targets.numel(), -1), model.tok_emb, targets, config.logit_softcap, reduction="none"
            )
            total += float((-nats).double().exp().sum())
        return _want(abs(total - 1) < 1e-4, f"probabilities sum to {total:.7f}")

    yield "distribution", normalised
    context = 8  # the model is large, so the text is short: three windows, two chunks, a few documents
    for name, form in scoring_forms(context).items():

        def causal(form: str = form) -> str:
            tokens = text_with_documents(3 * context, vocab_size, generator)
            tokens[0] = 4  # a text may begin within a document
            log_of = logs(built[0], depth, form, context, ranks)
            past, future = future_moves_past(log_of, tokens, [2 * context + 1], vocab_size)
            _want(future > 10 * TOLERANCE, f"later tokens changed and only {future:.1e} nats moved")
            return _want(past < TOLERANCE, f"other tokens from a place on moved those before it by {past:.1e} nats")

        yield f"causal: {name}", causal
    if config.document_mask:

        def clean() -> str:
            tokens = text_with_documents(4 * context, vocab_size, generator)
            moved = past_moves_document(logs(built[0], depth, str(context // 4), context, ranks), tokens)
            return _want(moved < TOLERANCE, f"the text before a BOS moved what follows by {moved:.1e} nats")

        yield "BOS is clean", clean


def preflight(config: Config, artifact: Artifact | None, ranks: Ranks) -> bool:
    """Run all checks, printing a line for each; False where one failed."""
    begin, good = time.perf_counter(), True
    for name, check in checks(config, artifact, ranks):
        started = time.perf_counter()
        try:
            verdict, what = "ok", check()
        except Exception as error:
            kind = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
            verdict, what, good = "FAILED", f"{kind}{error}", False
        print(f"{verdict:8s}{name:18s}{what}  ({time.perf_counter() - started:.1f} s)", flush=True)
    print(f"{'all checks passed' if good else 'NOT FIT TO SUBMIT'} in {time.perf_counter() - begin:.1f} s")
    return good
