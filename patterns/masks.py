"""What a mask tensor means: causal, everything visible, or neither.

A mask that the graph builds from shapes alone is a constant: it is built here once, on a CPU, and
compared with the causal triangle. One that reads the values of an input (padding, packing, a
registered buffer) is no constant, and stays what it is: a mask of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from moda_compile import fx
from moda_compile.patterns.flow import SHAPE_ONLY

# Scores this low carry no weight beside any that are not masked. Models write -1e4 (which bfloat16
# rounds to -9984), the smallest number of a dtype, or -inf.
LOW = -9e3

_MAX_NODES = 1000
_MAX_ELEMENTS = 1 << 28  # of one tensor, to build a mask at the length that the graph came with
_MAX_ELEMENTS_AHEAD = 1 << 26  # the same, for lengths that may come later
_AHEAD = 2048  # show at least so many tokens, if the above allows it
_LIKE = ("type_as", "expand_as", "view_as", "reshape_as")  # of the second: shape or dtype only
_RANDOM = ("rand", "bernoulli", "normal", "dropout", "multinomial")

# Where the number is that a tensor of any shape is filled with.
_FILLED = {"full_like": (1, "fill_value"), "full": (1, "fill_value"), "new_full": (2, "fill_value")}

CAUSAL, FULL, GENERAL = "causal", "full", "general"


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What is left to do for a mask.

    Attributes:
        is_causal: token t sees the tokens u <= t, shown for every Tk up to ``max_length``.
        mask: the mask to apply; ``None`` if ``is_causal``, or if all is visible.
        max_length: ``None`` if for every Tk.
    """

    is_causal: bool = False
    mask: Node | None = None
    max_length: int | None = None


_Verdict = tuple[str, int | None]  # one of the three above, and max_length
# Answers by graph, and in it by length and what the mask is.
_SHOWN: WeakKeyDictionary[Graph, dict[Any, _Verdict]] = WeakKeyDictionary()


def classify(mask: Node, *, queries: Any, keys: Any, at: Node | None = None) -> Meaning:
    """Tell whether ``mask`` is causal, masks nothing, or neither.

    Args:
        mask: bool (True attends) or additive, broadcastable to [B, Hq, Tq, Tk].
        queries, keys: Tq and Tk, ints or symbolic ints. The last query is the last key's token.
        at: the node that reads the mask; what is written into the mask behind it does not count.
            By default the graph's last node.

    With a symbolic Tk one graph serves many lengths, so a mask is also built for other lengths, and
    the caller must guard Tk by ``max_length``: a sliding window, for one, is causal as long as Tk
    fits in it. Beyond the guard the graph is traced anew, so it should be far: it is the next
    power of two of twice the Tk that the graph came with, and at least 2048, unless the mask would
    have more than 2**26 elements then (with one sequence in the batch, where the batch's size is
    symbolic: 8192 tokens). A mask that stops being causal within 2048 tokens, such as a narrow
    window, is ``mask`` at every length rather than causal for some, so that one graph serves all.

    Masks that are built alike are one: each is built once, however many layers build it anew.
    """
    at = fx.last(mask.graph) if at is None else at
    if not _constant(mask):
        return Meaning(mask=mask)
    found = _parts(mask, at)
    if found is None:
        return Meaning(mask=mask)
    parts, written = found
    shown = _SHOWN.setdefault(mask.graph, {})
    key = (f"{queries}, {keys}", frozenset(n.name for n in parts) if written else _identity(mask))
    if key not in shown:
        shown[key] = _verdict(mask, parts, queries, keys)
    kind, max_length = shown[key]
    if kind == GENERAL:
        return Meaning(mask=mask)
    return Meaning(is_causal=kind == CAUSAL, max_length=max_length)


def number(x: Any) -> float | None:
    """A Python number, or the one that a tensor built from constants is filled with."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if fx.calls(x, *_FILLED) and not fx.written_into({x}, before=fx.last(x.graph)):
        return number(fx.argument(x, *_FILLED[fx.name_of(x)]))
    if not isinstance(x, Node) or not fx.is_tensor(x) or not _constant(x):
        return None
    found = _parts(x, fx.last(x.graph))
    if found is None:
        return None
    parts, _ = found
    if any(isinstance(fx.value(n), (torch.SymInt, torch.SymFloat)) for n in parts):
        return None
    built = _build(x, parts, {}, None)
    return float(built) if built is not None and built.numel() == 1 else None


# --- which lengths ------------------------------------------------------------------------------


def _verdict(mask: Node, parts: list[Node], queries: Any, keys: Any) -> _Verdict:
    if isinstance(keys, int):
        fixed = isinstance(queries, int)
        return (_kind(mask, parts, {}, (queries, keys), None) if fixed else GENERAL), keys
    expression, hint = keys.node.expr, keys.node.hint
    if len(expression.free_symbols) != 1 or hint is None:
        return GENERAL, None
    (symbol,) = expression.free_symbols
    if isinstance(queries, torch.SymInt) and queries.node.expr.free_symbols != {symbol}:
        return GENERAL, None

    def at(trial: int) -> dict[Any, int] | None:
        """The symbol's value for that many keys, of which at least one is older than a query."""
        solved = sympy.solve(expression - trial, symbol)  # Tk may be an input's length minus 1
        if len(solved) != 1 or not solved[0].is_Integer:
            return None
        found = {symbol: int(solved[0])}
        return (
            found if 0 <= found[symbol] and 0 < _concrete(queries, found, None) <= trial else None
        )

    def kind(trial: int) -> str:
        found = at(trial)
        for others in (None, 1):
            if found is not None and (others is None or trial > hint):
                allowed = _MAX_ELEMENTS if trial <= hint else _MAX_ELEMENTS_AHEAD
                if _elements(parts, found, others) <= allowed:
                    sizes = _concrete(queries, found, others), trial
                    return _kind(mask, parts, found, sizes, others)
        return GENERAL

    first = kind(int(hint))
    small = [trial for trial in (2, 3, int(hint) - 1) if trial >= 2 and at(trial) is not None]
    if first == GENERAL or any(kind(trial) != first for trial in small):
        return GENERAL, None
    bound = max(_AHEAD, 2 << (int(hint) - 1).bit_length())
    while bound > hint and _elements(parts, {symbol: bound}, 1) > _MAX_ELEMENTS_AHEAD:
        bound //= 2
    longest, failed = int(hint), bound + 1
    for trial in sorted({bound // 2 + 1, bound} - set(range(hint + 1))):
        if kind(trial) != first:
            failed = trial
            break
        longest = trial
    while failed <= bound and failed - longest > 1:  # the window lies in between
        trial = (longest + failed) // 2
        if kind(trial) == first:
            longest = trial
        else:
            failed = trial
    return (first, longest) if longest >= min(bound, _AHEAD) else (GENERAL, None)


def _kind(
    mask: Node,
    parts: list[Node],
    sizes: dict[Any, int],
    lengths: tuple[int, int],
    others: int | None,
) -> str:
    if _elements(parts, sizes, others) > _MAX_ELEMENTS:
        return GENERAL
    built = _build(mask, parts, sizes, others)
    if built is None:
        return GENERAL
    for dim, stride in enumerate(built.stride()):
        if stride == 0 and built.shape[dim] > 1:
            built = built.narrow(dim, 0, 1)  # a dimension that was expanded holds one thing
    visible = built if built.dtype == torch.bool else built == 0
    if bool(visible.all()):
        return FULL
    if built.dim() < 2 or built.shape[-2:] != lengths:
        return GENERAL
    queries, keys = lengths
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    masked = ~built if built.dtype == torch.bool else built <= LOW
    return CAUSAL if bool(torch.where(triangle, visible, masked).all()) else GENERAL


# --- building it --------------------------------------------------------------------------------

_constants: WeakKeyDictionary[Node, bool] = WeakKeyDictionary()


def _constant(node: Node) -> bool:
    """Whether ``node`` follows from shapes alone, leaving out what is written into it in place."""
    todo = [node]
    while todo:
        current = todo[-1]
        ahead = [n for n in _inputs(current) if n not in _constants]
        if ahead and current not in _constants:
            todo += ahead
            continue
        todo.pop()
        leaf = _leaf(current)
        read = leaf and fx.is_tensor(current)
        random = not leaf and any(word in fx.name_of(current) for word in _RANDOM)
        of = all(_constants[n] for n in _inputs(current))
        _constants[current] = of and not read and not random
    return _constants[node]


def _leaf(node: Node) -> bool:
    """What is known without looking at what it is made of: symbolic sizes, and what comes in."""
    sizes = (int, torch.SymInt, torch.SymFloat, torch.Size)
    return not node.op.startswith("call") or isinstance(fx.value(node), sizes)


def _inputs(node: Node) -> list[Node]:
    """What ``node`` reads the values of."""
    if _leaf(node):
        return []
    like = _stand_in(node)
    return [n for n in node.all_input_nodes if n is not like]


def _stand_in(node: Node) -> Node | None:
    """The argument of which only shape, dtype and device are read."""
    position = 0 if fx.calls(node, *SHAPE_ONLY) else 1
    if position == 1 and not fx.calls(node, "to", *_LIKE):
        return None
    found = node.args[position] if len(node.args) > position else node.kwargs.get("input")
    return found if fx.is_tensor(found) else None  # type: ignore[return-value]


def _parts(mask: Node, at: Node) -> tuple[list[Node], bool] | None:
    """All nodes that make a constant mask as it is in front of ``at``, in order.

    And whether any of them writes in place. ``None`` if they are too many, or if what is written
    is no constant.
    """
    needed: dict[Node, None] = {}
    todo = [mask]
    while todo:
        while todo:
            node = todo.pop()
            if node not in needed:
                needed[node] = None
                todo += _inputs(node)
        if len(needed) > _MAX_NODES:
            return None
        # mask[...] = x and the like are part of the mask, though nothing uses their result
        todo = list(fx.written_into(set(needed), before=at))
        if not all(_constant(n) for n in todo):
            return None
    return sorted(needed), any(fx.writes(n) for n in needed)


def _identity(node: Node) -> int:
    """A number that two nodes of a graph share if they compute the same from the same."""
    table = _numbers.setdefault(node.graph, {})
    found: dict[Node, int] = {}
    todo = [node]
    while todo:
        current = todo[-1]
        ahead = [n for n in _inputs(current) if n not in found]
        if ahead:
            todo += ahead
            continue
        todo.pop()
        like = _stand_in(current)
        if _leaf(current):
            key: Any = ("size", str(fx.value(current)), current.op, str(current.target))
        else:

            def name(n: Node, like: Node | None = like) -> Any:
                return ("like", _like(n)) if n is like else ("node", found[n])

            # As text: slices and dtypes are no keys, and a number's text is all of it.
            key = (current.op, current.target, str(fx.arguments(current, name)))
        found[current] = table.setdefault(key, len(table))
    return found[node]


_numbers: WeakKeyDictionary[Graph, dict[Any, int]] = WeakKeyDictionary()


def _like(node: Node) -> str:
    return f"{tuple(fx.value(node).shape)} {fx.value(node).dtype}"


def _elements(parts: list[Node], sizes: dict[Any, int], others: int | None) -> int:
    """The elements of the largest tensor on the way, views that expand aside."""
    return max(
        math.prod(_concrete(s, sizes, others) for s in fx.value(n).shape)
        if fx.is_tensor(n) and not fx.calls(n, "expand", "expand_as", "broadcast_to")
        else 0
        for n in parts
    )


def _build(
    mask: Node, parts: list[Node], sizes: dict[Any, int], others: int | None
) -> Tensor | None:
    """The mask for the given values of symbolic sizes; ``None`` if that fails."""
    known: dict[Node, Any] = {}
    with torch.no_grad():
        for node in parts:
            try:
                known[node] = _evaluate(node, known, sizes, others)
            except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError,
                    IndexError, KeyError):  # fmt: skip
                return None
    result = known.get(mask)
    return result if isinstance(result, Tensor) and result.device.type == "cpu" else None


def _concrete(x: Any, sizes: dict[Any, int], others: int | None) -> Any:
    """A size for the given values of its symbols; the others are ``others``, or what they are."""
    if not isinstance(x, (torch.SymInt, torch.SymFloat)):
        return x
    expression = x.node.expr.subs(sizes)
    if others is not None:
        expression = expression.subs({symbol: others for symbol in expression.free_symbols})
    environment = x.node.shape_env
    # torch 2.11 has the second name, 2.13 both, the second deprecated.
    hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    found = expression.subs(hints)
    return int(found) if isinstance(x, torch.SymInt) else float(found)


def _evaluate(node: Node, known: dict[Node, Any], sizes: dict[Any, int], others: int | None) -> Any:
    if _leaf(node):
        stand_in = fx.value(node)
        if isinstance(stand_in, torch.Size):
            return torch.Size(_concrete(s, sizes, others) for s in stand_in)
        return _concrete(stand_in, sizes, others)
    like = _stand_in(node)

    def given(n: Node) -> Any:
        if n is not like:
            return known[n]
        shape = [_concrete(s, sizes, others) for s in fx.value(n).shape]
        return torch.empty(shape, dtype=fx.value(n).dtype, device="meta")

    args, kwargs = fx.arguments(node, given)
    if fx.calls(node, *SHAPE_ONLY) or "device" in kwargs:
        kwargs = dict(kwargs) | {"device": "cpu"}
    if fx.calls(node, "to", "type_as") and like is not None:
        return args[0].to(fx.value(like).dtype)
    if fx.calls(node, "to") and any(isinstance(a, torch.device) for a in args):
        kept = [a for a in args if not isinstance(a, torch.device)]
        return kept[0].to(*kept[1:], **kwargs) if len(kept) > 1 or kwargs else kept[0]
    run: Callable[..., Any]
    if node.op == "call_method":
        run, args = getattr(args[0], str(node.target)), args[1:]
    else:
        assert callable(node.target)
        run = node.target
    return run(*args, **kwargs)
