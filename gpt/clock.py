"""Training time, losses and steps in flight, without a host synchronisation in the step."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.distributed import Ranks

IN_FLIGHT = 2  # steps that the host may be ahead of the device


@dataclass(frozen=True)
class StepReport:
    """What a finished step brought back: means over ranks."""

    step: int
    loss: float  # nats per token
    gradient_norm: float
    launched: float  # training seconds at its launch


class Stopwatch:
    """Milliseconds that the device took between laps, by name.

    A lap does not wait for the device: the host launches ahead of it as in training, and what it takes to launch is
    not counted where it is hidden there. Reading `ms` waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps = [("", self._mark())]

    def _mark(self) -> Any:  # an event of the device, or a CPU's ms
        if self.device.type != "cuda":
            return 1e3 * time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self._laps.append((name, self._mark()))

    @property
    def ms(self) -> dict[str, float]:
        cuda, found = self.device.type == "cuda", dict[str, float]()
        if cuda:
            torch.cuda.synchronize(self.device)
        for (_, since), (name, mark) in pairwise(self._laps):
            found[name] = found.get(name, 0.0) + (since.elapsed_time(mark) if cuda else mark - since)
        return found


class Clock:
    """The clock of the wall-clock cap. Runs while training does, stands during validation.

    Every step's loss, gradient norm and launch time are averaged over the ranks on the device and read back once the
    step is done, at most IN_FLIGHT steps later, and with them whether a rank was told to stop. Decisions (learning
    rate, stopping) come from those averages alone, so every rank takes the same ones.
    """

    def __init__(self, ranks: Ranks, elapsed: float = 0.0) -> None:
        self.ranks = ranks
        self._before = elapsed
        self._since: float | None = None
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._launches: deque[tuple[int, float]] = deque(maxlen=9)
        self.stopping = False  # whether some rank was told to stop by the launch of a step collected since

    @property
    def elapsed(self) -> float:
        """Training seconds so far, on this rank."""
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> list[StepReport]:
        """Wait for the steps in flight, then stand. Returns their reports."""
        reports = self.collect(0)
        self._before, self._since = self.elapsed, None
        return reports

    def push(self, step: int, launched: float, loss: Tensor, norm: Tensor, stop: bool = False) -> None:
        """Note a step that was just launched at training second `launched`; stop: this rank was told to."""
        stats = loss.new_empty(4, dtype=torch.float64)
        stats[0], stats[1] = loss.detach(), norm
        stats[2].fill_(launched)  # assigned, a number would be copied from the host, which waits for the device
        stats[3].fill_(float(stop))
        self.ranks.all_reduce(stats, dist.ReduceOp.AVG)
        if stats.is_cuda:
            host = torch.empty(4, dtype=torch.float64, pin_memory=True)
            host.copy_(stats, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, host, event))
        else:
            self._pending.append((step, stats, None))

    def collect(self, in_flight: int = IN_FLIGHT - 1) -> list[StepReport]:
        """Reports of finished steps; waits until at most `in_flight` are unfinished. On a CPU all are finished."""
        reports = []
        if self.ranks.device.type == "cpu":
            in_flight = 0
        while len(self._pending) > in_flight:
            step, stats, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, launched, stop = stats.tolist()
            self.stopping |= stop > 0
            reports.append(StepReport(step, loss, norm, launched))
            self._launches.append((step, launched))
        return reports

    @property
    def step_seconds(self) -> float:
        """Mean time of the last few steps; 0 before two are known."""
        if len(self._launches) < 2:
            return 0.0
        (first, begin), (last, end) = self._launches[0], self._launches[-1]
        return (end - begin) / (last - first)

    def at(self, step: int) -> float:
        """Training seconds at which the device begins `step`, as all ranks reckon it."""
        # A step is launched on a GPU while the one before still runs.
        behind = (IN_FLIGHT - 1) * self.step_seconds if self.ranks.device.type == "cuda" else 0.0
        if self.ranks.world_size == 1:
            return self.elapsed + behind
        if not self._launches:
            return self._before
        last, launched = self._launches[-1]
        return launched + (step - last) * self.step_seconds + behind
