"""Grouped-query attention (GQA): keys and values repeated over the query heads of a group.

A slot holds the Hk heads before the repetition: G = Hq / Hk times less memory and traffic.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from moda_compile import fx


def before_repeat(node: Node, heads: int) -> Node:
    """The [B, Hk, T, d] that ``node`` [B, Hq, T, d] repeats, or ``node`` if it repeats nothing.

    Seen through are ``repeat_interleave`` over the heads, and ``reshape(expand(x[:, :, None]))``;
    also on [B, T, Hk, d] in front of a transpose, which is then made anew behind the repetition's
    source. A repetition in another order (``repeat``, tiling) is not a group and stays.
    """
    if fx.value(node).shape[1] != heads:
        return node
    inner = _source(node)
    if fx.calls(node, "contiguous") and inner is not None:
        return before_repeat(inner, heads)
    found = _repeated(node, dim=1)
    if found is not None:
        return found
    swapped = [fx.argument(node, i, f"dim{i - 1}") for i in (1, 2)]
    if fx.calls(node, "transpose") and inner is not None and {d % 4 for d in swapped} == {1, 2}:
        found = _repeated(inner, dim=2)
        if found is not None:
            gm = node.graph.owning_module
            assert gm is not None
            with gm.graph.inserting_before(node):
                return fx.insert(gm, "transpose", (found, 1, 2), like=node)
    return node


def _repeated(node: Node, *, dim: int) -> Node | None:
    """x, if ``node`` repeats each index of x's dimension ``dim`` some number of times in a row."""
    if fx.calls(node, "repeat_interleave"):
        axis = fx.argument(node, 2, "dim")
        times = fx.argument(node, 1, "repeats")
        if isinstance(axis, int) and axis % 4 == dim and isinstance(times, int):
            return _source(node)
        return None
    if not fx.calls(node, "reshape", "view", "flatten"):
        return None
    expand = _source(node)
    if expand is None or not fx.calls(expand, "expand"):
        return None
    unsqueezed = _source(expand)
    if unsqueezed is None or not fx.is_tensor(unsqueezed) or fx.value(unsqueezed).dim() != 5:
        return None
    source = _source(unsqueezed)
    if source is None or not fx.is_tensor(source) or fx.value(source).dim() != 4:
        return None
    if fx.calls(unsqueezed, "unsqueeze"):
        position = fx.argument(unsqueezed, 1, "dim") % 5
    elif unsqueezed.target is operator.getitem and isinstance(unsqueezed.args[1], tuple):
        index = unsqueezed.args[1]
        if index.count(None) != 1 or any(i not in (None, slice(None), ...) for i in index):
            return None
        position = index.index(None)
        if ... in index[:position]:
            position = 5 - (len(index) - position)
    else:
        return None
    before, after = fx.value(source).shape, fx.value(node).shape
    grouped = fx.value(expand).shape
    # [.., Hk, 1, ..] -> [.., Hk, G, ..] -> [.., Hk * G, ..]: the copies of a head are neighbours.
    kept = all(after[i] == before[i] for i in range(4) if i != dim)
    fits = position == dim + 1 and after[dim] == grouped[dim] * grouped[dim + 1]
    return source if kept and fits and grouped[dim] == before[dim] else None


def _source(node: Node) -> Node | None:
    """What a call works on, given by position or as ``input=``."""
    found = fx.argument(node, 0, "input")
    return found if isinstance(found, Node) else None
