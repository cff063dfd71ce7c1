"""Which axis is the batch, which are the heads: [B, H, T, d] views of an attention's operands.

From the axes alone: an axis of the queries and not of the keys is a token's, or a head's that
shares its keys with others; one of both is a head's if some view merges it with the features, as
[B, T, H * d] does, and else by its place, as in [B, H, T, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import axes, scores
from moda_compile.patterns.row import Step
from moda_compile.patterns.scores import Unclear


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A node that an operand is a view or cast of, times ``factor``."""

    node: Node
    layout: axes.Layout
    factor: float = 1.0


def trace(node: Node, layout: axes.Layout, *, scaling: bool, by: Node, at: Node) -> list[Origin]:
    """The operand and all that it is a view of, nearest first.

    Args:
        node, layout: the operand.
        scaling: also look through a multiplication by a number.
        by, at: the node that reads the operand, and the one in front of which we shall read it.

    Raises:
        Unclear: if it is written into in between.
    """
    found: list[Origin] = []
    following: Origin | None = Origin(node=node, layout=layout)
    while following is not None:
        written = fx.written_into({following.node}, before=at)
        if not all(write < by for write in written):
            break
        found.append(following)
        by = following.node
        if any(by < write for write in written):
            break  # if it is a copy, its source does not have what is written later
        following = _before(following, scaling)
    if not found:
        raise Unclear("a tensor of it is written in place")
    return found


def _before(origin: Origin, scaling: bool) -> Origin | None:
    node = origin.node
    source = scores.cast(node)
    if source is not None:
        return replace(origin, node=source)
    view = axes.before(node, origin.layout)
    if view is not None:
        return replace(origin, node=view[0], layout=view[1])
    # Not in place: the unscaled tensor would be gone by the time it is read again.
    by_number = scaling and fx.calls(node, *scores.MUL, *scores.DIV) and not fx.writes(node)
    times = scores.scaled(node) if by_number else None
    return times and replace(origin, node=times[0], factor=origin.factor * times[1])


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What is known of an attention before its axes are told apart. Pieces are not yet cut.

    Attributes:
        query, key, value: from :func:`trace`.
        scores: the layout of q k^T.
        output: the layout of the attention's result.
        others: layouts of masks and the like, whose views also tell axes apart.
        keys, features, channels: the axes of the keys, of queries' and of values' features.
    """

    query: list[Origin]
    key: list[Origin]
    value: list[Origin]
    scores: axes.Layout
    output: axes.Layout
    others: tuple[axes.Layout, ...]
    keys: axes.Dimension
    features: axes.Dimension
    channels: axes.Dimension


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How the axes make [B, H, T, d]. Each target is a layout in the smallest pieces.

    Attributes:
        query: [B, Hq, T, d]; key and value: [B, Hk, T, d]; mask: [B, Hq, T, T].
        output: [B, Hq, T, d].
    """

    query: axes.Layout
    key: axes.Layout
    value: axes.Layout
    mask: axes.Layout
    output: axes.Layout
    cuts: axes.Cuts = field(compare=False)

    def small(self, layout: axes.Layout) -> axes.Layout:
        """``layout`` in the smallest pieces."""
        found = self.cuts.apply(layout)
        if found is None:
            raise Unclear("its heads are cut apart in more than one way")
        return found

    def view(self, gm: GraphModule, origins: list[Origin], target: axes.Layout, like: Node) -> Node:
        """Append what makes [B, H, T, d] of whichever of ``origins`` takes the fewest views."""
        wanted = set(axes.pieces(target))
        least: tuple[Node, list[axes.Call]] | None = None
        if not wanted <= set(axes.pieces(self.small(origins[0].layout))):
            raise Unclear("queries, keys and values do not have the same heads")
        for origin in origins:
            layout = self.small(origin.layout)
            if origin.factor != origins[-1].factor or set(axes.pieces(layout)) != wanted:
                continue
            calls = axes.way(layout, target)
            if calls is not None and (least is None or len(calls) <= len(least[1])):
                least = origin.node, calls
        if least is None:
            raise Unclear("queries, keys or values can't be viewed as [B, H, T, d]")
        node, calls = least
        for method, args in calls:
            node = fx.insert(gm, method, (node, *args), like=like)
        return node

    def masked(self, gm: GraphModule, mask: Node, layout: axes.Layout, like: Node) -> Node:
        """Append what makes a mask of scores in ``layout`` one of [B, Hq, T, T]."""
        scores_layout = self.small(layout)
        shape = [size for size, _ in axes.sizes(fx.value(mask))]
        full = [math.prod(p.size for p in dimension) for dimension in scores_layout]
        added = len(full) - len(shape)
        if added < 0 or any(
            s not in (1, f) for s, f in zip(shape, full[max(added, 0) :], strict=False)
        ):
            raise Unclear("a mask has another shape than the scores")
        pairs = zip(shape, scores_layout[added:], strict=True)
        own = tuple(dimension if size > 1 else () for size, dimension in pairs)
        # Leading dimensions of size 1 come by themselves where the rest is in place.
        placed = zip(own[::-1], self.mask[::-1], strict=False)
        if len(own) <= 4 and all(o in ((), t) for o, t in placed):
            return mask
        calls = axes.way(own, self.mask)
        if calls is None:
            raise Unclear("a mask can't be viewed as [B, H, T, T]")
        for method, args in calls:
            mask = fx.insert(gm, method, (mask, *args), like=like)
        return mask

    def restore(self, output: axes.Layout) -> tuple[Step, ...]:
        """From [B, Hq, T, d] to the layout of the attention's result."""
        calls = axes.way(self.output, self.small(output))
        if calls is None:
            raise Unclear("its result can't be made of [B, H, T, d]")
        return tuple(Step(method, args) for method, args in calls)


def arrange(of: Operands) -> Arrangement:
    """Tell the axes apart.

    Raises:
        Unclear: if there is no way to.
    """
    traced = (of.query, of.key, of.value)
    seen = [origin.layout for origins in traced for origin in origins]
    cuts = axes.Cuts([*seen, of.scores, of.output, *of.others])

    def small(dimension: axes.Dimension) -> axes.Dimension:
        found = cuts.split(dimension)
        if found is None:
            raise Unclear("its heads are cut apart in more than one way")
        return found

    keys, features, channels = small(of.keys), small(of.features), small(of.channels)
    q, k, v = ({p for d in o[0].layout for p in small(d)} for o in traced)
    q, k, v = q - {*features}, k - {*features} - {*keys}, v - {*channels} - {*keys}
    labels = [small(d) for d in of.scores]  # batch and heads in the order of the scores
    tokens = _tokens([d for d in labels if d and not set(d) & k and set(d) <= q], keys)
    if k - q or v - q or {*tokens} & v:
        raise Unclear("keys or values have an axis that the queries have not")
    rest = [tuple(p for p in d if p in q and p not in tokens) for d in labels]
    rest = [d for d in rest if d]
    shared = [p for d in rest for p in d]
    if set(shared) | {*tokens} != q:
        raise Unclear("the queries have an axis that the scores have not")
    lone = [p for p in shared if p not in k and p not in v]  # of groups of heads
    # Heads that keys and values both repeat share one: it is what they are repetitions of.
    deepest = [{p for d in o[-1].layout for p in small(d)} for o in (of.key, of.value)]
    deep = deepest[0] | deepest[1]
    repeated = [p for p in shared if p not in lone and p not in deep]
    merged = _merged(seen, (of.features, of.channels), small)
    shown = (tuple(small(d) for d in layout) for layout in (of.scores, *seen))
    batch = _batch([tuple(p for p in d if p in deep) for d in rest], merged, shown)
    batch &= deepest[0] & deepest[1]  # what only one of them repeats are heads
    heads = [p for p in shared if p not in batch]
    if repeated and heads[-len(repeated) - len(lone) :] != [*repeated, *lone]:
        repeated = []  # in another order, such as tiling: then the slots hold all the heads
    groups = [*repeated, *lone]
    own = tuple(p for p in heads if p not in groups)
    every = (*own, *(p for p in heads if p in groups))
    b = tuple(p for p in shared if p in batch)
    return Arrangement(
        query=(b, every, tokens, features),
        key=(b, own, keys, features),
        value=(b, own, keys, channels),
        mask=(b, every, tokens, keys),
        output=(b, every, tokens, channels),
        cuts=cuts,
    )


def _tokens(candidates: list[axes.Dimension], keys: axes.Dimension) -> axes.Dimension:
    """The queries' axis: as long as the keys', or its end where groups of heads are merged in."""
    count = math.prod(p.size for p in keys)
    if count == 1:
        return ()
    for dimension in reversed(candidates):
        for start in range(len(dimension)):
            if math.prod(p.size for p in dimension[start:]) == count:
                return dimension[start:]
    return candidates[-1] if candidates else ()


def _merged(
    layouts: Iterable[axes.Layout],
    features: tuple[axes.Dimension, ...],
    small: Callable[[axes.Dimension], axes.Dimension],
) -> set[axes.Piece]:
    """Pieces that share a dimension with features somewhere: [B, T, H * d]."""
    found: set[axes.Piece] = set()
    names = {p.axis for dimension in features for p in dimension}
    for layout in layouts:
        for dimension in layout:
            if any(p.axis in names for p in dimension):
                found |= {p for p in small(dimension) if p.axis not in names}
    return found


def _batch(
    rest: list[axes.Dimension], merged: set[axes.Piece], layouts: Iterable[axes.Layout]
) -> set[axes.Piece]:
    """The pieces that are no heads'."""
    dimensions = [d for d in rest if d]
    every = [p for d in dimensions for p in d]
    if set(every) & merged:
        return set(every) - merged
    if len(dimensions) > 1:  # [B, H, ..]
        return {p for d in dimensions[:-1] for p in d}
    # One dimension: [1, H, ..] if one of size 1 is seen in front of it; [B * H, ..] if it is known
    # to be made of two; else [B, ..], with one head.
    for layout in layouts:
        if every[:1] and len(layout) >= 4 and () in layout:
            where = next((i for i, d in enumerate(layout) if every[0] in d), 0)
            return set() if layout.index(()) < where else set(every[:1])
    return set(every[:1])
