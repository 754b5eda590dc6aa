"""From trained weights to an artifact that fits: calibrate, quantise, compress, and coarsen until it is small."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt import artifact
from gpt.config import ARTIFACT_LIMIT
from gpt.distributed import Ranks
from gpt.gptq import (
    INPUTS,
    LEVELS,
    Hessians,
    IntKind,
    QuantisationError,
    Quantised,
    collect_hessians,
    output_error,
    parameter_factors,
    quantise,
    round_to_nearest,
    row_scales,
    stacked,
)
from gpt.model import BANKS, GPT

ATTEMPTS = 8
SLACK = 0.001  # of the budget, that a predicted size stays below it

Tensors = dict[str, Quantised | Tensor]


@dataclass(frozen=True)
class Group:
    """One quantised parameter in the artifact."""

    name: str
    kind: IntKind
    parameters: int
    nbytes: int
    clip_sigmas: float
    output_error: float  # |X (W - Wq)^T| / |X W^T|

    @property
    def bits(self) -> float:
        """Compressed bits a weight."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Packed:
    """What packing did."""

    path: Path
    sha256: str
    nbytes: int
    code_nbytes: int
    limit: int
    clip_sigmas: float  # of the matrices
    attempts: int  # times that the matrices were quantised
    groups: tuple[Group, ...]
    seconds: dict[str, float]  # calibrate (reads training data), quantise, compress

    @property
    def total_nbytes(self) -> int:
        """What the limit is about: artifact and code."""
        return self.nbytes + self.code_nbytes

    def as_dict(self) -> dict[str, Any]:
        """For a record, as JSON can hold it."""
        groups = [asdict(group) | {"bits": group.bits} for group in self.groups]
        return asdict(self) | {"path": str(self.path), "groups": groups, "total_nbytes": self.total_nbytes}

    def table(self) -> str:
        """One line a group, and the sum."""
        lines = [f"{'':14s}{'kind':>6s}{'weights':>12s}{'bytes':>12s}{'bits':>7s}{'clip':>8s}{'error':>8s}"]
        lines += [
            f"{g.name:14s}{g.kind:>6s}{g.parameters:12,d}{g.nbytes:12,d}{g.bits:7.3f}{g.clip_sigmas:8.3f}{g.output_error:8.4f}"
            for g in self.groups
        ]
        rest = self.nbytes - sum(group.nbytes for group in self.groups)
        lines.append(f"{'vectors':14s}{'':18s}{rest:12,d}  (scales, vectors, header)")
        lines.append(f"{'code, LZMA':14s}{'':18s}{self.code_nbytes:12,d}")
        lines.append(f"{'total':14s}{'':18s}{self.total_nbytes:12,d}  of {self.limit:,d}")
        return "\n".join(lines)


def pack(
    model: GPT,
    depth: Sequence[int],
    tokenizer_sha256: str,
    batches: Iterable[Tensor],
    path: str | Path,
    ranks: Ranks,
    code_nbytes: int,
    limit: int = ARTIFACT_LIMIT,
) -> Packed:
    """Quantise a model and write it as an artifact; call on every rank, with the weights that are to be exported.

    depth: the layers that scoring will run. batches: this rank's calibration batches, (rows, T) int64 on the device;
    they alone read training data, in the time given as seconds["calibrate"]. code_nbytes: what count_code says. All
    ranks calibrate, rank 0 quantises and writes, and all return the same once the file is there. Raises
    QuantisationError where the model is not finite or cannot be made to fit `limit` bytes with its code.
    """
    begin = time.perf_counter()
    hessians = collect_hessians(model, depth, batches, ranks)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    calibrated = time.perf_counter() - begin
    box: list[Packed | Exception | None] = [None]
    if ranks.main:
        try:
            box[0] = _pack(model, depth, tokenizer_sha256, hessians, Path(path), code_nbytes, limit, calibrated)
        except Exception as error:
            if ranks.world_size == 1:
                raise
            box[0] = error  # raised on every rank: none waits for ever
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    result = box[0]
    if not isinstance(result, Packed):
        assert result is not None
        raise result
    return result


def _pack(
    model: GPT,
    depth: Sequence[int],
    tokenizer_sha256: str,
    hessians: Hessians,
    path: Path,
    code_nbytes: int,
    limit: int,
    calibrated: float,
) -> Packed:
    config = model.config
    seconds = {"calibrate": calibrated, "quantise": 0.0, "compress": 0.0}
    begin = time.perf_counter()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise QuantisationError(f"{name} is not finite")
    factors = parameter_factors(hessians, config)
    fixed = {"tok_emb": quantise(weights["tok_emb"], factors["tok_emb"], config.embed_clip_sigmas, "int8")}
    vectors = {name: _half(weight) for name, weight in weights.items() if name not in INPUTS}
    seconds["quantise"] += time.perf_counter() - begin

    def quantised(clip_sigmas: float) -> Tensors:
        begin = time.perf_counter()
        matrices = {name: quantise(weights[name], factors[name], clip_sigmas, "int6") for name in BANKS}
        seconds["quantise"] += time.perf_counter() - begin
        return {**matrices, **fixed, **vectors}

    def compressed(tensors: Tensors) -> bytes:
        begin = time.perf_counter()
        data = artifact.serialise(config, depth, tokenizer_sha256, tensors)
        seconds["compress"] += time.perf_counter() - begin
        return data

    def rounded(clip_sigmas: float) -> float:
        """Size with the weights rounded to nearest: close to that of GPTQ's codes, and quick."""
        size = other
        for name in BANKS:
            scales = row_scales(weights[name], clip_sigmas, LEVELS["int6"])
            codes = round_to_nearest(weights[name], scales, LEVELS["int6"])
            size += coded_bytes(codes) + coded_bytes(scales)
        return size

    other = predicted_bytes({**fixed, **vectors})
    clip, attempts, tensors, data = fit(
        quantised, compressed, rounded, predicted_bytes, config.matrix_clip_sigmas, limit - code_nbytes
    )
    artifact.save(path, data)

    written = artifact.parse(data)  # what was written can be read
    streams = {entry.name: written.header.streams[entry.stream].bytes for entry in written.header.tensors}
    by_kind = stacked(hessians, config)
    groups = []
    for name, kinds in INPUTS.items():
        value, weight = tensors[name], weights[name]
        assert isinstance(value, Quantised)
        bank = weight.float().view(-1, *weight.shape[-2:])
        error = output_error(
            bank, value.dequantise().to(bank.device).view_as(bank), torch.cat([by_kind[kind] for kind in kinds])
        )
        sigmas = clip if name in BANKS else config.embed_clip_sigmas
        groups.append(Group(name, value.kind, weight.numel(), streams[name], sigmas, error))
    return Packed(path, written.sha256, len(data), code_nbytes, limit, clip, attempts, tuple(groups), seconds)


def _half(weight: Tensor) -> Tensor:
    """float16 where its range suffices: its 11 bits are far finer than the matrices' six, at half float32's bytes."""
    half = weight.to(torch.float16)
    return half.cpu() if half.isfinite().all() else weight.float().cpu()


def coded_bytes(values: Tensor) -> float:
    """Bytes of a tensor under one Huffman code a byte plane; order-0 entropy would leave out what whole bits waste.

    Brotli 11 comes within 0.02% of it on Gaussian codes, whose order says nothing.
    """
    width = values.element_size()
    bits = 0
    for plane in values.contiguous().flatten().view(torch.int8).view(-1, width).unbind(1):
        counts = [count for count in torch.bincount(plane.int() + 128).tolist() if count]
        heapq.heapify(counts)
        while len(counts) > 1:
            merged = heapq.heappop(counts) + heapq.heappop(counts)
            bits += merged
            heapq.heappush(counts, merged)
    return bits / 8


def predicted_bytes(tensors: Tensors) -> float:
    """Bytes of the tensors in a file, about."""
    return sum(
        coded_bytes(value.codes) + coded_bytes(value.scales) if isinstance(value, Quantised) else coded_bytes(value)
        for value in tensors.values()
    )


def fit(
    quantised: Callable[[float], Tensors],
    compressed: Callable[[Tensors], bytes],
    rough: Callable[[float], float],
    predicted: Callable[[Tensors], float],
    clip_sigmas: float,
    budget: int,
) -> tuple[float, int, Tensors, bytes]:
    """Raise the clip, from where it is given, until the bytes fit the budget: coarser steps, fewer bits.

    From quick and rough to slow and exact: rough(clip) in bytes, up to a factor; quantised(clip), with predicted(...)
    of what comes out, up to another; compressed(...), which alone decides, and is left out where the prediction is too
    large. Each factor is corrected by what the next step finds. Returns the clip, how often it was quantised, the
    tensors and their bytes. Raises QuantisationError where ATTEMPTS do not do, or where no clip can.
    """
    clip, widened, brotli = clip_sigmas, 1.0, 1.0
    for attempts in range(1, ATTEMPTS + 1):
        clip = _smallest_clip(rough, clip, budget * (1 - SLACK) / (widened * brotli))
        tensors = quantised(clip)
        size = predicted(tensors)
        widened = size / rough(clip)
        if size * brotli > budget:
            continue
        data = compressed(tensors)
        if len(data) <= budget:
            return clip, attempts, tensors, data
        brotli = len(data) / size
    raise QuantisationError(f"no fit in {ATTEMPTS} attempts, the last at clip_sigmas={clip:.3f}; wanted {budget} bytes")


def _smallest_clip(size: Callable[[float], float], low: float, wanted: float) -> float:
    """The smallest clip from `low` on whose size is at most `wanted`, to a part in a thousand."""
    if size(low) <= wanted:
        return low
    high, most = low, 64 * low  # there, all codes are 0 or 1
    while size(high) > wanted:
        if high >= most:
            raise QuantisationError(
                f"does not fit: {size(high):.0f} bytes even at clip_sigmas={high:.0f}, wanted at most {wanted:.0f}"
            )
        low, high = high, 2 * high
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(middle) <= wanted else (middle, high)
    return high
