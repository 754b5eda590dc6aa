"""What the tests of kernels share: where a test runs, the error of a result, a step as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.launch import INTERPRET

CUDA = torch.cuda.is_available() and not INTERPRET
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs under TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRET, reason="needs the compiler, not the interpreter")
gpu = pytest.mark.gpu


def error(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """Frobenius error relative to the truth b or, where that is less than `least` times unit numbers of its shape, to
    those. NaN fails every comparison."""
    norm, unit = b.norm().item(), b.numel() ** 0.5
    return float((a.double() - b).norm().item() / (norm if norm > least * unit else unit))


def graphed(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm `step` up on a side stream and capture it; the graph and what it returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out
