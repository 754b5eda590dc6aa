"""Lossless coding of a quantised parameter: interleaved rANS under a model that learns how large each column is.

Codes of a trained matrix look like independent Gaussians whose variance differs from column to column and hardly from
row to row, as scales follow rows (bench/pack.py measures this and what else was tried: bench/results/pack-cpu.json). So
the model of a code is one of CLASSES histograms, chosen by the mean square of the column's codes so far. Nothing is
sent for the columns. Rows that equal an earlier one (tokens that never occurred, neurons that died) are named instead
of coded.

    P(code) = frequencies[class, code + levels] / 2^PRECISION,  class = number of thresholds <= mean_square[column]
    mean_square += floor((code^2 * 2^FRACTION - mean_square) / min(WINDOW, PRIOR + rows before)),  START in each matrix

A stream is, little-endian: bytes of the model (uint32); the model, Brotli: START (uint32), thresholds (int32), for each
row 0 or 1 + the earlier row that it equals (uint32), frequencies (uint16), byte planes apart; then the lanes' states
(uint32) and the words (uint16) that the lanes take. Lane j codes columns j, j + LANES, ... of each row; its state lies
in [2^16, 2^32) and takes a word where it falls below (rANS: J. Duda, arXiv 1311.2540; lanes: F. Giesen, arXiv
1402.3392). Decoding is integer arithmetic alone, so that all machines agree; floating point only helps the encoder
choose its model.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import brotli
import numpy as np
from numpy.typing import NDArray

LANES = 512  # each costs two bytes; numpy's time is that of its calls
CLASSES = 32
PER_OCTAVE = 4  # classes, in which the mean square doubles
PRECISION = 14  # bits of a probability
FRACTION = 12  # bits of a mean square after the point
PRIOR = 4  # rows that START counts for
WINDOW = 96  # rows that a mean looks back on, about
LOWEST = 1 << 16  # state in which a lane begins, and below which it may not stay
UINT32 = struct.Struct("<I")


class CodingError(ValueError):
    """Bytes are no stream of codes of the wanted shape."""


def decompress(data: bytes, size: int, exact: bool = True) -> bytes:
    """One whole Brotli stream of at most `size` bytes, or `exact`ly so; no more are held, save one buffer.

    Raises CodingError where it is anything else.
    """
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    total = 0
    try:
        while not decoder.is_finished():
            part = decoder.process(data if not parts else b"", output_buffer_limit=size - total + 1)
            parts.append(part)
            total += len(part)
            if total > size:
                raise CodingError(f"more than the {size} bytes that it may have")
            if not part and not decoder.is_finished():
                raise CodingError("compressed data end early")
    except brotli.error as error:
        raise CodingError(f"not Brotli data ({error})") from None
    if exact and total != size:
        raise CodingError(f"{total} bytes, wanted {size}")
    return b"".join(parts)


def planes(data: bytes, width: int) -> bytes:
    """All first bytes of numbers of this width, then all second ones, ..."""
    return bytes(np.frombuffer(data, np.uint8).reshape(-1, width).T.tobytes())


def interleaved(data: bytes, width: int) -> bytes:
    """The numbers whose byte planes these are."""
    return bytes(np.frombuffer(data, np.uint8).reshape(width, -1).T.tobytes())


class Model(NamedTuple):
    """What the decoder has to know besides shape and levels."""

    start: int
    thresholds: NDArray[np.int32]  # (CLASSES - 1,), rising
    first: NDArray[np.int64]  # (all rows,): the first row that equals this one
    frequencies: NDArray[np.uint16]  # (CLASSES, symbols), 2^PRECISION in each class


class Plan(NamedTuple):
    """A model for the codes of a parameter, and where in it each code is."""

    model: Model
    places: NDArray[np.uint16]  # (rows coded, columns): index in the table of frequencies

    @property
    def bits(self) -> float:
        """Information in the codes under the model: the stream's length without model and states."""
        table = self.model.frequencies.ravel()
        counts = np.bincount(self.places.ravel(), minlength=len(table))
        used = counts > 0
        return float((counts[used] * (PRECISION - np.log2(table[used]))).sum())


def _rows_before(first: NDArray[np.int64], rows: int) -> list[int]:
    """For each coded row, how many were coded before it in its matrix."""
    coded = (first == np.arange(len(first))).reshape(-1, rows)
    before: list[int] = (coded.cumsum(1) - 1)[coded].tolist()
    return before


def _update(mean_square: NDArray[np.int32], codes: NDArray[np.int32], before: int) -> None:
    mean_square += ((codes * codes << FRACTION) - mean_square) // np.int32(min(WINDOW, PRIOR + before))


def _begins(frequencies: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Where each symbol's share of its class begins."""
    wide = frequencies.astype(np.uint32)
    return (wide.cumsum(1, dtype=np.uint32) - wide).ravel()


# Writing.


def plan(
    codes: NDArray[np.int8],  # (..., rows, columns) within -levels..levels
    levels: int,
) -> Plan:
    """The model that suits these codes."""
    rows, columns = codes.shape[-2:]
    flat = codes.reshape(-1, columns)
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(row.tobytes(), number) for number, row in enumerate(flat)], np.int64)
    kept = flat[list(seen.values())]
    start = round(np.square(kept, dtype=np.float64).mean() * 2**FRACTION)
    octaves = (np.arange(CLASSES - 1) - (CLASSES - 1) // 2) / PER_OCTAVE
    thresholds = np.minimum(np.ceil(start * 2**octaves), 2**31 - 1).astype(np.int32)

    symbols = 2 * levels + 1
    places = np.empty(kept.shape, np.uint16)
    for row, place, before in zip(kept.astype(np.int32), places, _rows_before(first, rows), strict=True):
        if before == 0:
            mean_square = np.full(columns, start, np.int32)
        place[:] = thresholds.searchsorted(mean_square, "right") * symbols + (row + levels)
        _update(mean_square, row, before)
    counts = np.bincount(places.ravel(), minlength=CLASSES * symbols).reshape(CLASSES, symbols)
    return Plan(Model(start, thresholds, first, np.stack([_shares(c) for c in counts])), places)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Frequencies that add up to 2^PRECISION: as the counts, and at least 1 where anything was counted."""
    whole = 1 << PRECISION
    if not counts.any():  # a class that is not used
        counts = np.eye(1, len(counts), dtype=np.int64)[0]
    shares = np.where(counts > 0, np.maximum(1, np.rint(counts * (whole / counts.sum()))), 0).astype(np.int64)
    while difference := whole - int(shares.sum()):
        shares[shares.argmax()] += np.sign(difference)  # where it matters least
    return shares.astype(np.uint16)


def encode(plan: Plan) -> bytes:
    """The stream of a plan's codes."""
    model, places = plan
    named = np.where(model.first == np.arange(len(model.first)), 0, model.first + 1)
    header = brotli.compress(
        UINT32.pack(model.start)
        + planes(model.thresholds.astype("<i4").tobytes(), 4)
        + planes(named.astype("<u4").tobytes(), 4)
        + planes(model.frequencies.astype("<u2").tobytes(), 2)
    )
    table, begins = model.frequencies.ravel().astype(np.uint32), _begins(model.frequencies)
    columns = places.shape[1]
    states = np.full(min(LANES, columns), LOWEST, np.uint32)
    words: list[bytes] = []  # from the last to the first: a lane gives back first what it took last
    for row in places[::-1]:
        for column in range(0, columns, LANES)[::-1]:
            place = row[column : column + LANES]
            share, x = table[place], states[: len(place)]
            full = x >> (32 - PRECISION) >= share
            words.append(x[full].astype("<u2").tobytes())  # the lower half
            x[full] >>= 16
            whole, rest = np.divmod(x, share)
            x[:] = (whole << PRECISION) + rest + begins[place]
    return UINT32.pack(len(header)) + header + states.astype("<u4").tobytes() + b"".join(words[::-1])


# Reading.


def _want(condition: bool | np.bool, message: str) -> None:
    if not condition:
        raise CodingError(message)


def _read_model(data: bytes, rows: int, symbols: int) -> Model:
    sizes = (UINT32.size, 4 * (CLASSES - 1), 4 * rows, 2 * CLASSES * symbols)
    content = decompress(data, sum(sizes))
    parts = [content[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    (start,) = UINT32.unpack(parts[0])
    thresholds = np.frombuffer(interleaved(parts[1], 4), "<i4").astype(np.int32)
    named = np.frombuffer(interleaved(parts[2], 4), "<u4").astype(np.int64)
    frequencies = np.frombuffer(interleaved(parts[3], 2), "<u2").astype(np.uint16).reshape(CLASSES, symbols)
    _want(start < 1 << 31, f"a mean square of {start} / 2^{FRACTION}")
    _want((thresholds[1:] >= thresholds[:-1]).all(), "thresholds out of order")
    _want((frequencies.sum(1, dtype=np.int64) == 1 << PRECISION).all(), "frequencies that do not add up")
    numbers = np.arange(rows)
    first = np.where(named == 0, numbers, named - 1)
    # In this order: only rows that exist are looked up.
    _want((first <= numbers).all() and (first[first] == first).all(), "a row that equals no coded row before it")
    return Model(start, thresholds, first, frequencies)


def decode(data: bytes, shape: Sequence[int], levels: int) -> NDArray[np.int8]:
    """Codes of a shape (..., rows, columns). Raises CodingError where the bytes are no stream of such codes.

    Memory is that of the codes, the data and a few megabytes, whatever the data say; time is that of the shape.
    """
    *_, rows, columns = shape
    lanes, symbols = min(LANES, columns), 2 * levels + 1
    _want(len(data) >= UINT32.size, f"{len(data)} bytes, wanted at least {UINT32.size}")
    begin = UINT32.size + UINT32.unpack_from(data)[0]
    _want(len(data) >= begin + 4 * lanes, f"{len(data)} bytes, wanted at least {begin + 4 * lanes}")
    model = _read_model(data[UINT32.size : begin], math.prod(shape[:-1]), symbols)
    states = np.frombuffer(data, "<u4", lanes, begin).astype(np.uint32)
    _want((states >= LOWEST).all(), "a state out of range")
    _want((len(data) - begin) % 2 == 0, "half a word")
    words = np.frombuffer(data, "<u2", offset=begin)[2 * lanes :].astype(np.uint32)

    table, begins = model.frequencies.ravel().astype(np.uint32), _begins(model.frequencies)
    symbol_at = np.repeat(np.tile(np.arange(symbols, dtype=np.uint8), CLASSES), table)  # (CLASSES * 2^PRECISION,)
    codes = np.empty((len(model.first), columns), np.int8)
    row = np.empty(columns, np.int32)
    position = 0
    coded = np.flatnonzero(model.first == np.arange(len(model.first))).tolist()
    for number, before in zip(coded, _rows_before(model.first, rows), strict=True):
        if before == 0:
            mean_square = np.full(columns, model.start, np.int32)
        classes = model.thresholds.searchsorted(mean_square, "right")
        for column in range(0, columns, LANES):
            chosen = classes[column : column + LANES]
            x = states[: len(chosen)]
            slot = x & np.uint32((1 << PRECISION) - 1)
            symbol = symbol_at[(chosen << PRECISION) + slot]
            place = chosen * symbols + symbol
            x[:] = table[place] * (x >> PRECISION) + (slot - begins[place])
            low = np.flatnonzero(x < LOWEST)
            taken = words[position : position + len(low)]
            _want(len(taken) == len(low), "data end early")
            position += len(low)
            x[low] = x[low] << 16 | taken
            row[column : column + LANES] = symbol
        row -= levels
        codes[number] = row
        _update(mean_square, row, before)
    _want(position == len(words) and (states == LOWEST).all(), "data go on after the last code")
    return codes[model.first].reshape(tuple(shape))
