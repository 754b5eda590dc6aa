"""Makes data/sample from a file of public-domain and CC0 text: shards, tokenizer, and the figures of its README.

    python data/make_sample.py SOURCE.jsonl.xz      makes the sample anew (SOURCE: {"text", "source"} a line)
    python data/make_sample.py                      prints the figures of the sample that is there

The same SOURCE gives the same files, byte for byte. Run it from the repository's root with the package on the path
(PYTHONPATH=.).
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt.data import DataError, Tokenizer, check_shards, load_validation, open_shard, train_shards, val_shards
from gpt.prepare import text_key, tokenize, train_on, validation_keys

SAMPLE = Path(__file__).resolve().parent / "sample"
VOCAB_SIZE = 1024
VAL_DOCS = 44

# plainlanguage.gov is CC0 as a site, but reprints articles that are not: Orwell's essay, papers from journals.
LEFT_OUT_SOURCES = {"GSA/plainlanguage.gov"}
# The other sites are CC0 too; what they took over from elsewhere is left out, whoever wrote it.
TAKEN_OVER = re.compile(
    r"originally\s+(published|posted|appeared)|cross-?posted|re-?printed|guest\s+post|used\s+by\s+permission"
    r"|with\s+permission\s+of",
    re.IGNORECASE,
)
# Excerpts of books first published after 1930 or by an author who died after 1955, by the start of each text's sha256.
LEFT_OUT_BOOKS = {
    "Agatha Christie, died 1976": "29d3e1643a54 74a6fedc58fa 7cd593ea7ef5",
    "Apsley Cherry-Garrard, died 1959": "327605629d0e 5f78936a1df7 644de707bef8 bfbf5f96d6fa "
    "cf97f80642f1 d2dea291d860 edbe7eb0c304",
    "First Lensman, 1950": "6da0047491f4 a6bc892a7c35 dfbe11d372fb",
    "Gertrude Chandler Warner, died 1979": "7a1334977826",
    "H. Addington Bruce, died 1959": "cdfc8209ecb4",
    "Invaders from the Infinite, 1932, 1961": "2359dbe3c2ff b71c415e0ccd",
    "James Branch Cabell, died 1958": "8cf3d538a96d d23748a8f8a5 dee3871e2f46",
    "Margaret Sanger, died 1966": "36ccb5e422b8",
    "Mathilda, 1959": "60c58800be9d",
    "P.G. Wodehouse, died 1975": "9e842814396f 9f68564e21bb f8769bf52246",
    "Philip Wylie, died 1971": "4d9dffb9906d 62a09c977fd8 df415c819730",
    "Roy Chapman Andrews, died 1960": "4a832a81e353",
    "The Planet Mappers, 1955": "4cede6ad1c47",
    "The Shunned House, 1937": "2b2ba94536dc",
    "This Crowded Earth, 1958": "9fd0082cc0bb ded2ffdb0cb6",
    "Triplanetary, 1934, 1948": "992286a2c51f d36bc8bbcf4a",
}
LEFT_OUT_TEXTS = frozenset(" ".join(LEFT_OUT_BOOKS.values()).split())


def kept(source: Path) -> Iterator[tuple[str, str]]:
    """(text, source) of the documents whose licence is plain."""
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text, origin = row["text"], row["source"]
            book = hashlib.sha256(text.encode()).hexdigest()[:12] in LEFT_OUT_TEXTS
            if not (origin in LEFT_OUT_SOURCES or book or TAKEN_OVER.search(text)):
                yield text, origin


def make(source: Path) -> None:
    documents = list(kept(source))
    texts = [text for text, _ in documents]
    is_validation = validation_keys(texts, documents=VAL_DOCS)
    for old in (*SAMPLE.glob("fineweb_*.bin"), SAMPLE / "tokenizer.model"):
        old.unlink(missing_ok=True)
    train_on(texts, is_validation, VOCAB_SIZE, SAMPLE / "tokenizer.model")
    tokenize(lambda: texts, Tokenizer(SAMPLE / "tokenizer.model"), SAMPLE, is_validation)
    for origin in sorted({origin for _, origin in documents}):
        sides = [is_validation(text_key(text)) for text, o in documents if o == origin]
        size = sum(len(text.encode()) for text, o in documents if o == origin)
        print(f"{origin}: {len(sides) - sum(sides)} + {sum(sides)} documents, {size} bytes")


def unigram_bits_per_byte(train: np.ndarray, val: np.ndarray, vocab_size: int, size: int) -> float:
    """Cross-entropy of the validation tokens under the training frequencies (add-one), in bits per byte of text.

    BOS is a token like any other. The first token is not scored, as in BPB.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits[val[1:]].sum()) / size


def figures() -> None:
    tokenizer = Tokenizer(SAMPLE / "tokenizer.model")
    sizes: Counter[str] = Counter()
    for split, paths in (("train", train_shards(SAMPLE)), ("val", val_shards(SAMPLE))):
        for report in check_shards(paths, tokenizer):
            print(f"{split}: {report.documents} documents, {report.tokens} tokens, {report.bytes} bytes of text")
            sizes[split] += report.bytes
    train = np.concatenate([open_shard(path) for path in train_shards(SAMPLE)])
    val = load_validation(SAMPLE, tokenizer.vocab_size)
    bits = unigram_bits_per_byte(train, val, tokenizer.vocab_size, sizes["val"])
    print(f"unigram: {bits:.4f} bits per byte ({bits * sizes['val'] / (val.size - 1) * math.log(2):.4f} nats a token)")
    for path in sorted(p for p in SAMPLE.iterdir() if p.suffix in (".bin", ".model")):
        print(f"{path.name}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    try:
        if len(sys.argv) > 1:
            make(Path(sys.argv[1]))
        figures()
    except DataError as error:
        sys.exit(f"error: {error}")
