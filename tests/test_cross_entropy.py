"""linear_cross_entropy(): against float64, interpreted and on a GPU; its registration; its compiled kernels."""

import pytest
import torch

from kernels import cross_entropy as module
from kernels import reference
from kernels.cross_entropy import linear_cross_entropy as ours
from kernels.launch import configs
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


def run(f, x, weight, targets, upstream=1.0):
    """The loss and, for an upstream gradient, those of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = f(x, weight, targets, SOFTCAP)
    (loss * upstream).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.fixture
def small_blocks(monkeypatch):
    """Launches with several blocks a row and, without gradient, several buffers of rows."""
    config = {"loss": {"BLOCK_V": 32, "num_warps": 1}, "scale": {"BLOCK": 64, "num_warps": 1}, "rows": 3}
    monkeypatch.setattr(module, "settings", lambda op, device: config)


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
def test_each_row_alone(poisoned):
    x, weight, targets = make(6, 100, 16, torch.float32, "cpu")
    losses = ours(x.view(2, 3, 16), weight, targets.view(2, 3), SOFTCAP, "none")
    truth = reference.linear_cross_entropy(x.double(), weight.double(), targets, SOFTCAP, "none")
    assert losses.shape == (2, 3)
    assert error(losses.flatten(), truth) < 1e-6
    tail = ours(x.view(2, 3, 16)[:, -2:], weight, targets.view(2, 3)[:, -2:], SOFTCAP, "none")
    assert error(tail, losses[:, -2:].double()) < 1e-6


@interpreted
@pytest.mark.parametrize("target", [-100, -1, 100])
def test_a_target_outside_is_nan_and_touches_no_other_row(target):
    x, weight, targets = make(4, 100, 16, torch.float32, "cpu")
    wanted = ours(x, weight, targets, SOFTCAP, "none")
    targets[1] = target
    losses = ours(x, weight, targets, SOFTCAP, "none")
    assert losses.isnan().tolist() == [False, True, False, False]
    assert torch.equal(losses[[0, 2, 3]], wanted[[0, 2, 3]])
    assert run(ours, x, weight, targets)[0].isnan()


@interpreted
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradient_that_is_wanted(wanted):
    x, weight, targets = make(4, 40, 16, torch.float32, "cpu")
    both = run(ours, x, weight, targets)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    ours(x, weight, targets, SOFTCAP).backward()
    for tensor, grad, want in zip((x, weight), both[1:], wanted, strict=True):
        assert torch.equal(tensor.grad, grad) if want else tensor.grad is None


@interpreted
def test_backward_twice():
    x, weight, targets = make(4, 40, 16, torch.float32, "cpu")
    x.requires_grad_()
    loss = ours(x, weight, targets, SOFTCAP)
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(x.grad, first)


@interpreted
def test_registration():
    x, weight, targets = make(5, 40, 16, torch.float32, "cpu")
    check_registration(x, weight, targets)


def check_registration(x, weight, targets):
    torch.library.opcheck(torch.ops.golf.linear_cross_entropy_rows.default, (x, weight, targets, SOFTCAP))
    torch.library.opcheck(torch.ops.golf.linear_cross_entropy.default, (x, weight, targets, SOFTCAP, False))
    da = torch.ops.golf.linear_cross_entropy(x, weight, targets, SOFTCAP, True)[1]
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = torch.ones((), device=x.device), da, x, weight, *wanted
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
@pytest.mark.parametrize("dtypes", [("*bf16", "*bf16"), ("*fp32", "*bf16")])
def test_scale_kernel_compiles(dtypes):
    types = {"x": dtypes[0], "g": "*fp32", "out": dtypes[1], "scale": "fp32", "size": "i32"}
    built = compile_for_h100(module.cross_entropy_scale_kernel, types, {}, configs("h100")["cross_entropy"]["scale"])
    assert (built.stack, built.shared) == (0, 0)
    assert built.registers <= 64


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
            # that lie differently, which is luck either way.
            limit = (1.01 if shape[0] & (shape[0] - 1) == 0 else 1.1) * (b.double() - c).norm()
            assert (a.double() - c).norm() <= limit + 1e-6 * c.norm() + (5e-7 if name == "loss" else 1e-7), name

    def test_any_upstream_gradient(self):
        """One that is no power of two costs one rounding of the weight."""
        data = make(2048, 8192, 512, torch.bfloat16, "cuda")
        truth = run(reference.linear_cross_entropy, data[0].double(), data[1].double(), data[2], 0.3)
        theirs = run(reference.linear_cross_entropy, *data, 0.3)
        for a, b, c in zip(run(ours, *data, 0.3), theirs, truth, strict=True):
            assert error(a, c) <= 1.1 * error(b, c) + 1e-6

    def test_rows_in_several_buffers(self, monkeypatch):
        x, weight, targets = make(5000, 8192, 512, torch.bfloat16, "cuda")
        buffers = configs("h100")["cross_entropy"] | {"rows": 1024}
        monkeypatch.setattr(module, "settings", lambda op, device: buffers)
        losses = ours(x, weight, targets, SOFTCAP, "none")
        logits = SOFTCAP * torch.tanh((x @ weight.T).double() / SOFTCAP)
        truth = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        assert error(losses, truth) < 1e-3
        assert abs(ours(x, weight, targets, SOFTCAP) - losses.mean()) < 1e-6

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
        """One buffer of logits in half precision, the gradients, and float32 sums of dweight; for scoring less."""
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
        assert peak(lambda: ours(x, weight, data[2], SOFTCAP).backward()) < logits + 2 * count * dim + 64 * 2**20
        with torch.no_grad():
            assert peak(lambda: ours(x, weight, data[2], SOFTCAP, "none")) < logits // 2 + 16 * 2**20

    def test_offsets_past_two_to_the_31(self):
        """The last of many rows, more than 2**31 logits on, agree with the same rows alone."""
        x, weight, targets = make(300_000, 8192, 64, torch.bfloat16, "cuda")
        x[-128:], targets[-128:] = x[:128].clone(), targets[:128].clone()
        da = torch.ops.golf.linear_cross_entropy(x, weight, targets, SOFTCAP, True)[1]
        assert torch.equal(da[-128:], da[:128])
        del da
        _, dx, _ = run(ours, x, weight, targets)
        assert error(dx[-128:], dx[:128].double()) < 1e-6
