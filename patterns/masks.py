"""What a mask tensor means.

A mask that the graph builds from shapes alone is a constant: it is built here once, on a CPU, and
compared with the causal triangle. Placeholders stand in as meta tensors, so a mask that reads an
input's values can't be computed and is recognised by that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from moda_compile import fx
from moda_compile.patterns.row import Refused

_MAX_NODES = 1000
_MAX_ELEMENTS = 1 << 28
# These read their input's shape, dtype or device only, so a stand-in does.
_SHAPE_ONLY = ("new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like",
               "full_like", "empty_like")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Causality:
    """``is_causal`` was shown for every T up to ``max_length`` (``None``: for every T)."""

    is_causal: bool
    max_length: int | None


# Answers by graph, and in it by length and the names of the nodes that make the mask.
_SHOWN: WeakKeyDictionary[Graph, dict[tuple[str, frozenset[str]], Causality]] = WeakKeyDictionary()


def classify(mask: Node, *, length: Any, at: Node | None = None) -> Causality:
    """Show that ``mask`` is causal, or refuse.

    Args:
        mask: bool (True attends) or additive, broadcastable to [B, Hq, T, T].
        length: T, an int or a symbolic int.
        at: the node that reads the mask; what is written into the mask behind it does not count.
            By default the graph's last node.

    With a symbolic T one graph serves many lengths, so the mask is also built for other lengths
    up to the next power of two, and the caller must guard T by ``max_length``: a sliding window,
    for one, is causal as long as T fits in it.
    """
    at = next(reversed(mask.graph.nodes)) if at is None else at
    # The layers of a model share one mask, and building it is quadratic in T: do it once.
    shown = _SHOWN.setdefault(mask.graph, {})
    key = (str(length), frozenset(node.name for node in _parts(mask, at)))
    if key not in shown:
        shown[key] = _classify(mask, length, at)
    return shown[key]


def _classify(mask: Node, length: Any, at: Node) -> Causality:
    if isinstance(length, int):
        _check(mask, {}, length, at)
        return Causality(is_causal=True, max_length=length)
    expression, hint = length.node.expr, int(length.node.hint)
    (symbol,) = expression.free_symbols
    bound = max(64, 1 << (hint - 1).bit_length())

    def check(trial: int) -> None:
        (size,) = sympy.solve(expression - trial, symbol)  # T may be an input's length minus 1
        _check(mask, {symbol: size}, trial, at)

    for trial in (2, 3, hint):
        check(trial)
    longest, refused = hint, bound + 1
    for trial in sorted({bound // 2 + 1, bound} - set(range(hint + 1))):
        try:
            check(trial)
            longest = trial
        except Refused:
            refused = trial
            break
    while refused <= bound and refused - longest > 1:  # the window lies in between
        trial = (longest + refused) // 2
        try:
            check(trial)
            longest = trial
        except Refused:
            refused = trial
    return Causality(is_causal=True, max_length=longest)


def _check(mask: Node, sizes: dict[Any, int], length: int, at: Node) -> None:
    built = _build(mask, sizes, at)
    if built is None:
        raise Refused(
            "the attention mask depends on the values of an input (padding, packing).",
            "pass no mask (transformers: attention_mask=None), or pad on the right and mask the "
            "loss instead: a causal model never looks there.",
        )
    if built.dim() < 2 or built.shape[-2:] != (length, length):
        raise Refused(
            f"the attention mask has shape {tuple(built.shape)}, not [.., T, T].",
            "run without a KV cache.",
        )
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    if built.dtype == torch.bool:
        causal = bool((built == triangle).all())
    else:
        low = torch.finfo(built.dtype).min / 2
        causal = bool((torch.where(triangle, built == 0, built <= low)).all())
    if not causal:
        raise Refused(
            "the attention mask is not causal (bidirectional, windowed, biased or packed).",
            "use is_causal=True or no mask; other masks are not supported yet.",
        )


def _build(mask: Node, sizes: dict[Any, int], at: Node) -> Tensor | None:
    """The mask for the given values of symbolic sizes; ``None`` if it reads an input's values."""
    needed = _parts(mask, at)
    if len(needed) > _MAX_NODES:
        return None
    known: dict[Node, Any] = {}
    with torch.no_grad():
        for node in mask.graph.nodes:
            if node in needed:
                try:
                    known[node] = _evaluate(node, known, sizes)
                except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError):
                    return None
    result = known.get(mask)
    if not isinstance(result, Tensor) or result.device.type != "cpu":
        return None
    return result if result.numel() <= _MAX_ELEMENTS else None


def _parts(mask: Node, at: Node) -> set[Node]:
    """All nodes that make the mask as it is in front of ``at``."""
    needed = set(fx.upstream(mask, _leaf))
    while True:  # mask[...] = x and the like are part of the mask, though nothing uses their result
        written = fx.written_into(needed, before=at)
        if not written:
            return needed
        needed.update(n for node in written for n in fx.upstream(node, _leaf))


def _leaf(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _evaluate(node: Node, known: dict[Node, Any], sizes: dict[Any, int]) -> Any:
    def concrete(x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            environment = x.node.shape_env
            # torch 2.11 has the second name, 2.13 both, the second deprecated.
            hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
            return int(x.node.expr.subs(sizes).subs(hints))
        return x

    if _leaf(node):
        stand_in = fx.value(node)
        if isinstance(stand_in, Tensor):
            shape = [concrete(s) for s in stand_in.shape]
            return torch.empty(shape, dtype=stand_in.dtype, device="meta")
        return concrete(stand_in)
    args, kwargs = fx.arguments(node, lambda n: known[n])
    if fx.calls(node, *_SHAPE_ONLY) or "device" in kwargs:
        kwargs = dict(kwargs) | {"device": "cpu"}
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
