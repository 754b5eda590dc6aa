"""Residual mixing, norms, rotary and embedding kernels: against float64, in the interpreter on the CPU and on a GPU;
their registration; their compiled kernels."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels import embedding, reference, residual, rotary
from kernels.launch import INTERPRET, configs
from tests import kernel_tools
from tests.aot import compile_for_h100
from tests.kernel_tools import CUDA, compiled, gpu, graphed, interpreted

DEVICE = "cuda" if CUDA else "cpu"
LOW = torch.bfloat16 if CUDA else torch.float16
# Gradients of a scale that a norm takes out are next to nothing: their errors are those of unit numbers.
error = partial(kernel_tools.error, least=1e-3)


def allowed(limit, eager, truth):
    """`limit`, or eager's own error; twice that for a handful of numbers (gains), of which chance decides."""
    return limit or error(eager, truth) * (2 if truth.numel() < 32 else 1) + 1e-6


def differentiate(f, inputs, seed=0):
    """f's outputs and the gradients of its floating inputs that are at least vectors, for random output gradients."""
    inputs = [x.detach().clone().requires_grad_() if torch.is_floating_point(x) else x for x in inputs]
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(y.shape, generator=generator).to(LOW).to(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    return [*(y.detach() for y in outputs), *(x.grad for x in inputs if x.requires_grad)]


def double(inputs):
    return [x.double() if torch.is_floating_point(x) else x for x in inputs]


def compare(ours, theirs, inputs, limit=None):
    """Values and gradients: within `limit` of float64, or no further from it than torch's in the same dtype."""
    values, truth = differentiate(ours, inputs), differentiate(theirs, double(inputs))
    eager = [None] * len(truth) if limit else differentiate(theirs, inputs)
    assert len(values) == len(truth)
    for i, (a, b, c) in enumerate(zip(values, truth, eager, strict=True)):
        assert a.shape == b.shape
        assert error(a, b) <= allowed(limit, c, b), i


def bound(dtype):
    return 3e-6 if dtype == torch.float32 else 1e-3


# ------------------------------------------------------------------------------------------------------------ cases
def residual_case(shape, skip, dtype):
    generator = torch.Generator().manual_seed(1)
    dim = shape[-1]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3 if skip else 2)]
    inputs.insert(2, torch.randn(2, dim, generator=generator))
    if skip:
        inputs += [torch.randn(dim, generator=generator), torch.randn(dim, generator=generator)]
    return [x.to(DEVICE) for x in inputs]


def torch_mix(x, x0, mix, skip=None, weight=None, gate=None):
    if skip is not None:
        x = reference.skip_mix(x, skip, weight, gate)
    return reference.residual_mix(x, x0, mix)


def layer(x, x0, mix, *skip):
    """x_in and what a norm makes of it: the two ways by which gradients come back to mix_backward."""
    x_in = torch_mix(x, x0, mix, *skip)
    return x_in, reference.rms_norm(x_in)


def check_layer(shape, skip, with_dx0, dtype, limit=None):
    """mix_forward and mix_backward, composed by hand, against autograd through `layer`."""
    inputs = residual_case(shape, skip, dtype)
    x, x0, mix, *rest = inputs
    truth, eager = (differentiate(layer, case) for case in (double(inputs), inputs))
    generator = torch.Generator().manual_seed(0)
    dy, dh = (torch.randn(shape, generator=generator).to(LOW).to(x) for _ in range(2))
    gathered, more = (torch.randn(shape, generator=generator).to(x) if with_dx0 else None for _ in range(2))

    x_in, rstd = residual.mix_forward(x, x0, mix, *rest)
    assert error(rstd, x_in.double().square().mean(-1).add(reference.RMS_EPS).rsqrt()) < 1e-6
    g = (dh.float() * rstd[:, None]).to(x)
    dx0 = None if gathered is None else gathered.clone()
    dx, dskip, dx0_out, dmix, dweight, dgate = residual.mix_backward(
        g, rstd, dy, x, x0, dx0, mix, *(rest or (None,) * 3), more
    )
    if gathered is not None:
        assert torch.equal(dx0, gathered)
        for values in (truth, eager):
            values[2], values[3] = values[2] + more, values[3] + gathered
    ours = [x_in, None, dx, dx0_out, dmix, dskip, dweight, dgate]
    for i, (a, b, c) in enumerate(zip(ours, truth, eager, strict=False)):
        if a is not None:
            assert error(a, b) <= allowed(limit, c, b), i


def qkv_case(batch, length, heads, kv_heads, dim, rope, dtype):
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    gain = torch.randn(heads, generator=generator) + 3
    cos, sin = reference.rotary_table(length, rope, 1e4, length)
    return [x.to(DEVICE) for x in (qkv, gain, cos, sin)]


def check_qkv(batch, length, heads, kv_heads, dim, rope, dtype, limit=None):
    """qkv_forward and qkv_backward on a product without its norm, against autograd with the norm before it."""
    qkv, gain, cos, sin = qkv_case(batch, length, heads, kv_heads, dim, rope, dtype)
    rows = batch * length
    scale = (torch.rand(rows, generator=torch.Generator().manual_seed(3)) + 0.05).to(DEVICE)

    def f(qkv, gain):
        qkv = qkv * scale.to(qkv).view(batch, length, 1, 1)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        return torch.cat((*reference.qk_norm_rotary(q, k, gain, cos.to(qkv), sin.to(qkv)), v), 2)

    truth, eager = (differentiate(f, case) for case in (double([qkv, gain]), [qkv, gain]))
    packed = qkv.flatten(0, 1).clone()
    # A table longer than the rows, as a shorter row meets it.
    inv_rms = rotary.qkv_forward(packed, gain, cos.repeat(2, 1), sin.repeat(2, 1), scale, kv_heads, length)
    grad = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(0)).to(LOW).to(qkv).flatten(0, 1)
    draw, dgain = rotary.qkv_backward(grad, packed, gain, cos, sin, inv_rms, scale, kv_heads, length)
    ours = packed.view(qkv.shape), draw.view(qkv.shape), dgain
    for i, (a, b, c) in enumerate(zip(ours, truth, eager, strict=True)):
        assert error(a, b) <= allowed(limit, c, b), i


def embed_case(batch, length, vocab, dim, documents, seed=0):
    """Token 1 takes a third of the places, token 0 none; some documents are of one token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab, (batch, length), generator=generator)
    tokens[torch.rand(batch, length, generator=generator) < 0.33] = 1
    starts = None
    if documents:
        starts = torch.rand(batch, length, generator=generator) < 0.1
        starts[:, length // 2 : length // 2 + 2] = True
        starts = starts.to(DEVICE)
    weight, gate = torch.randn(vocab, dim, generator=generator) * 0.02, torch.randn(dim, generator=generator)
    return tokens.to(DEVICE), weight.to(DEVICE), gate.to(DEVICE), starts


def check_embed(batch, length, vocab, dim, documents, dtype, limit=None):
    tokens, weight, gate, starts = embed_case(batch, length, vocab, dim, documents)

    def f(kind):
        return lambda w, g: reference.smear(reference.rms_norm(F.embedding(tokens, w).to(kind)), g, starts)

    def ours(w, g):
        return embedding.embed(tokens, w, g, starts, dtype)

    values, truth = differentiate(ours, [weight, gate]), differentiate(f(torch.float64), double([weight, gate]))
    eager = differentiate(f(dtype), [weight, gate])
    for i, (a, b, c) in enumerate(zip(values, truth, eager, strict=True)):
        assert error(a, b) <= allowed(limit, c, b), i


# ------------------------------------------------------------------------------------------- on the CPU, interpreted
@interpreted
@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.float32), (80, torch.float16), (272, torch.float32)])
class TestInterpreted:
    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize("rows", [1, 27])  # 27: at 272 more blocks than programs
    def test_residual_mix(self, rows, dim, skip, dtype, poisoned):
        check_layer((rows, dim), skip, False, dtype, bound(dtype))
        check_layer((rows, dim), skip, True, dtype, bound(dtype))
        case = residual_case((1, rows, dim), skip, dtype)
        compare(residual.residual_mix, torch_mix, case, bound(dtype))

    def test_norms(self, dim, dtype, poisoned):
        x = torch.randn(13, dim).to(dtype)
        compare(lambda x: residual.rms_norm(x, 0.5), lambda x: reference.rms_norm(x, 0.5), [x], bound(dtype))
        assert error(residual.row_squares(x), x.double().square().sum(-1)[None]) < 1e-6

    @pytest.mark.parametrize("documents", [False, True])
    @pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 67)])
    def test_embed(self, batch, length, dim, documents, dtype, poisoned):
        check_embed(batch, length, 11, dim, documents, dtype, bound(dtype))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 9, 4, 2, 16, 8), (1, 5, 3, 3, 32, 32), (3, 1, 2, 1, 64, 16), (1, 7, 5, 1, 16, 2)]
)
def test_interpreted_rotary(shape, dtype, poisoned):
    check_qkv(*shape, dtype, bound(dtype))
    check_lifted_rotary(*shape, dtype, bound(dtype))


def check_lifted_rotary(batch, length, heads, kv_heads, dim, rope, dtype, limit=None):
    qkv, gain, cos, sin = qkv_case(batch, length, heads, kv_heads, dim, rope, dtype)

    def f(op):
        def g(qkv, gain):
            q, k, _ = qkv.split((heads, kv_heads, kv_heads), 2)
            return op(q, k, gain, cos if qkv.dtype != torch.float64 else cos.double(), sin)

        return g

    compare(f(rotary.qk_norm_rotary), f(reference.qk_norm_rotary), [qkv, gain], limit)


@pytest.mark.skipif(not (INTERPRET or CUDA), reason="needs the interpreter or a GPU")
@pytest.mark.parametrize("value", [0.0, 1e-36, 1e-4])
def test_a_gain_of_nothing_gives_no_nan(value):
    dtype = torch.float32 if INTERPRET else torch.bfloat16
    qkv, gain, cos, sin = qkv_case(1, 9, 2, 1, 64, 16, dtype)
    gain[1] = value
    leaf = qkv.clone().requires_grad_()
    weight = gain.clone().requires_grad_()
    q, k, _ = leaf.split((2, 1, 1), 2)
    q, k = rotary.qk_norm_rotary(q, k, weight, cos, sin)
    torch.autograd.backward((q, k), (torch.ones_like(q), torch.ones_like(k)))
    for x in (q, k, leaf.grad, weight.grad):
        assert x.isfinite().all()
    if value < 1e-30:
        assert weight.grad[1] == 0


@interpreted
def test_registration():
    x, x0, mix, skip, weight, gate = (y.requires_grad_() for y in residual_case((2, 5, 16), True, torch.float32))
    torch.library.opcheck(torch.ops.golf.residual_mix.default, (x, x0, mix, skip, weight, gate))
    torch.library.opcheck(torch.ops.golf.residual_mix.default, (x, x0, mix, None, None, None))
    torch.library.opcheck(torch.ops.golf.rms_norm.default, (x, 0.5))
    torch.library.opcheck(torch.ops.golf.row_squares.default, (x.detach(),))
    qkv, gain, cos, sin = qkv_case(1, 5, 2, 1, 16, 8, torch.float32)
    q, k, _ = (y.requires_grad_() for y in qkv.split((2, 1, 1), 2))
    torch.library.opcheck(torch.ops.golf.qk_norm_rotary.default, (q, k, gain.requires_grad_(), cos, sin))
    for documents in (False, True):
        tokens, table, gate, starts = embed_case(2, 9, 7, 16, documents)
        case = (tokens, table.requires_grad_(), gate.requires_grad_(), starts, torch.float32)
        torch.library.opcheck(torch.ops.golf.embed.default, case)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def lifted(*shapes):
    return lambda: rotary.qk_norm_rotary(*(zeros(*shape) for shape in shapes))


def packed(*shapes, length):
    return lambda: rotary.qkv_forward(*(zeros(*shape) for shape in shapes), 1, length)


def embed(tokens, *shapes, dtype=torch.float32):
    return lambda: embedding.embed(tokens, *(zeros(*shape) for shape in shapes), None, dtype)


@interpreted
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: residual.rms_norm(zeros(2, 24)), r"\(2, 24\)"),
        (lambda: residual.rms_norm(zeros(2, 2048)), r"\(2, 2048\)"),
        (lambda: residual.rms_norm(zeros(2, 16, dtype=torch.float64)), "torch.float64"),
        (lambda: residual.rms_norm(zeros(32, 32).mT), "contiguous"),
        (lambda: residual.row_squares(zeros(2, 24)), r"\(2, 24\)"),
        (lambda: residual.residual_mix(zeros(2, 16), zeros(3, 16), zeros(2, 16)), r"x0 \(2, 16\).*\(3, 16\)"),
        (lambda: residual.residual_mix(zeros(2, 16), zeros(2, 16), zeros(16)), r"mix \(2, 16\)"),
        (lambda: residual.residual_mix(zeros(2, 16), zeros(2, 16), zeros(2, 16), zeros(2, 16)), "together"),
        (lifted((1, 3, 2, 20), (1, 3, 1, 20), (2,), (3, 2), (3, 2)), "head dimension .* got 20"),
        (lifted((1, 3, 2, 16), (1, 3, 1, 16), (3,), (3, 2), (3, 2)), r"gain \(3,\)"),
        (lifted((1, 3, 2, 16), (1, 3, 1, 16), (2,), (3, 3), (3, 3)), "power of two"),
        (packed((4, 5, 16), (2,), (4, 2), (4, 2), (4,), length=4), r"\(4, 5, 16\)"),
        (packed((4, 4, 16), (2,), (4, 2), (4, 2), (4,), length=3), "multiple of T"),
        (embed(zeros(2, 3), (5, 16), (16,)), "tokens .*int64"),
        (embed(zeros(2, 3, dtype=torch.int64), (5, 16), (9,)), r"smear_gate \(16,\).*\(9,\)"),
        (embed(zeros(2, 3, dtype=torch.int64), (5, 9), (9,)), r"\(5, 9\)"),
        (embed(zeros(2, 3, dtype=torch.int64), (5, 16), (16,), dtype=torch.int8), "int8"),
    ],
)
def test_errors_name_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@compiled
def test_cpu_tensors_are_refused():
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        residual.rms_norm(x)


# -------------------------------------------------------------------------------------- on the CPU, compiled for H100
TYPES = (
    dict.fromkeys(("places", "tokens"), "*i64") | dict.fromkeys(("first", "last"), "*i32")
    | {"ordered": "*i16", "starts": "*u8", "scale": "fp32", "sums_scale": "fp32", "T": "i32:16"}
    | dict.fromkeys(("mix", "skip_weight", "skip_gate", "rstd", "partial", "gain", "cos", "sin", "row_scale", "inv_rms",
                     "weight", "gate", "dweight", "slots", "sums"), "*fp32")
)  # fmt: skip
H100 = configs("h100")


@compiled
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dim", [512, 528, 1024])
def test_residual_kernels_compile(dim, skip):
    absent = {} if skip else dict.fromkeys(("skip", "skip_weight", "skip_gate", "dskip"))
    cases = [
        (residual.mix_fwd_kernel, "mix_forward", {k: v for k, v in absent.items() if k != "dskip"}, 128),
        (residual.mix_bwd_kernel, "mix_backward_skip" if skip else "mix_backward", absent, 255),
    ]
    if not skip:
        cases += [
            (residual.norm_fwd_kernel, "norm_forward", {}, 64),
            (residual.norm_bwd_kernel, "norm_backward", {}, 64),
        ]
    for kernel, name, constants, limit in cases:
        built = compile_for_h100(kernel, TYPES, constants, residual.tile(H100["residual"][name], dim))
        assert built.registers <= limit
        assert built.stack == 0
        assert built.shared <= 32 * 1024
        assert "LDG.E.128" in built.sass
        assert "STG.E.128" in built.sass


@compiled
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_rotary_kernels_compile(dim):
    sizes = {"QUERIES": 8, "NORMED": 12, "D": dim, "HALF": 8, "ROWS": 64}
    warps = {"num_warps": max(1, H100["rotary"]["backward"]["num_warps"] * dim // 64)}
    for kernel, constants, config in (
        (rotary.qkv_fwd_kernel, {}, rotary._shape(H100["rotary"]["forward"], 8, 4, 16, dim, 8)),
        (rotary.qkv_bwd_kernel, {**sizes, "HEADS": 16, "sums": None}, warps),
        (rotary.qkv_bwd_kernel, {**sizes, "HEADS": 12, "row_scale": None}, warps),
    ):
        built = compile_for_h100(kernel, TYPES, constants, config)
        assert built.registers <= (168 if kernel is rotary.qkv_bwd_kernel else 255)
        assert built.stack == 0
        assert built.shared <= 32 * 1024
        assert "LDG.E.128" in built.sass
        assert "STG.E.128" in built.sass


@compiled
@pytest.mark.parametrize("documents", [False, True])
def test_embedding_kernels_compile(documents):
    for kernel, name in (
        (embedding.embed_fwd_kernel, "forward"),
        (embedding.embed_bwd_runs_kernel, "runs"),
        (embedding.embed_bwd_split_kernel, "split"),
    ):
        config = H100["embedding"][name]
        config = residual.tile(config, 512) if name == "split" else config | embedding._row(512)
        constants = {"PIECE": H100["embedding"]["runs"]["PIECE"]} if name == "split" else {}
        if name != "split" and not documents:
            constants["starts"] = None
        built = compile_for_h100(kernel, TYPES, constants, config)
        assert built.registers <= 255
        assert built.stack == 0
        assert "LDG.E.128" in built.sass


# -------------------------------------------------------------------------------------------------------- on a GPU
@gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
class TestGPU:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("with_dx0", [False, True])
    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize("shape", [(1, 512), (1003, 512), (20000, 512), (777, 96), (777, 1008)])
    def test_residual_mix(self, shape, skip, with_dx0, dtype, poisoned):
        check_layer(shape, skip, with_dx0, dtype)

    @pytest.mark.parametrize("skip", [False, True])
    def test_lifted(self, skip, poisoned):
        compare(residual.residual_mix, torch_mix, residual_case((3, 333, 512), skip, torch.bfloat16))
        x = residual_case((3, 333, 512), False, torch.bfloat16)[:1]
        compare(lambda x: residual.rms_norm(x, 0.5), lambda x: reference.rms_norm(x, 0.5), x)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "shape",
        [
            (2, 2048, 8, 4, 64, 16),
            (3, 333, 8, 4, 64, 64),
            (1, 1, 3, 3, 64, 16),
            (1, 777, 5, 1, 128, 32),
            (3, 333, 6, 3, 32, 16),
        ],
    )
    def test_rotary(self, shape, dtype, poisoned):
        check_qkv(*shape, dtype)
        check_lifted_rotary(*shape, dtype)

    @pytest.mark.parametrize("documents", [False, True])
    @pytest.mark.parametrize("shape", [(1, 1, 8, 512), (3, 777, 100, 512), (4, 2048, 8192, 512), (2, 333, 40000, 96)])
    def test_embed(self, shape, documents, poisoned):
        check_embed(*shape, documents, torch.bfloat16)

    def steps(self, seed=0):
        """A function that runs every op forward and backward, and the tensors it reads."""
        x, x0, mix, skip, weight, gate = residual_case((2, 512, 512), True, torch.bfloat16)
        qkv, gain, cos, sin = qkv_case(2, 512, 8, 4, 64, 16, torch.bfloat16)
        tokens, table, smear, starts = embed_case(2, 512, 1000, 512, True, seed)
        leaves = [t.requires_grad_() for t in (x, x0, mix, skip, weight, gate, qkv, gain, table, smear)]

        def step():
            for leaf in leaves:
                leaf.grad = None
            q, k, _ = qkv.split((8, 4, 4), 2)
            outputs = (
                residual.rms_norm(residual.residual_mix(x, x0, mix, skip, weight, gate)),
                *rotary.qk_norm_rotary(q, k, gain, cos, sin),
                embedding.embed(tokens, table, smear, starts, torch.bfloat16),
            )
            torch.autograd.backward(outputs, [torch.ones_like(y) * y for y in outputs])
            return [*outputs, *(leaf.grad for leaf in leaves)]

        return step, tokens

    def test_deterministic_to_the_bit(self):
        step, _ = self.steps()
        first, second = ([y.detach().clone() for y in step()] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_cuda_graph(self):
        step, tokens = self.steps()
        graph, out = graphed(step)
        tokens.copy_(embed_case(2, 512, 1000, 512, True, 5)[0])
        graph.replay()
        replayed = [y.detach().clone() for y in out]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))

    def test_compiled_whole(self):
        case = residual_case((2, 64, 512), True, torch.bfloat16)
        f = torch.compile(lambda *a: residual.rms_norm(residual.residual_mix(*a)) * 2, fullgraph=True)
        compare(f, lambda *a: reference.rms_norm(torch_mix(*a)) * 2, case)
        tokens, table, gate, starts = embed_case(2, 64, 100, 512, True)
        g = torch.compile(lambda w, s: embedding.embed(tokens, w, s, starts, torch.bfloat16) * 2, fullgraph=True)
        eager = differentiate(lambda w, s: embedding.embed(tokens, w, s, starts, torch.bfloat16) * 2, [table, gate])
        for a, b in zip(differentiate(g, [table, gate]), eager, strict=True):
            assert torch.equal(a, b)

    def test_offsets_past_two_to_the_31(self):
        """The last of many rows, more than 2**31 elements into its tensor, agrees with the same rows alone."""
        rows = 2**31 // 512 + 1000
        x = torch.randn(1000, 512, device="cuda").to(torch.bfloat16)
        far = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
        far[-1000:] = x
        h, rstd = residual.norm_forward(far)
        assert torch.equal(h[-1000:], residual.norm_forward(x)[0])
        mix = torch.randn(2, 512, device="cuda")
        assert torch.equal(residual.mix_forward(far, h, mix)[0][-1000:], residual.mix_forward(x, h[-1000:], mix)[0])
        dx = residual.norm_backward(h, far, rstd)
        assert torch.equal(dx[-1000:], residual.norm_backward(h[-1000:], x, rstd[-1000:]))
        assert torch.equal(residual.row_squares(far)[:, -1000:], residual.row_squares(x))
