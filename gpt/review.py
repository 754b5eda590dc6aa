"""Checks a submission's folder from its files alone: ours, or any that is laid out as the field's are.

Nothing in the folder is run. What its files do not say is shown as unknown, never as right. A deviation that the folder
itself declares (submission.json, "declared") is no failure, but nothing declared can be a record.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gpt import bundle
from gpt.config import ARTIFACT_LIMIT
from gpt.submission import FEWEST_SEEDS, SECONDS_LIMIT, VAL_BYTES, VAL_TOKENS, canonical, leaking

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
PRE_QUANT_TTT = re.compile(
    r"^.*(?:pre[-_ ]?quant[-_ ]?ttt|ttt_adamw|ttt_adapt)\S*.*(?:epoch|loss|val_bpb)\D*\d.*$", re.I | re.M
)


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
        return {int(size) for size in self.figures(r"Code size[^:\n]*: ?(\d+)")}

    @property
    def model_bytes(self) -> int | None:
        found = self.last(r"Serialized model \S[^:\n]*: ?(\d+) bytes")
        return int(found) if found else None

    @property
    def scores(self) -> dict[str, str]:
        """val_bpb of each named score after training; the last figure where one is named twice."""
        pattern = r"^(?!step:|\d+/)([\w-]*(?:quant|int\d|final|ttt)[\w -]*?) val_loss.*?val_bpb[:=] ?(\d+\.\d+)"
        return {match[1]: match[2] for match in re.finditer(pattern, self.text, re.M)}

    @property
    def bpbs(self) -> list[str]:
        return re.findall(r"val_bpb[:=] ?(\d+\.\d+)", self.others + self.text)

    @property
    def train_ms(self) -> float | None:
        found = self.figures(r"train_time: ?([\d.]+)ms")
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


def review(folder: Path) -> Review:
    """Every check of one folder. Raises OSError where it cannot be read."""
    found = Review()
    names = {path.name for path in folder.iterdir()}
    needed = ("README.md", "submission.json", "train_gpt.py")
    missing = [name for name in needed if name not in names]
    found.row("files", not missing, ", ".join(n for n in needed if n in names) or "none", ", ".join(needed))
    code = (folder / "train_gpt.py").read_bytes() if "train_gpt.py" in names else None
    about: dict[str, Any] = {}
    if "submission.json" in names:
        try:
            about = json.loads((folder / "submission.json").read_bytes())
            right = isinstance(about, dict)
            about = about if right else {}
        except (ValueError, RecursionError) as error:
            right = False
            found.row("submission.json", False, error, "JSON")
        else:
            found.row("submission.json", right, "an object" if right else "no object", "an object")
    readme = (folder / "README.md").read_text(errors="replace") if "README.md" in names else ""
    results = seed_results(about)
    logs = find_logs(folder, results)

    absent = [name for name in FIELDS if about.get(name) in (None, "")]
    found.row("fields", not absent, f"no {', '.join(absent)}" if absent else "all", ", ".join(FIELDS))
    _program(found, code, about, logs)
    _seeds(found, about, results, logs)
    _sizes(found, folder, code, about, results, logs)
    _figures(found, about, results, logs, readme)
    _legal(found, about, results, logs, readme)
    return found


def seed_results(about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each seed, under either name that the field gives them."""
    for name in ("seed_results", "seeds"):
        results = about.get(name)
        if isinstance(results, dict) and all(isinstance(value, dict) for value in results.values()):
            return {str(seed): value for seed, value in results.items()}
    return {}


def find_logs(folder: Path, results: Iterable[str]) -> dict[str, Log]:
    """The log of each seed: the one that has it as its setting, else in its name."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".log", ".txt") and path.is_file())
    logs = [Log(path.relative_to(folder).as_posix(), path.read_text(errors="replace")) for path in files]
    chosen: dict[str, Log] = {}
    for log in logs:
        seed = log.last(r"^\s*seed: ?(\d+)\s*$")
        if seed is None:
            named = [seed for seed in results if re.search(rf"(?<!\d){re.escape(seed)}(?!\d)", log.name)]
            seed = named[0] if len(named) == 1 else None
        if seed is not None and "val_bpb" in log.text:
            first = chosen.setdefault(seed, log)
            if first is not log:
                chosen[seed] = replace(first, others=first.others + log.text)
    return chosen


def _program(found: Review, code: bytes | None, about: Mapping[str, Any], logs: Mapping[str, Log]) -> None:
    """train_gpt.py: that it is Python, its size, and what it carries."""
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
    size = about.get("bytes_code")
    found.row("code bytes, JSON", None if size is None else size == len(code), size, f"{len(code)}, of train_gpt.py")
    logged = {seed: log.code_bytes for seed, log in logs.items() if log.code_bytes}
    right = all(len(code) in sizes for sizes in logged.values()) if logged else None
    found.row("code bytes, logs", right, sorted(set().union(*logged.values())), f"{len(code)}, of train_gpt.py")
    for name, digest in (
        ("train_gpt_sha256", hashlib.sha256(code).hexdigest()),
        ("code_sha256", hashlib.sha256(bundle.unwrapped(code) or b"").hexdigest()),
    ):
        if name in about:
            found.row(name, about[name] == digest, about[name], digest)
    if files and "code_sha256" in about:
        ran = {log.last(r"^  code_sha256: (\S+)$") for log in logs.values()}
        right = ran == {about["code_sha256"]}
        found.row(
            "code of the runs",
            right,
            ", ".join(sorted(map(str, ran))),
            about["code_sha256"],
            "other-code" in declared(about),
        )


def declared(about: Mapping[str, Any]) -> list[str]:
    value = about.get("declared", [])
    return [str(item) for item in value] if isinstance(value, list) else []


def _seeds(
    found: Review, about: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], logs: Mapping[str, Log]
) -> None:
    listed = about.get("seeds", list(results))
    seeds = [str(seed) for seed in listed] if isinstance(listed, list | dict) else []
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    found.row("seeds distinct", not twice if seeds else None, ", ".join(seeds) or "none named", "each once")
    enough = len(set(seeds)) >= FEWEST_SEEDS if seeds else None
    found.row("number of seeds", enough, len(set(seeds)), f"at least {FEWEST_SEEDS}", "few-seeds" in declared(about))
    found.row(
        "results of each seed",
        set(results) == set(seeds) if results else None,
        ", ".join(results) or "none",
        ", ".join(seeds),
    )
    without = sorted(set(seeds) - set(logs))
    found.row("log of each seed", not without, ", ".join(log.name for log in logs.values()) or "none", ", ".join(seeds))
    if len(logs) > 1:
        settings = [log.settings for log in logs.values()]
        common = set.intersection(*(set(one) for one in settings))
        differing = sorted(name for name in common if len({one[name] for one in settings}) > 1)
        known = bool(common)
        shown = ", ".join(f"{n} {' / '.join(one[n] for one in settings)}" for n in differing)
        same = f"{len(common)} settings alike" if known else "none found"
        found.row("one configuration, logs", not differing if known else None, shown or same, "alike but for the seed")


def _sizes(
    found: Review,
    folder: Path,
    code: bytes | None,
    about: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Log],
) -> None:
    """Bytes of model and program, and that every seed has an artifact of its own."""
    code_bytes = len(code) if code is not None else 0
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in MODELS and path.is_file()}
    digests = {}
    for name, path in files.items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    totals: dict[str, float] = {}
    for seed, result in results.items():
        logged = logs[seed].model_bytes if seed in logs else None
        own = [name for name, digest in digests.items() if digest == result.get("artifact_sha256")]
        said = number(result, "model_bytes")
        model = float(files[own[0]].stat().st_size) if own else logged if logged is not None else said
        claimed = number(result, "artifact_bytes", "bytes_total")
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
    size_text = f"{largest:,.0f} bytes"
    if fits is False and code is not None:
        size_text += f"; {largest - code_bytes + len(bundle.packed(code)):,.0f} if train_gpt.py were compressed"
    found.row("model + code", fits, size_text, f"at most {ARTIFACT_LIMIT:,} with train_gpt.py as it is")
    claimed = number(about, "bytes_total")
    if totals and claimed is not None:
        mean = round(statistics.fmean(totals.values()))
        right = claimed in (largest, mean, *totals.values())
        found.row("bytes_total", right, shown(claimed), f"{largest:,.0f}, the largest, or {mean:,}, the mean")

    named = [str(result["artifact_sha256"]) for result in results.values() if "artifact_sha256" in result]
    logged_digests = [digest for log in logs.values() if (digest := log.last(r"^Artifact sha256: (\S+)$"))]
    for what, values in (("JSON", named), ("logs", logged_digests), ("files", list(digests.values()))):
        if values:
            right = len(set(values)) == len(values)
            found.row(f"artifacts distinct, {what}", right, f"{len(set(values))} of {len(values)}", "one a seed")
    if digests and named:
        found.row(
            "artifacts in the folder", set(digests.values()) == set(named), ", ".join(digests), "those of the JSON"
        )
    if named and logged_digests:
        found.row("sha256, logs and JSON", set(named) == set(logged_digests), len(set(logged_digests)), "the same")
    pairs = list(itertools.combinations(logs, 2))
    alike = [f"{a} and {b}" for a, b in pairs if _same_model(logs[a].scores, logs[b].scores)]
    known = any(log.scores for log in logs.values()) and bool(pairs)
    found.row(
        "scores of seeds differ",
        not alike if known else None,
        f"{', '.join(alike)}: the same model" if alike else "each its own" if known else "not found",
        f"artifacts of their own: scores more than {SAME_BPB} apart",
    )


def _same_model(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether all scores of the artifact, given to six decimals or more, are the same but for rounding."""
    after = [
        abs(float(one[name]) - float(other[name]))
        for name in one.keys() & other.keys()
        if decimals(one[name]) >= 6 and not re.search("pre|ema", name)
    ]
    return bool(after) and max(after) < SAME_BPB


def _figures(
    found: Review,
    about: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Log],
    readme: str,
) -> None:
    """Scores of JSON, logs and README."""
    rows: dict[str, str] = {}  # of README's tables, by their first cell
    for line in readme.splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:]]
        if cells and cells[0] in results:
            rows.setdefault(cells[0], " ".join(cells[1:]))
    values = []
    right: bool | None
    for seed, result in results.items():
        bpb = number(result, "val_bpb")
        if bpb is None:
            found.row(f"val_bpb of {seed}, JSON", False, result.get("val_bpb"), "a number")
            continue
        values.append(bpb)
        if seed in logs:
            bpbs = logs[seed].bpbs
            right = any(agree(bpb, figure) for figure in bpbs)
            found.row(f"val_bpb of {seed}, JSON", right, bpb, f"one in {logs[seed].name}, which ends with {bpbs[-1]}")
        if seed in rows:
            figures = re.findall(r"(?<![\d.])\d\.\d{4,}", rows[seed])
            right = any(agree(bpb, figure) for figure in figures) if figures else None
            found.row(f"val_bpb of {seed}, README", right, ", ".join(figures), bpb)
            sizes = [
                int(size.replace(",", "")) for size in re.findall(r"\d{1,3}(?:,\d{3}){2,}|\d{3},\d{3}", rows[seed])
            ]
            known = {number(result, name) for name in ("artifact_bytes", "bytes_total", "model_bytes")} - {None}
            if sizes and known:
                right = all(size in known for size in sizes)
                found.row(f"bytes of {seed}, README", right, ", ".join(map(shown, sizes)), ", ".join(map(shown, known)))
    bpb = number(about, "val_bpb")
    if bpb is not None:
        _statistics(found, about, bpb, values, readme)
    blocks = re.findall(r"^```.*?^```|(?:^ {4}.*\n)+", readme, re.S | re.M)
    commands = "\n".join(block for block in blocks if "train_gpt" in block)
    tokens = re.findall(r"\b([A-Z][A-Z0-9_]{2,})=(\"[^\"]*\"|\S+)", commands)
    chosen = {name.lower(): value for name, value in tokens}
    logged = {name: value for log in logs.values() for name, value in log.settings.items()}
    listed = about.get("settings")
    in_json = {name.lower(): str(value) for name, value in listed.items()} if isinstance(listed, dict) else {}
    for what, given in (("README", chosen), *([("JSON", in_json)] if in_json else [])):
        shared = sorted((given.keys() & logged.keys()) - {"seed"})
        wrong = [name for name in shared if plain(given[name]) != plain(logged[name])]
        found.row(
            f"settings in {what}",
            not wrong if shared else None,
            ", ".join(f"{name} {given[name]}" for name in wrong) or f"{len(shared)} compared",
            ", ".join(f"{name} {logged[name]}" for name in wrong) or "those of the logs",
        )


def _statistics(found: Review, about: Mapping[str, Any], bpb: float, values: list[float], readme: str) -> None:
    if values:
        mean = statistics.fmean(values)
        found.row("val_bpb is the mean", agree(bpb, round(mean, 8)), bpb, f"{mean:.8f}")
    claimed = number(about, "val_bpb_std")
    if claimed is not None and len(values) > 1:
        stds = (statistics.stdev(values), statistics.pstdev(values))
        right = any(agree(claimed, round(std, 8)) for std in stds)
        found.row("val_bpb_std", right, claimed, f"{stds[0]:.8f} of the sample or {stds[1]:.8f}")
    for what, pattern, text in (
        ("title", r"(?<![\d.])\d\.\d{3,}", readme.split("\n", 1)[0]),
        ("head", r"val[_ ]?bpb\W{0,5}(\d\.\d{3,})", "\n".join(readme.splitlines()[1:12])),
    ):
        figures = re.findall(pattern, text, re.I)
        figures = [figure for figure in figures if 0.3 < float(figure) < 10]
        same = all(agree(bpb, figure) for figure in figures) if figures else None
        found.row(f"val_bpb in README's {what}", same, ", ".join(figures) or "none", bpb)


def _legal(
    found: Review,
    about: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Log],
    readme: str,
) -> None:
    """Validation, time, leaks, and what the folder declares."""
    owned = declared(about)
    tokens, size = number(about, "val_tokens"), number(about, "val_bytes")
    counts = {int(n) for log in logs.values() for n in log.figures(r"(?:val_loader:.* tokens:|val_tokens: ?)(\d+)")}
    counts |= {int(tokens)} if tokens is not None else set()
    right = all(canonical(count, None if size is None else int(size)) for count in counts) if counts else None
    said = ", ".join(f"{count:,} tokens" for count in sorted(counts)) + (f", {size:,} bytes" if size else "")
    wanted = f"{VAL_TOKENS['sp8192']:,} at sp8192 or the field's count for another tokenizer; {VAL_BYTES:,} bytes"
    found.row("validation", right, said or "not said", wanted, "non-canonical" in owned)
    scored = {text for log in logs.values() for text in log.figures(r"val_bpb:\S+ (tokens:\d+ bytes:\d+)")}
    if scored and tokens is not None:
        said = f"tokens:{tokens} bytes:{size}"
        found.row("validation, logs", scored == {said}, "; ".join(sorted(scored)), said)

    seconds = [log.train_ms / 1e3 for log in logs.values() if log.train_ms is not None]
    for result in results.values():
        if (trained_s := number(result, "train_time_s")) is not None:
            seconds.append(trained_s + (number(result, "calibration_time_s") or 0.0))
    scoring = [t for result in results.values() if (t := number(result, "eval_time_s")) is not None]
    for what, times in (("training, s", seconds), ("scoring, s", scoring)):
        longest = max(times, default=0.0)
        right = longest <= SECONDS_LIMIT + LAST_STEP if times else None
        found.row(what, right, f"{longest:.1f}" if times else "not said", f"at most {SECONDS_LIMIT} and the last step")

    stamped = [
        name
        for name, part in (("submission.json", about), *((log.name, log.text) for log in logs.values()))
        if leaking(part)
    ]
    stamped += ["README.md"] * leaking(readme)
    found.row("leak stamps", not stamped, ", ".join(stamped) or "none", "none", "leaking" in owned)
    trained = {log.name: match[0] for log in logs.values() if (match := PRE_QUANT_TTT.search(log.text))}
    found.row(
        "training before scoring",
        not trained,
        "; ".join(f"{name}: {line.strip()[:60]}" for name, line in trained.items()) or "none seen in the logs",
        "no test-time training before quantisation",
        "leaking" in owned,
    )
    kept = about.get("compliance")
    broken = sorted(name for name, value in kept.items() if value is False) if isinstance(kept, dict) else []
    if isinstance(kept, dict):
        found.row("compliance", not broken, ", ".join(broken) or "all kept", "all kept", bool(owned))
    if owned:
        stamps = [str(stamp) for stamp in about.get("stamps", [])]
        places = {"README.md": readme, **{log.name: log.text for log in logs.values()}}
        bare = [name for name, part in places.items() if not stamps or any(stamp not in part for stamp in stamps)]
        found.row("declared", not bare and len(stamps) == len(owned), ", ".join(owned), "stamped in README and logs")
        track = about.get("track")
        found.row("track", "non" in str(track), track, "a non-record one, with what is declared")
