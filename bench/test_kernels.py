"""The table of bench.kernels under pytest-benchmark.

BENCH_TOKENS=data/fineweb_val_000000.bin pytest bench/test_kernels.py --benchmark-group-by=param:op,param:case
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from bench.common import read_tokens
from bench.kernels import LENGTH, OPS, ROWS, Workload, errors, phases, right

TOKENS = os.environ.get("BENCH_TOKENS")  # a token shard
_last: dict[tuple[str, str], tuple[Workload, dict[str, tuple[float, float]]]] = {}


def workload(op: str, case: str) -> tuple[Workload, dict[str, tuple[float, float]]]:
    """One at a time is kept: they are gigabytes."""
    if (op, case) not in _last:
        _last.clear()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        tokens = read_tokens(Path(TOKENS), ROWS * LENGTH).cuda() if TOKENS else None
        build = OPS[op][1]
        whole = build(case, False, tokens)
        _last[op, case] = whole, errors(whole if whole.checked else build(case, True, tokens))
    return _last[op, case]


IMPLEMENTATIONS = (
    "triton", "triton-packed", "triton-deterministic", "triton-fp8", "compiled", "cudnn+xsa", "fa4+xsa", "flex+xsa",
    "liger", "quack",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, (cases, _) in OPS.items() for case in cases])
def test_op(op: str, case: str, implementation: str, benchmark: Any) -> None:
    if case == "documents" and not TOKENS:
        pytest.skip("set BENCH_TOKENS to a token shard")
    work, found = workload(op, case)
    if implementation not in found:  # a peer that raised is not here either
        pytest.skip(f"{implementation} has no {op} here")
    assert right(found[implementation]), "wrong values are not timed"
    calls = phases(work, implementation)

    def step() -> None:
        for call in calls.values():
            call()
        torch.cuda.synchronize()

    benchmark.extra_info |= {"op": op, "case": case, "implementation": implementation, "errors": found[implementation]}
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
