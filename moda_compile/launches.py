"""The operator that launches a kernel of a layer, as a graph has it: see `kernels.recorded`.

What the operators of `ops` and `gathered` do for a layer is the platform's attention and a launch;
`passes.unfold` puts these in their place. Inductor calls the attention itself, and of the launch it
knows what it reads and makes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_compile import registration

_IMPORT = "from moda_compile.kernels.recorded import run_here as moda_compile_launch"
_NAME = _IMPORT.split()[-1]


@registration.operator("launch")
def launch(tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    """Results of one launch of a kernel that writes to nothing it is given.

    Args:
        tensors: what it is given. text: the rest, of `kernels.recorded.record`.
    """
    from moda_compile.kernels import recorded

    return recorded.run(tensors, text)


@registration.fake("launch")
def _(tensors, text):  # type: ignore[no-untyped-def]
    from moda_compile.kernels import recorded

    return [
        tensors[0].new_empty_strided(shape, stride, dtype=dtype)
        for shape, stride, dtype in recorded.results(text)
    ]


@functools.cache
def teach_inductor() -> None:
    """Have the code that Inductor writes call what launches, instead of the operator.

    On its way through the operator each call passes five functions, and its results are checked to
    be what the launch has just made of known shapes: half of what a launch takes a host whose
    caches hold something else by then.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    class Launch(ir.FallbackKernel):
        """A call of the operator in the code that Inductor writes."""

        def codegen(self, wrapper: Any) -> None:
            if not V.graph.cpp_wrapper:
                wrapper.add_import_once(_IMPORT)
                self.set_python_kernel_name(_NAME)
            super().codegen(wrapper)

    def call(tensors: Any, text: str) -> list[Any]:
        results: Any = Launch.create(operator, tensors, text)  # a list, as the operator's
        for result in results:
            result.skip_size_stride_alignment_checks = True
        return [ir.TensorBox.create(result) for result in results]

    operator = torch.ops.moda_compile.launch.default
    # Tensors have the strides that the launch was recorded with.
    lowering.make_fallback(operator, lowering.constrain_to_fake_tensors, warn=False)
    lowering.register_lowering(operator, type_promotion_kind=None)(call)
