"""Gets shards from the field's repositories, makes them from text, checks them: ``python -m gpt.data``."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config import BOS, build_config
from gpt.data import DataError, Tokenizer, check_shards, open_shard, train_shards, val_shards, write_shard
from gpt.record import write_atomic
from gpt.tokenizer import train_tokenizer

# Checksums: the format of shards has none.

CHECKSUMS = "shards.sha256"  # beside the shards, as sha256sum writes it and reads it with -c


def read_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the shards by name; none where there is no such file. Raises DataError where it is damaged."""
    path, found = folder / CHECKSUMS, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        matched = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if not matched:
            raise DataError(f"{path}, line {number}: {line[:80]!r}, wanted a SHA-256, two spaces and a shard's name")
        found[matched[2]] = matched[1]
    return found


def write_checksums(folder: Path, fresh: Iterable[str] = ()) -> None:
    """Notes the SHA-256 of all shards of a folder that it has not noted yet, or that are fresh."""
    known = {name: digest for name, digest in read_checksums(folder).items() if name not in set(fresh)}
    names = sorted(path.name for path in folder.glob("fineweb_*.bin"))
    lines = [f"{known.get(name) or file_sha256(folder / name)}  {name}\n" for name in names]
    write_atomic(folder / CHECKSUMS, "".join(lines).encode())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Download.

# Validation tokens that the field scores, whole rows of 2048: the first 50,000 documents. sp4096 has two exports.
CANONICAL_ROW = 2048
CANONICAL = {"sp1024": (62_021_632,), "sp4096": (45_508_608, 45_514_752), "sp8192": (40_540_160,)}
REPOSITORIES = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
OTHER_REPOSITORY = "willdepueoai/parameter-golf"

Fetch = Callable[[str, Path], Path]  # (path in the repository, staging folder) -> the whole file, in that folder


def hub_fetch(repository: str) -> Fetch:
    """Fetches from a Hugging Face dataset repository over HTTP; an interrupted file goes on where it stopped, also in a
    later process. HF_ENDPOINT and HF_TOKEN are the library huggingface_hub's names; that library itself starts each
    interrupted file anew.

    The function raises DataError where the repository has no such file, or four attempts in a row bring nothing.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

    def fetch(name: str, staging: Path) -> Path:
        target = staging / name
        partial = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        url = f"{endpoint}/datasets/{repository}/resolve/main/{urllib.parse.quote(name)}"
        failures = 0
        while True:
            held = _size(partial)
            try:
                _receive(url, partial)
            except (OSError, http.client.HTTPException) as error:
                code = getattr(error, "code", 0)
                if code == 416:  # what is there is no beginning of the file
                    partial.unlink(missing_ok=True)
                failures = 0 if _size(partial) > held else failures + 1
                if code in (401, 403, 404) or failures == 4:
                    raise DataError(f"{url}: {error}; the same command goes on from there") from error
                time.sleep(failures**2)
            else:
                partial.replace(target)
                return target

    return fetch


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, partial: Path) -> None:
    """Appends to a file what is missing of it. Raises OSError or HTTPException where it is not whole then."""
    start = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for the store that it redirects to
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # the whole file, whatever was asked
            start = 0
        total = start + int(response.headers["Content-Length"])
        with partial.open("ab" if start else "wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
    if _size(partial) != total:
        raise ConnectionError(f"broken off at {_size(partial)} of {total} bytes")


class Download:
    """Brings files of one repository under their final names, each only once it is whole and checked."""

    def __init__(self, fetch: Fetch, root: Path, prefix: str) -> None:
        self.fetch = fetch
        self.root = root
        self.prefix = prefix.strip("/")
        self.staging = root / ".download"
        self.fresh: list[str] = []  # names of files that came

    def stage(self, name: str) -> Path:
        """A file of the export, in the staging folder."""
        self.staging.mkdir(parents=True, exist_ok=True)
        return self.fetch(f"{self.prefix}/{name}".lstrip("/"), self.staging)

    def get(self, name: str, check: Callable[[Path], object] = lambda path: None) -> Path:
        """A file of the export at its place under root; one that is there and passes its check is left alone.

        Raises DataError where the file that came does not pass.
        """
        target = self.root / name
        if target.is_file():
            try:
                check(target)
                return target
            except DataError as error:
                print(f"{error}; fetching it again", file=sys.stderr)
        staged = self.stage(name)
        try:
            check(staged)
        except DataError:
            staged.unlink()
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(target)
        self.fresh.append(target.name)
        print(target, flush=True)
        return target

    def manifest(self, dataset: str) -> tuple[int, int, list[str]]:
        """Numbers of training and validation shards and the tokenizer's files, by the export's own manifest."""
        manifest = json.loads(self.stage("manifest.json").read_text(encoding="utf-8"))
        entry = _entry(manifest, "datasets", dataset)
        tokenizer = _entry(manifest, "tokenizers", entry.get("tokenizer_name"))
        files = [str(tokenizer[key]) for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
        stats = entry["stats"]
        return int(stats["files_train"]), int(stats["files_val"]), files


def _entry(manifest: dict[str, Any], kind: str, name: object) -> dict[str, Any]:
    entries: list[dict[str, Any]] = manifest.get(kind, [])
    for entry in entries:
        if entry.get("name") == name:
            return entry
    raise DataError(f"manifest.json: no {name} among its {kind}: {', '.join(str(e.get('name')) for e in entries)}")


def check_canonical(variant: str, tokens: int) -> str:
    """Compares a variant's validation tokens with the field's figure and says how it stands.

    Raises DataError where they differ: the scores would be of another text.
    """
    scored = (tokens - 1) // CANONICAL_ROW * CANONICAL_ROW
    wanted = CANONICAL.get(variant)
    if wanted is None:
        return f"validation: {tokens} tokens; the field has no figure for {variant} to compare with"
    if scored not in wanted:
        figures = " or ".join(str(figure) for figure in wanted)
        raise DataError(
            f"validation of {variant}: {tokens} tokens, {scored} scored in rows of {CANONICAL_ROW}; wanted "
            f"{figures} scored. The files are kept, but scores on them do not compare with the field's"
        )
    return f"validation: {tokens} tokens, {scored} scored in rows of {CANONICAL_ROW}: the field's figure"


def download(
    variant: str,
    count: int,
    root: Path,
    fetch: Fetch,
    prefix: str = "datasets",
    skip_manifest: bool = False,
    with_docs: bool = False,
) -> None:
    """Validation, the first ``count`` training shards and the tokenizer of a variant, under the field's names in root.

    Raises DataError where a file is missing, damaged or not the field's validation; what is whole stays, and the same
    call goes on from there.
    """
    dataset = f"fineweb10B_{variant}"
    source = Download(fetch, root, prefix)
    if skip_manifest:
        available, validation = count, 1
        tokenizer = [f"tokenizers/fineweb_{variant.removeprefix('sp')}_bpe.model"]
    else:
        available, validation, tokenizer = source.manifest(dataset)
    if count > available:
        raise DataError(f"{variant}: {available} training shards in the repository, wanted {count}")
    for name in ["docs_selected.jsonl", "docs_selected.source_manifest.json"] if with_docs else []:
        source.get(name)
    for name in tokenizer:
        source.get(name, Tokenizer if name.endswith(".model") else lambda path: None)
    held = [source.get(f"datasets/{dataset}/fineweb_val_{n:06d}.bin", open_shard) for n in range(validation)]
    for number in range(count):
        source.get(f"datasets/{dataset}/fineweb_train_{number:06d}.bin", open_shard)
    write_checksums(root / "datasets" / dataset, source.fresh)
    shutil.rmtree(source.staging, ignore_errors=True)
    print(check_canonical(variant, sum(open_shard(path).size for path in held)))


# Text to shards.


def read_documents(paths: Sequence[Path]) -> Iterator[str]:
    """Documents of text files in order: each line's "text" of .jsonl, one document a file otherwise; .gz and .xz too.

    Raises DataError, naming file and line, where a line is not such an object; empty documents are left out.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such text file")
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            if ".jsonl" not in path.suffixes:
                lines: Iterable[str] = [json.dumps({"text": file.read()})]
            else:
                lines = file
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise DataError(f'{path}, line {number}: wanted a JSON object with a string "text"')
                if text.strip():
                    yield text


def text_key(text: str) -> int:
    """64 bits of the text's hash; texts that differ in white space only, which the tokenizer drops, have one key."""
    return int.from_bytes(hashlib.sha256(" ".join(text.split()).encode()).digest()[:8], "big")


def validation_keys(
    texts: Iterable[str], documents: int = 0, fraction: float = 0.0, first: int = 0
) -> Callable[[int], bool]:
    """Which keys are validation: those of so many distinct texts or of such a part of all, the smallest keys, or those
    of the first texts. A text has one key, so no text is on both sides.

    Raises DataError where that leaves no training documents.
    """
    if first:
        leading = {text_key(text) for text in islice(texts, first)}
        return leading.__contains__
    limit = round(fraction * 2**64)
    if documents:
        keys = sorted({text_key(text) for text in texts})
        if len(keys) <= documents:
            raise DataError(f"{len(keys)} distinct documents, wanted more than {documents} for validation alone")
        limit = keys[documents]
    return lambda key: key < limit


class ShardWriter:
    """Collects documents and writes full shards of one split."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.names: list[str] = []
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.fill = self.documents = self.tokens = 0

    def add(self, ids: list[int]) -> None:
        document = np.array([BOS, *ids], dtype=np.uint16)
        self.documents += 1
        self.tokens += document.size
        while document.size:
            part = document[: self.shard_tokens - self.fill]
            self.buffer[self.fill : self.fill + part.size] = part
            self.fill += part.size
            document = document[part.size :]
            if self.fill == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        if self.fill:
            self.names.append(f"fineweb_{self.split}_{len(self.names):06d}.bin")
            write_shard(self.folder / self.names[-1], self.buffer[: self.fill])
            self.fill = 0


def tokenize(
    texts: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    out: Path,
    is_validation: Callable[[int], bool],
    shard_tokens: int = 100_000_000,
    threads: int = 1,
) -> dict[str, tuple[int, int]]:
    """Writes shards under the field's names, BOS before each document, and returns (documents, tokens) by split.

    ``texts()`` starts the documents anew. Shards get their names once all are written. Raises DataError where out
    already holds shards: a mixture of old and new would go unnoticed.
    """
    if any(out.glob("fineweb_*.bin")):
        raise DataError(f"{out}: holds shards already; remove them or choose another folder")
    if tokenizer.vocab_size > 1 << 16:
        raise DataError(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, a shard holds ids below {1 << 16}")
    partial = out / ".tokenize"
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted call
    partial.mkdir(parents=True)
    writers = {split: ShardWriter(partial, split, shard_tokens) for split in ("train", "val")}
    documents = iter(texts())
    while batch := list(islice(documents, 1024)):
        for text, ids in zip(batch, tokenizer.encode_many(batch, threads), strict=True):
            writers["val" if is_validation(text_key(text)) else "train"].add(ids)
    for writer in writers.values():
        writer.flush()
        for name in writer.names:
            (partial / name).replace(out / name)
    partial.rmdir()
    write_checksums(out)
    return {split: (writer.documents, writer.tokens) for split, writer in writers.items()}


def train_on(texts: Iterable[str], is_validation: Callable[[int], bool], vocab_size: int, path: Path) -> None:
    """Trains a tokenizer on the documents that are not validation and writes it."""
    model = train_tokenizer((text for text in texts if not is_validation(text_key(text))), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(model)
    partial.replace(path)
    Tokenizer(path).require(vocab_size)


# Commands.


def _download(args: argparse.Namespace) -> None:
    default = REPOSITORIES.get(args.variant, OTHER_REPOSITORY)
    fetch = hub_fetch(os.environ.get("MATCHED_FINEWEB_REPO_ID", default))
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    download(args.variant, args.train_shards, args.out, fetch, prefix, args.skip_manifest, args.with_docs)


def _tokenize(args: argparse.Namespace) -> None:
    def texts() -> Iterator[str]:
        return read_documents(args.text)

    is_validation = validation_keys(texts(), args.val_docs or 0, args.val_fraction or 0.0, args.val_first or 0)
    if args.train_tokenizer:
        if args.tokenizer.exists():
            raise DataError(f"{args.tokenizer}: exists; remove it or name another to train")
        train_on(texts(), is_validation, args.vocab_size, args.tokenizer)
    tokenizer = Tokenizer(args.tokenizer)
    counts = tokenize(texts, tokenizer, args.out, is_validation, args.shard_tokens, args.threads)
    for split, (documents, tokens) in counts.items():
        print(f"{split}: {documents} documents, {tokens} tokens")


def _check(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(args.tokenizer)
    print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256}")
    known, compared, missing = read_checksums(args.data), 0, []
    for split, paths in (("train", train_shards(args.data)), ("val", val_shards(args.data))):
        total = np.zeros(3, dtype=np.int64)
        for path, *figures in check_shards(paths, tokenizer):
            if path.name not in known:
                missing.append(path.name)
            elif (digest := file_sha256(path)) != known[path.name]:
                raise DataError(f"{path}: damaged: sha256 {digest}, wanted {known[path.name]} of {CHECKSUMS}")
            else:
                compared += 1
            print(_figures(str(path), figures), flush=True)
            total += figures
        print(_figures(f"{split}, {len(paths)} shards", total.tolist()))
    print(f"{CHECKSUMS}: {compared} shards are as it says" if compared else f"{CHECKSUMS}: none in {args.data}")
    if missing:
        print(f"not compared with any checksum, so that changed tokens would not be seen: {', '.join(missing)}")


def _figures(name: str, figures: list[int]) -> str:
    tokens, documents, size = figures
    return f"{name}: {tokens} tokens, {documents} documents, {size} bytes of text, {size / tokens:.4f} bytes a token"


def _variant(value: str) -> str:
    if value != "byte260" and not (value.startswith("sp") and value[2:].split("_")[0].isdigit()):
        raise argparse.ArgumentTypeError(f"{value!r}: wanted sp<vocabulary size> or byte260")
    return value


def _number(least: int) -> Callable[[str], int]:
    def number(value: str) -> int:
        if int(value) < least:
            raise argparse.ArgumentTypeError(f"{value}: wanted at least {least}")
        return int(value)

    return number


def _fraction(value: str) -> float:
    if not 0 <= float(value) < 1:
        raise argparse.ArgumentTypeError(f"{value}: wanted 0 to below 1")
    return float(value)


def parser() -> argparse.ArgumentParser:
    config = build_config()
    top = argparse.ArgumentParser(prog="python -m gpt.data", description="Gets, makes and checks shards of tokens.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    get = commands.add_parser(
        "download",
        help="get the field's shards and tokenizer from Hugging Face",
        description="Gets validation, training shards and tokenizer of a FineWeb export into OUT/datasets and "
        "OUT/tokenizers. Goes on where an earlier call stopped. MATCHED_FINEWEB_REPO_ID names another dataset "
        f"repository ({REPOSITORIES['sp8192']} for sp4096 and sp8192, else {OTHER_REPOSITORY}), "
        "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX the export's folder in it (datasets).",
    )
    get.add_argument("--variant", type=_variant, default="sp8192", help="sp<vocabulary size>; default sp8192")
    get.add_argument(
        "--train-shards",
        type=_number(0),
        default=80,
        metavar="N",
        help="the first N training shards of 100 million tokens, 200 MB each; default 80",
    )
    get.add_argument(
        "--skip-manifest",
        action="store_true",
        help="do not read the export's manifest.json: one validation shard, the usual tokenizer name",
    )
    get.add_argument("--with-docs", action="store_true", help="also docs_selected.jsonl, the text, and its manifest")
    get.add_argument("--out", type=Path, default=Path("data"), help="default: data")
    get.set_defaults(run=_download)

    make = commands.add_parser(
        "tokenize",
        help="make shards from text",
        description='Makes shards from text: .jsonl files with a "text" in each line, or other files of one document '
        "each, also .gz or .xz. The validation split has to be chosen: a text is in one split only, whichever way.",
    )
    make.add_argument("text", type=Path, nargs="+", help="text files, in order")
    make.add_argument("--out", type=Path, required=True, help="folder for the shards")
    make.add_argument(
        "--tokenizer", type=Path, default=config.tokenizer_path, help="SentencePiece model; default %(default)s"
    )
    make.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="first train that model, with the field's settings, on the training documents",
    )
    make.add_argument(
        "--vocab-size", type=_number(8), default=config.vocab_size, help="pieces to train; default %(default)s"
    )
    split = make.add_mutually_exclusive_group(required=True)
    split.add_argument("--val-docs", type=_number(0), metavar="N", help="N distinct texts, chosen by their hash")
    split.add_argument(
        "--val-fraction", type=_fraction, metavar="F", help="about this part of the texts, by their hash"
    )
    split.add_argument(
        "--val-first",
        type=_number(1),
        metavar="N",
        help="the first N texts, and repetitions of them; 50000 is the field's split of docs_selected.jsonl",
    )
    make.add_argument("--shard-tokens", type=_number(1), default=100_000_000, metavar="N", help="default %(default)s")
    make.add_argument("--threads", type=_number(1), default=os.cpu_count() or 1, help="default %(default)s")
    make.set_defaults(run=_tokenize)

    check = commands.add_parser(
        "check",
        help="read every token of the shards and count",
        description="Checks header, size, token range and noted checksum of all shards in a folder and counts tokens, "
        "documents and bytes of text. Ends with status 1 on the first fault.",
    )
    check.add_argument("data", type=Path, nargs="?", default=config.data_path, help="default %(default)s")
    check.add_argument("--tokenizer", type=Path, default=config.tokenizer_path, help="default %(default)s")
    check.set_defaults(run=_check)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0, or 1 after a line on what is wrong with the data."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (DataError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
