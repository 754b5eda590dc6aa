"""Test-time training: scoring with weights that learn from what they have scored. Three forms, all score first.

    chunk      the stream in chunks: score one, then train all weights on it by SGD (pull requests 461 and 1413)
    document   each document with an adapter of its own, low-rank changes of K, O and MLP matrices, that starts from
               nothing: score a piece of the document, then train on it; documents run side by side (pull request 1530)
    phased     the stream cut behind some documents: score a part, then train all weights on everything scored so far
               (pull requests 1610 and 1626)

The weights that score a token depend on tokens before it alone, and on how many tokens there are in all. The last part
of the stream, or of a document, trains nothing. Every scoring and training is a line of the ledger (gpt/ledger.py).
Kernels are compiled on random tokens. Afterwards the model has its weights back.

`pre_quant` trains before the model is quantised: on training rows held out for it or, as the seed did, on the
validation tokens themselves, which leaks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from gpt.adapters import Adapters
from gpt.config import BOS, Config, ConfigError
from gpt.data import held_out_rows, load_validation, rows_of
from gpt.distributed import Ranks
from gpt.ledger import Ledger, Version, fingerprint
from gpt.model import GPT
from gpt.score import Score, TokenLog, ValidationText, Windows, finished, moved


@dataclass(frozen=True)
class SGD:
    """How all weights are trained."""

    lr: float = 0.005
    momentum: float = 0.9
    epochs: int = 3
    clip: float = 1.0  # largest norm of the gradient; 0 for none
    rows: int = 16  # of `context` tokens in one step, all ranks together

    def check(self, context: int) -> None:
        """Raises ConfigError where the form cannot score with a context of so many tokens."""


@dataclass(frozen=True)
class Chunk(SGD):
    """The learning rate is a cosine over the chunks, constant in each."""

    name: ClassVar = "chunk"
    tokens: int = 32_768

    def check(self, context: int) -> None:
        if self.tokens < context:
            raise ConfigError(f"chunks of {self.tokens} tokens: wanted at least the context, {context}")


@dataclass(frozen=True)
class Phased(SGD):
    """The learning rate is a cosine over the steps of each phase."""

    name: ClassVar = "phased"
    lr: float = 0.001
    epochs: int = 1
    phases: int = 3
    documents: int = 2000  # behind which the last phase comes; the others evenly before it


@dataclass(frozen=True)
class Document:
    """Adam on an adapter W + scale * B A for each document; A starts random, B zero."""

    name: ClassVar = "document"
    tokens: int = 64  # of a piece
    rank: int = 96
    scale: float = 1.5
    lr: float = 1e-4
    beta1: float = 0.0
    beta2: float = 0.999
    documents: int = 64  # side by side on one rank; about 1 GiB each, at a context of 2048
    seed: int = 0

    def check(self, context: int) -> None:
        if self.tokens > context:
            raise ConfigError(f"pieces of {self.tokens} tokens: wanted at most the context, {context}")


Form = Chunk | Document | Phased
FORMS: dict[str, type[Form]] = {form.name: form for form in (Chunk, Document, Phased)}


def parse_form(text: str) -> Form:
    """ "chunk" or "chunk,lr=0.01,epochs=2". Raises ConfigError where a form, setting or value is none."""
    name, *settings = text.split(",")
    if name not in FORMS:
        raise ConfigError(f"ttt={text}: {name!r} is not one of {', '.join(FORMS)}")
    form = FORMS[name]()
    known = {field.name: type(getattr(form, field.name)) for field in fields(form)}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ConfigError(f"ttt={text}: {name} has no {key!r}; wanted one of {', '.join(known)}")
        try:
            number = known[key](value)
            low = 0 if key in ("lr", "momentum", "clip", "beta1", "beta2", "seed", "scale") else 1
            if not low <= number < (1 if key in ("momentum", "beta1", "beta2") else math.inf):
                raise ValueError
        except ValueError:
            raise ConfigError(f"ttt={text}: {key}={value!r} is no {known[key].__name__} in its range") from None
        form = replace(form, **{key: number})
    return form


def adapt(
    model: GPT,
    text: ValidationText,
    depth: Sequence[int],
    ranks: Ranks,
    form: Form,
    *,
    context: int,
    stride: int,
    batch_tokens: int,
) -> Score:
    """Score `text` with test-time training; call on every rank, each gets the whole result.

    chunk and phased score in windows of `context` and `stride`, document in windows of at most `context`. Raises
    ConfigError where a chunk is shorter than the context, or a piece of a document longer.
    """
    form.check(context)
    if isinstance(form, Document):
        return _documents(model, text, depth, ranks, form, context)
    return _stream(model, text, depth, ranks, form, context, stride, batch_tokens)


# All weights, over the stream.


class _Trainer:
    """SGD on all weights of a model, on rows of `context` targets of the text."""

    def __init__(
        self,
        model: GPT,
        text: ValidationText,
        depth: Sequence[int],
        ranks: Ranks,
        form: SGD,
        context: int,
        batch_tokens: int,
    ) -> None:
        self.text, self.depth, self.ranks, self.form, self.context = text, depth, ranks, form, context
        self.weights: list[Tensor] = list(model.parameters())
        self.micro = max(1, batch_tokens // context)
        self.loss = model.ops.graph(model)
        self.rotary = model.rotary(context)
        self.optimizer = torch.optim.SGD(self.weights, form.lr, form.momentum)
        self.vocab_size = model.config.vocab_size

    def warm_up(self) -> None:
        """Compile on a GPU, on random tokens: gradients are thrown away."""
        if self.ranks.device.type != "cuda":
            return
        shape = (min(self.micro, self.form.rows), self.context)
        tokens, targets = (torch.randint(self.vocab_size, shape, device=self.ranks.device) for _ in range(2))
        self.loss(tokens, targets, self.depth, self.rotary).backward()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()

    def train(self, first: int, last: int, lr: float, decay: bool) -> int:
        """Train on targets from `first` on, whole rows only; with `decay`, the rate falls as a cosine over the steps.

        Returns the target after the last one that was trained on.
        """
        rows = (last - first) // self.context
        steps = [range(begin, min(begin + self.form.rows, rows)) for begin in range(0, rows, self.form.rows)]
        steps *= self.form.epochs
        for number, step in enumerate(steps):
            self._step([first + row * self.context for row in step], lr * _cosine(number / len(steps)) if decay else lr)
        return first + rows * self.context

    def _step(self, rows: list[int], lr: float) -> None:
        ahead = torch.arange(self.context + 1, device=self.ranks.device)
        tokens = self.text.tokens[moved(np.array(rows), self.ranks.device)[:, None] + ahead]
        _mean_gradient(self.loss, self.weights, tokens, self.depth, self.rotary, self.ranks, self.micro)
        if self.form.clip:
            torch.nn.utils.clip_grad_norm_(self.weights, self.form.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


def _mean_gradient(
    loss_of: Callable[..., Tensor],
    weights: list[Tensor],
    rows: Tensor,  # (N, T + 1)
    depth: Sequence[int],
    rotary: tuple[Tensor, Tensor],
    ranks: Ranks,
    micro: int,
) -> Tensor:
    """Set the gradient to that of the mean loss over rows, of which each rank takes a share; returns the loss, ()."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    total = torch.zeros((), device=rows.device)
    for part in rows[ranks.rank :: ranks.world_size].long().split(micro):
        if part.numel():
            loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous(), depth, rotary)
            loss = loss * (part.size(0) / rows.size(0))
            loss.backward()
            total += loss.detach()
    if ranks.world_size > 1:
        flat = ranks.all_reduce(torch.cat([total.view(1), *(gradient.flatten() for gradient in gradients)]))
        total = flat[0]
        for gradient, mean in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
    return total


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _borders(form: Chunk | Phased, text: ValidationText, context: int) -> list[int]:
    """Ends of the parts of the stream, behind each of which but the last is trained."""
    if isinstance(form, Chunk):
        return [*range(form.tokens, text.targets, form.tokens), text.targets]
    starts = (text.tokens == BOS).nonzero().flatten()[1:].tolist()  # of documents after the first
    wanted = (form.documents * (phase + 1) // form.phases - 1 for phase in range(form.phases))
    cuts = {starts[index] for index in wanted if 0 <= index < len(starts)}
    return [*(cut for cut in sorted(cuts) if context <= cut < text.targets), text.targets]


def _stream(
    model: GPT,
    text: ValidationText,
    depth: Sequence[int],
    ranks: Ranks,
    form: Chunk | Phased,
    context: int,
    stride: int,
    batch_tokens: int,
) -> Score:
    ends = _borders(form, text, context)
    starts = [0, *ends[:-1]]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    windows = Windows(
        model, text, depth, ranks, context=context, stride=stride, batch_tokens=batch_tokens, segment=longest
    )
    weights = list(model.parameters())
    saved, ops = [(weight.detach().clone(), weight.requires_grad) for weight in weights], model.ops
    try:
        model.requires_grad_(True)
        model.ops = ops.reproducible()
        trainer = _Trainer(model, text, depth, ranks, form, context, batch_tokens)
        windows.warm_up()
        trainer.warm_up()
        begin = time.perf_counter()
        ledger = Ledger(fingerprint(weights))
        version: Version = ledger.base
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            windows.score(start, end)
            ledger.scored_in_lines(start, end, version)
            if end == text.targets:
                break
            if isinstance(form, Chunk):
                factor, first = _cosine(number / (len(ends) - 1)), start
            else:
                factor, first = 1.0, 0
            last = trainer.train(first, end, form.lr * factor, decay=isinstance(form, Phased))
            version = ledger.trained(first, last, version, ledger.fingerprints(fingerprint(weights)))
        return finished(windows.log, ledger, text, ranks, context, stride, form.name, begin, asdict(form))
    finally:
        model.ops = ops
        with torch.no_grad():
            for weight, (value, trainable) in zip(weights, saved, strict=True):
                weight.copy_(value)
                weight.requires_grad_(trainable)
                weight.grad = None


# An adapter a document.


class _Documents:
    """Documents side by side, a row each, with adapters of their own."""

    def __init__(self, model: GPT, depth: Sequence[int], form: Document) -> None:
        self.adapters, self.depth, self.form = Adapters(model, form.rank, form.scale, form.seed), depth, form

    def run(
        self, text: ValidationText, documents: list[tuple[int, int]], context: int, log: TokenLog, ledger: Ledger
    ) -> None:
        """Score documents, given as ranges of targets, those with more pieces first; a piece trains once scored.

        All have the same piece at a time, so that rows are of one length; nothing waits for the device.
        """
        form, size, device = self.form, self.form.tokens, text.tokens.device
        learning = {name: x.expand(len(documents), *x.shape).clone() for name, x in self.adapters.start.items()}
        moments = [{name: torch.zeros_like(x) for name, x in learning.items()} for _ in range(2)]
        steps = [torch.zeros((), device=device) for _ in learning]
        versions: list[Version] = [ledger.base] * len(documents)
        begins, ends = moved(np.array(documents).T.copy(), device)[..., None]
        pieces = [-(-(end - begin) // size) for begin, end in documents]
        for piece in range(pieces[0]):
            scored = sum(count > piece for count in pieces)
            trained = sum(count > piece + 1 for count in pieces)
            targets = begins[:scored] + torch.arange(piece * size, (piece + 1) * size, device=device)
            ahead = torch.arange(max(0, (piece + 1) * size - context), (piece + 1) * size, device=device)
            # Past the text's end: whatever is there comes after every position that counts.
            inputs = text.tokens[(begins[:scored] + ahead).clamp_max(text.targets)].long()
            wanted = text.tokens[(targets + 1).clamp_max(text.targets)].long()
            now = {name: x[:scored].detach().requires_grad_(trained > 0) for name, x in learning.items()}
            with torch.set_grad_enabled(trained > 0):
                nats = self.adapters.losses(now, inputs, wanted, self.depth)
            log.put(targets, targets < ends[:scored], nats)
            for index in range(scored):
                begin = documents[index][0] + piece * size
                ledger.scored(begin, min(begin + size, documents[index][1]), versions[index])
            if not trained:
                continue
            gradients = torch.autograd.grad(nats[:trained].mean(1).sum(), list(now.values()))
            with torch.no_grad():
                first, second = ([moment[name][:trained] for name in learning] for moment in moments)
                weights = [x[:trained] for x in learning.values()]
                adam(
                    weights, [gradient[:trained] for gradient in gradients], first, second, [], steps, fused=True,
                    amsgrad=False, beta1=form.beta1, beta2=form.beta2, lr=form.lr, weight_decay=0.0, eps=1e-8,
                    maximize=False,
                )  # fmt: skip
                prints = ledger.fingerprints(fingerprint(weights, batched=True))
            for index in range(trained):
                begin = documents[index][0] + piece * size
                versions[index] = ledger.trained(begin, begin + size, versions[index], prints + index)


def documents_of(text: ValidationText) -> list[tuple[int, int]]:
    """Ranges of targets that are predicted from each document; the next one's BOS is the last of them."""
    starts = (text.tokens == BOS).nonzero().flatten().tolist()
    edges = sorted({0, *starts, text.targets} - {text.targets + 1})
    return [(begin, end) for begin, end in itertools.pairwise(edges) if begin < end]


def _documents(
    model: GPT,
    text: ValidationText,
    depth: Sequence[int],
    ranks: Ranks,
    form: Document,
    context: int,
) -> Score:
    documents = sorted(documents_of(text), key=lambda d: d[0] - d[1])
    adapters = _Documents(model, depth, form)
    log = TokenLog(text.targets, ranks.device)
    if ranks.device.type == "cuda":  # every kernel and length, of two documents and of one, on random tokens
        size = context + form.tokens
        tokens = torch.randint(model.config.vocab_size, (size + 1,), device=ranks.device, dtype=torch.int32)
        noise = ValidationText(tokens, torch.ones(size, dtype=torch.int16, device=ranks.device))
        # Both are the same noise; what the log and the ledger of it say is thrown away.
        log_of_noise, ledger_of_noise = TokenLog(size, ranks.device), Ledger(torch.tensor(0))
        adapters.run(noise, [(0, size), (0, context)], context, log_of_noise, ledger_of_noise)
        torch.cuda.synchronize()
    begin = time.perf_counter()
    ledger = Ledger(fingerprint(model.parameters()))
    batches = [documents[i : i + form.documents] for i in range(0, len(documents), form.documents)]
    for batch in batches[ranks.rank :: ranks.world_size]:
        adapters.run(text, batch, context, log, ledger)
    ledger.settle()
    ledger.lines = [line for lines in ranks.gather(ledger.lines) for line in lines]
    return finished(log, ledger, text, ranks, context, form.tokens, form.name, begin, asdict(form))


# Before quantising.

FINE_TUNE_ROWS = 32  # of a step on each rank


def freeze_first(model: GPT) -> None:
    """Drop the gradient of the first physical layer: its vectors and its matrices, which are slices of the banks."""
    layers = model.config.num_layers
    for name, weight in model.named_parameters():
        if weight.grad is None or name in ("tok_emb", "smear_gate", "skip_weights", "skip_gates"):
            continue
        weight.grad[:: layers if name in ("qo_bank", "kv_bank") else weight.size(0)] = 0


def pre_quant(model: GPT, depth: Sequence[int], ranks: Ranks, config: Config) -> float:
    """Fine-tune the model as config.pre_quant says, before it is quantised; returns the seconds it took, 0 for none."""
    if config.pre_quant == "none":
        return 0.0
    begin = time.perf_counter()
    fine_tune(model, _pre_quant_rows(config, ranks.device), depth, ranks, config)
    return time.perf_counter() - begin


def pre_quant_estimate(model: GPT, depth: Sequence[int], ranks: Ranks, config: Config) -> float:
    """Seconds that `pre_quant` will take on the slowest rank, 0 for none; leaves the model as it is.

    Reading its rows is measured, and steps on random rows, the first of which compile. A tenth is added: whoever ends
    training by this has to end in time.
    """
    if config.pre_quant == "none":
        return 0.0
    begin = time.perf_counter()
    count = _pre_quant_rows(config, ranks.device).size(0)
    reading = time.perf_counter() - begin
    generator = torch.Generator(ranks.device).manual_seed(config.seed)
    shape = (2 * FINE_TUNE_ROWS * ranks.world_size, config.train_seq_len + 1)
    rows = torch.randint(config.vocab_size, shape, generator=generator, device=ranks.device, dtype=torch.int32)
    once = config.model_copy(update={"pre_quant_epochs": 1, "pre_quant_soup": 1})
    saved = [weight.detach().clone() for weight in model.parameters()]
    for _ in range(2):
        begin = time.perf_counter()
        fine_tune(model, rows, depth, ranks, once)  # two steps; waits for the device, since it returns losses
        step = (time.perf_counter() - begin) / 2
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), saved)
    kept = math.ceil(0.8 * count) if config.pre_quant_soup > 1 else count
    steps = config.pre_quant_soup * config.pre_quant_epochs * -(-kept // (FINE_TUNE_ROWS * ranks.world_size))
    return max(ranks.gather(1.1 * (reading + steps * step)))


def _pre_quant_rows(config: Config, device: torch.device) -> Tensor:  # (N, T + 1) int32
    if config.pre_quant == "train":
        return held_out_rows(config, device)
    tokens = torch.from_numpy(load_validation(config.data_path, config.vocab_size).astype(np.int32))
    return rows_of(tokens.to(device), config.train_seq_len)


def fine_tune(
    model: GPT, rows: Tensor, depth: Sequence[int], ranks: Ranks, config: Config, *, batch: int = FINE_TUNE_ROWS
) -> tuple[float, float]:
    """AdamW on rows (N, T + 1) of tokens; returns the first and the last step's loss.

    Cosine over epochs to a tenth of the rate, norm of the gradient at most 1, `batch` rows a step and rank, the first
    layer as it is. With pre_quant_soup above 1: the mean of so many models, each trained on 80% of the rows.
    """
    context = rows.size(1) - 1
    loss_of, rotary = model.ops.graph(model), model.rotary(context)
    weights: list[Tensor] = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    total = [torch.zeros_like(weight) for weight in start]
    generator = torch.Generator().manual_seed(config.seed)
    micro = max(1, config.micro_batch_tokens // context)
    losses: list[Tensor] = []
    for _ in range(config.pre_quant_soup):
        with torch.no_grad():
            torch._foreach_copy_(weights, start)
        kept = torch.randperm(rows.size(0), generator=generator)
        kept = kept[: math.ceil(0.8 * rows.size(0))] if config.pre_quant_soup > 1 else kept
        optimizer = torch.optim.AdamW(weights, config.pre_quant_lr, weight_decay=0.0)
        for epoch in range(config.pre_quant_epochs):
            for group in optimizer.param_groups:
                group["lr"] = config.pre_quant_lr * (0.1 + 0.9 * _cosine(epoch / config.pre_quant_epochs))
            kept = kept[torch.randperm(kept.numel(), generator=generator)]
            for step in kept.split(batch * ranks.world_size):
                rows_of = rows[step.to(rows.device)]
                losses.append(_mean_gradient(loss_of, weights, rows_of, depth, rotary, ranks, micro))
                freeze_first(model)
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
        torch._foreach_add_(total, [weight.detach() for weight in weights], alpha=1 / config.pre_quant_soup)
    with torch.no_grad():
        torch._foreach_copy_(weights, total)
    for weight in weights:
        weight.grad = None
    return float(losses[0]), float(losses[-1])
