"""What launchers and public functions share: the GPU, its launch configurations, and checks of what is passed in.

Launch configurations are data, `configs/*.json`: op -> kernel -> tile sizes and options of the compiler. Those of
h100.json were measured; generic.json is for every other GPU, for the interpreter, and for what h100.json leaves out.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# What kernels compute in. The interpreter's numbers are numpy's, which has no bf16.
DTYPES = (torch.float16, torch.float32) if INTERPRET else (torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64, 128)


@functools.cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int]:  # compute capability, processors
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


@functools.cache
def configs(name: str) -> dict[str, Any]:
    """Of every op, as `name`.json has them, else generic.json; kernel by kernel, read-only."""
    generic, own = (
        json.loads((Path(__file__).parent / "configs" / f"{file}.json").read_text(), object_hook=MappingProxyType)
        for file in ("generic", name)
    )
    return {op: generic[op] | own[op] for op in generic if op != "gpu"}


def settings(op: str, device: torch.device) -> Any:
    """Launch configurations of an op's kernels: h100.json's for compute capability 9.0, generic.json's else."""
    return configs("h100" if device.type == "cuda" and gpu(device)[0] == (9, 0) else "generic")[op]


def programs(per_processor: int, blocks: int, device: torch.device) -> int:
    """How many programs share `blocks` blocks of work."""
    return max(1, min(blocks, per_processor * (gpu(device)[1] if device.type == "cuda" else 2)))


def early(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that may start before the one ahead of it is done and waits itself, if it is EARLY.

    Programmatic dependent launch: Hopper and later.
    """
    if device.type == "cuda" and gpu(device)[0] >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def expect_one_gpu(op: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless all tensors that are given lie on one GPU, the current one, where kernels are launched;
    in the interpreter, on one device."""
    (name, first), *_ = ((name, x) for name, x in tensors.items() if x is not None)
    for other, x in tensors.items():
        if x is not None and (x.device != first.device or not (x.is_cuda or INTERPRET)):
            raise ValueError(
                f"{op} wants every tensor on one CUDA device (or TRITON_INTERPRET=1 for the CPU); "
                f"got {name} on {first.device}, {other} on {x.device}"
            )
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        raise ValueError(
            f"{op} wants its tensors on the current device, cuda:{torch.cuda.current_device()} "
            f"(with torch.cuda.device(...) changes it); got {name} on {first.device}"
        )


def expect(
    op: str, **tensors: tuple[torch.Tensor | None, tuple[int, ...], torch.dtype | tuple[torch.dtype, ...]]
) -> None:
    """Raise ValueError unless each tensor that is given has its shape, its dtype (or one of several), is contiguous,
    not empty, and on one GPU with the others."""
    for name, (x, shape, dtype) in tensors.items():
        if x is None:
            continue
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if tuple(x.shape) != tuple(shape) or x.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{op} wants {name} {tuple(shape)} {wanted}; got {tuple(x.shape)} {x.dtype}")
        if not x.is_contiguous() or x.numel() == 0:
            raise ValueError(
                f"{op} wants {name} contiguous and none empty; got {tuple(x.shape)} with strides {x.stride()}"
            )
    expect_one_gpu(op, {name: x for name, (x, _, _) in tensors.items()})
