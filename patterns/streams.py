"""Which attentions follow one another along one stream of tokens, and whose keys are whose.

An attention hands on its queries' tokens: row t of its output belongs to query t, whatever the keys
belong to. So dataflow is followed through an attention's query only. What a decoder's queries
owe to the encoder by way of cross-attention does not make them the encoder's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import linear, tokens
from moda_compile.patterns.row import Attention, LeftAlone, Refused

# Rows of the first operand, overwritten in places: the tokens are the first operand's.
_SCATTERS = ("masked_scatter", "masked_scatter_", "scatter", "scatter_", "index_put", "index_put_",
             "index_copy", "index_copy_", "slice_scatter", "select_scatter")  # fmt: skip


def reach(
    nodes: Iterable[Node], attentions: Sequence[Attention], others: Sequence[Node] = ()
) -> dict[Node, int]:
    """For each node a bit mask of what its tokens went through.

    Bit i is attention i, bit ``len(attentions) + j`` is ``others[j]``; each depends on itself. An
    attention's output has what its query has. One pass over the graph, in-place writes included.
    """
    bit = {attention.node: 1 << i for i, attention in enumerate(attentions)}
    bit |= {node: 1 << (len(attentions) + j) for j, node in enumerate(others)}
    query = {attention.node: attention.query for attention in attentions}
    masks: dict[Node, int] = {}
    owner: dict[Node, Node] = {}  # of the memory that a view shows
    written: dict[Node, int] = {}  # into that memory, so far

    def seen(node: Node) -> int:
        return masks.get(node, 0) | written.get(owner.get(node, node), 0)

    for node in nodes:
        first = node.args[0] if node.args else None
        if node in query:
            used: Iterable[Node] = [query[node]]
        elif fx.calls(node, *_SCATTERS) and isinstance(first, Node):
            used = [first]
        else:
            used = node.all_input_nodes
        mask = bit.get(node, 0)
        for source in used:
            mask |= seen(source)
        masks[node] = mask
        if isinstance(first, Node):
            if fx.writes(node):
                memory = owner.get(first, first)
                written[memory] = written.get(memory, 0) | mask
            if fx.is_view(node):
                owner[node] = owner.get(first, first)
    return masks


class Earlier:
    """The self-attentions found so far: their results, keys and values."""

    def __init__(self) -> None:
        self.nodes: set[Node] = set()
        self.keys: set[Node] = set()
        self.values: set[Node] = set()

    def add(self, attention: Attention) -> None:
        """Count one more among them."""
        self.nodes.add(attention.node)
        self.keys.add(attention.slot_key)
        self.values.add(attention.slot_value)


def check_self_attention(attention: Attention, earlier: Earlier, reached: dict[Node, int]) -> None:
    """Return if keys and values belong to the queries' tokens.

    Args:
        attention: the one in question.
        earlier: self-attentions in front of it.
        reached: from :func:`reach`.

    Raises:
        LeftAlone: for cross-attention, whose keys belong to other tokens, and for attention
            between channels.
        Refused: if the keys' tokens can't be told.
    """
    layers = linear.projections(attention.query, earlier.nodes)
    if tokens.over_channels(attention.query, [layer.node for layer in layers]):
        raise LeftAlone("its softmax weighs channels, not tokens, against one another.")
    query = _origin(attention.query, earlier.nodes)
    slot = attention.slot_key, attention.slot_value
    queries, keys = (fx.value(x).shape[2] for x in (attention.query, slot[0]))
    for operand, known in zip(slot, (earlier.keys, earlier.values), strict=True):
        if operand in known and queries == keys:
            continue  # an earlier layer's own, used again
        origin = _origin(operand, earlier.nodes)
        if query and origin and not query & origin and not _same(query, origin, reached):
            raise LeftAlone(
                "cross-attention: its keys and values come from another hidden state than its "
                "queries, so they belong to other tokens."
            )
        if not query or not origin:
            raise Refused(
                "queries, keys and values are not all projections of a hidden state, nor seen to "
                "hold such: this is attention over learned vectors, or over a cache into which the "
                "tokens' own keys and values are not put in a way that is understood (cat, "
                "index_copy_, x[:, :, i] = ...). Depth KV belongs to a token.",
                "leave it out with strict=False, or put the keys into the cache as they are "
                "attended to; without a cache (transformers: use_cache=False) nothing is in the "
                "way.",
            )
    if queries != keys:
        raise Refused(
            f"{queries} queries over {keys} keys (pooled keys, or a KV cache that changes keys "
            "behind it): depth KV needs one key for each query.",
            "put the keys into the cache as they are attended to, or run without one "
            "(transformers: use_cache=False).",
        )


def _origin(node: Node, ends: set[Node]) -> set[Node]:
    return set(linear.sources(node, ends))


def _same(one: set[Node], other: set[Node], reached: dict[Node, int]) -> bool:
    """Whether two sets of hidden states are of one token each: x and x + position, two norms of x.

    They went through the same attentions; or, where they went through none yet, one of them is
    made from the other.
    """
    masks = {_union(nodes, reached) for nodes in (one, other)}
    if len(masks) > 1:
        return False
    if masks != {0}:
        return True
    behind = [{n for x in nodes for n in fx.upstream(x, fx.is_parameter)} for nodes in (one, other)]
    return bool(one & behind[1] or other & behind[0]) or bool(_activations(behind))


def _union(nodes: set[Node], reached: dict[Node, int]) -> int:
    mask = 0
    for node in nodes:
        mask |= reached.get(node, 0)
    return mask


def _activations(behind: list[set[Node]]) -> set[Node]:
    """Hidden states [B, T, D] that both are made from."""
    both = behind[0] & behind[1]
    return {
        n for n in both
        if fx.is_tensor(n) and fx.value(n).dim() == 3 and fx.value(n).is_floating_point()
    }  # fmt: skip
