"""The ops under torch.compile: Inductor fuses the reference's; attention goes to cuDNN or FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernels import reference


def graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one compiled graph; a graph break is an error, other shapes compile anew."""
    return torch.compile(function, fullgraph=True, dynamic=False)


_exclusive = graph(reference.exclusive)  # alone where attention is compiled in a graph of other kernels


def attention_mask(
    starts: Tensor,  # (B, T) bool, True on the first token of a document
) -> BlockMask | Tensor:
    """Causal mask within documents. On a GPU as FlexAttention's blocks, so that blocks outside a document are skipped.

    On a CPU it is the reference's: FlexAttention there is wrong within this graph (torch 2.13).
    """
    if not starts.is_cuda:
        return reference.attention_mask(starts)
    document = starts.cumsum(1)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[b, query] == document[b, key])

    rows, length = starts.shape
    return create_block_mask(visible, rows, None, length, length, device=starts.device.type)


def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, G, D)
    v: Tensor,  # (B, T, G, D)
    mask: BlockMask | Tensor | None = None,
) -> Tensor:  # (B, T, H, D)
    """reference.attention through cuDNN (dense) or FlexAttention (document mask) on a GPU."""
    if not q.is_cuda:
        assert not isinstance(mask, BlockMask)
        return reference.attention(q, k, v, mask)
    heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, BlockMask):
        y = flex_attention(*heads, block_mask=mask, enable_gqa=True)
        assert isinstance(y, Tensor)
    else:
        # Named alone, so that a shape or type that cuDNN cannot take is an error and not a slow kernel.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return _exclusive(y.transpose(1, 2), v)


def attention_qkv(
    qkv: Tensor,  # (B, T, H + 2 G, D)
    kv_heads: int,
    mask: BlockMask | Tensor | None = None,
) -> Tensor:  # (B, T, H, D)
    """attention of packed heads."""
    q, k, v = qkv.split((qkv.size(2) - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    return attention(q, k, v, mask)


newton_schulz = graph(reference.newton_schulz)
