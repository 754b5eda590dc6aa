"""Tokens to the first residual stream: row of the table, RMS norm, smear; and the gradient of table and gate.

    e_t = w[token_t] / sqrt(mean(w[token_t]^2) + eps)
    x0_t = (1 - a) e_t + a c_t e_{t-1},   a = sigmoid(gate),   c_t = 0 at the first token of a row or a document, else 1

Backward, for the gradient d of x0. e depends on its token alone, so sums over tokens come first and the norm's
gradient is taken once a row of the table, not once a token. For token v, with r_v = 1 / sqrt(mean(w_v^2) + eps):

    A_v = sum over t of token v of d_t,   B_v = sum over t of token v of c_{t+1} d_{t+1},   S_v = (1 - a) A_v + a B_v
    dw_v = r_v (S_v - e_v mean(S_v e_v)),   dgate = a (1 - a) sum_v e_v (B_v - A_v)

Shapes: tokens (B, T) int64 below V, weight (V, D) float32, gate (D,) float32, starts (B, T) bool, x0 (B, T, D) in
bf16 or fp16, D a multiple of 16 up to 1024. Arithmetic in float32 from the float32 table, rounded once. Forward: one
pass written, the table read through the L2 cache. Backward: two passes read, no gradient a token written.

The sums are deterministic: tokens are sorted (stable), each program adds PIECE consecutive places in order, and the
sums of a token that lies in several pieces are added in order by the next kernel: of a token's thousands of places that
one reads only one sum a piece.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import DTYPES, expect, programs, settings
from kernels.reference import RMS_EPS
from kernels.residual import MAX_DIM, column_sum, row_sum, tile, tile_columns

_RMS_EPS = tl.constexpr(RMS_EPS)


# --------------------------------------------------------------------------------------------------------- kernels
# A row is [1, PARTS, WIDTH], in the registers of one warp: see residual.tile_columns.
@triton.jit
def embed_normed(tokens, weight, i, m_i, o_d, m_d, D: tl.constexpr):
    """e of the i-th token, zero where m_i is false."""
    b_token = tl.load(tokens + i, mask=m_i, other=0)
    b_e = tl.load(weight + b_token * D + o_d, mask=m_i & m_d, other=0.0)
    return b_e * tl.rsqrt(row_sum(b_e * b_e) / D + _RMS_EPS)


@triton.jit
def embed_fwd_kernel(
    tokens, weight, gate, starts, out, M, T, D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS tokens in a row: the e of each is read once and serves two."""
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    b_gate = tl.sigmoid(tl.load(gate + o_d, mask=m_d, other=0.0))
    begin = tl.program_id(0) * STEPS
    b_before = embed_normed(tokens, weight, begin - 1, begin > 0, o_d, m_d, D)
    for step in tl.static_range(STEPS):
        i = begin + step
        b_e = embed_normed(tokens, weight, i, i < M, o_d, m_d, D)
        smeared = i % T != 0
        if starts is not None:
            smeared = smeared & (tl.load(starts + i, mask=i < M, other=1) == 0)
        b_out = b_e + b_gate * (tl.where(smeared, b_before, 0.0) - b_e)
        p_out = out + i.to(tl.int64) * D + o_d
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=(i < M) & m_d)
        b_before = b_e


@triton.jit
def embed_bwd_load(dx0, places, starts, i, last, o_d, m_d, T, D: tl.constexpr):
    """d at the i-th place, d one token later, and whether that token is smeared with this one."""
    place = tl.load(places + i, mask=i < last, other=0)
    inside = (i < last) & ((place.to(tl.int32) + 1) % T != 0)
    smeared = inside
    if starts is not None:
        smeared = inside & (tl.load(starts + place + 1, mask=inside, other=1) == 0)
    p_d = dx0 + place * D + o_d
    b_own = tl.load(p_d, mask=(i < last) & m_d, other=0.0)
    b_next = tl.load(p_d + D, mask=inside & m_d, other=0.0)
    return b_own, b_next, smeared


@triton.jit
def embed_bwd_row(b_own, b_next, weight, dweight, token, b_gate, b_dgate, o_d, m_d, D: tl.constexpr):
    """From A and B of a token its row of dweight and, added to b_dgate, its share of dgate / (a (1 - a))."""
    o_w = tl.full([1, 1, 1], D, tl.int64) * token + o_d
    b_e = tl.load(weight + o_w, mask=m_d, other=0.0)
    b_rstd = tl.rsqrt(row_sum(b_e * b_e) / D + _RMS_EPS)
    b_e *= b_rstd
    b_s = b_own + b_gate * (b_next - b_own)
    tl.store(dweight + o_w, b_rstd * (b_s - b_e * (row_sum(b_s * b_e) / D)), mask=m_d)
    return b_dgate + b_e * (b_next - b_own)


@triton.jit
def embed_bwd_runs_kernel(
    dx0, ordered, places, starts, weight, gate, first, last, slots, dweight, partial, M, T,
    D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One piece of the sorted tokens. A run of equal ones that lies in it whole is finished here; the sums of one that
    began before go to the piece's slot 0, of one that only goes on after it to slot 1."""
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    b_gate = tl.sigmoid(tl.load(gate + o_d, mask=m_d, other=0.0))
    b_dgate = tl.zeros([1, PARTS, WIDTH], tl.float32)
    b_own_sum = tl.zeros([1, PARTS, WIDTH], tl.float32)
    b_next_sum = tl.zeros([1, PARTS, WIDTH], tl.float32)
    begin = tl.program_id(0) * PIECE
    end = tl.minimum(begin + PIECE, M)
    before = tl.load(ordered + begin - 1, mask=begin > 0, other=-1).to(tl.int32)
    token = tl.load(ordered + begin).to(tl.int32)
    began_here = (before != token).to(tl.int32)
    b_own, b_next, smeared = embed_bwd_load(dx0, places, starts, begin, end, o_d, m_d, T, D)
    for i in range(begin, end):
        # The next place's rows are on their way while this one's are added.
        b_own_1, b_next_1, smeared_1 = embed_bwd_load(dx0, places, starts, i + 1, end, o_d, m_d, T, D)
        b_own_sum += b_own.to(tl.float32)
        b_next_sum += tl.where(smeared, b_next.to(tl.float32), 0.0)
        after = tl.load(ordered + i + 1, mask=i + 1 < M, other=-1).to(tl.int32)
        if before != token:
            tl.store(first + token, i)
        if after != token:
            tl.store(last + token, i + 1)
        if (after != token) | (i + 1 == end):
            if (after != token) & (began_here == 1):
                b_dgate = embed_bwd_row(b_own_sum, b_next_sum, weight, dweight, token, b_gate, b_dgate, o_d, m_d, D)
            else:
                p_slot = slots + (tl.program_id(0).to(tl.int64) * 2 + began_here) * 2 * D + o_d
                tl.store(p_slot, b_own_sum, mask=m_d)
                tl.store(p_slot + D, b_next_sum, mask=m_d)
            b_own_sum = tl.zeros([1, PARTS, WIDTH], tl.float32)
            b_next_sum = tl.zeros([1, PARTS, WIDTH], tl.float32)
            began_here = 1
        before = token
        token = after
        b_own = b_own_1
        b_next = b_next_1
        smeared = smeared_1
    p_out = partial + tl.program_id(0).to(tl.int64) * D + o_d
    tl.store(p_out, b_dgate * b_gate * (1.0 - b_gate), mask=m_d)


@triton.jit
def embed_bwd_split_kernel(
    weight, gate, first, last, slots, dweight, partial, V,
    D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The rows of tokens that lie in several pieces, and zeros for tokens that do not occur."""
    o_d, m_d = tile_columns(D, PARTS, WIDTH)
    b_gate = tl.sigmoid(tl.load(gate + o_d, mask=m_d, other=0.0))
    b_dgate = tl.zeros([1, PARTS, WIDTH], tl.float32)
    for token in range(tl.program_id(0), V, tl.num_programs(0)):
        end = tl.load(last + token)
        piece_first = tl.load(first + token) // PIECE
        piece_last = tl.maximum(end - 1, 0) // PIECE
        if (end == 0) | (piece_last > piece_first):
            b_own = tl.zeros([ROWS, PARTS, WIDTH], tl.float32)
            b_next = tl.zeros([ROWS, PARTS, WIDTH], tl.float32)
            pieces = tl.where(end == 0, 0, piece_last - piece_first + 1)
            for i in range(0, pieces, ROWS):
                o_i = i + tl.arange(0, ROWS)[:, None, None]
                # The run began in its first piece, so it is that piece's slot 1, and slot 0 of those that follow.
                p_slot = slots + ((piece_first + o_i).to(tl.int64) * 2 + (o_i == 0)) * 2 * D + o_d
                b_own += tl.load(p_slot, mask=(o_i < pieces) & m_d, other=0.0)
                b_next += tl.load(p_slot + D, mask=(o_i < pieces) & m_d, other=0.0)
            b_dgate = embed_bwd_row(
                tl.sum(b_own, 0, keep_dims=True), tl.sum(b_next, 0, keep_dims=True),
                weight, dweight, token, b_gate, b_dgate, o_d, m_d, D,
            )  # fmt: skip
    p_out = partial + tl.program_id(0) * D + o_d
    tl.store(p_out, b_dgate * b_gate * (1.0 - b_gate), mask=m_d)


# ------------------------------------------------------------------------------------------------------- launching
def embed_forward(
    tokens: torch.Tensor,  # (B, T) int64
    weight: torch.Tensor,  # (V, D) float32
    smear_gate: torch.Tensor,  # (D,) float32
    starts: torch.Tensor | None,  # (B, T) bool
    dtype: torch.dtype,
) -> torch.Tensor:  # (B, T, D)
    out = torch.empty((*tokens.shape, weight.shape[1]), dtype=dtype, device=weight.device)
    config = settings("embedding", weight.device)["forward"]
    embed_fwd_kernel[(triton.cdiv(tokens.numel(), config["STEPS"]),)](
        tokens, weight, smear_gate, _bytes(starts), out, tokens.numel(), tokens.shape[1],
        **_row(weight.shape[1]), **config,
    )  # fmt: skip
    return out


def embed_backward(
    dx0: torch.Tensor,  # (B, T, D)
    tokens: torch.Tensor,  # (B, T) int64
    weight: torch.Tensor,  # (V, D) float32
    smear_gate: torch.Tensor,  # (D,) float32
    starts: torch.Tensor | None,  # (B, T) bool
) -> tuple[torch.Tensor, torch.Tensor]:  # dweight (V, D) float32, dgate (D,) float32
    (vocab, dim), rows, length, device = weight.shape, tokens.numel(), tokens.shape[1], weight.device
    dx0, starts = dx0.contiguous(), _bytes(starts)
    # 16-bit keys halve the passes of the sort.
    ordered, places = tokens.flatten().to(torch.int16 if vocab < 2**15 else torch.int32).sort(stable=True)
    first, last = torch.zeros((2, vocab), dtype=torch.int32, device=device)
    config = settings("embedding", device)
    runs, split = config["runs"], tile(config["split"], dim)
    pieces, count = triton.cdiv(rows, runs["PIECE"]), programs(config["split"]["per_sm"], vocab, device)
    slots = torch.empty((pieces, 2, 2, dim), dtype=torch.float32, device=device)
    partial = torch.empty((pieces + count, dim), dtype=torch.float32, device=device)
    dweight = torch.empty_like(weight)
    embed_bwd_runs_kernel[(pieces,)](
        dx0, ordered, places, starts, weight, smear_gate, first, last, slots, dweight, partial, rows, length,
        **_row(dim), **runs,
    )  # fmt: skip
    embed_bwd_split_kernel[(count,)](
        weight, smear_gate, first, last, slots, dweight, partial[pieces:], vocab, PIECE=runs["PIECE"], **split
    )
    return dweight, column_sum(partial)


def _row(dim: int) -> dict:
    """A tile's shape for one row."""
    shape = tile({"TILE": 1}, dim)
    del shape["ROWS"]
    return shape


def _bytes(starts: torch.Tensor | None) -> torch.Tensor | None:
    return None if starts is None else starts.view(torch.uint8)


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::embed", mutates_args=())
def embed_op(
    tokens: torch.Tensor, weight: torch.Tensor, smear_gate: torch.Tensor, starts: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return embed_forward(tokens, weight, smear_gate, starts, dtype)


@embed_op.register_fake
def _(tokens, weight, smear_gate, starts, dtype):
    return weight.new_empty((*tokens.shape, weight.shape[1]), dtype=dtype)


@torch.library.custom_op("golf::embed_backward", mutates_args=())
def embed_backward_op(
    dx0: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, smear_gate: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return embed_backward(dx0, tokens, weight, smear_gate, starts)


@embed_backward_op.register_fake
def _(dx0, tokens, weight, smear_gate, starts):
    return torch.empty_like(weight), torch.empty_like(smear_gate)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx, dx0):
    dweight, dgate = torch.ops.golf.embed_backward(dx0, *ctx.saved_tensors)
    return None, dweight, dgate, None, None


embed_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------- public
def embed(
    tokens: torch.Tensor,  # (B, T) int64
    weight: torch.Tensor,  # (V, D) float32
    smear_gate: torch.Tensor,  # (D,) float32
    starts: torch.Tensor | None,  # (B, T) bool, True on the first token of a document
    dtype: torch.dtype,
) -> torch.Tensor:  # (B, T, D)
    """reference.smear(reference.rms_norm(weight[tokens])), differentiable in weight and smear_gate.

    tokens (torch.Tensor):
        int64 ``[B, T]``, contiguous, each in 0..V-1 (not checked: that would wait for the GPU).
    weight, smear_gate (torch.Tensor):
        float32 ``[V, D]`` and ``[D]``, contiguous, D a multiple of 16 up to 1024.
    starts (torch.Tensor):
        bool ``[B, T]``, contiguous. ``None``: smear over the whole row.
    dtype (torch.dtype):
        Of the result: bf16 or fp16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"embed wants a dtype among {DTYPES}; got {dtype}")
    if weight.dim() != 2 or weight.shape[1] % 16 or not 16 <= weight.shape[1] <= MAX_DIM or weight.shape[0] >= 2**31:
        raise ValueError(f"embed wants weight (V, D), D a multiple of 16 up to {MAX_DIM}; got {tuple(weight.shape)}")
    if tokens.dim() != 2 or not 0 < tokens.numel() < 2**31:
        raise ValueError(f"embed wants tokens (B, T), none empty; got {tuple(tokens.shape)}")
    expect(
        "embed", tokens=(tokens, tokens.shape, torch.int64), weight=(weight, weight.shape, torch.float32),
        smear_gate=(smear_gate, weight.shape[1:], torch.float32), starts=(starts, tokens.shape, torch.bool),
    )  # fmt: skip
    return torch.ops.golf.embed(tokens, weight, smear_gate, starts, dtype)
