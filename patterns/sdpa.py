"""Attention through ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import grouped_query, linear, masks
from moda_compile.patterns.row import Attention, Refused

_SDPA = torch.nn.functional.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def match(node: Node) -> Attention | None:
    """Match one call. See the row in :data:`moda_compile.patterns.PATTERNS`."""
    if node.op != "call_function" or node.target is not _SDPA:
        return None
    bound: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (bound[name] for name in _NAMES[:3])
    if bound.get("dropout_p", 0.0) != 0.0:
        raise Refused(
            f"attention dropout (dropout_p={bound['dropout_p']}) would have to cover sequence and "
            "depth with one mask, which is not supported.",
            "set the attention's dropout to 0, or call .eval() before converting.",
        )
    _check_self_attention(query, key, value)
    heads = fx.value(query).shape[1]
    sources = [grouped_query.before_repeat(x, heads) for x in (key, value)]
    if fx.value(sources[0]).shape == fx.value(sources[1]).shape:
        key, value = sources  # else only one is a repetition, such as a key rotated after it
    causal = masks.Causality(is_causal=bool(bound.get("is_causal", False)), max_length=None)
    if bound.get("attn_mask") is not None:
        causal = masks.classify(bound["attn_mask"], length=fx.value(query).shape[2], at=node)
    scale = bound.get("scale")
    if isinstance(scale, Node):
        raise Refused(
            "the scale is a tensor or a symbolic value.", "pass scale= as a Python float, or None."
        )
    return Attention(
        node=node,
        pattern="sdpa",
        query=query,
        key=key,
        value=value,
        is_causal=causal.is_causal,
        scale=scale,
        max_length=causal.max_length,
    )


def _check_self_attention(query: Node, key: Node, value: Node) -> None:
    q, k, v = (fx.value(x) for x in (query, key, value))
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise Refused(
            f"queries of shape {tuple(q.shape)}: expected [B, H, T, d].",
            "give the attention a batch and a head dimension.",
        )
    if k.shape[-1] != v.shape[-1]:
        raise Refused(
            f"keys have head_dim {k.shape[-1]}, values {v.shape[-1]}: depth slots need one.",
            "use one head_dim for keys and values.",
        )
    roots = [linear.sources(x) for x in (query, key, value)]
    if len(set(map(tuple, roots))) != 1 or not roots[0]:
        raise Refused(
            "queries, keys and values are not projections of one hidden state: this is "
            "cross-attention, or attention over a cache. Depth KV belongs to a token.",
            "leave it out with strict=False; with a KV cache, pass use_cache=False.",
        )
    if k.shape[2] != q.shape[2]:
        raise Refused(
            f"{q.shape[2]} queries over {k.shape[2]} keys: a KV cache is not supported yet.",
            "run without a cache (transformers: use_cache=False).",
        )
