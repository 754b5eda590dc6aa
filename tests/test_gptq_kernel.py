"""gptq_block(): against the eager loop, interpreted on the CPU and on a GPU; its compiled kernel."""

import pytest
import torch

from gpt.gptq import factorise, gptq, output_error, row_scales
from kernels import reference
from kernels.gptq import gptq_block, gptq_block_kernel
from kernels.launch import configs
from tests.aot import compile_for_h100
from tests.kernel_tools import CUDA, compiled, gpu, interpreted
from tests.test_gptq import correlated


def objectives(matrices, rows, columns, device, levels=31):
    """Share of codes that differ from the eager loop's, and both objective values."""
    weight, hessian = (x.to(device) for x in correlated(matrices, rows, columns))
    weight[0, rows // 2] = 0
    scales, factor = row_scales(weight, 12.85, levels), factorise(hessian)
    found, wanted = (gptq(weight, factor, scales, levels, block) for block in (gptq_block, reference.gptq_block))
    step = scales.float()[..., None]
    differ = (found != wanted).float().mean().item()
    return differ, *(output_error(weight, codes * step, hessian) for codes in (found, wanted))


@interpreted
@pytest.mark.parametrize("shape", [(2, 40, 300), (1, 33, 20), (2, 1, 128)])
def test_interpreted_codes_are_those_of_the_eager_loop(shape, poisoned):
    differ, found, wanted = objectives(*shape, "cpu")
    assert differ < 2e-3
    assert found == pytest.approx(wanted, rel=1e-3)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(2, 8, 6).double()}, "w .* got .* torch.float64"),
        ({"upper": torch.zeros(2, 8, 7)}, r"upper \(2, 8, 8\) .*; got \(2, 8, 7\)"),
        ({"scales": torch.ones(2, 5)}, r"scales \(2, 6\) .*; got \(2, 5\)"),
        ({"codes": torch.zeros(2, 8, 6)}, "codes .* torch.int8, .* got .* torch.float32"),
        ({"codes": torch.zeros(2, 9, 6, dtype=torch.int8)[:, :8]}, r"got strides \(48, 6, 1\), \(54, 6, 1\)"),
        ({"levels": 128}, "levels in 1..127; got 8 and 128"),
    ],
)
def test_errors_name_what_was_found(change, message):
    given = {"w": torch.zeros(2, 8, 6), "upper": torch.zeros(2, 8, 8), "scales": torch.ones(2, 6), "levels": 31}
    given["codes"] = torch.zeros(2, 8, 6, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        gptq_block(**given | change)


@compiled
@pytest.mark.parametrize("name", ["h100", "generic"])
def test_compiled_for_h100(name):
    config = configs(name)["gptq"]["block"]
    types = dict.fromkeys(("w", "upper", "scales", "errors"), "*fp32")
    types |= {"codes": "*i8", "ROWS": "i32:16", "COLUMNS": "i32:16", "LEVELS": "fp32"}
    built = compile_for_h100(gptq_block_kernel, types, {"WIDTH": 128}, config)
    assert built.stack == 0


@gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("shape", [(22, 512, 512), (11, 512, 2048), (3, 100, 300), (1, 8192, 512)])
def test_codes_are_those_of_the_eager_loop(shape, poisoned):
    differ, found, wanted = objectives(*shape, "cuda")
    assert differ < 1e-2
    assert found == pytest.approx(wanted, rel=1e-3)
