"""Any plain stack, any FFN slots, any backend: the conversion computes MoDA.

Examples are the same on every run. `MODA_EXAMPLES=500 pytest tests/properties` draws that many new
ones a test; a failure prints a runnable reproduction and Hypothesis' blob.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import moda_compile
from moda_compile import MoDAConfig, RewriteError
from moda_compile.testing import Budget, RandomStack, StackConfig, check_conversion, stacks

EXAMPLES = int(os.environ.get("MODA_EXAMPLES", "0"))
FFN_KV = st.sampled_from(["none", "projected", "shared"])


def profile(examples: int, *, shrink: bool = True) -> settings:
    """`examples` in CI; there the same ones each time, so that a red run can be trusted."""
    phases = [Phase.explicit, Phase.generate] + [Phase.shrink] * shrink
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        print_blob=True,
        deadline=None,  # compiling takes seconds
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )


def check(stack: RandomStack, moda: MoDAConfig, **options: Any) -> None:
    check_conversion(stack, stack.config.inputs(), moda, **options)


@profile(16)
@given(stack=stacks(), ffn_kv=FFN_KV)
def test_eager(stack: RandomStack, ffn_kv: Any) -> None:
    check(stack, MoDAConfig(ffn_kv=ffn_kv), backend="eager")


@profile(10)
@given(stack=stacks(max_layers=4), ffn_kv=FFN_KV)
def test_aot_eager(stack: RandomStack, ffn_kv: Any) -> None:
    check(stack, MoDAConfig(ffn_kv=ffn_kv), backend="aot_eager")


# Inductor takes 20 to 40 seconds an example on two cores, and shrinking would take an hour: the
# printed reproduction is enough.
@profile(2, shrink=False)
@given(stack=stacks(max_layers=2), ffn_kv=FFN_KV)
def test_inductor(stack: RandomStack, ffn_kv: Any) -> None:
    check(stack, MoDAConfig(ffn_kv=ffn_kv), backend="inductor")


@profile(4)
@given(
    stack=stacks(max_layers=3, dtype="bfloat16"),
    ffn_kv=FFN_KV,
    accumulator_dtype=st.sampled_from(["float32", "model"]),
)
def test_bfloat16(stack: RandomStack, ffn_kv: Any, accumulator_dtype: Any) -> None:
    config = MoDAConfig(ffn_kv=ffn_kv, accumulator_dtype=accumulator_dtype)
    # bfloat16 needs less than float32: see Budget.
    check(stack, config, backend="aot_eager", budget=Budget(condition=1.0))


@profile(3)
@given(stack=stacks(max_layers=3))
def test_depth_off(stack: RandomStack) -> None:
    check(stack, MoDAConfig(depth=False), backend="aot_eager")


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
    check(RandomStack(config), MoDAConfig(ffn_kv=ffn_kv), backend="eager")


def test_a_window_is_refused_and_the_model_is_left_alone() -> None:
    """No `is_causal` flag says it, so converting to one would be another model."""
    model = RandomStack(StackConfig(mask="window_bool"))
    (ids,) = model.config.inputs()
    before = model(ids)
    with pytest.raises(RewriteError):
        moda_compile.convert(model, MoDAConfig(), example_inputs=(ids,), backend="eager")
    assert torch.equal(model(ids), before)
