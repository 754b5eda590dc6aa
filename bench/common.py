"""What the benches share: the card's ceilings, real documents, result files in the form of one schema, bar pictures."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.config import BOS
from gpt.record import write_atomic

RESULTS = Path(__file__).parent / "results"
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")


def short_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`; a CPU is `cpu`."""
    found = re.search(r"\b([ABHLV]\d{2,3}S?|RTX \d{4})\b", device)
    return found.group(1).lower().replace(" ", "") if found else "cpu"


def milliseconds(f: Callable[[], Any], repeats: int = 20, warm_up: int = 3) -> list[float]:
    """Times of single calls by device events, one behind the other, after some that are not timed."""
    for _ in range(warm_up):
        f()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        f()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def ceilings() -> dict[str, float]:
    """What this card does today: a bf16 product of 8192^3 (TFLOP/s), a copy of 2 GB (GB/s, read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = statistics.median(milliseconds(lambda: a @ b))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(milliseconds(lambda: target.copy_(source)))
    return {
        "bf16_tflops": round(2 * 8192**3 / product / 1e9, 1),
        "copy_gb_s": round(2 * source.numel() * source.element_size() / copy / 1e6, 1),
    }


def read_tokens(path: Path, count: int) -> Tensor:  # (count,) int64
    """The first tokens of a shard. Raises ValueError where it has fewer."""
    found = (path.stat().st_size - 1024) // 2
    if found < count:
        raise ValueError(f"{path} has {found} tokens, wanted {count}")
    return torch.from_file(str(path), size=512 + count, dtype=torch.uint16)[512:].long()


def document_starts(tokens: Tensor) -> Tensor:  # (B, T) -> (B, T) int32
    """For each token of packed rows the position of its document's first."""
    position = torch.arange(tokens.size(1), dtype=torch.int32, device=tokens.device)
    return torch.where(tokens == BOS, position, 0).cummax(1).values.int()


def write_result(
    bench: str, command: str, measured: dict[str, float], rows: Sequence[dict[str, Any]], path: Path | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Write bench/results/<bench>-<gpu>.json (or `path`). Returns it and its rows.

    Rows of a commit before are dropped; of the same commit, those of ops and cases not measured again are kept.
    """
    import triton

    gpu = torch.cuda.get_device_name()
    path = path or RESULTS / f"{bench}-{short_name(gpu)}.json"
    record = {
        "bench": bench,
        "gpu": gpu,
        "gpus": 1,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "command": command,
        "date": date.today().isoformat(),
        "ceilings": measured,
    }
    kept: list[dict[str, Any]] = []
    if path.exists() and (before := json.loads(path.read_text()))["commit"] == record["commit"]:
        again = {(row["op"], row["case"]) for row in rows}
        kept = [row for row in before["rows"] if (row["op"], row["case"]) not in again]
        if before["command"] != command:
            record["command"] = f"{before['command']}; {command}"
    whole = [*kept, *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record | {"rows": whole}, indent=1) + "\n").encode())
    return path, whole


def commit() -> str:
    """The commit of the measured code, with a mark where files differ from it."""
    import os

    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip()
