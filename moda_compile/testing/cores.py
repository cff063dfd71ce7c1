"""Attention written by hand, in the ways that models write it, and near misses of it.

`attend` is one call for the oracle (`ADAPTERS`): every way of writing it computes
softmax(scale q k^T + mask) v.  A near miss computes something else and must never be rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moda_compile.testing.shrink import ShortRepr

NearMiss = Literal[
    "softcap", "sink", "weights", "queries", "sigmoid", "squared", "linear", "normalised"
]
NEAR_MISSES: tuple[NearMiss, ...] = get_args(NearMiss)


@dataclass(frozen=True, kw_only=True, repr=False)
class ByHand(ShortRepr):
    """One way to write attention down; its repr is runnable.

    Attributes:
        product: how both matrix products are written.  `einsum_token` keeps `[B, T, H, d]`; `bmm`
            and `baddbmm` fold B and H; `baddbmm` applies the scale itself.
        scaling: where the scale goes: on the scores, as a division of them, on one side, or its
            square root on both.
        softmax: the functional, the method, or the functional in float32 and back.
        masking: how a bool mask is applied: `masked_fill` of what is hidden, `where`, or turned
            into an additive one.  An additive mask is added.
        hidden: what a hidden score becomes: -inf, the dtype's lowest number, or -1e4.
        dropout: call dropout with p = 0 on the probabilities.
    """

    product: Literal["matmul", "operator", "bmm", "baddbmm", "einsum", "einsum_token"] = "matmul"
    scaling: Literal["scores", "divide", "query", "key", "both"] = "scores"
    softmax: Literal["functional", "method", "float32"] = "functional"
    masking: Literal["masked_fill", "where", "add"] = "masked_fill"
    hidden: Literal["inf", "min", "large"] = "inf"
    dropout: bool = False

    def hides_with(self, dtype: torch.dtype) -> float:
        """The score of what may not be seen."""
        lowest = torch.finfo(dtype).min
        return {"inf": -math.inf, "min": lowest, "large": -1e4}[self.hidden]


def attend(
    how: ByHand,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention `[B, H, T, d]` of query, key and value of that shape, written as `how` says."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if how.product != "baddbmm":
        if how.scaling in ("query", "both"):
            query = query * (scale if how.scaling == "query" else math.sqrt(scale))
        if how.scaling in ("key", "both"):
            key = key * (scale if how.scaling == "key" else math.sqrt(scale))
    scores = _scores(how, query, key, scale)
    if how.product != "baddbmm":
        if how.scaling == "scores":
            scores = scores * scale
        elif how.scaling == "divide":
            scores = scores / (1.0 / scale)
    return _weigh(how, _softmax(how, _masked(how, scores, mask)), value)


def _adapt(
    joint: Callable[..., Tensor],
    how: ByHand,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """For the oracle: what `attend` is asked for, without how it does it."""
    if mask is None:
        return joint(query, key, value, scale=scale)
    if mask.dtype == torch.bool and how.masking == "add":
        mask = _additive(how, mask, query.dtype)

    def masked(scores: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, how.hides_with(scores.dtype))
        return scores + mask

    return joint(query, key, value, scale=scale, score_mod=masked)


#: For `ReferenceMode(functions=...)`.
ADAPTERS: dict[Callable[..., Any], Callable[..., Any]] = {attend: _adapt}


def _scores(how: ByHand, query: Tensor, key: Tensor, scale: float) -> Tensor:
    if how.product == "operator":
        return query @ key.transpose(-2, -1)
    if how.product == "einsum":
        return torch.einsum("bhtd,bhud->bhtu", query, key)
    if how.product == "einsum_token":
        return torch.einsum("bthd,buhd->bhtu", query.transpose(1, 2), key.transpose(1, 2))
    if how.product in ("bmm", "baddbmm"):
        batch, heads, length, head_dim = query.shape
        folded = (batch * heads, length, head_dim)
        query, key = query.reshape(folded), key.reshape(folded)
        if how.product == "bmm":
            scores = torch.bmm(query, key.transpose(1, 2))
        else:
            empty = query.new_empty(batch * heads, length, length)
            scores = torch.baddbmm(empty, query, key.transpose(1, 2), beta=0, alpha=scale)
        return scores.view(batch, heads, length, length)
    return torch.matmul(query, key.transpose(2, 3))


def _additive(how: ByHand, mask: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = torch.full((), how.hides_with(dtype), dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros_like(hidden), hidden)


def _masked(how: ByHand, scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype != torch.bool:
        return scores + mask
    if how.masking == "add":
        return scores + _additive(how, mask, scores.dtype)
    hidden = how.hides_with(scores.dtype)
    if how.masking == "where":
        return torch.where(mask, scores, torch.full_like(scores, hidden))
    return scores.masked_fill(~mask, hidden)


def _softmax(how: ByHand, scores: Tensor) -> Tensor:
    if how.softmax == "method":
        return scores.softmax(-1)
    if how.softmax == "functional":
        return torch.nn.functional.softmax(scores, dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def _weigh(how: ByHand, weights: Tensor, value: Tensor) -> Tensor:
    weights = weights.to(value.dtype)
    if how.dropout:
        weights = torch.nn.functional.dropout(weights, p=0.0, training=True)
    if how.product == "operator":
        return weights @ value
    if how.product == "einsum":
        return torch.einsum("bhtu,bhud->bhtd", weights, value)
    if how.product == "einsum_token":
        out = torch.einsum("bhtu,buhd->bthd", weights, value.transpose(1, 2))
        return out.transpose(1, 2)
    if how.product in ("bmm", "baddbmm"):
        out = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1))
        return out.view(*value.shape)
    return torch.matmul(weights, value)


def near_miss(
    kind: NearMiss,
    how: ByHand,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """What looks like attention and is not softmax(scale q k^T + mask) v.

    Softcapped scores, a sink (a column beside the keys), weights that somebody else reads, softmax
    over the queries, sigmoid, squared weights, linear attention, weights normalised once more.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kind == "linear":  # phi(q) (phi(k)^T v) / (phi(q) sum phi(k)): no mask, by construction
        query, key = torch.softmax(query, dim=-1), torch.softmax(key, dim=-2)
        return query @ (key.transpose(-2, -1) @ value)
    scores = _scores(how, query, key, 1.0) * scale
    if kind == "softcap":
        scores = 5.0 * torch.tanh(scores / 5.0)
    scores = _masked(how, scores, mask)
    if kind == "sigmoid":
        return _weigh(how, torch.sigmoid(scores), value)
    if kind == "queries":
        return _weigh(how, torch.softmax(scores, dim=-2), value)
    if kind == "sink":
        column = scores.new_zeros(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)
        return _weigh(how, weights[..., :-1], value)
    weights = _softmax(how, scores)
    if kind == "squared":
        weights = weights * weights
    if kind == "normalised":
        weights = weights / (weights.sum(dim=-2, keepdim=True) + 1.0)
    out = _weigh(how, weights, value)
    if kind == "weights":
        out = out * (1.0 + weights.amax(dim=-1, keepdim=True))
    return out
