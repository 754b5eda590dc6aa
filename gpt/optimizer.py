"""Parallel Muon for the banks, AdamW for the rest, and the EMA of every weight. Source: docs of Muon (Keller Jordan),
parameter-golf pull requests 399 (banks) and 1285 (MuonEq-R)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from gpt.config import Config
from gpt.distributed import Ranks
from gpt.model import BANKS, GPT
from kernels import CLASSIC, POLAR_EXPRESS

# The names that torch 2.13 gives to what torch 2.11 has under the others.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def coefficients(name: str, steps: int) -> tuple[tuple[float, float, float], ...]:
    """Newton-Schulz coefficients of `steps` iterations; name: "classic" or "polar-express"."""
    table: Sequence[tuple[float, float, float]] = (CLASSIC,) if name == "classic" else POLAR_EXPRESS
    return tuple(table[min(i, len(table) - 1)] for i in range(steps))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "step() comes after backward()"
    return parameter.grad


@dataclass
class _Bank:
    """One bank of matrices (N, rows, columns) and this rank's share of it."""

    parameter: Tensor
    momentum: Tensor  # (share, rows, columns) float32
    update_scale: float

    @property
    def count(self) -> int:
        return self.parameter.size(0)

    @property
    def share(self) -> int:
        return self.momentum.size(0)


class Optimizer:
    """Optimizer of a GPT over all ranks; every rank ends each step with the same weights.

    A step: reduce-scatter (mean) of each bank's gradient along its first axis, largest first, and one all-reduce of
    all other gradients in a flat bucket; clip by the norm of the averaged gradient; AdamW; momentum, Nesterov and
    Newton-Schulz of each bank's share, and the all-gather of its update while the next is computed; EMA. Nothing in a
    step waits for the GPU. Banks are communicated in the model's dtype, everything else in float32.
    """

    def __init__(self, model: GPT, config: Config, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.coefficients = coefficients(config.newton_schulz, config.muon_backend_steps)
        parameters = dict(model.named_parameters())
        banks = []
        for name in BANKS:
            bank = parameters.pop(name)
            share = -(-bank.size(0) // ranks.world_size)
            momentum = torch.zeros(share, *bank.shape[1:], device=bank.device)
            banks.append(_Bank(bank, momentum, max(1.0, bank.size(1) / bank.size(2)) ** 0.5))
        self.banks = sorted(banks, key=lambda bank: -bank.parameter.numel())
        self.rest = list(parameters.values())
        embedding = parameters.pop("tok_emb")
        self.adamw = torch.optim.AdamW(
            [
                {"params": [embedding], "peak_lr": config.tied_embed_lr, "weight_decay": config.embed_wd},
                {"params": list(parameters.values()), "peak_lr": config.scalar_lr, "weight_decay": config.adam_wd},
            ],
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self.ema = [p.detach().clone() for p in model.parameters()]

    def momentum_at(self, step: int) -> float:
        """Muon's momentum: linear from its start to its end over the first muon_momentum_warmup_steps."""
        config = self.config
        done = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
        return config.muon_momentum_warmup_start + done * (config.muon_momentum - config.muon_momentum_warmup_start)

    @torch.no_grad()
    def step(self, step: int, lr_factor: float) -> Tensor:
        """Update weights and EMA from the gradients, which are freed. Returns the gradient norm before clipping, ()."""
        config = self.config
        shards, bucket = self._reduce()
        squares = torch.stack([g.float().square().sum() for g in shards]).sum()
        self.ranks.all_reduce(squares)
        norm = (squares + bucket.square().sum()).sqrt()
        clip = (config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0) if config.grad_clip_norm else norm.new_ones(())

        bucket.mul_(clip)
        for parameter, gradient in zip(self.rest, _unflatten_dense_tensors(bucket, self.rest), strict=True):
            parameter.grad = gradient
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self.adamw.step()

        momentum = self.momentum_at(step)
        gathered: list[tuple[_Bank, Tensor, Any]] = []
        for bank, gradient in zip(self.banks, shards, strict=True):
            u = self._direction(bank, gradient.float() * clip, momentum)
            gathered.append((bank, *self._gather(bank, u)))
            if len(gathered) > 1:
                self._apply(*gathered.pop(0), lr_factor)
        for item in gathered:
            self._apply(*item, lr_factor)
        torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1.0 - config.ema_decay)
        for p in self.model.parameters():
            p.grad = None
        return norm

    def _reduce(self) -> tuple[list[Tensor], Tensor]:
        """This rank's share of each bank's mean gradient, and the flat mean gradient of the rest (float32)."""
        bucket = _flatten_dense_tensors([_gradient(p) for p in self.rest])
        if self.ranks.world_size == 1:
            return [_gradient(bank.parameter) for bank in self.banks], bucket
        shards, works = [], []
        for bank in self.banks:
            gradient = _gradient(bank.parameter).to(self.model.dtype)
            padding = bank.share * self.ranks.world_size - bank.count
            if padding:
                gradient = torch.cat((gradient, gradient.new_zeros(padding, *gradient.shape[1:])))
            shard = gradient.new_empty(bank.momentum.shape)
            works.append(_reduce_scatter(shard, gradient, op=dist.ReduceOp.AVG, async_op=True))
            shards.append(shard)
        dist.all_reduce(bucket, op=dist.ReduceOp.AVG)
        for work in works:
            work.wait()
        return shards, bucket

    def _direction(self, bank: _Bank, gradient: Tensor, momentum: float) -> Tensor:
        """Orthogonalised Nesterov momentum of this rank's share, (share, rows, columns) in the model's dtype."""
        bank.momentum.mul_(momentum).add_(gradient)
        u = gradient.add(bank.momentum, alpha=momentum)
        if self.config.muon_row_norm:
            u = u / (u.norm(dim=-1, keepdim=True) + 1e-7)
        return self.model.ops.newton_schulz(u.to(self.model.dtype), self.coefficients)

    def _gather(self, bank: _Bank, u: Tensor) -> tuple[Tensor, Any]:
        if self.ranks.world_size == 1:
            return u, None
        whole = u.new_empty(bank.share * self.ranks.world_size, *u.shape[1:])
        return whole, _all_gather(whole, u.contiguous(), async_op=True)

    def _apply(self, bank: _Bank, update: Tensor, work: Any, lr_factor: float) -> None:
        if work is not None:
            work.wait()
        lr = self.config.matrix_lr * lr_factor
        bank.parameter.mul_(1.0 - lr * self.config.muon_wd)
        bank.parameter.add_(update[: bank.count].to(bank.parameter.dtype), alpha=-lr * bank.update_scale)

    def ema_state(self) -> dict[str, Tensor]:
        """The EMA weights by parameter name, float32."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.ema, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Whole state, the same for any world size. A collective: every rank calls it."""
        momentum = []
        for bank in self.banks:
            whole = bank.momentum
            if self.ranks.world_size > 1:
                whole = whole.new_empty(bank.share * self.ranks.world_size, *whole.shape[1:])
                _all_gather(whole, bank.momentum)
            momentum.append(whole[: bank.count])
        return {"momentum": momentum, "adamw": self.adamw.state_dict(), "ema": self.ema_state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict, of a run of any world size."""
        for bank, whole in zip(self.banks, state["momentum"], strict=True):
            mine = whole[self.ranks.rank * bank.share : (self.ranks.rank + 1) * bank.share]
            bank.momentum.zero_()
            bank.momentum[: mine.size(0)].copy_(mine)
        self.adamw.load_state_dict(state["adamw"])
        for name, ema in self.ema_state().items():
            ema.copy_(state["ema"][name])

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the state before the first step, with the EMA at the present weights."""
        for bank in self.banks:
            bank.momentum.zero_()
        self.adamw.state.clear()
        for ema, parameter in zip(self.ema, self.model.parameters(), strict=True):
            ema.copy_(parameter)
