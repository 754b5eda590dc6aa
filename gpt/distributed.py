"""The processes of a run: one a GPU under torchrun, or a single one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gpt.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Collectives are no-ops in a world of one."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def broadcast_text(self, text: str) -> str:
        """Rank 0's string, on every rank."""
        box = [text]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def distributed(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), and leave it at the end.

    device: "cuda", "cpu" or "auto", a GPU where there is one. Raises ConfigError where the machine lacks it.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU; wanted one a process, or device=cpu")
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
            f"wanted --nproc_per_node of at most that"
        )
    target = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(target)
        torch.set_float32_matmul_precision("high")
    if world_size == 1:
        yield Ranks(0, 1, target)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=target if device == "cuda" else None)
    try:
        yield Ranks(rank, world_size, target)
    finally:
        dist.destroy_process_group()
