"""Launch a compiled kernel by CUDA's driver: everything but addresses is laid out beforehand.

Triton's launcher takes each of a kernel's arguments from Python anew: of a kernel with 150 to 280
arguments that takes the host 45 us, and once for each signature it compiles a C module. Here the
arguments lie in memory as the driver reads them (cuLaunchKernelEx's kernelParams: an array of the
addresses of the arguments), and a call writes the tensors' addresses into a copy of them. One C
module (launcher.c) does that for all kernels; Triton compiles it and keeps it, as it does its own.

Triton's hooks around launches are not called; profilers of the driver see these launches.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WIDTHS = {"i32": "i", "i64": "q", "fp32": "f"}  # by what a signature calls them
_CELL = 8  # bytes of each argument's place, the most that one takes
_TRAILING = 2  # pointers that Triton appends to a kernel's arguments, null if it needs no scratch
_WARP = 32
_STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may have without asking
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@dataclass(frozen=True)
class Binary:
    """A kernel as a GPU loads it.

    shared: bytes of shared memory. warps: of a program. plain: it asks for nothing else.
    """

    name: str
    cubin: bytes
    shared: int
    warps: int
    plain: bool

    @classmethod
    def of(cls, compiled: Any) -> Binary:
        """What Triton compiled."""
        metadata = compiled.metadata
        asked = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")
        others = [getattr(metadata, name, 0) for name in (*asked, "launch_pdl", "tmem_size")]
        return cls(
            name=metadata.name,
            cubin=compiled.asm.get("cubin", b""),
            shared=metadata.shared,
            warps=metadata.num_warps,
            plain=not any(others) and getattr(metadata, "num_ctas", 1) == 1,
        )


class Arguments:
    """A kernel's arguments as the driver reads them.

    Args:
        kinds: in order, "i32", "i64", "fp32", or a pointer's type, which begins with "*".
        values: in order, numbers; of a pointer which tensor's address it is.
        tensors: how many there are.

    Attributes:
        tensors: as given. sizes: bytes of each argument.
        cells: 8 bytes for each tensor's address, each argument that is a number, and a null.
        places: the cells of the arguments, and of what Triton appends to them.
    """

    def __init__(self, kinds: Sequence[str], values: Sequence[Any], tensors: int) -> None:
        self.sizes = [_CELL if kind[0] == "*" else struct.calcsize(_WIDTHS[kind]) for kind in kinds]
        self.tensors = tensors
        self.cells = bytearray(_CELL * (tensors + len(kinds) + 1))
        places = []
        for i, (kind, value) in enumerate(zip(kinds, values, strict=True), tensors):
            if kind[0] != "*":
                struct.pack_into(_WIDTHS[kind], self.cells, _CELL * i, value)
            places.append(value if kind[0] == "*" else i)
        self.places = (*places, *[len(self.cells) // _CELL - 1] * _TRAILING)


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor."""


def launcher(
    binary: Binary,
    arguments: Arguments,
    *,
    grid: int,
    device: int,
    made: Sequence[tuple[Form, bool]],
    empty: Callable[..., Tensor],
) -> Callable[[Sequence[Tensor]], list[Tensor]] | None:
    """A function of the given tensors that launches the kernel and returns its results, or None
    where only Triton can.

    Args:
        binary: the kernel. arguments: its own; tensors are the given ones, then those made.
        grid: programs.
        device: number of the GPU, which is the current one here and when it is launched.
        made: tensors that each launch makes, and whether they are results. empty: makes one.
    """
    cuda = _library()
    if cuda is None or not binary.plain:
        return None
    function, built = _loaded(binary, device), launcher_module()
    if function is None or built is None or not _fits(cuda, function, arguments.sizes):
        return None
    call: Callable[[Sequence[Tensor]], list[Tensor]] = built.launcher(
        ctypes.cast(cuda.cuLaunchKernelEx, ctypes.c_void_p).value,
        function,
        grid,
        _WARP * binary.warps,
        binary.shared,
        arguments.cells,
        arguments.places,
        arguments.tensors - len(made),
        binary.name,
        device,
        tuple(form for form, _ in made),
        tuple(returned for _, returned in made),
        empty,
        torch._C._cuda_getCurrentRawStream,
        torch.cuda.set_device,
    )
    return call


@functools.cache
def launcher_module() -> Any:
    """launcher.c, built; None where Triton finds no compiler, or has no such function any more."""
    source = (Path(__file__).parent / "launcher.c").read_text(encoding="utf-8")
    try:
        from triton.runtime.build import compile_module_from_src

        return compile_module_from_src(source, "moda_compile_launcher")
    except Exception:  # Triton's own business: it then launches by itself, or fails by itself
        return None


@functools.cache
def _library() -> Any:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_void_p
        size = ctypes.POINTER(ctypes.c_size_t)
        cuda.cuFuncGetParamInfo.argtypes = [address, ctypes.c_size_t, size, size]
    except (OSError, AttributeError):  # no driver, or one before CUDA 12.4
        return None
    return cuda


@functools.lru_cache(maxsize=4096)
def _loaded(binary: Binary, device: int) -> int | None:
    """The driver's handle of the kernel on the current GPU, for as long as the process lives."""
    cuda, module, function = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    if cuda.cuModuleLoadData(ctypes.byref(module), binary.cubin):
        return None
    if cuda.cuModuleGetFunction(ctypes.byref(function), module, binary.name.encode()):
        return None
    if binary.shared > _STATIC_SHARED:
        setting = ctypes.c_int(_MAX_DYNAMIC_SHARED), ctypes.c_int(binary.shared)
        if cuda.cuFuncSetAttribute(function, *setting):
            return None
    return function.value


def _fits(cuda: Any, function: int, sizes: Sequence[int]) -> bool:
    """The kernel's arguments have these sizes, in bytes, and besides no more than Triton's own."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    found: list[int] = []
    while len(found) <= len(sizes) + _TRAILING:
        if cuda.cuFuncGetParamInfo(function, len(found), ctypes.byref(offset), ctypes.byref(size)):
            break
        found.append(size.value)
    rest = found[len(sizes) :]
    return found[: len(sizes)] == list(sizes) and rest in (
        [_CELL] * n for n in range(_TRAILING + 1)
    )
