"""What launchers share: configurations and the checks of arguments. Nothing here needs a GPU."""

import json
from pathlib import Path

import pytest
import torch

from kernels import launch
from tests.kernel_tools import compiled, gpu, interpreted

FOLDER = Path(launch.__file__).parent / "configs"


def test_generic_stands_in_for_what_was_not_measured() -> None:
    generic, h100 = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("generic", "h100"))
    both = launch.configs("h100")
    for op in generic.keys() - {"gpu"}:
        for kernel, wanted in (generic[op] | h100[op]).items():
            assert both[op][kernel] == wanted
    assert both["attention"].keys() == {str(dim) for dim in launch.HEAD_DIMS}
    assert launch.settings("attention", torch.device("cpu"))["64"] == generic["attention"]["64"]


def test_configurations_cannot_be_changed_by_who_launches() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        launch.settings("matmul", torch.device("cpu"))["portable"]["BLOCK_M"] = 1


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"op wants x \(2, 4\) torch.float32; got \(2, 3\) torch.float32"),
        (torch.zeros(2, 4).double(), r"op wants x \(2, 4\) torch.float32; got \(2, 4\) torch.float64"),
        (torch.zeros(4, 2).T, r"op wants x contiguous .* strides \(1, 2\)"),
    ],
)
def test_errors_name_what_was_found(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.expect("op", absent=(None, (1,), torch.float32), x=(x, (2, 4), torch.float32))


@interpreted
def test_one_device() -> None:
    launch.expect_one_gpu("op", {"a": None, "b": torch.zeros(1), "c": torch.zeros(1)})
    with pytest.raises(ValueError, match="got b on cpu, c on meta"):
        launch.expect_one_gpu("op", {"a": None, "b": torch.zeros(1), "c": torch.zeros(1, device="meta")})


@compiled
def test_a_gpu_or_the_interpreter() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        launch.expect_one_gpu("op", {"a": torch.zeros(1)})


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_current_gpu() -> None:
    x = torch.zeros(1, device="cuda:1")
    with pytest.raises(ValueError, match=r"current device, cuda:0 .* got a on cuda:1"):
        launch.expect_one_gpu("op", {"a": x})
    with torch.cuda.device(1):
        launch.expect_one_gpu("op", {"a": x})
