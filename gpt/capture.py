"""Forward and backward of a micro-step, as one CUDA graph where the ops allow it: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.model import GPT

# (tokens, targets, depth, weight) -> weight times their mean loss, (); adds its gradients to the parameters' .grad
MicroStep = Callable[[Tensor, Tensor, tuple[int, ...], float], Tensor]


def micro_step(model: GPT, rotary: tuple[Tensor, Tensor], depths: Sequence[tuple[int, ...]] = ()) -> MicroStep:
    """Forward and backward of `model`: captured where its ops never wait for the host, else through their graph.

    depths: those that will be asked for, as far as they are known.
    """
    if model.ops.capturable and rotary[0].is_cuda:
        return Captured(model, rotary, depths)
    function = model.ops.graph(model)

    def plain(tokens: Tensor, targets: Tensor, depth: tuple[int, ...], weight: float) -> Tensor:
        loss: Tensor = function(tokens, targets, depth, rotary) * weight
        loss.backward()
        return loss.detach()

    return plain


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    targets: Tensor
    loss: Tensor
    gradients: list[Tensor]  # of the parameters, in order


class Captured:
    """A MicroStep that captures at its first call with a shape, depth and weight, and replays from then on.

    A step's first micro-step has a graph of its own: it writes gradients where the others add to them. They lie where
    the graph put them, so a step has to use them up, and set `.grad` to None, before the next begins, as Optimizer.step
    does. All graphs share their memory. Hooks of parameters do not run.

    Before its capture a depth runs once as it is, so that all its kernels are compiled; all of `depths` do so before
    the first capture: beside the memory that graphs keep, a run would need that of a step once more.
    """

    def __init__(self, model: GPT, rotary: tuple[Tensor, Tensor], depths: Sequence[tuple[int, ...]] = ()) -> None:
        self.model, self.rotary, self.depths = model, rotary, tuple(depths)
        self.parameters = list(model.parameters())
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._compiled: set[tuple[object, ...]] = set()  # shapes of tokens and depths
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, tokens: Tensor, targets: Tensor, depth: tuple[int, ...], weight: float) -> Tensor:
        held = self.parameters[0].grad
        key = (tokens.shape, depth, weight, None if held is None else held.data_ptr())
        if key not in self._graphs:
            self._graphs[key] = self._capture(tokens.clone(), targets.clone(), depth, weight)
        found = self._graphs[key]
        found.tokens.copy_(tokens)
        found.targets.copy_(targets)
        found.graph.replay()
        for parameter, gradient in zip(self.parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return found.loss.clone()

    def _capture(self, tokens: Tensor, targets: Tensor, depth: tuple[int, ...], weight: float) -> _Graph:
        held = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for each in (*self.depths, depth):
                if (tokens.shape, each) not in self._compiled:
                    self._run(tokens, targets, each, weight)
                    self._compiled.add((tokens.shape, each))
        graph = torch.cuda.CUDAGraph()
        # Other threads (data, NCCL) go on meanwhile, and what they call is none of this capture's business.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            loss, gradients = self._run(tokens, targets, depth, weight)
            if held:
                torch._foreach_add_(held, gradients)
        return _Graph(graph, tokens, targets, loss, held or gradients)

    def _run(
        self, tokens: Tensor, targets: Tensor, depth: tuple[int, ...], weight: float
    ) -> tuple[Tensor, list[Tensor]]:
        loss: Tensor = self.model(tokens, targets, depth, self.rotary) * weight
        return loss.detach(), [g.contiguous() for g in torch.autograd.grad(loss, self.parameters)]
