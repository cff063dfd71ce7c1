"""Attention within sequences of different lengths in one row: torch.nn.attention.varlen.

The sequence part is our operator of the same kind, whose lse has a gradient, and depth is merged
into it as into FlexAttention's. A slot belongs to a token, whatever sequence that is of.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import calls, masks
from moda_compile.patterns.row import Attention, LeftAlone, Refused, Step
from moda_compile.varlen import varlen_attention

# One of PyTorch's own, and with its name the only thing here that it does not document: the
# function that people call is traced through.
_NAME = "torch_attn::_varlen_attn"
_UNDERSTOOD = {
    "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale",
    "window_size", "enable_gqa",
}  # fmt: skip


def match(node: Node) -> Attention | None:
    """Match the first result of one call. See the row in ``moda_compile.patterns.PATTERNS``."""
    call = calls.first_of(node)
    schema = None if call is None else _schema(call.target)
    if call is None or schema is None:
        return None
    given = {x.name: x.default_value for x in schema.arguments if x.has_default_value()}
    given |= dict(zip((x.name for x in schema.arguments), call.args, strict=False)) | call.kwargs
    left, right = given.get("window_size") or (-1, -1)
    if given.get("is_causal"):
        right = 0
    q, k, v = (given[name] for name in ("query", "key", "value"))
    _check(call, given, left, right)
    scale = given.get("scale")
    number = None if scale is None else masks.number(scale)
    if scale is not None and number is None:
        raise Refused(
            "the scale is a tensor or a symbolic value.", "pass scale= as a Python float, or None."
        )
    scale = float(int(fx.value(q).shape[-1]) ** -0.5 if number is None else number)
    gm = node.graph.owning_module
    assert gm is not None
    with gm.graph.inserting_before(node):
        args = (q, k, v, given["cu_seq_q"], given["max_q"], left, right, scale)
        both = fx.insert(gm, varlen_attention._opoverload, args, like=node)
        out = fx.insert(gm, operator.getitem, (both, 0), like=node)
        lse = fx.insert(gm, operator.getitem, (both, 1), like=node)
        query, key, value, out = (_batched(gm, x, node) for x in (q, k, v, out))
        lse = fx.insert(gm, "unsqueeze", (lse, 0), like=node)
    return Attention(
        node=node,
        pattern="varlen",
        query=query,
        key=key,
        value=value,
        is_causal=False,
        scale=scale,
        sequence=(out, lse),
        restore=(Step("squeeze", (0,)), Step("transpose", (0, 1))),
    )


def _schema(target: Any) -> Any:
    """The operator's schema, if the target is PyTorch's."""
    packet = getattr(target, "overloadpacket", target)
    if getattr(packet, "_qualified_op_name", None) != _NAME:
        return None
    return packet.default._schema


def _batched(gm: Any, x: Node, like: Node) -> Node:
    """x [T, H, d] as [1, H, T, d]."""
    swapped = fx.insert(gm, "transpose", (x, 0, 1), like=like)
    return fx.insert(gm, "unsqueeze", (swapped, 0), like=like)


def _check(call: Node, given: dict[str, Any], left: Any, right: Any) -> None:
    other = sorted(x for x in given if given[x] is not None and x not in _UNDERSTOOD)
    if other:
        raise Refused(
            f"varlen_attn with {', '.join(other)}: over a KV cache it does not tell which keys "
            "are this call's own.",
            "pass the call's own queries, keys and values, with cu_seq_q and cu_seq_k alone.",
        )
    ends = given["cu_seq_k"]
    if ends is not None and ends is not given["cu_seq_q"]:
        raise LeftAlone("its keys are of other sequences than its queries (cu_seq_q, cu_seq_k).")
    if calls.others_used(call):
        raise Refused(
            "varlen_attn's lse is used, and with depth KV it would be another.",
            "leave return_aux out.",
        )
    if not all(isinstance(x, int) for x in (left, right)):
        raise Refused("the window is not two numbers.", "pass window_size as a tuple of ints.")
    k, v = (fx.value(given[name]) for name in ("key", "value"))
    if k.shape[-1] != v.shape[-1]:
        raise Refused(
            f"varlen_attn with keys of head_dim {k.shape[-1]} and values of {v.shape[-1]}: its "
            "kernels have one.",
            "pad the values with zeros, and cut the output.",
        )
