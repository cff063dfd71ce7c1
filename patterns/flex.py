"""FlexAttention: the sequence part stays the model's own call, and depth is merged into it.

    (o, lse) = flex_attention(q, k, v, score_mod, block_mask, scale)      as the model has it
    joint lse = log(exp(lse) + sum_i exp(z_i)),   out = exp(lse - joint lse) o + depth's share

Any score_mod and block_mask will do, as neither has to be understood: the call's own lse says how
much its softmax weighs against depth (paper arXiv 2603.15619, the joint softmax in two parts). Its
logarithm is to base 2.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import calls
from moda_compile.patterns.row import Attention, Refused

_CALL = torch.ops.higher_order.flex_attention
_SIGNATURE = inspect.signature(type(_CALL).__call__)
_OPTIONS = "kernel_options"
_WANTS_LSE = "OUTPUT_LOGSUMEXP"


def match(node: Node) -> Attention | None:
    """Match the first result of one call. See the row in ``moda_compile.patterns.PATTERNS``."""
    call = calls.first_of(node)
    if call is None or call.target is not _CALL:
        return None
    given = _SIGNATURE.bind(None, *call.args, **call.kwargs).arguments
    _check(call, given)
    gm = node.graph.owning_module
    assert gm is not None
    with gm.graph.inserting_before(node):
        both = _with_lse(gm, call, given)
        out = fx.insert(gm, operator.getitem, (both, 0), like=node)
        base_two = fx.insert(gm, operator.getitem, (both, 1), like=node)
        lse = fx.insert(gm, operator.mul, (base_two, math.log(2)), like=node)
    return Attention(
        node=node,
        pattern="flex",
        query=given["query"],
        key=given["key"],
        value=given["value"],
        is_causal=False,
        scale=float(given["scale"]),
        sequence=(out, lse),
    )


def _check(call: Node, given: dict[str, Any]) -> None:
    if isinstance(given["scale"], Node):
        raise Refused(
            "the scale is a tensor or a symbolic value.", "pass scale= as a Python float, or None."
        )
    if given[_OPTIONS].get("BACKEND") == "FLASH":
        raise Refused(
            "FlexAttention with BACKEND='FLASH': the base of its lse depends on PyTorch's version.",
            "leave BACKEND out of kernel_options.",
        )
    if calls.others_used(call):
        raise Refused(
            "FlexAttention's lse or max_scores is used, and with depth KV it would be another.",
            "leave return_lse and return_aux out.",
        )


def _with_lse(gm: GraphModule, call: Node, given: dict[str, Any]) -> Node:
    """The call, or a copy of it that stores the lse: without gradients PyTorch leaves that out."""
    options = given[_OPTIONS]
    if options.get(_WANTS_LSE):
        return call
    position = list(given).index(_OPTIONS) - 1  # less self
    assert len(call.args) > position
    changed = {**options, _WANTS_LSE: True}
    return fx.again(gm, call, (*call.args[:position], changed, *call.args[position + 1 :]))
