"""What a Triton launch needs to know about its tensors: device, alignment, output layout."""

from __future__ import annotations

import contextlib
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

WIDEST_ACCESS = 16  # bytes; the widest load a GPU thread can make


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of x's device; (0, 0) where there is none (interpreter, fake tensors)."""
    if x.is_cuda and torch.cuda.is_available():
        return torch.cuda.get_device_capability(x.device)
    return (0, 0)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's GPU the current one: Triton launches on the current device, whatever it is given."""
    if x.is_cuda and torch.cuda.is_available() and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def launchable(kernel: Any, traced: bool) -> Any:
    """The kernel, in the wrapper that records the launch when a graph is being traced.

    Args:
        kernel: a Triton JIT function.
        traced: the launch may be traced (`torch.library.wrap_triton`); else it is a plain launch,
            which costs less host time.
    """
    if traced and isinstance(kernel, triton.JITFunction):
        return torch.library.wrap_triton(kernel)
    return kernel


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
    return contiguous(x.transpose(1, 2)).transpose(1, 2)


def unit_rows(x: Tensor) -> Tensor:
    """x with a last stride of 1, as every kernel here requires; itself if it has that already."""
    return x if x.size(-1) == 1 or x.stride(-1) == 1 else contiguous(x)


def alignment(*tensors: Tensor) -> int:
    """The number of bytes, at most 16, that divides the address of every row of the tensors.

    A fake tensor has no address: its storage is taken to be aligned, which holds for PyTorch's
    allocators and which Inductor checks for the inputs of a graph.
    """
    return math.gcd(*(_alignment(x) for x in tensors))


def _alignment(x: Tensor) -> int:
    size = x.element_size()
    steps: list[Any] = [
        stride * size for n, stride in zip(x.shape[:-1], x.stride(), strict=False) if not _is_one(n)
    ]
    if _is_plain(x):
        return math.gcd(WIDEST_ACCESS, x.data_ptr(), *steps)
    steps.append(x.storage_offset() * size)
    if all(type(step) is int for step in steps):
        return math.gcd(WIDEST_ACCESS, *steps)
    width = WIDEST_ACCESS
    while width > size and not all(statically_known_true(s % width == 0) for s in steps):
        width //= 2
    return width


def _is_one(n: Any) -> bool:
    return type(n) is int and n == 1
