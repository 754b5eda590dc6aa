"""Newton-Schulz and the whole optimizer step beside their peers: values first, then milliseconds.

    python -m bench.optimizer

Cases: `all-banks` of the seed's model on one GPU, and `rank-of-8`: what one of eight ranks computes in a step, its
share of every bank (3, 3, 2 and 2 matrices, gradients in bf16) and the update of all weights, communication left out.
`eager` is the reference, `compiled` has its Newton-Schulz under torch.compile, `gram-newton-schulz` is the package of
that name where it is installed (with the kernels of quack where that is). TFLOP/s count the three products of an
iteration in full, whoever computes half of the symmetric ones. Errors are of the first matrix of every bank against
float64, relative, Frobenius; of a step: of the change of the weights. Writes bench/results/optimizer-<gpu>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from bench.common import ceilings, write_result
from gpt.config import build_config
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.optimizer import Optimizer, coefficients
from kernels import compiled, newton_schulz, reference, select

DEVICE = torch.device("cuda")
CASES = {"all-banks": 1, "rank-of-8": 8}  # number of ranks
TRITON = "reference,newton_schulz=triton,muon_momentum=triton,muon_update=triton,adamw_update=triton"
CONFIG = build_config(preset="seed")
COEFFICIENTS = coefficients(CONFIG.newton_schulz, CONFIG.muon_backend_steps)


class Alone(Ranks):
    """One of several ranks, by itself."""

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        return tensor


class Share(Optimizer):
    """One rank's part of a step: the gradients of the other ranks' matrices stand for their updates."""

    def _reduce(self) -> list[Tensor]:
        torch._foreach_copy_(self.bucket_views, [gradient(p) for p in self.rest])
        gradients = [gradient(bank.parameter) for bank in self.banks]
        torch._foreach_copy_([bank.whole[: bank.count] for bank in self.banks], gradients)
        return [bank.whole[: bank.share] for bank in self.banks]

    def _gather(self, shares: list[Tensor]) -> list[tuple[Any, list[Tensor], Any]]:
        torch._foreach_copy_([bank.whole[: bank.share] for bank in self.banks], shares)
        return [([bank], [bank.whole[: bank.count]], None) for bank in self.banks]


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst relative Frobenius error."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def timed(f: Callable[[], Any]) -> dict[str, float]:
    low, middle, high = do_bench(f, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    return {"ms": round(middle, 4), "ms_p20": round(low, 4), "ms_p80": round(high, 4)}


def row(op: str, case: str, impl: str, times: dict[str, float], **rest: Any) -> dict[str, Any]:
    filled = {"tflops": None, "gb_s": None, "percent_of_ceiling": None, "reference_error": None, **rest}
    speed = f"{filled['tflops']:7.1f} TFLOP/s {filled['percent_of_ceiling']:5.1f} %" if filled["tflops"] else ""
    print(f"{op:15s} {case:10s} {impl:20s} {times['ms']:8.3f} ms {speed:26s} error {filled['error']:.5f}", flush=True)
    return {"op": op, "case": case, "impl": impl, **times, **filled}


# --------------------------------------------------------------------------------------------------- Newton-Schulz
def gram_newton_schulz() -> Callable[[Sequence[Tensor]], list[Tensor]] | None:
    """The package's own, in the settings that it ships with; its compiled graphs hold their outputs in place."""
    if not find_spec("gram_newton_schulz"):
        return None
    from gram_newton_schulz import GramNewtonSchulz

    settings = {"ns_coefficients": [list(c) for c in COEFFICIENTS], "ns_use_kernels": find_spec("quack") is not None}
    # Captured graphs of one function for several shapes share their outputs: one object a bank.
    objects: dict[tuple[int, ...], Any] = {}

    def run(banks: Sequence[Tensor]) -> list[Tensor]:
        for bank in banks:
            if bank.shape not in objects:
                objects[bank.shape] = GramNewtonSchulz(**settings)
        return [objects[bank.shape](bank) for bank in banks]

    return run


def measure_newton_schulz(case: str, ceiling: float) -> list[dict[str, Any]]:
    model = GPT(CONFIG, select("reference", DEVICE)).to(DEVICE)
    shapes = [
        (-(-bank.count // CASES[case]), *bank.parameter.shape[1:])
        for bank in Optimizer(model, CONFIG, Ranks(0, 1, DEVICE)).banks
    ]
    sizes = [count * rows * columns for count, rows, columns in shapes]
    flat = torch.randn(sum(sizes), device=DEVICE).bfloat16()
    banks = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    exact = reference.newton_schulz([bank[:1].double() for bank in banks], COEFFICIENTS)
    flops = 0.0
    for count, rows, columns in shapes:
        short, long = min(rows, columns), max(rows, columns)
        flops += len(COEFFICIENTS) * count * (4.0 * short * short * long + 2.0 * short**3)
    implementations: dict[str, Callable[[Sequence[Tensor]], list[Tensor]] | None] = {
        "eager": lambda banks: reference.newton_schulz(banks, COEFFICIENTS),
        "compiled": lambda banks: compiled.newton_schulz(banks, COEFFICIENTS),
        "gram-newton-schulz": gram_newton_schulz(),
        "triton": lambda banks: newton_schulz.newton_schulz(banks, COEFFICIENTS),
    }
    table, of_eager = [], None
    for impl, f in implementations.items():
        if f is None:
            print(f"{impl} is not installed: left out")
            continue
        try:
            found = error([x[:1] for x in f(banks)], exact)
            of_eager = found if of_eager is None else of_eager
            if not found < 0.1:
                raise ValueError(f"wrong values: error {found}")
            times = timed(lambda f=f: f(banks))  # type: ignore[misc]
        except Exception as failure:
            print(f"newton_schulz {case} {impl}: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        tflops = flops / times["ms"] / 1e9
        percent = round(100 * tflops / ceiling, 1)
        rest = {"tflops": round(tflops, 1), "percent_of_ceiling": percent, "error": found, "reference_error": of_eager}
        table.append(row("newton_schulz", case, impl, times, **rest))
    return table


# ---------------------------------------------------------------------------------------------------- the whole step
def exact_change(optimizer: Optimizer, gradients: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change of the first matrix of every bank, and of every other parameter, in a first step; float64."""
    for name, parameter in optimizer.model.named_parameters():
        parameter.grad = gradients[name]
    shards = optimizer._reduce()
    squares = sum((g.double().square().sum() for g in (*shards, optimizer.bucket)), torch.zeros((), device=DEVICE))
    clip = (CONFIG.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    names = {id(p): name for name, p in optimizer.model.named_parameters()}
    changes = {}
    for bank, shard in zip(optimizer.banks, shards, strict=True):
        name = names[id(bank.parameter)]
        u = shard[:1].double() * clip * (1.0 + optimizer.momentum_at(0))
        (direction,) = reference.newton_schulz([u], COEFFICIENTS)
        shrink = CONFIG.matrix_lr * CONFIG.muon_wd
        changes[name] = -shrink * before[name][:1] - CONFIG.matrix_lr * bank.update_scale * direction
    for parameter, lr, decay in zip(optimizer.rest, optimizer.peak_lrs, optimizer.weight_decays, strict=True):
        name = names[id(parameter)]
        g = gradients[name].double() * clip
        changes[name] = -lr * decay * before[name] - lr * g / (g.abs() + CONFIG.adam_eps)
    return changes


def measure_step(case: str) -> list[dict[str, Any]]:
    ranks = CASES[case]
    table, of_eager = [], None
    for impl, kernels in (("eager", "reference"), ("compiled", "compiled"), ("triton", TRITON)):
        torch.manual_seed(0)
        # Ops of the model itself do not run here.
        ops = select("reference", DEVICE)
        if impl == "compiled":
            ops = replace(ops, newton_schulz=compiled.newton_schulz)
        elif impl == "triton":
            ops = select(kernels, DEVICE)
        model = GPT(CONFIG, ops, torch.bfloat16).initialise(0).to(DEVICE)
        optimizer = (Share if ranks > 1 else Optimizer)(model, CONFIG, Alone(0, ranks, DEVICE))
        gradients = {name: torch.randn_like(p) * 1e-3 for name, p in model.named_parameters()}
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        exact = exact_change(optimizer, gradients, before)

        pairs = [(parameter, gradients[name]) for name, parameter in model.named_parameters()]

        def step(pairs: Any = pairs, optimizer: Optimizer = optimizer) -> Tensor:
            for parameter, g in pairs:
                parameter.grad = g
            return optimizer.step(0, 1.0)

        step()
        changed = [(p.detach().double() - before[name])[: len(exact[name])] for name, p in model.named_parameters()]
        found = error(changed, [exact[name] for name in before])
        of_eager = found if of_eager is None else of_eager
        if not found < 0.1:
            raise ValueError(f"wrong values: {impl} {case} error {found}")
        table.append(row("optimizer_step", case, impl, timed(step), error=found, reference_error=of_eager))
        del model, optimizer, gradients, before, exact, changed, pairs, step
        torch.cuda.empty_cache()
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    options = parser.parse_args(arguments)
    measured = ceilings()
    rows = []
    for case in options.cases:
        rows += measure_newton_schulz(case, measured["bf16_tflops"])
        rows += measure_step(case)
    path, _ = write_result("optimizer", " ".join(["python -m bench.optimizer", *arguments]), measured, rows)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
