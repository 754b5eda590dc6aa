"""Ops of the model: tensors in, tensors out. This is the one place where an implementation is picked.

    ops = select("auto", device)      # or "reference", "compiled", "compiled,attention=triton"
    y = ops.mlp(x, up, down, scale)

`kernels.reference` is the specification of every op; docs of an op are there. `mlp=fp8` trains with other arithmetic:
reference.mlp_fp8, by kernels on a GPU, eager on a CPU. Scores and calibration are mlp's as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from shutil import which
from types import ModuleType
from typing import Any

# Before Inductor's configuration is imported: in torch 2.11 its mix-order reduction costs this model 6 to 10 ms a step,
# and on torch >= 2.12 setting the option instead of the environment is lost in the thread that compiles the backward.
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")

import torch

from kernels import reference
from kernels.launch import HEAD_DIMS, INTERPRET
from kernels.reference import CLASSIC, POLAR_EXPRESS

__all__ = ["CLASSIC", "IMPLEMENTATIONS", "POLAR_EXPRESS", "KernelError", "Ops", "select"]

Op = Callable[..., Any]


class KernelError(ValueError):
    """The implementation that was asked for does not exist for an op or on a device."""


@dataclass(frozen=True)
class Ops:
    """One implementation of every op. `names` says which; `graph` compiles a function of ops, or leaves it alone.

    fused_layer: attention_input, attention and linear_add in one, where one implementation has all.
    """

    embed: Op
    attention_input: Op
    attention_mask: Op
    attention: Op
    linear_add: Op
    mlp: Op
    rms_norm: Op
    linear_cross_entropy: Op
    newton_schulz: Op
    muon_momentum: Op
    muon_update: Op
    adamw_update: Op
    int6_dequantise: Op
    int6_linear: Op
    gptq_block: Op
    cached_attention: Op
    fused_layer: Op | None
    graph: Callable[[Op], Op]
    names: dict[str, str]

    def attention_layer(self, *inputs: Any) -> Any:
        """reference.attention_layer, of the arguments of attention_input, the output matrix and the mask."""
        composed = partial(reference.attention_layer, parts=(self.attention_input, self.attention, self.linear_add))
        return (self.fused_layer or composed)(*inputs)

    @property
    def capturable(self) -> bool:
        """Whether forward and backward of the model may be captured in a CUDA graph: our kernels never wait."""
        return {self.names[op] for op in _MODEL} <= {"triton", "fp8"}

    def require(self, model_dim: int, head_dim: int, rope_dims: int, softcap: float) -> None:
        """Raise KernelError where Triton kernels were chosen that do not take a model of these sizes."""
        chosen = {op for op, implementation in self.names.items() if implementation in ("triton", "fp8")}
        limits = (
            ({"attention", "attention_input", "cached_attention"}, head_dim in HEAD_DIMS, f"heads of {head_dim}",
             f"one of {HEAD_DIMS}"),
            ({"attention_input"}, (rope_dims // 2).bit_count() == 1, f"rope_dims={rope_dims}", "twice a power of two"),
            ({"attention_input", "embed", "mlp", "rms_norm"}, model_dim % 16 == 0 and model_dim <= 1024,
             f"model_dim={model_dim}", "a multiple of 16 up to 1024"),
            ({"linear_cross_entropy"}, 0 < softcap <= 64, f"logit_softcap={softcap}", "at most 64"),
        )  # fmt: skip
        for ops, met, found, wanted in limits:
            if not met and ops & chosen:
                names = ", ".join(sorted(ops & chosen))
                raise KernelError(f"{found}: the Triton kernels of {names} want {wanted}; or kernels=compiled")

    def reproducible(self) -> Ops:
        """These, with gradients summed in a fixed order where they are not: again is the same, to the bit."""
        if self.names["attention"] != "triton":
            return self
        fused = self.fused_layer and partial(self.fused_layer, deterministic=True)
        return replace(self, attention=partial(self.attention, deterministic=True), fused_layer=fused)

    def describe(self) -> str:
        """One line an op: its name and the implementation in use."""
        return "\n".join(f"  {op:22s}{name}" for op, name in self.names.items())


# What "auto" is on a GPU.
AUTO = "triton"

_OPS = tuple(field.name for field in fields(Ops) if field.name not in ("fused_layer", "graph", "names"))
# Those of forward and backward: all before the optimizer's.
_MODEL = _OPS[: _OPS.index("newton_schulz")]
# An attention implementation and the mask it takes go together.
_PAIRED = {"attention": "attention_mask"}
# The model's attention takes packed heads, as the product before it writes them.
_FUNCTION = {"attention": "attention_qkv"}

# Implementations of each base. Ops that `compiled` does not name are the reference inside the compiled graph; fp8 is no
# base, but of mlp alone.
IMPLEMENTATIONS: dict[str, Callable[[torch.device], dict[str, Op]]] = {
    "reference": lambda device: {op: _named(reference, op) for op in _OPS},
    "compiled": lambda device: {op: _named(_compiled(), op) or _named(reference, op) for op in _OPS},
    "triton": lambda device: _triton(),
    "fp8": lambda device: _fp8(device),
}


def _named(module: ModuleType, op: str) -> Any:
    return getattr(module, _FUNCTION.get(op, op), None)


def _compiled() -> ModuleType:
    # Here, so that a start without torch.compile does not take seconds to import it.
    from kernels import compiled

    return compiled


def _triton() -> dict[str, Op]:
    # Here, so that what needs no GPU needs no Triton.
    from kernels import (
        attention,
        attention_input,
        cached_attention,
        cross_entropy,
        embedding,
        gptq,
        int6,
        matmul,
        mlp,
        newton_schulz,
        optimizer,
        residual,
    )

    return {
        "embed": embedding.embed,
        "attention_input": attention_input.attention_input,
        "attention_mask": attention.document_starts,
        "attention": attention.attention_qkv,
        "linear_add": matmul.linear_add,
        "mlp": mlp.mlp,
        "rms_norm": residual.rms_norm,
        "linear_cross_entropy": cross_entropy.linear_cross_entropy,
        "newton_schulz": newton_schulz.newton_schulz,
        "muon_momentum": optimizer.muon_momentum,
        "muon_update": optimizer.muon_update,
        "adamw_update": optimizer.adamw_update,
        "int6_dequantise": int6.int6_dequantise,
        "int6_linear": int6.int6_linear,
        "gptq_block": gptq.gptq_block,
        "cached_attention": cached_attention.cached_attention,
    }


def _fp8(device: torch.device) -> dict[str, Op]:
    exact, fp8 = reference.mlp, reference.mlp_fp8
    if device.type == "cuda":
        if not INTERPRET and (found := torch.cuda.get_device_capability(device)) < (8, 9):
            raise KernelError(f"mlp=fp8 wants a GPU of compute capability 8.9 or later; found {found[0]}.{found[1]}")
        from kernels import mlp

        exact, fp8 = mlp.mlp, mlp.mlp_fp8

    def while_training(*arguments: Any) -> Any:
        return (fp8 if torch.is_grad_enabled() else exact)(*arguments)

    return {"mlp": while_training}


def select(choice: str, device: torch.device) -> Ops:
    """The ops of `choice` on `device`.

    choice: "auto" (Triton on a GPU, reference on a CPU) or a base (reference, compiled, triton), followed by any number
    of overrides ",op=implementation". Raises KernelError where an implementation does not exist; there is no
    falling back.
    """
    if choice.split(",")[0].strip() == "auto":
        choice = choice.replace("auto", AUTO if device.type == "cuda" else "reference", 1)
    base, *overrides = (part.strip() for part in choice.split(","))
    chosen = dict.fromkeys(_OPS, base)
    for override in overrides:
        op, _, implementation = override.partition("=")
        if op not in chosen or op in _PAIRED.values():
            known = ", ".join(name for name in _OPS if name not in _PAIRED.values())
            raise KernelError(f"kernels={choice}: there is no op {op!r} to choose; wanted one of {known}")
        chosen[op] = chosen[_PAIRED.get(op, op)] = implementation
    if base == "reference" and "compiled" in chosen.values():
        raise KernelError(f"kernels={choice}: nothing is compiled on a reference base; wanted kernels=compiled,OP=...")
    for implementation in chosen.values():
        if implementation not in IMPLEMENTATIONS:
            raise KernelError(f"kernels={choice}: {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if unknown := [op for op, implementation in chosen.items() if implementation == "fp8" and op != "mlp"]:
        raise KernelError(f"kernels={choice}: {unknown[0]} has no fp8; wanted BASE,mlp=fp8")
    if (
        "compiled" in chosen.values()
        and device.type == "cpu"
        and not any(map(which, (os.environ.get("CXX", "g++"), "clang++")))
    ):
        raise KernelError(
            f"kernels={choice}: torch.compile wants a C++ compiler on a CPU; found neither g++ nor clang++"
        )
    if "triton" in chosen.values() and device.type != "cuda" and not INTERPRET:
        raise KernelError(
            f"kernels={choice}: Triton kernels run on a GPU, or interpreted with TRITON_INTERPRET=1; "
            f"found device {device.type}"
        )
    tables = {implementation: IMPLEMENTATIONS[implementation](device) for implementation in set(chosen.values())}
    table = {op: tables[implementation][op] for op, implementation in chosen.items()}
    fused: Op | None = None
    if {chosen[op] for op in ("attention_input", "attention", "linear_add")} == {"triton"}:
        from kernels import attention_input

        fused = attention_input.attention_layer
    # Fused kernels leave a graph nothing to fuse, and cost no compilation when the layers change.
    graph = _compiled().graph if base == "compiled" else lambda function: function
    return Ops(**table, fused_layer=fused, graph=graph, names=chosen)
