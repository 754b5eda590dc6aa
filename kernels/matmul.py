"""Products with what surrounds them in their epilogue, so that no separate pass over the result is made.

    up_forward       a = square(leaky_relu(r_m (x up^T), 0.5))            x (M, D), up (F, D), r of the rows of x
    product_add      out = x + y w^T                                      x (M, N), y (M, K), w (N, K)
    down_backward    du = (dy down) (da/du) r_m                           dy (M, D), down (D, F), a (M, F)
    up_backward      dx = dy + du up - c_m x                              du (M, F), up (F, D), x (M, D)
    qkv_forward      q, k, v of r_m (x w^T)                               the formulas of `rotary.py`; heads of 64
    exclusive_backward  grad_y, delta, x of `attention.py`, g = dx w      dx (M, N), w (N, K); two heads of 64 a KV head
    softcap_forward  e s (1 - s) of x w^T and sums of e                   x (M, D), w (V, D); e, s: `cross_entropy.py`
    up_forward_fp8   f_n s and, in e4m3, a8 = s / 448^3, s = square(leaky_relu(x8 up8^T, 0.5)), f of columns
    product_add_fp8  out = x + (y8 w8^T) f_n                              x8, up8, y8, w8 and factors as in `mlp.py`

r = scale / sqrt(mean(x^2) + eps) is the row's factor of an RMS norm without weights: a norm in front of a product is a
factor behind it, and the normalised x is never written. The sum of a row's squares is left behind by the product that
writes x, in parts, one for each 128 columns. In the gradient of that norm stands
c = mean((du up) x) / (mean(x^2) + eps). The sum over a row of (du up) x is that of du (x up^T) = (dy down) u da/du, and
u da/du = 2 a, for a is homogeneous of degree two: down_backward, which holds dy down and a, leaves these sums too, and
no pass over du up is needed.

One tensor is kept of the activation: a >= 0, and the last mantissa bit of its bf16 holds the sign of u (1 is negative),
so that da/du = 2 sqrt(a) or -sqrt(a) comes back from a alone while the products that read a need not know. a is rounded
once, from float32, to the nearest bf16 of that parity: its root mean square error is 2 units of u / sqrt(12), under the
sqrt(5) of an eager chain that rounds u and its square.

Shapes: all matrices contiguous, bf16 or fp16, sums in float32; w of down_backward and up_backward is read as it lies,
without a transposed copy. linear_add is product_add with its gradients. Work 2 M N K FLOPs; traffic: every matrix once
(bf16, M 98304, D 512, F 2048: 0.50 GB for up_forward, 0.60 for product_add, 0.91 for down_backward, 0.70 for
up_backward). Any M, N, K; with rows that are not a multiple of 16 bytes the portable kernel runs.

`matmul_hopper.py` holds the kernel for compute capability 9.0; the one below is for every other GPU and the
interpreter (there, and for other heads, qkv_forward is a product and then `rotary.py`'s kernel; softcap_forward and
exclusive_backward are Hopper's alone, and what fits says which shapes). Products without an epilogue are cuBLAS's.
"""

import torch
import triton
import triton.language as tl

from kernels import matmul_hopper, rotary
from kernels.launch import DTYPES, expect, gpu, settings
from kernels.matmul_epilogue import activation_fp8, matmul_epilogue, row_terms, softcap_gradient
from kernels.reference import RMS_EPS

_RMS_EPS = tl.constexpr(RMS_EPS)


# ------------------------------------------------------------------------------------------------ portable kernel
@triton.jit
def matmul_kernel(
    x, w, out, small, extra, other, row_scale, column_scale, sums, own, M, N, K, stride_xm, stride_wn, stride_wk,
    EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    o_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    o_row = o_m[:, None].to(tl.int64)
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(x + o_row * stride_xm + o_k[None, :], mask=m_m & (o_k[None, :] < K), other=0.0)
        # [BLOCK_K, BLOCK_N]
        b_w = tl.load(w + o_k[:, None] * stride_wk + o_n[None, :] * stride_wn, mask=(o_k[:, None] < K) & m_n, other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    b_extra = None
    if extra is not None:
        b_extra = tl.load(extra + o_row * N + o_n[None, :], mask=m_m & m_n, other=0.0)
    b_other = None
    if other is not None:
        b_other = tl.load(other + o_row * N + o_n[None, :], mask=m_m & m_n, other=0.0)
    b_scale = None
    if row_scale is not None:
        b_scale = tl.load(row_scale + o_m, mask=o_m < M, other=0.0)[:, None]
    if column_scale is not None:
        b_scale = tl.load(column_scale + o_n, mask=o_n < N, other=0.0)[None, :]
    if EPILOGUE == "activation_fp8":
        b_out, b_small = activation_fp8(b_acc, b_scale, out.dtype.element_ty)
        tl.store(small + o_row * N + o_n[None, :], b_small, mask=m_m & m_n)
    elif EPILOGUE == "softcap":
        b_out, b_terms = softcap_gradient(b_acc, own, x.dtype.element_ty)
        b_terms = tl.where(m_n, b_terms, 0.0)
    else:
        b_out = matmul_epilogue(b_acc, b_extra, b_other, b_scale, EPILOGUE, out.dtype.element_ty)
    if out is not None:
        tl.store(out + o_row * N + o_n[None, :], b_out, mask=m_m & m_n)
    if sums is not None:
        if EPILOGUE != "softcap":
            b_terms = row_terms(b_acc, b_extra, b_out, EPILOGUE)
        tl.store(sums + tl.program_id(0) % tiles_n * M + o_m, tl.sum(b_terms, 1), mask=o_m < M)


@triton.jit
def row_factor_kernel(parts, forward, out, M, dim, scale, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """r from the squares of rows; or, where r is given, c from the sums of down_backward."""
    o_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o_m < M
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(PARTS):
        b_sum += tl.load(parts + i * M + o_m, mask=mask, other=0.0)
    if forward is None:
        b_out = scale * tl.rsqrt(b_sum / dim + _RMS_EPS)
    else:
        b_rstd = tl.load(forward + o_m, mask=mask, other=0.0) / scale
        b_out = b_sum * (2.0 / dim) * b_rstd * b_rstd
    tl.store(out + o_m, b_out, mask=mask)


# ------------------------------------------------------------------------------------------------------- launching
def parts_of(columns: int) -> int:
    """How many partial sums of its rows a product of so many columns leaves; the tiles of every kernel are as wide."""
    return triton.cdiv(columns, 128)


def _product(
    x: torch.Tensor,  # (M, K)
    w: torch.Tensor,  # (N, K), or (K, N) where not transposed
    epilogue: str,
    transposed: bool = True,
    extra: torch.Tensor | None = None,  # (M, N)
    other: torch.Tensor | None = None,  # (M, N)
    row_scale: torch.Tensor | None = None,  # (M,) float32
    leave_sums: bool = False,
    dtype: torch.dtype | None = None,  # of the result; default: that of x
    column_scale: torch.Tensor | None = None,  # (N,) float32
    small: torch.Tensor | None = None,  # (M, N) e4m3, written
    own: tuple | None = None,  # of the epilogues "exclusive" and "softcap"
    keep: bool = True,  # the result and not its sums alone
) -> tuple[torch.Tensor, torch.Tensor | None]:  # (M, N) or, where not kept, (0, N); sums (parts, M) float32
    (rows, inner), columns = x.shape, w.shape[0 if transposed else 1]
    out = torch.empty((rows if keep else 0, columns), dtype=dtype or x.dtype, device=x.device)
    written = out if keep else None
    sums = torch.empty((parts_of(columns), rows), dtype=torch.float32, device=x.device) if leave_sums else None
    configs = settings("matmul", x.device)
    assert not leave_sums or {config.get("BLOCK_N", 128) for config in configs.values()} == {128}  # parts_of
    if "streaming" in configs and matmul_hopper.copyable(x, w, written, extra, small):
        beside, processors = (other, row_scale, column_scale, sums), gpu(x.device)[1]
        matmul_hopper.launch(x, w, written, extra, beside, epilogue, transposed, configs, processors, own, small=small)
        return out, sums
    portable = configs["portable"]
    grid = (triton.cdiv(rows, portable["BLOCK_M"]) * triton.cdiv(columns, portable["BLOCK_N"]),)
    matmul_kernel[grid](
        x, w, written, small, extra, other, row_scale, column_scale, sums, own, rows, columns, inner,
        x.stride(0), *(w.stride() if transposed else w.stride()[::-1]), EPILOGUE=epilogue, **portable,
    )  # fmt: skip
    return out, sums


def _row_factor(parts: torch.Tensor, forward: torch.Tensor | None, dim: int, scale: float) -> torch.Tensor:
    out = torch.empty(parts.shape[1], dtype=torch.float32, device=parts.device)
    config = settings("matmul", parts.device)["row_factor"]
    grid = (triton.cdiv(out.numel(), config["BLOCK"]),)
    row_factor_kernel[grid](parts, forward, out, out.numel(), dim, scale, PARTS=parts.shape[0], **config)
    return out


def norm_factor(
    squares: torch.Tensor,  # (parts, M) float32
    dim: int,  # of the rows
    scale: float,
) -> torch.Tensor:  # (M,) float32
    """r = scale / sqrt(mean(x^2) + eps) from sums of squares."""
    return _row_factor(squares, None, dim, scale)


def up_forward(
    x: torch.Tensor,  # (M, D)
    up: torch.Tensor,  # (F, D)
    row_scale: torch.Tensor,  # (M,) float32: r
) -> torch.Tensor:  # (M, F)
    """square(leaky_relu(r (x up^T), 0.5)), the sign of its root in the last mantissa bit."""
    return _product(x, up, "activation", row_scale=row_scale)[0]


def product_add(
    y: torch.Tensor,  # (M, K)
    w: torch.Tensor,  # (N, K)
    x: torch.Tensor,  # (M, N)
    squares: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # (M, N), and if wanted the squares (parts, M) float32 of its rows
    """x + y w^T, rounded once."""
    return _product(y, w, "residual", extra=x, leave_sums=squares)


def up_forward_fp8(
    x8: torch.Tensor,  # (M, D) e4m3
    up8: torch.Tensor,  # (F, D) e4m3
    factor: torch.Tensor,  # (F,) float32
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # (M, F) dtype, (M, F) e4m3
    """s = square(leaky_relu(x8 up8^T, 0.5)) times the factor, with the sign as of up_forward; and e4m3 of s / 448^3."""
    a8 = torch.empty((x8.shape[0], up8.shape[0]), dtype=x8.dtype, device=x8.device)
    return _product(x8, up8, "activation_fp8", dtype=dtype, column_scale=factor, small=a8)[0], a8


def product_add_fp8(
    y8: torch.Tensor,  # (M, K) e4m3
    w8: torch.Tensor,  # (N, K) e4m3
    factor: torch.Tensor,  # (N,) float32
    x: torch.Tensor,  # (M, N)
) -> torch.Tensor:  # (M, N)
    """x + (y8 w8^T) factor, rounded once."""
    return _product(y8, w8, "residual", extra=x, dtype=x.dtype, column_scale=factor)[0]


def down_backward(
    dy: torch.Tensor,  # (M, D)
    down: torch.Tensor,  # (D, F)
    a: torch.Tensor,  # (M, F) of up_forward
    row_scale: torch.Tensor,  # (M,) float32: r
) -> tuple[torch.Tensor, torch.Tensor]:  # (M, F), (parts, M) float32
    """Gradient of x up^T, (dy down) da/du r; and what up_backward wants, sums of (dy down) a over a row's columns."""
    du, sums = _product(dy, down, "derivative", False, extra=a, row_scale=row_scale, leave_sums=True)
    assert sums is not None
    return du, sums


def up_backward(
    du: torch.Tensor,  # (M, F) of down_backward
    up: torch.Tensor,  # (F, D)
    x: torch.Tensor,  # (M, D)
    dy: torch.Tensor,  # (M, D)
    sums: torch.Tensor,  # (parts, M) float32 of down_backward
    row_scale: torch.Tensor,  # (M,) float32: r
    scale: float,  # of r
) -> torch.Tensor:  # (M, D)
    """Gradient of x: dy, and what comes back through product and norm."""
    factor = _row_factor(sums, row_scale, x.shape[1], scale)
    return _product(du, up, "norm", False, extra=dy, other=x, row_scale=factor)[0]


def softcap_fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU has softcap_forward for such rows and head: as dtype, shapes, strides and device say it."""
    resident = settings("matmul", x.device).get("resident")
    return (
        resident is not None
        and x.dtype == torch.bfloat16  # fp16 holds no exp(64)
        and matmul_hopper.fits(x.shape[1], resident)
        and weight.shape[0] % resident["BLOCK_N"] == 0
        and x.shape[1] % 8 == 0
        and x.stride(0) % 8 == 0
    )


def softcap_forward(
    x: torch.Tensor,  # (M, D), the last dimension contiguous
    weight: torch.Tensor,  # (V, D)
    factors: tuple[float, float],  # -2 log2(e) / K, K log2(e)
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # (M, V) or, without gradient, (0, V); (parts, M) float32
    """exp(c) s (1 - s) of the logits x weight^T, and sums of exp(c) over 128 columns each."""
    numerators, sums = _product(x, weight, "softcap", leave_sums=True, own=factors, keep=gradient)
    assert sums is not None
    return numerators, sums


def qkv_forward(
    x: torch.Tensor,  # (M, D)
    weight: torch.Tensor,  # ((H + 2G) d, D): rows of q, then k, then v
    row_scale: torch.Tensor,  # (M,) float32
    gain: torch.Tensor,  # (H,) float32
    cos: torch.Tensor,  # (T or more, R/2) float32
    sin: torch.Tensor,  # (T or more, R/2) float32
    kv_heads: int,
    length: int,  # T
) -> tuple[torch.Tensor, torch.Tensor]:  # qkv (M, H + 2G, d), inv_rms (M, H + G) float32
    """Attention's input, as `rotary.qkv_forward` makes of the product x weight^T, in the product's epilogue."""
    heads = gain.numel()
    shape = (x.shape[0], heads + 2 * kv_heads, weight.shape[0] // (heads + 2 * kv_heads))
    configs = settings("matmul", x.device)
    if not (
        "resident" in configs
        and matmul_hopper.fits(x.shape[1], configs["resident"])
        and matmul_hopper.copyable(x, weight)
        and shape[2] == 64
        and cos.shape[1] >= 8  # so that a thread holds both values of a rotated pair
    ):
        qkv = torch.mm(x, weight.T).view(shape)
        return qkv, rotary.qkv_forward(qkv, gain, cos, sin, row_scale, kv_heads, length)
    qkv = torch.empty(shape, dtype=x.dtype, device=x.device)
    inv_rms = torch.empty((x.shape[0], heads + kv_heads), dtype=torch.float32, device=x.device)
    matmul_hopper.launch(
        x, weight, qkv.flatten(1), None, (None, row_scale, None, None), "heads", True, configs, gpu(x.device)[1],
        own=(gain, cos, sin, inv_rms, length, heads, heads + kv_heads), half=cos.shape[1],
    )  # fmt: skip
    return qkv, inv_rms


def exclusive_fits(
    dx: torch.Tensor,  # (B, T, N)
    weight: torch.Tensor,  # (N, H d)
    z: torch.Tensor,  # (B, T, H, d)
    v: torch.Tensor,  # (B, T, G, d)
) -> bool:
    """Whether a GPU has exclusive_backward for these."""
    configs = settings("matmul", dx.device)
    _, length, heads, head_dim = z.shape
    return (
        "resident" in configs
        and matmul_hopper.fits(weight.shape[0], configs["resident"])
        and z.is_contiguous()
        and matmul_hopper.copyable(dx.view(-1, dx.shape[-1]), weight, z.view(-1, weight.shape[1]))
        and length % 128 == 0  # rows of s without padding, and no tile in two rows of the batch
        and head_dim == 64
        and configs["resident"]["BLOCK_N"] == 64 * heads // v.shape[2]
        and v.stride() == (length * v.stride(1), v.stride(1), head_dim, 1)
    )


def exclusive_backward(
    dx: torch.Tensor,  # (B, T, N)
    weight: torch.Tensor,  # (N, H d)
    z: torch.Tensor,  # (B, T, H, d)
    s: torch.Tensor,  # (B, H, T) float32
    v: torch.Tensor,  # (B, T, G, d)
    grad_v: torch.Tensor,  # (B, T, G, d), written: XSA's part
) -> tuple[torch.Tensor, torch.Tensor]:  # grad_y (B, T, H, d), delta (B, H, T) float32
    """Back through attention's output product and XSA, of whose gradient z's is rounded nowhere."""
    delta = torch.empty_like(s)
    own = (v, s, grad_v, delta, v.stride(1), grad_v.stride(1), z.shape[1], z.shape[2])
    rows, attended = dx.view(-1, dx.shape[-1]), z.view(-1, weight.shape[1])
    return _product(rows, weight, "exclusive", False, extra=attended, own=own)[0].view_as(z), delta


# ---------------------------------------------------------------------------------------------------- registration
@torch.library.custom_op("golf::linear_add", mutates_args=())
def linear_add_op(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, squares = product_add(y.flatten(0, -2), weight, x.flatten(0, -2), squares=True)
    assert squares is not None
    return out.view_as(x), squares


@linear_add_op.register_fake
def _(x, y, weight):
    columns = x.shape[-1]
    return torch.empty_like(x), x.new_empty((parts_of(columns), x.numel() // columns), dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g, _):
    if g is None:
        return None, None, None
    y, weight = ctx.saved_tensors
    return g, g @ weight, g.flatten(0, -2).T @ y.flatten(0, -2)


linear_add_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------- public
def linear_add(
    x: torch.Tensor,  # (..., N)
    y: torch.Tensor,  # (..., K)
    weight: torch.Tensor,  # (N, K)
) -> tuple[torch.Tensor, torch.Tensor]:  # (..., N), (parts, rows) float32
    """x + y weight^T, rounded once; differentiable in x, y and weight. All contiguous, all bf16 or all fp16.

    Also the sums of squares of its rows, one of each 128 columns, for the norm of `mlp`; they carry no gradient."""
    if x.dim() < 2 or weight.shape != (x.shape[-1], y.shape[-1]) or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "linear_add wants x (..., N), y (..., K), weight (N, K); "
            f"got x {tuple(x.shape)}, y {tuple(y.shape)}, weight {tuple(weight.shape)}"
        )
    expect("linear_add", x=(x, x.shape, DTYPES), y=(y, y.shape, x.dtype), weight=(weight, weight.shape, x.dtype))
    out, squares = torch.ops.golf.linear_add(x, y, weight)
    return out, squares
