"""What a Triton launch needs to know about its tensors: device, alignment, output layout."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

EMULATED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""The kernels run in Triton's interpreter, on CPU tensors (Triton reads the variable at import)."""

# Tensor.contiguous() selects the tensor's device, which fails for a fake CUDA tensor where there is
# no GPU; the operator behind it doesn't. (Indexing is the same: narrow and select are used here.)
contiguous = torch.ops.aten.contiguous.default

# Of an H100: assumed where a graph is traced without a GPU.
_MULTIPROCESSORS = 132
_BANDWIDTH = 3.35e12  # bytes per second
WIDEST_ACCESS = 16  # bytes; the widest load a GPU thread can make


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of x's device; (0, 0) where there is none (interpreter, fake tensors)."""
    if x.is_cuda and torch.cuda.is_available():
        return torch.cuda.get_device_capability(x.device)
    return (0, 0)


def multiprocessors(x: Tensor) -> int:
    """How many of them x's GPU has."""
    if x.is_cuda and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
    return _MULTIPROCESSORS


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that the GPU's memory moves by its data sheet: a copy gets about 0.88."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        rate, width = properties.memory_clock_rate, properties.memory_bus_width  # kHz, bits
        if rate > 0 and width > 0:  # not of every GPU
            return 2e3 * rate * width / 8
    return _BANDWIDTH


def dependent_launches(x: Tensor) -> bool:
    """Whether a kernel on x's GPU may be launched before the one before it has ended, and wait for
    it inside (programmatic dependent launch, from Hopper on).
    """
    return not EMULATED and torch.version.hip is None and capability(x) >= (9, 0)


def asks() -> bool:
    """Whether kernels may have the GPU bring something into its L2 cache: by NVIDIA's code."""
    return not EMULATED and torch.version.hip is None


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's GPU the current one: Triton launches on the current device, whatever it is given."""
    if x.is_cuda and torch.cuda.is_available() and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def launchable(kernel: Any, traced: bool = False, registers: int | None = None) -> Any:
    """What to launch the kernel with, as `launchable(kernel)[grid](*arguments, **constants)`.

    Constants are given by name, all others by position.

    Args:
        kernel: a Triton JIT function.
        traced: the launch may be traced: then it is recorded in the graph that is being made
            (`torch.library.wrap_triton`).
        registers: the most that a thread may have, where the compiler takes such a limit (CUDA).
    """
    if not isinstance(kernel, triton.JITFunction):  # of the interpreter
        return kernel
    if torch.version.hip is not None:
        registers = None
    if traced:
        return torch.library.wrap_triton(_limited(kernel, registers) if registers else kernel)
    return _Remembered(kernel, **{"maxnreg": registers} if registers else {})


@functools.cache
def _limited(kernel: Any, registers: int) -> Any:
    # PyTorch records this option only as one of an autotuner, which has nothing to choose here.
    return triton.autotune([triton.Config({}, maxnreg=registers)], key=[])(kernel)


class _Remembered:
    """A kernel, launched without Triton's own bookkeeping from the second time on.

    In each launch Triton binds and inspects every argument to look up what it has compiled: up to a
    tenth of a millisecond of host time for a kernel of a hundred, where a step of few tokens has
    tens of launches that take the GPU less. The compiled kernel is kept here by at least as much as
    Triton tells arguments apart by: an integer that it may specialise on counts as itself.
    """

    def __init__(self, kernel: Any, **options: int) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *arguments: Any, **constants: Any) -> None:
        constants |= self.options
        kinds = _kinds(arguments, _not_specialised(self.kernel))
        device = triton.runtime.driver.active.get_current_device()
        key = (id(self.kernel), device, kinds, tuple(constants.items()))
        known = _compiled.get(key)
        if known is not None:
            _, compiled, tail = known
            compiled[(*grid, 1, 1)](*arguments, *tail)
            return
        compiled = self.kernel[grid](*arguments, **constants)
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        names = self.kernel.arg_names[len(arguments) :]
        _compiled[key] = self.kernel, compiled, tuple(constants.get(name) for name in names)


# By the kernel's identity, which is its own as long as the kernel is kept here.
_compiled: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
_INT32, _INT64 = 1 << 31, 1 << 63
_MOST_COMPILED = 4096  # of a length that changes with every call, each is an entry


@functools.cache
def _not_specialised(kernel: Any) -> tuple[bool, ...]:
    return tuple(bool(x.do_not_specialize) for x in kernel.params)


def _kinds(arguments: Sequence[Any], loose: Sequence[bool]) -> tuple[Any, ...]:
    """What Triton compiles anew for. loose: of which integers it only looks at the width."""
    return tuple(
        [
            ((32 if -_INT32 <= x < _INT32 else 64 if x < _INT64 else 65) if only_width else x)
            if type(x) is int
            else (x.dtype, x.data_ptr() % WIDEST_ACCESS == 0)
            if isinstance(x, Tensor)
            else _kinds(x, (False,) * len(x))
            if type(x) is tuple
            else type(x)
            for x, only_width in zip(arguments, loose, strict=False)
        ]
    )


def is_traced(x: Tensor) -> bool:
    """x stands for a tensor of a graph that is being recorded, or something watches the dispatch.

    A plain call must not go through `wrap_triton`: it would enter the kernel into a table of
    PyTorch's that lives as long as the process, once a call.
    """
    return not _is_plain(x) or torch._C._len_torch_dispatch_stack() > 0


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


def token_major_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised [..., H, T, d] tensor in [..., T, H, d] memory order."""
    *outer, heads, tokens, head_dim = shape
    return like.new_empty((*outer, tokens, heads, head_dim)).transpose(-3, -2)


def token_major(x: Tensor) -> Tensor:
    """x [B, H, T, d] in [B, T, H, d] memory order; itself if it lies so already."""
    (_, h, t, d), strides = x.shape, x.stride()
    # Of symbolic numbers there may be no answer, which PyTorch's contiguous can do without.
    known = _is_plain(x) or all(type(n) is int for n in (h, t, d, *strides))
    if known and strides == (t * h * d, d, h * d, 1):
        return x
    return contiguous(x.transpose(1, 2)).transpose(1, 2)


def unit_rows(x: Tensor) -> Tensor:
    """x with a last stride of 1, as every kernel here requires; itself if it has that already."""
    return x if x.size(-1) == 1 or x.stride(-1) == 1 else contiguous(x)


def alignment(*tensors: Tensor) -> int:
    """The number of bytes, at most 16, that divides the address of every row of the tensors.

    A fake tensor has no address: its storage is taken to be aligned, which holds for PyTorch's
    allocators and which Inductor checks for the inputs of a graph.
    """
    return min([_alignment(x) for x in tensors])


def _alignment(x: Tensor) -> int:
    size = x.element_size()
    if _is_plain(x):
        bits = WIDEST_ACCESS | x.data_ptr()
        for n, stride in zip(x.shape[:-1], x.stride(), strict=False):
            if n != 1:
                bits |= stride * size
        return bits & -bits  # of a power of two: the lowest bit that is set in any decides
    steps: list[Any] = [
        stride * size
        for n, stride in zip(x.shape[:-1], x.stride(), strict=False)
        if not equals(n, 1)
    ]
    steps.append(x.storage_offset() * size)
    if all(type(step) is int for step in steps):
        return math.gcd(WIDEST_ACCESS, *steps)
    width = WIDEST_ACCESS
    while width > size and not all(statically_known_true(s % width == 0) for s in steps):
        width //= 2
    return width


def equals(n: Any, number: int) -> bool:
    """n is known to be this number: no guard on a symbolic one."""
    return type(n) is int and n == number
