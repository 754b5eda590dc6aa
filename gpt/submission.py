"""What finished runs, one a seed, amount to when handed in together; and what may not be.

Every figure of a submission comes from the runs' records by way of one object, Facts, so no two of its files can
disagree: gpt.folder writes them. What reviewers would refuse is refused here; some of it may be declared instead, and
is then stamped wherever the score is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gpt import artifact, bundle
from gpt.config import ARTIFACT_LIMIT, MACHINE, ROOT, Config, ConfigError
from gpt.ledger import (
    CLAIM,
    COUNT,
    FIXED,
    MOST,
    NUMBER,
    SHA256,
    TEXT,
    VAL_BYTES,
    VAL_TOKENS,
    Kind,
    LedgerError,
    audit_record,
    base_name,
    canonical,
    ledger_of,
)
from gpt.record import RecordError, read_config
from gpt.ttt import parse_form
from kernels import select

SECONDS_LIMIT = 600  # of training with calibration, and again of scoring
FEWEST_SEEDS = 3
EARLY_SECONDS, LATE_SECONDS = 1.0, 30.0  # by which a run's last logged step and its end may seem to be apart
# Nats a token of a bit a byte there, ln 2 times the bytes of a token.
NATS_PER_BIT = {
    "sp1024": 1.6885,
    "sp4096": 2.3010,
    "sp8192": 2.5831,
    "sp8192, long rows": 2.5831,
    "sp8192 CaseOps": 2.1884,
    "bytes": 0.6929,
}
TTT = "artifact_ttt_"  # and a form: a score with test-time training, among a run's

# What a submission may own up to, and the words that then stand wherever its score does.
DECLARATIONS = {
    "few-seeds": "FEWER THAN THREE SEEDS",
    "leaking": "LEAKING: the model was trained on tokens that it is scored on",
    "non-canonical": "NON-CANONICAL VALIDATION: not comparable with scores on FineWeb",
    "other-code": "OTHER CODE: train_gpt.py is not the code that made these runs",
    "over-time": "OVER TIME: more than ten minutes of training or of scoring",
}
# What of submission.json's "compliance" each of them gives up.
COMPLIANCE = {
    "few-seeds": ("three_seeds",),
    "leaking": ("no_pre_quant_ttt", "score_first_ttt"),
    "non-canonical": ("canonical_validation",),
    "over-time": ("train_under_600s", "eval_under_600s"),
}


class SubmissionError(RecordError):
    """Runs cannot be handed in together; the message says what was found and what was wanted."""


# What the records of a run hold, as far as it is handed in.
WHOLE: Kind = lambda x: type(x) is int and 0 <= x <= MOST, f"a whole number of 0 to {MOST}"
DATE: Kind = lambda x: isinstance(x, str) and bool(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+Z", x)), "YYYY-MM-DDTHH:MM:SSZ"


def _or_null(kind: Kind) -> Kind:
    right, name = kind
    return lambda x: x is None or right(x), f"{name} or null"


def _versions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_or_null(TEXT)[0], value.values())) and TEXT[0](value.get("torch"))


ENVIRONMENT: dict[str, Kind] = {
    "started": DATE,
    "python": TEXT,
    "packages": (_versions, "versions by name, torch's among them"),
    "device": TEXT,
    "cuda": _or_null(TEXT),
    "world_size": COUNT,
}
SUMMARY: dict[str, Kind] = {
    "run": TEXT,
    "fingerprint": TEXT,
    "steps": WHOLE,
    "seconds": NUMBER,
    "pre_quant_seconds": NUMBER,
    "calibration_seconds": NUMBER,
    "ms_per_step": _or_null(NUMBER),
    "depth": (lambda x: isinstance(x, list) and all(map(WHOLE[0], x)), "the layers in their order"),
    "scores": (
        lambda x: isinstance(x, dict) and "ema" in x and any(name.startswith("artifact") for name in x),
        "scores by name, ema and artifact among them",
    ),
    "artifact": (lambda x: isinstance(x, dict) and SHA256[0](x.get("sha256")), "an object with its sha256"),
}
TRAINED: dict[str, Kind] = {
    "step": WHOLE,
    "train_loss": NUMBER,
    "gradient_norm": NUMBER,
    "lr_factor": NUMBER,
    "layers": COUNT,
    "elapsed": NUMBER,
    "ms_per_step": _or_null(NUMBER),
}
VALIDATED: dict[str, Kind] = {"step": WHOLE, "val_loss": NUMBER, "val_bpb": NUMBER}
SKIPPED: dict[str, Kind] = {"step": WHOLE, "skipped": TEXT}


def _kinds_of(entry: Any) -> dict[str, Kind]:
    """Of a line of metrics.jsonl."""
    named = entry if isinstance(entry, dict) else {}
    return VALIDATED if "val_loss" in named else SKIPPED if "skipped" in named else TRAINED


def _expect(what: str, found: Any, wanted: Mapping[str, Kind]) -> None:
    """Raises RecordError unless it is an object with these entries, each of its kind."""
    if not isinstance(found, dict):
        raise RecordError(f"{what}: {json.dumps(found)[:80]}, wanted an object")
    if missing := sorted(wanted.keys() - found.keys()):
        raise RecordError(f"{what}: no {', '.join(missing)}")
    for name, (right, kind) in wanted.items():
        if not right(found[name]):
            raise RecordError(f"{what}: {name} {json.dumps(found[name])[:80]}, wanted {kind}")


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RecordError(str(error)) from None


def _json(what: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what}: {error}; wanted JSON") from None


def _record(file: Path, wanted: Mapping[str, Kind]) -> dict[str, Any]:
    found: dict[str, Any] = _json(str(file), _bytes(file))
    _expect(str(file), found, wanted)
    return found


def _lines(file: Path) -> list[Any]:
    return [_json(f"{file}, line {number}", line) for number, line in enumerate(_bytes(file).splitlines(), 1)]


@dataclass(frozen=True)
class SeedRun:
    """A finished run's records."""

    path: Path
    config: Config
    environment: dict[str, Any]
    resumed: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    model: bytes
    adapted: Path | None = None  # record of the scores with test-time training that summary["scores"] then holds
    adapted_on: dict[str, Any] = field(default_factory=dict)  # their environment

    @property
    def seed(self) -> int:
        return self.config.seed

    @classmethod
    def read(cls, path: Path) -> SeedRun:
        """Raises RecordError where `path` is no run's folder or one of its records is not what a run writes.

        Of the kind of SubmissionError where the run is not finished.
        """
        config = read_config(path)
        if not (path / "summary.json").exists():
            raise SubmissionError(f"{path} is not finished: no summary.json; train.py --resume {path}")
        environment = _record(path / "environment.json", ENVIRONMENT)
        summary = _record(path / "summary.json", SUMMARY)
        for name, score in summary["scores"].items():
            _expect(f"{path}/summary.json: score {name!r}", score, CLAIM)
        resumed = path / "resumed.jsonl"
        again = _lines(resumed) if resumed.exists() else []
        for number, entry in enumerate(again, 1):
            _expect(f"{resumed}, line {number}", entry, {"started": ENVIRONMENT["started"]})
        metrics = _lines(path / "metrics.jsonl")
        for number, entry in enumerate(metrics, 1):
            _expect(f"{path}/metrics.jsonl, line {number}", entry, _kinds_of(entry))
        return cls(path, config, environment, again, summary, metrics, _bytes(path / "model.pga"))


@dataclass(frozen=True)
class Seed:
    """One seed's figures, as every file shows them."""

    seed: int
    run: str
    val_bpb: float
    val_loss: float  # nats a token
    scores: dict[str, dict[str, Any]]
    steps: int
    train_seconds: float  # fine-tuning before quantising included
    calibration_seconds: float
    eval_seconds: float
    step_ms: float
    model_bytes: int
    total_bytes: int
    sha256: str
    adapted: Path | None  # record of the scores with test-time training


@dataclass(frozen=True)
class Facts:
    """All that a submission says, once."""

    name: str
    author: str
    github_id: str
    date: str
    blurb: str
    declared: tuple[str, ...]
    headline: str  # the score handed in, a key of summary.json's scores
    seeds: tuple[Seed, ...]
    config: Config  # of the first seed
    environment: dict[str, Any]
    code: bytes  # train_gpt.py
    code_sha256: str  # of the files in it

    def mean(self, value: Callable[[Seed], float]) -> float:
        return statistics.fmean(map(value, self.seeds))

    def std(self, value: Callable[[Seed], float]) -> float:
        """Of the sample, n - 1; 0 for one seed."""
        return statistics.stdev(map(value, self.seeds)) if len(self.seeds) > 1 else 0.0

    @property
    def val_bpb(self) -> float:
        return round(self.mean(lambda seed: seed.val_bpb), 8)

    @property
    def total_bytes(self) -> int:
        """Of the largest seed."""
        return max(seed.total_bytes for seed in self.seeds)

    @property
    def score(self) -> dict[str, Any]:
        """Of the first seed; tokens, bytes, context and stride are those of all."""
        return self.seeds[0].scores[self.headline]

    @property
    def ttt(self) -> str:
        """Form and settings of the test-time training in the score handed in; empty where there is none."""
        return spelled(self.score) if self.headline.startswith(TTT) else ""

    @property
    def hardware(self) -> str:
        return f"{self.environment['world_size']}x {self.environment['device'].removeprefix('NVIDIA ')}"

    @property
    def compliance(self) -> dict[str, bool]:
        leaking = "leaking" in self.declared
        found = {
            "train_under_600s": all(s.train_seconds + s.calibration_seconds <= SECONDS_LIMIT for s in self.seeds),
            "eval_under_600s": all(s.eval_seconds <= SECONDS_LIMIT for s in self.seeds),
            "artifact_under_16mb": self.total_bytes <= ARTIFACT_LIMIT,
            "no_slot": True,  # the program has none of these three
            "no_etlb": True,
            "no_ngram_cache": True,
            "no_pre_quant_ttt": not leaking,
            "three_seeds": len(self.seeds) >= FEWEST_SEEDS,
            "canonical_validation": "non-canonical" not in self.declared,
        }
        return found | ({"score_first_ttt": not leaking} if self.ttt else {})

    @property
    def record(self) -> bool:
        """Whether it can stand on the leaderboard; anything else goes to the track beside it."""
        machine = self.environment["world_size"] == 8 and "H100" in self.environment["device"]
        return machine and not self.declared and all(self.compliance.values())

    @property
    def stamps(self) -> list[str]:
        return [DECLARATIONS[name] for name in self.declared]


# Reading and refusing.


def leaking(record: Any) -> bool:
    """Whether a record is stamped so anywhere: a true value under a name of these, or the word itself."""
    if isinstance(record, Mapping):
        named = any(str(key).lower() in {"leak", "leaks", "leaking"} and record[key] for key in record)
        return named or any(map(leaking, record.values()))
    if isinstance(record, list | tuple):
        return any(map(leaking, record))
    return isinstance(record, str) and "LEAKING" in record


@lru_cache(maxsize=8)
def known_of(model: bytes) -> dict[str, Any]:
    """What an artifact itself says to the audit of a record of its scores: its SHA-256, first weights and stamp.

    Raises ArtifactError.
    """
    cpu, found = torch.device("cpu"), artifact.parse(model)
    weights = found.model(select("reference", cpu), cpu, torch.float32).parameters()
    return {"artifact": found.sha256, "base": base_name(weights), "leaking": found.config.leaking}


def gather(
    paths: Sequence[Path],
    *,
    author: str,
    github_id: str,
    name: str = "",
    blurb: str = "",
    declared: Sequence[str] = (),
    scores: Sequence[Path] = (),
    form: str = "",
    root: Path = ROOT,
) -> Facts:
    """The facts of a submission of these runs with the program under `root`.

    scores: records of scores with test-time training, one of each run's artifact; form: the one of them that is handed
    in, where they hold several.

    Raises SubmissionError, naming every reason, where they cannot be handed in together; before that, where the runs'
    own records pass the audit, if one of scores cannot be used.
    """
    if unknown := sorted(set(declared) - DECLARATIONS.keys()):
        raise SubmissionError(f"--declare {', '.join(unknown)}: wanted one of {', '.join(DECLARATIONS)}")
    runs = sorted((SeedRun.read(path) for path in paths), key=lambda run: run.seed)
    refused = [reason for run in runs if (reason := _unproven(run, run.path / "summary.json"))]
    if scores and not refused:
        runs = with_scores(runs, scores)
    code, code_sha256 = bundle.build(root), bundle.code_sha256(root)
    refused += [reason for run in runs if (reason := _contradiction(run))]
    refused += _refusals(runs, len(code))
    refused += _choice(runs, form)
    undeclared = _declarable(runs, code_sha256)
    if not refused:
        refused += _mixed_up(runs, "other-code" not in undeclared)
    refused += [
        f"{reason} (--declare {kind} hands it in with a stamp)"
        for kind, reason in undeclared.items()
        if kind not in declared
    ]
    unfounded = sorted(set(declared) - undeclared.keys())
    refused += [f"--declare {kind}: the records say nothing of the kind" for kind in unfounded]
    words = {"name": name, "blurb": blurb, "author": author, "GitHub ID": github_id}
    refused += [f"{what} {text!r}: wanted one line of text" for what, text in words.items() if not text.isprintable()]
    if figures := re.findall(r"\d[.,]\d{2,}", f"{name} {blurb}"):
        refused.append(f"{', '.join(figures)} in name or blurb: figures come from the records alone")
    if refused:
        raise SubmissionError("\n  ".join(["cannot be handed in:", *refused]) if len(refused) > 1 else refused[0])

    headline = _headline(runs, form)
    method = "GPTQ int6"
    method += f", score-first TTT ({headline.removeprefix(TTT)})" if headline.startswith(TTT) else ""
    config = runs[0].config
    layers, virtual = config.num_layers, len(runs[0].summary["depth"])
    recurrence = f", depth recurrence {','.join(map(str, config.recur_layers))}" if virtual > layers else ""
    return Facts(
        name=name
        or f"SP{config.vocab_size} {layers}L/{virtual}V {config.model_dim}d{recurrence}, Muon banks, {method}",
        author=author,
        github_id=github_id,
        date=max(run.environment["started"] for run in runs)[:10],
        blurb=blurb or "Plain PyTorch and Triton; every figure is written from the runs' records.",
        declared=tuple(sorted(undeclared)),
        headline=headline,
        seeds=tuple(_seed(run, headline, len(code)) for run in runs),
        config=config,
        environment=runs[0].environment,
        code=code,
        code_sha256=code_sha256,
    )


def _headline(runs: Sequence[SeedRun], form: str = "") -> str:
    """The score with test-time training of that form, or the only one; without any, the artifact's last score.

    That one comes from a costlier way of scoring than those before it.
    """
    scores = runs[0].summary["scores"]
    adapted = [name for name in scores if name.startswith(TTT) and form in ("", name.removeprefix(TTT))]
    return adapted[0] if adapted else [name for name in scores if name.startswith("artifact")][-1]


def _choice(runs: Sequence[SeedRun], form: str) -> list[str]:
    """Why it is not known which score is handed in. Not the best of several: that would choose by the scored text."""
    forms = [name.removeprefix(TTT) for name in runs[0].summary["scores"] if name.startswith(TTT)]
    if form and form not in forms:
        return [f"--form {form}: the records have {', '.join(forms) or 'no score with test-time training'}"]
    if not form and len(forms) > 1:
        return [f"scores with {', '.join(forms)}: wanted --form with the one that is handed in, chosen beforehand"]
    return []


def _seed(run: SeedRun, headline: str, code_bytes: int) -> Seed:
    summary = run.summary
    scores = {
        name: {**score, "bpb": round(score["bpb"], 8), "nats_per_token": round(score["nats_per_token"], 8)}
        for name, score in summary["scores"].items()
    }
    return Seed(
        seed=run.seed,
        run=summary["run"],
        val_bpb=scores[headline]["bpb"],
        val_loss=scores[headline]["nats_per_token"],
        scores=scores,
        steps=summary["steps"],
        train_seconds=round(summary["seconds"] + summary["pre_quant_seconds"], 3),
        calibration_seconds=summary["calibration_seconds"],
        eval_seconds=round(sum(s["seconds"] for name, s in scores.items() if name.startswith("artifact")), 3),
        step_ms=summary["ms_per_step"] or 0.0,
        model_bytes=len(run.model),
        total_bytes=len(run.model) + code_bytes,
        sha256=summary["artifact"]["sha256"],
        adapted=run.adapted,
    )


# Scores with test-time training.


def spelled(score: Mapping[str, Any]) -> str:
    """A score's form and settings, as `quantize.py score --ttt` takes them."""
    return ",".join([score["form"], *(f"{name}={value}" for name, value in score["settings"].items())])


def with_scores(runs: Sequence[SeedRun], files: Sequence[Path]) -> list[SeedRun]:
    """The runs, each with the scores with test-time training that the record of its artifact holds.

    Raises SubmissionError, naming the file, where a record does not pass the audit or is of none of the runs, where a
    run has none or several, and where they were made in different ways, on another text or on another machine.
    """
    of: dict[Path, Any] = {}
    for file in files:
        try:
            of[file] = json.loads(file.read_bytes())["artifact_sha256"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise SubmissionError(
                f"--scores {file}: not what quantize.py score --json writes: {type(error).__name__}: {error}"
            ) from None
    digests = [hashlib.sha256(run.model).hexdigest() for run in runs]
    owned = [[file for file, told in of.items() if told == digest] for digest in digests]
    wrong = [f"{file} is of artifact {told}, which is no run's" for file, told in of.items() if told not in digests]
    wrong += [
        f"{' and '.join(map(str, own)) or 'none'} of {run.path}, artifact {digest}"
        for run, digest, own in zip(runs, digests, owned, strict=True)
        if len(own) != 1
    ]
    if wrong:
        raise SubmissionError(f"--scores: wanted one for each run: {'; '.join(wrong)}")
    found = [_with_score(run, file) for run, (file,) in zip(runs, owned, strict=True)]
    first, *others = found
    for run in others:
        if (one := _ways(first)) != (other := _ways(run)):
            raise SubmissionError(
                f"--scores {first.adapted} and {run.adapted} were made differently: "
                f"{'; '.join(one)} and {'; '.join(other)}"
            )
    return found


def _ways(run: SeedRun) -> list[str]:
    """How its scores with test-time training were made."""
    scores = {name: score for name, score in run.summary["scores"].items() if name.startswith(TTT)}
    return [f"{spelled(s)}, context {s['context']}, stride {s['stride']}" for _, s in sorted(scores.items())]


def _with_score(run: SeedRun, file: Path) -> SeedRun:
    """The run with the audited scores of a record of its artifact; its own record has passed the audit."""

    def want(condition: Any, message: str) -> None:
        if not condition:
            raise SubmissionError(f"--scores {file}: {message}")

    if reason := _unproven(run, file):
        raise SubmissionError(f"--scores {reason}")
    record = json.loads(file.read_bytes())
    masked, own = record.get("document_mask"), run.config.document_mask
    want(masked is own, f"document_mask {masked}, the run's is {own}: wanted its scores without --documents")
    scores: dict[str, dict[str, Any]] = {}
    for name, score in record["scores"].items():
        if score["form"] in FIXED:
            continue
        key, settings = TTT + score["form"], score["settings"]
        want(key not in scores, f"several scores with {score['form']}: wanted the one that is handed in")
        try:
            known = asdict(parse_form(spelled(score))) == settings
        except ConfigError:
            known = False
        want(known, f"{name}: settings {settings!r}: wanted all of {score['form']}, as --ttt takes them")
        scores[key] = score
    want(scores, "no score with test-time training: quantize.py score ARTIFACT --ttt FORM --json FILE")
    text, scored = _scored_text(run.path / "summary.json"), _scored_text(file)
    want(scored == text, f"is of another text than {run.path} was scored on: {scored}, {text}")
    machine = record.get("environment")
    want(isinstance(machine, dict) and isinstance(machine.get("packages"), dict), "does not say on what machine")
    changed = [f"{what} {a}, {b}" for what, a, b in _machines(run.environment, machine) if a != b]
    want(not changed, f"was made on another machine than {run.path}: {'; '.join(changed)}")
    merged = {**run.summary, "scores": {**run.summary["scores"], **scores}}
    return replace(run, summary=merged, adapted=file, adapted_on=machine)


def _scored_text(record: Path) -> dict[str, Any]:
    """What all scores of an audited record are of: tokens, bytes and hash of the shards."""
    header, _ = ledger_of(record, next(iter(json.loads(record.read_bytes())["scores"].values())))
    return {what: header[what] for what in ("tokens", "bytes", "shards")}


def _unproven(run: SeedRun, record: Path) -> str:
    """Why a record of scores of the run's artifact does not pass the audit; empty where it does."""
    try:
        audit_record(record, **known_of(run.model))
    except LedgerError as error:
        return str(error)
    except artifact.ArtifactError as error:
        return f"{run.path}/model.pga: {error}"
    return ""


def _contradiction(run: SeedRun) -> str:
    """What summary.json says of steps and seconds that metrics.jsonl does not bear out; empty where they agree."""
    summary, every = run.summary, run.config.train_log_every
    steps, seconds, step_ms = summary["steps"], summary["seconds"], summary["ms_per_step"]
    names = f"{run.path}/summary.json and metrics.jsonl"
    last = max((entry["step"] for entry in run.metrics), default=None)
    if last is None:
        return f"{names}: {steps} steps, but no line of any"
    # Validation follows the last step; without it a line may be missing for fewer steps than are logged together.
    latest = last if run.config.val_loss_every else last + max(every, 1) - 1
    if not last <= steps <= latest:
        return f"{names}: {steps} steps, but the last line is of step {last}"
    # A line has the seconds at which its step was launched, on average over the ranks.
    trained = [entry for entry in run.metrics if "elapsed" in entry]
    launched = trained[-1]["elapsed"] if trained else 0.0
    longest = LATE_SECONDS + 2 * launched * steps / max(trained[-1]["step"] - 1, 1) if trained else MOST
    if not launched - EARLY_SECONDS <= seconds <= longest:
        return f"{names}: {seconds} seconds, but the last line was written after {launched}"
    if steps and (step_ms is None or abs(steps * step_ms - 1e3 * seconds) > 1 + 1e-3 * steps):
        return f"{run.path}/summary.json: {steps} steps of {step_ms} ms are not {seconds} seconds"
    for name, score in summary["scores"].items():
        tokens, size = score["tokens"], score["bytes"]
        ratio = score["nats_per_token"] / score["bpb"] if score["bpb"] else 0.0
        if abs(ratio - math.log(2) * size / tokens) > 1e-6 * ratio:
            return (
                f"{run.path}/summary.json: {name}: {ratio:.6f} nats a token for a bit a byte, not of {size} / {tokens}"
            )
        named = [known for text, known in NATS_PER_BIT.items() if re.match(rf"sp{run.config.vocab_size}\b", text)]
        if named and canonical(tokens, size) and all(abs(ratio - known) > 2e-4 for known in named):
            return (
                f"{run.path}/summary.json: {name}: {ratio:.4f} nats a token for a bit a byte, wanted "
                f"{' or '.join(f'{known:.4f}' for known in dict.fromkeys(named))} of {run.config.vocab_size} tokens"
            )
    return ""


def _refusals(runs: Sequence[SeedRun], code_bytes: int) -> list[str]:
    """What no declaration helps against."""
    first = runs[0]
    reasons = []
    for run in runs:
        total = len(run.model) + code_bytes
        if total > ARTIFACT_LIMIT:
            reasons.append(
                f"{run.path}: {len(run.model):,} bytes of model and {code_bytes:,} of code are {total:,}, "
                f"wanted at most {ARTIFACT_LIMIT:,}"
            )
        if run is first:
            continue
        one, other = (r.config.model_dump(mode="json", exclude=MACHINE | {"seed"}) for r in (first, run))
        if changed := [f"{name} {one[name]}, {other[name]}" for name in one if one[name] != other[name]]:
            reasons.append(f"{first.path} and {run.path} are of different configurations: {'; '.join(changed)}")
        if changed := [f"{what} {a}, {b}" for what, a, b in _machines(first.environment, run.environment) if a != b]:
            reasons.append(f"{first.path} and {run.path} ran on different machines: {'; '.join(changed)}")
        if _text(run) != _text(first):
            reasons.append(f"{first.path} and {run.path} were scored differently: {_text(first)}, {_text(run)}")
    for what, values in (
        ("seed", [str(run.seed) for run in runs]),
        ("artifact", [hashlib.sha256(run.model).hexdigest() for run in runs]),
    ):
        for value in sorted({value for value in values if values.count(value) > 1}):
            owners = [str(run.path) for run, own in zip(runs, values, strict=True) if own == value]
            reasons.append(f"{what} {value} is shared by {' and '.join(owners)}: wanted one of each run's own")
    return reasons


def _machines(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What of two environments has to be the same, by name."""
    return [(name, one.get(name), other.get(name)) for name in ("device", "world_size", "cuda")] + [
        ("torch", one["packages"].get("torch"), other["packages"].get("torch"))
    ]


def _text(run: SeedRun) -> dict[str, tuple[int, ...]]:
    """What each score is of: tokens, bytes, context, stride."""
    return {
        name: tuple(s[k] for k in ("tokens", "bytes", "context", "stride")) for name, s in run.summary["scores"].items()
    }


def _mixed_up(runs: Sequence[SeedRun], same_code: bool) -> list[str]:
    """Parts of a run's folder that are of another run.

    What an artifact says of its own configuration is compared whatever code wrote it; the name that other code gave to
    that configuration says nothing here.
    """
    reasons = []
    for run in runs:
        if same_code and run.summary["fingerprint"] != run.config.fingerprint():
            reasons.append(f"{run.path}/summary.json is of another configuration than config.json")
        both = artifact.configuration(run.model), run.config
        own, told = (config.model_dump(mode="json", exclude=MACHINE) for config in both)
        if changed := [f"{name} {own[name]}, {told[name]}" for name in own if own[name] != told[name]]:
            reasons.append(f"{run.path}/model.pga is of another configuration than config.json: {'; '.join(changed)}")
    return reasons


def _declarable(runs: Sequence[SeedRun], code_sha256: str) -> dict[str, str]:
    """What is wrong with the runs that may be handed in all the same, with a stamp."""
    found = {}
    if len(runs) < FEWEST_SEEDS:
        found["few-seeds"] = f"{len(runs)} seed{'s' * (len(runs) > 1)}, wanted at least {FEWEST_SEEDS}"
    stamped = [
        str(run.path)
        for run in runs
        if run.config.leaking  # whatever its records say; the artifact's is the same, or it is refused
        or leaking([run.summary, run.environment, run.metrics])
    ]
    if stamped:
        found["leaking"] = f"stamped as leaking: {', '.join(stamped)}"
    for run in runs:
        training = sum(run.summary[name] for name in ("seconds", "pre_quant_seconds", "calibration_seconds"))
        scoring = sum(s["seconds"] for name, s in run.summary["scores"].items() if name.startswith("artifact"))
        if max(training, scoring) > SECONDS_LIMIT:
            found["over-time"] = f"{run.path} trained {training:.1f} s and scored {scoring:.1f} s"
    tokens, size, *_ = _text(runs[0])[_headline(runs)]
    if not canonical(tokens, size):
        found["non-canonical"] = (
            f"scored {tokens:,} tokens of {size:,} bytes, wanted all of FineWeb's validation: {VAL_BYTES:,} bytes, "
            f"{VAL_TOKENS['sp8192']:,} tokens at sp8192"
        )
    for run in runs:
        places = [(run.path, entry) for entry in (run.environment, *run.resumed)]
        places += [(run.adapted, run.adapted_on)] if run.adapted else []
        others = [(path, entry) for path, entry in places if entry.get("code_sha256") != code_sha256]
        if others:
            path, entry = others[0]
            commit = entry.get("git_commit") or "unknown"
            found["other-code"] = f"{path} ran with other code than stands here: commit {commit}"
            break
    return found
