"""What looks like attention and is something else is never rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given

import moda_compile
from moda_compile import RewriteError
from moda_compile.testing import Case, StackConfig, stacks
from moda_compile.testing.cores import NEAR_MISSES
from tests.properties.profile import profile


# One layer of each kind, then all: the first ones also see that the rest of a stack is converted.
@pytest.mark.parametrize("layer", [1, None])
@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_near_misses(kind: Any, layer: int | None) -> None:
    config = StackConfig(mask="tril_bool", kv_heads=2, near_miss=kind, near_miss_layer=layer)
    Case(model=config).check()


@profile(8)
@given(stack=stacks(max_layers=3, features=["masks"], near_miss=True))
def test_near_misses_in_any_stack(stack: Any) -> None:
    case = Case(model=stack.config)
    assume(case.answerable())
    case.check()


def test_not_strict_converts_the_rest() -> None:
    """Whom a near miss is refused to, `strict=False` gives the other layers."""
    config = StackConfig(layers=3, near_miss="softcap", near_miss_layer=1)
    model = Case(model=config).build()
    report = moda_compile.explain(model, *config.inputs())
    assert (len(report.attentions), len(report.refusals)) == (2, 1)
    with pytest.raises(RewriteError):
        moda_compile.convert(model, example_inputs=config.inputs(), backend="eager")
    converted = moda_compile.convert(
        model, example_inputs=config.inputs(), backend="eager", strict=False
    )
    plain = Case(model=config).build()
    assert not torch.equal(converted(*config.inputs()), plain(*config.inputs()))
