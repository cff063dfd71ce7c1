"""Attentions that are one call in the graph: recognised, so that they are never missed silently."""

from __future__ import annotations

import torch
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns.row import Attention, Refused

_FIX = {
    "multi_head_attention_forward": "write the block with F.scaled_dot_product_attention.",
    "_native_multi_head_attention": "call .train(), or write the block with "
    "F.scaled_dot_product_attention.",
    "_transformer_encoder_layer_fwd": "call .train(), or write the block with "
    "F.scaled_dot_product_attention.",
    "flex_attention": "use F.scaled_dot_product_attention.",
}


def match(node: Node) -> Attention | None:
    """Refuse by the name of the operation; anything else is no attention."""
    if (
        node.op != "call_function"
        or node.target is torch.nn.functional.scaled_dot_product_attention
    ):
        return None
    name = fx.name_of(node).partition(".")[0]  # an ATen overload's ends in ".default"
    # Also torch.ops.aten's own attentions, and kernels of other packages.
    if name not in _FIX and "attention" not in name and "flash_attn" not in name:
        return None
    fix = _FIX.get(name, "use torch.nn.functional.scaled_dot_product_attention.")
    raise Refused(f"{name} is not rewritten yet: its parts are not in the graph.", fix)
