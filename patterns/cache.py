"""What a KV cache was given: keys and values of the queries' own tokens, before they went into it.

With a cache a layer attends to more keys than it has queries. Depth KV belongs to one token, so a
slot is made of the keys and values that this very call computed. They are found by walking back
from the attended keys to where they were joined with older ones: a concatenation, or a write into a
buffer. Where among the attended keys they lie is of no concern: that is the sequence part's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import axes, linear
from moda_compile.patterns.row import Attention

_KEPT = ("contiguous", "clone", "to", "float", "half", "bfloat16", "type_as", "detach")

# Calls that put something into their first argument, in place or not: where that something is.
_PUTS: dict[str, tuple[int, str]] = {
    "index_copy": (3, "source"),
    "index_copy_": (3, "source"),
    "index_put": (2, "values"),
    "index_put_": (2, "values"),
    "setitem": (2, "value"),
    "slice_scatter": (1, "src"),
    "copy_": (1, "src"),
}
_STEPS = 100  # of one walk


def resolve(gm: GraphModule, attention: Attention) -> Attention:
    """``attention`` with ``own_key`` and ``own_value``, if it attends over a cache.

    As it is, if it does not, or if what was put into the cache can't be told; then it has more keys
    than queries, or keys that are no projections.
    """
    if attention.own_key is not None:
        return attention
    key, value = (newest(gm, x, attention) for x in (attention.key, attention.value))
    if key is None or value is None:
        return attention
    return replace(attention, own_key=key, own_value=value)


def newest(gm: GraphModule, operand: Node, attention: Attention) -> Node | None:
    """What of ``operand``, the attended keys or values, belongs to the queries' own tokens.

    Args:
        gm: the graph; views may be appended in front of the attention.
        operand: [B, Hk, Tk, d].
        attention: the attention.

    Returns:
        A node [B, Hk, Tq, d], or ``None`` if ``operand`` is not seen to hold anything else.
    """
    before = attention.sequence[0] if attention.sequence is not None else attention.node
    count = fx.value(attention.query).shape[2]
    node = operand
    permuted: list[Node] = []
    tokens = 2  # the dimension of the tokens, in ``node``
    for _ in range(_STEPS):
        writers = fx.written_into({node}, before=before)
        put = [
            (by, x) for by, x in _put_into(node, tokens, writers) if _fits(x, node, tokens, count)
        ]
        if put:
            by, own = put[-1]
            if len(put) > 1 or any(writer > by for writer in writers):
                return None  # which of them? Or what was put in was changed in there.
            return _permuted(gm, own, permuted, attention.node)
        whole = _overwritten(node, writers)
        if whole is not None:
            node = whole
        elif writers:
            return None
        elif fx.calls(node, *_KEPT) or _picks_tokens(node, tokens):
            node = fx.argument(node, 0, "input")
        elif fx.calls(node, *axes.PERMUTES):
            tokens = axes.permutation(node, fx.value(node).dim())[tokens]
            permuted.append(node)
            node = fx.argument(node, 0, "input")
        else:
            return None
    return None


def _permuted(gm: GraphModule, own: Node, views: list[Node], like: Node) -> Node:
    """``own`` as the views behind the cache, nearest to the attention first, would show it."""
    with gm.graph.inserting_before(like):
        for view in reversed(views):
            own = fx.insert(
                gm,
                view.target,
                (own, *view.args[1:]),
                dict(view.kwargs),
                like=like,
            )
    return own


def _put_into(node: Node, tokens: int, writers: Iterable[Node]) -> Iterator[tuple[Node, Node]]:
    """All that is known to have been put into ``node``, or its memory, and by which call."""
    if fx.calls(node, "cat", "concat"):
        dim = fx.argument(node, 1, "dim", 0)
        if dim % fx.value(node).dim() == tokens:
            yield from ((node, x) for x in fx.argument(node, 0, "tensors") if fx.is_tensor(x))
        return
    if fx.calls(node, *_PUTS):
        yield node, _source(node)
    for writer in writers:
        if fx.calls(writer, *_PUTS) and isinstance(_source(writer), Node):
            yield writer, _source(writer)


def _source(put: Node) -> Any:
    return fx.argument(put, *_PUTS[fx.name_of(put)])


def _fits(x: Node, node: Node, tokens: int, count: Any) -> bool:
    """Whether ``x`` is like ``node``, of the queries' tokens, and projected from a hidden state."""
    if not fx.is_tensor(x) or fx.value(x).dim() != fx.value(node).dim():
        return False
    expected = list(fx.value(node).shape)
    expected[tokens] = count
    pairs = zip(fx.value(x).shape, expected, strict=True)
    return all(fx.hint(a) == fx.hint(b) for a, b in pairs) and bool(linear.sources(x))


def _overwritten(node: Node, writers: list[Node]) -> Node | None:
    """What was last copied over all of ``node`` in place, as where a window moves on."""
    if writers and fx.calls(writers[-1], "copy_") and writers[-1].args[0] is fx.memory(node):
        found = _source(writers[-1])
        return found if isinstance(found, Node) else None
    return None


def _picks_tokens(node: Node, tokens: int) -> bool:
    """Whether ``node`` is its first argument, but for some of the tokens: x[:, :, -n:]."""
    if fx.calls(node, "narrow"):
        return fx.argument(node, 1, "dim") % fx.value(node).dim() == tokens
    if not fx.calls(node, "getitem") or not fx.is_tensor(node.args[0]):
        return False
    rank, index = fx.value(node.args[0]).dim(), node.args[1]
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(part is ... for part in parts):
        at = next(i for i, part in enumerate(parts) if part is ...)
        parts[at : at + 1] = [slice(None)] * (rank - len(parts) + 1)
    kept = all(part == slice(None) for i, part in enumerate(parts) if i != tokens)
    return kept and fx.value(node).dim() == rank
