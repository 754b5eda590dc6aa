"""Text from a model, token by token. The whole context is computed anew for each token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gpt.config import BOS
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no character (yet)


def draw(
    logits: Tensor,  # (vocab,) float32
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> int:
    """A token from softmax(logits / temperature), cut to the fewest tokens with at least top_p of the probability.

    Temperature 0 takes the likeliest. On the CPU, so that a seed gives the same draws on every device.
    """
    if temperature == 0:
        return int(logits.argmax())
    chances, tokens = (logits.double().cpu() / temperature).softmax(-1).sort(descending=True, stable=True)
    kept = chances.cumsum(-1) - chances < top_p
    kept[0] = True
    chances[~kept] = 0
    return int(tokens[chances.multinomial(1, generator=generator)])


@torch.no_grad()
def generate(
    model: GPT,
    depth: Sequence[int],
    prompt: Sequence[int],
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Iterable[int] = (BOS,),
) -> Iterator[int]:
    """At most `count` tokens that go on from BOS and the prompt; ends before a token of `stop`.

    Only the last model.config.context tokens are seen.
    """
    generator = torch.Generator().manual_seed(seed)
    ends, context = frozenset(stop), model.config.context
    tokens = torch.tensor([[BOS, *prompt]], device=model.tok_emb.device)
    for _ in range(count):
        tokens = tokens[:, -context:]
        token = draw(model.logits(tokens, depth, model.rotary(tokens.size(1)))[0], temperature, top_p, generator)
        if token in ends:
            return
        yield token
        tokens = torch.cat((tokens, tokens.new_tensor([[token]])), dim=1)


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` as they come, after that of the prompt.

    A character spelt in byte pieces is held back until it is whole.
    """
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    text = shown
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        ready = text.rstrip(REPLACEMENT)
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if len(text) > len(shown):
        yield text[len(shown) :]
