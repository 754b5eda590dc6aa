"""What a reviewer checks first, without a GPU: imports, building, a forward pass, sizes, and probes of every form.

What the model says at a place has to be what it says where the row ends there and, where documents are masked, begins
with the place's document. Around it a probe changes the tokens from some place on and scores again: no probability of a
token before that place may move; nor, where the first of them alone is changed, the weights that score it. The forms of
scoring are probed as they are, with windows, chunks and documents small enough that the text has many borders of each.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

import gpt
from gpt.artifact import Artifact
from gpt.bundle import count_code
from gpt.config import ARTIFACT_LIMIT, BOS, ROOT, Config
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.score import Score, ValidationText, score
from gpt.ttt import adapt, parse_form
from kernels import select

TOLERANCE = 2e-4  # nats: rounding, where another batch of documents changes the order of sums

Logs = Callable[[Tensor], Tensor]  # (count,) tokens -> (count - 1,) nats of each target
FORWARD = 512  # tokens of a row, at most
CONTEXT = 8  # of the probes: models are large, so the text is short
COUNT = 3 * CONTEXT + 2  # tokens of their text; a row more than chunk and phased may train on
BEGINS = (1, 10, 16, 21, 22)  # of its documents; it begins within one
PLACES = (5, 11, 14, 20)  # in windows, chunks, pieces and documents
# The first token behind one that trained: the end of a chunk, a phase, a piece.
OWN = {"chunk": 2 * CONTEXT + 1, "phased": 2 * CONTEXT + 1, "document": BEGINS[1] + CONTEXT // 4 + 1}


def scoring_forms(context: int, rank: int = 4) -> dict[str, str]:
    """Every form of scoring with settings that suit a text of a few contexts; a number is a stride."""
    return {
        "plain": str(context),
        "sliding": str(context // 4),
        "chunk": f"chunk,tokens={2 * context},rows=1,epochs=1,lr=0.05",
        "document": f"document,tokens={context // 4},rank={rank},lr=0.02,documents=3",
        "phased": "phased,phases=3,documents=6,rows=1,lr=0.05",
    }


def scorer(model: GPT, depth: Sequence[int], form: str, context: int, ranks: Ranks) -> Callable[[Tensor], Score]:
    """A function that scores tokens in one of these forms."""

    def score_of(tokens: Tensor) -> Score:
        text = ValidationText(tokens.int(), torch.ones(tokens.numel() - 1, dtype=torch.int16))
        batch = 8 * context
        if form.isdigit():
            return score(model, text, depth, ranks, context=context, stride=int(form), batch_tokens=batch)
        settings = parse_form(form)
        return adapt(model, text, depth, ranks, settings, context=context, stride=context // 4, batch_tokens=batch)

    return score_of


def kept(score_of: Callable[[Tensor], Score], tokens: Tensor) -> Callable[[Tensor], Score]:
    """The same function, which scores these tokens, with which all others are compared, once."""
    found: list[Score] = []

    def score_once(others: Tensor) -> Score:
        if not torch.equal(others, tokens):
            return score_of(others)
        if not found:
            found.append(score_of(tokens))
        return found[0]

    return score_once


def logs(model: GPT, depth: Sequence[int], form: str, context: int, ranks: Ranks) -> Logs:
    """The same, of which nats alone are wanted."""
    score_of = scorer(model, depth, form, context, ranks)
    return lambda tokens: score_of(tokens).log


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


def own_token_moves_weights(score_of: Callable[[Tensor], Score], tokens: Tensor, place: int) -> bool:
    """Whether the weights that score the token at a place, no BOS, are others where that token is another."""

    def weights(tokens: Tensor) -> str:
        lines = score_of(tokens).ledger.lines
        return next(str(line[3]) for line in lines if line[0] == "score" and line[1] < place <= line[2])

    other = tokens.clone()
    other[place] = 4 if tokens[place] != 4 else 5
    return weights(other) != weights(tokens)


def past_moves_document(log_of: Logs, tokens: Tensor) -> float:
    """Largest change of any token's nats behind a BOS when all before that, but for other BOS, are others."""
    before, worst = log_of(tokens), 0.0
    for start in (tokens == BOS).nonzero().flatten().tolist():
        other = tokens.clone()
        other[:start] = torch.where(tokens[:start] == BOS, BOS, tokens[:start].flip(0).clamp_min(4))
        if not torch.equal(other, tokens):
            worst = max(worst, float((log_of(other) - before)[start:].abs().max()))
    return worst


def rows_differ(
    losses: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, places: Collection[int], mask: bool
) -> float:
    """Largest difference, in nats, between what a place says in a row, in a row whose end alone is wanted, and alone.

    losses: of (1, T) tokens and (1, N) targets, those of the last N places. Alone: in a row that ends there and, where
    documents are masked, begins with the place's.
    """
    row, targets = tokens[None, :-1], tokens[None, 1:]
    first, worst = min(places), 0.0
    found = losses(row, targets)[0, first:], losses(row, targets[:, first:].contiguous())[0]
    begins = (tokens == BOS).nonzero().flatten().tolist() if mask else []
    for place in places:
        begin = max((begin for begin in begins if begin <= place), default=0)
        alone = losses(row[:, begin : place + 1].contiguous(), targets[:, place : place + 1].contiguous())[0, -1]
        worst = max(worst, *(float((one[place - first] - alone).abs()) for one in found))
    return worst


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
        length = min(config.train_seq_len, FORWARD)
        tokens = text_with_documents(length + 1, vocab_size, generator)[None]
        model = built[0]
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = float(model(inputs, targets, depth, model.rotary(length)))
        return _want(math.isfinite(loss), f"{length} tokens, {loss:.3f} nats a token")

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
    # Built by then: each is asked for after the check before it has run.
    yield from probes(built[0], depth, ranks) if built else ()


def probes(model: GPT, depth: Sequence[int], ranks: Ranks) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks that nothing is known too early, by name; as `checks`."""
    vocab_size, masked = model.config.vocab_size, model.config.document_mask
    tokens = torch.randint(4, vocab_size, (COUNT,), generator=torch.Generator().manual_seed(0))
    tokens[list(BEGINS)] = BOS

    @torch.no_grad()
    def rows() -> str:
        def losses(row: Tensor, targets: Tensor) -> Tensor:
            return model.losses(row, targets, depth, model.rotary(row.size(1)))

        differ = rows_differ(losses, tokens, {*range(5, COUNT - 1, 3), *BEGINS}, masked)
        return _want(differ < TOLERANCE, f"places of a row cut there, before or behind, differ by {differ:.1e} nats")

    yield "causal: rows", rows
    for name, form in scoring_forms(CONTEXT).items():
        # Who learns too early does so at any depth, and two layers are soon trained.
        score_of = kept(scorer(model, (depth[0], depth[-1]) if name in OWN else depth, form, CONTEXT, ranks), tokens)

        def causal(name: str = name, score_of: Callable[[Tensor], Score] = score_of) -> str:
            past, future = future_moves_past(lambda tokens: score_of(tokens).log, tokens, PLACES, vocab_size)
            _want(future > 10 * TOLERANCE, f"later tokens changed and only {future:.1e} nats moved")
            _want(past < TOLERANCE, f"other tokens from a place on moved those before it by {past:.1e} nats")
            if place := OWN.get(name):
                own = own_token_moves_weights(score_of, tokens, place)
                _want(not own, f"the weights that score token {place} had seen it")
            return f"other tokens from one of {len(PLACES)} places on moved those before it by {past:.1e} nats"

        yield f"causal: {name}", causal
    for name in ("plain", "sliding", "document") if masked else ():

        def clean(name: str = name) -> str:
            moved = past_moves_document(logs(model, depth, scoring_forms(CONTEXT)[name], CONTEXT, ranks), tokens)
            return _want(moved < TOLERANCE, f"the text before a BOS moved what follows by {moved:.1e} nats")

        yield f"BOS: {name}", clean


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
