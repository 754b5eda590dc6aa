"""Scores an artifact, lets it write, makes another one from a finished run, hands runs in and checks what is handed in.

    python quantize.py score ARTIFACT             BPB of its model on the validation shards, plain and sliding
    python quantize.py score ARTIFACT --ttt chunk --json score.json      and with test-time training
    python quantize.py audit score.json           proof from the ledgers beside it that no token was seen too early
    python quantize.py preflight ARTIFACT         a reviewer's checks, on a CPU, in a minute
    python quantize.py report RUN                 one page that shows a run
    python quantize.py sample ARTIFACT --prompt "Once upon a time"
    python quantize.py pack RUN --clip-sigmas 13  quantise the run's EMA weights again
    python quantize.py submission RUN... --out FOLDER --author NAME --github-id ID
    python quantize.py check FOLDER               such a folder, ours or anybody's, from its files alone

score and sample need the artifact, its tokenizer and, for scoring, the shards; nothing else of the run that made it.
Under torchrun the ranks share the scoring.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt.artifact import MAX_TOKENS, Artifact, ArtifactError, load
from gpt.bundle import count_code
from gpt.config import ARTIFACT_LIMIT, PRESETS, ROOT, ConfigError, build_config
from gpt.data import DataError, calibration_batches, load_validation
from gpt.distributed import Ranks, distributed, run_program
from gpt.generate import generate, stream_text
from gpt.gptq import QuantisationError
from gpt.ledger import LedgerError, audit_record, base_name, canonical, ledger_of, read_record, seal
from gpt.model import BANKS, GPT
from gpt.pack import pack
from gpt.page import write_page
from gpt.preflight import preflight
from gpt.record import RecordError, Run, environment, read_config, write_atomic
from gpt.report import LEAKING
from gpt.score import Score, record_scores, score, validation_text
from gpt.tokenizer import Tokenizer
from gpt.ttt import adapt, parse_form, pre_quant
from kernels import KernelError, select

# What a user can mend: shown without a traceback.
ERRORS = (ArtifactError, ConfigError, DataError, KernelError, LedgerError, QuantisationError, RecordError, OSError)
SAMPLE_DATA, SAMPLE_TOKENIZER = (Path(PRESETS["sample"][name]) for name in ("data_path", "tokenizer_path"))


def open_tokenizer(path: Path | None, artifact: Artifact) -> Tokenizer:
    """The tokenizer at a path; without one the sample's, if it is the artifact's, else the configuration's default.

    Raises DataError where it is not the one that the artifact was made with.
    """
    if path is None:
        path = artifact.config.tokenizer_path
        if SAMPLE_TOKENIZER.is_file() and Tokenizer(SAMPLE_TOKENIZER).sha256 == artifact.header.tokenizer_sha256:
            path = SAMPLE_TOKENIZER
    tokenizer = Tokenizer(path)
    if tokenizer.sha256 != artifact.header.tokenizer_sha256:
        raise DataError(
            f"{path}: sha256 {tokenizer.sha256}, wanted {artifact.header.tokenizer_sha256}: the artifact "
            "was made with another tokenizer; --tokenizer-path names it"
        )
    tokenizer.require(artifact.config.vocab_size)
    return tokenizer


def score_artifact(arguments: Namespace, ranks: Ranks) -> None:
    if arguments.json:
        _writable(arguments.json)
    artifact = load(arguments.artifact)
    tokenizer = open_tokenizer(arguments.tokenizer_path, artifact)
    if arguments.documents:
        masked = artifact.config.model_copy(update={"document_mask": True})
        artifact = replace(artifact, header=artifact.header.model_copy(update={"config": masked}))
    config, ops = artifact.config, select(arguments.kernels, ranks.device)
    data_path = arguments.data_path or (SAMPLE_DATA if tokenizer.path == SAMPLE_TOKENIZER else config.data_path)
    context = arguments.context or config.context
    stride = arguments.stride or config.eval_stride
    strides = {"plain": context, "sliding": stride}
    if arguments.only:
        strides = {arguments.only: strides[arguments.only]}
    if stride > context:
        raise ConfigError(f"stride {stride}, context {context}: wanted stride <= context")
    forms = {text.replace(",", "-").replace("=", ""): parse_form(text) for text in arguments.ttt}
    for form in forms.values():
        form.check(context)
    if arguments.only and arguments.stride and arguments.only == "plain" and not forms:
        raise ConfigError("--plain --stride: rows side by side have no stride; wanted one of the two")
    if forms and arguments.packed:
        raise ConfigError("--packed --ttt: weights that stay packed cannot be trained; wanted one of the two")

    build = artifact.packed_model if arguments.packed else artifact.model
    model = build(ops, ranks.device, ranks.dtype)
    tokens = load_validation(data_path, config.vocab_size)
    text = validation_text(tokens, tokenizer.byte_table(), ranks.device)
    batch = config.val_batch_size
    scores = {
        name: score(model, text, artifact.depth, ranks, context=context, stride=each, batch_tokens=batch)
        for name, each in strides.items()
    }
    for name, form in forms.items():
        scores[name] = adapt(
            model, text, artifact.depth, ranks, form, context=context, stride=stride, batch_tokens=batch
        )
    if not ranks.main:
        return
    code = count_code(ROOT)
    shown = report(artifact, code, scores, ops.describe())
    for name in forms:
        if not any(line[0] == "train" for line in scores[name].ledger.lines):
            shown += f"\n{name}: the text is too short for this form: nothing was trained"
    if not arguments.json:
        print(shown)
        return
    try:
        record = {
            "seed": config.seed,
            "artifact_sha256": artifact.sha256,
            "artifact_bytes": artifact.nbytes,
            "code_bytes": code,
            "limit": ARTIFACT_LIMIT,
            "tokenizer_sha256": tokenizer.sha256,
            "data_path": str(data_path.absolute()),  # for audit, where the record is on this machine
            "leaking": config.leaking,
            "document_mask": config.document_mask,
            "depth": artifact.depth,
            "kernels": ops.names,
            "world_size": ranks.world_size,
            "environment": environment(ranks),
            "scores": record_scores(
                arguments.json, scores, text, dict.fromkeys(scores, artifact.sha256), config.leaking
            ),
        }
        write_atomic(arguments.json, json.dumps(seal(record), indent=2).encode() + b"\n")
    except OSError as error:
        print(shown)  # hours of work, perhaps
        raise RecordError(f"--json {arguments.json} was NOT written: {error}") from None
    print(f"{shown}\nrecord    {arguments.json}")


def _writable(path: Path, option: str = "--json") -> None:
    """Raises ConfigError where no file could be written at a path, before hours are spent on what it is to hold."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {path}: its folder does not exist")
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder, wanted a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path}: its folder cannot be written to: {error}") from None


def audit_scores(arguments: Namespace, ranks: Ranks) -> int:
    path = arguments.record / "summary.json" if arguments.record.is_dir() else arguments.record
    record = read_record(path)
    beside = path.with_name("model.pga")
    file = arguments.artifact or (beside if beside.is_file() else None)
    data = arguments.data_path or _own_shards(path, record)
    known: dict[str, Any] = {}
    if file:
        artifact = load(file)
        model = artifact.model(select("reference", ranks.device), ranks.device, ranks.dtype)
        base = base_name(model.parameters())
        known = {"artifact": artifact.sha256, "base": base, "leaking": artifact.config.leaking}
    elif arguments.data_path:
        raise ConfigError("--data-path: bytes are those of the artifact's tokenizer; wanted --artifact too")
    if file and data:
        tokenizer = open_tokenizer(arguments.tokenizer_path, artifact)
        tokens = load_validation(data, artifact.config.vocab_size)
        text = validation_text(tokens, tokenizer.byte_table(), ranks.device)
        known |= {"tokens": tokens, "lengths": text.lengths.cpu().numpy()}
    findings = audit_record(path, **known)
    for name, found in findings.items():
        of = f"{found.versions} versions of the weights, {found.trained:,d} tokens trained some; {found.lines} lines"
        print(f"{name}: {found.verdict}. {of}")
    print(f"artifact  {f'{file}: the one that was scored' if file else 'not at hand: --artifact'}")
    own = "" if arguments.data_path else ", which the record itself names"
    print(f"shards    {f'{data}: the ones that were scored{own}' if file and data else 'not compared: --data-path'}")
    claim = next(iter(record["scores"].values()))
    whole = "" if canonical(claim["tokens"], claim["bytes"]) else "NOT "
    print(f"text      {claim['tokens']:,} tokens, {claim['bytes']:,} bytes: {whole}FineWeb's validation, whole")
    print(f"          sha256 of the tokens {ledger_of(path, claim)[0]['shards']}")
    if any(found.leaking for found in findings.values()):
        raise LedgerError(f"{path}: {' '.join(LEAKING)}")
    return 0 if file and data else 1


def _own_shards(path: Path, record: dict[str, Any]) -> Path | None:
    """The shards that a record, or the configuration beside it, names; None where they are not on this machine."""
    if path.name == "summary.json":
        folder = read_config(path.parent).data_path
    elif isinstance(named := record.get("data_path"), str) and named.isprintable():
        folder = Path(named)
    else:
        return None
    return folder if any(folder.glob("fineweb_val_*.bin")) else None


def report(artifact: Artifact, code: int, scores: dict[str, Score], kernels: str) -> str:
    """The table that `score` prints."""
    total = artifact.nbytes + code
    columns = f"{'BPB':>9s}{'nats/token':>12s}{'tokens':>13s}{'bytes':>14s}{'context':>9s}{'stride':>8s}{'s':>9s}"
    width = max(10, *(len(name) + 2 for name in scores))
    lines = [f"{'':{width}s}{columns}"]
    lines += [
        f"{name:{width}s}{s.bpb:9.5f}{s.nats_per_token:12.5f}{s.tokens:13,d}{s.bytes:14,d}{s.context:9d}{s.stride:8d}"
        f"{s.seconds:9.2f}"
        for name, s in scores.items()
    ]
    if artifact.config.leaking:
        lines.append(" ".join(LEAKING))
    verdict = "fits" if total <= ARTIFACT_LIMIT else "TOO LARGE"
    lines += [
        f"bytes     {artifact.nbytes:,d} artifact + {code:,d} code = {total:,d} of {ARTIFACT_LIMIT:,d}: {verdict}",
        f"sha256    {artifact.sha256}",
        f"depth     {' '.join(map(str, artifact.depth))}",
        "kernels",
        kernels,
    ]
    return "\n".join(lines)


def sample_artifact(arguments: Namespace, ranks: Ranks) -> None:
    artifact = load(arguments.artifact)
    tokenizer = open_tokenizer(arguments.tokenizer_path, artifact)
    ops = select(arguments.kernels, ranks.device)
    # The reference would dequantise every matrix for every token.
    build = artifact.packed_model if ops.names["int6_linear"] == "triton" else artifact.model
    model = build(ops, ranks.device, ranks.dtype)
    prompt = tokenizer.encode(arguments.prompt)
    tokens = generate(
        model,
        artifact.depth,
        prompt,
        arguments.tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        stop=(tokenizer.processor.bos_id(), tokenizer.processor.eos_id()),
    )
    print(arguments.prompt, end="", flush=True)
    for piece in stream_text(tokenizer, prompt, tokens):
        print(piece, end="", flush=True)
    print()


def pack_run(arguments: Namespace, ranks: Ranks) -> None:
    _writable(out := arguments.out or arguments.path / "repacked.pga", "--out")
    config = read_config(arguments.path)
    run = Run(arguments.path, config, ranks)
    state = run.load_finished()
    changes = {
        "matrix_clip_sigmas": arguments.clip_sigmas,
        "gptq_calibration_batches": arguments.calibration_batches,
        "data_path": arguments.data_path,
        "tokenizer_path": arguments.tokenizer_path,
    }
    config = config.model_copy(update={name: value for name, value in changes.items() if value is not None})
    tokenizer = Tokenizer(config.tokenizer_path)
    tokenizer.require(config.vocab_size)
    model = GPT(config, select(arguments.kernels, ranks.device), ranks.dtype)
    model.load_state_dict(state["optimizer"]["ema"])
    depth = config.depth_at(max(state["step"] - 1, 0))
    pre_quant(model.to(ranks.device), depth, ranks, config)
    packed = pack(
        model,
        depth,
        tokenizer.sha256,
        calibration_batches(config, config.gptq_calibration_batches, ranks.rank, ranks.world_size, ranks.device),
        out,
        ranks,
        count_code(ROOT),
        clips=dict.fromkeys(BANKS, arguments.sdclip[0]) | {"tok_emb": arguments.sdclip[1]}
        if arguments.sdclip
        else None,
    )
    if ranks.main:
        print(f"{packed.table()}\n{packed.path}  sha256 {packed.sha256}")


def write_submission(arguments: Namespace, ranks: Ranks) -> None:
    from gpt.folder import write
    from gpt.submission import gather

    facts = gather(
        arguments.runs,
        author=arguments.author,
        github_id=arguments.github_id,
        name=arguments.name,
        blurb=arguments.blurb,
        declared=arguments.declare,
        scores=arguments.scores,
        form=arguments.form,
    )
    write(arguments.out, arguments.runs, facts, arguments.artifacts)
    print(f"{arguments.out}: val_bpb {facts.val_bpb:.5f}, {facts.total_bytes:,} bytes with code")
    print("\n".join(facts.stamps), end="\n" * bool(facts.stamps))


def check_submission(arguments: Namespace, ranks: Ranks) -> int:
    from gpt.review import review

    if not arguments.folder.is_dir():
        what = "is a file" if arguments.folder.exists() else "does not exist"
        raise ConfigError(f"check {arguments.folder}: {what}, wanted a submission's folder")
    found = review(arguments.folder)
    print(found.table())
    return int(found.failed)


def run_preflight(arguments: Namespace, ranks: Ranks) -> int:
    artifact = load(arguments.artifact) if arguments.artifact else None
    if artifact and arguments.preset:
        raise ConfigError(f"preflight {arguments.artifact} --preset {arguments.preset}: wanted one of the two")
    config = artifact.config if artifact else build_config(preset=arguments.preset or "seed")
    return 0 if preflight(config, artifact, ranks) else 1


def report_run(arguments: Namespace, ranks: Ranks) -> None:
    print(write_page(arguments.path, arguments.against))


def parse(arguments: list[str]) -> Namespace:
    def number(kind: type[float], low: float, high: float = float("inf")):  # type: ignore[no-untyped-def]
        def read(text: str) -> float:
            value = kind(text)
            if not low <= value <= high:
                raise ValueError
            return value

        read.__name__ = f"{kind.__name__} of {low:g} to {high:g}"  # argparse puts it into its message
        return read

    alone = find_spec("gpt.submission") is None  # in train_gpt.py, which does not hand in
    about = __doc__.split("\n")[0]
    parser = ArgumentParser("quantize.py", description=about.partition(", hands")[0] + "." if alone else about)
    commands = parser.add_subparsers(required=True)
    machine = ArgumentParser(add_help=False)
    machine.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    common = ArgumentParser(add_help=False, parents=[machine])
    common.add_argument("artifact", type=Path)
    common.add_argument("--tokenizer-path", type=Path, help="default: the sample's, if it is the artifact's")

    command = commands.add_parser("score", parents=[common], help="bits per byte on the validation shards")
    command.set_defaults(run=score_artifact)
    command.add_argument("--data-path", type=Path, help="folder of fineweb_val_*.bin")
    command.add_argument(
        "--context", type=number(int, 1, MAX_TOKENS), help="tokens of a window; default: the configuration's"
    )
    command.add_argument("--stride", type=number(int, 1), help="of sliding windows; default: the configuration's")
    only = command.add_mutually_exclusive_group()
    only.add_argument("--plain", dest="only", action="store_const", const="plain", help="only rows side by side")
    only.add_argument("--sliding", dest="only", action="store_const", const="sliding", help="only sliding windows")
    command.add_argument(
        "--ttt",
        action="append",
        default=[],
        metavar="FORM[,SETTING=VALUE...]",
        help="also with test-time training: chunk, document or phased, for example chunk,lr=0.01; may be repeated",
    )
    command.add_argument("--documents", action="store_true", help="mask documents, whatever the artifact says")
    command.add_argument("--packed", action="store_true", help="weights stay packed in memory; the same scores")
    command.add_argument("--kernels", default="auto", help="reference, compiled, ..., with overrides by op")
    command.add_argument("--json", type=Path, help="also write the figures to this file, and their ledgers beside it")

    command = commands.add_parser("audit", help="prove from its ledgers that a score is fair")
    command.set_defaults(run=audit_scores, device="cpu")
    command.add_argument("record", type=Path, help="what score --json wrote, or a run's folder")
    command.add_argument("--artifact", type=Path, help="that was scored; default: model.pga beside the record")
    command.add_argument(
        "--data-path", type=Path, help="folder of fineweb_val_*.bin; default: the record's, if it is here"
    )
    command.add_argument("--tokenizer-path", type=Path, help="default: the sample's, if it is the artifact's")

    command = commands.add_parser("preflight", help="a reviewer's checks, on a CPU, in a minute")
    command.set_defaults(run=run_preflight, device="cpu")
    command.add_argument("artifact", type=Path, nargs="?", help="default: a new model of the preset")
    command.add_argument("--preset", choices=tuple(PRESETS), help="default: seed")

    command = commands.add_parser(
        "sample",
        parents=[common],
        help="text that goes on from a prompt",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=sample_artifact)
    command.add_argument("--prompt", default="", help="text to go on from")
    command.add_argument("--tokens", type=number(int, 0), default=200, help="at most so many")
    command.add_argument("--temperature", type=number(float, 0), default=0.8, help="0 takes the likeliest token")
    command.add_argument("--top-p", type=number(float, 0, 1), default=0.95, help="share of probability drawn from")
    command.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    command.add_argument("--kernels", default="auto", help="reference, compiled, ..., with overrides by op")

    command = commands.add_parser("report", help="one page that shows a run: report.html")
    command.set_defaults(run=report_run, device="cpu")
    command.add_argument("path", type=Path, metavar="RUN", help="folder of a finished run")
    command.add_argument("--against", type=Path, metavar="RUN", help="show settings that differ from this run's")

    command = commands.add_parser("pack", parents=[machine], help="quantise a finished run's EMA weights again")
    command.set_defaults(run=pack_run)
    command.add_argument("path", type=Path, metavar="RUN", help="folder of the run")
    clip = command.add_mutually_exclusive_group()
    clip.add_argument("--clip-sigmas", type=number(float, 0.1), help="start of the search; default: the run's")
    clip.add_argument(
        "--sdclip",
        type=number(float, 0.1),
        nargs=2,
        metavar=("MATRICES", "EMBEDDING"),
        help="one clip for all rows, as the seed had it: 12.85 20",
    )
    command.add_argument("--calibration-batches", type=number(int, 1), help="default: the run's")
    command.add_argument("--out", type=Path, help="file to write; default: RUN/repacked.pga")
    command.add_argument("--data-path", type=Path, help="folder of the run's shards, where it was moved")
    command.add_argument("--tokenizer-path", type=Path, help="the run's tokenizer, where it was moved")
    command.add_argument("--kernels", default="auto", help="reference, compiled, ..., with overrides by op")
    if alone:
        return parser.parse_args(arguments)  # train_gpt.py does not carry what follows

    command = commands.add_parser("submission", help="a folder to hand in, from finished runs of three seeds or more")
    command.set_defaults(run=write_submission, device="cpu")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write; must not exist")
    command.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="hand in test-time training: what score --ttt --json wrote, one file for each run",
    )
    command.add_argument("--form", default="", help="of --scores that hold several: the one to hand in")
    command.add_argument("--author", required=True)
    command.add_argument("--github-id", required=True)
    command.add_argument("--name", default="", help="of the entry; default: made from the configuration")
    command.add_argument("--blurb", default="", help="a sentence or two; no scores: those come from the records")
    command.add_argument("--artifacts", action="store_true", help="put the artifacts into the folder, too")
    command.add_argument(
        "--declare",
        action="append",
        default=[],
        metavar="WHAT",
        help="hand in, stamped, what is refused for: few-seeds, leaking, non-canonical, other-code or over-time",
    )

    command = commands.add_parser("check", help="a submission's folder from its files alone; exit code 1 if it fails")
    command.set_defaults(run=check_submission, device="cpu")
    command.add_argument("folder", type=Path)
    return parser.parse_args(arguments)


def main(command_line: list[str]) -> int:
    arguments = parse(command_line)
    try:
        with distributed(arguments.device) as ranks:
            code: int = arguments.run(arguments, ranks) or 0
    except ERRORS as error:
        print(f"quantize.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    run_program(main)
