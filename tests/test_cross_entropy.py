"""linear_cross_entropy(): against float64, interpreted and on a GPU; its registration; its compiled kernels."""

import pytest
import torch
from triton.experimental.gluon import language as gl

from kernels import cross_entropy as module
from kernels import matmul_hopper, reference
from kernels.cross_entropy import linear_cross_entropy as ours
from kernels.launch import configs
from kernels.matmul import matmul_kernel
from tests.aot import compile_for_h100
from tests.kernel_tools import CUDA, compiled, error, gpu, graphed, interpreted

SOFTCAP = 30.0


def make(count, vocab, dim, dtype, device, spread=1.0, seed=0):
    """Rows, a head whose logits have standard deviation `spread`, targets with both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) * (spread / dim**0.5)
    targets = torch.randint(vocab, (count,), generator=generator)
    targets[0], targets[-1] = 0, vocab - 1
    return x.to(dtype).to(device), weight.to(dtype).to(device), targets.to(device)


def run(f, x, weight, targets, upstream=1.0, softcap=SOFTCAP):
    """The loss and, for an upstream gradient, those of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = f(x, weight, targets, softcap)
    (loss * upstream).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.fixture
def small_blocks(monkeypatch):
    """Launches with several blocks a row and, without gradient, several buffers of rows."""
    config = {"loss": {"BLOCK_V": 32, "num_warps": 1}, "scale": {"BLOCK": 64, "num_warps": 1}, "rows": 3}
    monkeypatch.setattr(module, "settings", lambda op, device: config)


@pytest.fixture
def fused(monkeypatch):
    """The product with softcap and exponentials in its epilogue, by the portable kernel, of any shape."""
    monkeypatch.setattr(module, "softcap_fits", lambda x, weight: True)


# ------------------------------------------------------------------------------------------- on the CPU, interpreted
SHAPES = [(7, 33, 16), (1, 2, 16), (5, 64, 32), (4, 257, 48)]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


@interpreted
@pytest.mark.parametrize("spread", [1.0, 60.0])  # 60: most logits are far past the softcap
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_interpreted_values(shape, dtype, spread, poisoned):
    data = make(*shape, dtype, "cpu", spread)
    truth = run(reference.linear_cross_entropy, data[0].double(), data[1].double(), data[2], 0.3)
    for name, a, b in zip(("loss", "dx", "dweight"), run(ours, *data, 0.3), truth, strict=True):
        # Past the softcap an error of a logit is multiplied by it, and 1 - tanh^2 cancels.
        assert error(a, b) <= TOLERANCE[dtype] * (1.0 if spread == 1.0 else 30.0), name


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_values_of_several_blocks(shape, small_blocks, poisoned):
    data = make(*shape, torch.float32, "cpu", 5.0)
    x, weight = data[0].double(), data[1].double()
    for a, b in zip(run(ours, *data), run(reference.linear_cross_entropy, x, weight, data[2]), strict=True):
        assert error(a, b) <= 1e-5
    assert (
        error(ours(*data, SOFTCAP, "none"), reference.linear_cross_entropy(x, weight, data[2], SOFTCAP, "none")) < 1e-5
    )
    assert error(ours(*data, SOFTCAP), reference.linear_cross_entropy(x, weight, data[2], SOFTCAP)) < 1e-5


@interpreted
@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 130, 33)])
def test_interpreted_values_of_the_fused_product(shape, spread, fused, poisoned):
    x, weight, targets = make(*shape, torch.float32, "cpu", spread)
    truth = run(reference.linear_cross_entropy, x.double(), weight.double(), targets, 0.3)
    for name, a, b in zip(("loss", "dx", "dweight"), run(ours, x, weight, targets, 0.3), truth, strict=True):
        assert error(a, b) <= 3e-6 * (1.0 if spread == 1.0 else 30.0), name
    apart = torch.nn.functional.pad(x, (0, 3))[:, : shape[2]]
    losses = reference.linear_cross_entropy(x.double(), weight.double(), targets, SOFTCAP, "none")
    assert error(ours(apart, weight, targets, SOFTCAP, "none"), losses) < 1e-5
    assert error(ours(apart, weight, targets, SOFTCAP), losses.mean()) < 1e-5


@interpreted
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_row_makes_up_for_the_rounding_of_its_target(spread, fused, poisoned):
    """dx is rounded once: where the target's is all of the gradient, no rounding before it counts."""
    x, weight, targets = make(64, 300, 32, torch.float16, "cpu", spread)
    truth = run(reference.linear_cross_entropy, x.double(), weight.double(), targets, 64.0, 6.0)
    _, dx, dweight = run(ours, x, weight, targets, 64.0, 6.0)
    once = error(truth[1].half(), truth[1])
    assert error(dx, truth[1]) <= (1.1 if spread == 0.5 else 1.5) * once
    assert error(dweight, truth[2]) <= 1.8 * once


@interpreted
@pytest.mark.parametrize("softcap", [0.5, 30.0, 64.0])
def test_the_fused_product_at_both_ends_of_the_softcap(softcap, fused, poisoned):
    """Rows whose target is certain, hopeless, or as far below the softcap as all: exp(-K) to exp(K)."""
    x = torch.tensor([[200.0], [-200.0], [0.0], [-1.0]]).expand(4, 4) / 4
    weight = torch.cat([torch.full((1, 4), 1.0), torch.full((7, 4), -1.0)])
    data = x.contiguous(), weight, torch.tensor([0, 0, 3, 0])
    truth = run(reference.linear_cross_entropy, data[0].double(), data[1].double(), data[2], 1.0, softcap)
    for a, b in zip(run(ours, *data, 1.0, softcap), truth, strict=True):
        assert error(a, b) <= 3e-5
    data = -x.abs(), torch.ones(8, 4), torch.tensor([0, 1, 2, 7])
    truth = reference.linear_cross_entropy(data[0].double(), data[1].double(), data[2], softcap, "none")
    assert error(ours(*data, softcap, "none"), truth) <= 3e-6


@interpreted
def test_each_row_alone(poisoned):
    x, weight, targets = make(6, 100, 16, torch.float32, "cpu")
    losses = ours(x.view(2, 3, 16), weight, targets.view(2, 3), SOFTCAP, "none")
    truth = reference.linear_cross_entropy(x.double(), weight.double(), targets, SOFTCAP, "none")
    assert losses.shape == (2, 3)
    assert error(losses.flatten(), truth) < 1e-6
    tail = ours(x.view(2, 3, 16)[:, -2:], weight, targets.view(2, 3)[:, -2:], SOFTCAP, "none")
    assert error(tail, losses[:, -2:].double()) < 1e-6


@interpreted
@pytest.mark.parametrize("path", ["fused", "poisoned"])
@pytest.mark.parametrize("target", [-100, -1, 100])
def test_a_target_outside_is_nan_and_touches_no_other_row(target, path, request):
    request.getfixturevalue(path)
    x, weight, targets = make(4, 100, 16, torch.float32, "cpu")
    wanted = ours(x, weight, targets, SOFTCAP, "none")
    targets[1] = target
    losses = ours(x, weight, targets, SOFTCAP, "none")
    assert losses.isnan().tolist() == [False, True, False, False]
    assert torch.equal(losses[[0, 2, 3]], wanted[[0, 2, 3]])
    loss, dx, _ = run(ours, x, weight, targets)
    assert loss.isnan()
    assert dx.isfinite().all()


@interpreted
@pytest.mark.parametrize("path", ["fused", "poisoned"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradient_that_is_wanted(wanted, path, request):
    request.getfixturevalue(path)
    x, weight, targets = make(4, 40, 16, torch.float32, "cpu")
    both = run(ours, x, weight, targets)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    ours(x, weight, targets, SOFTCAP).backward()
    for tensor, grad, want in zip((x, weight), both[1:], wanted, strict=True):
        assert torch.equal(tensor.grad, grad) if want else tensor.grad is None


@interpreted
@pytest.mark.parametrize("path", ["fused", "poisoned"])
def test_backward_twice(path, request):
    request.getfixturevalue(path)
    x, weight, targets = make(4, 40, 16, torch.float32, "cpu")
    x.requires_grad_()
    loss = ours(x, weight, targets, SOFTCAP)
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(x.grad, first)


@interpreted
@pytest.mark.parametrize("path", ["fused", "poisoned"])
def test_registration(path, request):
    request.getfixturevalue(path)
    x, weight, targets = make(5, 40, 16, torch.float32, "cpu")
    check_registration(x, weight, targets)


def check_registration(x, weight, targets):
    torch.library.opcheck(torch.ops.golf.linear_cross_entropy_rows.default, (x, weight, targets, SOFTCAP))
    torch.library.opcheck(torch.ops.golf.linear_cross_entropy.default, (x, weight, targets, SOFTCAP, False))
    _, da, scaled, r = torch.ops.golf.linear_cross_entropy(x, weight, targets, SOFTCAP, True)
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = torch.ones((), device=x.device), da, scaled if r.numel() else x, weight, r, *wanted
        torch.library.opcheck(torch.ops.golf.linear_cross_entropy_backward.default, arguments)
    leaves = (y.detach().requires_grad_() for y in (x, weight))
    torch.library.opcheck(torch.ops.golf.linear_cross_entropy.default, (*leaves, targets, SOFTCAP, True))


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x \(\.\.\., D\).*got x \(16,\)"),
        ({"weight": torch.zeros(40, 32)}, r"weight \(40, 32\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets \(3,\)"),
        ({"x": torch.zeros(0, 16), "targets": torch.zeros(0, dtype=torch.int64)}, r"none empty; got x \(0, 16\)"),
        ({"x": torch.zeros(4, 16, dtype=torch.float64)}, "torch.float64"),
        ({"weight": torch.zeros(40, 16, dtype=torch.float16)}, "torch.float32, torch.float16"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets torch.int64; got .*torch.int32"),
        ({"weight": torch.zeros(40, 16, device="meta")}, "weight on meta"),
        ({"x": torch.zeros(16, 4).T}, r"contiguous.*\(1, 4\)"),
        ({"weight": torch.zeros(16, 40).T}, r"contiguous.*\(1, 40\)"),
        ({"softcap": 0.0}, r"softcap in \(0, 64\]; got 0.0"),
        ({"softcap": 100.0}, "got 100.0"),
        ({"reduction": "sum"}, "got 'sum'"),
        ({"reduction": "none", "x": torch.zeros(4, 16, requires_grad=True)}, r"no_grad.*x.requires_grad True"),
    ],
)
def test_errors_name_what_was_found(change, message):
    arguments = {
        "x": torch.zeros(4, 16),
        "weight": torch.zeros(40, 16),
        "targets": torch.zeros(4, dtype=torch.int64),
        "softcap": SOFTCAP,
    }
    with pytest.raises(ValueError, match=message):
        ours(**arguments | change)


@compiled
def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        ours(*make(4, 40, 16, torch.bfloat16, "cpu"), SOFTCAP)


# -------------------------------------------------------------------------------------- on the CPU, compiled for H100
@compiled
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("vocab", [8192, 1024, 1000, 50304])
def test_loss_kernel_compiles(vocab, gradient):
    config = module._launch_options(configs("h100")["cross_entropy"]["loss"], vocab)
    types = {"targets": "*i64", "losses": "*fp32", "sigmoid_log2": "fp32", "softcap_log2": "fp32"}
    built = compile_for_h100(module.cross_entropy_kernel, types, {"GRADIENT": gradient}, config)
    assert built.registers <= 128  # two programs of 8 warps on a multiprocessor
    assert built.stack == 0
    assert built.shared <= 1024
    if vocab in (1024, 8192):
        # A row is read once, 16 bytes a load, and no exponential is computed a second time.
        values = config["BLOCK_V"] // (32 * config["num_warps"])
        assert built.sass.count("LDG.E.128") == values // 8
        assert built.sass.count("STG.E.128") == (values // 8 if gradient else 0)
        assert built.sass.count("MUFU.EX2") <= 2 * values + 2


@compiled
@pytest.mark.parametrize("kinds", [("*bf16", None), ("*fp32", None), ("*fp32", "*fp32")])
def test_scale_kernel_compiles(kinds):
    types = {"x": kinds[0], "g": "*fp32", "factors": "*fp32", "scale": "fp32", "size": "i32"}
    constants = {"D": 512} | ({} if kinds[1] else {"factors": None})
    config = configs("h100")["cross_entropy"]["scale"]
    built = compile_for_h100(module.cross_entropy_scale_kernel, types, constants, config)
    assert (built.stack, built.shared) == (0, 0)
    assert built.registers <= 64


@compiled
@pytest.mark.parametrize("gradient", [True, False])
def test_rows_kernel_compiles(gradient):
    config = module._rows_options(configs("h100")["cross_entropy"]["rows_fused"], 8192, 512, 64)
    types = {"targets": "*i64", "sums": "*fp32", "losses": "*fp32", "factors": "*fp32", "stride_xm": "i32:16"}
    types |= {"sigmoid_log2": "fp32", "softcap_log2": "fp32"}
    constants = {} if gradient else dict.fromkeys(("numerators", "scaled", "factors"))
    built = compile_for_h100(module.cross_entropy_rows_kernel, types, constants, config)
    assert built.stack == 0
    assert built.registers <= 128
    assert built.sass.count("LDG.E.128") == 2 * 4096 // 128 // 8  # rows of x and of the head, 16 bytes a load
    assert built.sass.count("STG.E.128") == (4096 // 128 // 8 if gradient else 0)


@compiled
@pytest.mark.parametrize("gradient", [True, False])
def test_fused_product_compiles(gradient):
    config = configs("h100")["matmul"]["resident"]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    n, k = config["BLOCK_N"], config["BLOCK_K"]
    blocks = {"d_x": (64, k), "d_w": (n, k), "d_out": (64, n)}
    types = {name: f"tensordesc<bf16[{rows}, {columns}],{layout!r}>" for name, (rows, columns) in blocks.items()}
    types |= dict.fromkeys(("tiles_m", "tiles_n", "ranges"), "i32")
    types |= {"beside": (None, None, None, "*fp32"), "own": ("fp32", "fp32")}
    constants = {"EPILOGUE": "softcap", "TRANSPOSED": True, "STEPS": 8, "HALF": 0, "d_extra": None, "d_small": None}
    constants |= {} if gradient else {"d_out": None}
    built = compile_for_h100(matmul_hopper.matmul_resident_kernel, types, constants, config)
    assert built.stack == 0
    assert built.shared <= 227 * 1024
    assert ("UTMASTG" in built.sass) == gradient
    assert built.sass.count("WARPGROUP.ARRIVE") < built.sass.count("HGMMA") / 3
    # Both consumers' 64 values a thread: two exponentials and a reciprocal each, 1,536 cycles a tile where its products
    # take 2,048.
    assert built.sass.count("MUFU") <= 2 * 3 * 64 + 4


@compiled
@pytest.mark.parametrize("gradient", [True, False])
def test_fused_portable_product_compiles(gradient):
    types = {"sums": "*fp32", "own": ("fp32", "fp32")} | dict.fromkeys(("stride_wn", "stride_wk"), "i32")
    constants = {"EPILOGUE": "softcap"} | dict.fromkeys(("small", "extra", "other", "row_scale", "column_scale"))
    constants |= {} if gradient else {"out": None}
    built = compile_for_h100(matmul_kernel, types, constants, configs("h100")["matmul"]["portable"])
    assert built.registers <= 255
    assert built.stack <= 128


# -------------------------------------------------------------------------------------------------------- on a GPU
@gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
class TestGPU:
    @pytest.mark.parametrize("spread", [1.0, 10.0])
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ((4096, 8192, 512), torch.bfloat16),
            ((3001, 1024, 512), torch.bfloat16),
            ((130, 128, 8), torch.bfloat16),
            ((3000, 8192, 520), torch.bfloat16),
            ((777, 8191, 144), torch.bfloat16),
            ((64, 20001, 64), torch.bfloat16),
            ((65, 20001, 64), torch.bfloat16),
            ((1, 3, 16), torch.bfloat16),
            ((2048, 8192, 512), torch.float16),
        ],
    )
    def test_values(self, shape, dtype, spread, poisoned):
        """No further from float64 than eager torch in the same dtype."""
        x, weight, targets = make(*shape, dtype, "cuda", spread)
        truth = run(reference.linear_cross_entropy, x.double(), weight.double(), targets, 0.5)
        theirs = run(reference.linear_cross_entropy, x, weight, targets, 0.5)
        mine = run(ours, x, weight, targets, 0.5)
        for name, a, b, c in zip(("loss", "dx", "dweight"), mine, theirs, truth, strict=True):
            # da of a target is near -1, of eager's near -1 / M: where M is no power of two, those are rounded on grids
            # that lie differently, which is luck either way. Where it is one, eager's are near a bf16 number, and the
            # fused product's dweight has the rounding of r x for it.
            even = 1.3 if name == "dweight" and module.softcap_fits(x, weight) else 1.01
            limit = (even if shape[0] & (shape[0] - 1) == 0 else 1.1) * (b.double() - c).norm()
            assert (a.double() - c).norm() <= limit + 1e-6 * c.norm() + (5e-7 if name == "loss" else 1e-7), name

    @pytest.mark.parametrize("vocab", [8192, 8190])
    def test_any_upstream_gradient(self, vocab):
        """One that is no power of two costs the portable path one rounding of the weight."""
        data = make(2048, vocab, 512, torch.bfloat16, "cuda")
        truth = run(reference.linear_cross_entropy, data[0].double(), data[1].double(), data[2], 0.3)
        theirs = run(reference.linear_cross_entropy, *data, 0.3)
        for a, b, c in zip(run(ours, *data, 0.3), theirs, truth, strict=True):
            assert error(a, c) <= 1.1 * error(b, c) + 1e-6

    def test_rows_in_several_buffers(self, monkeypatch):
        x, weight, targets = make(5000, 8192, 512, torch.float16, "cuda")
        buffers = configs("h100")["cross_entropy"] | {"rows": 1024}
        monkeypatch.setattr(module, "settings", lambda op, device: buffers)
        losses = ours(x, weight, targets, SOFTCAP, "none")
        logits = SOFTCAP * torch.tanh((x @ weight.T).double() / SOFTCAP)
        truth = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        assert error(losses, truth) < 1e-3
        assert abs(ours(x, weight, targets, SOFTCAP) - losses.mean()) < 1e-6

    @pytest.mark.parametrize("shape", [(4097, 8192, 512), (130, 128, 8)])
    def test_the_fused_product(self, shape):
        """What every element is, the rows of a last ragged tile included, and rows apart in memory."""
        x, weight, targets = make(*shape, torch.bfloat16, "cuda", 3.0)
        factors = -2.0 * module.LOG2E / SOFTCAP, SOFTCAP * module.LOG2E
        assert module.softcap_fits(x, weight)
        e, sums = module.softcap_forward(x, weight, factors, True)
        tanh = torch.tanh(x.double() @ weight.double().T / SOFTCAP)
        truth = (SOFTCAP * tanh).exp()
        assert error(sums, truth.unflatten(1, (-1, 128)).sum(2).T) < 1e-5
        assert error(e, truth * (1 - tanh * tanh) / 4) < 2**-8
        alone, again = module.softcap_forward(x, weight, factors, False)
        assert alone.numel() == 0
        assert torch.equal(again, sums)
        apart = torch.nn.functional.pad(x, (0, 8))[:, : shape[2]]
        assert torch.equal(ours(apart, weight, targets, SOFTCAP, "none"), ours(x, weight, targets, SOFTCAP, "none"))
        odd = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)  # not for TMA
        assert error(ours(odd, weight, targets, SOFTCAP), ours(x, weight, targets, SOFTCAP).double()) < 1e-6

    @pytest.mark.parametrize("target", [-100, 8192])
    def test_a_target_outside(self, target):
        x, weight, targets = make(300, 8192, 512, torch.bfloat16, "cuda")
        wanted = ours(x, weight, targets, SOFTCAP, "none")
        targets[1] = target
        losses = ours(x, weight, targets, SOFTCAP, "none")
        assert losses.isnan().nonzero().flatten().tolist() == [1]
        assert torch.equal(losses[2:], wanted[2:])
        assert run(ours, x, weight, targets)[1].isfinite().all()

    def test_repeats_to_the_bit(self):
        data = make(8192, 8192, 512, torch.bfloat16, "cuda")
        for a, b in zip(run(ours, *data), run(ours, *data), strict=True):
            assert torch.equal(a, b)

    def test_compiled_whole(self):
        data = make(2048, 1024, 512, torch.bfloat16, "cuda")
        f = torch.compile(lambda x, w, t, s: ours(x * 2, w, t, s) * 2, fullgraph=True)
        for a, b in zip(run(f, *data), run(lambda x, w, t, s: ours(x * 2, w, t, s) * 2, *data), strict=True):
            assert error(a, b.double()) < 1e-5
        with torch.no_grad():
            losses = torch.compile(ours, fullgraph=True)(*data, SOFTCAP, "none")
            assert torch.equal(losses, ours(*data, SOFTCAP, "none"))

    def test_registration(self):
        check_registration(*make(64, 1024, 64, torch.bfloat16, "cuda"))

    def test_cuda_graph(self):
        x, weight, targets = make(1024, 8192, 512, torch.bfloat16, "cuda")
        static = [y.clone().requires_grad_() for y in (x, weight)]

        def step():
            for y in static:
                y.grad = None
            loss = ours(*static, targets, SOFTCAP)
            (loss * 0.5).backward()
            return loss

        graph, loss = graphed(step)
        fresh = make(1024, 8192, 512, torch.bfloat16, "cuda", seed=7)
        with torch.no_grad():
            for y, z in zip(static, fresh, strict=False):
                y.copy_(z)
            targets.copy_(fresh[2])
        graph.replay()
        for a, b in zip((loss, static[0].grad, static[1].grad), run(ours, *fresh, 0.5), strict=True):
            assert torch.equal(a, b)

    def test_memory(self):
        """One buffer of E in half precision, r x, the gradients also in float32; for scoring the sums."""
        count, vocab, dim = 65536, 8192, 512
        data = make(count, vocab, dim, torch.bfloat16, "cuda")
        x, weight = data[0].requires_grad_(), data[1].requires_grad_()

        def peak(f):
            f()
            x.grad = weight.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            f()
            return torch.cuda.max_memory_allocated() - before

        logits = 2 * count * vocab
        assert peak(lambda: ours(x, weight, data[2], SOFTCAP).backward()) < logits + 8 * count * dim + 64 * 2**20
        with torch.no_grad():
            assert peak(lambda: ours(x, weight, data[2], SOFTCAP, "none")) < 4 * count * vocab // 128 + 16 * 2**20

    def test_offsets_past_two_to_the_31(self):
        """The last of many rows, more than 2**31 logits on, agree with the same rows alone."""
        x, weight, targets = make(300_000, 8192, 64, torch.bfloat16, "cuda")
        x[-128:], targets[-128:] = x[:128].clone(), targets[:128].clone()
        da = torch.ops.golf.linear_cross_entropy(x, weight, targets, SOFTCAP, True)[1]
        assert torch.equal(da[-128:], da[:128])
        del da
        _, dx, _ = run(ours, x, weight, targets)
        assert error(dx[-128:], dx[:128].double()) < 1e-6
