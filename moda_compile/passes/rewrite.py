"""Put the combined attention in: the only pass that changes what the graph computes.

Why it is safe: every use of an attention's output gets the new output, of the same shape, dtype
and memory order; every slot is written in front of its first reader; and a writer's keys and
values are the very tensors its own attention uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx, markers, ops
from moda_compile.errors import RewriteError
from moda_compile.patterns.row import Attention
from moda_compile.plan import Plan, Slot

_attend = torch.ops.moda_compile.attend.default
_write_slot = torch.ops.moda_compile.write_slot.default


def run(gm: GraphModule, plan: Plan) -> None:
    """Replace each attention of the plan. With no slots, nothing is changed at all."""
    if not plan.slots:
        return
    keys: list[Node] = []
    values: list[Node] = []
    token: Node | None = None
    for layer, attention in enumerate(plan.attentions):
        node, dtype = attention.node, fx.value(attention.node).dtype
        with gm.graph.inserting_before(node):
            # Autocast lowers what SDPA computes in, not what a custom operator does.
            query, key, value = (
                fx.insert(gm, "to", (x, dtype), like=node)
                for x in (attention.query, attention.key, attention.value)
            )
            for slot in plan.slots:
                if slot.ffn is not None and slot.layer == layer - 1:
                    written = _ffn_key_value(gm, plan, slot, dtype, like=node)
                    token = _write(gm, plan, slot, token, *written, like=node)
                    keys.append(written[0])
                    values.append(written[1])
            # The own slot is written in front of the attention, so in backward the row is taken
            # out behind it, and Inductor adds it to the sequence part's gradient for free.
            depth = list(keys), list(values)
            for slot in plan.slots:
                if slot.ffn is None and slot.layer == layer:
                    token = _write(gm, plan, slot, token, key, value, like=node)
                    keys.append(key)
                    values.append(value)
            scale = attention.scale if attention.scale is not None else _default_scale(attention)
            assert token is not None and len(depth[0]) == plan.reads[layer]
            both = fx.insert(
                gm,
                _attend,
                (query, key, value, token, *depth, attention.is_causal, float(scale)),
                like=node,
            )
            output, token = fx.item(gm, both, 0), fx.item(gm, both, 1)
            for step in attention.restore:
                output = fx.insert(
                    gm, step.target, (output, *step.args), dict(step.kwargs), like=node
                )
        node.replace_all_uses_with(output)
        gm.graph.erase_node(node)


def _default_scale(attention: Attention) -> float:
    return float(int(fx.value(attention.query).shape[-1]) ** -0.5)


def _write(
    gm: GraphModule, plan: Plan, slot: Slot, token: Node | None, key: Node, value: Node, like: Node
) -> Node:
    dtype = ops.accumulator_dtype(fx.value(like).dtype, plan.config.accumulator_dtype)
    args = (token, key, value, slot.index, len(plan.slots), dtype)
    return fx.insert(gm, _write_slot, args, like=like)


def _ffn_key_value(
    gm: GraphModule, plan: Plan, slot: Slot, dtype: torch.dtype, like: Node
) -> tuple[Node, Node]:
    """Append what makes an FFN's slot: linear, then the layer's own treatment of its keys."""
    assert slot.ffn is not None and slot.key is not None and slot.value is not None
    made = []
    weights = _projected(plan, slot) if plan.config.ffn_kv == "projected" else (None, None)
    for projection, projected in zip((slot.key, slot.value), weights, strict=True):
        weight, bias = (projected, None) if projected is not None else projection.weight(gm)
        features = fx.insert(
            gm, torch.nn.functional.linear, (slot.ffn.input, weight, bias), like=slot.ffn.node
        )
        result = projection.apply(gm, features)
        made.append(fx.insert(gm, "to", (result, dtype), like=like))
    return made[0], made[1]


def _projected(plan: Plan, slot: Slot) -> tuple[Node, Node]:
    """The new weights that the slot's FFN brought into the graph with its mark."""
    assert slot.ffn is not None
    carriers = [m for m in plan.marks if markers.spec_of(m.args).ffn]
    number = [s.ffn for s in plan.slots if s.ffn is not None].index(slot.ffn)
    if number >= len(carriers):
        raise RewriteError(
            f"the graph holds projection weights for {len(carriers)} FFNs, so none for this one.",
            fix="convert the model with moda_compile.convert, which adds them, and call the "
            "converted model itself.",
            block=slot.ffn.path,
            source=fx.source_line(slot.ffn.node),
        )
    weights: Any = carriers[number].args[1]
    return weights[0], weights[1]
