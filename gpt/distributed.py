"""The processes of a run: one a GPU under torchrun, or a single one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

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

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in the order of ranks, on every rank. Values have to pickle."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

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
    yield Ranks(rank, world_size, target)
    # Not after an error: peers may wait in a collective that this rank will never join. See run_program.
    dist.destroy_process_group()


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; it ends the process only after the context, where no exception does. Main thread."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
    if told.is_set():
        signal.raise_signal(signal.SIGTERM)


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a program and end the process with the exit code that main(arguments) returns, 1 for an exception.

    A rank that failed ends at once, without taking leave of its peers, so that torchrun sees it and ends them too.
    """
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
