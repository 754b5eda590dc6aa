"""The ops of bench.kernels and their peers under pytest-benchmark; of attention two cases, bench.kernels has them all.

BENCH_TOKENS=data/fineweb_val_000000.bin pytest bench/test_kernels.py --benchmark-group-by=param:op,param:case

Its times are the host's, launch and waiting included; `device_ms` of extra_info is as bench.kernels measures, but of
one implementation at a time.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from bench.common import peer, read_tokens
from bench.kernels import LENGTH, OPS, ROWS, Workload, errors, in_turn, prepared, right

TOKENS = os.environ.get("BENCH_TOKENS")  # a token shard
# FlashAttention-4 and FlexAttention compile for every case of attention, half a minute each.
CASES = [(op, case) for op, (cases, _) in OPS.items() for case in (cases[:2] if op == "attention" else cases)]
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
    "triton", "triton-packed", "triton-apart", "triton-deterministic", "triton-fp8", "compiled", "eager",
    "cudnn+xsa", "fa4+xsa", "flex+xsa", "liger", "quack", "torch-fused", "gram-newton-schulz", "cublas", "torchao",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_op(op: str, case: str, implementation: str, benchmark: Any) -> None:
    if case == "documents" and not TOKENS:
        pytest.skip("set BENCH_TOKENS to a token shard")
    work, found = workload(op, case)
    if implementation not in found:  # a peer that raised is not here either
        pytest.skip(f"{implementation} has no {op} here")
    stream = torch.cuda.Stream()
    runs = []
    with peer(implementation):
        if not right(found[implementation]):
            raise ValueError(f"{op} {case}: wrong values are not timed, errors {found[implementation]}")
        runs = prepared(work, implementation, stream)
    if not runs:
        pytest.skip(f"{implementation} is wrong or raises")

    def step() -> None:
        with torch.cuda.stream(stream):
            for _, run, _ in runs:
                run()
        torch.cuda.synchronize()

    times = in_turn([run for _, run, _ in runs], stream)
    benchmark.extra_info |= {
        "op": op, "case": case, "implementation": implementation, "errors": found[implementation],
        "device_ms": {phase or "all": statistics.median(each) for (phase, _, _), each in zip(runs, times, strict=True)},
    }  # fmt: skip
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
