"""Mixtures of experts: a router picks, by top-k, which expert branches over its input count.

    x --linear--> scores --softmax or sigmoid, top-k, in either order--> picks
    y = sum over picked experts e of weight_e * down_e( f( up_e(x) ) )

However the experts run (all of them on all tokens, weights gathered per token, tokens sorted and
multiplied in groups, tokens gathered per expert), what is picked meets what x becomes, and their
sum is added to something that neither has part in: the residual stream. Between x and there lies
the mixture, shared experts included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from moda_compile import fx
from moda_compile.patterns import linear

_PICKS = ("topk", "argmax", "max", "sort", "argsort")
_ADDS = ("add", "__add__", "__radd__", "iadd", "add_")
_ATTENTIONS = ("scaled_dot_product_attention", "multi_head_attention_forward")
_POINTWISE = (*_ADDS, "mul", "__mul__", "__rmul__", "imul", "mul_")
# Two activations multiplied, between a linear layer and what is picked: attention, no router.
_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm", "baddbmm", "einsum", "addmm", *_ATTENTIONS)
_FLAT = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous")
_CASTS = ("to", "type", "float", "half", "bfloat16", "double", "type_as")
# What makes an operand of a product from parameters: views, casts, those that were picked.
_FROM_PARAMETERS = (*linear.VIEWS, *_CASTS, "t", "T", "stack", "cat", "expand", "index_select",
                    "gather", "take_along_dim", "repeat_interleave", "clone", "detach",
                    "embedding")  # fmt: skip

_INPUT, _PICKED, _UP, _DOWN, _OUTSIDE = 1, 2, 4, 8, 16


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One mixture of experts.

    Attributes:
        node: its output, flattened or not: what is added to the residual stream.
        input: what router and experts read [B, T, D].
        parts: the nodes that make the output from the input.
        products: those of them that multiply by a matrix or a stack of matrices: the router, the
            experts, shared experts.
        weight: parameter of one expert: a matrix, or a stack of one per expert.
    """

    node: Node
    input: Node
    parts: frozenset[Node]
    products: tuple[Node, ...]
    weight: Node


def find(graph: Graph, attentions: Collection[Node] = ()) -> list[Mixture]:
    """All mixtures of experts of ``graph``, in its order.

    ``attentions``: results of attentions, by which a parallel block's are known; calls are anyway.
    """
    found: list[Mixture] = []
    routed: set[Node] = set()
    for node in graph.nodes:
        if not fx.calls(node, *_PICKS):
            continue
        routers = _routers(node)
        # A router may pick groups of experts, then experts: the first pick is where it starts.
        if routers and routers[0].node not in routed:
            routed.update(layer.node for layer in routers)
            mixture = _follow(node, routers, attentions)
            if mixture is not None:
                found.append(mixture)
    return found


def unflattened(node: Node) -> Node:
    """``node`` [.., D] before its tokens were flattened."""
    return _behind(node, _FLAT)[-1]


def hidden_state(node: Node) -> Node:
    """``node`` [.., D] before its tokens were flattened, or cast."""
    return _behind(node, (*_FLAT, *_CASTS))[-1]


def _behind(node: Node, names: tuple[str, ...]) -> list[Node]:
    chain = [node]
    while fx.calls(node, *names):
        source = fx.argument(node, 0, "input")
        if not fx.is_tensor(source) or fx.value(source).shape[-1] != fx.value(node).shape[-1]:
            break
        chain.append(node := source)
    return chain


def _read_by(weight: Node, routers: list[linear.Linear]) -> Node:
    """The router's input in the experts' dtype: a router may compute in a wider one."""
    *nearer, source = _behind(routers[0].input, (*_FLAT, *_CASTS))
    shape, dtype = fx.value(source).shape, fx.value(weight).dtype
    same = [n for n in (source, *reversed(nearer)) if fx.value(n).dtype == dtype]
    return next((n for n in same if fx.value(n).shape == shape), source)


def _routers(picks: Node) -> list[linear.Linear]:
    """The linear layers whose scores ``picks`` compares, if all of them read one hidden state."""
    layers: list[linear.Linear] = []
    scores = fx.argument(picks, 0, "input")
    if not isinstance(scores, Node):
        return []

    def stop(n: Node) -> bool:
        return linear.as_linear(n) is not None or fx.calls(n, *_PRODUCTS)

    for node in fx.upstream(scores, stop):
        layer = linear.as_linear(node)
        if layer is not None:
            layers.append(layer)
        elif fx.calls(node, *_PRODUCTS):
            return []
    inputs = {hidden_state(layer.input) for layer in layers}
    return layers if len(inputs) == 1 else []


def _follow(
    picks: Node, routers: list[linear.Linear], attentions: Collection[Node]
) -> Mixture | None:
    """Walk from the router's input to where the experts' sum joins what is not of the mixture."""
    source = hidden_state(routers[0].input)
    scoring = {layer.node for layer in routers}
    marks = {source: _INPUT}
    products: dict[Node, Node] = {}
    for node in _after(source):
        operands = [(used, _marks(used, marks, source)) for used in node.all_input_nodes]
        mark = _PICKED if node is picks else 0
        for _, one in operands:
            mark |= one
        if mark & _PICKED and node.op != "output":
            residual = any(one & _OUTSIDE for _, one in operands) or (
                fx.calls(node, *_ADDS) and any(hidden_state(n) is source for n, _ in operands)
            )
            if residual or _attends(node, attentions):
                made = _unmarked(next((n for n, one in operands if one & _PICKED), node))
                return _mixture(routers, made, node, marks, products, attentions)
        weights = [w for used, _ in operands if (w := _matrix(used)) is not None]
        if mark & _INPUT and weights and _multiplies(node):
            products[node] = weights[0]
            if node not in scoring:
                mark |= _UP | (_DOWN if mark & _UP or len(set(weights)) > 1 else 0)
        if _attends(node, attentions):  # of a parallel block
            mark |= _OUTSIDE
        marks[node] = mark
        target = node.args[0] if node.args else None
        if fx.writes(node) and isinstance(target, Node):
            memory = fx.memory(target)
            for shown in {target, memory}:
                marks[shown] = marks.get(shown, 0) | mark
    return None


def _mixture(
    routers: list[linear.Linear],
    made: Node,
    joined: Node,
    marks: dict[Node, int],
    products: dict[Node, Node],
    attentions: Collection[Node],
) -> Mixture | None:
    source, scoring = hidden_state(routers[0].input), [layer.node for layer in routers]
    # At least two layers, up and down, of what is picked, and back at the width they started from.
    wide = fx.is_tensor(made) and fx.value(made).shape[-1] == fx.value(source).shape[-1]
    if marks[made] & _DOWN == 0 or not wide:
        return None
    parts = _made_from(made, source, marks, joined)
    inside = [node for node in products if node in parts]
    experts = [node for node in inside if node not in scoring]
    if not experts or any(_attends(n, attentions) for n in parts):
        return None
    return Mixture(
        node=made,
        input=_read_by(products[experts[0]], routers),
        parts=frozenset(parts),
        products=(*scoring, *experts),
        weight=products[experts[0]],
    )


def _attends(node: Node, attentions: Collection[Node]) -> bool:
    return node in attentions or fx.calls(node, *_ATTENTIONS)


def _made_from(made: Node, source: Node, marks: dict[Node, int], before: Node) -> set[Node]:
    """What ``made`` is made from, writes in place included, since ``source``."""

    def stop(n: Node) -> bool:
        return n is source or not marks.get(n, 0) & _INPUT

    parts = {n for n in fx.upstream(made, stop) if n is not source}
    while written := fx.written_into(parts, before=before):
        parts.update(n for node in written for n in fx.upstream(node, stop) if n is not source)
    return parts


def _marks(node: Node, marks: dict[Node, int], source: Node) -> int:
    """What is known of ``node``; an activation from before the walk is from outside."""
    known = marks.get(node)
    if known is not None:
        return known | marks.get(fx.memory(node), 0)
    if not fx.is_tensor(node) or not fx.value(node).is_floating_point():
        return 0
    origin = node
    while fx.calls(origin, *_FROM_PARAMETERS) and isinstance(fx.argument(origin, 0, "input"), Node):
        origin = fx.argument(origin, 0, "input")
    stream = fx.is_tensor(origin) and fx.value(origin).shape == fx.value(source).shape
    return _OUTSIDE if stream or origin.op.startswith("call") else 0


def _multiplies(node: Node) -> bool:
    return _unmarked(node) is node and not fx.calls(node, *_FROM_PARAMETERS, *_POINTWISE)


def _unmarked(node: Node) -> Node:
    """What a converted model's marker passes on: it is the module's result, not part of it."""
    while fx.calls_op(node, torch.ops.moda_compile.mark) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _matrix(node: Node) -> Node | None:
    """The parameter of two dimensions or more that ``node`` shows, or picks matrices from."""
    todo = [node]
    while todo:
        current = todo.pop()
        if fx.is_parameter(current):
            return current if fx.value(current).dim() >= 2 else None
        if fx.calls(current, "stack", "cat"):
            todo.extend(current.all_input_nodes[:1])
        elif fx.calls(current, *_FROM_PARAMETERS):
            first = fx.argument(current, 0, "input")
            todo.extend([first] if isinstance(first, Node) else [])
    return None


def _after(node: Node) -> Iterator[Node]:
    while node.next.op != "root":
        node = node.next
        yield node
