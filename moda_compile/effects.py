"""Have PyTorch find out once, and not for each launch, what a Triton kernel of ours writes to.

A launch in a graph is an operator that says nothing about that: Inductor compiles the kernel's code
to Triton's first representation and follows its stores, for every launch anew. It does so
twice, and a model has two or three launches a layer: 11 of the 53 seconds of a cold compile of 12
layers (H100, torch 2.11), of 32 without the launches.

Why it is safe: which arguments a kernel writes to depends on its code and on what it is compiled
for, its constants and the kinds of its arguments. Those are the key here; numbers are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch._higher_order_ops import triton_kernel_wrap

_OWN = "moda_compile.kernels."
_ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")  # torch 2.11 and 2.13


def remember() -> None:
    """Keep what PyTorch's analysis of the launches of this library's kernels finds.

    Other kernels are analysed as ever. A PyTorch that has no such function is left as it is: there
    compiling takes longer.
    """
    for name in _ANALYSES:
        analyse = getattr(triton_kernel_wrap, name, None)
        if analyse is not None and not isinstance(analyse, _Remembered):
            setattr(triton_kernel_wrap, name, _Remembered(analyse))


class _Remembered:
    """An analysis of (kernel, its arguments by name, metadata), with a memory."""

    def __init__(self, analyse: Callable[..., Any]) -> None:
        self.analyse = analyse
        self.known: dict[Any, Any] = {}
        functools.update_wrapper(self, analyse)

    def __call__(self, kernel: Any, kwargs: Mapping[str, Any], *rest: Any) -> Any:
        # A launch's options, such as num_warps, PyTorch wraps into an autotuner for each launch.
        options = getattr(kernel, "configs", [])
        own = kernel.fn if options else kernel
        if not getattr(own, "__module__", "").startswith(_OWN) or any(rest):
            return self.analyse(kernel, kwargs, *rest)
        constant = {x.name for x in own.params if x.is_constexpr}
        kinds = ((name, _kind(x, name in constant)) for name, x in kwargs.items())
        key = own, tuple(map(str, options)), tuple(sorted(kinds))
        if key not in self.known:
            self.known[key] = self.analyse(kernel, kwargs, *rest)
        return self.known[key]


def _kind(x: Any, constant: bool) -> tuple[str, str]:
    """All of an argument that a kernel's code can depend on."""
    if constant or x is None:
        return "constant", repr(x)
    get_dtype = getattr(x, "get_dtype", None)  # of Inductor's tensors
    dtype = getattr(x, "dtype", None) if get_dtype is None else get_dtype()
    return ("number", type(x).__name__) if dtype is None else ("tensor", str(dtype))
