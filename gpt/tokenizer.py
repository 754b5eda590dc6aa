"""The SentencePiece tokenizer and the bytes that each token stands for, which is what BPB divides by."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor

from gpt.config import BOS

SPACE = "\u2581"  # SentencePiece's mark for a space before a piece


class DataError(ValueError):
    """Shards, tokenizer or text are missing, damaged or do not fit together; the message names the file, what was
    found and what was wanted."""


class ByteTable(NamedTuple):
    """Per token id of a vocabulary of V; see `token_bytes`."""

    base_bytes: Tensor  # (V,) int16: UTF-8 bytes of the piece without its space mark
    has_leading_space: Tensor  # (V,) bool: the piece starts with the space mark
    is_boundary: Tensor  # (V,) bool: control, unknown or unused: a space after it is not counted

    def to(self, device: torch.device | str) -> ByteTable:
        return ByteTable(*(column.to(device) for column in self))


def token_bytes(
    previous: Tensor,  # (...) int32 or int64: the token before each target
    targets: Tensor,  # (...) int32 or int64
    table: ByteTable,
) -> Tensor:  # (...) int16
    """Bytes of text that each target stands for, by the field's rule.

    0 for control, unknown and unused tokens; 1 for a byte piece; otherwise the UTF-8 length of the piece without its
    space mark, plus 1 for the space unless the previous token is a boundary (no text starts with a space).
    """
    space = table.has_leading_space[targets] & ~table.is_boundary[previous]
    return table.base_bytes[targets] + space


class Tokenizer:
    """A SentencePiece model with the field's special ids (pad 0, bos 1, eos 2, unk 3).

    Raises DataError where the file is missing or no such model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(
                f"{self.path}: no tokenizer there; wanted the SentencePiece model that the shards were encoded with "
                "(`python -m gpt.data download` gets the field's)"
            )
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(f"{self.path}: not a SentencePiece model ({len(model)} bytes)") from None
        self.vocab_size: int = self.processor.vocab_size()
        if self.processor.bos_id() != BOS:
            raise DataError(f"{self.path}: the id of BOS is {self.processor.bos_id()}, wanted {BOS}")
        if self.processor.is_unknown(self.processor.piece_to_id(SPACE)):
            # Each space would be encoded, and counted, as three byte pieces.
            raise DataError(f"{self.path}: no piece for the space mark U+2581")

    def require(self, vocab_size: int) -> None:
        """Raises DataError unless the model has so many pieces."""
        if self.vocab_size != vocab_size:
            raise DataError(f"{self.path}: {self.vocab_size} pieces, wanted vocab_size={vocab_size}")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS."""
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_many(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without BOS."""
        ids: list[list[int]] = self.processor.encode(texts, num_threads=threads)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.processor.decode(ids)
        return text

    def byte_table(self) -> ByteTable:
        """What `token_bytes` needs, on the CPU."""
        sp = self.processor
        base = torch.zeros(self.vocab_size, dtype=torch.int16)
        space = torch.zeros(self.vocab_size, dtype=torch.bool)
        boundary = torch.zeros(self.vocab_size, dtype=torch.bool)
        for token in range(self.vocab_size):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                boundary[token] = True
            elif sp.is_byte(token):
                base[token] = 1
            else:
                piece: str = sp.id_to_piece(token)
                space[token] = piece.startswith(SPACE)
                base[token] = len(piece.removeprefix(SPACE).encode())
        return ByteTable(base, space, boundary)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model with the field's settings, as the bytes of a .model file.

    Raises DataError where the text is too little for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 30,  # bytes; the default silently leaves out documents over 4192
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"training a tokenizer of {vocab_size} pieces: {error}") from None
    return model.getvalue()
