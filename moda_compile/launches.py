"""The operator that launches a kernel of a layer, as a graph has it: see `kernels.recorded`.

What the operators of `ops` and `gathered` do for a layer is the platform's attention and a launch;
`passes.unfold` puts these in their place. Inductor calls the attention itself, and of the launch it
knows what it reads and makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from moda_compile import registration


@registration.operator("launch", undispatched=True)
def launch(tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    """Results of one launch of a kernel that writes to nothing it is given.

    Args:
        tensors: what it is given. text: the rest, of `kernels.recorded.record`.
    """
    return _run()(tensors, text)


@functools.cache  # a call in a step of few tokens is not to look a module up
def _run() -> Callable[[Sequence[Tensor], str], list[Tensor]]:
    from moda_compile.kernels import recorded

    return recorded.run


@registration.fake("launch")
def _(tensors, text):  # type: ignore[no-untyped-def]
    from moda_compile.kernels import recorded

    return [
        tensors[0].new_empty_strided(shape, stride, dtype=dtype)
        for shape, stride, dtype in recorded.results(text)
    ]
