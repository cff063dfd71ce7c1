"""Where the axes of an attention are: in the dimensions of each tensor, through views and back.

An attention written by hand may hold its heads in any place: merged with the batch [B * H, T, d],
with the features [B, T, H * d], split into groups [B, Hk, G, T, d]. So every dimension is written
as the pieces of axes that it is made of, outermost first, and a view upstream of a known tensor is
undone on these. A dimension of size 1 is made of nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from moda_compile import fx

Size = tuple[int, Any]  # a size here, and what it is in general: a number or an expression


@dataclass(frozen=True)
class Piece:
    """``size`` steps, of ``inner`` elements each, along ``axis``.

    Two pieces are the same if they are so at the sizes the graph was traced with; what the sizes
    are in general (``exact``, ``exact_inner``) keeps the pieces apart that only happen to fit.
    """

    axis: str
    size: int
    inner: int = 1
    exact: Any = field(default=None, compare=False)
    exact_inner: Any = field(default=1, compare=False)


Dimension = tuple[Piece, ...]
Layout = tuple[Dimension, ...]


def sizes(x: Tensor) -> list[Size]:
    """The shape of ``x``, here and in general."""
    return [
        (int(s.node.hint), s.node.expr) if isinstance(s, torch.SymInt) else (int(s), int(s))
        for s in x.shape
    ]


def whole(axis: str, size: Size) -> Dimension:
    """A dimension that is one axis, all of it."""
    return (Piece(axis, size[0], exact=size[1]),) if size[0] > 1 else ()


def merge(dimension: Iterable[Piece]) -> Dimension:
    """Put neighbouring pieces of one axis together again."""
    merged: list[Piece] = []
    for piece in dimension:
        last = merged[-1] if merged else None
        if last and last.axis == piece.axis and last.inner == piece.size * piece.inner:
            merged[-1] = Piece(
                piece.axis,
                last.size * piece.size,
                piece.inner,
                last.exact * piece.exact,
                piece.exact_inner,
            )
        else:
            merged.append(piece)
    return tuple(merged)


def reshape(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout after a reshape to ``shape``; ``None`` where an axis would be cut unevenly.

    A reshape keeps the order of all elements, so this undoes one as well as it does one.
    """
    left = [piece for dimension in layout for piece in merge(dimension)][::-1]
    result = []
    for size, exact in shape:
        dimension: list[Piece] = []
        while size > 1:
            if not left:
                return None
            piece = left.pop()
            if size % piece.size == 0:
                dimension.append(piece)
                size, exact = size // piece.size, _divide(exact, piece.exact)
            elif piece.size % size == 0:
                rest, exact_rest = piece.size // size, _divide(piece.exact, exact)
                inner, exact_inner = piece.inner * rest, piece.exact_inner * exact_rest
                dimension.append(Piece(piece.axis, size, inner, exact, exact_inner))
                left.append(Piece(piece.axis, rest, piece.inner, exact_rest, piece.exact_inner))
                size, exact = 1, 1
            else:
                return None
        if exact != 1:
            return None
        result.append(merge(dimension))
    return None if left else tuple(result)


def _divide(x: Any, y: Any) -> Any:
    if isinstance(x, int) and isinstance(y, int):
        return x // y
    return sympy.cancel(sympy.sympify(x) / y)


# --- views, undone ------------------------------------------------------------------------------

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous",
             "clone", "view_as", "reshape_as", "ravel")  # fmt: skip
PERMUTES = ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT")
_REPEATS = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def before(node: Node, layout: Layout) -> tuple[Node, Layout] | None:
    """What ``node``, of a known layout, is a view of, and its layout; ``None`` if it is no view.

    A copy in another layout is a view here too, and so is a repetition: of what it repeats the
    source holds one piece, so that the others are missing from its layout.
    """
    source = fx.argument(node, 0, "input")
    if not (node.op.startswith("call") and fx.is_tensor(source) and fx.is_tensor(node)):
        return None
    shape, after = sizes(fx.value(source)), sizes(fx.value(node))
    found: Layout | None = None
    if fx.calls(node, *_RESHAPES) or _only_inserts(node):
        found = reshape(layout, shape)
    elif fx.calls(node, *PERMUTES) or (
        node.target is getattr
        and (node.args[1] == "mT" or (node.args[1] == "T" and len(shape) < 3))
    ):
        came_from = permutation(node, len(shape))
        found = tuple(layout[came_from.index(i)] for i in range(len(shape)))
    elif fx.calls(node, *_REPEATS):
        added = len(after) - len(shape)
        pairs = list(zip(layout[added:], shape, after[added:], strict=True))
        if all(here[0] in (1, there[0]) for _, here, there in pairs):
            found = tuple(d if here[0] > 1 else () for d, here, _ in pairs)
    elif fx.calls(node, "repeat_interleave"):
        times, axis = fx.argument(node, 1, "repeats"), fx.argument(node, 2, "dim")
        if isinstance(times, int) and isinstance(axis, int):
            axis %= len(shape)
            parts = reshape((layout[axis],), [shape[axis], (times, times)])
            if parts is not None:
                found = (*layout[:axis], parts[0], *layout[axis + 1 :])
    return None if found is None else (source, found)


def _only_inserts(node: Node) -> bool:
    """x[:, None] and the like: an index that takes all there is."""
    if node.target is not operator.getitem:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is ... or i == slice(None) for i in index)


def permutation(node: Node, rank: int) -> list[int]:
    """For each dimension of a transposed tensor the one it was: replayed on sizes that tell."""
    numbered = torch.empty([2 + i for i in range(rank)], device="meta")
    if node.op == "call_method":
        made = getattr(numbered, str(node.target))(*node.args[1:], **node.kwargs)
    else:
        names = dict(node.kwargs)
        names.pop("input", None)
        made = node.target(numbered, *node.args[1:], **names)  # type: ignore[operator]
    return [size - 2 for size in made.shape]


# --- pieces that all layouts agree on -----------------------------------------------------------


class Cuts:
    """Where any of some layouts cuts an axis into pieces."""

    def __init__(self, layouts: Iterable[Layout]) -> None:
        self._at: dict[str, dict[int, Any]] = {}
        for layout in layouts:
            for piece in pieces(layout):
                cuts = self._at.setdefault(piece.axis, {})
                cuts[piece.inner] = piece.exact_inner
                cuts[piece.inner * piece.size] = piece.exact_inner * piece.exact

    def split(self, dimension: Dimension) -> Dimension | None:
        """The dimension in the smallest pieces; ``None`` if two cuts cross each other."""
        result = []
        for piece in dimension:
            cuts = self._at[piece.axis]
            ends = [c for c in cuts if piece.inner <= c <= piece.inner * piece.size]
            ends.sort(reverse=True)
            for outer, inner in zip(ends, ends[1:], strict=False):
                if outer % inner:
                    return None
                exact = _divide(cuts[outer], cuts[inner])
                result.append(Piece(piece.axis, outer // inner, inner, exact, cuts[inner]))
        return tuple(result)

    def apply(self, layout: Layout) -> Layout | None:
        """:meth:`split` of every dimension."""
        found = [self.split(dimension) for dimension in layout]
        return tuple(d for d in found if d is not None) if None not in found else None


def pieces(layout: Layout) -> Iterator[Piece]:
    """All pieces, in the order of the dimensions."""
    for dimension in layout:
        yield from dimension


# --- from one layout to another -----------------------------------------------------------------

Call = tuple[str, tuple[Any, ...]]  # a method of a tensor and its arguments


def way(source: Layout, target: Layout) -> list[Call] | None:
    """Calls that lead from one layout to another, both cut into the same pieces.

    Pieces that the source lacks are broadcast: a dimension of size 1, or expanded if it is only a
    part of a dimension. ``None`` if a call would need a size that is not a number.
    """
    calls: list[Call] = []
    home = {piece: (i, j) for i, d in enumerate(target) for j, piece in enumerate(d)}
    groups: list[Dimension] = []  # what will be the dimensions once all that must part has parted
    for dimension in source:
        parts: list[Dimension] = []
        for piece in dimension:
            if piece not in home:
                return None
            i, j = home[piece]
            if parts and home[parts[-1][-1]] == (i, j - 1):
                parts[-1] += (piece,)
            else:
                parts.append((piece,))
        if len(parts) > 1:
            split = [_number(part) for part in parts]
            if split.count(-1) > 1:
                return None
            calls.append(("unflatten", (len(groups), tuple(split))))
        groups += parts or [()]
    spare = [i for i, group in enumerate(groups) if not group]
    owned: list[list[int]] = []  # for each dimension of the target, the groups that make it
    for dimension in target:
        own = [i for i, group in enumerate(groups) if group and group[0] in dimension]
        own.sort(key=lambda i: home[groups[i][0]][1])
        owned.append(own or ([spare.pop(0)] if spare else []))
    calls += [("squeeze", (i,)) for i in reversed(spare)]  # of size 1, and nobody's
    kept = [i for own in owned for i in own]
    moved = [sorted(kept).index(i) for i in kept]
    off = [i for i, m in enumerate(moved) if i != m]
    if off:
        calls.append(("transpose", (*off,)) if len(off) == 2 else ("permute", (*moved,)))
    rank = len(kept)
    for at, (dimension, own) in enumerate(zip(target, owned, strict=True)):
        present = [groups[i] for i in own if groups[i]]
        if not own:
            calls.append(("unsqueeze", (at,)))
            rank += 1
        if not present:
            continue
        lacking = [(p,) for p in dimension if not any(p in group for group in present)]
        parts = sorted([*present, *lacking], key=lambda part: home[part[0]][1])
        full = [-1] * (rank + len(lacking))
        for j, part in enumerate(parts):
            if part in lacking:
                full[at + j] = _number(part)
                calls.append(("unsqueeze", (at + j,)))
                if full[at + j] < 0:
                    return None
        if lacking:
            calls.append(("expand", tuple(full)))
        if len(parts) > 1:
            calls.append(("flatten", (at, at + len(parts) - 1)))
        rank -= len(present) - 1
    return calls


def _number(part: Dimension) -> int:
    """The size of a part, -1 if it is symbolic."""
    return math.prod(p.size for p in part) if all(_is_int(p.exact) for p in part) else -1


def _is_int(x: Any) -> bool:
    return isinstance(x, int) or bool(getattr(x, "is_Integer", False))
