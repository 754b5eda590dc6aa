"""What the seed's own script computes (tests/golden.json), and its formula for filling parameters.

The figures were taken from the seed's code in float64 on a CPU, with its cross-entropy in float32.
"""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.model import BANKS, GPT

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())


def fill(shape: tuple[int, ...], seed: int, scale: float, shift: float = 0.0) -> Tensor:
    """Numbers in shift +- scale by a formula, float32."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    u = torch.sin(12.9898 * (i + 1) + 78.233 * seed) * 43758.5453
    return (shift + scale * (2 * (u - u.floor()) - 1)).reshape(shape).float()


@torch.no_grad()
def fill_model(model: GPT) -> None:
    """The parameters of the golden cases."""
    seeds = count(1)

    def put(parameter: Tensor, scale: float, shift: float = 0.0) -> None:
        parameter.copy_(fill(tuple(parameter.shape), next(seeds), scale, shift))

    put(model.tok_emb, 0.2)
    for bank in BANKS:
        put(getattr(model, bank), 0.07)
    put(model.smear_gate, 0.5)
    put(model.skip_weights, 0.3, 1.0)
    put(model.skip_gates, 0.5)
    for i in range(model.config.num_layers):
        put(model.attn_scale[i], 0.3, 1.0)
        put(model.mlp_scale[i], 0.3, 1.0)
        put(model.q_gain[i], 0.5, 5.25)
    for i in range(model.config.num_layers):
        seed = next(seeds)
        model.resid_mix[i, 0] = fill((model.config.model_dim,), 2 * seed, 0.2, 1.0)
        model.resid_mix[i, 1] = fill((model.config.model_dim,), 2 * seed + 1, 0.2)


def golden_tokens(length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a golden case, each (1, length)."""
    i = torch.arange(length + 1)
    tokens = (31 * i * i + 7919 * i + 12345) % 8192
    return tokens[None, :-1], tokens[None, 1:]


def seed_parameter(model: GPT, name: str) -> tuple[Tensor, int | None]:
    """Our parameter, and the layer's index in it, for a parameter name of the seed's script."""
    if name.startswith("blocks."):
        _, layer, field = name.split(".", 2)
        return getattr(model, field.removeprefix("attn.")), int(layer)
    return getattr(model, name.removesuffix(".weight").replace(".", "_")), None
