"""The record of a run: a folder of its own with everything that was set, measured and made.

config.json          the full configuration            metrics.jsonl        one JSON line a logged step
environment.json     versions, GPU, git commit          curves.png           loss and learning rate
checkpoint.pt        weights, optimizer, EMA, position  summary.json         what the run ended with
model.pga            the artifact                       *.ledger.gz          how each score came about
report.html          all of it on one page              parts.json           milliseconds of a step's parts
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gpt.bundle import code_sha256
from gpt.config import ROOT, Config
from gpt.distributed import Ranks

PACKAGES = ("triton", "numpy", "sentencepiece", "brotli", "pydantic", "pydantic-settings")


class RecordError(ValueError):
    """A run's folder is missing, taken, damaged or belongs to another configuration."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name once it is whole and on the disk, and never if the writing fails."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk has room again
        raise
    partial.replace(path)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


def environment(ranks: Ranks) -> dict[str, Any]:
    """What the run ran on: versions, GPU, processes and the commit of the code (with "+" where files had changes)."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # Only this project's repository: a home that is one holds the source of a one-file program, too.
        commit = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else ""
        commit += "+" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    except FileNotFoundError:
        commit = ""
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__, **{name: installed(name) for name in PACKAGES}},
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda,
        "world_size": ranks.world_size,
        "code_sha256": code_sha256(ROOT),
        "git_commit": commit or os.environ.get("GIT_COMMIT") or None,  # the name for a copy without its repository
    }


def read_config(path: Path) -> Config:
    """The configuration of the run at `path`. Raises RecordError where that is not a run's folder."""
    try:
        return Config(**json.loads((path / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} is not a run's folder: {error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of the metrics.jsonl of the run at `path`; a last line that a kill cut short is left out."""
    file = path / "metrics.jsonl"
    entries = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


class Run:
    """A run's folder, written by rank 0. Made by `create` or found by `resume`."""

    def __init__(self, path: Path, config: Config, ranks: Ranks) -> None:
        self.path, self.config, self.ranks = path, config, ranks
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    @classmethod
    def create(cls, config: Config, ranks: Ranks) -> Run:
        """A new folder under config.runs_path.

        Raises RecordError where its name is taken, since runs never share one, and where a rank does not see it, since
        all of them read checkpoint and artifact.
        """
        name = config.run_id or time.strftime(f"%Y%m%d-%H%M%S-{config.preset}-{config.seed}")
        path, number = config.runs_path / name, 1
        while ranks.main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                break
            except FileExistsError:
                if config.run_id or not path.is_dir():
                    raise RecordError(f"run folder {path} exists; wanted a new run_id, or --resume {path}") from None
                number += 1
                path = config.runs_path / f"{name}-{number}"
        run = cls(Path(ranks.broadcast_text(str(path))), config, ranks)
        seen = ranks.gather(run.path.is_dir())
        if not all(seen):
            if ranks.main:
                run.path.rmdir()
            raise RecordError(
                f"rank {seen.index(False)} does not see {run.path}, which rank 0 made; "
                "wanted a runs_path that all nodes share"
            )
        run._lock()
        run.write_json("config.json", config.model_dump(mode="json"))
        run.write_json("environment.json", environment(ranks))
        return run

    @classmethod
    def resume(cls, path: Path, config: Config, ranks: Ranks) -> Run:
        """The run at `path`, to go on: notes on what. config: that of read_config(path)."""
        run = cls(path, config, ranks)
        run._lock()
        if ranks.main:
            with (path / "resumed.jsonl").open("a") as file:
                file.write(json.dumps(environment(ranks)) + "\n")
        return run

    def _lock(self) -> None:
        """Hold the folder for the life of this process. Raises RecordError where another process holds it."""
        if self.ranks.main:
            self._held = (self.path / "lock").open("w")
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(f"{self.path} is in use by another process") from None

    def write_json(self, name: str, value: Any) -> None:
        if self.ranks.main:
            write_atomic(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises RecordError where a checkpoint could not be written meanwhile."""
        if self.ranks.main:
            self._check()
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def rewind(self, step: int) -> None:
        """Drop what metrics.jsonl says of steps after `step`: they will be run again."""
        if self.ranks.main:
            kept = [json.dumps(entry) for entry in self.metrics() if entry["step"] <= step]
            write_atomic(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept).encode())

    def save_checkpoint(self, state: dict[str, Any], wait: bool = False) -> None:
        """Replace checkpoint.pt. Rank 0 copies the state to host memory here and writes it in a thread."""
        if not self.ranks.main:
            return
        self.join()
        copied = _to_host(state)

        def write() -> None:
            try:
                with whole_file(self.path / "checkpoint.pt") as file:
                    torch.save(copied, file)
            except BaseException as error:
                while error.__context__ is not None:  # torch's complaint about a disk that was full
                    error = error.__context__
                self._failure = error

        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()
        if wait:
            self.join()

    def join(self) -> None:
        """Wait for the checkpoint under way. Raises RecordError where it could not be written; the last one stands."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            before = "the one before stands" if (self.path / "checkpoint.pt").exists() else "there is none before it"
            raise RecordError(f"checkpoint of {self.path} was not written: {failure}; {before}")

    def load_finished(self) -> dict[str, Any]:
        """The last checkpoint on the CPU. Raises RecordError where it is damaged or the run has not finished."""
        state = self.load_checkpoint()
        if state is None or not state["finished"]:
            raise RecordError(
                f"{self.path} has not finished training; wanted a finished run: train.py --resume {self.path}"
            )
        return state

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint on the CPU, or None. Raises RecordError where the file is damaged."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RecordError(f"{path} cannot be read as a checkpoint: {error}") from error
        return state

    def draw_curves(self) -> None:
        """curves.png: training and validation loss, and the learning-rate factor, by step."""
        if not self.ranks.main:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        entries = self.metrics()
        train = [(e["step"], e["train_loss"], e["lr_factor"]) for e in entries if "train_loss" in e]
        val = [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        if train:
            steps, losses, factors = zip(*train, strict=True)
            loss.plot(steps, losses, color="#4477aa", linewidth=1, label="training batch")
            rate.plot(steps, factors, color="#228833", linewidth=1.2)
        if val:
            loss.plot(*zip(*val, strict=True), color="#cc3311", marker="o", markersize=3, label="validation")
        loss.set_ylabel("loss (nats per token)")
        rate.set_ylabel("learning-rate factor")
        rate.set_xlabel("step")
        rate.set_ylim(-0.05, 1.05)
        if train or val:
            loss.legend(frameon=False)
        loss.set_title(self.path.name)
        for axis in (loss, rate):
            axis.grid(alpha=0.25)
        with whole_file(self.path / "curves.png") as file:
            figure.savefig(file, format="png", dpi=120)


def _to_host(value: Any) -> Any:
    """A copy of nested containers with every tensor in host memory, apart from the one that training goes on with."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value
