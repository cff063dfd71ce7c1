"""The verifier on graphs that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from moda_compile import MoDAConfig, MoDAError, fx, verify
from moda_compile.markers import Spec
from moda_compile.plan import Plan
from moda_compile.testing import StackConfig
from tests.graph import graphs

OPS = torch.ops.moda_compile
STACK = StackConfig(layers=3, kv_heads=2, groups=2)


def writers(gm: GraphModule) -> Any:
    return graphs.nodes_of(gm, OPS.write_slot)


def readers(gm: GraphModule) -> Any:
    return graphs.nodes_of(gm, OPS.attend)


def change(node: Any, index: int, value: Any) -> None:
    args = list(node.args)
    args[index] = value
    node.args = tuple(args)


def swapped_slots(gm: GraphModule) -> None:
    last = readers(gm)[-1]
    change(last, 4, last.args[4][::-1])
    change(last, 5, last.args[5][::-1])


def swapped_values_only(gm: GraphModule) -> None:
    last = readers(gm)[-1]
    change(last, 5, last.args[5][::-1])


def keys_for_values(gm: GraphModule) -> None:
    last = readers(gm)[-1]
    change(last, 5, last.args[4])


def missing_reader_slot(gm: GraphModule) -> None:
    last = readers(gm)[-1]
    change(last, 4, last.args[4][:1])
    change(last, 5, last.args[5][:1])


def missing_writer(gm: GraphModule) -> None:
    second = writers(gm)[1]
    second.replace_all_uses_with(second.args[0])
    gm.graph.erase_node(second)


def wrong_index(gm: GraphModule) -> None:
    change(writers(gm)[1], 3, 0)


def wrong_count(gm: GraphModule) -> None:
    change(writers(gm)[0], 4, 3)


def skipped_token(gm: GraphModule) -> None:
    """Layer 1's attention takes the first writer's token: that one is then used twice."""
    change(readers(gm)[1], 3, writers(gm)[0])


def no_token(gm: GraphModule) -> None:
    change(writers(gm)[1], 0, None)


def unread_attention(gm: GraphModule) -> None:
    last = readers(gm)[-1]
    out = next(u for u in last.users if u.args[1] == 0)
    out.replace_all_uses_with(last.args[0])
    for user in list(last.users):
        gm.graph.erase_node(user)
    gm.graph.erase_node(last)


def wrong_dtype(gm: GraphModule) -> None:
    key = readers(gm)[0].args[1]
    key.meta[fx.VALUE] = key.meta[fx.VALUE].double()


def wrong_shape(gm: GraphModule) -> None:
    value = readers(gm)[1].args[2]
    value.meta[fx.VALUE] = value.meta[fx.VALUE][:, :1]


def left_mark(gm: GraphModule) -> None:
    spec = Spec(block="x", config=MoDAConfig(), attentions=3, strict=True, ffn=False)
    first = readers(gm)[0]
    with gm.graph.inserting_before(first):
        gm.graph.call_function(OPS.mark.default, (first.args[0], [], spec.to_json()))


def reader_before_writer(gm: GraphModule) -> None:
    writers(gm)[0].prepend(readers(gm)[1])


BROKEN: dict[Callable[[GraphModule], None], str] = {
    swapped_slots: "order they were written",
    swapped_values_only: "order they were written",
    keys_for_values: "order they were written",
    missing_reader_slot: "reads 1 slots, planned 2",
    missing_writer: "order they were written",
    wrong_index: "slot 0 is written out of order",
    wrong_count: r"accumulators of \[3\] slots, planned \[2\]",
    skipped_token: "token does not come from the writer before it",
    no_token: "slot 1 is written out of order",
    unread_attention: "not all of 3 were replaced",
    wrong_dtype: "torch.float64",
    wrong_shape: r"is \(1, 1, 5, 8\)",
    left_mark: "a mark was left",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_graph_is_caught(damage: Callable[[GraphModule], None]) -> None:
    gm, plan, _ = graphs.rewritten(STACK)
    verify.check(gm, plan)
    damage(gm)
    with pytest.raises(MoDAError, match=BROKEN[damage]) as caught:
        verify.check(gm, plan)
    assert "internal error" in str(caught.value)


def test_a_use_before_its_definition_is_caught() -> None:
    """torch.fx's own lint says so."""
    gm, plan, _ = graphs.rewritten(STACK)
    reader_before_writer(gm)
    with pytest.raises(RuntimeError, match="before it has been defined"):
        verify.check(gm, plan)


def test_an_unplanned_rewrite_is_caught() -> None:
    gm, plan, _ = graphs.rewritten(STACK)
    with pytest.raises(MoDAError, match="more than 0 attentions"):
        verify.check(gm, Plan(config=plan.config, reads=plan.reads))


def test_an_untouched_graph_passes() -> None:
    gm, plan, _ = graphs.rewritten(STACK, depth=False)
    verify.check(gm, plan)
