"""Which token each row of a tensor belongs to: a depth slot may pass between two layers only if
that is the same in both.

Layers of equal shapes need not agree on that: a shifted window, an attention over the rows and then
over the columns of an image. So every attention's output is taken to pieces: its batch and token
dimensions get a name, and views on the way to the next attention move, split and merge these. If
they arrive at its queries in another order, the tokens were rearranged.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from moda_compile import fx
from moda_compile.patterns.row import Attention

BATCH, TOKEN, MOVED = "batch", "token", "moved"


@dataclass(frozen=True)
class Factor:
    """``size`` steps of ``inner`` elements each along what once was the dimension ``name``."""

    name: str
    size: int
    inner: int = 1


Dimension = tuple[Factor, ...]  # outermost first; () for a dimension of size 1
Layout = tuple[Dimension, ...]

_ROLLS = ("roll", "flip", "fliplr", "flipud", "rot90")
_PICKS = ("gather", "index_select", "take_along_dim", "sort", "scatter", "index_copy", "cummax")
_RESHAPES = (
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone",
    "view_as", "reshape_as", "ravel",
)  # fmt: skip
_PERMUTES = ("transpose", "permute", "swapaxes", "movedim", "mT", "t", "swapdims", "moveaxis")
_SPLITS = ("split", "chunk", "unbind", "tensor_split", "split_with_sizes")


def rearranged(nodes: Iterable[Node], attentions: Sequence[Attention]) -> int | None:
    """The first layer that reads tokens in another order than the layer before it wrote them.

    Args:
        nodes: the graph, in order.
        attentions: of one stream, in order.

    Returns:
        Its number, or ``None`` if no rearrangement was found.
    """
    layouts: dict[Node, Layout] = {}
    starts = {attention.node: attention for attention in attentions}
    ends = {attention.query: layer for layer, attention in enumerate(attentions)}
    for node in nodes:
        if node in starts:
            layout = _output(starts[node])
        elif any(used in layouts for used in node.all_input_nodes):
            layout = _step(node, layouts)
        else:
            layout = None
        if layout is not None:
            layouts[node] = layout
            if node in ends and _out_of_place(layout):
                return ends[node]
    return None


def over_channels(query: Node, layers: Iterable[Node]) -> bool:
    """Whether the tokens of ``query`` [B, Hq, T, d] are features of the linear layers it is from.

    Such an attention weighs channels against one another (as in XCiT), and its keys are no tokens'.

    Args:
        query: the queries.
        layers: the linear layers' results, [.., features].
    """
    layouts: dict[Node, Layout] = {}
    starts = set(layers)
    for node in sorted(fx.upstream(query, starts.__contains__)):
        if node in starts:
            *rows, features = _shape(fx.value(node))
            known: Layout | None = (
                *(_whole("rows", n) for n in rows),
                _whole("features", features),
            )
        else:
            known = _step(node, layouts) if layouts.keys() & set(node.all_input_nodes) else None
        if known is not None:
            layouts[node] = known
    found = layouts.get(query)
    return found is not None and any(factor.name == "features" for factor in found[2])


def _output(attention: Attention) -> Layout | None:
    """The layout of an attention's result: that of [B, Hq, T, d], through its restoring steps."""
    shape = _shape(fx.value(attention.query))
    names = (BATCH, "heads", TOKEN, "channels")
    layout: Layout | None = tuple(_whole(n, s) for n, s in zip(names, shape, strict=True))
    sizes = torch.empty(shape, device="meta")
    for step in attention.restore:
        if layout is None:
            return None
        args, kwargs = map_arg((step.args, dict(step.kwargs)), _on_meta)
        if isinstance(step.target, str):
            sizes = getattr(sizes, step.target)(*args, **kwargs)
        else:
            sizes = step.target(sizes, *args, **kwargs)
        name = step.target if isinstance(step.target, str) else step.target.__name__
        if name in _PERMUTES:
            layout = _permute(layout, step.target, args, kwargs)
        elif name in _RESHAPES:
            layout = reshape(layout, list(sizes.shape))
        else:
            layout = _keep(layout, list(sizes.shape))
    return layout


def _on_meta(node: Node) -> Any:
    found = fx.value(node)
    if not isinstance(found, Tensor):
        return fx.hint(found)
    return torch.empty(_shape(found), device="meta", dtype=torch.float32)


def _out_of_place(layout: Layout) -> bool:
    """Whether a query's [B, Hq, T, d] holds known batch or token pieces where they don't belong."""
    for i, dimension in enumerate(layout):
        for factor in merge(dimension):
            whole = factor.inner == 1 and merge(dimension) == (factor,)
            home = {0: BATCH, 2: TOKEN}.get(i)
            if factor.name == MOVED or (
                factor.name in (BATCH, TOKEN) and not (factor.name == home and whole)
            ):
                return True
    return False


def merge(dimension: Dimension) -> Dimension:
    """Put neighbouring pieces of one dimension together again, where they fit."""
    merged: list[Factor] = []
    for factor in dimension:
        last = merged[-1] if merged else None
        if last and last.name == factor.name and last.inner == factor.size * factor.inner:
            merged[-1] = Factor(factor.name, last.size * factor.size, factor.inner)
        else:
            merged.append(factor)
    return tuple(merged)


def reshape(layout: Layout, shape: list[int]) -> Layout | None:
    """The layout after a reshape, splitting pieces as needed; ``None`` where that is impossible."""
    pieces = [factor for dimension in layout for factor in merge(dimension)][::-1]
    result = []
    for size in shape:
        dimension: list[Factor] = []
        while size > 1:
            if not pieces:
                return None
            piece = pieces.pop()
            if size % piece.size == 0:
                dimension.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                rest = piece.size // size
                dimension.append(Factor(piece.name, size, piece.inner * rest))
                pieces.append(Factor(piece.name, rest, piece.inner))
                size = 1
            else:
                return None
        result.append(merge(tuple(dimension)))
    return None if pieces else tuple(result)


def _step(node: Node, layouts: dict[Node, Layout]) -> Layout | None:
    """The layout of what ``node`` makes; of a tuple of tensors, that of each."""
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    result = fx.value(node)
    if source in layouts and node.op.startswith("call"):
        before = layouts[source]
        if node.target is operator.getitem:
            return before if not fx.is_tensor(source) else _index(before, node.args[1], result)
        if fx.calls(node, *_SPLITS):
            return _split(before, node, result)
        if not isinstance(result, Tensor):
            return None
        if fx.calls(node, *_RESHAPES):
            return reshape(before, _shape(result))
        if fx.calls(node, *_PERMUTES):
            return _permute(before, node.target, node.args[1:], node.kwargs)
        if fx.calls(node, *_ROLLS, *_PICKS):
            return _moved(before, node)
    return _like_inputs(node, layouts, result) if isinstance(result, Tensor) else None


def _like_inputs(node: Node, layouts: dict[Node, Layout], result: Tensor) -> Layout | None:
    """Anything else keeps the dimensions whose sizes it keeps. A residual sum follows the stream,
    not a branch (a mixture of experts, say) that rearranges tokens for itself.
    """
    shape, candidates = _shape(result), []
    for used in node.all_input_nodes:
        layout = layouts.get(used)
        if layout is None or not fx.is_tensor(used) or len(layout) != len(shape):
            continue
        kept = _keep(layout, shape)
        known = {f.name for d in kept for f in d}
        candidates.append((MOVED in known, not {BATCH, TOKEN} <= known, kept))
    return min(candidates, key=lambda c: c[:2])[2] if candidates else None


def _keep(layout: Layout, shape: list[int]) -> Layout:
    """The dimensions of unchanged size."""
    return tuple(
        d if math.prod(f.size for f in d) == size else _whole("new", size)
        for d, size in zip(layout, shape, strict=True)
    )


def _permute(layout: Layout, target: Any, args: Any, kwargs: Any) -> Layout | None:
    """Replay a permutation on a tensor whose sizes are the dimensions' numbers."""
    numbered = torch.empty([2 + i for i in range(len(layout))], device="meta")
    call = target if callable(target) else getattr(Tensor, str(target))
    try:
        made = call(numbered, *args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return tuple(layout[size - 2] for size in made.shape)


def _moved(layout: Layout, node: Node) -> Layout:
    """Rolls, flips and picks move what lies along the dimensions they name; all, if none."""
    named = fx.argument(node, 2 if fx.name_of(node) == "roll" else 1, "dims")
    named = named if named is not None else node.kwargs.get("dim")
    chosen = named if isinstance(named, (tuple, list)) else [named]
    rank = len(layout)
    axes = {i % rank for i in chosen if isinstance(i, int)} or set(range(rank))
    return tuple(_away(d) if i in axes else d for i, d in enumerate(layout))


def _away(dimension: Dimension) -> Dimension:
    return tuple(
        Factor(MOVED if f.name in (BATCH, TOKEN) else f.name, f.size, f.inner) for f in dimension
    )


def _split(layout: Layout, node: Node, result: Any) -> Layout | None:
    first = result[0] if isinstance(result, (tuple, list)) and len(result) else None
    if not isinstance(first, Tensor):
        return None
    shape = _shape(first)
    if fx.calls(node, "unbind"):
        axis = fx.argument(node, 1, "dim", 0) % len(layout)
        return tuple(d for i, d in enumerate(layout) if i != axis)
    return _keep(layout, shape)


def _index(layout: Layout, index: Any, result: Any) -> Layout | None:
    """x[...] with slices, numbers, None and tensors."""
    if not isinstance(result, Tensor):
        return None
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(i is ... for i in parts):
        at = next(n for n, i in enumerate(parts) if i is ...)
        taken = sum(i is not None and i is not ... for i in parts)
        parts[at : at + 1] = [slice(None)] * (len(layout) - taken)
    made: list[Dimension] = []
    rest = list(layout)
    for part in parts:
        if part is None:
            made.append(())
        elif isinstance(part, slice):
            dimension = rest.pop(0)
            made.append(dimension if part == slice(None) else _away(dimension))
        elif isinstance(part, int):
            rest.pop(0)
        else:  # picked by a tensor
            made.append(_away(rest.pop(0)))
    made += rest
    if len(made) != result.dim():
        return None
    sizes = zip(made, _shape(result), strict=True)
    return tuple(d if math.prod(f.size for f in d) == n else _relabel(d, n) for d, n in sizes)


def _relabel(dimension: Dimension, size: int) -> Dimension:
    moved = any(f.name in (BATCH, TOKEN, MOVED) for f in dimension)
    return _whole(MOVED if moved else "part", size)


def _whole(name: str, size: int) -> Dimension:
    return (Factor(name, size),) if size > 1 else ()


def _shape(x: Tensor) -> list[int]:
    return [int(fx.hint(s)) for s in x.shape]
