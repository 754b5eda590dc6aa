"""A submission's folder, written from the facts of its runs.

train_gpt.py          the program in one file (gpt.bundle)     submission.json      what leaderboards read
README.md             results, how to run                      requirements.txt     versions of the runs
train_seed42.log ...  one a seed, from the run's records       model_seed42.pga ... artifacts, where asked for
scores_seed42/ ...    with the artifacts: record and ledgers of scores with test-time training, for quantize.py audit
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt.config import ARTIFACT_LIMIT, MACHINE, Config, build_config
from gpt.submission import DECLARATIONS, TTT, Facts, Seed, SeedRun, SubmissionError, spelled

LABELS = {
    "ema": "pre-quantization post-ema",
    "artifact": "quantized",
    "artifact_sliding": "quantized_sliding_window",
}


def label(score: str) -> str:
    """A score's name in the field's logs."""
    return f"quantized_ttt_{score.removeprefix(TTT)}" if score.startswith(TTT) else LABELS.get(score, score)


def settings(config: Config) -> dict[str, str]:
    """The settings by their environment names that make this configuration; a seed and places come beside them."""
    preset = build_config(preset=config.preset)
    chosen: dict[str, str] = {"PRESET": config.preset}
    for name in Config.model_fields:
        value = getattr(config, name)
        if name in MACHINE | {"preset", "seed"} or value == getattr(preset, name):
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        chosen[name.upper()] = str(int(value) if isinstance(value, bool) else value)
    return chosen


def submission_json(facts: Facts) -> dict[str, Any]:
    score = facts.score
    return {
        "author": facts.author,
        "github_id": facts.github_id,
        "name": facts.name,
        "date": facts.date,
        "track": "10min_16mb" if facts.record else "non_record_16mb",
        "blurb": facts.blurb,
        "declared": list(facts.declared),
        "stamps": facts.stamps,
        "val_loss": round(facts.mean(lambda s: s.val_loss), 8),
        "val_loss_std": round(facts.std(lambda s: s.val_loss), 8),
        "val_bpb": facts.val_bpb,
        "val_bpb_std": round(facts.std(lambda s: s.val_bpb), 8),
        "pre_quant_val_bpb": round(facts.mean(lambda s: s.scores["ema"]["bpb"]), 8),
        "score": {
            "name": label(facts.headline),
            **{k: score[k] for k in ("context", "stride")},
            **({"ttt": facts.ttt} if facts.ttt else {}),
        },
        "val_tokens": score["tokens"],
        "val_bytes": score["bytes"],
        "bytes_total": facts.total_bytes,
        "bytes_code": len(facts.code),
        "seeds": [s.seed for s in facts.seeds],
        "seed_results": {
            str(s.seed): {
                "val_loss": s.val_loss,
                "val_bpb": s.val_bpb,
                "pre_quant_val_bpb": s.scores["ema"]["bpb"],
                "artifact_bytes": s.total_bytes,  # the field's meaning: with the code
                "model_bytes": s.model_bytes,
                "artifact_sha256": s.sha256,
                "steps": s.steps,
                "step_avg_ms": s.step_ms,
                "train_time_s": s.train_seconds,
                "calibration_time_s": s.calibration_seconds,
                "eval_time_s": s.eval_seconds,
            }
            for s in facts.seeds
        },
        "hardware": facts.hardware,
        "pytorch_version": facts.environment["packages"]["torch"],
        "cuda_version": facts.environment["cuda"],
        "compliance": facts.compliance,
        "git_commit": facts.environment.get("git_commit"),
        "code_sha256": facts.code_sha256,
        "train_gpt_sha256": hashlib.sha256(facts.code).hexdigest(),
        "settings": settings(facts.config),
    }


def seed_log(facts: Facts, seed: Seed, run: SeedRun) -> str:
    """The run as the field's programs log it, from its records."""
    config, environment = run.config, run.environment
    hyperparameters = config.model_dump(mode="json", exclude=MACHINE)
    lines = [
        f"run {seed.run}, written from its records by quantize.py submission",
        *(f"*** {stamp} ***" for stamp in facts.stamps),
        "Hyperparameters:",
        *(f"  {name}: {value}" for name, value in sorted(hyperparameters.items())),
        "Environment:",
        f"  hardware: {facts.hardware}",
        f"  cuda: {environment['cuda']}",
        f"  python: {environment['python']}",
        *(f"  {package}: {version}" for package, version in environment["packages"].items()),
        f"  git_commit: {environment.get('git_commit')}",
        f"  code_sha256: {environment.get('code_sha256')}",
        f"started {environment['started']}",
        *(f"resumed {entry['started']}" for entry in run.resumed),
    ]
    for entry in run.metrics:
        step = f"step:{entry['step']}/{config.iterations}"
        if "val_loss" in entry:
            lines.append(f"{step} val_loss:{entry['val_loss']:.4f} val_bpb:{entry['val_bpb']:.4f}")
        elif "skipped" in entry:
            lines.append(f"{step} {entry['skipped']}")
        else:
            average = f" step_avg:{entry['ms_per_step']:.2f}ms" if entry["ms_per_step"] else ""
            lines.append(
                f"{step} train_loss:{entry['train_loss']:.4f} train_time:{1e3 * entry['elapsed']:.0f}ms{average} "
                f"grad_norm:{entry['gradient_norm']:.4f} lr_factor:{entry['lr_factor']:.4f} layers:{entry['layers']}"
            )
    lines += [
        f"stopped step:{seed.steps}/{config.iterations} train_time:{1e3 * seed.train_seconds:.0f}ms "
        f"calibration_time:{1e3 * seed.calibration_seconds:.0f}ms step_avg:{seed.step_ms:.3f}ms",
        f"Code size: {len(facts.code)} bytes",
        f"Serialized model int6+rans: {seed.model_bytes} bytes",
        f"Total submission size int6+rans: {seed.total_bytes} bytes",
        f"Artifact sha256: {seed.sha256}",
    ]
    lines += [
        f"{label(name)} val_loss:{s['nats_per_token']:.8f} val_bpb:{s['bpb']:.8f} tokens:{s['tokens']} "
        f"bytes:{s['bytes']} context:{s['context']} stride:{s['stride']} eval_time:{1e3 * s['seconds']:.0f}ms"
        + (f" ttt:{spelled(s)}" if name.startswith(TTT) else "")
        for name, s in seed.scores.items()
    ]
    return "\n".join(lines) + "\n"


def readme(facts: Facts, artifacts: bool, given: Mapping[str, str] | None = None) -> str:
    """given: the settings to show; those of the configuration where it is left out."""
    score, environment = facts.score, facts.environment
    given = settings(facts.config) if given is None else given
    chosen = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
    ranks = environment["world_size"]
    launcher = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    count = len(facts.seeds)
    of = f"mean of {count} seeds, std {facts.std(lambda s: s.val_bpb):.5f}" if count > 1 else "one seed"
    stamps = "".join(f"> **{stamp}**\n\n" for stamp in facts.stamps)
    files = "\n".join(f"    {s.sha256}  {model_name(s.seed)}" for s in facts.seeds)
    adapted, scoring = "", ""
    if facts.ttt:
        adapted = f"""
Test-time training: {facts.ttt}.
Each token is scored before anything is trained on it: the ledgers of these scores passed `quantize.py audit`.
"""
        stride = "" if score["form"] == "document" else f" --stride {score['stride']}"  # its pieces have a setting
        scoring = f" \\\n        --context {score['context']}{stride} --ttt {facts.ttt}"
    kept = "are in this folder" if artifacts else "are not in this folder; running the program makes them"
    return f"""# {"Record" if facts.record else "Non-record"}: {facts.name}, val_bpb {facts.val_bpb:.5f}

**val_bpb {facts.val_bpb:.5f}** ({of}) | **{facts.total_bytes:,} bytes** with code | {facts.hardware}

{stamps}{facts.blurb}

## Results

{results(facts)}

The score handed in is bold: {label(facts.headline)}, context {score["context"]}, stride {score["stride"]},
{score["tokens"]:,} tokens of {score["bytes"]:,} bytes, each token after the first once. train_gpt.py takes
{len(facts.code):,} of the {ARTIFACT_LIMIT:,} bytes allowed. Training and calibration are on one clock. "artifact" and
what follows it are scores of the weights read back from the artifact.
{adapted}
## Run

    pip install -r requirements.txt
    {chosen} SEED={facts.seeds[0].seed} {launcher} train_gpt.py --data-path DATA --tokenizer-path TOKENIZER
    {launcher} train_gpt.py quantize score runs/NAME/model.pga --data-path DATA --tokenizer-path TOKENIZER{scoring}
    python train_gpt.py source

DATA is the folder of the shards, TOKENIZER their SentencePiece model. The last command prints where the source
lies: train_gpt.py carries it compressed, without comments, and unpacks it into the user's cache. All settings are in
each log.

## Artifacts

They {kept}. sha256:

{files}

Code: sha256 {facts.code_sha256} of the files in train_gpt.py.
torch {environment["packages"]["torch"]}, CUDA {environment["cuda"]}, Python {environment["python"]}.

This file, submission.json and the logs were written together from the records of the runs.
"""


def results(facts: Facts) -> str:
    """The table of all seeds."""
    names = list(facts.seeds[0].scores)
    titles = {"ema": "EMA", "artifact_sliding": "sliding"}
    titles |= {name: f"TTT ({name.removeprefix(TTT)})" for name in names if name.startswith(TTT)}
    head = ["seed", *(f"BPB, {titles.get(name, name)}" for name in names), "nats a token", "steps", "ms a step"]
    lines = [[*head, "training + calibration, s", "model bytes", "with code"]]
    lines.append(["---:"] * len(lines[0]))

    def cells(bpb: Callable[[str], float], nats: float) -> list[str]:
        shown = {name: f"{bpb(name):.5f}" for name in names}
        shown[facts.headline] = f"**{shown[facts.headline]}**"
        return [*shown.values(), f"{nats:.5f}"]

    def over(statistic: Callable[[Callable[[Seed], float]], float]) -> list[str]:
        return cells(lambda name: statistic(lambda s: float(s.scores[name]["bpb"])), statistic(lambda s: s.val_loss))

    for s in facts.seeds:
        times = f"{s.train_seconds:.1f} + {s.calibration_seconds:.1f}"
        own = cells({name: s.scores[name]["bpb"] for name in names}.__getitem__, s.val_loss)
        lines.append(
            [str(s.seed), *own, f"{s.steps:,}", f"{s.step_ms:.1f}", times, f"{s.model_bytes:,}", f"{s.total_bytes:,}"]
        )
    if len(facts.seeds) > 1:
        lines += [["mean", *over(facts.mean)], ["std", *over(facts.std)]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts_told(about: Mapping[str, Any], logs: Mapping[int, str], code: bytes, code_sha256: str) -> Facts:
    """The facts again, of a folder's logs by seed; words and declarations are those of its submission.json, `about`.

    All but the configuration, which stands in the logs but is the sample's here. Raises ValueError where a log is not
    one that seed_log writes.
    """
    read = {seed: _told_by(seed, text) for seed, text in sorted(logs.items())}
    declared = about.get("declared")
    if not isinstance(declared, list) or not set(map(str, declared)) <= DECLARATIONS.keys():
        raise ValueError(f"declared {declared!r}, wanted some of {', '.join(DECLARATIONS)}")
    handed_in = about.get("score")
    handed_in = str(handed_in.get("name")) if isinstance(handed_in, dict) else ""
    headline = _unlabelled(handed_in)
    for seed, (one, _) in read.items():
        if missing := {headline, "ema"} - one.scores.keys():
            raise ValueError(f"log of {seed}: no score {' or '.join(map(label, sorted(missing)))}")
    scored = [
        replace(one, val_bpb=one.scores[headline]["bpb"], val_loss=one.scores[headline]["nats_per_token"])
        for one, _ in read.values()
    ]
    environments = [environment for _, environment in read.values()]
    return Facts(
        **{name: str(about.get(name)) for name in ("name", "author", "github_id", "blurb")},
        date=max(environment["started"] for environment in environments)[:10],
        declared=tuple(map(str, declared)),
        headline=headline,
        seeds=tuple(scored),
        config=build_config(preset="sample"),
        environment=environments[0],
        code=code,
        code_sha256=code_sha256,
    )


def _unlabelled(name: str) -> str:
    """A score's own name, by that of the logs."""
    if name.startswith("quantized_ttt_"):
        return TTT + name.removeprefix("quantized_ttt_")
    return next((own for own, label in LABELS.items() if label == name), name)


def _told_by(seed: int, text: str) -> tuple[Seed, dict[str, Any]]:
    """Figures and environment of a seed's log. Raises ValueError."""

    def one(pattern: str) -> tuple[str, ...]:
        found = [match.groups("") for match in re.finditer(f"^{pattern}$", text, re.M)]
        if len(found) != 1:
            raise ValueError(f"log of {seed}: {len(found)} lines such as {pattern!r}, wanted one")
        return found[0]

    steps, trained, calibrated, average = one(
        r"stopped step:(\d{1,9})/\d{1,9} train_time:(\d{1,9})ms calibration_time:(\d{1,9})ms"
        r"(?: step_avg:(\d{1,9}\.\d{3})ms)?"
    )
    scores = {}
    for name, loss, bpb, *counts, ttt in re.findall(
        r"^(\w[\w -]{0,99}) val_loss:(\d{1,9}\.\d{8}) val_bpb:(\d{1,9}\.\d{8}) tokens:(\d{1,15}) bytes:(\d{1,15}) "
        r"context:(\d{1,9}) stride:(\d{1,9}) eval_time:(\d{1,9})ms(?: ttt:(\S+))?$",
        text,
        re.M,
    ):
        tokens, size, context, stride, milliseconds = map(int, counts)
        form, *pairs = ttt.split(",")
        scores[_unlabelled(name)] = {
            "nats_per_token": float(loss),
            "bpb": float(bpb),
            "tokens": tokens,
            "bytes": size,
            "context": context,
            "stride": stride,
            "seconds": milliseconds / 1e3,
            "form": form,
            "settings": {key: value for key, _, value in (pair.partition("=") for pair in pairs)},
        }
    count, device = one(r"  hardware: (\d{1,6})x (.*)")
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("  python: ")), 0)
    end = next((i for i, line in enumerate(lines) if line.startswith("  git_commit: ")), 0)
    versions = dict(line.strip().split(": ", 1) for line in lines[start:end] if ": " in line)
    python, cuda, commit = (one(rf"  {name}: (.*)")[0] for name in ("python", "cuda", "git_commit"))
    environment = {
        "started": one(r"started (\d{4}-\d\d-\d\dT\S{1,20})")[0],
        "device": device,
        "world_size": int(count),
        "python": python,
        "cuda": None if cuda == "None" else cuda,
        "git_commit": None if commit == "None" else commit,
        "packages": {"torch": "none", **versions},
    }
    seconds = int(trained) / 1e3
    found = Seed(
        seed=seed,
        run=one(r"run (\S{1,200}), written from its records by quantize.py submission")[0],
        val_bpb=0.0,
        val_loss=0.0,
        scores=scores,
        steps=int(steps),
        train_seconds=seconds,
        calibration_seconds=int(calibrated) / 1e3,
        eval_seconds=round(sum(s["seconds"] for name, s in scores.items() if name.startswith("artifact")), 3),
        step_ms=float(average) if average else 1e3 * seconds / max(int(steps), 1),
        model_bytes=int(one(r"Serialized model \S{1,20}: (\d{1,15}) bytes")[0]),
        total_bytes=int(one(r"Total submission size \S{1,20}: (\d{1,15}) bytes")[0]),
        sha256=one(r"Artifact sha256: (\S{64})")[0],
        adapted=None,
    )
    return found, environment


def model_name(seed: int) -> str:
    return f"model_seed{seed}.pga"


def copy_record(record: Path, folder: Path) -> None:
    """A record of scores and the ledgers beside it, in a new folder."""
    folder.mkdir()
    shutil.copyfile(record, folder / "score.json")
    for score in json.loads(record.read_bytes())["scores"].values():
        name = Path(score["ledger"]["file"]).name
        shutil.copyfile(record.parent / name, folder / name)


def requirements(environment: Mapping[str, Any]) -> str:
    """The runs' versions; local ones, as torch's +cu130, are known to no index."""
    pinned = {name: version for name, version in environment["packages"].items() if version}
    lines = [f"{name}=={version.partition('+')[0]}" for name, version in pinned.items()]
    return "\n".join([*lines, "tqdm", "matplotlib"]) + "\n"


def write(folder: Path, paths: Sequence[Path], facts: Facts, artifacts: bool) -> None:
    """The folder, whole or not at all. Raises SubmissionError where it exists."""
    if folder.exists():
        raise SubmissionError(f"{folder} exists; wanted a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as parent:
        partial = Path(parent) / folder.name
        partial.mkdir()
        (partial / "train_gpt.py").write_bytes(facts.code)
        (partial / "submission.json").write_text(json.dumps(submission_json(facts), indent=2) + "\n")
        (partial / "README.md").write_text(readme(facts, artifacts))
        (partial / "requirements.txt").write_text(requirements(facts.environment))
        runs = {run.seed: run for run in map(SeedRun.read, paths)}
        for seed in facts.seeds:
            run = runs[seed.seed]
            (partial / f"train_seed{seed.seed}.log").write_text(seed_log(facts, seed, run))
            if artifacts:
                shutil.copyfile(run.path / "model.pga", partial / model_name(seed.seed))
            if artifacts and seed.adapted:
                copy_record(seed.adapted, partial / f"scores_seed{seed.seed}")
        partial.rename(folder)
