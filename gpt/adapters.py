"""Low-rank changes of a model's matrices, other ones for every row of a batch, learnt and applied side by side.

    y = x W^T + (x A^T) B^T      x (n, T, K); W (N, K) shared; A (n, rank, K) and B (n, N', rank) of each row

N' are some consecutive rows of W, or all. The product with W is one for all tokens and W has no gradient; the low-rank
parts are batched products that add in place, in the backward too:

    dz = dy B,   dx = dy W + dz A,   dA = dz^T x,   dB = dy^T z      with z = x A^T

The model is GPT itself: `adapting` gives it ops that take `Adapted` where others take a matrix. Norms, mixes, rotary
and attention are those of the ops that it had; products are cuBLAS's, since no fused kernel lets anything in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import Config
from gpt.model import GPT, Matrices
from kernels import Ops, reference


class Adapted(NamedTuple):
    """A matrix as the ops of `adapting` take it."""

    weight: Tensor  # (N, K)
    a: Tensor  # (n, rank, K)
    b: Tensor  # (n, N', rank)
    first: int = 0  # of the N' rows of the matrix that change


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, first: int, residual: Tensor | None) -> Any:
        z = torch.bmm(x, a.mT)
        y = F.linear(x, weight) if residual is None else torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.mT)
        y = y.view(*x.shape[:2], -1)
        y.narrow(2, first, b.size(1)).baddbmm_(z, b.mT)
        ctx.first, ctx.added = first, residual is not None
        ctx.save_for_backward(x, z, a, b, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, z, a, b, weight = ctx.saved_tensors
        part = dy.narrow(2, ctx.first, b.size(1))
        dz = torch.bmm(part, b)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, weight).baddbmm_(dz, a)
        return dx, torch.bmm(dz.mT, x), torch.bmm(part.mT, z), None, None, dy if ctx.added else None


class _Activation(torch.autograd.Function):
    """leaky_relu(u, 0.5)^2, of which h = leaky_relu(u, 0.5) is kept: the derivative is 2 leaky_relu(h, 0.5)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Any:
        h = F.leaky_relu(u, 0.5)
        ctx.save_for_backward(h)
        return h.square()

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return F.leaky_relu(h, 0.5).mul_(da).mul_(2)


def _heads(
    qkv: Tensor,  # (n, T, H + 2 G, d)
    gain: Tensor,  # (H,)
    cos: Tensor,  # (T, R/2)
    sin: Tensor,  # (T, R/2)
) -> Tensor:  # as qkv
    """The raw product as attention takes it: reference.qk_norm_rotary of its queries and keys."""
    kv_heads = _kv_heads(qkv, gain)
    q, k, v = qkv.split((gain.size(0), kv_heads, kv_heads), dim=2)
    return torch.cat((*reference.qk_norm_rotary(q, k, gain, cos, sin), v), dim=2)


class _TritonHeads(torch.autograd.Function):
    """_heads by the Triton kernels, in place: nothing else reads the raw product. The gain has no gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Any:
        from kernels import rotary

        rows, ctx.length = qkv.flatten(0, 1), qkv.size(1)
        scale = torch.ones(rows.size(0), device=qkv.device)
        inverse = rotary.qkv_forward(rows, gain, cos, sin, scale, _kv_heads(qkv, gain), ctx.length)
        heads = qkv.detach()
        ctx.save_for_backward(heads, gain, cos, sin, inverse, scale)
        return heads

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from kernels import rotary

        qkv, gain, cos, sin, inverse, scale = ctx.saved_tensors
        arguments = (gain, cos, sin, inverse, scale, _kv_heads(qkv, gain), ctx.length)
        raw, _ = rotary.qkv_backward(grad.flatten(0, 1).contiguous(), qkv.flatten(0, 1), *arguments)
        return raw.view_as(qkv), None, None, None


def _kv_heads(qkv: Tensor, gain: Tensor) -> int:
    return (qkv.size(2) - gain.size(0)) // 2


def linear(
    x: Tensor,  # (n, T, K)
    matrix: Adapted,
    residual: Tensor | None = None,  # (n, T, N)
) -> Tensor:  # (n, T, N)
    """x times the transposed matrix, plus the residual; differentiable in x, A, B and the residual."""
    y: Tensor = _Product.apply(x, matrix.a, matrix.b, matrix.weight, matrix.first, residual)
    return y


def adapting(ops: Ops) -> Ops:
    """These ops with an Adapted wherever they take a matrix."""
    mix: Callable[..., Tensor] = _mix
    heads: Callable[..., Tensor] = _heads
    if ops.names["attention_input"] == "triton":
        from kernels import residual

        mix, heads = residual.residual_mix, _TritonHeads.apply

    def attention_input(
        x: Tensor, x0: Tensor, mixing: Tensor, skip: Any, matrix: Adapted, gain: Tensor, cos: Tensor, sin: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        came, x = x, mix(x, x0, mixing, *(skip or ()))
        qkv = linear(ops.rms_norm(x, scale), matrix).unflatten(-1, (-1, x.size(-1) // gain.size(0)))
        return heads(qkv, gain, cos, sin), x, x0, came

    def mlp(x: Tensor, up: Adapted, down: Adapted, scale: float, squares: None) -> Tensor:
        hidden: Tensor = _Activation.apply(linear(ops.rms_norm(x, scale), up))
        return linear(hidden, down, x)

    return replace(
        ops.reproducible(),
        attention_input=attention_input,
        fused_layer=None,
        linear_add=lambda x, y, matrix: (linear(y, matrix, x), None),
        mlp=mlp,
        linear_cross_entropy=reference.linear_cross_entropy,  # of few rows each, with a gradient
        graph=lambda function: function,
    )


def _mix(x: Tensor, x0: Tensor, mixing: Tensor, *skip: Tensor) -> Tensor:
    return reference.residual_mix(reference.skip_mix(x, *skip) if skip else x, x0, mixing)


class Adapters:
    """A model, and what its adapters are: of keys, output projections and the whole MLP, in every physical layer.

    A set of adapters of n rows is a dict, NAME.a (n, layers, rank, columns) and NAME.b (n, layers, rows, rank) for each
    of four banks. They begin with random A, the same for every row, and zero B.
    """

    def __init__(self, model: GPT, rank: int, scale: float, seed: int) -> None:
        # Every row is of one document: no mask.
        config: Config = model.config.model_copy(update={"document_mask": False})
        with torch.device("meta"):
            self.model = GPT(config, adapting(model.ops), model.dtype)
        self.model.load_state_dict({name: x.detach() for name, x in model.state_dict().items()}, assign=True)
        self.model.requires_grad_(False)
        self.base, self.scale = self.model.matrices(), scale
        dim, kv_dim, layers = config.model_dim, config.num_kv_heads * config.head_dim, config.num_layers
        shapes = {
            "kv_bank": (kv_dim, dim),
            "qo_bank": (dim, dim),
            "mlp_up_bank": (config.mlp_dim, dim),
            "mlp_down_bank": (dim, config.mlp_dim),
        }
        generator, device = torch.Generator().manual_seed(seed), model.tok_emb.device
        kind = torch.promote_types(model.dtype, torch.float32)
        self.start = {}
        for name, (rows, columns) in shapes.items():
            a = torch.randn(layers, rank, columns, generator=generator) * columns**-0.5
            self.start[f"{name}.a"] = a.to(device, kind)
            self.start[f"{name}.b"] = torch.zeros(layers, rows, rank, device=device, dtype=kind)

    def matrices(self, adapters: dict[str, Tensor]) -> Matrices:
        """What GPT.hidden takes, differentiable in the adapters."""
        model, dtype = self.model, self.model.dtype

        def adapted(weights: Any, name: str, rows_scale: Tensor | None = None, first: int = 0) -> list[Adapted]:
            b = adapters[f"{name}.b"] * (self.scale if rows_scale is None else self.scale * rows_scale[:, :, None])
            matrices = zip(weights, adapters[f"{name}.a"].to(dtype).unbind(1), b.to(dtype).unbind(1), strict=True)
            return [Adapted(*matrix, first) for matrix in matrices]

        return Matrices(
            adapted(self.base.qkv, "kv_bank", first=model.config.model_dim),
            adapted(self.base.o, "qo_bank", model.attn_scale),
            adapted(self.base.up, "mlp_up_bank"),
            adapted(self.base.down, "mlp_down_bank", model.mlp_scale),
        )

    def losses(
        self,
        adapters: dict[str, Tensor],
        tokens: Tensor,  # (n, T) int64
        targets: Tensor,  # (n, N) int64, of the last N positions
        depth: Sequence[int],
    ) -> Tensor:  # (n, N) float32 or float64
        """Cross-entropy in nats under each row's adapters."""
        rotary = self.model.rotary(tokens.size(1))
        x = self.model.hidden(tokens, depth, rotary, last=targets.size(1), matrices=self.matrices(adapters))
        weight, softcap = self.model.tok_emb.to(self.model.dtype), self.model.config.logit_softcap
        return reference.linear_cross_entropy(x, weight, targets, softcap, reduction="none")
