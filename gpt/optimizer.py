"""Parallel Muon for the banks, AdamW for the rest, and the EMA of every weight. Source: docs of Muon (Keller Jordan),
parameter-golf pull requests 399 (banks) and 1285 (MuonEq-R)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.config import Config
from gpt.distributed import Ranks
from gpt.model import BANKS, GPT
from gpt.record import RecordError
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
    ema: Tensor
    momentum: Tensor  # (share, rows, columns) float32
    shard: Tensor  # this rank's share of the mean gradient, in the model's dtype
    whole: Tensor  # (share * ranks, rows, columns) in the model's dtype: gradients that leave, updates that arrive
    update_scale: float
    sent: Any = None  # the reduce-scatter under way

    @property
    def count(self) -> int:
        return self.parameter.size(0)

    @property
    def share(self) -> int:
        return self.momentum.size(0)


class Optimizer:
    """Optimizer of a GPT over all ranks; every rank ends each step with the same weights.

    A step: reduce-scatter (mean) of each bank's gradient along its first axis, from the backward on where hooks run
    (not in a captured one: after it), and one all-reduce of all other gradients in a flat bucket; clip by the norm of
    the averaged gradient; momentum, Nesterov and Newton-Schulz of this rank's share of all banks together; the
    all-gather of each bank's update, during which AdamW runs and the banks gathered before are updated. Every update
    takes the EMA along. Nothing in a step waits for the GPU, unless steps may be skipped, and all that changes from
    step to step beside the gradients are arguments of the ops' launches. Banks are communicated in the model's dtype,
    all else in float32.

    What can overlap: the model casts each bank once, before its layers, and autograd runs what was made first last. So
    the banks' gradients become final behind those of all layers and of the embedding, in the order mlp_down, mlp_up,
    kv, qo, and each is on its way while the next is still put together. bench.scaling has the times.
    """

    def __init__(self, model: GPT, config: Config, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.coefficients = coefficients(config.newton_schulz, config.muon_backend_steps)
        self.parameters = list(model.parameters())
        parameters = dict(model.named_parameters())
        rest = parameters.copy()
        banks = [self._bank(rest.pop(name)) for name in BANKS]
        self.banks = sorted(banks, key=lambda bank: -bank.parameter.numel())
        # The rest, which AdamW trains: the embedding, which comes first, and vectors. What belongs to them is flat.
        self.rest = list(rest.values())
        self.rest_ema = torch.cat([p.detach().flatten() for p in self.rest])
        # The order in which a state holds what belongs to them, banks first.
        order = sorted(BANKS, key=lambda name: -parameters[name].numel()) + list(rest)
        self.layout = [(name, tuple(parameters[name].shape)) for name in order]
        self.bucket, self.average, self.square = (torch.zeros_like(self.rest_ema) for _ in range(3))
        self.bucket_views = self._views(self.bucket)
        self.peak_lrs = [config.tied_embed_lr if name == "tok_emb" else config.scalar_lr for name in rest]
        self.weight_decays = [config.embed_wd if name == "tok_emb" else config.adam_wd for name in rest]
        self.steps = 0
        emas = {id(bank.parameter): bank.ema for bank in self.banks}
        emas |= dict(zip(map(id, self.rest), self._views(self.rest_ema), strict=True))
        self.ema = [emas[id(p)] for p in self.parameters]
        self._last = False  # whether the backward under way is the last of a step
        if ranks.world_size > 1:
            for bank in self.banks:
                bank.parameter.register_post_accumulate_grad_hook(lambda _, bank=bank: self._final(bank))

    def _bank(self, parameter: Tensor) -> _Bank:
        count, rows, columns = parameter.shape
        share = -(-count // self.ranks.world_size)
        momentum = parameter.detach().new_zeros(share, rows, columns)
        # A single rank sends nothing and needs no buffers.
        alone = self.ranks.world_size == 1
        dtype = self.model.dtype
        shard = momentum.new_empty(0 if alone else share, rows, columns, dtype=dtype)
        whole = momentum.new_zeros(0 if alone else share * self.ranks.world_size, rows, columns, dtype=dtype)
        return _Bank(parameter, parameter.detach().clone(), momentum, shard, whole, max(1.0, rows / columns) ** 0.5)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Of a flat buffer: what belongs to each parameter of the rest."""
        parts = flat.split([p.numel() for p in self.rest])
        return [part.view_as(p) for part, p in zip(parts, self.rest, strict=True)]

    def momentum_at(self, step: int) -> float:
        """Muon's momentum: linear from its start to its end over the first muon_momentum_warmup_steps."""
        config = self.config
        done = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
        return config.muon_momentum_warmup_start + done * (config.muon_momentum - config.muon_momentum_warmup_start)

    @contextmanager
    def sending(self, last: bool) -> Iterator[None]:
        """Around a backward: in the last of a step each bank's gradient leaves once it is final, in the graph's order,
        which is the same on every rank. Where no hooks run, as in a captured backward, step() sends them."""
        self._last = last
        yield
        self._last = False

    def _final(self, bank: _Bank) -> None:
        if self._last:
            self._send(bank)

    def _send(self, bank: _Bank) -> None:
        """Start the reduce-scatter of a bank's gradient."""
        bank.whole[: bank.count].copy_(_gradient(bank.parameter))
        bank.whole[bank.count :].zero_()
        bank.sent = _reduce_scatter(bank.shard, bank.whole, op=dist.ReduceOp.AVG, async_op=True)

    @torch.no_grad()
    def step(self, step: int, lr_factor: float) -> Tensor:
        """Update weights and EMA from the gradients, which are freed. Returns the gradient norm before clipping, ().

        With nonfinite="skip" nothing is updated where that norm is not finite: every rank has the same one.
        """
        config, ops = self.config, self.model.ops
        shards = self._reduce()
        norm = self._norm(shards)
        if config.nonfinite == "skip" and not norm.isfinite():  # waits for the device
            self._free()
            return norm
        clip = (config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0) if config.grad_clip_norm else norm.new_ones(())

        momenta = [bank.momentum for bank in self.banks]
        u = ops.muon_momentum(shards, momenta, clip, self.momentum_at(step), config.muon_row_norm, self.model.dtype)
        gathered = self._gather(ops.newton_schulz(u, self.coefficients))

        self.steps += 1
        ops.adamw_update(
            self.rest,
            self.bucket,
            self.average,
            self.square,
            self.rest_ema,
            clip,
            [lr * lr_factor for lr in self.peak_lrs],
            self.weight_decays,
            (config.beta1, config.beta2),
            config.adam_eps,
            self.steps,
            config.ema_decay,
        )
        for banks, updates, work in gathered:
            if work is not None:
                work.wait()
            ops.muon_update(
                [bank.parameter for bank in banks],
                updates,
                [bank.ema for bank in banks],
                config.matrix_lr * lr_factor,
                config.muon_wd,
                [bank.update_scale for bank in banks],
                config.ema_decay,
            )
        self._free()
        return norm

    def _free(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _reduce(self) -> list[Tensor]:
        """This rank's share of each bank's mean gradient; the bucket holds the mean gradient of the rest."""
        torch._foreach_copy_(self.bucket_views, [_gradient(p) for p in self.rest])
        if self.ranks.world_size == 1:
            return [_gradient(bank.parameter) for bank in self.banks]
        for bank in self.banks:
            if bank.sent is None:
                self._send(bank)
        dist.all_reduce(self.bucket, op=dist.ReduceOp.AVG)
        for bank in self.banks:
            bank.sent.wait()
            bank.sent = None
        return [bank.shard for bank in self.banks]

    def _norm(self, shards: list[Tensor]) -> Tensor:
        """Norm of the whole mean gradient, () float32, the same on every rank."""
        of_shards = torch.stack(torch._foreach_norm(shards, dtype=self.bucket.dtype))
        squares = self.ranks.all_reduce(torch.dot(of_shards, of_shards))
        of_rest = torch.linalg.vector_norm(self.bucket)
        return torch.addcmul(squares, of_rest, of_rest).sqrt_()

    def _gather(self, shares: list[Tensor]) -> list[tuple[list[_Bank], list[Tensor], Any]]:
        """The whole update of every bank from every rank's share: groups of banks, their updates, what to wait for."""
        if self.ranks.world_size == 1:
            return [(self.banks, [share.contiguous() for share in shares], None)]
        gathered = []
        for bank, share in zip(self.banks, shares, strict=True):
            work = _all_gather(bank.whole, share.contiguous(), async_op=True)
            gathered.append(([bank], [bank.whole[: bank.count]], work))
        return gathered

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
        adamw = {"steps": self.steps, "average": self.average, "square": self.square}
        return {"layout": self.layout, "momentum": momentum, "adamw": adamw, "ema": self.ema_state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict, of a run of any world size.

        Raises RecordError, before anything is copied, where it is of other parameters or has them in another order.
        """
        for found, wanted in zip_longest(state["layout"], self.layout):
            if found != wanted:
                raise RecordError(f"the optimizer's state is of {found}, wanted {wanted}")
        for bank, whole in zip(self.banks, state["momentum"], strict=True):
            mine = whole[self.ranks.rank * bank.share : (self.ranks.rank + 1) * bank.share]
            bank.momentum.zero_()
            bank.momentum[: mine.size(0)].copy_(mine)
        self.steps = state["adamw"]["steps"]
        self.average.copy_(state["adamw"]["average"])
        self.square.copy_(state["adamw"]["square"])
        for name, ema in self.ema_state().items():
            ema.copy_(state["ema"][name])

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the state before the first step, with the EMA at the present weights."""
        self.steps = 0
        for x in (self.average, self.square, *(bank.momentum for bank in self.banks)):
            x.zero_()
        for ema, parameter in zip(self.ema, self.parameters, strict=True):
            ema.copy_(parameter)
