"""Text from a model, token by token. Keys and values of earlier tokens are kept, so each costs one position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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


class Decoder:
    """A model on one row that grows, with the logits of a forward pass over the whole row up to rounding.

    Written from the parameters and kernels.reference alone; weights are cast once. A row that would exceed
    config.context starts anew with its last half. Where documents are masked, so does one at a BOS: nothing before it
    can be seen.
    """

    def __init__(self, model: GPT, depth: Sequence[int]) -> None:
        config, dtype, layers = model.config, model.dtype, model.config.num_layers
        self.model, self.config, self.depth = model, config, tuple(depth)
        qo, kv = model.qo_bank.detach(), model.kv_bank.detach()
        self.qkv = torch.cat((qo[:layers], kv[:layers], kv[layers:]), dim=1).to(dtype)
        self.o = (model.attn_scale.detach()[:, :, None] * qo[layers:]).to(dtype)
        self.up = model.mlp_up_bank.detach().to(dtype)
        self.down = (model.mlp_scale.detach()[:, :, None] * model.mlp_down_bank.detach()).to(dtype)
        self.head = model.tok_emb.detach().to(dtype)
        self.rotary = model.rotary(config.context)
        # Of each virtual layer: a layer that runs twice sees other inputs the second time.
        shape = len(self.depth), config.context, config.num_kv_heads, config.head_dim
        self.keys, self.values = self.head.new_empty(shape), self.head.new_empty(shape)
        self.row: list[int] = []

    @torch.no_grad()
    def extend(self, tokens: Sequence[int]) -> Tensor:  # (vocab,) float32
        """Append at least one token to the row; returns the logits of what comes next."""
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
        ids = torch.tensor([before + new], device=self.head.device)
        x = reference.rms_norm(F.embedding(ids, self.model.tok_emb).to(self.head.dtype))
        x = reference.smear(x, self.model.smear_gate)[:, len(before) :]
        return reference.logits(self._layers(x, past)[0, -1], self.head, self.config.logit_softcap)

    def _layers(
        self,
        x0: Tensor,  # (1, T, D): the row's last T tokens, embedded
        past: int,  # tokens of the row before them
    ) -> Tensor:  # (1, T, D)
        """GPT.hidden of the last T tokens; notes their keys and values."""
        config, model, x = self.config, self.model, x0
        heads, kv_heads, count = config.num_heads, config.num_kv_heads, x0.size(1)
        cos, sin = (table[past : past + count] for table in self.rotary)
        # One new token may see everything.
        mask = None if count == 1 else x.new_ones(count, past + count, dtype=torch.bool).tril(past)
        saved: list[Tensor] = []
        half = len(self.depth) // 2
        for virtual, i in enumerate(self.depth):
            layer_scale, j = (i + 1) ** -0.5, virtual - half
            if 0 <= j < config.num_skips and saved:
                x = reference.skip_mix(x, saved.pop(), model.skip_weights[j], model.skip_gates[j])
            x = reference.residual_mix(x, x0, model.resid_mix[i])

            qkv = F.linear(reference.rms_norm(x, layer_scale), self.qkv[i]).unflatten(-1, (-1, config.head_dim))
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
            q, k = reference.qk_norm_rotary(q, k, model.q_gain[i], cos, sin)
            keys, values = self.keys[virtual, : past + count], self.values[virtual, : past + count]
            keys[past:], values[past:] = k[0], v[0]
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys[None].transpose(1, 2), values[None].transpose(1, 2), mask, enable_gqa=True
            )
            x = x + F.linear(reference.exclusive(y.transpose(1, 2), v).flatten(2), self.o[i])

            h = reference.mlp_hidden(reference.rms_norm(x, layer_scale), self.up[i])
            x = x + F.linear(h, self.down[i])
            if virtual < half:
                saved.append(x)
        return reference.rms_norm(x)


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

    At least the last half of model.config.context is seen, at most all of it: see Decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder, ends, new = Decoder(model, depth), frozenset(stop), [BOS, *prompt]
    for _ in range(count):
        token = draw(decoder.extend(new), temperature, top_p, generator)
        if token in ends:
            return
        yield token
        new = [token]


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
