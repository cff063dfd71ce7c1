"""What a KV cache was given: keys and values of the queries' own tokens, before they went into it.

With a cache a layer attends to more keys than it has queries. Depth KV belongs to one token, so a
slot is made of the keys and values that this very call computed. They are found by walking back
from the attended keys to where they were joined with older ones: a concatenation, or a write into a
buffer. Where among the attended keys they lie is of no concern: that is the sequence part's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import linear
from moda_compile.patterns.row import Attention

_KEPT = ("contiguous", "clone", "to", "float", "half", "bfloat16", "type_as", "detach")
_PERMUTED = ("transpose", "permute", "swapaxes", "movedim", "swapdims", "moveaxis")
_SLICED = ("getitem", "narrow")

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
    node = operand
    permuted: list[Node] = []
    tokens = 2  # the dimension of the tokens, in ``node``
    for _ in range(_STEPS):
        count = fx.value(attention.query).shape[2]
        put = [x for x in _put_into(node, tokens, before) if _fits(x, node, tokens, count)]
        if len(put) == 1:
            own = put[0]
            if permuted:
                with gm.graph.inserting_before(attention.node):
                    for view in reversed(permuted):
                        own = fx.insert(gm, view.target, (own, *view.args[1:]),
                                        dict(view.kwargs), like=attention.node)  # fmt: skip
            return own
        if put:
            return None  # which of them?
        whole = _overwritten(node, before)
        if whole is not None:
            node = whole
        elif fx.calls(node, *_KEPT, *_SLICED):
            source = fx.argument(node, 0, "input")
            if not fx.is_tensor(source) or fx.value(source).dim() != fx.value(node).dim():
                return None
            node = source
        elif fx.calls(node, *_PERMUTED):
            source = fx.argument(node, 0, "input")
            moved = _before_permutation(node, source, tokens)
            if moved is None:
                return None
            permuted.append(node)
            node, tokens = source, moved
        else:
            return None
    return None


def _put_into(node: Node, tokens: int, before: Node) -> Iterator[Node]:
    """All that is known to have been put into ``node`` or its memory, in front of ``before``."""
    if fx.calls(node, "cat", "concat"):
        dim = fx.argument(node, 1, "dim", 0)
        if dim % fx.value(node).dim() == tokens:
            yield from (x for x in fx.argument(node, 0, "tensors") if isinstance(x, Node))
        return
    if fx.calls(node, *_PUTS):
        yield _source(node)
    for writer in fx.written_into({node}, before=before):
        if fx.calls(writer, *_PUTS) and isinstance(_source(writer), Node):
            yield _source(writer)


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


def _overwritten(node: Node, before: Node) -> Node | None:
    """What was last copied over all of ``node`` in place, as where a window moves on."""
    found = None
    for writer in fx.written_into({node}, before=before):
        if fx.calls(writer, "copy_") and writer.args[0] is fx.memory(node):
            found = _source(writer)
    return found if isinstance(found, Node) else None


def _before_permutation(node: Node, source: Node, tokens: int) -> int | None:
    """Which dimension of ``source`` became dimension ``tokens`` of ``node``."""
    rank = fx.value(source).dim()
    numbered = torch.empty([2 + i for i in range(rank)], device="meta")
    name = fx.name_of(node)
    made = getattr(numbered, name)(*node.args[1:], **dict(node.kwargs))
    return int(made.shape[tokens]) - 2 if made.dim() == rank else None
