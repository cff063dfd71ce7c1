"""Decide which slots exist, who writes them and who reads them, from dataflow alone.

Attention j reads what writer i left if and only if j's query depends on i's output. In a stack of
layers that makes slots 0 .. n-1 for some n, growing with j: the order of the slots' rows.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import ffn as ffn_pattern
from moda_compile.patterns import projection, tokens
from moda_compile.patterns.row import Refused
from moda_compile.plan import Plan, Slot

_STACK = Refused(
    "the attentions do not form one stack: this one's queries do not depend on all earlier ones.",
    "convert each stack (tower) as a module of its own.",
)

_REARRANGED = Refused(
    "tokens are rearranged between the attention before and this one (shifted windows, rows and "
    "columns, a gather): a slot would belong to another token.",
    "leave such a model as it is; depth KV needs one order of tokens throughout the stack.",
)


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.slots`` and ``plan.reads``. No slot is made that nobody would read.

    Raises:
        RewriteError: if the attentions form no single stack, or a layer has no FFN that can write.
    """
    count = len(plan.attentions)
    plan.reads = [0] * count
    if not plan.config.depth or count < 2:
        return
    nodes = [attention.node for attention in plan.attentions]
    ffns = ffn_pattern.find(gm.graph) if plan.config.ffn_kv != "none" else []
    reach = fx.reach(gm.graph.nodes, [*nodes, *(f.node for f in ffns)])
    for j, attention in enumerate(plan.attentions):
        earlier = (1 << j) - 1
        if reach[attention.query] & earlier != earlier:
            plan.refuse(attention.node, attention.pattern, _STACK)
            plan.reads = [0] * count  # not strict: half a stack would be neither model
            return
    queries = [attention.query for attention in plan.attentions]
    wrong = tokens.rearranged(gm.graph.nodes, nodes, queries)
    if wrong is not None:
        plan.refuse(nodes[wrong], plan.attentions[wrong].pattern, _REARRANGED, fatal=True)
    written_by = _by_layer(plan, ffns, reach) if ffns or plan.config.ffn_kv != "none" else {}
    for layer in range(count - 1):
        plan.slots.append(Slot(index=len(plan.slots), layer=layer))
        if layer in written_by:
            plan.slots.append(_ffn_slot(plan, layer, written_by[layer]))
        plan.reads[layer + 1] = len(plan.slots)


def _by_layer(
    plan: Plan, ffns: list[ffn_pattern.FFN], reach: dict[Node, int]
) -> dict[int, ffn_pattern.FFN]:
    """The one FFN of each layer but the last.

    With m attentions upstream of its input, an FFN belongs to layer m - 1; in a parallel block to
    layer m, whose attention then reads exactly the same hidden state.
    """
    count = len(plan.attentions)
    attentions = (1 << count) - 1
    found: dict[int, list[ffn_pattern.FFN]] = {layer: [] for layer in range(count)}
    for ffn in ffns:
        upstream = reach[ffn.input]
        layer = (upstream & attentions).bit_count()
        parallel = layer < count and upstream == reach[plan.attentions[layer].query]
        layer -= 0 if parallel else 1
        following = reach[plan.attentions[layer + 1].query] if layer + 1 < count else 0
        feeds_it = following | reach[ffn.node] == following
        if layer >= 0 and feeds_it:
            found[layer].append(ffn)
    for layer in range(count - 1):
        if len(found[layer]) != 1:
            attention = plan.attentions[layer]
            one = Refused(
                f"layer {layer} has {len(found[layer])} feed-forward networks between its "
                "attention and the next; exactly one can write a slot.",
                "use ffn_kv='none'.",
            )
            # Slots of some layers only would be another model than asked for.
            plan.refuse(attention.node, attention.pattern, one, fatal=True)
    return {layer: found[layer][0] for layer in range(count - 1)}


def _ffn_slot(plan: Plan, layer: int, ffn: ffn_pattern.FFN) -> Slot:
    attention = plan.attentions[layer]
    try:
        key, value = (
            projection.trace(x, at=attention.node) for x in (attention.key, attention.value)
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
    return Slot(index=len(plan.slots), layer=layer, ffn=ffn, key=key, value=value)
