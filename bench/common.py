"""What the benches share: the card's ceilings, real documents, result files in the form of one schema, bar pictures."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.config import BOS
from gpt.record import write_atomic

RESULTS = Path(__file__).parent / "results"
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")
PEERS = ("flash-attn-4", "quack-kernels", "liger-kernel", "gram-newton-schulz", "gemlite", "torchao")
_written: set[Path] = set()  # result files of this process


def short_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`; a CPU is `cpu`."""
    found = re.search(r"\b([ABHLV]\d{2,3}S?|RTX \d{4})\b", device)
    return found.group(1).lower().replace(" ", "") if found else "cpu"


def peer_versions() -> dict[str, str]:
    """Of the packages of peers that are installed."""
    found = {}
    for name in PEERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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


@contextmanager
def peer(name: str) -> Iterator[None]:
    """Where a peer fails, say so and go on; ours, `triton` and its variants, ends the run."""
    try:
        yield
    except Exception as failure:
        if name.startswith("triton"):
            raise
        print(f"{name}: left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)


def relative_errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:  # one a pair, float64
    """Relative Frobenius errors, kept in a tensor: its max() is NaN where one of them is, Python's drops it."""
    pairs = ((a.double(), b.double()) for a, b in zip(found, exact, strict=True))
    each = [(a - b).norm() / b.norm() for a, b in pairs]
    return torch.stack(each).cpu()


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
    bench: str,
    command: str,
    measured: dict[str, float],
    rows: Sequence[dict[str, Any]],
    path: Path | None = None,
    gpus: int = 1,
) -> tuple[Path, list[dict[str, Any]]]:
    """Write bench/results/<bench>-<gpu>.json (or `path`). Returns it and its rows, each with its own `ceiling`.

    Rows of ops and cases not measured again are kept where this process wrote them, or the same clean commit on the
    same card with the same versions, of peers too; all others are dropped.
    """
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    path = path or RESULTS / f"{bench}-{short_name(gpu)}.json"
    record = {
        "bench": bench,
        "gpu": gpu,
        "gpus": gpus,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "peers": peer_versions(),
        "commit": commit(),
        "command": command,
        "date": date.today().isoformat(),
        "ceilings": measured,
    }
    kept: list[dict[str, Any]] = []
    before = json.loads(path.read_text()) if path.exists() else {}
    clean = record["commit"] and not record["commit"].endswith("-dirty")
    same = all(before.get(key) == record[key] for key in ("bench", "gpu", "torch", "triton", "peers", "commit"))
    if path.resolve() in _written or (same and clean):
        again = {(row["op"], row["case"]) for row in rows}
        kept = [row for row in before["rows"] if (row["op"], row["case"]) not in again]
        commands = before["command"].split("; ")
        record["command"] = "; ".join(commands if command in commands else [*commands, command])
    whole = [*kept, *(row | {"ceiling": measured} for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record | {"rows": whole}, indent=1) + "\n").encode())
    _written.add(path.resolve())
    return path, whole


def draw_panels(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A panel an op and case: milliseconds of each implementation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["op"], row["case"]), []).append(row)
    columns = 4
    figure = Figure(figsize=(14, 1.9 * -(-len(panels) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axis, ((op, case), panel) in zip(axes, panels.items(), strict=False):
        names = [row["impl"] for row in panel]
        colors = [COLORS[0] if name.startswith("triton") else COLORS[6] for name in names]
        axis.barh(names, [row["ms"] for row in panel], color=colors)
        for index, row in enumerate(panel):
            percent = "" if row["percent_of_ceiling"] is None else f", {row['percent_of_ceiling']:.0f}%"
            axis.text(0, index, f" {row['ms']:.3f} ms{percent}", va="center", fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{op}, {case}", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def commit() -> str:
    """The commit of the measured code, with a mark where files differ from it."""
    import os

    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip()
