"""Text from a model, token by token. Keys and values of earlier tokens are kept, so each costs one position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import BOS
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from kernels import reference

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no character (yet)


def draw(
    logits: Tensor,  # (vocab,) float32
    temperature: float,
    top_p: float,
    chance: Tensor,  # (1,) float64 in [0, 1)
) -> Tensor:  # (1,) int64
    """A token from softmax(logits / temperature), cut to the fewest tokens with at least top_p of the probability.

    Temperature 0 takes the likeliest. chance says which: the first, from the likeliest on, whose probability added to
    those before exceeds this share of all that is kept. On the logits' device, without synchronisation.
    """
    if temperature == 0:
        return logits.argmax(keepdim=True)
    # Their maximum off, and no reciprocal beyond float64, so that the least temperatures make no inf - inf or 0 * inf.
    chances, tokens = (
        ((logits.double() - logits.max()) / max(temperature, 1e-300)).softmax(-1).sort(descending=True, stable=True)
    )
    sums = chances.cumsum(-1)
    kept = sums - chances < top_p
    kept[:1] = True
    # Sums beyond what is kept are its total, so none of those is ever the first to exceed a share of it.
    total = sums.masked_fill(~kept, 0.0).amax(keepdim=True)
    place = torch.searchsorted(torch.where(kept, sums, total), chance * total, right=True)
    return tokens.gather(0, place.clamp_max(kept.sum() - 1))


class Decoder:
    """A model on one row that grows, with the logits of a forward pass over the whole row up to rounding.

    finish: what is made of the logits (vocab,) of what comes next, on the device; `extend` returns that. The step of
    one token is a pure function of buffers that stay where they are: on a GPU it runs once as it is, is captured with
    `finish` in a CUDA graph, and replayed from then on. Weights are those of the moment when a Decoder is made. A row
    that would exceed config.context starts anew with its last half. Where documents are masked, so does one at a BOS:
    nothing before it can be seen.
    """

    def __init__(
        self, model: GPT, depth: Sequence[int], finish: Callable[[Tensor], Tensor] = lambda logits: logits
    ) -> None:
        self.model, self.config, self.depth, self.finish = model, model.config, tuple(depth), finish
        self.product, device = model.products(), model.smear_gate.device
        self.rotary = model.rotary(self.config.context)
        # Of each virtual layer: a layer that runs twice sees other inputs the second time.
        shape = len(self.depth), self.config.context, self.config.num_kv_heads, self.config.head_dim
        self.keys, self.values = torch.zeros(2, *shape, dtype=model.dtype, device=device)
        self.state = torch.zeros(3, dtype=torch.int64, device=device)  # token before, token, its position
        self.row: list[int] = []
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found = torch.empty(0)

    @torch.no_grad()
    def extend(self, tokens: Sequence[int]) -> Tensor:  # what finish returns
        """Append at least one token to the row. On a GPU the next call may overwrite what is returned."""
        new = list(tokens)
        if self.config.document_mask and BOS in new:
            new = new[len(new) - 1 - new[::-1].index(BOS) :]
            self.row = []
        if len(self.row) + len(new) > self.config.context:
            new = (self.row + new)[-max(1, self.config.context // 2) :]
            self.row = []
        past = len(self.row)
        before = self.row[-1:]  # what the first new token is smeared with
        self.row = self.row + new
        if before and len(new) == 1:
            self.state.copy_(torch.tensor([*before, *new, past]))
            return self._step()
        ids = torch.tensor(before + new, device=self.state.device)
        position = torch.arange(past, past + len(new), device=self.state.device)
        return self.finish(self._logits(ids, position))

    def _step(self) -> Tensor:
        self._steps += 1
        if self._steps == 1 or not self.state.is_cuda:
            return self.finish(self._logits(self.state[:2], self.state[2:]))
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._found = self.finish(self._logits(self.state[:2], self.state[2:]))
        self._graph.replay()
        return self._found

    def _logits(
        self,
        ids: Tensor,  # (T,) or, after the token before them, (1 + T,) int64
        position: Tensor,  # (T,) int64
    ) -> Tensor:  # (vocab,) float32
        """reference.logits of GPT.hidden of the row's last T tokens, at the last of them; notes keys and values."""
        config, model, product = self.config, self.model, self.product
        x = reference.rms_norm(model.embedding(ids).to(model.dtype))
        x = x0 = reference.smear(x[None], model.smear_gate)[0, -len(position) :].contiguous()
        saved: list[Tensor] = []
        half = len(self.depth) // 2
        for virtual, i in enumerate(self.depth):
            layer_scale, j = (i + 1) ** -0.5, virtual - half
            if 0 <= j < config.num_skips and saved:
                x = reference.skip_mix(x, saved.pop(), model.skip_weights[j], model.skip_gates[j])
            x = reference.residual_mix(x, x0, model.resid_mix[i])
            heads = product("qkv", i, reference.rms_norm(x, layer_scale)).unflatten(-1, (-1, config.head_dim))
            y = model.ops.cached_attention(
                heads, model.q_gain[i], *self.rotary, position, self.keys[virtual], self.values[virtual]
            )
            x = x + product("o", i, y.flatten(1))
            h = F.leaky_relu(product("up", i, reference.rms_norm(x, layer_scale)), 0.5).square()
            x = x + product("down", i, h)
            if virtual < half:
                saved.append(x)
        x = product("head", 0, reference.rms_norm(x[-1:]))[0]
        return reference.softcapped(x, config.logit_softcap)


def generate(
    model: GPT,
    depth: Sequence[int],
    prompt: Sequence[int],
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Iterable[int] = (BOS,),
    decoder: type[Decoder] = Decoder,
) -> Iterator[int]:
    """At most `count` tokens that go on from BOS and the prompt; ends before a token of `stop`.

    At least the last half of model.config.context is seen, at most all of it: see Decoder. A seed gives the same draws
    on every device, as far as the logits are the same.
    """
    chances = torch.rand(max(1, count), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chances = chances.to(model.smear_gate.device)
    number = torch.zeros(1, dtype=torch.int64, device=chances.device)

    def choose(logits: Tensor) -> Tensor:
        token = draw(logits, temperature, top_p, chances[number])
        number.add_(1)
        return token

    row, ends, new = decoder(model, depth, choose), frozenset(stop), [BOS, *prompt]
    for _ in range(count):
        token = int(row.extend(new))
        if token in ends:
            return
        yield token
        new = [token]


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` as they come, after that of the prompt.

    A character spelt in byte pieces is held back until it is whole. Once it is, what comes is decoded as after any
    letter: at the start of a text alone SentencePiece drops a space. So the time is that of the tokens.
    """
    letter = tokenizer.encode("a")
    past: list[int] = []
    tail = list(prompt)
    text = shown = tokenizer.decode(tail)
    for token in tokens:
        tail.append(token)
        text = tokenizer.decode(past + tail)
        ready = text.rstrip(REPLACEMENT)
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
        if text and text == ready:
            past, tail = letter, []
            text = shown = tokenizer.decode(past)
    if len(text) > len(shown):
        yield text[len(shown) :]
