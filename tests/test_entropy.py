"""The coder of codes: exact, near the entropy, and unable to do harm whatever it is fed."""

from __future__ import annotations

import base64
import random
import time

import brotli
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpt import entropy
from gpt.entropy import CLASSES, LANES, LOWEST, PRECISION, SIZES, UINT32, CodingError, Model, Plan, decode, encode, plan

Codes = NDArray[np.int8]


def sizes_of(shape: tuple[int, ...], sigma: float, seed: int = 0, spread: float = 0.0) -> NDArray[np.float64]:
    """Deviations of codes: those of rows and columns both spread (in octaves)."""
    chance = np.random.default_rng([seed, 1])
    octaves = chance.standard_normal((*shape[:-2], 1, shape[-1])) + chance.standard_normal((*shape[:-1], 1))
    sizes: NDArray[np.float64] = sigma * 2 ** (spread * octaves)
    return sizes


def gaussian(shape: tuple[int, ...], sigma: float, levels: int, seed: int = 0, spread: float = 0.0) -> Codes:
    chance, sizes = np.random.default_rng(seed), sizes_of(shape, sigma, seed, spread)
    codes: Codes = np.rint(sizes * chance.standard_normal(shape)).clip(-levels, levels).astype(np.int8)
    return codes


def repeated() -> Codes:
    codes = gaussian((3, 16, 40), 2.5, 31)
    codes[0, 3] = codes[2, 1] = codes[1, 5]
    codes[1:, 8:12] = 0
    codes[2] = codes[0]
    return codes


CASES: dict[str, tuple[Codes, int]] = {
    "gaussian": (gaussian((2, 40, 70), 2.5, 31, spread=0.5), 31),
    "wide": (gaussian((5, LANES + 3), 2.5, 31), 31),
    "several chunks": (gaussian((2, 4, 3 * LANES), 6.0, 127), 127),
    "uniform": (np.random.default_rng(0).integers(-127, 128, (200, 33)).astype(np.int8), 127),
    "all equal": (np.full((3, 20, 8), -7, np.int8), 31),
    "zeros": (np.zeros((3, 20, 8), np.int8), 31),
    "extremes": (np.tile(np.array([-127, 127], np.int8), (9, 30)), 127),
    "one outlier": (np.where(np.arange(4000).reshape(40, 100) == 1234, 127, 0).astype(np.int8), 127),
    "outlier column": (np.where(np.arange(100) == 17, gaussian((400, 100), 40.0, 127), 0).astype(np.int8), 127),
    "one row": (gaussian((1, 1, 50), 2.5, 31), 31),
    "one column": (gaussian((64, 1), 2.5, 31), 31),
    "one code": (np.array([[31]], np.int8), 31),
    "one symbol": (np.zeros((4, 4), np.int8), 0),
    "repeated rows": (repeated(), 31),
    "other strides": (np.asfortranarray(gaussian((30, 20), 2.5, 31)), 31),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case: str) -> None:
    codes, levels = CASES[case]
    found = decode(encode(plan(codes, levels)), codes.shape, levels)
    assert found.dtype == np.int8
    assert np.array_equal(found, codes)


def test_length_is_that_of_the_information() -> None:
    """Within 0.3% of the entropy of Gaussians whose sizes are known, and a byte a row, without being told them."""
    codes = gaussian((2, 1500, 512), 2.5, 31, spread=0.5)
    made = plan(codes, 31)
    length = len(encode(made))
    overhead = length - made.bits / 8
    assert 0 < overhead - len(model_of(encode(made))) < 4 * LANES + 8
    sizes = sizes_of((2, 1500, 512), 2.5, spread=0.5)
    edges = (torch.from_numpy(codes + edge) / torch.from_numpy(sizes) for edge in (0.5, -0.5))
    above, below = (torch.special.ndtr(edge) for edge in edges)
    known = -float((above - below).clamp_min(1e-30).log2().sum()) / 8
    assert known < made.bits / 8 + 3000
    assert length < 1.003 * known + len(model_of(encode(made))) + 2 * LANES
    assert len(model_of(encode(made))) < 3000 + 40 * 63
    order0 = np.bincount(codes.ravel() + 31) / codes.size
    assert length < 0.95 * -(order0[order0 > 0] * np.log2(order0[order0 > 0])).sum() * codes.size / 8


def test_what_repeats_is_free() -> None:
    one = gaussian((64, 512), 2.5, 31)
    dead = np.concatenate([one, np.zeros((1000, 512), np.int8)])
    twice = np.stack([one, one])
    length = len(encode(plan(one, 31)))
    assert len(encode(plan(dead, 31))) < length + 250  # the first row of zeros is coded
    assert len(encode(plan(twice, 31))) < length + 300
    columns = np.concatenate([gaussian((512, 512), 2.5, 31), np.zeros((512, 512), np.int8)], 1)
    assert len(encode(plan(columns, 31))) < 1.015 * len(encode(plan(columns[:, :512], 31)))


@pytest.mark.parametrize("counts", [[0] * 9, [5] + [0] * 8, [1] * 9, [10**9] + [1] * 254, list(range(255)), [7] * 255])
def test_shares_add_up(counts: list[int]) -> None:
    shares = entropy._shares(np.array(counts)).astype(int)
    assert shares.sum() == 1 << PRECISION
    assert all(share >= 1 for share, count in zip(shares, counts, strict=True) if count)
    assert all(share == 0 for share, count in zip(shares, counts, strict=True) if not count and any(counts))


def model_of(stream: bytes) -> bytes:
    return stream[UINT32.size : UINT32.size + UINT32.unpack_from(stream)[0]]


DAMAGED, SHAPE = gaussian((2, 20, 24), 2.5, 31, spread=0.5), (2, 20, 24)
PLAN = plan(DAMAGED, 31)
STREAM = encode(PLAN)


def refused(stream: bytes, message: str, shape: tuple[int, ...] = SHAPE, levels: int = 31) -> None:
    with pytest.raises(CodingError, match=message):
        decode(stream, shape, levels)


def with_model(model: bytes) -> bytes:
    packed = brotli.compress(model)
    return UINT32.pack(len(packed)) + packed + STREAM[UINT32.size + len(model_of(STREAM)) :]


def test_streams_that_are_too_short_or_too_long() -> None:
    for length in range(len(STREAM)):
        refused(STREAM[:length], "bytes, wanted|early|half a word|may have|not Brotli")
    refused(STREAM + b"\0", "half a word")
    refused(STREAM + b"\0\0", "go on")
    refused(b"\xff" * 4 + STREAM[4:], "wanted at least 42949")
    for shape in ((2, 21, 24), (2, 19, 24), (2, 20, 23), (2, 20, 25), (1 << 20, 8, 24)):
        refused(STREAM, "wanted|may have|early|go on|a state|a row", shape)
    refused(STREAM, "wanted", SHAPE, 127)


def test_models_that_lie() -> None:
    def changed(**values: object) -> bytes:
        model: Model = PLAN.model._replace(**values)  # type: ignore[arg-type]
        return encode(Plan(model, PLAN.places[:0]))

    model = PLAN.model
    refused(changed(), "go on|early")
    refused(changed(sizes=np.full_like(model.sizes, SIZES)), "a row of size 96, wanted less than 96")
    for share in (0, 65535):
        frequencies = model.frequencies.copy()
        frequencies.ravel()[PLAN.places[0, 0]] = share
        refused(changed(frequencies=frequencies), "do not add up")
    for row, equals in ((5, 6), (5, 39), (0, 1), (39, 10**9)):
        first = model.first.copy()
        first[row] = equals
        refused(changed(first=first), "equals no coded row before")
    first = model.first.copy()
    first[7], first[9] = 3, 7  # a row that equals a row that equals another
    refused(changed(first=first), "equals no coded row before")
    refused(with_model(b"\0" * 10), "10 bytes, wanted")
    refused(with_model(b"\0" * (1 << 24)), "more than")


def test_states_out_of_range() -> None:
    place = UINT32.size + len(model_of(STREAM))
    refused(STREAM[:place] + UINT32.pack(LOWEST - 1) + STREAM[place + 4 :], "a state out of range")


def test_random_damage() -> None:
    """Whatever is changed: the error, or codes of the right shape within the levels."""
    chance = random.Random(1)
    for _ in range(600):
        stream = bytearray(STREAM)
        for _ in range(chance.randint(1, 3)):
            stream[chance.randrange(len(stream))] = chance.randrange(256)
        try:
            codes = decode(bytes(stream), SHAPE, 31)
        except CodingError:
            continue
        assert codes.shape == SHAPE
        assert np.abs(codes.astype(int)).max() <= 31
    size = 5 * 40 + 2 * CLASSES * 63
    model = bytearray(entropy.decompress(model_of(STREAM), size))
    for _ in range(300):
        damaged = bytearray(model)
        damaged[chance.randrange(size)] = chance.randrange(256)
        try:
            decode(with_model(bytes(damaged)), SHAPE, 31)
        except CodingError:
            continue


KEPT = (
    "ga7~l8}|nwh9I5n0QFGuhzf$4DNB|mosczV7=<)g(Kim{dEhsgZG~lUT5psI2f_&l=a@FLaQKo*`gW}S)7N9``!0OB-aPj@?hoq!"
    "7v~Akv|pov9N=?fPQdivD-Im9Z~?j_9$s`stpFk3LA={ige(b9_Ow?7NTh^>QUJw^Bq4KYkp_7I_h&Hyc-*%F!c0CY"
)


def test_decoding_is_the_same_everywhere() -> None:
    """What one machine wrote, every other has to read: this stream was kept."""
    codes = (np.arange(72).reshape(2, 12, 3) * 7919 % 13 - 6).astype(np.int8)
    codes[:, :, 1] = codes[1, 4:9] = 0
    assert np.array_equal(decode(base64.b85decode(KEPT), codes.shape, 7), codes)


def test_speed() -> None:
    """Numpy's calls a row are few: a model of 36 million codes takes seconds."""
    codes = gaussian((16, 512, 512), 2.5, 31, spread=0.2)
    begin = time.perf_counter()
    stream = encode(plan(codes, 31))
    middle = time.perf_counter()
    assert np.array_equal(decode(stream, codes.shape, 31), codes)
    assert middle - begin < 10
    assert time.perf_counter() - middle < 10
