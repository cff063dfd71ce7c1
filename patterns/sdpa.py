"""Attention through ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import axes, grouped_query, heads, masks
from moda_compile.patterns.row import Attention, Refused
from moda_compile.patterns.scores import Unclear

_SDPA = torch.nn.functional.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """Queries and keys as [B, H, T, d], values as [B, H, T, dv], and what that takes."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    factor: float = 1.0
    restore: tuple[Any, ...] = ()


def match(node: Node) -> Attention | None:
    """Match one call. See the row in :data:`moda_compile.patterns.PATTERNS`."""
    if node.op != "call_function" or node.target is not _SDPA:
        return None
    bound: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    if bound.get("dropout_p", 0.0) != 0.0:
        raise Refused(
            f"attention dropout (dropout_p={bound['dropout_p']}) would have to cover sequence and "
            "depth with one mask, which is not supported.",
            "set the attention's dropout to 0, or call .eval() before converting.",
        )
    scale = bound.get("scale")
    if scale is not None and (scale := masks.number(scale)) is None:
        raise Refused(
            "the scale is a tensor or a symbolic value.", "pass scale= as a Python float, or None."
        )
    query, key, value, mask = (bound.get(name) for name in _NAMES[:4])
    try:
        given = _operands(node, query, key, value, mask)
    except Unclear as unclear:
        raise Refused(f"{unclear}.", "give queries, keys and values as [B, H, T, d].") from None
    if given.factor != 1.0:
        head_dim = int(fx.value(given.query).shape[3])
        scale = given.factor * (head_dim**-0.5 if scale is None else scale)
    queries, keys = (fx.value(x).shape[2] for x in (given.query, given.key))
    meaning = masks.Meaning(is_causal=bool(bound.get("is_causal", False)))
    mask = given.mask
    if meaning.is_causal and not fx.equal(queries, keys):
        mask = _upper_left(node, given)
    if mask is not None:
        meaning = masks.classify(mask, queries=queries, keys=keys, at=node)
    return Attention(
        node=node,
        pattern="sdpa",
        query=given.query,
        key=given.key,
        value=given.value,
        is_causal=meaning.is_causal,
        scale=scale,
        mask=meaning.mask,
        max_length=meaning.max_length,
        restore=given.restore,
    )


def _upper_left(node: Node, given: _Operands) -> Node:
    """SDPA's is_causal as a mask [Tq, Tk]: its first query is the first key's token."""
    gm = node.graph.owning_module
    assert gm is not None
    with gm.graph.inserting_before(node):
        shape = [
            size if isinstance(size := fx.value(x).shape[2], int)
            else fx.insert(gm, "size", (x, 2), like=node)
            for x in (given.query, given.key)
        ]  # fmt: skip
        full = fx.insert(gm, "new_ones", (given.query, shape), {"dtype": torch.bool}, like=node)
        return fx.insert(gm, "tril", (full,), like=node)


def _operands(node: Node, query: Any, key: Any, value: Any, mask: Any) -> _Operands:
    named, keyed = _layout(query, "t", "d"), _layout(key, "u", "d")
    scaled = heads.trace(key, keyed, scaling=True, by=node, at=node)
    if scaled[-1].factor != 1.0 or fx.value(query).dim() != 4:
        # A slot's key is the key before any number it was multiplied with: see by_hand.
        of = heads.Operands(
            query=heads.trace(query, named, scaling=True, by=node, at=node),
            key=scaled,
            value=heads.trace(value, _layout(value, "u", "e"), scaling=False, by=node, at=node),
            scores=(*named[:-1], keyed[-2]),
            output=(*named[:-1], _layout(value, "u", "e")[-1]),
            others=(),
            keys=keyed[-2],
            features=named[-1],
            channels=_layout(value, "u", "e")[-1],
        )
        return _arranged(node, of, mask)
    count = fx.value(query).shape[1]
    sources = [grouped_query.before_repeat(x, count) for x in (key, value)]
    if fx.value(sources[0]).shape[:3] == fx.value(sources[1]).shape[:3]:
        key, value = sources  # else only one is a repetition, such as a key rotated after it
    return _Operands(query=query, key=key, value=value, mask=mask)


def _arranged(node: Node, of: heads.Operands, mask: Node | None) -> _Operands:
    gm = node.graph.owning_module
    assert gm is not None
    to = heads.arrange(of)
    with gm.graph.inserting_before(node):
        return _Operands(
            query=to.view(gm, of.query, to.query, like=node),
            key=to.view(gm, of.key, to.key, like=node),
            value=to.view(gm, of.value, to.value, like=node),
            mask=None if mask is None else to.masked(gm, mask, of.scores, like=node),
            factor=of.query[-1].factor * of.key[-1].factor,
            restore=to.restore(of.output),
        )


def _layout(x: Node, tokens: str, features: str) -> axes.Layout:
    """The axes of [.., T, d]; fewer heads of keys (enable_gqa) are not told apart here."""
    sizes = axes.sizes(fx.value(x))
    names = [*(f"n{i}" for i in range(len(sizes) - 2)), tokens, features]
    return tuple(axes.whole(name, size) for name, size in zip(names, sizes, strict=True))
