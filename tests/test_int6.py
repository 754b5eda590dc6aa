"""int6_linear(), int6_dequantise(): against the reference, interpreted on the CPU and on a GPU; the packed layout."""

import re

import numpy
import pytest
import torch

from kernels import reference
from kernels.int6 import dequantise_kernel, int6_dequantise, int6_linear, int6_row_kernel
from kernels.int6_few import few_tiles, floats_ptx, int6_few_kernel
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


def run_ptx(ptx, *inputs):
    """The four results of instructions on 32-bit words, $4 and $5 given."""
    words = {f"${4 + i}": x.astype(numpy.uint64) for i, x in enumerate(inputs)}

    def value(name):
        return words[name] if name in words else numpy.uint64(int(name, 0))

    def permute(a, b, selector):
        both = a | b << numpy.uint64(32)
        each = (both >> numpy.uint64(8 * (selector >> 4 * i & 7)) & numpy.uint64(255) for i in range(4))
        return sum(byte << numpy.uint64(8 * i) for i, byte in enumerate(each))

    act = {
        "mov": lambda a: a, "shl": lambda a, n: a << n, "shr": lambda a, n: a >> n, "and": lambda a, b: a & b,
        "xor": lambda a, b: a ^ b, "lop3": lambda a, b, c, table: a & b | c,
        "prmt": lambda a, b, selector: permute(a, b, int(selector)),
    }  # fmt: skip
    for line in ptx.strip("{ }").split(";"):
        if not (found := re.fullmatch(r"\s*(\w+)(\.u32|\.b32) (\S+), (.*)", line)):
            assert not line.strip() or line.startswith(".reg .b32 ")
            continue
        op, _, target, operands = found.groups()
        assert op != "lop3" or operands.endswith("0xea")
        words[target] = act[op](*map(value, operands.split(", "))) & numpy.uint64(0xFFFFFFFF)
    return [words[f"${i}"].astype(numpy.uint32) for i in range(4)]


@compiled
def test_ptx_unpacks_four_codes_at_a_time():
    codes = torch.randint(-31, 32, (1, 4 * 512), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    first, second, high = (x.numpy().view(numpy.uint32) for x in reference.pack_codes(codes)[0])
    for quarter in range(4):
        found = run_ptx(floats_ptx(quarter, True), first if quarter < 2 else second, high)
        found = numpy.stack(found, -1).view(numpy.float32).ravel()
        assert (found - 32800 == codes[0, 512 * quarter : 512 * (quarter + 1)].numpy()).all()
    whole = numpy.arange(-128, 128).astype(numpy.int8)
    found = run_ptx(floats_ptx(0, False), whole.view(numpy.uint32), whole.view(numpy.uint32))
    assert (numpy.stack(found, -1).view(numpy.float32).ravel() - 32896 == whole).all()


@pytest.mark.parametrize(("offset", "levels"), [(32800, 31), (32896, 127)])
def test_scaled_codes_are_exact(offset, levels):
    """few_weights' one fused multiply-add for every scale: its parts are exact, so is the difference."""
    scales = numpy.arange(0x7C00, dtype=numpy.uint16).view(numpy.float16).astype(numpy.float64)[:, None]
    shift = offset * scales
    assert (shift.astype(numpy.float32) == shift).all()
    codes = numpy.arange(-levels, levels + 1.0)
    found = (offset + codes) * scales - shift  # of 27 bits: exact in float64
    assert (found.astype(numpy.float32) == codes * scales).all()


def test_about_a_program_a_processor():
    table = configs("h100")["int6"]["few"]
    for kind, columns, some in (("short", 512, (1, 16, 17, 32)), ("tall", 512, (33, 64)), ("long", 2048, (1, 17, 64))):
        for count, rows in ((n, m) for n, k in BANKS if k == columns for m in some):
            tiles = few_tiles(rows, count, 132, table[kind])
            programs = -(-count // tiles["BLOCK_N"]) * -(-rows // tiles["BLOCK_M"])
            assert programs <= 132
            assert tiles["BLOCK_N"] == 8 or 2 * programs > 66


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
        ("short", (256, 512), 32), ("short", (512, 512), 32), ("short", (2048, 512), 32), ("tall", (512, 512), 64),
        ("tall", (2048, 512), 64), ("long", (512, 2048), 16), ("long", (512, 2048), 64), ("int8", (8192, 512), 16),
    ],
)  # fmt: skip
def test_few_compiled_for_h100(kind, shape, rows):
    six = kind != "int8"
    tiles = few_tiles(rows, shape[0], 132, configs("h100")["int6"]["few"][kind])
    width = shape[1] // 4 if six else shape[1]
    built = compile_for_h100(int6_few_kernel, types(six), {"Q": width, "SIX": six}, tiles)
    assert built.stack == 0
    # The next launch finds room beside this one.
    assert built.registers * tiles["num_warps"] * 32 <= 65536 // 2
    assert built.shared <= 16384
    # Of the sum over warps, in two halves where tall: operands stay in registers.
    assert built.sass.count("BAR.SYNC") == (3 if kind == "tall" and tiles["BLOCK_N"] == 32 else 1)
    # One wait for x: all loads of it between the wait for the launch ahead and the first product.
    lines = [line for line in built.sass.splitlines() if re.search(r"ACQBULK|LDG\.|HMMA", line)]
    wait, first = (next(i for i, line in enumerate(lines) if name in line) for name in ("ACQBULK", "HMMA"))
    loads = tiles["BLOCK_M"] * shape[1] // (tiles["SPLIT"] * 32 * 8)
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
