"""What a product does with its float32 accumulators before they leave: shared by `matmul.py` and `matmul_hopper.py`."""

import triton
import triton.language as tl

from kernels.reference import E4M3_MAX

# Rows of length 448 that are parallel have a product of 448^2, and its square is to be 448.
_E4M3_SQUARE = tl.constexpr(E4M3_MAX**-3)


@triton.jit
def row_terms(b_acc, b_extra, b_out, EPILOGUE: tl.constexpr):
    """What the epilogue leaves sums of, over the columns of a tile."""
    if EPILOGUE == "derivative":
        b_terms = b_acc * b_extra.to(tl.float32)
    else:
        tl.static_assert(EPILOGUE == "residual")
        b_out = b_out.to(tl.float32)
        b_terms = b_out * b_out
    return b_terms


@triton.jit
def softcap_exponential(b_a, sigmoid_log2, softcap_log2):
    """s and exp(c) of raw logits a, as `cross_entropy.py` names them; the factors are -2 log2(e) / K and K log2(e)."""
    b_s = 1.0 / (1.0 + tl.exp2(b_a.to(tl.float32) * sigmoid_log2))
    return b_s, tl.exp2(b_s * (2.0 * softcap_log2) - softcap_log2)


@triton.jit
def softcap_gradient(b_a, factors, dtype: tl.constexpr):
    """exp(c) s (1 - s), and exp(c) in float32."""
    sigmoid_log2, softcap_log2 = factors
    b_s, b_e = softcap_exponential(b_a, sigmoid_log2, softcap_log2)
    return (b_e * (b_s - b_s * b_s)).to(dtype), b_e


@triton.jit
def sign_in_last_bit(b_value, b_signed, dtype: tl.constexpr):
    """Round value >= 0 to the nearest number of dtype whose last mantissa bit is the sign bit of signed, a float32."""
    b_sign = b_signed.to(tl.int32, bitcast=True) >> 15 & 0x10000
    if dtype == tl.bfloat16:
        # Such numbers are two units of bfloat16 apart: 2^17 in the bits of a float32. Other NaNs would overflow.
        b_bits = tl.minimum(b_value.to(tl.int32, bitcast=True), 0x7FC00000)
        b_bits = ((b_bits - b_sign + 0x10000) & -0x20000) | b_sign
        b_out = b_bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        integer: tl.constexpr = tl.int16 if dtype == tl.float16 else tl.int32
        b_near = b_value.to(dtype)
        b_bits = b_near.to(integer, bitcast=True)
        b_step = tl.where(b_near.to(tl.float32) <= b_value, 1, -1).to(integer)
        b_wrong = (b_bits & 1) != (b_sign >> 16).to(integer)
        b_out = tl.where(b_wrong, b_bits + b_step, b_bits).to(dtype, bitcast=True)
    return b_out


@triton.jit
def activation_fp8(b_acc, b_scale, dtype: tl.constexpr):
    """The activation, its square multiplied by b_scale; and in e4m3, its square over 448^3."""
    b_h = tl.maximum(b_acc, 0.5 * b_acc)
    b_square = b_h * b_h
    return sign_in_last_bit(b_square * b_scale, b_acc, dtype), (b_square * _E4M3_SQUARE).to(tl.float8e4nv)


@triton.jit
def matmul_epilogue(b_acc, b_extra, b_other, b_scale, EPILOGUE: tl.constexpr, dtype: tl.constexpr):
    if EPILOGUE == "activation":
        b_u = b_acc * b_scale
        b_h = tl.maximum(b_u, b_acc * (0.5 * b_scale))
        b_out = sign_in_last_bit(b_h * b_h, b_u, dtype)
    elif EPILOGUE == "derivative":
        integer: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
        b_negative = (b_extra.to(integer, bitcast=True) & 1) != 0
        b_h = tl.sqrt(b_extra.to(tl.float32))
        b_out = (b_acc * b_h * tl.where(b_negative, -b_scale, 2.0 * b_scale)).to(dtype)
    elif EPILOGUE == "norm":
        b_out = (b_acc - b_other.to(tl.float32) * b_scale + b_extra.to(tl.float32)).to(dtype)
    else:
        tl.static_assert(EPILOGUE == "residual")
        if b_scale is not None:
            b_acc = b_acc * b_scale
        b_out = (b_acc + b_extra.to(tl.float32)).to(dtype)
    return b_out
