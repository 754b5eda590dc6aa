"""A model that runs from its artifact's codes: in memory its matrices take six bits a weight, its embedding eight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gpt.config import Config
from gpt.gptq import INPUTS, LEVELS, QuantisationError, Quantised
from gpt.model import GPT, Matrices, Product
from kernels import Ops, reference


class Matrix(NamedTuple):
    """gain * (codes * scales), row by row."""

    codes: Tensor  # (rows, 3, Q) uint8 of reference.pack_codes, or (rows, columns) int8
    scales: Tensor  # (rows,) float16
    gain: Tensor | None  # (rows,) float32; None: 1
    columns: int

    def dequantise(self, ops: Ops, dtype: torch.dtype) -> Tensor:  # (rows, columns)
        weight: Tensor = ops.int6_dequantise(self.codes, self.scales, self.gain, self.columns, dtype)
        return weight


class Unpacked(Sequence[Tensor]):
    """Matrices of which each is dequantised whenever it is asked for."""

    def __init__(self, matrices: Sequence[Matrix], ops: Ops, dtype: torch.dtype) -> None:
        self.matrices, self.ops, self.dtype = matrices, ops, dtype

    def __len__(self) -> int:
        return len(self.matrices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return Unpacked(self.matrices[index], self.ops, self.dtype)
        return self.matrices[index].dequantise(self.ops, self.dtype)


def _matrix(*parts: tuple[Quantised, int], gain: Tensor | None = None) -> Matrix:
    """Matrices of banks, by their places, one below the other; packed where the codes of all have six bits."""
    codes = torch.cat([bank.codes[i] for bank, i in parts])
    scales = torch.cat([bank.scales[i] for bank, i in parts]).half()
    if all(LEVELS[bank.kind] <= LEVELS["int6"] for bank, _ in parts):
        return Matrix(reference.pack_codes(codes), scales, gain, codes.size(-1))
    return Matrix(codes.contiguous(), scales, gain, codes.size(-1))


class PackedGPT(GPT):
    """GPT on quantised matrices, without gradients. Every weight that it multiplies by is GPT's, bit for bit.

    tensors: every parameter, those of INPUTS quantised. A forward pass dequantises one matrix after the other;
    `products` multiplies by the codes themselves. Raises QuantisationError where a matrix is not quantised.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Quantised | Tensor],
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, ops, dtype)
        self.names = [name for name, _ in self.named_parameters()]
        banks: dict[str, Quantised] = {}
        for name in self.names:
            value = tensors[name]
            if isinstance(value, Quantised):
                shape = (-1, *value.codes.shape[-2:])
                codes, scales = value.codes.view(shape), value.scales.view(shape[:-1])
                banks[name] = Quantised(value.kind, codes.to(device), scales.to(device))
                delattr(self, name)
            elif name in INPUTS:
                raise QuantisationError(f"{name} is {value.dtype}: a packed model wants it quantised")
            else:
                setattr(self, name, nn.Parameter(value.to(device, torch.float32), requires_grad=False))
        qo, kv, up, down = (banks[name] for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"))
        count = config.num_layers
        self.packed = {
            "qkv": [_matrix((qo, i), (kv, i), (kv, count + i)) for i in range(count)],
            "o": [_matrix((qo, count + i), gain=self.attn_scale[i]) for i in range(count)],
            "up": [_matrix((up, i)) for i in range(count)],
            "down": [_matrix((down, i), gain=self.mlp_scale[i]) for i in range(count)],
            "head": [_matrix((banks["tok_emb"], 0))],
        }
        self.eval()

    def matrices(self) -> Matrices:
        return Matrices(*(Unpacked(self.packed[kind], self.ops, self.dtype) for kind in Matrices._fields))

    def embedding(self, tokens: Tensor | None = None) -> Tensor:
        (head,) = self.packed["head"]
        if tokens is None:
            return head.dequantise(self.ops, torch.float32)
        rows = tokens.flatten()
        few = head._replace(codes=head.codes[rows], scales=head.scales[rows])
        return few.dequantise(self.ops, torch.float32).view(*tokens.shape, -1)

    def products(self) -> Product:
        def product(kind: str, layer: int, x: Tensor) -> Tensor:
            codes, scales, gain, _ = self.packed[kind][layer]
            y: Tensor = self.ops.int6_linear(x, codes, scales, gain)
            return y

        return product

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """GPT's, in its order: float32, each dequantised when its turn comes."""
        for name in self.names:
            yield getattr(self, name) if name not in INPUTS else nn.Parameter(self._weight(name), requires_grad=False)

    def _weight(self, name: str) -> Tensor:
        def bank(kind: str, begin: int = 0, end: int | None = None) -> Tensor:
            plain = (matrix._replace(gain=None) for matrix in self.packed[kind])
            return torch.stack([matrix.dequantise(self.ops, torch.float32)[begin:end] for matrix in plain])

        dim, kv_dim = self.config.model_dim, self.config.num_kv_heads * self.config.head_dim
        if name == "qo_bank":
            return torch.cat((bank("qkv", 0, dim), bank("o")))
        if name == "kv_bank":
            return torch.cat((bank("qkv", dim, dim + kv_dim), bank("qkv", dim + kv_dim)))
        return {"mlp_up_bank": lambda: bank("up"), "mlp_down_bank": lambda: bank("down")}.get(name, self.embedding)()
