"""mlp(), linear_add() and the products under them: against float64, in the interpreter and on a GPU; registration;
compiled kernels."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.runtime import interpreter

from kernels import matmul_hopper, reference, rotary
from kernels.launch import configs
from kernels.matmul import down_backward, linear_add, matmul_kernel, norm_factor, qkv_forward, up_forward
from kernels.mlp import down_fp8_kernel, mlp, mlp_fp8
from kernels.residual import norm_fwd_kernel, row_squares, tile
from tests.aot import compile_for_h100
from tests.kernel_tools import CUDA, compiled, error, gpu, graphed, interpreted

SCALE = 0.7


# ---------------------------------------------------------------------------------------------------------- oracle
def torch_mlp(x, up, down):
    """The reference: norm, hidden, product and residual, each rounded to the dtype of the inputs."""
    return x + F.linear(reference.mlp_hidden(reference.rms_norm(x, SCALE), up), down)


def torch_linear_add(x, y, weight):
    return x + F.linear(y, weight)


def make(shape, hidden, dtype, device, seed=0):
    """x, up, down and a gradient. The second row of x is zero, the third tiny."""
    generator = torch.Generator().manual_seed(seed)
    dim = shape[-1]
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    rows = x.flatten(0, -2)
    rows[1:2] = 0
    rows[2:3] *= 1e-4
    up, down = torch.randn(hidden, dim, generator=generator), torch.randn(dim, hidden, generator=generator)
    tensors = x, up / dim**0.5, down / hidden**0.5, g
    return [y.to(dtype).to(device) for y in tensors]


def run(f, *tensors):
    """Output and gradients of f, of all but the last tensor, for the last as the gradient of the output."""
    *inputs, g = tensors
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    out.backward(g)
    return out.detach(), *(x.grad for x in inputs)


def ours(x, up, down):
    return mlp(x, up, down, SCALE)


def our_linear_add(x, y, weight):
    """The sum; that its rows' squares are right too is asserted here."""
    out, squares = linear_add(x, y, weight)
    if not torch.compiler.is_compiling():
        truth = out.detach().double().square().sum(-1).flatten()
        assert ((squares.double().sum(0) - truth).abs() <= 1e-5 * truth).all()
    return out


def in_parts(x, up, down):
    """mlp, behind a product whose tiles leave the squares of its rows."""
    zero = torch.zeros(x.shape[-1], 16, dtype=x.dtype, device=x.device)
    x, squares = linear_add(x, torch.zeros_like(x[..., :16]), zero)
    return mlp(x, up, down, SCALE, squares)


NAMES = ("out", "grad_x", "grad_up", "grad_down")


# ------------------------------------------------------------------------------------------- on the CPU, interpreted
@interpreted
@pytest.mark.parametrize(("shape", "hidden"), [((2, 35, 48), 40), ((1, 16), 16), ((65, 32), 136)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_values(shape, hidden, dtype, poisoned):
    tensors = make(shape, hidden, dtype, "cpu")
    truth = run(torch_mlp, *(x.double() for x in tensors))
    for op in (ours, in_parts):
        for name, a, b, c in zip(NAMES, run(op, *tensors), truth, run(torch_mlp, *tensors), strict=True):
            assert error(a, b) <= min(error(c, b) * 1.05, 1e-6 if dtype == torch.float32 else 1e-3) + 1e-7, name


def fp8(x, up, down):
    return mlp_fp8(x, up, down, SCALE)


def reference_fp8(x, up, down):
    return reference.mlp_fp8(x, up, down, SCALE)


@pytest.fixture
def rounding_to_e4m3(monkeypatch):
    """Triton 3.6's interpreter loses the carry where a mantissa is rounded up to 2; and its maximum."""

    def convert(x, source, target, rounding):
        if tl.float8e4nv not in (source, target):
            return plain(x, source, target, rounding)
        x = torch.from_numpy(np.ascontiguousarray(x))
        if source == tl.float8e4nv:
            assert target == tl.float16
            return x.view(torch.float8_e4m3fn).half().numpy().view(np.uint16)
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    plain = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)


@interpreted
@pytest.mark.parametrize(("shape", "hidden"), [((2, 35, 48), 40), ((1, 16), 16), ((65, 32), 136)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_fp8(shape, hidden, dtype, poisoned, rounding_to_e4m3):
    """The reference's, which rounds the same numbers; the gradient of x alone takes what the norm gives it from a."""
    tensors = make(shape, hidden, dtype, "cpu")
    tensors[1][1], tensors[2][2] = 0, 0
    truth = run(reference_fp8, *(x.double() for x in tensors))
    for name, a, b in zip(NAMES, run(fp8, *tensors), truth, strict=True):
        assert error(a, b) <= (2e-3 if name == "grad_x" else 1e-6 if dtype == torch.float32 else 1e-3), name


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_linear_add(dtype, poisoned):
    x, weight, _, g = make((2, 35, 24), 24, dtype, "cpu")
    y = g.roll(1, 0)
    truth = run(torch_linear_add, *(t.double() for t in (x, y, weight, g)))
    for name, a, b in zip(NAMES, run(our_linear_add, x, y, weight, g), truth, strict=True):
        assert error(a, b) <= (1e-6 if dtype == torch.float32 else 1e-3), name


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_last_bit_is_the_sign(dtype):
    """Nearest number of that parity: within a unit of the last place, and the gradient comes back from it."""
    check_sign(dtype, "cpu")


def check_sign(dtype, device):
    """Square and derivative of u alone: the products are with the identity."""
    u = torch.cat((torch.linspace(-3, 3, 4001), torch.tensor([0.0, 1e-2, -1e-2]))).to(device)
    u = F.pad(u, (0, 4096 - u.numel())).view(-1, 16).to(dtype)
    eye = torch.eye(16, dtype=dtype, device=device)
    ones = torch.ones(u.shape[0], device=device)
    nothing = torch.full_like(u[:1], torch.nan)
    assert up_forward(nothing, eye, ones[:1]).isnan().all()
    a = up_forward(u, eye, ones)
    assert bool((a >= 0).all())
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal((a.view(integer) & 1).bool(), u < 0)
    truth = F.leaky_relu(u.double(), 0.5).square()
    unit = torch.finfo(dtype)
    eps = unit.eps * (2 if dtype == torch.float32 else 1)  # float32 rounds the square before
    assert bool(((a.double() - truth).abs() <= eps * truth + 2 * unit.smallest_normal * unit.eps).all())
    du, sums = down_backward(torch.ones_like(u), eye, a, ones)
    assert error(sums, a.double().sum(-1)[None]) < 1e-6
    slope = torch.where(u < 0, 0.5, 2.0).double() * u.double()
    assert bool(((du.double() - slope).abs() <= eps * slope.abs() + 2 * unit.smallest_normal**0.5).all())


@interpreted
def test_registration():
    x, up, down, _ = (t.requires_grad_() for t in make((2, 9, 16), 32, torch.float32, "cpu"))
    for op in (torch.ops.golf.mlp.default, torch.ops.golf.mlp_fp8.default):
        torch.library.opcheck(op, (x, row_squares(x), up, down, SCALE))
    torch.library.opcheck(torch.ops.golf.linear_add.default, (x, x.detach().clone().requires_grad_(), up[:16]))


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(24, 9)}, r"up \(24, 9\)"),
        ({"down": torch.zeros(24, 16)}, r"down \(D, F\)"),
        ({"down": torch.zeros(16, 24, dtype=torch.float64)}, "torch.float64"),
        ({"x": torch.zeros(16, 4).T}, "strides"),
        ({"squares": torch.zeros(4)}, r"squares \(parts, 4\); got \(4,\)"),
        ({"squares": torch.zeros(2, 3)}, r"squares \(2, 4\) torch.float32; got \(2, 3\)"),
        ({"x": torch.zeros(0, 16)}, "none empty"),
        ({"x": torch.zeros(4, 8), "up": torch.zeros(24, 8), "down": torch.zeros(8, 24)}, r"16 values .* \(4, 8\)"),
    ],
)
def test_errors_name_what_was_found(change, message):
    arguments = {"x": torch.zeros(4, 16), "up": torch.zeros(24, 16), "down": torch.zeros(16, 24)} | change
    for op in (mlp, mlp_fp8):
        with pytest.raises(ValueError, match=f"{op.__name__} wants .*{message}"):
            op(**arguments)


@interpreted
def test_errors_of_linear_add_name_what_was_found():
    x = torch.zeros(4, 16)
    with pytest.raises(ValueError, match=r"weight \(16, 9\)"):
        linear_add(x, x, torch.zeros(16, 9))
    with pytest.raises(ValueError, match=r"weight \(16, 16\) torch.float32; got .* torch.float16"):
        linear_add(x, x, torch.zeros(16, 16, dtype=torch.float16))


@compiled
def test_cpu_tensors_are_refused():
    x = torch.zeros(16, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        mlp(x, x, x)


# -------------------------------------------------------------------------------------- on the CPU, compiled for H100
EPILOGUES = {  # transposed weight; what is read and written beside
    "activation": (True, {"row_scale"}),
    "residual": (True, {"extra", "sums"}),
    "derivative": (False, {"extra", "row_scale", "sums"}),
    "norm": (False, {"extra", "other", "row_scale"}),
    "heads": (True, {"row_scale"}),
    "exclusive": (False, {"extra"}),
}
RESIDENT = {  # what only resident products take beside
    "heads": (*["*fp32"] * 4, *["i32"] * 3),
    "exclusive": ("*bf16", "*fp32", "*bf16", "*fp32", "i32:16", "i32:16", "i32:16", "i32"),
}


@compiled
@pytest.mark.parametrize("gpu_name", ["h100", "generic"])
@pytest.mark.parametrize("epilogue", [name for name in EPILOGUES if name not in RESIDENT])
def test_portable_products_compile(epilogue, gpu_name):
    absent = {"extra", "other", "row_scale", "sums"} - EPILOGUES[epilogue][1]
    constants = {"EPILOGUE": epilogue} | dict.fromkeys(absent | {"column_scale", "small", "own"})
    types = {"row_scale": "*fp32", "sums": "*fp32"} | dict.fromkeys(("stride_wn", "stride_wk"), "i32")
    built = compile_for_h100(matmul_kernel, types, constants, configs(gpu_name)["matmul"]["portable"])
    assert built.registers <= 255
    assert built.stack <= 128  # addresses of what the epilogue reads, outside the loop
    assert built.shared <= 96 * 1024
    assert "HGMMA" in built.sass


@compiled
@pytest.mark.parametrize(
    ("name", "epilogue"),
    [("resident", name) for name in EPILOGUES] + [("streaming", name) for name in EPILOGUES if name not in RESIDENT],
)
def test_hopper_products_compile(name, epilogue):
    config = configs("h100")["matmul"][name]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    transposed, beside = EPILOGUES[epilogue]
    n, k = config["BLOCK_N"], config["BLOCK_K"]
    rows = 64 if name == "resident" else 128
    blocks = {"d_x": (rows, k), "d_w": (n, k) if transposed else (k, n), "d_out": (64, n), "d_extra": (64, n)}
    types = {name: f"tensordesc<bf16[{rows}, {columns}],{layout!r}>" for name, (rows, columns) in blocks.items()}
    types |= dict.fromkeys(("tiles_m", "tiles_n", "ranges", "tiles", "steps"), "i32")
    pointers = {"other": "*bf16", "row_scale": "*fp32", "column_scale": "*fp32", "sums": "*fp32"}
    types["beside"] = tuple(kind if what in beside else None for what, kind in pointers.items())
    constants = {"EPILOGUE": epilogue, "TRANSPOSED": transposed, "d_small": None}
    constants |= {} if "extra" in beside else {"d_extra": None}
    if name == "resident":
        constants |= {"STEPS": 8, "HALF": 8}
        types |= {"own": RESIDENT[epilogue]} if epilogue in RESIDENT else {}
        constants |= {} if epilogue in RESIDENT else {"own": None}
    built = compile_for_h100(getattr(matmul_hopper, f"matmul_{name}_kernel"), types, constants, config)
    assert built.stack <= (8 if (name, epilogue) == ("resident", "norm") else 0)  # outside the loop
    assert built.shared <= 227 * 1024
    assert "UTMALDG" in built.sass
    assert "UTMASTG" in built.sass
    # ptxas serialises products whose registers it cannot keep apart: an arrive and a wait around each instruction.
    assert built.sass.count("WARPGROUP.ARRIVE") < built.sass.count("HGMMA") / 3
    if epilogue in RESIDENT:  # both values of a rotated pair lie in one thread, and both heads of a group
        assert built.sass.count("SHFL") < (20 if epilogue == "heads" else 45)


@compiled
@pytest.mark.parametrize("epilogue", ["activation_fp8", "residual"])
def test_portable_fp8_products_compile(epilogue):
    e4m3, floats = "*fp8e4nv", "*fp32"
    types = {"x": e4m3, "w": e4m3, "small": e4m3, "column_scale": floats, "stride_wn": "i32", "stride_wk": "i32"}
    absent = {"other", "row_scale", "sums", "own", "small" if epilogue == "residual" else "extra"}
    config = configs("generic")["matmul"]["portable"]
    built = compile_for_h100(matmul_kernel, types, {"EPILOGUE": epilogue} | dict.fromkeys(absent), config)
    assert built.registers <= 255
    assert built.stack <= 128
    assert "QGMMA" in built.sass


@compiled
def test_casts_to_fp8_compile():
    dim, config = 512, tile(configs("h100")["residual"]["norm_forward"], 512)
    built = compile_for_h100(norm_fwd_kernel, {"h": "*fp8e4nv", "rstd": "*fp32", "scale": "fp32"}, {}, config)
    assert built.stack == 0
    assert "F2FP.SATFINITE.E4M3" in built.sass
    assert "STG.E.128" in built.sass
    types = {"down8": "*fp8e4nv", "scale": "fp32"} | dict.fromkeys(("up_rstd", "of_up", "of_down"), "*fp32")
    constants = {"D": dim, "F": 4 * dim, "BLOCK": 4 * dim}
    built = compile_for_h100(down_fp8_kernel, types, constants, configs("h100")["mlp"]["down_fp8"])
    assert built.stack == 0
    assert built.registers <= 128


@compiled
@pytest.mark.parametrize("epilogue", ["activation_fp8", "residual"])
@pytest.mark.parametrize("name", ["resident", "streaming"])
def test_hopper_fp8_products_compile(name, epilogue):
    config = configs("h100")["matmul"][f"{name}_fp8"]
    n, k, rows = config["BLOCK_N"], config["BLOCK_K"], 64 if name == "resident" else 128
    blocks = {"d_x": ("fp8e4nv", rows, k), "d_w": ("fp8e4nv", n, k), "d_out": ("bf16", 64, n)}
    read, written = ("d_extra", "bf16"), ("d_small", "fp8e4nv")
    (block, dtype), (absent, _) = (read, written) if epilogue == "residual" else (written, read)
    blocks[block] = dtype, 64, n
    types = dict.fromkeys(("tiles_m", "tiles_n", "ranges", "tiles", "steps"), "i32")
    for block, (dtype, *shape) in blocks.items():
        layout = gl.NVMMASharedLayout(128, 16 if dtype == "bf16" else 8, rank=2)
        types[block] = f"tensordesc<{dtype}{shape},{layout!r}>"
    types["beside"] = (None, None, "*fp32", None)
    constants = {"EPILOGUE": epilogue, "TRANSPOSED": True, absent: None}
    if name == "resident":
        constants |= {"STEPS": 4, "HALF": 0, "own": None}
    built = compile_for_h100(getattr(matmul_hopper, f"matmul_{name}_kernel"), types, constants, config)
    assert built.stack == 0
    assert built.shared <= 227 * 1024
    assert "QGMMA" in built.sass
    assert "HGMMA" not in built.sass
    assert "F2FP.SATFINITE.E4M3" in built.sass or epilogue == "residual"
    assert built.sass.count("WARPGROUP.ARRIVE") < built.sass.count("QGMMA") / 3


# -------------------------------------------------------------------------------------------------------- on a GPU
@gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
class TestGPU:
    @pytest.mark.parametrize("rows", [1, 63, 65, 127, 129, 2048, 20001])
    def test_values(self, rows, poisoned):
        self.compare((rows, 512), 2048, torch.bfloat16)

    @pytest.mark.parametrize(
        ("shape", "hidden", "dtype"),
        [
            ((3, 333, 512), 2048, torch.float16),
            ((777, 384), 1000, torch.bfloat16),
            ((777, 1024), 4096, torch.bfloat16),
            ((777, 64), 72, torch.bfloat16),
            ((777, 96), 202, torch.bfloat16),  # rows that TMA cannot address
        ],
    )
    def test_shapes(self, shape, hidden, dtype, poisoned):
        self.compare(shape, hidden, dtype)

    def compare(self, shape, hidden, dtype):
        """No further from float64 than the eager chain in the same dtype."""
        tensors = make(shape, hidden, dtype, "cuda")
        truth = run(torch_mlp, *(x.double() for x in tensors))
        for op in (ours, in_parts):
            for name, a, b, c in zip(NAMES, run(op, *tensors), truth, run(torch_mlp, *tensors), strict=True):
                assert error(a, b) <= error(c, b) + 1e-6, name

    @pytest.mark.parametrize(
        ("shape", "hidden", "dtype"),
        [
            ((1, 512), 2048, torch.bfloat16),
            ((20001, 512), 2048, torch.bfloat16),
            ((3, 333, 512), 2048, torch.float16),
            ((777, 384), 1008, torch.bfloat16),
            ((777, 1024), 4096, torch.bfloat16),
            ((777, 64), 72, torch.bfloat16),  # rows that TMA cannot address, from here on
            ((777, 96), 202, torch.bfloat16),
        ],
    )
    def test_fp8(self, shape, hidden, dtype, poisoned):
        """The reference's numbers but for the instructions' 14 bits, which may round a few the other way."""
        tensors = make(shape, hidden, dtype, "cuda")
        tensors[1][1], tensors[2][2] = 0, 0
        wide = [x.double() for x in tensors]
        exact, truth = run(torch_mlp, *wide), run(reference_fp8, *wide)
        for name, a, b, c in zip(NAMES, run(fp8, *tensors), exact, truth, strict=True):
            assert error(a, b) <= 1.05 * error(c, b) + 3e-3, name
            assert error(a, c) <= 1e-2, name

    @pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 512, 512), (20001, 512, 512), (777, 1000, 328)])
    def test_linear_add(self, rows, inner, columns, poisoned):
        y, weight, _, _ = make((rows, inner), columns, torch.bfloat16, "cuda")
        x, _, _, g = make((rows, columns), 8, torch.bfloat16, "cuda", seed=1)
        tensors = x, y, weight, g
        truth = run(torch_linear_add, *(t.double() for t in tensors))
        theirs = run(torch_linear_add, *tensors)
        for name, a, b, c in zip(NAMES, run(our_linear_add, *tensors), truth, theirs, strict=True):
            assert error(a, b) <= error(c, b) + 1e-6, name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_last_bit_is_the_sign(self, dtype):
        check_sign(dtype, "cuda")

    @pytest.mark.parametrize(
        ("rows", "heads", "kv_heads", "half"), [(4096, 8, 4, 8), (2048 + 130, 3, 1, 8), (130, 4, 2, 32), (130, 4, 2, 2)]
    )
    def test_qkv(self, rows, heads, kv_heads, half, poisoned):
        """What the kernel of its own does behind a rounded product, and no further from float64."""
        total = heads + 2 * kv_heads
        x, weight, _, _ = make((rows, 512), total * 64, torch.bfloat16, "cuda")
        length = rows // 2
        gain = torch.linspace(-2, 5, heads, device="cuda")
        cos, sin = reference.rotary_table(length, 2 * half, 1e4, 1024, "cuda")
        row_scale = norm_factor(row_squares(x), 512, SCALE)
        qkv, inv_rms = qkv_forward(x, weight, row_scale, gain, cos, sin, kv_heads, length)
        raw = (x.double() @ weight.double().T).view(rows, total, 64)
        theirs = raw.bfloat16()
        their_rms = rotary.qkv_forward(theirs, gain, cos, sin, row_scale, kv_heads, length)
        scaled = (raw * row_scale.double()[:, None, None]).view(2, length, total, 64)
        q, k, v = scaled.split([heads, kv_heads, kv_heads], 2)
        q, k = reference.qk_norm_rotary(q, k, gain.double(), cos, sin)
        truth = torch.cat((q, k, v), 2).view(rows, total, 64)
        assert error(qkv, truth) <= error(theirs, truth) * 1.001
        assert error(inv_rms, their_rms.double()) < 1e-3

    def test_compiled_whole(self):
        tensors = make((2, 300, 512), 2048, torch.bfloat16, "cuda")
        whole = torch.compile(lambda x, up, down: our_linear_add(ours(x, up, down) * 2, x, up[:512]), fullgraph=True)
        eager = run(lambda x, up, down: our_linear_add(ours(x, up, down) * 2, x, up[:512]), *tensors)
        for a, b in zip(run(whole, *tensors), eager, strict=True):
            assert error(a, b.double()) < 2e-3

    def test_registration(self):
        x, up, down, _ = (t.requires_grad_() for t in make((2, 96, 512), 2048, torch.bfloat16, "cuda"))
        for op in (torch.ops.golf.mlp.default, torch.ops.golf.mlp_fp8.default):
            torch.library.opcheck(op, (x, row_squares(x), up, down, SCALE))
        y = x.detach().clone().requires_grad_()
        torch.library.opcheck(torch.ops.golf.linear_add.default, (x, y, up[:512]))

    @pytest.mark.parametrize("op", [ours, fp8])
    def test_cuda_graph(self, op):
        *tensors, g = make((1000, 512), 2048, torch.bfloat16, "cuda")
        static = [x.clone().requires_grad_() for x in tensors]

        def step():
            out, _ = linear_add(op(*static), static[0], static[1][:512])
            return out, *torch.autograd.grad(out, static, g)

        graph, captured = graphed(step)
        fresh = make((1000, 512), 2048, torch.bfloat16, "cuda", seed=7)
        with torch.no_grad():
            for x, y in zip(static, fresh, strict=False):
                x.copy_(y)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)

    def test_first_call_of_a_thread(self):
        """A thread whose first use of the device is one of these products, as autograd's may be."""
        x, up, _, _ = make((130, 512), 512, torch.bfloat16, "cuda")
        out = []
        thread = threading.Thread(target=lambda: out.append(linear_add(x, x, up)[0]))
        thread.start()
        thread.join()
        assert torch.equal(out[0], linear_add(x, x, up)[0])

    def test_offsets_past_two_to_the_31(self):
        """The last rows of a tensor of more than 2**31 elements agree with the same rows alone."""
        x, up, down, _ = make((2048, 512), 2048, torch.bfloat16, "cuda")
        far = x.repeat(520, 1)
        a = up_forward(far, up, norm_factor(row_squares(far), 512, 1.0))
        assert a.numel() > 2**31
        assert torch.equal(a[-2048:], up_forward(x, up, norm_factor(row_squares(x), 512, 1.0)))
        assert torch.equal(mlp(far, up, down)[-2048:], mlp(x, up, down))
