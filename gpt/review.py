"""Checks a submission's folder from its files alone: ours, or any that is laid out as the field's are.

Nothing in the folder is run. What its files do not say is shown as unknown, never as right. A deviation that the folder
itself declares (submission.json, "declared") is no failure, but nothing declared can be a record.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gpt import artifact, bundle
from gpt.config import ARTIFACT_LIMIT, MACHINE
from gpt.folder import facts_told, readme, submission_json
from gpt.ledger import FIXED, TAIL_TOKENS, VAL_BYTES, VAL_TOKENS, LedgerError, audit_record, canonical
from gpt.submission import (
    COMPLIANCE,
    DECLARATIONS,
    FEWEST_SEEDS,
    NATS_PER_BIT,
    SECONDS_LIMIT,
    known_of,
    leaking,
    spelled,
)

Verdict = Literal["ok", "FAIL", "declared", "unknown"]
FIELDS = ("author", "github_id", "name", "date", "val_bpb")
MODELS = (".pga", ".ptz", ".bin", ".pt", ".safetensors", ".br", ".xz")
LAST_STEP = 1  # second, by which a run that stops at the cap may overrun it
# Different models score differently: seeds of one configuration are some 5e-4 BPB apart.
SAME_BPB = 3e-6
# Training steps in a log, and what comes before them: settings.
STEP = re.compile(r"^(?:step:)?\d+/\d+ ", re.M)
OWN_TO_A_SEED = re.compile(
    r"(?:^|_)(?:seed|run|id|log|logfile|path|dir|files?|time|rank|port|memory|command)(?:_|$)|warmup_step$|^https?$|^W\d"
)
# Signs of training before quantising, and behind them on the same line what it reports. Searched for one after the
# other, as everything here is that reads whole logs, so that no line takes more than its length.
PRE_QUANT_TTT = re.compile(r"pre[-_ ]?quant[-_ ]?ttt|ttt_adamw|ttt_adapt", re.I)
REPORTED = re.compile(r"epoch|loss|val_bpb", re.I)
# The same as a setting, and a score behind it, which is fair where the setting says that training rows were held out.
ON_VALIDATION = re.compile(r"(?:^[ \t]*pre_quant[:=] ?|\bPRE_QUANT=|--pre[-_]quant[ =])['\"]?validation\b", re.M)
FINE_TUNED = re.compile(r"pre[-_]?quant(?![a-z])", re.I)
SCORED = re.compile(r"quant|int\d|final|ttt")  # in the first word of a score's name
LOG_BYTES, TEXT_BYTES, LINE = 1 << 24, 1 << 20, 4096  # that are read of a log and of other texts; characters of a line


@dataclass(frozen=True)
class Row:
    name: str
    found: str
    wanted: str
    verdict: Verdict


@dataclass
class Review:
    """What was checked, row by row."""

    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(row.verdict == "FAIL" for row in self.rows)

    def row(self, name: str, right: bool | None, found: Any, wanted: Any, declared: bool = False) -> None:
        """right: None where the files do not say; declared: whether the folder owns up to it."""
        verdict: Verdict = "unknown" if right is None else "ok" if right else "declared" if declared else "FAIL"
        self.rows.append(Row(name, str(found), str(wanted), verdict))

    def table(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = []
        for row in self.rows:
            wanted = f"   wanted {row.wanted}" if row.verdict != "ok" else ""
            lines.append(f"{row.verdict:9s}{row.name:{width + 2}s}{row.found}{wanted}")
        counts = {v: sum(row.verdict == v for row in self.rows) for v in ("FAIL", "declared", "unknown", "ok")}
        lines.append(", ".join(f"{count} {name}" for name, count in counts.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class Log:
    """What a seed's log says; None where it says nothing."""

    name: str
    text: str
    others: str = ""  # further logs of the seed

    def figures(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.text, re.M)

    def last(self, pattern: str) -> str | None:
        found = self.figures(pattern)
        return found[-1] if found else None

    @property
    def code_bytes(self) -> set[int]:
        return {int(size) for size in self.figures(r"Code size[^:\n]{0,60}: ?(\d{1,15})")}

    @property
    def model_bytes(self) -> int | None:
        found = self.last(r"Serialized model \S[^:\n]{0,60}: ?(\d{1,15}) bytes")
        return int(found) if found else None

    @property
    def scores(self) -> dict[str, str]:
        """val_bpb of each named score after training; the last figure where one is named twice."""
        return {name: bpb for name, _, bpb in self.named}

    @property
    def named(self) -> list[tuple[str, str | None, str]]:
        """Name, val_loss and val_bpb of each of them."""
        found = []
        for line in self.text.splitlines():
            name, there, rest = line.partition(" val_loss")
            scored = there and re.fullmatch(r"[\w-][\w -]*", name) and SCORED.search(name.partition(" ")[0])
            if scored and (bpb := re.search(r"val_bpb[:=] ?(\d+\.\d+)", rest)):
                loss = re.match(r"[:=] ?(\d+\.\d+)", rest)
                found.append((name, loss[1] if loss else None, bpb[1]))
        return found

    @property
    def bpbs(self) -> list[str]:
        return re.findall(r"val_bpb[:=] ?(\d+\.\d+)", self.others + self.text)

    @property
    def train_ms(self) -> float | None:
        found = self.figures(r"train_time: ?(\d+(?:\.\d+)?)ms")
        return max(map(float, found)) if found else None

    @property
    def settings(self) -> dict[str, str]:
        """NAME: VALUE on lines of their own, and name:value within lines; all before the first step.

        A log that starts with the program's text ends it with a line of equals signs.
        """
        first = STEP.search(self.text)
        before = re.split(r"^={50,}$", self.text[: first.start() if first else 0], flags=re.M)[-1]
        settings: dict[str, str] = {}
        for line in before.splitlines():
            whole = re.match(r"\s+(\w+): (.*)", line)
            pairs = [(whole[1], whole[2])] if whole else re.findall(r"(?<![\w:/])([A-Za-z_]\w*):([^\s:]\S*)", line)
            # "name: part=value" tells of a part, and is no setting's value.
            pairs = [(name, value) for name, value in pairs if not re.match(r"[A-Za-z_]\w*=", value)]
            settings |= {name: value for name, value in pairs if not OWN_TO_A_SEED.search(name)}
        return settings


def number(record: Mapping[str, Any], *names: str) -> float | None:
    """The first of these fields that is a finite number; JSON's true and false are none."""
    values = (record.get(name) for name in names)
    found = (value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
    return next((value for value in found if abs(value) < 1e15), None)


def shown(value: float | None) -> str:
    return "none" if value is None else f"{value:,}".removesuffix(".0")


def plain(value: str) -> str | float:
    """A setting's value as it can be compared: without quotes and brackets, numbers as numbers."""
    value = re.sub(r"[\s\"'\[\]()]", "", value).removesuffix(",").lower()
    value = {"true": "1", "false": "0"}.get(value, value)
    try:
        return float(value)
    except ValueError:
        return value


def decimals(text: str) -> int:
    return len(text.rpartition(".")[2])


def agree(one: str | float, other: str | float) -> bool:
    """Whether two figures are the same, rounded to the decimals of the one that shows fewer (4 at least)."""
    texts = [figure if isinstance(figure, str) else f"{figure!r}" for figure in (one, other)]
    places = max(4, min(decimals(text) for text in texts))
    # Half a unit of the coarser one, and of the finer one which may itself be rounded.
    return abs(float(one) - float(other)) <= 0.5001 * 10.0**-places + 0.5 * 10.0 ** -max(map(decimals, texts))


@dataclass(frozen=True)
class Folder:
    """A submission's files, as far as they can be read."""

    path: Path
    code: bytes | None  # train_gpt.py
    about: dict[str, Any]  # submission.json
    results: dict[str, dict[str, Any]]  # in it, of each seed
    declared: list[str]  # in it
    logs: dict[str, Log]  # of each seed
    readme: str

    @classmethod
    def read(cls, path: Path, found: Review) -> Folder:
        """Raises OSError where there is no such folder."""
        names = {file.name for file in path.iterdir() if file.is_file()}
        needed = ("README.md", "submission.json", "train_gpt.py")
        there = [name for name in needed if name in names]
        found.row("files", len(there) == len(needed), ", ".join(there) or "none", ", ".join(needed))
        about: Any = {}
        if "submission.json" in names:
            try:
                about = json.loads(read_text(path / "submission.json"))
                leaking(about)  # how deep it is
                found.row("submission.json", isinstance(about, dict), type(about).__name__, "an object")
            except (ValueError, RecursionError) as error:
                found.row("submission.json", False, error, "JSON")
        about = about if isinstance(about, dict) else {}
        results = seed_results(about)
        declared = about.get("declared", [])
        return cls(
            path=path,
            code=read_bytes(path / "train_gpt.py", 2 * ARTIFACT_LIMIT) if "train_gpt.py" in names else None,
            about=about,
            results=results,
            declared=[str(kind) for kind in declared] if isinstance(declared, list) else [],
            logs=find_logs(path, results),
            readme=read_text(path / "README.md") if "README.md" in names else "",
        )


def seed_results(about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each seed, under either name that the field gives them."""
    for name in ("seed_results", "seeds"):
        results = about.get(name)
        if isinstance(results, dict) and all(isinstance(value, dict) for value in results.values()):
            return {str(seed): value for seed, value in results.items()}
    return {}


def read_bytes(path: Path, most: int) -> bytes:
    """A file, or where it has more bytes than `most` its beginning and its end."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= most:
            return file.read(most)
        start = file.read(most // 2)
        file.seek(size - most // 2)
        return start + b"\n" + file.read(most // 2)


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """As read_bytes; longer lines than LINE are broken."""
    text = read_bytes(path, most).decode(errors="replace").replace("\r\n", "\n")
    return re.sub(rf"([^\n]{{{LINE}}})(?=[^\n])", r"\1\n", text)


def find_logs(folder: Path, results: Iterable[str]) -> dict[str, Log]:
    """The log of each seed: the one that has it as its setting, else in its name."""
    inner = {path.parent for path in folder.glob("*/submission.json")}  # submissions of their own
    files = [path for places in ("*", "*/*") for path in folder.glob(places) if path.parent not in inner]
    files = sorted(path for path in files if path.suffix in (".log", ".txt") and path.is_file())
    logs = [Log(path.relative_to(folder).as_posix(), read_text(path, LOG_BYTES)) for path in files]
    chosen: dict[str, Log] = {}
    for log in logs:
        seed = log.last(r"^[ \t]*seed: ?(\d{1,19})[ \t]*$")
        if seed is None:
            named = [seed for seed in results if re.search(rf"(?<!\d){re.escape(seed)}(?!\d)", log.name)]
            seed = named[0] if len(named) == 1 else None
        if seed is not None and "val_bpb" in log.text:
            first = chosen.setdefault(seed, log)
            if first is not log:
                chosen[seed] = replace(first, others=first.others + log.text)
    return chosen


def review(path: Path) -> Review:
    """Every check of one folder. Raises OSError where it cannot be read."""
    found = Review()
    folder = Folder.read(path, found)
    absent = [name for name in FIELDS if folder.about.get(name) in (None, "")]
    found.row("fields", not absent, f"no {', '.join(absent)}" if absent else "all", ", ".join(FIELDS))
    checks = (
        *(_program, _seeds, _sizes, _artifacts, _configurations, _figures, _own_figures),
        *(_ledgers, _settings, _validation, _ratios, _times, _leaks),
    )
    for check in (*checks, _declared):
        check(found, folder)
    return found


def _program(found: Review, folder: Folder) -> None:
    """train_gpt.py: that it is Python, its size, and what it carries."""
    code, about, logs = folder.code, folder.about, folder.logs
    if code is None:
        return
    files = bundle.source_files(code)
    try:
        for name, data in {"train_gpt.py": code, **(files or {})}.items():
            if name.endswith(".py"):
                compile(data, name, "exec", dont_inherit=True)
        found.row("program compiles", True, f"{len(files)} files in one" if files else "one file", "Python")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        found.row("program compiles", False, error, "Python of this version")
    wanted = f"{len(code)}, of train_gpt.py"
    size = about.get("bytes_code")
    found.row("code bytes, JSON", None if size is None else size == len(code), size, wanted)
    logged = [log.code_bytes for log in logs.values() if log.code_bytes]
    right = all(len(code) in sizes for sizes in logged) if logged else None
    found.row("code bytes, logs", right, ", ".join(map(str, sorted(set().union(*logged)))) or "none", wanted)
    for name, digest in (
        ("train_gpt_sha256", hashlib.sha256(code).hexdigest()),
        ("code_sha256", hashlib.sha256(bundle.unwrapped(code) or b"").hexdigest()),
    ):
        if name in about:
            found.row(name, about[name] == digest, about[name], digest)
    if files and "code_sha256" in about:
        ran = sorted({str(log.last(r"^  code_sha256: (\S+)$")) for log in logs.values()})
        same = ran == [about["code_sha256"]]
        found.row("code of the runs", same, ", ".join(ran), about["code_sha256"], "other-code" in folder.declared)


def _seeds(found: Review, folder: Folder) -> None:
    """Distinct, enough, each with results and a log, and of one configuration."""
    results, logs = folder.results, folder.logs
    listed = folder.about.get("seeds", list(results))
    seeds = [str(seed) for seed in listed] if isinstance(listed, list | dict) else []
    named, different = ", ".join(seeds) or "none named", len(set(seeds))
    found.row("seeds distinct", different == len(seeds) if seeds else None, named, "each once")
    enough = different >= FEWEST_SEEDS if seeds else None
    found.row("number of seeds", enough, different, f"at least {FEWEST_SEEDS}", "few-seeds" in folder.declared)
    right = set(results) == set(seeds) if results else None
    found.row("results of each seed", right, ", ".join(results) or "none", named)
    files = ", ".join(log.name for log in logs.values())
    right = (set(seeds) <= set(logs) if seeds else None) if logs else False
    found.row("log of each seed", right, files or "none", named)
    if len(logs) > 1:
        settings = [log.settings for log in logs.values()]
        common = set.intersection(*(set(one) for one in settings))
        differing = sorted(name for name in common if len({one[name] for one in settings}) > 1)
        said = ", ".join(f"{name} {' / '.join(one[name] for one in settings)}" for name in differing)
        said = said or f"{len(common)} settings alike"
        found.row("one configuration, logs", not differing if common else None, said, "alike but for the seed")


def _sizes(found: Review, folder: Folder) -> None:
    """Bytes of model and program against the limit, and of each place that names them."""
    code_bytes = len(folder.code or b"")
    totals: dict[str, float] = {}
    for seed, result in folder.results.items():
        logged = folder.logs[seed].model_bytes if seed in folder.logs else None
        said, claimed = number(result, "model_bytes"), number(result, "artifact_bytes", "bytes_total")
        model = logged if logged is not None else said
        for path in models(folder.path):
            if digest(path) == result.get("artifact_sha256"):
                model = path.stat().st_size
        if model is None:
            totals |= {seed: claimed} if claimed is not None else {}
            continue
        totals[seed] = model + code_bytes
        for what, size in (("log", logged), ("JSON", said)):
            if size is not None:
                found.row(f"model bytes of {seed}, {what}", size == model, shown(size), shown(model))
        if claimed is not None:
            found.row(f"total bytes of {seed}, JSON", claimed == totals[seed], shown(claimed), shown(totals[seed]))
    largest = max(totals.values(), default=0)
    fits = largest <= ARTIFACT_LIMIT if totals else None
    said_size = f"{shown(largest)} bytes"
    if fits is False and folder.code is not None:
        compressed = largest - code_bytes + len(bundle.packed(folder.code))
        said_size += f"; {shown(compressed)} if train_gpt.py were compressed"
    found.row("model + code", fits, said_size, f"at most {ARTIFACT_LIMIT:,} with train_gpt.py as it is")
    claimed = number(folder.about, "bytes_total")
    if totals and claimed is not None:
        mean = round(statistics.fmean(totals.values()))
        right = claimed in (largest, mean, *totals.values())
        found.row("bytes_total", right, shown(claimed), f"{shown(largest)}, the largest, or {mean:,}, the mean")


def models(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in MODELS and path.is_file())


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _artifacts(found: Review, folder: Folder) -> None:
    """Every seed has one of its own."""
    results, logs = folder.results, folder.logs
    named = [str(result["artifact_sha256"]) for result in results.values() if "artifact_sha256" in result]
    logged = [sha256 for log in logs.values() if (sha256 := log.last(r"^Artifact sha256: (\S+)$"))]
    files = {path.name: digest(path) for path in models(folder.path)}
    for what, values in (("JSON", named), ("logs", logged), ("files", list(files.values()))):
        if values:
            right = len(set(values)) == len(values)
            found.row(f"artifacts distinct, {what}", right, f"{len(set(values))} of {len(values)}", "one a seed")
    if files and named:
        right = set(files.values()) == set(named)
        found.row("artifacts in the folder", right, ", ".join(files), "those of the JSON")
    if named and logged:
        found.row("sha256, logs and JSON", set(named) == set(logged), len(set(logged)), "the same")
    pairs = list(itertools.combinations(logs, 2))
    alike = [f"{a} and {b}" for a, b in pairs if _same_model(logs[a].scores, logs[b].scores)]
    known = any(log.scores for log in logs.values()) and bool(pairs)
    said = f"{', '.join(alike)}: the same model" if alike else "each its own" if known else "not found"
    found.row("scores of seeds differ", not alike if known else None, said, f"more than {SAME_BPB} apart")


def _configurations(found: Review, folder: Folder) -> None:
    """What each of our artifacts says of itself, against its seed's log and the settings of the JSON."""
    files = {digest(path): path for path in models(folder.path) if path.suffix == ".pga"}
    listed = folder.about.get("settings")
    chosen = {str(name).lower(): str(value) for name, value in listed.items()} if isinstance(listed, dict) else {}
    for seed, result in folder.results.items():
        path = files.get(str(result.get("artifact_sha256")))
        if path is None:
            continue
        try:
            config = artifact.load(path).config
        except (artifact.ArtifactError, OSError) as error:
            found.row(f"configuration of {seed}", False, error, "an artifact")
            continue
        own = {name: str(value) for name, value in config.model_dump(mode="json", exclude=MACHINE).items()}
        logged = folder.logs[seed].settings if seed in folder.logs else {}
        for what, told in (("JSON", {"seed": seed, **chosen}), ("log", logged)):
            both = sorted(own.keys() & told.keys())
            wrong = [name for name in both if plain(told[name]) != plain(own[name])]
            said = ", ".join(f"{name} {told[name]}" for name in wrong) or f"{len(both)} compared"
            wanted = ", ".join(f"{name} {own[name]}" for name in wrong) or f"those of {path.name}"
            found.row(f"configuration of {seed}, {what}", not wrong if both else None, said, wanted)


def _same_model(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether all scores of the artifact, given to six decimals or more, are the same but for rounding."""
    after = [
        abs(float(one[name]) - float(other[name]))
        for name in one.keys() & other.keys()
        if decimals(one[name]) >= 6 and not re.search("pre|ema", name)
    ]
    return bool(after) and max(after) < SAME_BPB


def _figures(found: Review, folder: Folder) -> None:
    """Scores and sizes of JSON, logs and README against each other."""
    rows: dict[str, str] = {}  # of README's tables, by their first cell
    for line in folder.readme.splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:]]
        if cells and cells[0] in folder.results:
            rows.setdefault(cells[0], " ".join(cells[1:]))
    values = []
    score = folder.about.get("score")
    score = score if isinstance(score, dict) else {}
    handed_in = score.get("name")
    for seed, result in folder.results.items():
        bpb = number(result, "val_bpb")
        if bpb is None:
            found.row(f"val_bpb of {seed}, JSON", False, result.get("val_bpb"), "a number")
            continue
        values.append(bpb)
        if seed in folder.logs:
            log = folder.logs[seed]
            if isinstance(handed_in, str):
                logged = log.scores.get(handed_in)
                right = logged is not None and agree(bpb, logged)
                found.row(f"val_bpb of {seed}, JSON", right, bpb, f"{logged}, {handed_in} in {log.name}")
                trained = log.last(rf"^{re.escape(handed_in)} .* ttt:(\S+)$")
                if trained or score.get("ttt"):
                    found.row(f"test-time training of {seed}", trained == score.get("ttt"), trained, score.get("ttt"))
            else:
                right = any(agree(bpb, figure) for figure in log.bpbs)
                found.row(f"val_bpb of {seed}, JSON", right, bpb, f"one in {log.name}, which ends with {log.bpbs[-1]}")
        if seed in rows:
            figures = re.findall(r"(?<![\d.])\d\.\d{4,}", rows[seed])
            same = any(agree(bpb, figure) for figure in figures) if figures else None
            found.row(f"val_bpb of {seed}, README", same, ", ".join(figures), bpb)
            large = re.findall(r"\d{1,3}(?:,\d{3}){2,}|\d{3},\d{3}", rows[seed])
            known = {number(result, name) for name in ("artifact_bytes", "bytes_total", "model_bytes")} - {None}
            if large and known:
                right = all(int(size.replace(",", "")) in known for size in large)
                found.row(f"bytes of {seed}, README", right, ", ".join(large), ", ".join(map(shown, known)))
    bpb = number(folder.about, "val_bpb")
    if bpb is None:
        return
    if values:
        mean = statistics.fmean(values)
        found.row("val_bpb is the mean", agree(bpb, round(mean, 8)), bpb, f"{mean:.8f}")
    std = number(folder.about, "val_bpb_std")
    if std is not None and len(values) > 1:
        stds = (statistics.stdev(values), statistics.pstdev(values))
        right = any(agree(std, round(one, 8)) for one in stds)
        found.row("val_bpb_std", right, std, f"{stds[0]:.8f} of the sample or {stds[1]:.8f}")
    lines = folder.readme.splitlines()
    for what, pattern, text in (
        ("title", r"(?<![\d.])\d\.\d{3,}", "".join(lines[:1])),
        ("head", r"val[_ ]?bpb\W{0,5}(\d\.\d{3,})", "\n".join(lines[1:12])),
    ):
        figures = [figure for figure in re.findall(pattern, text, re.I) if 0.3 < float(figure) < 10]
        same = all(agree(bpb, figure) for figure in figures) if figures else None
        found.row(f"val_bpb in README's {what}", same, ", ".join(figures) or "none", bpb)


def _own_figures(found: Review, folder: Folder) -> None:
    """A folder that quantize.py submission wrote: every field and every cell again, from its logs."""
    about, logs = folder.about, folder.logs
    if "train_gpt_sha256" not in about or folder.code is None:
        return
    try:
        if missing := sorted(folder.results.keys() - logs.keys()):
            raise ValueError(f"no log of {', '.join(missing)}")
        if not folder.results:
            raise ValueError("no results of any seed")
        carried = hashlib.sha256(bundle.unwrapped(folder.code) or b"").hexdigest()
        texts = {int(seed): logs[seed].text for seed in folder.results}
        facts = facts_told(about, texts, folder.code, carried)
        wanted = submission_json(facts)
    except ValueError as error:
        found.row("figures from the logs", False, error, "logs as quantize.py submission writes them")
        return
    given = about.get("settings")
    given = {str(name): str(value) for name, value in given.items()} if isinstance(given, dict) else {}
    del wanted["settings"]  # compared with logs and artifacts on their own
    seeds = {str(seed.seed): seed for seed in facts.seeds}
    results = wanted.pop("seed_results")
    wrong = {name: value for name, value in wanted.items() if about.get(name, "none") != value}
    said = "; ".join(f"{name} {about.get(name, 'none')}" for name in wrong) or f"{len(wanted)} fields"
    told_by = "; ".join(f"{name} {value}" for name, value in wrong.items()) or "what the logs say"
    found.row("figures, JSON", not wrong, said, told_by)
    for name, result in results.items():
        own, seed = folder.results.get(name, {}), seeds[name]
        # Logs have whole milliseconds.
        loose = {"eval_time_s": 1e-3 * len(seed.scores), "step_avg_ms": 1e-3 + 1 / max(seed.steps, 1)}
        wrong = {
            what: value for what, value in result.items() if not _alike(own.get(what), value, loose.get(what, 1e-9))
        }
        said = "; ".join(f"{what} {own.get(what, 'none')}" for what in wrong) or f"{len(result)} fields"
        told_by = "; ".join(f"{what} {value}" for what, value in wrong.items()) or "what the log says"
        found.row(f"figures of {name}, JSON", not wrong, said, told_by)
    lines = set(folder.readme.splitlines())
    ours = dict.fromkeys(line for kept in (True, False) for line in readme(facts, kept, given).splitlines())
    gone = [line for line in ours if re.search(r"\d", line) and line not in lines and not line.startswith("They ")]
    heads = [line for line in ours if line.startswith("| seed |")]
    cells = [said for line in gone if line.startswith("| ") for said in _cells(heads[0], line, lines)]
    rest = [line.strip() for line in gone if not line.startswith("| ")]
    said = "; ".join(f"{what} {one}" for what, one, _ in cells) or "each cell"
    found.row("table of README", not cells, said, "; ".join(f"{what} {one}" for what, _, one in cells) or "of the logs")
    found.row("lines of README", not rest, f"{len(rest)} not there" if rest else "each", "; ".join(rest))


def _alike(one: Any, other: Any, within: float) -> bool:
    if isinstance(other, str) or isinstance(one, bool) or not isinstance(one, int | float):
        return bool(one == other)
    return abs(one - other) <= within


def _cells(head: str, line: str, lines: Iterable[str]) -> list[tuple[str, str, str]]:
    """Cells of a table's line that README has otherwise: name, what it has, what was wanted."""
    names, wanted = ([cell.strip() for cell in text.split("|")[1:-1]] for text in (head, line))
    rows = [[cell.strip() for cell in text.split("|")[1:-1]] for text in lines if text.startswith("|")]
    found = next((row for row in rows if row[:1] == wanted[:1]), [])
    found += ["none"] * (len(wanted) - len(found))
    return [(f"{wanted[0]}, {n}", a, b) for n, a, b in zip(names, found, wanted, strict=False) if a != b]


def _ledgers(found: Review, folder: Folder) -> None:
    """Records of scores with test-time training: the audit of each, and whether its figures are those of the JSON."""
    score = folder.about.get("score")
    score = score if isinstance(score, dict) else {}
    files = {digest(path): path for path in models(folder.path) if path.suffix == ".pga"}
    for seed, result in folder.results.items():
        path = folder.path / f"scores_seed{seed}/score.json"
        if not path.is_file():
            if score.get("ttt"):
                found.row(f"audit of {seed}", None, "no record of its scores", path.relative_to(folder.path))
            continue
        sha256 = str(result.get("artifact_sha256"))
        model = files[sha256].read_bytes() if sha256 in files else None
        try:
            known = known_of(model) if model is not None else {"artifact": sha256}
            findings = audit_record(path, **known)
        except (LedgerError, artifact.ArtifactError) as error:
            found.row(f"audit of {seed}", False, error, "a record that passes quantize.py audit")
            continue
        leaks = any(one.leaking for one in findings.values())
        said = f"{len(findings)} scores, {'LEAKING' if leaks else 'each token scored before it trained any weights'}"
        found.row(f"audit of {seed}", not leaks, said, "not leaking", "leaking" in folder.declared)
        if not score.get("ttt"):
            continue
        record = json.loads(path.read_bytes())
        if model is not None:
            masked, mask = record.get("document_mask"), artifact.configuration(model).document_mask
            found.row(f"document_mask of {seed}", masked is mask, masked, f"{mask}, as the artifact has it")
        adapted = [one for one in record["scores"].values() if one["form"] not in FIXED]
        scored = {spelled(one): (round(one["bpb"], 8), one["tokens"], one["bytes"]) for one in adapted}
        wanted = number(result, "val_bpb"), *(number(folder.about, name) for name in ("val_tokens", "val_bytes"))
        own = scored.get(str(score["ttt"]))
        found.row(f"audited score of {seed}", own == wanted, own, f"{wanted}, BPB, tokens and bytes of the JSON")


def _settings(found: Review, folder: Folder) -> None:
    """What README's commands and the JSON set, against what the logs print."""
    blocks = re.findall(r"^```.*?^```|(?:^ {4}.*\n)+", folder.readme, re.S | re.M)
    commands = "\n".join(block for block in blocks if "train_gpt" in block)
    pairs = re.findall(r"\b([A-Z][A-Z0-9_]{2,})=(\"[^\"]*\"|\S+)", commands)
    listed = folder.about.get("settings")
    given = {"README": dict(pairs), **({"JSON": listed} if isinstance(listed, dict) else {})}
    logged = {name: value for log in folder.logs.values() for name, value in log.settings.items()}
    for what, settings in given.items():
        chosen = {name.lower(): str(value) for name, value in settings.items()}
        both = sorted((chosen.keys() & logged.keys()) - {"seed"})
        wrong = [name for name in both if plain(chosen[name]) != plain(logged[name])]
        said = ", ".join(f"{name} {chosen[name]}" for name in wrong) or f"{len(both)} compared"
        wanted = ", ".join(f"{name} {logged[name]}" for name in wrong) or "those of the logs"
        found.row(f"settings in {what}", not wrong if both else None, said, wanted)


def _validation(found: Review, folder: Folder) -> None:
    """Tokens and bytes scored: FineWeb's."""
    tokens, size = number(folder.about, "val_tokens"), number(folder.about, "val_bytes")
    pattern = r"(?:val_loader:.{0,999} tokens:|val_tokens: ?)(\d{1,15})"
    counts = {int(count) for log in folder.logs.values() for count in log.figures(pattern)}
    counts |= {int(tokens)} if tokens is not None else set()
    right = all(canonical(count, None if size is None else int(size)) for count in counts) if counts else None
    said = ", ".join(f"{count:,} tokens" for count in sorted(counts)) + (f", {size:,} bytes" if size else "")
    wanted = f"{VAL_TOKENS['sp8192']:,} at sp8192 or the field's count for another tokenizer; {VAL_BYTES:,} bytes"
    found.row("validation", right, said or "not said", wanted, "non-canonical" in folder.declared)
    scored = {text for log in folder.logs.values() for text in log.figures(r"val_bpb:\S{1,30} (tokens:\d+ bytes:\d+)")}
    if scored and tokens is not None:
        said = f"tokens:{tokens} bytes:{size}"
        found.row("validation, logs", scored == {said}, "; ".join(sorted(scored)), said)


def _ratios(found: Review, folder: Folder) -> None:
    """Nats a token over bits a byte: ln 2 times the bytes of a token, which the text and its tokens have settled."""
    about = folder.about
    tokens, size = number(about, "val_tokens"), number(about, "val_bytes")
    counts = {int(n) for log in folder.logs.values() for n in log.figures(r"(?:tokens:|val_tokens: ?)(\d{1,15})$")}
    counts |= {int(tokens)} if tokens else set()
    wanted: tuple[float, ...]
    if tokens and size:
        wanted, sure, within = (math.log(2) * size / tokens,), True, 1e-6
    else:
        texts = [name for name, count in VAL_TOKENS.items() if any(0 <= n - count < TAIL_TOKENS for n in counts)]
        wanted, sure = tuple(NATS_PER_BIT[name] for name in texts), bool(texts)
        wanted, within = wanted or tuple(NATS_PER_BIT.values()), 1e-4  # four digits, and the end of the text
    records = [about, *folder.results.values()]
    stated = [(number(one, "val_loss"), number(one, "val_bpb")) for one in records]
    logged = [(loss, bpb) for log in folder.logs.values() for _, loss, bpb in log.named]
    for what, pairs in (("JSON", [(repr(a), repr(b)) for a, b in stated if a and b]), ("logs", logged)):
        known = [(a, b) for a, b in pairs if a is not None and float(a) > 0 and float(b) > 0]
        wrong = [(a, b) for a, b in known if not any(_is_ratio(a, b, one, within) for one in wanted)]
        right = None if not known or (wrong and not sure) else not wrong
        said = ", ".join(dict.fromkeys(f"{float(a) / float(b):.4f}" for a, b in wrong or known)) or "not said"
        spelt = " or ".join(dict.fromkeys(f"{one:.4f}" for one in wanted))
        found.row(f"val_loss / val_bpb, {what}", right, said, f"{spelt}, ln 2 times bytes a token")


def _is_ratio(one: str, other: str, wanted: float, within: float) -> bool:
    """Whether two figures, each rounded, have this ratio."""
    ratio = float(one) / float(other)
    rounded = sum(0.5001 * 10.0 ** -decimals(text) / float(text) for text in (one, other))
    return abs(ratio - wanted) <= within + rounded * ratio


def _times(found: Review, folder: Folder) -> None:
    training = [log.train_ms / 1e3 for log in folder.logs.values() if log.train_ms is not None]
    for result in folder.results.values():
        if (seconds := number(result, "train_time_s")) is not None:
            training.append(seconds + (number(result, "calibration_time_s") or 0.0))
    scoring = [time for result in folder.results.values() if (time := number(result, "eval_time_s")) is not None]
    wanted = f"at most {SECONDS_LIMIT} and the last step"
    for what, times in (("training, s", training), ("scoring, s", scoring)):
        right = max(times) <= SECONDS_LIMIT + LAST_STEP if times else None
        found.row(what, right, f"{max(times):.1f}" if times else "not said", wanted, "over-time" in folder.declared)


def _leaks(found: Review, folder: Folder) -> None:
    """Stamps, and signs in the logs that the model was trained on validation before it was scored."""
    owned = "leaking" in folder.declared
    parts = {"submission.json": folder.about, "README.md": folder.readme}
    stamped = [name for name, part in parts.items() if leaking(part)]
    stamped += [log.name for log in folder.logs.values() if leaking(log.text)]
    found.row("leak stamps", not stamped, ", ".join(stamped) or "none", "none", owned)
    texts = {log.name: log.text + log.others for log in folder.logs.values()}
    trained = [f"{name}: {line.strip()[:60]}" for name, text in texts.items() if (line := _trained_before(text))]
    settings = folder.about.get("settings")
    chosen = (
        {str(name).lower(): plain(str(value)) for name, value in settings.items()} if isinstance(settings, dict) else {}
    )
    if chosen.get("pre_quant") == "validation":
        trained.append("submission.json: pre_quant validation")
    if match := ON_VALIDATION.search(folder.readme):
        trained.append(f"README.md: {match[0].strip()}")
    for path in models(folder.path):
        try:
            if path.suffix == ".pga" and artifact.load(path).config.leaking:
                trained.append(f"{path.name}: pre_quant validation")
        except (artifact.ArtifactError, OSError):
            continue  # one of another program's
    said = "; ".join(trained) or "none seen in the logs"
    found.row("training before scoring", not trained, said, "no test-time training before quantisation", owned)


def _trained_before(text: str) -> str | None:
    """The line of a log that says that the model was trained on validation before it was quantised and scored."""
    if match := ON_VALIDATION.search(text):
        return match[0]
    held_out = re.search(r"^[ \t]*pre_quant: ?train[ \t]*$", text, re.M)
    for line in text.splitlines():
        sign = PRE_QUANT_TTT.search(line)
        told = sign and REPORTED.search(line, sign.end())
        if told and re.search(r"\d", line[told.end() :]):
            return line
        scored = re.match(r"(\S+) val_(?:loss|bpb)\b", line)
        if scored and not held_out and FINE_TUNED.search(scored[1]):
            return line
    return None


def _declared(found: Review, folder: Folder) -> None:
    """That what is declared stands where the score does, and is all that the JSON admits to."""
    owned = folder.declared
    kept = folder.about.get("compliance")
    if isinstance(kept, dict):
        broken = sorted(name for name, value in kept.items() if value is False)
        admitted = {name for kind in owned for name in COMPLIANCE.get(kind, ())}
        said = ", ".join(broken) or "all kept"
        found.row("compliance", not broken, said, "all kept", set(broken) <= admitted)
    if owned:
        parts = {"README.md": folder.readme, **{log.name: log.text for log in folder.logs.values()}}
        bare = [name for name, part in parts.items() if any(DECLARATIONS.get(kind, "") not in part for kind in owned)]
        right = not bare and set(owned) <= DECLARATIONS.keys()
        found.row("declared", right, ", ".join(owned), "stamped in README and logs")
        track = folder.about.get("track")
        found.row("track", "non" in str(track), track, "a non-record one, with what is declared")
