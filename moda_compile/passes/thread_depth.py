"""Decide which slots exist, who writes them and who reads them.

In a stack, attention j reads what the members before it wrote, which is slots 0 .. n-1 for some n,
growing with j: the order of the slots' rows. A layer that attends with an earlier layer's keys and
values has produced none of its own, and writes no slot.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import ffn as ffn_pattern
from moda_compile.patterns import projection, streams
from moda_compile.patterns.row import Refused
from moda_compile.plan import Plan, Slot, Stack

_ALONE = Refused(
    "the attentions do not form one stack, nor several: no two of them follow one another with "
    "keys and values of one shape, so none has depth KV to read.",
    "convert the part of the model that holds the stack, or leave the model as it is.",
)


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.slots``, ``plan.reads``, ``plan.replaced``. No slot is made that none reads.

    Raises:
        RewriteError: if a layer has no FFN that can write, or there is nothing to share at all.
    """
    plan.reads = [0] * len(plan.attentions)
    if not plan.config.depth:
        return
    written_by = _ffns(gm, plan) if plan.config.ffn_kv != "none" else {}
    for number, stack in enumerate(plan.stacks):
        _fill(plan, number, stack, written_by)
    if len(plan.stacks) > 1 and not plan.slots:
        alone = plan.attentions[plan.stacks[1].members[0]]
        plan.refuse(alone.node, alone.pattern, _ALONE)
    writers = {slot.layer for slot in plan.slots}
    for number, attention in enumerate(plan.attentions):
        # One that reads no slot computes what it did before, so only the fast path takes it over: a
        # mask may have rows that see nothing, of which each spelling makes something else.
        plain = attention.mask is None and attention.sequence is None
        if plan.reads[number] or (number in writers and plain):
            plan.replaced.append(number)


def _fill(plan: Plan, number: int, stack: Stack, written_by: dict[int, ffn_pattern.FFN]) -> None:
    produced: set[tuple[Node, Node]] = set()
    count = 0
    for layer in stack.members[:-1]:
        attention = plan.attentions[layer]
        plan.reads[layer] = count
        made = attention.slot_key, attention.slot_value
        if made not in produced:
            plan.slots.append(Slot(index=count, layer=layer, stack=number))
            produced.add(made)
            count += 1
        if layer in written_by:
            plan.slots.append(_ffn_slot(plan, number, count, layer, written_by[layer]))
            count += 1
    plan.reads[stack.members[-1]] = count


def _ffns(gm: GraphModule, plan: Plan) -> dict[int, ffn_pattern.FFN]:
    """The one FFN of each layer that another of its stack follows."""
    ffns = ffn_pattern.find(gm.graph, {attention.node for attention in plan.attentions})
    reach = streams.reach(gm.graph.nodes, plan.attentions, [f.node for f in ffns])
    found: dict[int, ffn_pattern.FFN] = {}
    for stream in {stack.stream for stack in plan.stacks}:
        stacks = [stack for stack in plan.stacks if stack.stream == stream]
        members = sorted(layer for stack in stacks for layer in stack.members)
        writers = {layer for stack in stacks for layer in stack.members[:-1]}
        by_layer = _by_layer(plan, members, ffns, reach)
        for layer in sorted(writers):
            if len(by_layer[layer]) != 1:
                attention = plan.attentions[layer]
                one = Refused(
                    f"layer {layer} has {len(by_layer[layer])} feed-forward networks between its "
                    "attention and the next; exactly one can write a slot.",
                    "use ffn_kv='none'.",
                )
                # Slots of some layers only would be another model than asked for.
                plan.refuse(attention.node, attention.pattern, one, fatal=True)
            (found[layer],) = by_layer[layer]
    return found


def _by_layer(
    plan: Plan, members: list[int], ffns: list[ffn_pattern.FFN], reach: dict[Node, int]
) -> dict[int, list[ffn_pattern.FFN]]:
    """The FFNs of each layer of one stream, but for those that do not feed the next.

    With m of the stream's attentions upstream of its input, an FFN belongs to the m-th; in a
    parallel block to the one after it, which then reads exactly the same hidden state.
    """
    stream = sum(1 << layer for layer in members)
    found: dict[int, list[ffn_pattern.FFN]] = {layer: [] for layer in members}
    for ffn in ffns:
        upstream = reach[ffn.input]
        place = (upstream & stream).bit_count()
        parallel = place < len(members) and upstream == reach[plan.attentions[members[place]].query]
        place -= 0 if parallel else 1
        if place < 0 or place + 1 == len(members):
            continue
        following = reach[plan.attentions[members[place + 1]].query]
        if following | reach[ffn.node] == following:
            found[members[place]].append(ffn)
    return found


def _ffn_slot(plan: Plan, stack: int, index: int, layer: int, ffn: ffn_pattern.FFN) -> Slot:
    attention = plan.attentions[layer]
    try:
        key, value = (
            projection.trace(x, at=attention.node)
            for x in (attention.slot_key, attention.slot_value)
        )
        expected = fx.value(key.layer.input).shape
        if fx.value(ffn.input).shape != expected:
            raise Refused(
                f"the FFN reads {tuple(fx.value(ffn.input).shape)}, but the attention "
                f"{tuple(expected)}.",
                "use ffn_kv='none'.",
            )
    except Refused as refused:
        plan.refuse(attention.node, attention.pattern, refused, fatal=True)
        raise
    return Slot(index=index, layer=layer, stack=stack, ffn=ffn, key=key, value=value)
