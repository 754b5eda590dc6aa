"""report.html: one page, in one file, that shows a run. Pictures are SVG in the page; nothing is loaded from elsewhere.

python quantize.py report RUN --against OTHER        again, with the settings in which the runs differ
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gpt.artifact import ArtifactError, beside
from gpt.config import ARTIFACT_LIMIT, PRESETS, Config
from gpt.ledger import Findings, LedgerError, artifact_of, audit_record, read_record
from gpt.record import RecordError, read_config, read_metrics, write_atomic

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #777; --line: #8884; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --soft: #999; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { overflow-wrap: anywhere; } h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } .wide svg { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.long td { overflow-wrap: anywhere; }
.bad { background: #b00020; color: #fff; padding: .6rem .9rem; font-weight: bold; } .soft { color: var(--soft); }
code { font-size: .9em; word-break: break-all; }
"""
COLOURS = ("#4477aa", "#cc3311", "#228833", "#aa7700", "#7755aa", "#44aaaa")
WIDTH, LEFT, RIGHT, BOTTOM, TOP = 860, 62, 12, 40, 26

Points = Sequence[tuple[float, float]]
STAGES = {
    "ema": "averaged weights, plain",
    "ema_pre_quant": "fine-tuned, plain",
    "artifact": "artifact, plain",
    "artifact_sliding": "artifact, sliding",
}


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers in low..high."""
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(height: int, parts: Iterable[str], title: str) -> str:
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg></div>"
    )


def _text(x: float, y: float, what: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(what)}</text>'


def chart(series: dict[str, Points], x_label: str, y_label: str, height: int = 300) -> str:
    """Lines by name over common axes; nothing where there are no two different places on each."""
    points = [point for line in series.values() for point in line if all(map(math.isfinite, point))]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if not points or min(xs) == max(xs) or min(ys) == max(ys):
        return ""
    (x0, x1), margin = (min(xs), max(xs)), 0.04 * (max(ys) - min(ys))
    y0, y1 = min(ys) - margin, max(ys) + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1 - up) * (height - BOTTOM - TOP)

    parts = []
    for x in ticks(x0, x1):
        parts += [_text(at(x, y0)[0], height - BOTTOM + 16, f"{x:,.6g}")]
    for y in ticks(y0, y1, 5):
        _, level = at(x0, y)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="var(--line)"/>',
            _text(LEFT - 6, level + 4, f"{y:.6g}", "end"),
        ]
    parts += [_text((LEFT + WIDTH) / 2, height - 6, x_label), _text(0, 12, y_label, "start")]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(series) > 1:
            parts.append(
                f'<text x="{WIDTH - RIGHT - 6}" y="{TOP + 16 + 16 * number}" text-anchor="end" style="fill:{colour}">'
                f"{escape(name)}</text>"
            )
    return _svg(height, parts, f"{y_label} by {x_label}")


def histogram(values: Sequence[float], label: str, bins: int = 40) -> str:
    """Counts of values; those above the 99th percentile are in the last bin, so that one stall leaves a picture."""
    if len(values) < 2:
        return ""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    if low == high:
        return f"<p>all {len(values)}: {low:.2f} {escape(label)}</p>"
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    height, most, width = 200, max(counts), (WIDTH - LEFT - RIGHT) / bins
    room = height - BOTTOM - 8
    parts = [
        f'<rect x="{LEFT + i * width:.1f}" y="{8 + (1 - count / most) * room:.1f}" width="{width - 1:.1f}" '
        f'height="{count / most * room:.1f}" fill="{COLOURS[0]}"/>'
        for i, count in enumerate(counts)
    ]
    for x in ticks(low, high):
        parts.append(_text(LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT), height - BOTTOM + 16, f"{x:.6g}"))
    parts += [_text((LEFT + WIDTH) / 2, height - 6, label), _text(LEFT - 6, 18, f"{most}", "end")]
    return _svg(height, parts, f"histogram of {label}")


def bar(parts: dict[str, float], limit: float, unit: str) -> str:
    """Parts side by side on one bar that ends at a limit."""
    total = sum(parts.values())
    scale = (WIDTH - RIGHT) / max(limit, total)
    drawn, x = [], 0.0
    for number, (name, value) in enumerate(parts.items()):
        colour = COLOURS[number % len(COLOURS)]
        title = f"<title>{escape(name)}: {value:,.0f} {unit}</title>"
        drawn.append(f'<rect x="{x:.1f}" y="8" width="{value * scale:.1f}" height="26" fill="{colour}">{title}</rect>')
        if value * scale > 7 * len(name) + 8:
            drawn.append(f'<text x="{x + 5:.1f}" y="25" style="fill:#fff" text-anchor="start">{escape(name)}</text>')
        x += value * scale
    drawn.append(f'<line x1="{limit * scale:.1f}" x2="{limit * scale:.1f}" y1="2" y2="40" stroke="var(--ink)"/>')
    drawn.append(_text(limit * scale - 4, 54, f"limit {limit:,.0f}", "end"))
    return _svg(60, drawn, f"{total:,.0f} of {limit:,.0f} {unit}")


def rows(header: Sequence[str], lines: Iterable[Sequence[Any]], kind: str = "wide") -> str:
    """A table that scrolls in a narrow window or, of kind "long", breaks its words there."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f"<div class={kind}><table><tr>{cells('th', header)}</tr>{body}</table></div>"


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(ms, int | float) and 0 <= ms < 1e9 for ms in value.values())


def parts_of_a_step(measured: Any) -> str:
    """{layers: {part: ms}} as a bar for each number of layers, all on one scale, and a table."""
    if not isinstance(measured, dict) or not measured or not all(map(_is_parts, measured.values())):
        return "<p class=soft>not measured</p>"
    longest = max(sum(parts.values()) for parts in measured.values()) or 1
    scale, drawn, names = (WIDTH - LEFT - RIGHT) / longest, [], list(next(iter(measured.values())))
    for line, (layers, parts) in enumerate(measured.items()):
        x, y = float(LEFT), 24 + 30 * line
        drawn.append(_text(LEFT - 6, y + 15, f"{layers} layers", "end"))
        for number, (name, ms) in enumerate(parts.items()):
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{ms * scale:.1f}" height="22" fill="{COLOURS[number % 6]}">'
                f"<title>{escape(name)}: {ms:.2f} ms</title></rect>"
            )
            x += ms * scale
    for number, name in enumerate(names):
        drawn.append(f'<text x="{LEFT + 180 * number}" y="14" style="fill:{COLOURS[number % 6]}">{escape(name)}</text>')
    head = ("ms, each part waited for", *(f"{layers} layers" for layers in measured))
    table = [(name, *(f"{parts.get(name, 0):.2f}" for parts in measured.values())) for name in names]
    table.append(("sum", *(f"{sum(parts.values()):.2f}" for parts in measured.values())))
    return _svg(26 + 30 * len(measured), drawn, "parts of a step") + rows(head, table)


def _scores(summary: dict[str, Any], more: dict[str, dict[str, Any]]) -> str:
    """Every score in the order of stages, and what each changed; records beside the summary come last."""
    lines: list[tuple[str, dict[str, Any]]] = [
        (STAGES.get(name, name), score)
        for name, score in sorted(
            summary["scores"].items(), key=lambda item: list(STAGES).index(item[0]) if item[0] in STAGES else 9
        )
    ]
    for file, record in more.items():
        same = artifact_of(record) == summary["artifact"]["sha256"]
        lines += [(f"{file}: {name}{'' if same else ' (another artifact)'}", s) for name, s in record["scores"].items()]
    table, before = [], None
    for name, score in lines:
        change = "" if before is None else f"{score['bpb'] - before:+.5f}"
        how = f"{score['context']} / {score['stride']}"
        table.append(
            (name, f"{score['bpb']:.5f}", change, f"{score['nats_per_token']:.5f}", how, f"{score['seconds']:.1f}")
        )
        before = score["bpb"]
    return rows(("stage", "BPB", "change", "nats / token", "context / stride", "s"), table)


def _audits(path: Path) -> dict[str, dict[str, Findings] | LedgerError]:
    """What an audit says of summary.json and of every other record of scores beside it, from their files and the
    artifact beside them."""
    found: dict[str, dict[str, Findings] | LedgerError] = {}
    try:
        known = beside(path / "summary.json")
    except ArtifactError as error:
        return {"model.pga": LedgerError(str(error))}
    for file in (path / "summary.json", *sorted(set(path.glob("*.json")) - {path / "summary.json"})):
        content = _json(file)
        if isinstance(content, dict) and "scores" in content:  # what else lies there is none of ours
            try:
                same = file.stem == "summary" or artifact_of(read_record(file)) == known.get("artifact")
                found[file.stem] = audit_record(file, **(known if same else {}))
            except LedgerError as error:
                found[file.stem] = error
    return found


def _ledgers(audits: dict[str, dict[str, Findings] | LedgerError]) -> str:
    lines: list[tuple[str, ...]] = []
    for record, findings in audits.items():
        if isinstance(findings, LedgerError):
            lines.append((record, f"REFUSED: {findings}", "", "", ""))
            continue
        for name, found in findings.items():
            told = "LEAKING" if found.leaking else "consistent"
            lines.append((f"{record}: {name}", told, f"{found.lines:,}", f"{found.versions:,}", f"{found.trained:,}"))
    head = ("score", "audit", "lines", "versions of weights", "tokens that trained some")
    said = "<p class=soft>Against artifact and shards: <code>quantize.py audit RUN</code></p>"
    return rows(head, lines) + said


def _json(file: Path) -> Any:
    """What a JSON file holds; None where it is none."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _differences(config: Config, other: Config) -> list[tuple[str, Any, Any]]:
    return [
        (name, getattr(config, name), getattr(other, name))
        for name in Config.model_fields
        if getattr(config, name) != getattr(other, name)
    ]


def page(path: Path, against: Path | None = None) -> str:
    """The page of a finished run's folder. Raises RecordError where it is none."""
    try:
        return _page(path, against)
    except (AttributeError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: not as a run leaves it: {type(error).__name__}: {error}") from None


def _page(path: Path, against: Path | None) -> str:
    config = read_config(path)
    summary, environment, parts = (_json(path / f"{name}.json") for name in ("summary", "environment", "parts"))
    for name, content in (("summary", summary), ("environment", environment)):
        if not isinstance(content, dict):
            raise RecordError(f"{path}: no finished run: {name}.json is missing or no JSON object")
    audits = _audits(path)
    more = {name: read_record(path / f"{name}.json") for name, found in audits.items() if isinstance(found, dict)}
    more.pop("summary", None)
    entries = read_metrics(path)
    train = [(e["step"], e["train_loss"]) for e in entries if "train_loss" in e]
    val = [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]
    rate = [(e["step"], e["lr_factor"]) for e in entries if "lr_factor" in e]
    times = [e["ms_per_step"] for e in entries if e.get("ms_per_step")]
    artifact = summary["artifact"]
    sizes = {group["name"]: group["nbytes"] for group in artifact["groups"]}
    sizes |= {"vectors": artifact["nbytes"] - sum(sizes.values()), "code": artifact["code_nbytes"]}
    other = read_config(against) if against else Config(**{**PRESETS[config.preset], "preset": config.preset})
    beside = str(against) if against else f"preset {config.preset}"
    facts = [
        ("seed", summary["seed"]),
        ("steps", f"{summary['steps']:,}"),
        ("training", f"{summary['seconds']:.1f} s"),
        ("calibration", f"{summary['calibration_seconds']:.1f} s"),
        ("device", f"{environment['world_size']} x {environment['device']}"),
        ("torch", environment["packages"]["torch"]),
        ("commit", environment["git_commit"] or ""),
        ("artifact sha256", artifact["sha256"]),
    ]
    refused = [escape(str(found)) for found in audits.values() if isinstance(found, LedgerError)]
    leak = "".join(f'<p class="bad">REFUSED by the audit: {message}</p>' for message in refused)
    if config.leaking or summary.get("leaking"):
        leak += (
            '<p class="bad">LEAKING: the weights were trained on the tokens that they are scored on. '
            "These scores are worth nothing.</p>"
        )
    changes = _differences(config, other)
    body = [
        f"<h1>{escape(path.resolve().name)}</h1>{leak}",
        rows(("run", ""), facts, "long"),
        "<h2>Scores</h2>",
        _scores(summary, more),
        "<h2>Loss</h2>",
        chart({"training batch": train, "validation": val}, "step", "nats per token"),
        chart({"rate": rate}, "step", "learning-rate factor", 150),
        "<h2>Time of a step</h2>",
        histogram(times, "ms a step, between logged steps"),
        "<h2>Parts of a step</h2>",
        parts_of_a_step(parts),
        "<h2>Size</h2>",
        bar(sizes, ARTIFACT_LIMIT, "bytes"),
        rows(("part", "bytes"), [(name, f"{size:,}") for name, size in (*sizes.items(), ("sum", sum(sizes.values())))]),
        "<h2>Ledgers</h2>",
        _ledgers(audits),
        f"<h2>Settings that differ from {escape(beside)}</h2>",
        rows(("setting", "this run", beside), changes, "long") if changes else "<p>none</p>",
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(path.resolve().name)}</title><style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def write_page(path: Path, against: Path | None = None) -> Path:
    """Write report.html into a run's folder."""
    file = path / "report.html"
    write_atomic(file, page(path, against).encode())
    return file
