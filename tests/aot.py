"""Compiling a kernel for H100 on a machine without a GPU, and reading what came of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Built:
    registers: int
    stack: int  # bytes a thread: more than 0 where registers spill
    shared: int  # bytes a program
    sass: str


def compile_for_h100(kernel, types, constants, config):
    """types: of arguments that are no bf16 pointers, tuples for tuples; config: of kernels/configs, with options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {key: value for key, value in config.items() if key in kernel.arg_names}
    options = {key: value for key, value in config.items() if key not in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*bf16")
        parts = signature[name] if isinstance(signature[name], tuple) else None
        for path, kind in [((index, i), x) for i, x in enumerate(parts)] if parts else [((index,), signature[name])]:
            if kind.startswith("*") or (parts and kind == "i32"):
                attributes[path] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    return Built(registers, stack, binary.metadata.shared, sass)
