"""Compile a kernel for an H100 on a machine without a GPU, and read what it takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.float64: "*fp64",
}


DIVISIBLE = [["tt.divisibility", 16]]


def compile_for_h100(
    kernel: Any, pointers: dict[str, Any], constants: dict[str, Any], **options: int
) -> Any:
    """The compiled kernel; every number but scale an int32, rows on 16-byte boundaries.

    pointers: the types of arguments that are no such numbers. What has a default keeps it.
    """
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    left_out = {x.name: x.default for x in kernel.params if x.has_default}
    constants = {name: x for name, x in left_out.items() if name not in pointers} | constants
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = pointers.get(name, "fp32" if name == "scale" else "i32")
        signature[name] = "constexpr" if name in constants else signature[name]
        row_stride = "stride" in name and not name.startswith(("mask", "ranges", "lse", "delta"))
        if name not in constants and (name in pointers or row_stride):
            attributes[(place,)] = DIVISIBLE
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    target = backends.GPUTarget("cuda", 90, 32)
    return compiler.compile(source, target=target, options=options)


def resources(made: Any, folder: Path) -> dict[str, int]:
    """REG: registers a thread; STACK, LOCAL: bytes of memory a thread, 0 if none are spilled."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    command = [str(tool), "--dump-resource-usage", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def accesses_of(made: Any, access: str) -> int:
    """How many accesses of this kind, such as ld.global.v4.b32, there are, of any cache policy."""
    return re.sub(r"\.L[12]::\w+", "", made.asm["ptx"]).count(access)
