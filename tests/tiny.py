"""A model small enough to check by brute force, with weights that make every part of it count."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt.config import Config, build_config
from gpt.distributed import Ranks
from gpt.gptq import INPUTS
from gpt.model import GPT
from kernels import select

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def tiny_config(**settings: Any) -> Config:
    return build_config(
        **{
            "preset": "sample",
            "vocab_size": 64,
            "num_layers": 3,
            "model_dim": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "rope_dims": 4,
            "mlp_mult": 2,
            "recur_layers": (1,),
            "train_seq_len": 16,
            "train_batch_tokens": 64,
            "micro_batch_tokens": 64,
            "val_batch_size": 64,
            "eval_stride": 4,
            **settings,
        }
    )


def tiny_model(config: Config, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(config, select("reference", CPU), dtype).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = name in INPUTS
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if matrix else parameter + 0.3 * noise)
    return model.eval()


def random_tokens(count: int, vocab: int, seed: int = 0) -> Tensor:
    """(count,) int64 that starts with BOS and has a few more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, vocab, (count,), generator=generator)
    tokens[torch.rand(count, generator=generator) < 0.1] = 1
    tokens[0] = 1
    return tokens


@dataclass
class Meeting:
    """Where ranks that are threads of this process sum their tensors."""

    world_size: int
    sums: list[Tensor] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world_size)


class ThreadRanks(Ranks):
    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.world_size, CPU)
        object.__setattr__(self, "meeting", meeting)

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        meeting: Meeting = self.meeting  # type: ignore[attr-defined]
        meeting.sums.append(tensor.clone())
        meeting.barrier.wait()
        tensor.copy_(torch.stack(meeting.sums).sum(0))
        if meeting.barrier.wait() == 0:
            meeting.sums.clear()
        meeting.barrier.wait()
        return tensor

    def gather(self, value: Any) -> list[Any]:
        meeting: Meeting = self.meeting  # type: ignore[attr-defined]
        meeting.values[self.rank] = value
        meeting.barrier.wait()
        values = [meeting.values[rank] for rank in range(self.world_size)]
        meeting.barrier.wait()
        return values
