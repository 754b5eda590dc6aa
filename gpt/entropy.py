"""Lossless coding of a quantised parameter: interleaved rANS under a model of how large rows and columns are.

Codes of a trained matrix look like independent Gaussians whose variance is that of their column times that of their row
(bench/pack.py measures this and what else was tried: bench/results/pack-cpu.json). Each row says how large its codes
are; nothing is sent for the columns, whose mean squares, in codes divided by the size of their row, are learned on the
way. Together they choose one of CLASSES histograms. Rows that equal an earlier one (tokens that never occurred, neurons
that died) are named instead of coded.

    size[row] = mean square of the row's codes = 2^((s - UNIT) / PER_OCTAVE), of which s, an integer, is in the model
    P(code) = frequencies[class, code + levels] / 2^PRECISION
    class = PER_OCTAVE log2(size[row] mean_square[column]) + OFFSET, rounded down and kept in 0..CLASSES - 1
    mean_square += floor((code^2 / size[row] - mean_square) / min(WINDOW, PRIOR + rows before)), 1 before each matrix,
        in fixed point, after rows of codes that say something about it: a size of 1/4 at least

A stream is, little-endian: bytes of the model (uint32); the model, Brotli: for each row s (uint8) and 0 or 1 + the
earlier row that it equals (uint32), frequencies (uint16), byte planes apart; then the lanes' states (uint32) and the
words (uint16) that the lanes take. Lane j codes columns j, j + LANES, ... of each row; its state lies in [2^16, 2^32)
and takes a word where it falls below (rANS: J. Duda, arXiv 1311.2540; lanes: F. Giesen, arXiv 1402.3392). Decoding is
integer arithmetic alone, so that all machines agree; floating point only helps the encoder choose its model.
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
CLASSES = 64
PER_OCTAVE = 4  # classes, in which the mean square doubles
OFFSET = 24  # class of codes whose mean square is 1
UNIT = 32  # s of a row whose mean square is 1
SIZES = 96  # values of s
LEARNED = UNIT - 2 * PER_OCTAVE  # least s of a row that columns learn from: of others the codes are nearly all 0
PRECISION = 14  # bits of a probability
FRACTION = 12  # bits of a mean square after the point
PRIOR = 4  # rows that the first mean square counts for
WINDOW = 96  # rows that a mean looks back on, about
LOWEST = 1 << 16  # state in which a lane begins, and below which it may not stay
UINT32 = struct.Struct("<I")


def _power(quarters: int, bits: int) -> int:
    """2^(bits + quarters / PER_OCTAVE), in integers, which are the same on every machine."""
    octaves, part = divmod(quarters, PER_OCTAVE)
    shift = octaves + bits - 14
    value = (16384, 19484, 23170, 27554)[part]
    return value << shift if shift >= 0 else value >> -shift


# A mean square's class, but for a constant, is how many of these are not above it.
THRESHOLDS = np.array([_power(q, FRACTION) for q in range(-UNIT, UNIT)], np.int32)
INVERSE = np.array([_power(UNIT - s, 28) for s in range(SIZES)], np.int64)  # 2^28 / size, by s


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

    sizes: NDArray[np.uint8]  # (all rows,): s of each, 0 of one that is named
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


def _classes(mean_square: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = THRESHOLDS.searchsorted(mean_square, "right") + (size - 2 * UNIT - 1 + OFFSET)
    return np.minimum(np.maximum(found, 0), CLASSES - 1)


def _update(mean_square: NDArray[np.int32], codes: NDArray[np.int32], size: int, before: int) -> None:
    if size >= LEARNED:
        squares = (codes * codes * INVERSE[size] >> 28 - FRACTION).astype(np.int32)
        mean_square += (squares - mean_square) // np.int32(min(WINDOW, PRIOR + before))


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
    means = np.square(kept, dtype=np.float64).mean(1).clip(2.0**-30)
    sizes = np.zeros(len(flat), np.uint8)
    sizes[list(seen.values())] = (np.rint(PER_OCTAVE * np.log2(means)) + UNIT).clip(0, SIZES - 1)

    symbols = 2 * levels + 1
    places = np.empty(kept.shape, np.uint16)
    each = zip(
        kept.astype(np.int32), places, sizes[list(seen.values())].tolist(), _rows_before(first, rows), strict=True
    )
    for row, place, size, before in each:
        if before == 0:
            mean_square = np.full(columns, 1 << FRACTION, np.int32)
        place[:] = _classes(mean_square, size) * symbols + (row + levels)
        _update(mean_square, row, size, before)
    counts = np.bincount(places.ravel(), minlength=CLASSES * symbols).reshape(CLASSES, symbols)
    return Plan(Model(sizes, first, np.stack([_shares(c) for c in counts])), places)


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
        model.sizes.tobytes()
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
    lengths = (rows, 4 * rows, 2 * CLASSES * symbols)
    content = decompress(data, sum(lengths))
    parts = [content[end - size : end] for size, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
    sizes = np.frombuffer(parts[0], np.uint8)
    named = np.frombuffer(interleaved(parts[1], 4), "<u4").astype(np.int64)
    frequencies = np.frombuffer(interleaved(parts[2], 2), "<u2").astype(np.uint16).reshape(CLASSES, symbols)
    _want((sizes < SIZES).all(), f"a row of size {sizes.max(initial=0)}, wanted less than {SIZES}")
    _want((frequencies.sum(1, dtype=np.int64) == 1 << PRECISION).all(), "frequencies that do not add up")
    numbers = np.arange(rows)
    first = np.where(named == 0, numbers, named - 1)
    # In this order: only rows that exist are looked up.
    _want((first <= numbers).all() and (first[first] == first).all(), "a row that equals no coded row before it")
    return Model(sizes, first, frequencies)


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
            mean_square = np.full(columns, 1 << FRACTION, np.int32)
        size = int(model.sizes[number])
        classes = _classes(mean_square, size)
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
        _update(mean_square, row, size, before)
    _want(position == len(words) and (states == LOWEST).all(), "data go on after the last code")
    return codes[model.first].reshape(tuple(shape))
