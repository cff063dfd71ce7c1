"""The way from a softmax's probabilities back to the product of queries and keys.

    probabilities = softmax(factor * (q . k) + biases), where some scores are hidden

Read backwards, from the operand of the second product: casts and views, the softmax, and in front
of it scaling and masking in any order. (scores + bias) * s is s * scores + s * bias, so a factor
met on the way applies to all that lies further upstream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import axes, flow, linear, masks, products

ADD = ("add", "add_", "iadd", "__add__", "__radd__")
SUB = ("sub", "sub_", "isub", "subtract")
MUL = ("mul", "mul_", "imul", "multiply", "__mul__", "__rmul__")
DIV = ("div", "div_", "truediv", "itruediv", "true_divide", "divide", "__truediv__")
_FILLS = ("masked_fill", "masked_fill_", "setitem")
_DROPOUTS = ("dropout", "dropout_")
_BOUNDS = ("clamp", "clamp_", "clamp_min", "clip", "max", "maximum")
_CASTS = tuple(name for name in linear.CASTS if name != "dropout")
_MAXIMA = ("amax", "max")

HIDDEN, SHOWN, BIAS = "hidden", "shown", "bias"


class Unclear(Exception):
    """It looks like an attention, but what it computes is not understood: why, one clause."""

    def __init__(self, why: str, fix: str | None = None) -> None:
        super().__init__(why)
        self.fix = fix


@dataclass(frozen=True, kw_only=True)
class Term:
    """Something that masks the scores.

    Attributes:
        node: True where scores are hidden (``HIDDEN``) or shown (``SHOWN``); or a ``BIAS``.
        kind: one of the three.
        factor: of a bias.
        layout: of the scores that it is broadcast to.
        reader: the node that reads it.
    """

    node: Node
    kind: str
    factor: float
    layout: axes.Layout
    reader: Node


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found on the way.

    Attributes:
        product: of queries and keys.
        layout: of its result.
        factor: of its result, so far.
        terms: the masks.
        chain: the nodes on the way, and those that only serve the softmax (its maxima).
    """

    product: products.Product
    layout: axes.Layout
    factor: float
    terms: tuple[Term, ...]
    chain: tuple[Node, ...]


Accept = Callable[[Scores], Any]


def read(node: Node, layout: axes.Layout, keys: axes.Dimension, at: Node, accept: Accept) -> Any:
    """Follow the probabilities ``node`` back, and return what ``accept`` makes of the end.

    Args:
        node: the operand of the second product.
        layout: its dimensions.
        keys: the axis that the second product sums over, which the softmax must be over.
        at: the second product.
        accept: called with the scores; where a sum has two products, the one it accepts is it.

    Raises:
        Unclear: if anything else is on the way, or ``accept`` raises it.
    """
    chain: list[Node] = []
    zeroed: list[Node] = []
    reader = at
    while True:
        node = _current(node, reader)
        chain.append(node)
        if fx.calls(node, "softmax"):
            break
        if fx.calls(node, "nan_to_num"):
            following: Any = fx.argument(node, 0, "input"), layout
        elif fx.calls(node, *_FILLS) and masks.number(_fill(node)[2]) == 0.0:
            following = _fill(node)[0], layout
            zeroed.append(_fill(node)[1])
        else:
            following = _through(node, layout)
        if following is None:
            raise _unknown(node, "the probabilities are changed by")
        reader, (node, layout) = node, following
    dim = fx.argument(node, 1, "dim")
    if not isinstance(dim, int) or axes.merge(layout[dim % len(layout)]) != axes.merge(keys):
        raise Unclear("the softmax is not over the keys")
    source = fx.argument(node, 0, "input")
    start = _State(layout=layout, factor=1.0, terms=(), chain=tuple(chain), zeroed=tuple(zeroed))
    return _scores(source, start, node, accept)


@dataclass(frozen=True, kw_only=True)
class _State:
    layout: axes.Layout
    factor: float
    terms: tuple[Term, ...]
    chain: tuple[Node, ...]
    zeroed: tuple[Node, ...]

    def masked(self, node: Any, kind: str, factor: float, reader: Node) -> _State:
        if not fx.is_tensor(node):
            raise Unclear("a mask of the scores is no tensor")
        term = Term(node=node, kind=kind, factor=factor, layout=self.layout, reader=reader)
        return replace(self, terms=(*self.terms, term))


def _scores(node: Node, state: _State, reader: Node, accept: Accept) -> Any:
    while True:
        node = _current(node, reader)
        state = replace(state, chain=(*state.chain, node))
        if products.is_product(node):
            return _end(node, state, accept)
        through = _through(node, state.layout)
        if through is not None:
            reader, node = node, through[0]
            state = replace(state, layout=through[1])
            continue
        steps = _masking(node, state) or _arithmetic(node, state)
        if not steps:
            raise _unknown(node, "the scores are changed by")
        steps = [_fitted(node, *step) for step in steps]
        if len(steps) == 1:
            reader, (node, state) = node, steps[0]
            continue
        # A sum of two products: scores, and a bias that is one, such as relative positions.
        found: list[Any] = []
        why: list[Unclear] = []
        for way, after in steps:
            try:
                found.append(_scores(way, after, node, accept))
            except Unclear as unclear:
                why.append(unclear)
        if len(found) == 1:
            return found[0]
        raise why[0] if not found else Unclear("the scores are a sum of two products q k^T")


def _fitted(node: Node, scores: Node, state: _State) -> tuple[Node, _State]:
    """The same, for scores that ``node`` gave a leading dimension of size 1."""
    shapes = [fx.value(x).shape for x in (node, scores) if fx.is_tensor(x)]
    if len(shapes) < 2 or shapes[0] == shapes[1]:
        return scores, state
    layout = axes.reshape(state.layout, axes.sizes(fx.value(scores)))
    if layout is None:
        raise Unclear("the scores are repeated by what is added to them")
    return scores, replace(state, layout=layout)


def _end(node: Node, state: _State, accept: Accept) -> Any:
    product = products.as_product(node)
    if product is None or not flow.is_attention_product(node):
        raise Unclear(f"the product ({fx.name_of(node)}) that makes the scores is not understood")
    if product.bias is not None:
        state = state.masked(product.bias, BIAS, state.factor * product.bias_factor, node)
    known = {term.node for term in state.terms}
    if not known.issuperset(state.zeroed):
        raise Unclear("some probabilities are set to zero")
    return accept(
        Scores(
            product=product,
            layout=state.layout,
            factor=state.factor * product.factor,
            terms=state.terms,
            chain=state.chain,
        )
    )


def _masking(node: Node, state: _State) -> list[tuple[Node, _State]]:
    """masked_fill, where, and bounds that no score reaches."""
    if fx.calls(node, *_FILLS):
        scores, condition, fill = _fill(node)
        _check_fill(fill, state)
        return [(scores, state.masked(condition, HIDDEN, 1.0, node))]
    if fx.calls(node, "where"):
        first: Any
        second: Any
        if node.op == "call_method":
            first, condition, second = (*node.args, *node.kwargs.values())[:3]
        else:
            condition = fx.argument(node, 0, "condition")
            first, second = fx.argument(node, 1, "input"), fx.argument(node, 2, "other")
        scored = [isinstance(x, Node) and _is_scored(x) for x in (first, second)]
        if sum(scored) != 1:
            raise Unclear("torch.where chooses between two kinds of scores")
        _check_fill(second if scored[0] else first, state)
        kind, scores = (SHOWN, first) if scored[0] else (HIDDEN, second)
        return [(scores, state.masked(condition, kind, 1.0, node))]
    if fx.calls(node, *_BOUNDS) and isinstance(fx.value(node), torch.Tensor):
        names = ("other",) if fx.calls(node, "max", "maximum") else ("min",)
        bound = masks.number(fx.argument(node, 1, names[0]))
        upper = fx.argument(node, 2, "max") if fx.calls(node, "clamp", "clamp_", "clip") else None
        source = fx.argument(node, 0, "input")
        if bound is not None and bound * state.factor <= masks.LOW and upper is None:
            return [(source, state)]
    return []


def _fill(node: Node) -> tuple[Any, Any, Any]:
    """The filled tensor, the condition and the value."""
    names = ("input", "mask", "value")
    given = tuple(fx.argument(node, i, name) for i, name in enumerate(names))
    if fx.calls(node, "setitem"):
        whole, index = (fx.value(x) for x in given[:2])
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
            raise Unclear("scores are written in place")
        if index.dim() != whole.dim():
            raise Unclear("scores are written in place")
    return given


def _check_fill(fill: Any, state: _State) -> None:
    value = masks.number(fill)
    if value is None or not value * state.factor <= masks.LOW:
        raise Unclear(
            f"hidden scores are set to {fill if value is None else value:g}, not to -inf"
            if not isinstance(fill, Node) or value is not None
            else "hidden scores are set to a value that is not known"
        )


def _arithmetic(node: Node, state: _State) -> list[tuple[Node, _State]]:
    """Scaling by numbers, adding masks, taking the maximum off."""
    if not fx.calls(node, *ADD, *SUB, *MUL, *DIV, "neg"):
        return []
    left, right = fx.argument(node, 0, "input"), fx.argument(node, 1, "other")
    if fx.calls(node, *MUL, *DIV):
        found = scaled(node)
        return [(found[0], replace(state, factor=state.factor * found[1]))] if found else []
    if fx.calls(node, "neg"):
        return [(left, replace(state, factor=-state.factor))]
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return []
    sign = -alpha if fx.calls(node, *SUB) else alpha
    steps = []
    if isinstance(left, Node) and _is_scored(left):
        if masks.number(right) == 0.0:
            steps.append((left, state))
        elif fx.calls(node, *SUB) and (maximum := _maximum(right, left)):
            steps.append((left, replace(state, chain=(*state.chain, *maximum))))
        else:
            steps.append((left, state.masked(right, BIAS, state.factor * sign, node)))
    if isinstance(right, Node) and _is_scored(right) and sign > 0:
        after = state.masked(left, BIAS, state.factor, node)
        steps.append((right, replace(after, factor=state.factor * sign)))
    return steps


def _maximum(node: Any, scores: Node) -> tuple[Node, ...]:
    """The nodes that take the maximum of ``scores`` over the keys: no softmax changes by it."""
    chain: list[Node] = []
    while isinstance(node, Node):
        chain.append(node)
        if fx.calls(node, *_MAXIMA):
            return tuple(chain) if fx.argument(node, 0, "input") is scores else ()
        if not fx.calls(node, "getitem", "getattr", "detach", "unsqueeze"):
            return ()
        node = node.args[0]
    return ()


def scaled(node: Node) -> tuple[Node, float] | None:
    """x and s, if ``node`` is x * s or x / s with a number s."""
    left, right = fx.argument(node, 0, "input"), fx.argument(node, 1, "other")
    if fx.calls(node, *MUL):
        for x, factor in ((left, masks.number(right)), (right, masks.number(left))):
            if isinstance(x, Node) and factor is not None and _same_shape(x, node):
                return x, factor
    if fx.calls(node, *DIV) and not node.kwargs.get("rounding_mode") and isinstance(left, Node):
        divisor = masks.number(right)
        if divisor and _same_shape(left, node):
            return left, 1.0 / divisor
    return None


def cast(node: Node) -> Node | None:
    """x, if ``node`` is x up to precision."""
    inactive = fx.calls(node, *_DROPOUTS) and _inactive(node)
    if not inactive and not fx.calls(node, *_CASTS):
        return None
    source = fx.argument(node, 0, "input")
    if not (fx.is_tensor(source) and fx.is_tensor(node)):
        return None
    floating = fx.value(source).is_floating_point() and fx.value(node).is_floating_point()
    return source if floating else None


def _inactive(dropout: Node) -> bool:
    p = fx.argument(dropout, 1, "p", 0.5)
    training = fx.argument(dropout, 2, "training", dropout.kwargs.get("train", True))
    return p == 0 or training is False


def _through(node: Node, layout: axes.Layout) -> tuple[Node, axes.Layout] | None:
    """What ``node`` is a cast or a view of."""
    source = cast(node)
    if source is not None:
        return source, layout
    return axes.before(node, layout)


def _current(node: Node, reader: Node) -> Node:
    """The last to write into ``node`` in place before ``reader`` reads it, or ``node``."""
    writers = [
        u for u in node.users
        if fx.writes(u) and u.args and u.args[0] is node and u is not reader and u < reader
    ]  # fmt: skip
    return max(writers) if writers else node


def _is_scored(node: Node) -> bool:
    return bool(flow.bits(node) & flow.PRODUCT)


def _same_shape(x: Node, y: Node) -> bool:
    return fx.is_tensor(x) and fx.is_tensor(y) and fx.value(x).shape == fx.value(y).shape


_KNOWN = {
    "tanh": "the scores are capped with tanh (softcapping)",
    "cat": "extra columns are joined to the scores (attention sinks)",
    "concat": "extra columns are joined to the scores (attention sinks)",
    "pad": "extra columns are joined to the scores (attention sinks)",
    "getitem": "a part of the probabilities is cut off (attention sinks)",
    "narrow": "a part of the probabilities is cut off (attention sinks)",
    "linear": "a linear layer mixes the heads' scores (talking heads)",
    "conv2d": "a convolution mixes the heads' scores (talking heads)",
    "log_softmax": "the softmax is written out",
    "exp": "the softmax is written out",
}


def _unknown(node: Node, otherwise: str) -> Unclear:
    name = fx.name_of(node)
    if fx.calls(node, *_DROPOUTS):
        return Unclear(
            "attention dropout in training would have to cover sequence and depth with one mask, "
            "which is not supported",
            "set the attention's dropout to 0, or call .eval() before converting.",
        )
    known = _KNOWN.get(name)
    if fx.calls(node, *MUL, *DIV) and any(flow.bits(x) & flow.TOTAL for x in node.all_input_nodes):
        known = _KNOWN["exp"]
    return Unclear(known or f"{otherwise} {name}, which is not understood")
