"""Random stacks: every spelling of one model is that model, in itself and under the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast, get_args, get_type_hints

import pytest
import torch

from moda_compile.errors import InputError
from moda_compile.testing import (
    ByHand,
    Case,
    PairConfig,
    RandomPair,
    RandomStack,
    Reader,
    ReferenceMode,
    StackConfig,
    Variant,
    reference,
)
from moda_compile.testing.cores import NearMiss
from moda_compile.testing.masks import MASKS

# float64: sums of a few dozen terms of size 1, in another order, differ by some 1e-15; 1e-12 leaves
# room and is far below any wrong formula.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}

HAND = [
    *(ByHand(product=p) for p in get_args(get_type_hints(ByHand)["product"])),
    *(ByHand(scaling=s) for s in ("divide", "query", "key", "both")),
    ByHand(softmax="float32", masking="where", hidden="large", dropout=True),
    ByHand(softmax="method", masking="add", hidden="min"),
]


@pytest.mark.parametrize("how", HAND, ids=repr)
@pytest.mark.parametrize("mask", ["tril_bool", "alibi", "padding_right_causal"])
def test_attention_by_hand_is_attention(how: ByHand, mask: Any) -> None:
    """Straight and under the oracle; nothing in these masks leaves a row empty."""
    config = StackConfig(layers=3, kv_heads=2, mask=mask, scale=0.4, batch=2, dtype="float64")
    sdpa, hand = RandomStack(config), RandomStack(replace(config, core=how))
    inputs = config.inputs()
    torch.testing.assert_close(hand(*inputs), sdpa(*inputs), **CLOSE)
    left, right = (reference(m, *inputs, **m.oracle("shared", {})) for m in (sdpa, hand))
    torch.testing.assert_close(right, left, **CLOSE)
    assert (left - sdpa(*inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("module", ["batch_first", "length_first"])
@pytest.mark.parametrize("mask", ["flag", "none", "alibi", "padding_right"])
def test_packed_modules_are_attention(module: Any, mask: Any) -> None:
    config = StackConfig(layers=3, kv_heads=2, mask=mask, batch=2, bias=True, dtype="float64")
    plain, packed = RandomStack(config), RandomStack(replace(config, module=module))
    state = plain.state_dict()
    for i in range(3):
        path = f"blocks.{i}.attention."
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{path}{name}.{leaf}") for name in "qkv"]
            state[f"{path}attention.in_proj_{leaf}"] = torch.cat(parts)
            state[f"{path}attention.out_proj.{leaf}"] = state.pop(f"{path}out.{leaf}")
    packed.load_state_dict(state)
    inputs = config.inputs()
    torch.testing.assert_close(packed(*inputs), plain(*inputs), **CLOSE)
    left, right = (reference(m, *inputs, **m.oracle("shared", {})) for m in (plain, packed))
    torch.testing.assert_close(right, left, **CLOSE)


@pytest.mark.parametrize("mask", [m for m in MASKS if m not in ("none", "flag")])
def test_masks_hide_what_they_say(mask: Any) -> None:
    """By changing one token at a time: who else notices is who sees it."""
    config = StackConfig(layers=1, mask=mask, ffn="none", batch=2, length=6, dtype="float64")
    stack = RandomStack(config)
    (ids, *extra) = config.inputs()
    seen = torch.zeros(2, 6, 6, dtype=torch.bool)
    for u in range(6):
        other = ids.clone()
        other[:, u] = (ids[:, u] + 1) % 29
        seen[:, :, u] = (stack(other, *extra) - stack(ids, *extra)).abs().amax(-1) > 1e-9
    t, u = torch.arange(6)[:, None], torch.arange(6)
    causal, segment = u <= t, extra[0] if extra else torch.ones(2, 6)
    real, same = segment[:, None, :] > 0, segment[:, :, None] == segment[:, None, :]
    expected = {
        "window_bool": causal & (t - u < 3),
        "window_both": (t - u).abs() <= 2,
        "prefix": causal | (u < 3),
        "bias": torch.ones(6, 6, dtype=torch.bool),
        "padding_right": real,
        "padding_right_causal": real & causal,
        "padding_left_causal": real & causal,
        "documents": same & causal,
        "documents_both": same,
    }.get(mask, causal)
    expected = expected.expand(2, 6, 6) | torch.eye(6, dtype=torch.bool)  # the residual stream
    assert torch.equal(seen, expected)


def test_experts_are_one_function_in_three_spellings() -> None:
    config = StackConfig(layers=2, ffn="moe_dense", batch=2, dtype="float64")
    (ids,) = config.inputs()
    expected = RandomStack(config)(ids)
    for ffn in ("moe_gather", "moe_sorted"):
        other = RandomStack(replace(config, ffn=cast(Any, ffn)))
        torch.testing.assert_close(other(ids), expected, **CLOSE)


def test_checkpoints_and_shared_layers_are_the_same_model() -> None:
    config = StackConfig(layers=3, variants=(Variant(), Variant(shares_kv=True)), passes=2)
    plain, saved = RandomStack(config), RandomStack(replace(config, checkpoint=True))
    (ids,) = config.inputs()
    assert torch.equal(plain(ids), saved(ids))
    stack = (1, 8, 8)
    own, reader = stack, Reader(stack=stack)
    assert plain.oracle("none", {})["stacks"] == [own, reader, own] * 2


def test_a_pair_keeps_its_stacks_apart() -> None:
    config = PairConfig(second=StackConfig(layers=2, head_dim=4, width=8), join="cross")
    pair = RandomPair(config)
    first, second = ("first", (1, 8, 8)), ("second", (1, 4, 4))
    expected = [first, first, second, None, second, None]
    assert pair.oracle("none", {})["stacks"] == expected
    mode = ReferenceMode(pair, **pair.oracle("none", {}))
    with mode:
        pair(*config.inputs())
    assert (mode.attentions, mode.calls) == (4, 6)


@pytest.mark.parametrize("kind", get_args(NearMiss))
def test_near_misses_are_something_else(kind: NearMiss) -> None:
    config = StackConfig(mask="tril_bool", kv_heads=2, core=ByHand())
    (ids,) = config.inputs()
    miss = RandomStack(replace(config, near_miss=kind))(ids)
    assert (miss - RandomStack(config)(ids)).abs().max() > 1e-3


def test_impossible_configs_are_refused() -> None:
    for options in (
        {"groups": 2, "core": ByHand()},
        {"module": "batch_first", "rotary": "half"},
        {"module": "batch_first", "value_dim": 4},
        {"projection": "grouped", "value_dim": 4},
        {"variants": (Variant(shares_kv=True),)},
        {"variants": (Variant(), Variant(shares_kv=True, head_dim=16))},
    ):
        with pytest.raises(InputError):
            StackConfig(**cast(Any, options))
    with pytest.raises(InputError, match="the same length"):
        PairConfig(second=StackConfig(length=7))


def test_groups_need_a_layout_that_can_hold_them() -> None:
    with pytest.raises(InputError, match="got groups=2, needs 1"):
        StackConfig(groups=2, projection="chunk")


def test_reprs_run() -> None:
    stack = RandomStack(StackConfig(layers=2, mask="window_bool", scale=0.3))
    again = eval(repr(stack))
    (ids,) = stack.config.inputs()
    assert torch.equal(stack(ids), again(ids))
    how = ByHand(product="bmm", hidden="large")
    config = StackConfig(layers=3, core=how, variants=(Variant(), Variant(mixer="convolution")))
    for case in (Case(model=config, lengths=(3,)), Case(model=PairConfig(join="apart"))):
        assert eval(repr(case)) == case
