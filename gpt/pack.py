"""From trained weights to an artifact that fits: calibrate, quantise, compress, coarsen until it is small."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    Calibration,
    IntKind,
    QuantisationError,
    Quantised,
    balanced_clips,
    calibrate,
    finest_clips,
    output_error,
    quantise,
    stacked,
    without_dead_neurons,
)
from gpt.model import BANKS, GPT

ATTEMPTS = 12
SLACK = 0.001  # of the budget, that an artifact may leave unused
OCTAVES = 6  # that the clip may be raised: codes are 0 or 1 then

KINDS: dict[str, IntKind] = {**dict.fromkeys(BANKS, "int6"), "tok_emb": "int8"}

Tensors = dict[str, Quantised | Tensor]


@dataclass(frozen=True)
class Group:
    """One quantised parameter in the artifact."""

    name: str
    kind: IntKind
    parameters: int
    nbytes: int
    clip_sigmas: float  # median of its rows
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
    clip_sigmas: float  # median of the matrices' rows, before those that would cut off weights are raised
    attempts: int  # times that the model was quantised
    groups: tuple[Group, ...]
    dead_neurons: int  # of the MLPs, that reach nothing and are left out
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
        lines.append(f"{'dead neurons':14s}{'':6s}{self.dead_neurons:12,d}  (their rows are left out)")
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
    clips: Mapping[str, float] | None = None,
) -> Packed:
    """Quantise a model and write it as an artifact; call on every rank, with the weights that are to be exported.

    depth: the layers that scoring will run. batches: this rank's calibration batches, (rows, T + 1) int64 on the
    device; they alone read training data, in the time given as seconds["calibrate"]. code_nbytes: what count_code says.
    clips: for each quantised parameter one clip for all its rows, as the seed had them, all raised alike where the
    artifact does not fit; default: balanced ones, from the configuration's on. All ranks calibrate, rank 0 quantises
    and writes, and all return the same once the file is there. Raises QuantisationError where the model is not finite
    or cannot be made to fit `limit` bytes with its code.
    """
    begin = time.perf_counter()
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise QuantisationError(f"{name} is not finite")
    calibration = calibrate(model, depth, batches, ranks)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    calibrated = time.perf_counter() - begin
    box: list[Packed | Exception | None] = [None]
    if ranks.main:
        try:
            box[0] = _pack(
                model, depth, tokenizer_sha256, calibration, clips, Path(path), code_nbytes, limit, calibrated
            )
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
    calibration: Calibration,
    given: Mapping[str, float] | None,
    path: Path,
    code_nbytes: int,
    limit: int,
    calibrated: float,
) -> Packed:
    config, block = model.config, model.ops.gptq_block
    hessians, factors, energies = calibration
    seconds = {"calibrate": calibrated, "quantise": 0.0, "compress": 0.0}
    begin = time.perf_counter()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    vectors = {name: _half(weight) for name, weight in weights.items() if name not in INPUTS}
    weights = {name: weights[name] for name in INPUTS}
    if given:
        start = given[BANKS[0]]
        clips = {name: weight.new_full(weight.shape[:-1], given[name] / start) for name, weight in weights.items()}
        least = {name: torch.zeros_like(clip) for name, clip in clips.items()}
    else:
        start = config.matrix_clip_sigmas
        clips = balanced_clips(weights, KINDS, energies)
        least = {name: finest_clips(weight) for name, weight in weights.items()}
    seconds["quantise"] += time.perf_counter() - begin

    def packed(clip_sigmas: float) -> tuple[Tensors, bytes]:
        begin = time.perf_counter()
        matrices = {
            name: quantise(weight, factors[name], (clip_sigmas * clips[name]).maximum(least[name]), KINDS[name], block)
            for name, weight in weights.items()
        }
        matrices["mlp_up_bank"] = without_dead_neurons(matrices["mlp_up_bank"], matrices["mlp_down_bank"])
        quantised = time.perf_counter()
        tensors: Tensors = {**matrices, **vectors}
        data = artifact.serialise(config, depth, tokenizer_sha256, tensors)
        seconds["quantise"] += quantised - begin
        seconds["compress"] += time.perf_counter() - quantised
        return tensors, data

    octave = sum(weight.numel() for weight in weights.values()) / 8
    clip, attempts, tensors, data = fit(packed, start, limit - code_nbytes, octave)
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
        sigmas = float((clip * clips[name]).maximum(least[name]).median())
        groups.append(Group(name, value.kind, weight.numel(), streams[name], sigmas, error))
    down = tensors["mlp_down_bank"]
    assert isinstance(down, Quantised)
    dead = int((down.codes == 0).all(-2).sum())
    return Packed(path, written.sha256, len(data), code_nbytes, limit, clip, attempts, tuple(groups), dead, seconds)


def _half(weight: Tensor) -> Tensor:
    """float16 where its range suffices: its 11 bits are far finer than the matrices' six, at half float32's bytes."""
    half = weight.to(torch.float16)
    return half.cpu() if half.isfinite().all() else weight.float().cpu()


def fit(
    packed: Callable[[float], tuple[Tensors, bytes]], clip_sigmas: float, budget: int, octave: float
) -> tuple[float, int, Tensors, bytes]:
    """Raise the clip, from where it is given, until the bytes fit the budget: coarser steps, fewer bits.

    Size falls almost in proportion to log2(clip): by a bit a weight for each doubling, less where many codes are 0.
    octave: those bytes, no less than what a doubling saves; then secants. Returns the clip, how often it was packed,
    the tensors and their bytes, which leave at most SLACK of the budget unused unless the first clip fits. Raises
    QuantisationError where no clip fits.
    """
    begin = math.log2(clip_sigmas)
    place, clip = begin, clip_sigmas
    large: tuple[float, int] | None = None  # (log2 of the clip, bytes) of the last that did not fit
    best: tuple[float, Tensors, bytes] | None = None
    attempts = 0
    while attempts < ATTEMPTS:
        attempts += 1
        tensors, data = packed(clip)
        size = len(data)
        if size <= budget:
            best = clip, tensors, data
            if large is None or size >= (1 - SLACK) * budget:
                break
        else:
            if best is None and large is not None and size < large[1]:
                octave = (large[1] - size) / (place - large[0])
            elif best is None and place >= begin + OCTAVES:
                break
            large = place, size
        wanted = (1 - SLACK / 2) * budget
        if best is None:
            place = min(place + (size - wanted) / octave, begin + OCTAVES)
        else:
            small = math.log2(best[0]), len(best[2])
            place = large[0] + (small[0] - large[0]) * (large[1] - wanted) / (large[1] - small[1])
        clip = 2.0**place
    if best is None:
        raise QuantisationError(f"does not fit: {size} bytes even at clip_sigmas={clip:.1f}, wanted at most {budget}")
    clip, tensors, data = best
    return clip, attempts, tensors, data
