"""The reference ops as torch.compile takes them: Inductor fuses the plain ones, attention goes to cuDNN or FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask, dynamic=False)


def attention_mask(
    starts: Tensor,  # (B, T) bool
) -> BlockMask:
    """Causal mask within documents as FlexAttention's blocks: blocks outside a document are skipped."""
    document = starts.cumsum(1)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[b, query] == document[b, key])

    rows, length = starts.shape
    return create_block_mask(visible, rows, None, length, length, device=str(starts.device), _compile=False)


def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, G, D)
    v: Tensor,  # (B, T, G, D)
    mask: BlockMask | None = None,
) -> Tensor:  # (B, T, H, D)
    """reference.attention through cuDNN (dense, on a GPU) or FlexAttention (document mask)."""
    heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None:
        y = flex_attention(*heads, block_mask=mask, enable_gqa=True)
    elif q.is_cuda:
        # Named alone, so that a shape or type that cuDNN cannot take is an error and not a slow kernel.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    else:
        y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return reference.exclusive(y.transpose(1, 2), v)


newton_schulz = graph(reference.newton_schulz)
