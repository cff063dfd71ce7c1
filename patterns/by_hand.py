"""Attention written by hand: softmax(scale q k^T + mask) v by any products, in any layout.

It is found from its end, the product of the probabilities with the values, and read backwards:

    query --views--> (product) --scale, masks--> (softmax) --casts--> (product) --> result
    key   --views-->                                       value --views-->

What stands between two products of activations and holds a softmax, and is not understood, is
refused: an attention is never missed silently (:mod:`moda_compile.patterns.flow`).

All numbers that queries, keys or scores are multiplied with make ``scale``; a slot's key is the key
before any of them. So it is the same key in every layer, and in the same model written with SDPA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import axes, flow, heads, masks, products
from moda_compile.patterns.row import Attention, Refused
from moda_compile.patterns.scores import BIAS, HIDDEN, Scores, Term, Unclear, read

_FIX = (
    "use F.scaled_dot_product_attention (transformers: attn_implementation='sdpa'), or leave it "
    "out with strict=False."
)
_FEATURES = "features"


# What the graph says of a tensor's shape is then the shape behind them.
_RESHAPED_IN_PLACE = ("unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "t_", "resize_")


def match(node: Node) -> Attention | None:
    """Match the product with the values. See the row in ``moda_compile.patterns.PATTERNS``."""
    if flow.divides_by_sum(node):
        raise _refused(Unclear("the softmax is written out"))
    if not flow.is_attention_product(node):
        return None
    product = products.as_product(node)
    sides = [x for x in products.operands(node) if flow.bits(x) & flow.SOFTMAX]
    if not sides:
        if any(flow.bits(x) & flow.SIGMOID for x in products.operands(node)):
            raise _refused(Unclear("its weights are a sigmoid of the scores, not a softmax"))
        return None
    if product is None or product.bias is not None or product.factor != 1.0:
        raise _refused(Unclear(f"the product ({fx.name_of(node)}) is not understood"))
    if any(fx.calls(user, *_RESHAPED_IN_PLACE) for user in node.users):
        raise _refused(Unclear("its output is reshaped in place, such as by unsqueeze_"))
    why: list[Unclear] = []
    for weights in sides:
        try:
            return _attention(product, weights)
        except Unclear as unclear:
            why.append(unclear)
    raise _refused(why[0])


def _refused(unclear: Unclear) -> Refused:
    return Refused(f"attention written by hand: {unclear}.", unclear.fix or _FIX)


def _attention(product: products.Product, weights: Node) -> Attention:
    """Read the attention whose probabilities are the operand ``weights`` of ``product``."""
    node = product.node
    gm = node.graph.owning_module
    assert gm is not None
    names = {product.left: product.left_names, product.right: product.right_names}
    if len(names) == 1:
        raise Unclear("the probabilities are multiplied with themselves")
    (value,) = (x for x in names if x is not weights)
    found = _named(product)
    layouts = {x: _layout(x, names[x], found) for x in names}
    has = {x: {n for n, d in zip(names[x], layouts[x], strict=True) if d} for x in names}
    summed = [n for n in found if n not in product.out_names and found[n]]
    if len(summed) > 1 or not has[value] & has[weights] >= {*summed}:
        raise Unclear("the second product sums over more than the keys")
    keys = found[summed[0]] if summed else ()
    alone = has[value] - has[weights]
    if len(alone) > 1:
        raise Unclear("the values have more than one axis of their own")
    channels = found[alone.pop()] if alone else ()
    origins = heads.trace(value, layouts[value], scaling=False, by=node, at=node)

    def accept(scores: Scores) -> tuple[Scores, heads.Operands, heads.Arrangement]:
        query, key, features = _query_and_key(scores, keys, node)
        of = heads.Operands(
            query=query,
            key=key,
            value=origins,
            scores=scores.layout,
            output=tuple(found[n] for n in product.out_names),
            others=tuple(term.layout for term in scores.terms),
            keys=keys,
            features=features,
            channels=channels,
        )
        return scores, of, heads.arrange(of)

    scores, of, to = read(weights, layouts[weights], keys, node, accept)
    _check(node, scores)
    scale = scores.factor * of.query[-1].factor * of.key[-1].factor
    if not (scale > 0 and math.isfinite(scale)):
        raise Unclear(f"its scale is {scale:g}")
    with gm.graph.inserting_before(node):
        query_, key_, value_ = (
            to.view(gm, origins, target, like=node)
            for origins, target in ((of.query, to.query), (of.key, to.key), (of.value, to.value))
        )
        terms = [(to.masked(gm, t.node, t.layout, like=node), t) for t in scores.terms]
        lengths = fx.value(query_).shape[2], fx.value(key_).shape[2]
        meaning = _combined(gm, terms, lengths, node)
    return Attention(
        node=node,
        pattern="by hand",
        query=query_,
        key=key_,
        value=value_,
        is_causal=meaning.is_causal,
        scale=scale,
        mask=meaning.mask,
        max_length=meaning.max_length,
        restore=to.restore(of.output),
    )


def _named(product: products.Product) -> dict[str, axes.Dimension]:
    """For each name of a dimension the axis that it is."""
    found: dict[str, axes.Dimension] = {}
    for x, names in (
        (product.left, product.left_names),
        (product.right, product.right_names),
    ):
        for name, size in zip(names, axes.sizes(fx.value(x)), strict=True):
            found[name] = found.get(name) or axes.whole(name, size)
    return found


def _layout(x: Node, names: products.Names, found: dict[str, axes.Dimension]) -> axes.Layout:
    """Of an operand: a dimension of size 1 is broadcast, so none of the axis is in it."""
    pairs = zip(names, axes.sizes(fx.value(x)), strict=True)
    return tuple(found[name] if size > 1 else () for name, (size, _) in pairs)


def _query_and_key(
    scores: Scores, keys: axes.Dimension, at: Node
) -> tuple[list[heads.Origin], list[heads.Origin], axes.Dimension]:
    """The operands of q k^T, the one with the softmax's axis last, and what it sums over."""
    product = scores.product
    found = _named(product)
    operands = (
        (product.left, product.left_names),
        (product.right, product.right_names),
    )
    summed = [n for n in found if n not in product.out_names and found[n]]
    if len(summed) > 1:
        raise Unclear("the scores are a sum over more than the features")
    features: axes.Dimension = ()
    for name in summed:
        (piece,) = found[name]
        found[name] = features = axes.whole(_FEATURES, (piece.size, piece.exact))
    found |= dict(zip(product.out_names, scores.layout, strict=True))
    layouts = [_layout(x, names, found) for x, names in operands]
    if features and not all(features in layout for layout in layouts):
        raise Unclear("the scores are a sum over more than the features")
    has = [axes.merge(keys) in [axes.merge(d) for d in layout] for layout in layouts]
    if not keys:  # one token: the softmax's axis has no steps to know it by, but has its place
        last = product.out_names[-1]
        has = [last in names for _, names in operands]
    if sum(has) != 1:
        raise Unclear("the scores are no product of queries and keys")
    order = (1, 0) if has[0] else (0, 1)
    query, key = (
        heads.trace(operands[i][0], layouts[i], scaling=True, by=product.node, at=at) for i in order
    )
    return query, key, features


def _check(node: Node, scores: Scores) -> None:
    """What would make the rewritten attention another one."""
    chain = {*scores.chain, scores.product.node}
    ends = {node, *(node.all_input_nodes if fx.calls(node, "sum") else ())}
    for own in chain:
        if any(user not in chain | ends and not _reads_shape(user) for user in own.users):
            raise Refused(
                "attention written by hand, whose scores or probabilities the model also uses "
                "otherwise: with depth KV they would be another matrix.",
                "return no attention weights (transformers: output_attentions=False).",
            )
    if fx.written_into(chain, before=node):
        raise Unclear("its scores are written in place")
    for term in scores.terms:
        if any(not w < term.reader for w in fx.written_into({term.node}, before=node)):
            raise Unclear("a mask of it is written in place")


def _reads_shape(user: Node) -> bool:
    tensor = isinstance(fx.value(user), (torch.Tensor, tuple, list))
    return fx.calls(user, *flow.SHAPE_ONLY) or (user.op != "output" and not tensor)


# --- masks --------------------------------------------------------------------------------------


def _combined(
    gm: GraphModule, terms: list[tuple[Node, Term]], lengths: tuple[Any, Any], at: Node
) -> masks.Meaning:
    """All the masks, for lengths (Tq, Tk), as one: causal, none at all, or a node."""
    queries, keys = lengths
    kept: list[tuple[Node, masks.Meaning]] = []
    for mask, term in terms:
        if term.kind == HIDDEN:
            mask = fx.insert(gm, torch.logical_not, (mask,), like=at)
        elif term.kind == BIAS and term.factor != 1.0:
            mask = fx.insert(gm, torch.mul, (mask, term.factor), like=at)
        kept.append((mask, masks.classify(mask, queries=queries, keys=keys, at=at)))
    limits = [m.max_length for _, m in kept if m.max_length is not None]
    general = [mask for mask, m in kept if m.mask is not None]
    if not general:
        return masks.Meaning(
            is_causal=any(m.is_causal for _, m in kept), max_length=min(limits, default=None)
        )
    needed = [mask for mask, m in kept if m.mask is not None or m.is_causal]
    full = [m.max_length for _, m in kept if m.mask is None and not m.is_causal]
    return masks.Meaning(
        mask=join(gm, needed, like=at),
        max_length=min((n for n in full if n is not None), default=None),
    )


def join(gm: GraphModule, parts: list[Node], like: Node) -> Node:
    """One mask of several: bool (True attends) where all are, else additive."""
    shown = [x for x in parts if fx.value(x).dtype == torch.bool]
    biases = [x for x in parts if x not in shown]
    for some, operation in ((shown, torch.logical_and), (biases, torch.add)):
        while len(some) > 1:
            second, first = some.pop(), some.pop()
            some.append(fx.insert(gm, operation, (first, second), like=like))
    if not (shown and biases):
        return (shown or biases)[0]
    return fx.insert(gm, torch.where, (shown[0], biases[0], -math.inf), like=like)
