"""Training: warm-up outside the clock, then steps until the iterations or the time are used up."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.capture import micro_step
from gpt.clock import Clock, StepReport, Stopwatch
from gpt.config import Config
from gpt.data import TrainLoader
from gpt.distributed import Ranks, sigterm
from gpt.gptq import calibrate
from gpt.model import GPT
from gpt.optimizer import Optimizer
from gpt.progress import Progress
from gpt.record import RecordError, Run
from gpt.score import Score
from gpt.ttt import pre_quant_estimate

CHECKPOINT_FORMAT = 2  # of what _save stores
MOST_SKIPS = 10  # steps in a row


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the gradient is not finite, or SIGTERM came."""


@dataclass(frozen=True)
class Trained:
    """What training ended with; the model holds the EMA weights."""

    steps: int
    seconds: float  # on the clock
    train_loss: float  # of the last step that was not skipped, nats per token
    depth: tuple[int, ...]  # of the last step
    memory_gib: float | None  # most that was reserved on this rank's GPU


def lr_factor(config: Config, progress: float) -> float:
    """Factor on learning rates at a progress of 0..1: 1, then linear to 0 over the last part, at least min_lr."""
    if config.warmdown_frac == 0:
        return 1.0
    return max(min(1.0, max(0.0, 1.0 - progress) / config.warmdown_frac), config.min_lr)


def calibration_estimate(
    model: GPT,
    depth: tuple[int, ...],
    tokens: Tensor,  # (rows, T + 1) int64
    ranks: Ranks,
    config: Config,
) -> float:
    """Seconds that calibration will take on the slowest rank, a tenth added: of one batch, and what two more add.

    The first call, which compiles, does not count. Where there is no time limit it is the only one.
    """
    seconds = []
    for count in (1, 1, 3) if config.max_wallclock_seconds else (1,):
        begin = time.perf_counter()
        calibrate(model, depth, [tokens] * count, ranks)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    *_, one, three = [0.0, *seconds]
    whole = config.micro_batch_tokens / (len(tokens) * config.train_seq_len)
    more = math.ceil(config.gptq_calibration_batches / ranks.world_size) - 1
    return max(ranks.gather(1.1 * (one + more * whole * max(0.0, three - one) / 2)))


class Trainer:
    """One training run of a model on all ranks."""

    def __init__(self, model: GPT, config: Config, run: Run, ranks: Ranks, bytes_per_token: float) -> None:
        self.model, self.config, self.run, self.ranks = model, config, run, ranks
        self.bytes_per_token = bytes_per_token
        self.optimizer = Optimizer(model, config, ranks)
        self.accumulation = config.accumulation(ranks.world_size)
        self.cap = config.max_wallclock_seconds - config.gptq_reserve_seconds if config.max_wallclock_seconds else 0.0
        self.depths = tuple(dict.fromkeys((config.depth(False), config.depth_at(config.iterations))))
        self._micro_step = micro_step(model, model.rotary(config.train_seq_len), self.depths)
        self._skips = 0  # in a row

    def warm_up(self) -> float:
        """Run each depth on random tokens, so that everything is compiled and allocated, and restore the state.

        Returns the seconds it took, which are not on the clock. Each depth's last step is taken apart: parts.json.
        Where there is a time limit, training ends as much earlier as fine-tuning after it is going to take, and
        calibration beyond what is reserved for it. Raises TrainingError where that leaves nothing.
        """
        config, begin = self.config, time.perf_counter()
        if self.cap and config.pre_quant != "none":
            fine_tuning = pre_quant_estimate(self.model, self.depths[-1], self.ranks, config)
            if fine_tuning >= self.cap:
                raise TrainingError(
                    f"fine-tuning, pre_quant={config.pre_quant}, would take {fine_tuning:.1f} s of the {self.cap:g} s "
                    "that calibration leaves: wanted fewer pre_quant_rows or pre_quant_epochs, or more "
                    "max_wallclock_seconds"
                )
            self.cap -= fine_tuning
        if config.warmup_steps == 0:
            return 0.0
        weights = [p.detach().clone() for p in self.model.parameters()]
        generator = torch.Generator(self.ranks.device).manual_seed(config.seed)
        parts: dict[str, dict[str, float]] = {}
        for depth in self.depths:
            for _ in range(config.warmup_steps):
                part = Stopwatch(self.ranks.device)
                for micro in range(self.accumulation):
                    first, end = config.rows(self.ranks.rank, self.ranks.world_size, micro)
                    tokens = torch.randint(
                        config.vocab_size,
                        (end - first, config.train_seq_len + 1),
                        generator=generator,
                        device=self.ranks.device,
                    )
                    self._backward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), depth, micro)
                part.lap("forward and backward")
                self.optimizer.step(0, 1.0)
                part.lap("optimizer")
            parts[str(len(depth))] = part.ms  # of the last one
        self.run.write_json("parts.json", parts)
        with torch.no_grad():
            for parameter, saved in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(saved)
        self._reserve(calibration_estimate(self.model, depth, tokens, self.ranks, config))
        self.optimizer.reset()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _reserve(self, calibration: float) -> None:
        """End training earlier where calibration will take longer than what is reserved for it."""
        longer = calibration - self.config.gptq_reserve_seconds
        if self.cap and longer > 0:
            if longer >= self.cap:
                raise TrainingError(
                    f"calibration, gptq_calibration_batches={self.config.gptq_calibration_batches}, would take "
                    f"{calibration:.1f} s of max_wallclock_seconds={self.config.max_wallclock_seconds:g} and leave "
                    "nothing to training: wanted fewer batches, or more seconds"
                )
            self.cap -= longer

    def _backward(self, tokens: Tensor, targets: Tensor, depth: tuple[int, ...], micro: int) -> Tensor:
        """Accumulate the gradient of a micro-step; returns its share of the step's loss on this rank, ().

        It weighs what it has of the batch's tokens, so that the mean over ranks is that of all tokens.
        """
        weight = tokens.numel() * self.ranks.world_size / self.config.train_batch_tokens
        with self.optimizer.sending(last=micro == self.accumulation - 1):
            return self._micro_step(tokens, targets, depth, weight)

    def train(self, validate: Callable[[tuple[int, ...]], Score]) -> Trained:
        """Train from the run's checkpoint, or from the start, to the end; the model is left with the EMA weights.

        validate(depth) scores the model as it stands, with the layers of its last step. Raises TrainingError where the
        loss is not finite and, with a checkpoint of the last step, after SIGTERM to any rank; RecordError where the
        checkpoint is of another configuration or cannot be written. A checkpoint under way is finished in any case.
        """
        checkpoint = self._restore()
        step, finished = (checkpoint["step"], checkpoint["finished"]) if checkpoint else (0, False)
        clock = Clock(self.ranks, checkpoint["elapsed"] if checkpoint else 0.0)
        train_loss = checkpoint["train_loss"] if checkpoint else math.nan
        if not finished:
            with sigterm() as told:
                try:
                    step, train_loss = self._loop(clock, step, checkpoint is not None, validate, told)
                except RuntimeError as error:
                    # A peer is gone, perhaps. Here, where the launcher's SIGTERM does not cut the line off.
                    if not isinstance(error, TrainingError):
                        again = f"go on from the last checkpoint with train.py --resume {self.run.path}"
                        print(f"rank {self.ranks.rank}: {error}; {again}", file=sys.stderr, flush=True)
                    raise
                finally:
                    self.run.join()
                self._save(step, clock.elapsed, train_loss, finished=True, wait=True)
        self.model.load_state_dict(self.optimizer.ema_state())
        self.run.draw_curves()
        del self._micro_step  # a captured one holds the memory of a whole step
        memory = torch.cuda.max_memory_reserved() / 2**30 if self.ranks.device.type == "cuda" else None
        return Trained(step, clock.elapsed, train_loss, self._last_depth(step), memory)

    def _loop(
        self,
        clock: Clock,
        step: int,
        resumed: bool,
        validate: Callable[[tuple[int, ...]], Score],
        told: threading.Event,  # to stop
    ) -> tuple[int, float]:
        """Steps from `step` on; returns how many are done in all and the last one's loss."""
        config, first = self.config, step
        with (
            TrainLoader(config, self.ranks.rank, self.ranks.world_size, self.ranks.device, step) as loader,
            Progress(config, self.run, self.cap, self.bytes_per_token, step) as progress,
        ):
            clock.start()
            while True:
                progress.report(self._finite(clock.collect()), clock)
                begins = clock.at(step)
                finished = step >= config.iterations or (bool(self.cap) and begins + clock.step_seconds > self.cap)
                fresh = step > first or not resumed  # a checkpoint is taken after the validation of its step
                if fresh and config.val_loss_every and (step % config.val_loss_every == 0 or finished):
                    progress.report(self._finite(clock.stop()), clock)
                    progress.validated(step, validate(self._last_depth(step)))
                    clock.start()
                if finished:
                    progress.report(self._finite(clock.stop()), clock)
                    return step, progress.train_loss
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                if step > first and (due or clock.stopping):
                    progress.report(self._finite(clock.collect(0)), clock)
                    self._save(step, clock.elapsed, progress.train_loss, wait=clock.stopping)
                if clock.stopping:
                    raise TrainingError(f"SIGTERM after step {step}; go on with train.py --resume {self.run.path}")
                launched = clock.elapsed
                factor = lr_factor(config, max(step / config.iterations, begins / self.cap if self.cap else 0.0))
                depth = config.depth_at(step)
                losses = [self._backward(*next(loader), depth, micro) for micro in range(self.accumulation)]
                norm = self.optimizer.step(step, factor)
                clock.push(step, launched, torch.stack(losses).sum(), norm, told.is_set())
                progress.launched(step, factor, depth)
                step += 1

    def _last_depth(self, steps: int) -> tuple[int, ...]:
        """Layers of the last of so many steps."""
        return self.config.depth_at(max(steps - 1, 0))

    def _finite(self, reports: list[StepReport]) -> list[StepReport]:
        for report in reports:
            skipped = self.config.nonfinite == "skip" and not math.isfinite(report.gradient_norm)
            self._skips = self._skips + 1 if skipped else 0
            if self._skips == MOST_SKIPS or not (skipped or math.isfinite(report.loss + report.gradient_norm)):
                raise TrainingError(
                    f"step {report.step + 1}: loss {report.loss}, gradient norm {report.gradient_norm}; wanted finite "
                    f"ones. What there is of the run is in {self.run.path}"
                )
        return reports

    def _save(self, step: int, elapsed: float, train_loss: float, finished: bool = False, wait: bool = False) -> None:
        """Write a checkpoint; wait: until it is on the disk, on every rank."""
        self.run.save_checkpoint(
            {
                "format": CHECKPOINT_FORMAT,
                "fingerprint": self.config.fingerprint(),
                "step": step,
                "elapsed": elapsed,
                "train_loss": train_loss,
                "finished": finished,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            wait=wait,
        )
        if wait:
            self.ranks.gather(None)

    def _restore(self) -> dict[str, Any] | None:
        """Take over weights and optimizer of the run's checkpoint, where there is one; returns the checkpoint."""
        state = self.run.load_checkpoint()
        if state is not None:
            found = state.get("format", 1)  # the first had no number
            if found != CHECKPOINT_FORMAT:
                version = "an earlier" if found < CHECKPOINT_FORMAT else "a later"
                raise RecordError(
                    f"checkpoint of {version} version of this program: {self.run.path} has format {found}, "
                    f"wanted {CHECKPOINT_FORMAT}"
                )
            if state["fingerprint"] != self.config.fingerprint():
                raise RecordError(f"checkpoint of {self.run.path} is of another configuration than its config.json")
            self.optimizer.load_state_dict(state["optimizer"])  # first, since it checks before it copies
            self.model.load_state_dict(state["model"])
        self.run.rewind(state["step"] if state else -1)
        return state
