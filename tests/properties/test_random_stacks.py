"""Any stack, any FFN slots, any backend: the conversion computes MoDA.

Examples are the same on every run. `MODA_EXAMPLES=500 pytest tests/properties` draws that many new
ones a test; a failure prints a runnable reproduction and Hypothesis' blob. Thousands, in one
command: `python -m moda_compile.testing.soak`.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.testing import (
    ByHand,
    Case,
    StackConfig,
    Variant,
    cases,
    check_conversion,
    stacks,
)
from tests.properties.profile import profile


@profile(24)
@given(
    case=cases(max_layers=3, features=["low_precision", "autocast", "aot", "learned_bias", "masks"])
)
def test_uniform_stacks(case: Case) -> None:
    case.check()


# Inductor takes 20 to 40 seconds an example on two cores, and shrinking would take an hour: the
# printed reproduction is enough.
@profile(2, shrink=False)
@given(stack=stacks(max_layers=2), ffn_kv=st.sampled_from(["none", "projected", "shared"]))
def test_inductor(stack: Any, ffn_kv: Any) -> None:
    Case(model=stack.config, ffn_kv=ffn_kv, backend="inductor").check()


@profile(3)
@given(stack=stacks(max_layers=3))
def test_depth_off(stack: Any) -> None:
    check_conversion(stack, stack.config.inputs(), MoDAConfig(depth=False), backend="aot_eager")


@pytest.mark.parametrize("ffn_kv", ["none", "projected", "shared"])
@pytest.mark.parametrize(
    "config",
    [
        StackConfig(layers=1),  # no slot at all
        StackConfig(layers=2, length=1),
        # Keys are rotated behind the repetition, values are not.
        StackConfig(kv_heads=2, groups=3, rotary="half", repeat="expand_before"),
    ],
    ids=["one-layer", "one-token", "repeat-then-rotate"],
)
def test_corners(config: StackConfig, ffn_kv: Any) -> None:
    # With explain(), which the drawn examples go without.
    options = MoDAConfig(ffn_kv=ffn_kv)
    check_conversion(Case(model=config).build(), config.inputs(), options, backend="eager")


TWO_SHAPES = (Variant(), Variant(head_dim=16))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (StackConfig(layers=4, variants=TWO_SHAPES), 4),
        (StackConfig(layers=4, variants=(Variant(), Variant(mixer="convolution"))), 2),
        (StackConfig(layers=2, passes=2), 4),
        (StackConfig(layers=3, near_miss="linear", near_miss_layer=1), 2),
    ],
    ids=["shapes", "hybrid", "reused", "linear"],
)
def test_explain_lists_what_is_converted(config: StackConfig, expected: int) -> None:
    model = Case(model=config).build()
    report = moda_compile.explain(model, *config.inputs())
    assert (len(report.attentions), len(report.refusals)) == (expected, 0)


BY_HAND = {"core": ByHand(), "groups": 2, "repeat": "expand_before"}


@pytest.mark.parametrize(
    "case",
    [
        # The walk through the experts ran on through an attention by hand beside them.
        Case(
            model=StackConfig(ffn="moe_dense", order="attention_first", **BY_HAND), ffn_kv="shared"
        ),
        # Keys repeated and then rotated, values only repeated: the group was taken for the batch.
        Case(
            model=StackConfig(
                layers=2,
                kv_heads=3,
                groups=4,
                width=16,
                projection="sizes",
                rotary="half",
                repeat="expand_before",
                core=ByHand(product="einsum"),
                batch=2,
            )
        ),
        # One sequence in the batch: its heads were taken for the batch in some layers only, which
        # cut the stack without a word.
        Case(
            model=StackConfig(
                layers=4,
                kv_heads=2,
                head_dim=16,
                projection="grouped",
                rotary="pairs",
                repeat="repeat_interleave",
                core=ByHand(),
                passes=2,
                variants=(Variant(), Variant(kv_heads=1, groups=2, head_dim=8)),
            ),
            evaluate=True,
        ),
        # The oracle filled float32's lowest number into bfloat16 scores.
        Case(model=StackConfig(rotary="pairs", core=ByHand(hidden="min")), autocast=True),
    ],
    ids=["parallel experts", "rotated heads", "one sequence", "autocast"],
)
def test_what_thousands_have_found(case: Case) -> None:
    case.check()
