"""What any row's match owes: checked at once, so that a mistake is told by the name of its row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns.row import Attention, Step


def broken(attention: object, node: Node, name: str) -> str | None:
    """What is wrong with a match; ``None`` if nothing is.

    Args:
        attention: what ``match(node)`` returned.
        node: the node.
        name: of the row.
    """
    if not isinstance(attention, Attention):
        return f"it returned {type(attention).__name__}, expected an Attention or None"
    if attention.node is not node:
        return f"node is {attention.node}, expected the node that was given to match"
    if attention.pattern != name:
        return f"pattern is {attention.pattern!r}, expected the row's name"
    return (
        _operands(attention)
        or _scores(attention)
        or _mask(attention)
        or _sequence(attention)
        or _own(attention)
        or _result(attention)
    )


def _operands(a: Attention) -> str | None:
    for what in ("query", "key", "value"):
        wrong = _tensor(what, getattr(a, what), a.node)
        if wrong is None and fx.value(getattr(a, what)).dim() != 4:
            shape = tuple(fx.value(getattr(a, what)).shape)
            wrong = f"{what} has shape {shape}, expected [B, H, T, d]"
        if wrong is not None:
            return wrong
    q, k, v = (_shape(x) for x in (a.query, a.key, a.value))
    if k[:3] != v[:3]:
        return f"keys {tuple(k)} and values {tuple(v)}, expected [B, Hk, T, d] and [B, Hk, T, dv]"
    if (q[0], q[3]) != (k[0], k[3]) or q[1] == 0 or k[1] == 0 or q[1] % k[1]:
        return (
            f"queries {tuple(q)} over keys {tuple(k)}, expected [B, Hq, T, d] and [B, Hk, T, d] "
            "with Hq a multiple of Hk"
        )
    return None


def _scores(a: Attention) -> str | None:
    if not isinstance(a.is_causal, bool):
        return f"is_causal is {a.is_causal!r}, expected True or False"
    number = isinstance(a.scale, (int, float)) and not isinstance(a.scale, bool)
    if a.scale is not None and not (number and math.isfinite(a.scale)):
        return f"scale is {a.scale!r}, expected a number or None"
    if a.max_length is not None and not isinstance(a.max_length, int):
        return f"max_length is {a.max_length!r}, expected a number or None"
    return None


def _mask(a: Attention) -> str | None:
    if a.mask is None:
        return None
    if a.is_causal:
        return "it has both is_causal and a mask, expected one of them"
    wrong = _tensor("mask", a.mask, a.node)
    if wrong is not None:
        return wrong
    dtype = fx.value(a.mask).dtype
    if dtype != torch.bool and not dtype.is_floating_point:
        return f"mask is {dtype}, expected bool (True attends) or floating (added to the scores)"
    q, k = _shape(a.query), _shape(a.key)
    scores, mask = [q[0], q[1], q[2], k[2]], _shape(a.mask)
    padded = [1] * (4 - len(mask)) + mask
    if len(padded) != 4 or any(m not in (1, s) for m, s in zip(padded, scores, strict=True)):
        return f"mask has shape {tuple(mask)}, expected one that broadcasts to {tuple(scores)}"
    return None


def _sequence(a: Attention) -> str | None:
    if a.sequence is None:
        return None
    if not isinstance(a.sequence, tuple) or len(a.sequence) != 2:
        return f"sequence is {a.sequence!r}, expected the nodes (output, lse) or None"
    if a.mask is not None or a.is_causal:
        return "it has a mask or is_causal beside a sequence, whose own business that is"
    out, lse = a.sequence
    rows = _shape(a.query)[:3]
    for what, x, shape in (("output", out, [*rows, _shape(a.value)[3]]), ("lse", lse, rows)):
        wrong = _tensor(f"sequence's {what}", x, a.node)
        if wrong is None and _shape(x) != shape:
            wrong = f"sequence's {what} has shape {tuple(_shape(x))}, expected {tuple(shape)}"
        if wrong is not None:
            return wrong
    return None


def _own(a: Attention) -> str | None:
    queries = _shape(a.query)[2]
    for what, x, whole in (("own_key", a.own_key, a.key), ("own_value", a.own_value, a.value)):
        if (a.own_key is None) != (a.own_value is None):
            return "it has one of own_key and own_value, expected both or none"
        wrong = None if x is None else _tensor(what, x, a.node)
        batch, heads, _, width = _shape(whole)
        if x is not None and wrong is None and _shape(x) != [batch, heads, queries, width]:
            wrong = f"{what} has shape {tuple(_shape(x))}, expected [B, Hk, Tq, {width}]"
        if wrong is not None:
            return wrong
    return None


def _result(a: Attention) -> str | None:
    """Whether the steps of ``restore`` lead from [B, Hq, T, dv] to what ``node`` yields."""
    if not isinstance(fx.value(a.node), Tensor):
        return "node yields no tensor"
    if not isinstance(a.restore, Sequence) or not all(isinstance(s, Step) for s in a.restore):
        return f"restore is {a.restore!r}, expected a tuple of Steps"
    shape, expected = (*fx.value(a.query).shape[:3], fx.value(a.value).shape[3]), _shape(a.node)
    if a.restore:
        try:
            shape = _replayed(a).shape
        except Exception as error:
            return f"restore can't be applied to [B, Hq, T, dv]: {type(error).__name__}: {error}"
    if [fx.hint(s) for s in shape] != expected:
        got = tuple(fx.hint(s) for s in shape)
        return f"restore leads from [B, Hq, T, dv] to {got}, but node yields {tuple(expected)}"
    return None


def _replayed(a: Attention) -> Tensor:
    query, value = fx.value(a.query), fx.value(a.value)
    with query.fake_mode, torch.no_grad(), fx.autocast_at(a.node):
        x = query.new_empty(*query.shape[:3], value.shape[3], dtype=fx.value(a.node).dtype)
        for step in a.restore:
            args, kwargs = fx.values((step.args, dict(step.kwargs)))
            method = isinstance(step.target, str)
            run: Any = getattr(x, str(step.target)) if method else step.target
            x = run(*args, **kwargs) if method else run(x, *args, **kwargs)
    return x


def _tensor(what: str, x: Any, node: Node) -> str | None:
    if not isinstance(x, Node):
        return f"{what} is {type(x).__name__}, expected a node"
    if x.graph is not node.graph or x._erased:
        return f"{what} is {x}, which is no node of this graph"
    if not fx.is_tensor(x):
        return f"{what} is {x}, which yields no tensor"
    if not x < node:
        return f"{what} is {x}, which is not in front of {node}"
    return None


def _shape(node: Node) -> list[Any]:
    return [fx.hint(s) for s in fx.value(node).shape]
