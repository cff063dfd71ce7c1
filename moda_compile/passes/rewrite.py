"""Put the combined attention in: the only pass that changes what the graph computes.

Why it is safe: every use of an attention's output gets the new output, of the same shape, dtype
and layout; every slot is written in front of its first reader; and a writer's keys and values are
the very tensors that its own attention uses, or puts into the KV cache that it uses. Where the plan
has them padded, the columns added are zero: they add nothing to a score, and the output's are taken
off again. So values may have another head_dim than keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx, markers, ops
from moda_compile.errors import RewriteError
from moda_compile.patterns import calls
from moda_compile.patterns.ffn import FFN
from moda_compile.patterns.row import Attention
from moda_compile.plan import Plan, Slot

_attend = torch.ops.moda_compile.attend.default
_write_slot = torch.ops.moda_compile.write_slot.default


def run(gm: GraphModule, plan: Plan) -> None:
    """Replace the attentions of the plan. With no slots, nothing is changed at all."""
    if not plan.slots:
        return
    attentions = {attention.node: layer for layer, attention in enumerate(plan.attentions)}
    carriers = _carriers(gm, plan)
    chains = [_Chain(gm, plan, stack) for stack in range(len(plan.stacks))]
    chain_of = {layer: chains[i] for i, stack in enumerate(plan.stacks) for layer in stack.members}
    # An FFN's slot is written as soon as all it is made from is there, in the region (such as an
    # activation checkpoint) of the FFN itself.
    behind = {slot: _behind(plan, slot, carriers) for slot in plan.slots if slot.ffn is not None}
    waiting: dict[Node, list[Slot]] = {}
    for slot, sources in behind.items():
        for source in sources:
            waiting.setdefault(source, []).append(slot)
    nodes = list(gm.graph.nodes)
    for node, following in zip(nodes, nodes[1:], strict=False):
        if node in attentions:
            layer = attentions[node]
            with gm.graph.inserting_before(node):
                chain_of[layer].attention(layer)
        for slot in waiting.get(node, ()):
            behind[slot].discard(node)
            if not behind[slot]:
                carrier = carriers.get(slot.ffn) if slot.ffn is not None else None
                with gm.graph.inserting_before(following):
                    chains[slot.stack].ffn(slot, None if carrier is None else carrier.args[1])


class _Chain:
    """One stack's slots and token while the graph is walked through."""

    def __init__(self, gm: GraphModule, plan: Plan, stack: int) -> None:
        self.gm, self.plan = gm, plan
        self.slots = [slot for slot in plan.slots if slot.stack == stack]
        first = plan.attentions[plan.stacks[stack].members[0]]
        self.dtype = fx.value(first.node).dtype
        self.value_dim = int(fx.value(first.value).shape[-1])
        self.rows = plan.rows[stack]
        self.replaced = set(plan.replaced)
        self.own = {slot.layer: slot for slot in self.slots if slot.ffn is None}
        self.keys: list[Node] = []
        self.values: list[Node] = []
        self.token: Node | None = None

    def attention(self, layer: int) -> None:
        """Write the attention's slot, then replace the attention if the plan says so."""
        attention = self.plan.attentions[layer]
        slot, replaced = self.own.get(layer), layer in self.replaced
        if slot is None and not replaced:
            return
        node = attention.node
        # Autocast lowers what SDPA computes in, not what a custom operator does.
        query, key, value = (
            self._laid_out(x, like=node)
            for x in self._cast(attention.query, attention.key, attention.value, like=node)
        )
        # The own slot is written in front of the attention, so in backward the row is taken out
        # behind it, and Inductor adds it to the sequence part's gradient for free.
        depth = list(self.keys), list(self.values)
        if slot is not None:
            own_key, own_value = key, value
            if attention.own_key is not None:  # key and value are a KV cache, of others' tokens too
                own_key, own_value = (
                    self._laid_out(x, like=node)
                    for x in self._cast(attention.slot_key, attention.slot_value, like=node)
                )
            self.write(slot, own_key, own_value, like=node)
        if not replaced:
            return
        assert self.token is not None and len(depth[0]) == self.plan.reads[layer]
        scale = float(attention.scale if attention.scale is not None else _default_scale(attention))
        args: tuple[Any, ...]
        if attention.sequence is not None:
            out, lse = attention.sequence
            out = self._laid_out(out, like=node)
            op, args = (
                torch.ops.moda_compile.join.default,
                (out, lse, query, self.token, *depth, scale),
            )
        else:
            args = (query, key, value, self.token, *depth, attention.is_causal, scale)
            op, args = _attend, args if attention.mask is None else (*args, attention.mask)
        both = fx.insert(self.gm, op, args, like=node, instead=_without(args, depth))
        output, self.token = fx.item(self.gm, both, 0), fx.item(self.gm, both, 1)
        if self.rows is not None and self.rows.head_dim > self.value_dim:
            output = self._by_token(output, "narrow", (-1, 0, self.value_dim), like=node)
            output = self._by_token(output, "contiguous", (), like=node)
        for step in attention.restore:
            output = fx.insert(
                self.gm, step.target, (output, *step.args), dict(step.kwargs), like=node
            )
        call = calls.first_of(node)
        node.replace_all_uses_with(output)
        self.gm.graph.erase_node(node)
        if call is not None and call is not node and not call.users:  # of several results
            self.gm.graph.erase_node(call)

    def _cast(self, *nodes: Node, like: Node) -> Any:
        return tuple(fx.insert(self.gm, "to", (x, self.dtype), like=like) for x in nodes)

    def _laid_out(self, x: Node, like: Node) -> Node:
        """x [B, H, T, d] as the plan wants it: zero columns behind its own, token-major."""
        if self.rows is None:
            return x
        missing = self.rows.head_dim - int(fx.value(x).shape[-1])
        if missing:
            return self._by_token(x, torch.nn.functional.pad, ((0, missing),), like=like)
        return self._by_token(x, "contiguous", (), like=like) if self.rows.token_major else x

    def _by_token(self, x: Node, target: Any, args: tuple[Any, ...], like: Node) -> Node:
        """A call whose result lies in memory as [B, T, H, d] does, of x and to x's axes."""
        for step, own in (("transpose", (1, 2)), (target, args), ("transpose", (1, 2))):
            x = fx.insert(self.gm, step, (x, *own), like=like)
        return x

    def ffn(self, slot: Slot, weights: Any) -> None:
        """Write an FFN's slot: linear, then the layer's own treatment of its keys.

        ``weights``: the key's and the value's; ``None`` to share the layer's own.
        """
        assert slot.ffn is not None and slot.key is not None and slot.value is not None
        like = slot.ffn.node
        made = []
        for i, projection in enumerate((slot.key, slot.value)):
            weight, bias = projection.weight(self.gm) if weights is None else (weights[i], None)
            features = fx.insert(
                self.gm, torch.nn.functional.linear, (slot.ffn.input, weight, bias), like=like
            )
            result = projection.apply(self.gm, features)
            cast = fx.insert(self.gm, "to", (result, self.dtype), like=like)
            made.append(self._laid_out(cast, like=like))
        self.write(slot, made[0], made[1], like=like)

    def write(self, slot: Slot, key: Node, value: Node, like: Node) -> None:
        """Append the slot."""
        assert slot.index == len(self.keys)
        dtype = ops.accumulator_dtype(self.dtype, self.plan.config.accumulator_dtype)
        args = (self.token, key, value, slot.index, len(self.slots), dtype)
        self.token = fx.insert(self.gm, _write_slot, args, like=like)
        self.keys.append(key)
        self.values.append(value)


def _without(args: tuple[Any, ...], depth: tuple[list[Node], list[Node]]) -> tuple[Any, ...]:
    """Arguments with one slot only: shapes and dtypes of a result do not depend on how many."""
    return tuple(x[:1] if any(x is slots for slots in depth) else x for x in args)


def _default_scale(attention: Attention) -> float:
    return float(int(fx.value(attention.query).shape[-1]) ** -0.5)


def _behind(plan: Plan, slot: Slot, carriers: dict[FFN, Node]) -> set[Node]:
    assert slot.ffn is not None
    nodes = {plan.attentions[slot.layer].node, slot.ffn.node}
    return nodes | ({carriers[slot.ffn]} if slot.ffn in carriers else set())


def _carriers(gm: GraphModule, plan: Plan) -> dict[FFN, Node]:
    """For each FFN that writes a slot with new weights, the mark that brings them.

    A mark sits on its module's result, so it is the first of its kind behind the FFN.
    """
    if plan.config.ffn_kv != "projected":
        return {}
    ffns = {slot.ffn.node: slot.ffn for slot in plan.slots if slot.ffn is not None}
    marks = {mark for mark in plan.marks if markers.spec_of(mark.args).ffn}
    found: dict[FFN, Node] = {}
    last: FFN | None = None
    for node in gm.graph.nodes:
        if node in ffns:
            last = ffns[node]
        elif node in marks and last is not None:
            found[last], last = node, None
    for ffn in ffns.values():
        if ffn not in found:
            raise RewriteError(
                f"the graph holds projection weights for {len(found)} FFNs, but not for this one.",
                fix="convert the model with moda_compile.convert, which adds them, and call the "
                "converted model itself.",
                block=ffn.path,
                source=fx.source_line(ffn.node),
            )
    return found
