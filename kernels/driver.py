"""Launch a compiled kernel by CUDA's driver: everything but addresses is laid out beforehand.

Triton's launcher takes each of a kernel's arguments from Python anew: of a kernel with 150 to 280
arguments that takes the host 45 us, and once for each signature it compiles a C module. Here the
arguments lie in memory as the driver reads them (cuLaunchKernelEx's kernelParams: an array of the
addresses of the arguments), and a call writes the tensors' addresses over those of the last. In a
training step the host's caches hold little of what a call needs, so that each thing that is looked
at, and each function that is called on the way, costs a microsecond.

Triton's hooks around launches are not called; profilers of the driver see these launches.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WIDTHS = {"i32": "i", "i64": "q", "fp32": "f"}  # by what a signature calls them
_CELL = 8  # bytes of each argument's place, the most that one takes
_TRAILING = 2  # pointers that Triton appends to a kernel's arguments, null if it needs no scratch
_WARP = 32
_STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may have without asking
_INVALID_CONTEXT = 201
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
    """

    def __init__(self, kinds: Sequence[str], values: Sequence[Any], tensors: int) -> None:
        self.sizes = [_CELL if kind[0] == "*" else struct.calcsize(_WIDTHS[kind]) for kind in kinds]
        cells = bytearray(_CELL * (tensors + len(kinds) + 1))  # the last one is null
        places = []
        for i, (kind, value) in enumerate(zip(kinds, values, strict=True), tensors):
            if kind[0] == "*":
                places.append(_CELL * value)
            else:
                struct.pack_into(_WIDTHS[kind], cells, _CELL * i, value)
                places.append(_CELL * i)
        places += [len(cells) - _CELL] * _TRAILING
        # The buffer belongs to the array, which has to stay as long as addresses in it are used.
        self._cells = (ctypes.c_char * len(cells)).from_buffer(cells)
        start = ctypes.addressof(self._cells)
        self.pointers = (ctypes.c_void_p * len(places))(*(start + place for place in places))
        self.write: Callable[..., None] = functools.partial(
            struct.Struct(f"{tensors}Q").pack_into, self._cells, 0
        )


class _Config(ctypes.Structure):
    """How a kernel is launched, as the driver reads it: CUDA's CUlaunchConfig."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


def launcher(
    binary: Binary, arguments: Arguments, *, grid: int, device: int
) -> Callable[..., None] | None:
    """A function of the tensors' addresses that launches the kernel; None where only Triton can.

    Args:
        binary: the kernel. arguments: its own. grid: programs.
        device: number of the GPU, which is the current one here and when it is launched.
    """
    cuda = _library()
    if cuda is None or not binary.plain:
        return None
    if grid == 0:  # which the driver refuses
        return lambda *addresses: None
    function = _loaded(binary, device)
    if function is None or not _fits(cuda, function, arguments.sizes):
        return None
    shape = (grid, 1, 1, _WARP * binary.warps, 1, 1, binary.shared)
    config, write = _Config(*shape), arguments.write
    launch = functools.partial(
        cuda.cuLaunchKernelEx,
        ctypes.byref(config),
        ctypes.c_void_p(function),
        arguments.pointers,
        None,
    )
    stream_of = torch._C._cuda_getCurrentRawStream
    lock = threading.Lock()  # threads share what is written to

    def call(*addresses: int) -> None:
        with lock:
            write(*addresses)
            config.stream = stream_of(device)
            status = launch()
            if status == _INVALID_CONTEXT:  # this thread's first use of the GPU
                torch.cuda.set_device(device)
                status = launch()
        if status:
            raise RuntimeError(f"{binary.name}: CUDA's driver refused the launch, error {status}.")

    return call


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
