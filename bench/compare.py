"""Whether one set of runs is better than another: means over seeds, and Welch's test.

    python -m bench.compare A1 A2 A3 -- B1 B2 B3        run folders or score records; the first set is the new one
    python -m bench.compare A... -- B... --score chunk

The field asks a new record to be better by at least 0.005 nats per token with p < 0.01. Nats per token and bits per
byte differ by the bytes of a token: at 3.73 bytes, 0.005 nats are 0.0019 BPB. Records whose seal is not theirs are
refused, and so are scores of different texts, forms, contexts or strides.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.artifact import beside
from gpt.ledger import artifact_of, audit_record, ledger_of, read_record

THRESHOLD, LEVEL = 0.005, 0.01  # nats per token; p


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz)."""
    if not 0.0 < x < 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # where the other tail converges faster
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny, c, d = 1e-300, 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 1000):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + factor * d
            c = 1.0 + factor / c
            d, c = 1.0 / (d if abs(d) > tiny else tiny), c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return math.exp(log_front) * value / a


def t_cdf(t: float, freedom: float) -> float:
    """P(T <= t) of Student's distribution with so many degrees of freedom, which need not be whole."""
    tail = 0.5 * incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return tail if t < 0 else 1.0 - tail


@dataclass(frozen=True)
class Welch:
    """Welch's test of mean(b) - mean(a) > margin, one-sided."""

    difference: float  # mean(b) - mean(a)
    t: float
    freedom: float
    p: float


def welch(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> Welch:
    """Test that `a` is lower than `b` by more than `margin`. Raises ValueError where one has fewer than two values."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values: Welch's test wants at least two of each")
    va, vb = (statistics.variance(values) / len(values) for values in (a, b))
    difference = statistics.fmean(b) - statistics.fmean(a)
    if va + vb == 0:
        excess = difference - margin
        return Welch(difference, math.copysign(math.inf, excess), math.inf, float(excess <= 0))
    t = (difference - margin) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Welch(difference, t, freedom, t_cdf(-t, freedom))


@dataclass(frozen=True)
class Result:
    """One score of one run."""

    path: Path
    seed: str
    nats_per_token: float
    bpb: float
    tokens: int
    bytes: int
    shards: str  # SHA-256 of the tokens
    form: str
    context: int
    stride: int
    settings: dict[str, float]  # of test-time training
    leaking: bool
    artifact: str


def read_result(path: Path, name: str) -> Result:
    """A score from a run's folder or a record, audited with its ledger and the artifact beside it.

    Raises ValueError where there is none of that name, or where the audit refuses the record.
    """
    file = path / "summary.json" if path.is_dir() else path
    record = read_record(file)
    artifact = artifact_of(record)
    audit_record(file, **beside(file, None if path.is_dir() else artifact))
    scores = record["scores"]
    if name not in scores:
        raise ValueError(f"{file}: no score {name!r}; it has {', '.join(scores)}")
    found = scores[name]
    return Result(
        path,
        str(record.get("seed", "?")),
        found["nats"] / found["tokens"],
        found["nats"] / math.log(2) / found["bytes"],
        found["tokens"],
        found["bytes"],
        ledger_of(file, found)[0]["shards"],
        found["form"],
        found["context"],
        found["stride"],
        found["settings"],
        record["leaking"],
        artifact,
    )


def compare(a: Sequence[Result], b: Sequence[Result]) -> str:
    """The table.

    Raises ValueError where the scores are not of one text, form, context and stride, those of one set not with the
    same settings, or two of one artifact with the same settings.
    """
    texts = {(result.tokens, result.bytes, result.shards) for result in (*a, *b)}
    if len(texts) > 1:
        said = ", ".join(f"{t:,} tokens of {n:,} bytes, sha256 {sha[:16]}" for t, n, sha in sorted(texts))
        raise ValueError(f"scores of different texts: {said}")
    for what in ("form", "context", "stride"):
        runs_of: dict[Any, list[str]] = {}
        for result in (*a, *b):
            runs_of.setdefault(getattr(result, what), []).append(str(result.path))
        if len(runs_of) > 1:
            found = "; ".join(f"{value} of {', '.join(paths)}" for value, paths in runs_of.items())
            raise ValueError(f"scores of different {what}, wanted one: {found}")
    for name, results in (("A", a), ("B", b)):
        if any(result.settings != results[0].settings for result in results):
            each = "; ".join(f"{result.path}: {result.settings}" for result in results)
            raise ValueError(f"scores in {name} with different settings of {results[0].form}: {each}")
    if len({(result.artifact, *sorted(result.settings.items())) for result in (*a, *b)}) < len(a) + len(b):
        raise ValueError("two of the runs have one artifact: they are one result")
    lines = [f"{'':4s}{'seed':>8s}{'nats/token':>13s}{'BPB':>11s}  run"]
    for name, results in (("A", a), ("B", b)):
        lines += [
            f"{name:4s}{r.seed:>8s}{r.nats_per_token:13.6f}{r.bpb:11.6f}  {r.path}{'  LEAKING' if r.leaking else ''}"
            for r in results
        ]
    for name, results in (("A", a), ("B", b)):
        for label, of in (("mean", statistics.fmean), ("std", statistics.stdev)):
            if label == "mean" or len(results) > 1:
                per_token, bpb = of([r.nats_per_token for r in results]), of([r.bpb for r in results])
                lines.append(f"{name:4s}{label:>8s}{per_token:13.6f}{bpb:11.6f}  n = {len(results)}")
    new, old = ([r.nats_per_token for r in results] for results in (a, b))
    gain = statistics.fmean(old) - statistics.fmean(new)
    per_byte = statistics.fmean(r.bpb for r in b) - statistics.fmean(r.bpb for r in a)
    lines.append(f"A is better by {gain:+.6f} nats per token, {per_byte:+.6f} BPB")
    if min(len(a), len(b)) > 1:
        for margin in (0.0, THRESHOLD):
            test = welch(new, old, margin)
            lines.append(
                f"better by more than {margin:g} nats: t = {test.t:.3f}, {test.freedom:.2f} degrees of freedom, "
                f"p = {test.p:.2g} (Welch, one-sided)"
            )
        record = gain >= THRESHOLD and welch(new, old).p < LEVEL
        verdict = "met" if record else "NOT met"
    else:
        verdict = "not tested: it wants at least two runs of each"
    lines.append(f"the field's rule, {THRESHOLD} nats per token and p < {LEVEL}: {verdict}")
    if any(result.leaking for result in (*a, *b)):
        lines.append("LEAKING: weights were trained on the tokens that they are scored on; nothing above counts")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="A... -- B", help="folders or records, -- between the two sets")
    parser.add_argument("--score", default="artifact_sliding", help="name of the score in the records")
    try:
        divide = arguments.index("--")
    except ValueError:
        parser.error("wanted -- between the two sets")
    # What stands behind the second set's names belongs to the parser again.
    first = parser.parse_args(arguments[:divide])
    second = parser.parse_args(arguments[divide + 1 :])
    name = second.score if "--score" in arguments[divide:] else first.score
    try:
        new, old = ([read_result(Path(run), name) for run in part.runs] for part in (first, second))
        print(compare(new, old))
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
