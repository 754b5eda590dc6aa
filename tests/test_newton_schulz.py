"""newton_schulz(): against float64, interpreted on the CPU and on a GPU; its registration; its compiled kernel."""

import pytest
import torch

from kernels import CLASSIC, POLAR_EXPRESS, reference
from kernels.launch import configs
from kernels.newton_schulz import _joined, _plan, newton_schulz, newton_schulz_kernel
from tests.aot import compile_for_h100
from tests.kernel_tools import compiled, error, gpu, interpreted

SEED = [(11, 2048, 512), (11, 512, 2048), (22, 512, 512), (22, 256, 512)]
TABLES = [(CLASSIC,) * 5, POLAR_EXPRESS]


def make(shapes, dtype, device, scale=1.0, seed=0, joined=True):
    """Banks, as views of one buffer or each for itself."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [count * rows * columns for count, rows, columns in shapes]
    flat = (scale * torch.randn(sum(sizes), generator=generator, device=device)).to(dtype)
    banks = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    return banks if joined else [bank.clone() for bank in banks]


# ------------------------------------------------------------------------------------------- on the CPU, interpreted
@interpreted
@pytest.mark.parametrize(
    "shapes", [[(2, 48, 80), (1, 70, 33)], [(1, 128, 64)], [(3, 16, 16)], [(1, 1, 5), (1, 5, 1), (1, 70, 130)]]
)
@pytest.mark.parametrize("table", [(CLASSIC,) * 2, POLAR_EXPRESS[:3], POLAR_EXPRESS[:1]])
def test_interpreted_values(shapes, table, poisoned):
    for joined in (False, True):
        banks = make(shapes, torch.float32, "cpu", joined=joined)
        truth = reference.newton_schulz([bank.double() for bank in banks], table)
        for found, exact in zip(newton_schulz(banks, table), truth, strict=True):
            assert error(found, exact) < 1e-5


@interpreted
def test_a_zero_matrix_stays_zero(poisoned):
    banks = make([(2, 40, 24)], torch.float32, "cpu")
    banks[0][1] = 0
    (found,) = newton_schulz(banks, TABLES[0])
    assert found[1].count_nonzero() == 0
    assert error(found[:1], reference.newton_schulz([banks[0][:1].double()], TABLES[0])[0]) < 1e-5


@interpreted
def test_registration():
    torch.library.opcheck(torch.ops.golf.newton_schulz.default, (torch.randn(600), [1, 10, 20, 2, 20, 10], [*CLASSIC]))


@interpreted
@pytest.mark.parametrize(
    ("banks", "table", "message"),
    [
        ([torch.zeros(4, 4)], [CLASSIC], r"\(4, 4\)"),
        ([torch.zeros(1, 4, 4, dtype=torch.float64)], [CLASSIC], "torch.float64"),
        ([torch.zeros(1, 4, 6).mT], [CLASSIC], r"strides \(24, 1, 6\)"),
        ([torch.zeros(0, 4, 4)], [CLASSIC], "none empty"),
        ([], [CLASSIC], "0 banks"),
        ([torch.zeros(1, 4, 4)], [], "at least one"),
    ],
)
def test_errors_name_what_was_found(banks, table, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(banks, table)


# -------------------------------------------------------------------------------------------------- on any machine
def test_every_tile_waits_only_for_tiles_before_it():
    """What makes it safe to draw tiles in order, however few programs run: a matrix's tiles of one product come after
    all its tiles of the product before."""
    tiles, matrices, _ = _plan(((2, 70, 33), (1, 64, 200), (3, 512, 2048)), 64, torch.device("cpu"))
    done = [0] * matrices
    for *_, matrix, needed, total in tiles.tolist():
        assert needed <= done[matrix] <= total
        done[matrix] += 1
    assert done == [tiles[tiles[:, 8] == matrix, 10][0].item() for matrix in range(matrices)]


def test_banks_in_one_buffer_are_not_copied():
    banks = make([(2, 8, 4), (1, 4, 4)], torch.float32, "cpu")
    assert _joined(banks).data_ptr() == banks[0].data_ptr()
    assert _joined(banks[1:]).data_ptr() == banks[1].data_ptr()
    expected = torch.cat([banks[1].flatten(), banks[0].flatten()])
    assert torch.equal(_joined(banks[::-1]), expected)
    assert torch.equal(_joined([bank.clone() for bank in banks[::-1]]), expected)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        newton_schulz([torch.zeros(1, 8, 8, dtype=torch.bfloat16)], [CLASSIC])


@compiled
@pytest.mark.parametrize("kind", ["even", "few", "any"])
def test_compiled_for_h100(kind):
    config = dict(configs("h100")["newton_schulz"][kind])
    programs = config.pop("per_processor")
    types = {"iterations": "i32", "tile_count": "i32", "counters": "*i32", "tiles": "*i64"}
    types |= {"traces": "*fp32", "coefficients": "*fp32"}
    built = compile_for_h100(newton_schulz_kernel, types, {"TRACES": 4, "EVEN": kind != "any"}, config)
    assert built.stack == 0
    assert built.registers * config["num_warps"] * 32 * programs <= 65536
    assert built.shared * programs <= 227 * 1024
    assert "HGMMA" in built.sass
    if kind != "any":
        assert "LDGSTS.E.BYPASS.128" in built.sass


# -------------------------------------------------------------------------------------------------------- on a GPU
@gpu
@compiled
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "shapes", [SEED, [(2, 64, 64), (2, 64, 2048), (1, 2048, 64), (3, 768, 192)], [(2, 100, 260), (1, 333, 77)]]
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_error_is_that_of_eager_bf16(shapes, table, scale, poisoned):
    banks = make(shapes, torch.bfloat16, "cuda", scale)
    found = newton_schulz(banks, table)
    for bank, x, again in zip(banks, found, newton_schulz(banks, table), strict=True):
        assert torch.equal(x, again)
        exact = reference.newton_schulz([bank.double()], table)[0]
        eager = reference.newton_schulz([bank], table)[0]
        # Single small matrices vary: both are rounding errors, amplified by the iteration.
        assert error(x, exact) <= 1.5 * error(eager, exact) + 2e-3


@gpu
@compiled
@pytest.mark.parametrize("table", TABLES)
def test_singular_values_end_in_the_band_of_eager_bf16(table):
    banks = make(SEED, torch.bfloat16, "cuda")
    ours, eager = newton_schulz(banks, table), reference.newton_schulz(banks, table)
    for a, b in zip(ours, eager, strict=True):
        a, b = (torch.linalg.svdvals(x.float()).flatten() for x in (a, b))
        assert a.max() <= b.max() + 0.02
        for quantile in (0.02, 0.1, 0.5, 0.9):
            # Of a square random matrix the smallest singular value is near zero and stays there.
            assert abs(a.quantile(quantile) - b.quantile(quantile)) < 0.02


@gpu
@compiled
def test_graph_capture_and_fullgraph():
    banks = make([(3, 512, 512), (2, 2048, 512)], torch.bfloat16, "cuda")
    expected = [x.clone() for x in newton_schulz(banks, TABLES[0])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = newton_schulz(banks, TABLES[0])
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, captured, expected))
    function = torch.compile(lambda banks: newton_schulz(banks, TABLES[0]), fullgraph=True)
    assert all(map(torch.equal, function(banks), expected))
