"""What a training run shows and logs while it goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from types import TracebackType

from tqdm import tqdm

from gpt.clock import Clock, StepReport
from gpt.config import Config
from gpt.record import Run
from gpt.score import Score


class Progress:
    """Bar and metrics.jsonl of a run, on rank 0. Steps are counted from 1: step n is the n-th to be finished."""

    def __init__(self, config: Config, run: Run, cap: float, bytes_per_token: float, done: int) -> None:
        self.config, self.run, self.cap = config, run, cap
        self.nats_per_bit_byte = math.log(2.0) * bytes_per_token
        self.train_loss = math.nan
        self._settings: dict[int, tuple[float, int]] = {}
        self._last: StepReport | None = None
        self._bar = tqdm(
            total=config.iterations,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not (run.ranks.main and sys.stderr.isatty()),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def launched(self, step: int, lr_factor: float, depth: tuple[int, ...]) -> None:
        self._settings[step] = lr_factor, len(depth)

    def report(self, reports: list[StepReport], clock: Clock) -> None:
        """Show finished steps and log every train_log_every-th, and every one that was skipped."""
        for report in reports:
            number = report.step + 1
            factor, layers = self._settings.pop(report.step)
            self._bar.update(1)
            if not math.isfinite(report.gradient_norm):
                what = f"skipped: loss {report.loss}, gradient norm {report.gradient_norm}"
                self.run.log({"step": number, "skipped": what})
                self._say(f"step {number}/{self.config.iterations}  {what}")
                continue
            self.train_loss = report.loss
            self._bar.set_postfix_str(self._line(report, clock.step_seconds or None), refresh=False)
            if number % self.config.train_log_every and number != 1:
                continue
            # Since the step that was logged last; nothing is known of the first of a process.
            last, self._last = self._last, report
            seconds = (report.launched - last.launched) / (report.step - last.step) if last else None
            self.run.log(
                {
                    "step": number,
                    "train_loss": report.loss,
                    "gradient_norm": report.gradient_norm,
                    "lr_factor": factor,
                    "layers": layers,
                    "elapsed": round(report.launched, 3),
                    "ms_per_step": round(1e3 * seconds, 3) if seconds else None,
                    "tokens_per_second": round(self.config.train_batch_tokens / seconds) if seconds else None,
                }
            )
            self._say(f"step {number}/{self.config.iterations}  {self._line(report, seconds)}")

    def validated(self, step: int, score: Score) -> None:
        """Show and log a validation of the weights after `step` steps."""
        self.run.log({"step": step, "val_loss": score.nats_per_token, "val_bpb": score.bpb})
        text = f"step {step}/{self.config.iterations}  validation loss {score.nats_per_token:.4f}  BPB {score.bpb:.4f}"
        if self._bar.disable:
            self._say(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def _line(self, report: StepReport, seconds: float | None) -> str:
        text = f"loss {report.loss:.4f}  BPB {report.loss / self.nats_per_bit_byte:.4f}"
        if seconds:
            text += f"  {1e3 * seconds:.1f} ms/step  {self.config.train_batch_tokens / seconds:,.0f} tok/s"
        return text + (f"  {max(self.cap - report.launched, 0.0):.0f} s left" if self.cap else "")

    def _say(self, text: str) -> None:
        if self.run.ranks.main and self._bar.disable:
            print(text, flush=True)
