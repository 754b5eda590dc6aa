"""Compiling a kernel for a GPU on a machine without one, and reading what came of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Built:
    registers: int
    stack: int  # bytes a thread: more than 0 where registers spill
    shared: int  # bytes a program
    sass: str


def compile_for(capability, kernel, types, constants, config):
    """capability: 90 for an H100. types: of arguments, tuples for tuples, None in one for None, ":16" behind integers
    that 16 divides; pointers are taken to be aligned. Arguments without one are integers where named in capitals or as
    strides (of a multiple of 16), else bf16 pointers. constants: of compile-time arguments. config: as in
    kernels/configs, whose other entries are options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = constants | {key: value for key, value in config.items() if key in kernel.arg_names}
    options = {key: value for key, value in config.items() if key not in kernel.arg_names}
    signature, attributes = {}, {}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}

    def plain(kind, *path):
        if kind is None:
            fixed[path] = None
            return "constexpr"
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    for index, name in enumerate(kernel.arg_names):
        default = "i32:16" if name.startswith("stride") else "i32" if name.isupper() else "*bf16"
        kind = "constexpr" if name in constants else types.get(name, default)
        several = isinstance(kind, tuple)
        signature[name] = tuple(plain(x, index, i) for i, x in enumerate(kind)) if several else plain(kind, index)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, fixed, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    return Built(registers, stack, binary.metadata.shared, sass)


compile_for_h100 = partial(compile_for, 90)
