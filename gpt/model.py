"""The model: banks of matrices, and depth recurrence as a list of layer indices. Equations: README, "The model"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import BOS, Config
from kernels import Ops, reference

# Parameters that Muon trains: 3-D, one matrix a layer and use. Every other parameter is the embedding or a vector.
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")

# Called with the kind of matrix ("qkv", "o", "up", "down", "head"), the physical layer (0 for the head) and the
# matrix's input (B, T, columns).
Tap = Callable[[str, int, Tensor], None]
# x (..., columns) times the transpose of a matrix, of such a kind and physical layer.
Product = Callable[[str, int, Tensor], Tensor]


class Matrices(NamedTuple):
    """What the ops of a forward pass multiply by, a matrix a physical layer: tensors, or whatever those ops know."""

    qkv: Sequence[Any]  # ((H + 2 G) d, D): rows of q, then k, then v
    o: Sequence[Any]  # (D, D), rows times attn_scale
    up: Sequence[Any]  # (F, D)
    down: Sequence[Any]  # (D, F), rows times mlp_scale


def orthogonal_(bank: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill each matrix of bank (N, rows, columns) with a random semi-orthogonal one; the whole bank in one QR."""
    count, rows, columns = bank.shape
    normal = torch.randn(count, max(rows, columns), min(rows, columns), generator=generator)
    q, r = torch.linalg.qr(normal)
    q *= r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    bank.copy_(q if rows >= columns else q.mT)


class GPT(nn.Module):
    """The network of a Config. Parameters are float32 masters; `dtype` is the type of activations and products.

    Shapes, with L layers, D model_dim, H heads of d, G KV heads, S skips: tok_emb (vocab, D); qo_bank (2L, D, D), q's
    then o's; kv_bank (2L, G d, D), k's then v's; mlp_up_bank (L, F, D); mlp_down_bank (L, D, F); smear_gate (D,);
    skip_weights and skip_gates (S, D); attn_scale and mlp_scale (L, D); resid_mix (L, 2, D); q_gain (L, H).
    Raises KernelError where the ops do not take these sizes.
    """

    def __init__(self, config: Config, ops: Ops, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.ops, self.dtype = config, ops, dtype
        ops.require(config.model_dim, config.head_dim, config.rope_dims, config.logit_softcap)
        layers, dim, kv_dim = config.num_layers, config.model_dim, config.num_kv_heads * config.head_dim
        self.tok_emb = nn.Parameter(torch.zeros(config.vocab_size, dim))
        self.qo_bank = nn.Parameter(torch.zeros(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.zeros(2 * layers, kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(torch.zeros(layers, config.mlp_dim, dim))
        self.mlp_down_bank = nn.Parameter(torch.zeros(layers, dim, config.mlp_dim))
        self.smear_gate = nn.Parameter(torch.zeros(dim))
        self.skip_weights = nn.Parameter(torch.ones(config.num_skips, dim))
        self.skip_gates = nn.Parameter(torch.zeros(config.num_skips, dim))
        self.attn_scale = nn.Parameter(torch.ones(layers, dim))
        self.mlp_scale = nn.Parameter(torch.ones(layers, dim))
        # Not repeat: of a meta tensor, as where an artifact is read, it takes 0.7 s to import sympy.
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0])[None, :, None].expand(layers, 2, dim).contiguous())
        self.q_gain = nn.Parameter(torch.full((layers, config.num_heads), config.qk_gain_init))
        self._rotary: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def initialise(self, seed: int) -> GPT:
        """Random weights from a seed: embedding normal, q, k, v and up orthogonal, o and down zero."""
        generator = torch.Generator().manual_seed(seed)
        self.tok_emb.normal_(std=self.config.tied_embed_init_std, generator=generator)
        for bank in (self.qo_bank[: self.config.num_layers], self.kv_bank, self.mlp_up_bank):
            orthogonal_(bank, generator)
        return self

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin of positions below `length`, each (length, rope_dims / 2) float32.

        Rows shorter than the configured length keep its angles, so that a row's tail reads as in a whole row.
        """
        context = max(length, self.config.train_seq_len)
        device = self.smear_gate.device
        key = context, device
        if key not in self._rotary:
            self._rotary[key] = reference.rotary_table(
                context, self.config.rope_dims, self.config.rope_base, context, device
            )
        cos, sin = self._rotary[key]
        return cos[:length], sin[:length]

    def matrices(self) -> Matrices:
        """In the dtype of products. Banks are cast once and split into views once: the backward is one stack a bank,
        however often it is used. Scales folded into output matrices cost activations nothing."""
        layers, dtype, qo, kv = self.config.num_layers, self.dtype, self.qo_bank, self.kv_bank
        return Matrices(
            torch.cat((qo[:layers], kv[:layers], kv[layers:]), dim=1).to(dtype).unbind(),
            (self.attn_scale[:, :, None] * qo[layers:]).to(dtype).unbind(),
            self.mlp_up_bank.to(dtype).unbind(),
            (self.mlp_scale[:, :, None] * self.mlp_down_bank).to(dtype).unbind(),
        )

    def embedding(self, tokens: Tensor | None = None) -> Tensor:  # (..., D) float32
        """The rows of tokens (...); without tokens all of them, (vocab, D)."""
        return self.tok_emb if tokens is None else F.embedding(tokens, self.tok_emb)

    def products(self) -> Product:
        """By the matrices as they are now; ("head", 0) is the embedding."""
        head = self.embedding().to(self.dtype)
        of_kind: dict[str, Sequence[Tensor]] = {**self.matrices()._asdict(), "head": (head,)}
        return lambda kind, layer, x: F.linear(x, of_kind[kind][layer])

    def hidden(
        self,
        tokens: Tensor,  # (B, T) int64
        depth: Sequence[int],  # physical index of each virtual layer
        rotary: tuple[Tensor, Tensor],  # of self.rotary(T)
        tap: Tap | None = None,
        last: int | None = None,  # how many positions of each row are wanted, from its end; default: all
        matrices: Matrices | None = None,  # default: self.matrices()
    ) -> Tensor:  # (B, last, D)
        """Normalised output of the last layer: what the head multiplies.

        The last layer is only worked out where it is wanted; of the other positions it takes keys and values.
        """
        config, ops, dtype = self.config, self.ops, self.dtype
        qkv, o, up, down = matrices or self.matrices()
        mix, gain = self.resid_mix.unbind(), self.q_gain.unbind()
        skips = list(zip(self.skip_weights.unbind(), self.skip_gates.unbind(), strict=True))

        starts = tokens == BOS if config.document_mask else None
        mask = None if starts is None else ops.attention_mask(starts)
        x = x0 = ops.embed(tokens, self.embedding(), self.smear_gate, starts, dtype)
        saved: list[Tensor] = []  # outputs of the first half's layers, as the layer after each hands them on
        half = len(depth) // 2
        for virtual, i in enumerate(depth):
            layer_scale = (i + 1) ** -0.5
            j = virtual - half
            if 0 < virtual == half:
                saved.append(x)
            skip = (saved.pop(), *skips[j]) if 0 <= j < config.num_skips and saved else None

            inputs = x, x0, mix[i], skip, qkv[i], gain[i], *rotary, layer_scale
            tail = last if last and last < tokens.size(1) and virtual == len(depth) - 1 else None
            if tail or tap:
                heads, x, x0, before = ops.attention_input(*inputs)
                # Its backward would add up in no fixed order, so what is differentiated goes through the ops.
                if tail and not torch.is_grad_enabled():
                    y = reference.attention_tail(heads, config.num_kv_heads, tail, starts)
                else:
                    y = ops.attention(heads, config.num_kv_heads, mask)
                y = y.flatten(2)
                if tail:
                    x, y = x[:, -tail:].contiguous(), y[:, -tail:].contiguous()
                if tap:
                    tap("qkv", i, reference.rms_norm(x, layer_scale))
                    tap("o", i, y)
                x, squares = ops.linear_add(x, y, o[i])
            else:
                x, squares, x0, before = ops.attention_layer(*inputs, o[i], mask)
            if 0 < virtual < half:
                saved.append(before)

            if tap:
                h = reference.rms_norm(x, layer_scale)
                tap("up", i, h)
                tap("down", i, reference.mlp_hidden(h, up[i]))
            x = ops.mlp(x, up[i], down[i], layer_scale, squares)
        x = ops.rms_norm(x)
        if tap:
            tap("head", 0, x)
        return x

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor,  # (B, T) int64
        depth: Sequence[int],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:  # ()
        """Mean cross-entropy in nats."""
        x = self.hidden(tokens, depth, rotary)
        return self.ops.linear_cross_entropy(x, self.embedding().to(self.dtype), targets, self.config.logit_softcap)

    def losses(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor,  # (B, N) int64: of the last N positions
        depth: Sequence[int],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:  # (B, N) float32
        """Cross-entropy in nats of each of the last N positions of every row."""
        x = self.hidden(tokens, depth, rotary, last=targets.size(1))
        weight = self.embedding().to(self.dtype)
        return self.ops.linear_cross_entropy(x, weight, targets, self.config.logit_softcap, reduction="none")

    def logits(self, tokens: Tensor, depth: Sequence[int], rotary: tuple[Tensor, Tensor]) -> Tensor:  # (B, V) float32
        """Softcapped logits of the last position of every row."""
        x = self.hidden(tokens, depth, rotary, last=1)[:, -1]
        return reference.logits(x, self.embedding().to(self.dtype), self.config.logit_softcap)
