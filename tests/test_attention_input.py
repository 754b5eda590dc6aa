"""The op between the residual stream and attention: against the reference in float64, and how it threads x0."""

import pytest
import torch

from kernels import reference
from kernels.attention_input import attention_input
from tests.kernel_tools import error, gpu, interpreted


def make(batch, length, heads, kv_heads, head_dim, dtype, device, skip, rope=8):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, kind=dtype):
        return torch.randn(shape, generator=generator).to(device=device, dtype=kind)

    dim = heads * head_dim
    streams = [normal(batch, length, dim) for _ in range(3 if skip else 2)]
    floats = [normal(*shape, kind=torch.float32) for shape in ((2, dim), (heads,), *(((dim,), (dim,)) if skip else ()))]
    weight = (normal((heads + 2 * kv_heads) * head_dim, dim, kind=torch.float32) * dim**-0.5).to(dtype)
    rotary = reference.rotary_table(length, rope, 1e4, length, device)
    return streams, floats, weight, rotary


def run(op, case, dtype=None, layers=2):
    """Outputs and gradients of `layers` layers in a row, x0 handed on; dtype float64 is the truth."""
    streams, floats, weight, rotary = case
    if dtype is not None:
        streams, floats, weight, rotary = (
            [t.to(dtype) for t in streams],
            [t.to(dtype) for t in floats],
            weight.to(dtype),
            [t.to(dtype) for t in rotary],
        )
    leaves = [t.detach().clone().requires_grad_() for t in (*streams, *floats, weight)]
    x, x0, *skip = leaves[: len(streams)]
    mix, gain, *skip_vectors = leaves[len(streams) : -1]
    skip = (skip[0], *skip_vectors) if skip else None
    collected = []
    for _ in range(layers):
        qkv, x, x0, before = op(x, x0, mix, skip, leaves[-1], gain, *rotary, 0.5)
        collected += [qkv, before]
    outputs = (*collected, x)
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(y.shape, generator=generator).to(weight.device, case[2].dtype).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves)]


@interpreted
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", [(2, 5, 2, 1, 16), (1, 7, 4, 4, 16)])
def test_values_in_the_interpreter(shape, layers, skip, poisoned):
    case = make(*shape, torch.float32, "cpu", skip)
    truth = run(reference.attention_input, case, torch.float64, layers)
    for i, (a, b) in enumerate(zip(run(attention_input, case, layers=layers), truth, strict=True)):
        assert error(a, b) < 2e-5, i


@interpreted
def test_the_first_layer_may_mix_x0_with_itself():
    case = make(1, 4, 2, 1, 16, torch.float32, "cpu", False)

    def same(op):
        def call(x, x0, *rest):
            return op(x0, x0, *rest)

        return call

    truth = run(same(reference.attention_input), case, torch.float64, 1)
    found = run(same(attention_input), case, layers=1)
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert (a is None and b is None) or error(a, b) < 2e-5, i


@interpreted
def test_bad_input_is_named():
    streams, floats, weight, rotary = make(1, 4, 2, 1, 16, torch.float32, "cpu", False)
    mix, gain = floats
    with pytest.raises(ValueError, match=r"x and x0 \(B, T, D\).*got x \(1, 4, 32\), x0 \(1, 3, 32\)"):
        attention_input(streams[0], streams[1][:, :3], mix, None, weight, gain, *rotary, 1.0)
    with pytest.raises(ValueError, match=r"weight \(\(H \+ 2 G\) 16, 32\).*got \(48, 32\)"):
        attention_input(*streams, mix, None, weight[:48], gain, *rotary, 1.0)
    with pytest.raises(ValueError, match=r"weight \(64, 32\) torch.float32; got .* torch.float16"):
        attention_input(*streams, mix, None, weight.half(), gain, *rotary, 1.0)
    skip = torch.zeros(1, 4, 32), torch.zeros(32), torch.zeros(32)
    with pytest.raises(ValueError, match=r"skip \(1, 4, 32\) torch.float32; got \(4, 1, 32\)"):
        attention_input(*streams, mix, (skip[0].transpose(0, 1), *skip[1:]), weight, gain, *rotary, 1.0)
    with pytest.raises(ValueError, match=r"skip_gate \(32,\) torch.float32; got \(31,\)"):
        attention_input(*streams, mix, (*skip[:2], skip[2][:31]), weight, gain, *rotary, 1.0)
    with pytest.raises(ValueError, match=r"skip \(saved x, weight, gate\) or None; got 2 of them"):
        attention_input(*streams, mix, skip[:2], weight, gain, *rotary, 1.0)
    with pytest.raises(ValueError, match=r"cos of at least 4 positions; got \(3, 4\)"):
        attention_input(*streams, mix, None, weight, gain, *(table[:3] for table in rotary), 1.0)


@interpreted
@pytest.mark.parametrize("skip", [False, True])
def test_registration(skip):
    streams, floats, weight, rotary = make(1, 4, 2, 1, 16, torch.float32, "cpu", skip)
    mix, gain, *vectors = floats
    inputs = (*streams[:2], mix, *((streams[2], *vectors) if skip else (None,) * 3), weight, gain, *rotary)
    saved = torch.ops.golf.attention_input(*inputs, 0.5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.golf.attention_input.default, (*inputs, 0.5), test_utils=checks)
    for more in (None, torch.randn_like(streams[0])):
        gradients = (torch.randn_like(saved[0]), torch.randn_like(streams[0]), more, more)
        backward = torch.ops.golf.attention_input_backward.default
        torch.library.opcheck(backward, (*gradients, *inputs, *saved, 0.5), test_utils=checks)


@gpu
class TestGPU:
    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rope", [8, 16])  # 16: head norms and rotary in the product's epilogue on Hopper
    @pytest.mark.parametrize("shape", [(2, 333, 8, 4, 64), (1, 65, 4, 1, 128)])
    def test_no_further_from_float64_than_eager(self, shape, rope, dtype, skip, poisoned):
        case = make(*shape, dtype, "cuda", skip, rope)
        truth = run(reference.attention_input, case, torch.float64)
        ours, eager = run(attention_input, case), run(reference.attention_input, case)
        for i, (a, b, c) in enumerate(zip(ours, eager, truth, strict=True)):
            # A sum for each of a few heads is a small sample of roundings: there one unit of the dtype is allowed.
            assert error(a, c) <= error(b, c) + (1e-6 if c.numel() > 32 else torch.finfo(dtype).eps), i

    def test_repeats_to_the_bit_and_compiles_whole(self):
        case = make(2, 256, 8, 4, 64, torch.bfloat16, "cuda", True)
        first = run(attention_input, case)
        assert all(torch.equal(a, b) for a, b in zip(first, run(attention_input, case), strict=True))
        whole = torch.compile(attention_input, fullgraph=True)
        for a, b in zip(run(whole, case), first, strict=True):
            assert error(a, b.double()) < 1e-3
