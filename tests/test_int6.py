"""int6_linear(), int6_dequantise(): against the reference, interpreted on the CPU and on a GPU; the packed layout."""

import re

import numpy
import pytest
import torch

from kernels import reference
from kernels.int6 import dequantise_kernel, int6_dequantise, int6_linear, int6_row_kernel
from kernels.int6_few import BLOCK_M, few_tiles, int6_few_kernel, weights_ptx
from kernels.launch import configs
from tests.aot import compile_for_h100
from tests.kernel_tools import CUDA, compiled, error, gpu, graphed, interpreted

BANKS = [(512, 512), (256, 512), (1024, 512), (2048, 512), (512, 2048)]  # q or o, k or v, q k v, up, down
ODD = [(24, 100), (7, 33), (40, 130), (1, 1)]


def make(rows, columns, six, gain, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    levels = 31 if six else 127
    codes = torch.randint(-levels, levels + 1, (rows, columns), generator=generator, device=device, dtype=torch.int8)
    codes[0] = 0
    scales = 2.0 ** -torch.randint(4, 25, (rows,), generator=generator, device=device).half()
    factor = torch.randn(rows, generator=generator, device=device) if gain else None
    return reference.pack_codes(codes) if six else codes, scales, factor


def poison(x):
    """x with NaN behind its last row, where a wrong mask would read."""
    return torch.cat((x, torch.full_like(x[:1], torch.nan)))[:-1]


# -------------------------------------------------------------------------------------------------- on any machine
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 512])
def test_packing_is_undone(columns):
    codes = torch.randint(-31, 32, (2, 5, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = reference.pack_codes(codes)
    assert packed.shape == (2, 5, 3, 16 * -(-columns // 64))
    assert torch.equal(reference.unpack_codes(packed, columns), codes)


@pytest.mark.parametrize("wrong", [32, -32, -128])
def test_codes_of_more_than_six_bits_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"-31\.\.31; got .*{wrong}"):
        reference.pack_codes(torch.tensor([[0, wrong]], dtype=torch.int8))


def test_reference_is_the_product_with_the_dequantised_matrix():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-31, 32, (16, 8), generator=generator, dtype=torch.int8)
    scales, gain = torch.rand(16, generator=generator).half(), torch.randn(16, generator=generator)
    x = torch.randn(3, 8, generator=generator)
    for c in (codes, reference.pack_codes(codes)):
        torch.testing.assert_close(reference.int6_linear(x, c, scales), x @ (codes * scales[:, None].float()).mT)
        wanted = x @ (gain[:, None] * codes * scales[:, None].float()).mT
        torch.testing.assert_close(reference.int6_linear(x, c, scales, gain), wanted)


def run_ptx(ptx, given):
    """What instructions leave in $0 and $1, given arrays of other 32-bit words."""
    words = {name: x.view(numpy.uint32).astype(numpy.uint64) for name, x in given.items()}

    def permute(a, b, selector):
        both = a | b << numpy.uint64(32)
        each = (both >> numpy.uint64(8 * (int(selector) >> 4 * i & 7)) & numpy.uint64(255) for i in range(4))
        return sum(byte << numpy.uint64(8 * i) for i, byte in enumerate(each))

    def floats(x):
        return x.astype(numpy.uint32).view(numpy.float32).astype(numpy.float64)

    def bits(x):
        return x.astype(numpy.float32).view(numpy.uint32).astype(numpy.uint64)

    def pair(dtype):  # the first goes into the upper half
        def halves(x):
            short = torch.from_numpy(x.astype(numpy.uint32).view(numpy.float32)).to(dtype).view(torch.int16)
            return short.numpy().view(numpy.uint16).astype(numpy.uint64)

        return lambda a, b: halves(a) << numpy.uint64(16) | halves(b)

    act = {
        "mov.b32": lambda a: a, "shl.b32": lambda a, n: a << n, "shr.u32": lambda a, n: a >> n,
        "and.b32": lambda a, b: a & b, "xor.b32": lambda a, b: a ^ b, "lop3.b32": lambda a, b, c, table: a & b | c,
        "prmt.b32": permute, "mul.rn.f32": lambda a, b: bits(floats(a) * floats(b)),
        "fma.rn.f32": lambda a, b, c: bits(floats(a) * floats(b) + floats(c)),  # sums are exact in float64
        "cvt.rn.bf16x2.f32": pair(torch.bfloat16), "cvt.rn.f16x2.f32": pair(torch.float16),
    }  # fmt: skip
    for line in ptx.strip("{ }").split(";"):
        if not (found := re.fullmatch(r"\s*(\S+) (\S+), (.*)", line)) or line.strip().startswith(".reg"):
            assert not line.strip() or line.strip().startswith(".reg .b32 ")
            continue
        op, target, operands = found.groups()
        assert op != "lop3.b32" or operands.endswith("0xea")
        values = (words[name] if name in words else numpy.uint64(int(name, 0)) for name in operands.split(", "))
        words[target] = act[op](*values) & numpy.uint64(0xFFFFFFFF)
    return numpy.stack([words["$0"], words["$1"]], -1).astype(numpy.uint32)


@compiled
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ptx_unpacks_four_weights_at_a_time(dtype, gain):
    """Of every scale there is: the reference's weights to the bit, but for the sign of a zero."""
    scales = numpy.arange(0x7C00, dtype=numpy.uint16).view(numpy.float16)
    scale = torch.from_numpy(scales)
    factor = torch.randn(len(scales), generator=torch.Generator().manual_seed(1)) if gain else None
    generator = torch.Generator().manual_seed(0)
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    for six, levels, offset in ((True, 31, 32800), (False, 127, 32896)):
        codes = torch.randint(-levels, levels + 1, (len(scales), 256), generator=generator, dtype=torch.int8)
        codes[0] = 0
        wanted = reference.int6_dequantise(codes, scale, factor, 256, dtype).unflatten(1, (4 if six else 1, -1))
        stored = reference.pack_codes(codes).numpy() if six else codes.numpy()[:, None]
        rows = {"$4": scale.float(), "$8": scale.float() * -offset}
        if gain:
            rows["$12"] = factor
        rows = {name: x.numpy()[:, None] for name, x in rows.items()}
        for quarter in range(wanted.shape[1]):
            low, high = (stored[:, i].copy().view(numpy.uint32) for i in ((quarter // 2, 2) if six else (0, 0)))
            found = run_ptx(weights_ptx(quarter, six, gain, kind), {"$2": low, "$3": high} | rows)
            found = torch.from_numpy(found.reshape(len(scales), -1).view(numpy.int16)).view(dtype)
            assert (found == wanted[:, quarter]).all()


def test_two_launches_side_by_side():
    table = configs("h100")["int6"]["few"]
    for count, columns in BANKS:
        kind = "short" if columns == 512 else "long"
        for rows in (1, 16, 17, 64):
            tiles = few_tiles(rows, count, 132, table[kind])
            programs = -(-count // tiles["BLOCK_N"]) * -(-rows // BLOCK_M.value)
            assert 2 * programs <= 132 or tiles["BLOCK_N"] == table[kind]["WIDEST"]
            assert 4 * programs > 132 or tiles["BLOCK_N"] == 8


# ------------------------------------------------------------------------------------------- on the CPU, interpreted
@interpreted
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("shape", [*ODD, (16, 64)])
def test_interpreted_values(shape, six, gain, poisoned):
    codes, scales, factor = make(*shape, six, gain, "cpu")
    for dtype in (torch.float16, torch.float32):
        found = int6_dequantise(codes, scales, factor, shape[1], dtype)
        assert torch.equal(found, reference.int6_dequantise(codes, scales, factor, shape[1], dtype))
    weight = reference.int6_dequantise(codes, scales, factor, shape[1], torch.float32).double()
    for rows in (1, 3, 17, 70):
        x = poison(torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)))
        assert error(int6_linear(x, codes, scales, factor), x.double() @ weight.mT) < 1e-6


@interpreted
def test_registration():
    x = torch.randn(2, 3, 40)
    for six in (False, True):
        codes, scales, gain = make(8, 40, six, True, "cpu")
        torch.library.opcheck(torch.ops.golf.int6_linear.default, (x, codes, scales, gain))
        torch.library.opcheck(torch.ops.golf.int6_dequantise.default, (codes, scales, None, 40, torch.float16))


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(40)}, r"x \(\.\.\., K\); got \(40,\)"),
        ({"x": torch.zeros(2, 40).double()}, "x .* got .* torch.float64"),
        ({"x": torch.zeros(40, 2).mT}, "x contiguous"),
        ({"codes": torch.zeros(8, 3, 32, dtype=torch.uint8)}, r"\(8, 3, 16\) torch.uint8 or .*; got \(8, 3, 32\)"),
        ({"codes": torch.zeros(8, 40)}, r"\(8, 40\) torch.int8; got \(8, 40\) torch.float32"),
        ({"scales": torch.zeros(7).half()}, r"scales \(8,\) torch.float16; got \(7,\)"),
        ({"scales": torch.zeros(8)}, "scales .* got .* torch.float32"),
        ({"gain": torch.zeros(8).half()}, "gain .* got .* torch.float16"),
    ],
)
def test_errors_name_what_was_found(change, message):
    codes, scales, gain = make(8, 40, True, True, "cpu")
    with pytest.raises(ValueError, match=message):
        int6_linear(**{"x": torch.zeros(2, 40), "codes": codes, "scales": scales, "gain": gain} | change)
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        int6_dequantise(codes, scales, gain, 40, torch.int32)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cpu_tensors_are_refused():
    codes, scales, gain = make(8, 64, True, True, "cpu")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        int6_linear(torch.zeros(2, 64).bfloat16(), codes, scales, gain)


def types(six):
    given = {"codes": "*u8" if six else "*i8", "scales": "*fp16", "gain": "*fp32"}
    return given | {"M": "i32", "N": "i32:16", "K": "i32:16", "Q": "i32:16"}


@compiled
@pytest.mark.parametrize(
    ("kind", "shape", "rows"),
    [
        ("short", (256, 512), 16), ("short", (256, 512), 64), ("short", (2048, 512), 64), ("long", (512, 2048), 16),
        ("long", (512, 2048), 32), ("long", (512, 2048), 64), ("int8", (8192, 512), 16),
    ],
)  # fmt: skip
def test_few_compiled_for_h100(kind, shape, rows):
    six = kind != "int8"
    tiles = few_tiles(rows, shape[0], 132, configs("h100")["int6"]["few"][kind])
    width = shape[1] // 4 if six else shape[1]
    built = compile_for_h100(int6_few_kernel, types(six), {"Q": width, "SIX": six}, tiles)
    assert built.stack == 0
    # Two launches find room side by side.
    programs = -(-shape[0] // tiles["BLOCK_N"]) * -(-rows // BLOCK_M.value)
    room = 65536 // (built.registers * tiles["num_warps"] * 32)
    assert 2 * programs <= 132 * room
    assert built.shared <= 16384
    # Of the sum over warps, in two halves where tiles are of 64 outputs: operands stay in registers.
    assert built.sass.count("BAR.SYNC") == (3 if tiles["BLOCK_N"] == 64 else 1)
    # The next launch may start first; weights are ready before the wait for the launch ahead; all loads of x stand
    # between that and the first product.
    lines = [line for line in built.sass.splitlines() if re.search(r"PREEXIT|ACQBULK|LDG\.|HMMA|F2FP", line)]
    wait, first = (next(i for i, line in enumerate(lines) if name in line) for name in ("ACQBULK", "HMMA"))
    assert "PREEXIT" in lines[0]
    assert sum("F2FP" in line for line in lines[:wait]) == tiles["BLOCK_N"] * shape[1] // (64 * tiles["num_warps"])
    loads = BLOCK_M.value * shape[1] // (tiles["SPLIT"] * 32 * 8)
    assert sum("LDG.E.128" in line for line in lines[wait:first]) == loads
    assert not any("LDG" in line for line in lines[first:])


@compiled
@pytest.mark.parametrize(("kind", "columns"), [("short", 512), ("long", 2048), ("int8", 512)])
def test_compiled_for_h100(kind, columns):
    six, table = kind != "int8", configs("h100")["int6"]
    width = columns // 4 if six else columns
    built = compile_for_h100(int6_row_kernel, types(six), {"Q": width, "SIX": six, "EARLY": True}, table[kind])
    assert built.stack == 0
    assert built.registers <= 128
    built = compile_for_h100(dequantise_kernel, types(six), {"SIX": six}, table["dequantise"])
    assert built.stack == 0


# -------------------------------------------------------------------------------------------------------- on a GPU
def tolerance(rows):
    return 3e-3 if rows > 4 else 4e-3  # bf16's rounding of the result: at most 2^-8, less in the mean over many numbers


@gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
class TestOnGPU:
    @pytest.mark.parametrize("gain", [False, True])
    @pytest.mark.parametrize("six", [False, True])
    @pytest.mark.parametrize("shape", [*BANKS, *ODD, (8192, 512)])
    def test_values(self, shape, six, gain, poisoned):
        codes, scales, factor = make(*shape, six, gain, "cuda")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = int6_dequantise(codes, scales, factor, shape[1], dtype)
            assert torch.equal(found, reference.int6_dequantise(codes, scales, factor, shape[1], dtype))
        weight = reference.int6_dequantise(codes, scales, factor, shape[1], torch.bfloat16).double()
        for rows in (1, 3, 4, 16, 17, 63, 64, 65, 200):
            x = poison(torch.randn(rows, shape[1], device="cuda").bfloat16())
            found = int6_linear(x, codes, scales, factor)
            assert error(found, x.double() @ weight.mT) < tolerance(rows)
            assert torch.equal(found, int6_linear(x, codes, scales, factor))

    def test_a_row_does_not_feel_the_others(self):
        for shape in BANKS:
            codes, scales, _ = make(*shape, True, False, "cuda")
            x = torch.randn(64, shape[1], device="cuda").bfloat16()
            whole = int6_linear(x, codes, scales)
            for rows in (3, 16, 33):
                assert torch.equal(whole[:rows], int6_linear(x[:rows], codes, scales))

    @pytest.mark.parametrize("rows", [1, 16, 64])
    def test_one_after_the_other_in_a_graph(self, rows):
        """Each reads what the one before wrote, although it starts before that is done."""
        matrices = [make(512, 512, True, False, "cuda", seed) for seed in range(8)]
        x = torch.randn(rows, 512, device="cuda").bfloat16()

        def chain():
            y = x
            for codes, scales, _ in matrices:
                y = int6_linear(y, codes, scales)
                y = y / y.norm() if codes is matrices[3][0] else y
            return y

        wanted = chain()
        graph, out = graphed(chain)
        for _ in range(50):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, wanted)
