"""What codes of quantised weights compress to: ours, the seed's method, other programs and models of the codes.

    python -m bench.pack ARTIFACT

Writes bench/results/pack-cpu.json: a row for each method and parameter (case), and for all parameters together ("all").
`bytes` of a method that writes a file are those of the file; of an estimate (impl "information: ...", no times) the
empirical entropy in a context, tables not counted, or for linear prediction what held-out rows would save. "rows by
...": sorted before the seed's method, their order in the file. Codes alone: scales and vectors are in the row "scales,
vectors, header". "live" are the codes without the rows of dead neurons, which is how gpt/pack.py writes them; the
artifact may be of either kind.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import RESULTS
from gpt import entropy
from gpt.artifact import ArtifactError, load
from gpt.config import ROOT
from gpt.gptq import LEVELS, Quantised, without_dead_neurons
from gpt.record import write_atomic

Codes = NDArray[np.int8]  # (matrices, rows, columns)


def shuffled(data: bytes) -> bytes:
    """The seed's byte shuffle of stride 2."""
    return data[::2] + data[1::2]


def by_size(rows: NDArray[np.int8]) -> NDArray[np.int64]:
    """Order of rows by the sum of what their codes are without sign."""
    return np.abs(rows.astype(np.int64)).sum(1).argsort(kind="stable")


def by_likeness(rows: NDArray[np.int8]) -> NDArray[np.int64]:
    """Order of rows along the direction in which they differ most."""
    numbers = rows.astype(np.float64)
    _, vectors = np.linalg.eigh(numbers.T @ numbers)
    return (numbers @ vectors[:, -1]).argsort(kind="stable")


def ordered(order: Callable[[NDArray[np.int8]], NDArray[np.int64]], codes: Codes) -> bytes:
    """Brotli 11 of the rows of all matrices in an order, and of that order."""
    rows = codes.reshape(-1, codes.shape[-1])
    places = order(rows)
    return brotli.compress(entropy.planes(places.astype("<u4").tobytes(), 4) + shuffled(rows[places].tobytes()))


def bit_planes(codes: Codes) -> bytes:
    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8).ravel()
    return b"".join(np.packbits(unsigned >> bit & 1).tobytes() for bit in range(8))


PROGRAMS: dict[str, tuple[Callable[[Codes], bytes], Callable[[bytes], bytes]]] = {
    "seed-method": (lambda codes: brotli.compress(shuffled(codes.tobytes())), brotli.decompress),
    "rows by size, seed-method": (partial(ordered, by_size), brotli.decompress),
    "rows by likeness, seed-method": (partial(ordered, by_likeness), brotli.decompress),
    "lzma": (lambda codes: lzma.compress(codes.tobytes(), preset=9), lzma.decompress),
    "lzma, bit planes": (lambda codes: lzma.compress(bit_planes(codes), preset=9), lzma.decompress),
    "bzip2": (lambda codes: bz2.compress(codes.tobytes()), bz2.decompress),
}
try:  # no dependency of the project
    import zstandard  # type: ignore[import-not-found]

    PROGRAMS["zstd"] = (
        lambda codes: zstandard.compress(codes.tobytes(), 22),
        zstandard.decompress,
    )
except ImportError:
    pass


def conditional(codes: Codes, context: NDArray[Any]) -> float:
    """Bytes of empirical entropy given a context, integers of the codes' shape."""
    joint = context.astype(np.int64).ravel() * 256 + (codes.ravel().astype(np.int64) + 128)
    _, joint = np.unique_inverse(joint)
    pairs = np.bincount(joint)
    _, alone = np.unique_inverse(context.ravel())
    singles = np.bincount(alone)

    def surprise(counts: NDArray[Any]) -> float:
        return float(-(counts * np.log2(counts / counts.sum())).sum())

    return (surprise(pairs) - surprise(singles)) / 8


def octaves(sizes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Mean squares in eighths of an octave."""
    return np.rint(8 * np.log2(sizes + 2.0**-12)).astype(np.int64)


def above(codes: Codes, axis: int) -> Codes:
    """The code before each along an axis, 0 before the first."""
    moved = np.roll(codes, 1, axis)
    moved[(slice(None),) * axis + (0,)] = 0
    return moved


def estimates(codes: Codes) -> dict[str, float]:
    """Bytes by model."""
    square = codes.astype(np.float64) ** 2
    zeros = np.zeros(codes.shape, np.int64)
    matrix = zeros + np.arange(len(codes))[:, None, None]
    found = {
        "order 0": zeros,
        "by matrix": matrix,
        "by mean square of the row": zeros + octaves(square.mean(2, keepdims=True)),
        "by mean square of the column": zeros + octaves(square.mean(1, keepdims=True)),
        "by the code above": above(codes, 1),
        "by the code to the left": above(codes, 2),
        "by the code in the matrix before": above(codes, 0),
    }
    return {f"information: {name}": conditional(codes, context) for name, context in found.items()}


def prediction_gain(codes: Codes) -> float:
    """Bytes that linear prediction of columns from one another would save: Gaussian, covariance of half the rows,
    shrunk as suits the other half best; the matrix of coefficients not counted."""
    saved = 0.0
    for matrix in codes:
        rows = matrix[matrix.any(1)].astype(np.float64)
        rows = rows[:, (rows**2).mean(0) > 0.1]
        order = np.random.default_rng(0).permutation(len(rows))
        fit, test = rows[order[::2]], rows[order[1::2]]
        if min(fit.shape) < 2:
            continue
        size = (fit**2).mean(0) + 1e-3
        plain = (np.log2(size) / 2 + (test**2).mean(0) / size / 2 / np.log(2)).sum()
        gains = [0.0]
        for shrink in (0.7, 0.8, 0.9, 0.95):
            covariance = (1 - shrink) * fit.T @ fit / len(fit) + shrink * np.diag(size)
            lower = np.linalg.cholesky(covariance)
            residual = np.linalg.solve(lower, test.T)
            bits = np.log2(lower.diagonal()).sum() + (residual**2).mean(1).sum() / 2 / np.log(2)
            gains.append(float(plain - bits))
        saved += max(gains) * len(rows) / 8
    return saved


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def measure(codes: Codes, levels: int) -> list[dict[str, Any]]:
    """All rows of one parameter. Raises ValueError where ours does not read back."""
    encode_s, data = timed(lambda: entropy.encode(entropy.plan(codes, levels)))
    decode_s, found = timed(lambda: entropy.decode(data, codes.shape, levels))
    if not np.array_equal(found, codes):
        raise ValueError("codes do not come back")
    rows: list[dict[str, Any]] = [{"impl": "ours", "bytes": len(data), "encode_s": encode_s, "decode_s": decode_s}]
    for name, (compress, decompress) in PROGRAMS.items():
        encode_s, data = timed(partial(compress, codes))
        decode_s, _ = timed(partial(decompress, data))
        rows.append({"impl": name, "bytes": len(data), "encode_s": encode_s, "decode_s": decode_s})
    distinct = np.unique(codes.reshape(-1, codes.shape[-1]), axis=0)
    more = {
        "information: order 0, equal rows once": conditional(distinct, np.zeros(distinct.shape, np.int64)),
        "information: ours, without tables and states": entropy.plan(codes, levels).bits / 8,
        "estimate: saved by linear prediction": prediction_gain(codes),
    }
    rows += [{"impl": name, "bytes": size} for name, size in (estimates(codes) | more).items()]
    return rows


def collect(path: Path) -> dict[str, Any]:
    artifact = load(path)
    tensors = dict(artifact.tensors)
    quantised = {name: value for name, value in tensors.items() if isinstance(value, Quantised)}
    cases = dict(quantised)
    up, down = (quantised[f"mlp_{name}_bank"] for name in ("up", "down"))
    cases["mlp_up_bank, live"] = without_dead_neurons(up, down)
    rows: list[dict[str, Any]] = []
    for name, value in cases.items():
        codes = value.codes.numpy().reshape(-1, *value.codes.shape[-2:])
        if name == "mlp_up_bank, live" and torch.equal(value.codes, up.codes):  # left out when it was packed
            rows += [row | {"case": name} for row in rows if row["case"] == "mlp_up_bank"]
            continue
        rows += [{"op": "pack", "case": name, **row} for row in measure(codes, LEVELS[value.kind])]
        for row in rows:
            if row["case"] == name:
                print(f"{name:20s}{row['impl']:48s}{row['bytes']:12,.0f}", flush=True)
    for case, left_out in (("all", "mlp_up_bank, live"), ("all, live", "mlp_up_bank")):
        sums: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["case"] in cases and row["case"] != left_out:
                total = sums.setdefault(row["impl"], {"op": "pack", "case": case, "impl": row["impl"]})
                for key in ("bytes", "encode_s", "decode_s"):
                    if key in row:
                        total[key] = total.get(key, 0) + row[key]
        rows += sums.values()
    others = artifact.nbytes - sum(
        artifact.header.streams[e.stream].bytes for e in artifact.header.tensors if e.kind in LEVELS
    )
    rows.append({"op": "pack", "case": "scales, vectors, header", "impl": "ours", "bytes": others})
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "bench": "pack",
        "gpu": "cpu",
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "load_average": os.getloadavg(),
        "artifact_sha256": artifact.sha256,
        "artifact_bytes": artifact.nbytes,
        "dead_neurons": int((down.codes == 0).all(-2).sum()),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "command": f"python -m bench.pack {shlex.quote(path.name)}",
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """All parameters together."""
    lines = [f"{'':50s}{'bytes':>12s}{'of seed':>9s}{'encode s':>10s}{'decode s':>10s}"]
    wanted = {"case": "all", "impl": "seed-method"}
    seed = next((row["bytes"] for row in result["rows"] if wanted.items() <= row.items()), None)
    for case in ("all", "all, live"):
        rows = [row for row in result["rows"] if row["case"] == case]
        lines.append(case)
        for row in rows:
            share = f"{row['bytes'] / seed:9.4f}" if seed else f"{'':9s}"
            times = "".join(f"{row[key]:10.2f}" for key in ("encode_s", "decode_s") if key in row)
            lines.append(f"  {row['impl']:48s}{row['bytes']:12,.0f}{share}{times}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pack", description="Measure how well codes compress.")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    options = parser.parse_args(arguments)
    try:
        result = collect(options.artifact)
    except (ArtifactError, ValueError) as error:
        print(f"bench.pack: {error}", file=sys.stderr)
        return 2
    write_atomic(options.results / "pack-cpu.json", (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
