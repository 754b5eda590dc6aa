"""Newton-Schulz and the whole optimizer step beside their peers: values first, then milliseconds.

    python -m bench.optimizer

Cases: `all-banks` of the seed's model on one GPU, and `rank-of-8`: what one of eight ranks computes in a step, its
share of every bank (3, 3, 2 and 2 matrices, gradients in bf16) and the update of all weights, communication left out.
`eager` is the reference, `compiled` has its Newton-Schulz under torch.compile, `torch-fused` is the best of the
framework: that, AdamW(fused=True) and foreach operations; `gram-newton-schulz` is the package of that name (0.1.6; fp16
within) where it is installed, with the kernels of quack where that is. TFLOP/s count the three products of an iteration
in full, whoever computes half of the symmetric ones. Errors are the worst of the first and the last matrix of every
bank against float64, relative, Frobenius; of a step: of the change of the weights. Writes
bench/results/optimizer-<gpu>.json, after every case, and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from bench.common import ceilings, draw_panels, peer, relative_errors, write_result
from gpt.config import Config, build_config
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


class Fused(Optimizer):
    """The same step by the framework's fused AdamW, foreach operations and compiled Newton-Schulz."""

    def __init__(self, model: GPT, config: Config, ranks: Ranks) -> None:
        super().__init__(model, config, ranks)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for parameter, *settings in zip(self.rest, self.peak_lrs, self.weight_decays, strict=True):
            groups.setdefault((settings[0], settings[1]), []).append(parameter)
        self.adamw = torch.optim.AdamW(
            [{"params": group, "lr": lr, "peak_lr": lr, "weight_decay": wd} for (lr, wd), group in groups.items()],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self, step: int, lr_factor: float) -> Tensor:
        config = self.config
        shards = self._reduce()
        norm = self._norm(shards)
        clip = (config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)

        self.bucket.mul_(clip)
        for parameter, g in zip(self.rest, self.bucket_views, strict=True):
            parameter.grad = g
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self.adamw.step()

        momenta, mu = [bank.momentum for bank in self.banks], self.momentum_at(step)
        gradients = torch._foreach_mul([shard.float() for shard in shards], clip)
        torch._foreach_mul_(momenta, mu)
        torch._foreach_add_(momenta, gradients)
        u = torch._foreach_add(gradients, momenta, alpha=mu)
        if config.muon_row_norm:
            torch._foreach_div_(u, [x.norm(dim=-1, keepdim=True) + 1e-7 for x in u])
        gathered = self._gather(compiled.newton_schulz([x.to(self.model.dtype) for x in u], self.coefficients))
        updates = [update for _, group, _ in gathered for update in group]
        lr = config.matrix_lr * lr_factor
        torch._foreach_mul_([bank.parameter for bank in self.banks], 1.0 - lr * config.muon_wd)
        for bank, update in zip(self.banks, updates, strict=True):
            bank.parameter.add_(update, alpha=-lr * bank.update_scale)
        torch._foreach_lerp_(self.ema, [*self.parameters], 1.0 - config.ema_decay)
        for p in self.parameters:
            p.grad = None
        return norm


class FusedShare(Fused, Share):
    """One rank's part of it."""


# Implementation of a step -> the ops it selects, and its class for one rank and for one of several.
STEPS: dict[str, tuple[str, type[Optimizer], type[Optimizer]]] = {
    "eager": ("reference", Optimizer, Share),
    "compiled": ("reference", Optimizer, Share),
    "torch-fused": ("reference", Fused, FusedShare),
    "triton": (TRITON, Optimizer, Share),
}


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst relative Frobenius error; NaN where one is."""
    return relative_errors(found, exact).max().item()


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
        print("gram-newton-schulz is not installed: left out")
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


def newton_schulz_peers() -> dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Every implementation that is here."""
    implementations: dict[str, Callable[[Sequence[Tensor]], list[Tensor]] | None] = {
        "eager": lambda banks: reference.newton_schulz(banks, COEFFICIENTS),
        "compiled": lambda banks: compiled.newton_schulz(banks, COEFFICIENTS),
        "gram-newton-schulz": gram_newton_schulz(),
        "triton": lambda banks: newton_schulz.newton_schulz(banks, COEFFICIENTS),
    }
    return {name: f for name, f in implementations.items() if f is not None}


def seed_optimizer() -> Optimizer:
    """That of the seed's model on one GPU."""
    return Optimizer(GPT(CONFIG, select("reference", DEVICE)).to(DEVICE), CONFIG, Ranks(0, 1, DEVICE))


def newton_schulz_flops(shapes: Sequence[tuple[int, ...]]) -> float:
    """Of banks of these shapes: three full products an iteration."""
    flops = 0.0
    for count, rows, columns in shapes:
        short, long = min(rows, columns), max(rows, columns)
        flops += len(COEFFICIENTS) * count * (4.0 * short * short * long + 2.0 * short**3)
    return flops


def measure_newton_schulz(case: str, ceiling: float) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    print(f"\nnewton_schulz {case}", flush=True)
    shapes = [(-(-bank.count // CASES[case]), *bank.parameter.shape[1:]) for bank in seed_optimizer().banks]
    sizes = [count * rows * columns for count, rows, columns in shapes]
    flat = torch.randn(sum(sizes), device=DEVICE).bfloat16()
    banks = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    exact = reference.newton_schulz([bank[[0, -1]].double() for bank in banks], COEFFICIENTS)
    flops = newton_schulz_flops(shapes)
    table: list[dict[str, Any]] = []
    of_eager = None
    for impl, f in newton_schulz_peers().items():
        with peer(impl):
            found = error([x[[0, -1]] for x in f(banks)], exact)
            if not found < 0.1:
                raise ValueError(f"newton_schulz {case}: wrong values, error {found}")
            of_eager = found if impl == "eager" else of_eager
            times = timed(lambda f=f: f(banks))  # type: ignore[misc]
            tflops = flops / times["ms"] / 1e9
            rest = {
                "tflops": round(tflops, 1), "percent_of_ceiling": round(100 * tflops / ceiling, 1),
                "error": found, "reference_error": of_eager, "flops": "three full products an iteration",
            }  # fmt: skip
            table.append(row("newton_schulz", case, impl, times, **rest))
    return table


# ---------------------------------------------------------------------------------------------------- the whole step
def exact_change(
    optimizer: Optimizer, gradients: dict[str, Tensor], before: dict[str, Tensor]
) -> dict[str, tuple[list[int] | slice, Tensor]]:
    """Change of a first step, float64: of this rank's first and last matrix of every bank, of all other parameters.

    By the parameter's name; with it, which of the parameter's matrices or rows these are.
    """
    for name, parameter in optimizer.model.named_parameters():
        parameter.grad = gradients[name]
    shards = optimizer._reduce()
    squares = sum((g.double().square().sum() for g in (*shards, optimizer.bucket)), torch.zeros((), device=DEVICE))
    clip = (CONFIG.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    names = {id(p): name for name, p in optimizer.model.named_parameters()}
    changes: dict[str, tuple[list[int] | slice, Tensor]] = {}
    for bank, shard in zip(optimizer.banks, shards, strict=True):
        name = names[id(bank.parameter)]
        ends = [0, bank.share - 1]
        u = shard[ends].double() * clip * (1.0 + optimizer.momentum_at(0))
        (direction,) = reference.newton_schulz([u], COEFFICIENTS)
        shrink = CONFIG.matrix_lr * CONFIG.muon_wd
        changes[name] = ends, -shrink * before[name][ends] - CONFIG.matrix_lr * bank.update_scale * direction
    for parameter, lr, decay in zip(optimizer.rest, optimizer.peak_lrs, optimizer.weight_decays, strict=True):
        name = names[id(parameter)]
        g = gradients[name].double() * clip
        changes[name] = slice(None), -lr * decay * before[name] - lr * g / (g.abs() + CONFIG.adam_eps)
    return changes


def measure_step(case: str) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    print(f"\noptimizer_step {case}", flush=True)
    table: list[dict[str, Any]] = []
    of_eager = None
    for impl in STEPS:
        with peer(impl):
            found, times = one_step(impl, CASES[case])
            of_eager = found if impl == "eager" else of_eager
            table.append(row("optimizer_step", case, impl, times, error=found, reference_error=of_eager))
        torch.cuda.empty_cache()
    return table


def one_step(impl: str, ranks: int) -> tuple[float, dict[str, float]]:
    """Error and times of a step. Raises ValueError where its values are wrong."""
    kernels, alone, one_of_several = STEPS[impl]
    # Ops of the model itself do not run here.
    ops = select(kernels, DEVICE)
    if impl == "compiled":
        ops = replace(ops, newton_schulz=compiled.newton_schulz)
    torch.manual_seed(0)
    model = GPT(CONFIG, ops, torch.bfloat16).initialise(0).to(DEVICE)
    optimizer = (one_of_several if ranks > 1 else alone)(model, CONFIG, Alone(0, ranks, DEVICE))
    gradients = {name: torch.randn_like(p) * 1e-3 for name, p in model.named_parameters()}
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    exact = exact_change(optimizer, gradients, before)

    pairs = [(parameter, gradients[name]) for name, parameter in model.named_parameters()]

    def step() -> None:
        for parameter, g in pairs:
            parameter.grad = g
        optimizer.step(0, 1.0)

    step()
    changed = {name: p.detach().double() - before[name] for name, p in model.named_parameters()}
    found = error([changed[name][where] for name, (where, _) in exact.items()], [x for _, x in exact.values()])
    if not found < 0.1:
        raise ValueError(f"optimizer_step: wrong values, error {found}")
    return found, timed(step)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, help="result file; default bench/results/optimizer-<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.optimizer: wants an NVIDIA GPU, found none", file=sys.stderr)
        return 2
    measured = ceilings()
    print(f"{torch.cuda.get_device_name()}: {measured}")
    command = " ".join(["python -m bench.optimizer", *arguments])
    for case in options.cases:
        for measure in (partial(measure_newton_schulz, ceiling=measured["bf16_tflops"]), measure_step):
            path, rows = write_result("optimizer", command, measured, measure(case), options.out)
    draw_panels(rows, f"ms and percent of the ceiling, {torch.cuda.get_device_name()}", path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
