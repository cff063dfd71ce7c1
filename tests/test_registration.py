"""Operators registered without custom_op's wrappers keep what those are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moda_compile import registration


@registration.operator("test_added", mutates="total")
def added(x: Tensor, total: Tensor | None, factor: float = 2.0) -> Tensor:
    if total is not None:
        total += factor * x
    return x + 1


@registration.fake("test_added")
def _(x, total, factor=2.0):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def test_mutation_is_counted() -> None:
    """Or autograd would not notice that a tensor it saved has changed."""
    x, total = torch.ones(3), torch.zeros(3)
    version = total._version
    assert torch.equal(added(x, total), x + 1)
    assert torch.equal(total, 2 * x)
    assert total._version > version
    before = total._version
    added(x, total=total, factor=1.0)
    assert total._version > before
    assert torch.equal(added(x, None), x + 1)


def test_saved_tensor_that_was_written_to_raises() -> None:
    weight = torch.ones(3, requires_grad=True)
    total = torch.zeros(3)
    product = (weight * total).sum()  # saves total
    added(torch.ones(3), total)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_compiled() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        made = torch.ops.moda_compile.test_added(x, total)
        return made, total

    x = torch.randn(4)
    for got, expected in zip(
        torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x), strict=True
    ):
        assert torch.equal(got, expected)


def test_opcheck() -> None:
    opcheck(torch.ops.moda_compile.test_added.default, (torch.randn(3), torch.zeros(3), 1.5))
