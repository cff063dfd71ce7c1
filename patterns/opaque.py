"""Attentions whose inside is not in the graph: refused by name, so that none is missed silently."""

from __future__ import annotations

import torch
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import calls
from moda_compile.patterns.row import Attention, Refused

# Other rows' own. Names alone would take them for attentions nobody knows.
_KNOWN = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.nn.functional.multi_head_attention_forward,
    torch.ops.higher_order.flex_attention,
)
# torch.nn's shortcut in evaluation without gradients. A converted model never takes it.
_FAST_PATH = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")


def match(node: Node) -> Attention | None:
    """Refuse by the name of the operation; anything else is no attention."""
    call = calls.first_of(node)
    if call is None or call.target in _KNOWN:
        return None
    name = fx.name_of(call).partition(".")[0]  # an ATen overload's ends in ".default"
    if name in _FAST_PATH:
        raise Refused(
            f"{name} is torch.nn's shortcut in evaluation: its parts are not in the graph.",
            "convert the model with moda_compile.convert, or call "
            "torch.backends.mha.set_fastpath_enabled(False).",
        )
    # torch.ops.aten's own attentions, and kernels of other packages.
    if "attention" not in name and "flash_attn" not in name:
        return None
    raise Refused(
        f"{name} is an attention whose parts are not in the graph.",
        "use torch.nn.functional.scaled_dot_product_attention, or teach the library this call: "
        "moda_compile.register_pattern.",
    )
