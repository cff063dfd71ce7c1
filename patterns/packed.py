"""Attention with its projections in one call: ``F.multi_head_attention_forward``.

    q, k, v = in-projections of query, key, value [T, B, E], split into heads [B, H, T, d]
    (softmax(q k^T / sqrt(d) + mask) v, heads side by side) --out-projection--> [T, B, E]

``nn.MultiheadAttention`` and with it ``nn.TransformerEncoder`` end in it. The match spells it out:
in-projection and mask in front of the call, the out-projection as steps behind the attention.
The call may also be asked for the attention's weights; as long as nobody looks at them they are not
missed.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import calls, masks
from moda_compile.patterns.row import Attention, Refused, Step

_CALL = F.multi_head_attention_forward
_SIGNATURE = inspect.signature(_CALL)


def match(node: Node) -> Attention | None:
    """Match the first result of one call. See the row in ``moda_compile.patterns.PATTERNS``."""
    call = calls.first_of(node)
    if call is None or call.target is not _CALL:
        return None
    bound = _SIGNATURE.bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = {n: _constant(x) for n, x in bound.arguments.items()}
    _check(call, given)
    gm = node.graph.owning_module
    assert gm is not None
    with gm.graph.inserting_before(node):
        inputs = [given[name] for name in ("query", "key", "value")]
        sources = [calls.swapped(x) for x in inputs]
        # batch_first: the model swaps batch and time in front of the call and again behind it.
        batch_first = None not in sources and all(calls.swapped(user) for user in node.users)
        query, key, value = (
            _by_head(gm, x, given["num_heads"], batch_first, like=node)
            for x in _project(gm, sources if batch_first else inputs, given, like=node)
        )
        meaning = _mask(gm, given, query, key, at=node)
    project = Step(F.linear, (given["out_proj_weight"], given["out_proj_bias"]))
    beside = Step("flatten", (2,))  # heads side by side again
    restore: tuple[Step, ...] = (Step("permute", (2, 0, 1, 3)), beside, project)
    if batch_first:
        restore = (Step("transpose", (1, 2)), beside, project, Step("transpose", (0, 1)))
    return Attention(
        node=node,
        pattern="packed",
        query=query,
        key=key,
        value=value,
        is_causal=meaning.is_causal,
        max_length=meaning.max_length,
        scale=None,
        mask=meaning.mask,
        restore=restore,
    )


def _constant(x: Any) -> Any:
    """With dynamic shapes numbers of the module's, such as its dropout, can be symbols too."""
    symbol = fx.value(x)
    if isinstance(symbol, torch.SymFloat):
        return float(symbol)
    return int(symbol) if isinstance(symbol, torch.SymInt) else x


def _check(call: Node, given: dict[str, Any]) -> None:
    name = "multi_head_attention_forward"
    if fx.value(given["query"]).dim() != 3:
        raise Refused(
            f"{name} of an unbatched input {tuple(fx.value(given['query']).shape)}.",
            "give the model a batch dimension: x[None], or x[:, None] if not batch_first.",
        )
    if given["training"] and given["dropout_p"] > 0:
        raise Refused(
            f"attention dropout (dropout={given['dropout_p']}) would have to cover sequence and "
            "depth with one mask, which is not supported.",
            "set the dropout of the nn.MultiheadAttention to 0 (layer.self_attn.dropout = 0.0 in a "
            "Transformer layer), or call .eval() before converting.",
        )
    for names, what in (
        (("bias_k", "bias_v"), "learned extra keys and values (add_bias_kv)"),
        (("static_k", "static_v"), "keys and values from elsewhere (static_k, static_v)"),
    ):
        if any(given[n] is not None for n in names):
            raise Refused(
                f"{name} has {what}: they belong to no token.",
                "leave that option out, or leave this attention out with strict=False.",
            )
    if given["add_zero_attn"]:
        raise Refused(
            f"{name} adds a zero key and value (add_zero_attn): they belong to no token.",
            "use add_zero_attn=False, or leave this attention out with strict=False.",
        )
    if calls.others_used(call):
        raise Refused(
            "the attention's weights are used, and with depth KV they would be another matrix.",
            "use need_weights=False, or drop the weights.",
        )


# --- projections --------------------------------------------------------------------------------


def _project(gm: GraphModule, inputs: list[Any], given: dict[str, Any], like: Node) -> list[Node]:
    """Queries, keys and values with their heads side by side, in the inputs' layout."""
    bias = given["in_proj_bias"]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    separate = [given[name] for name in names] if given["use_separate_proj_weight"] else None
    if separate is None and len(set(inputs)) == 1:
        # One linear layer, of which an FFN can find its share again (patterns.projection).
        packed = fx.insert(gm, F.linear, (inputs[0], given["in_proj_weight"], bias), like=like)
        parts = fx.insert(gm, "chunk", (packed, 3, -1), like=like)
        return [fx.item(gm, parts, i) for i in range(3)]
    made = []
    for i, x in enumerate(inputs):
        weight = separate[i] if separate else _third(gm, given["in_proj_weight"], i, like)
        own = None if bias is None else _third(gm, bias, i, like)
        made.append(fx.insert(gm, F.linear, (x, weight, own), like=like))
    return made


def _third(gm: GraphModule, parameter: Node, i: int, like: Node) -> Node:
    """Rows i E .. (i + 1) E of a weight [3 E, D] or a bias [3 E]."""
    width = int(fx.value(parameter).shape[0]) // 3
    return fx.insert(gm, "narrow", (parameter, 0, i * width, width), like=like)


def _by_head(gm: GraphModule, x: Node, heads: int, batch_first: bool, like: Node) -> Node:
    """[B, T, H * d], or [T, B, H * d], as [B, H, T, d]."""
    head_dim = int(fx.value(x).shape[-1]) // heads
    split = fx.insert(gm, "unflatten", (x, -1, (heads, head_dim)), like=like)
    if batch_first:
        return fx.insert(gm, "transpose", (split, 1, 2), like=like)
    return fx.insert(gm, "permute", (split, (1, 2, 0, 3)), like=like)


# --- masks --------------------------------------------------------------------------------------


def _mask(
    gm: GraphModule, given: dict[str, Any], query: Node, key: Node, at: Node
) -> masks.Meaning:
    """Whether the call attends causally; else what it adds to its scores, or keeps of them."""
    attn, padding = given["attn_mask"], given["key_padding_mask"]
    if given["is_causal"] and padding is None and not given["need_weights"]:
        # The one case in which the call does what the hint says, and looks at no mask.
        return masks.Meaning(is_causal=True)
    parts = []
    if attn is not None:
        three = fx.value(attn).dim() == 3  # [B * H, T, S]; else [T, S]
        heads = (attn, 0, (-1, given["num_heads"]))
        parts.append(fx.insert(gm, "unflatten", heads, like=at) if three else attn)
    if padding is not None:  # [B, S]
        index = (slice(None), None, None)
        parts.append(fx.insert(gm, "__getitem__", (padding, index), like=at))
    if not parts:
        return masks.Meaning()
    mask = _joined(gm, parts, fx.value(query).dtype, like=at)
    queries, keys = (fx.value(x).shape[2] for x in (query, key))
    return masks.classify(mask, queries=queries, keys=keys, at=at)


def _joined(gm: GraphModule, parts: list[Node], dtype: torch.dtype, like: Node) -> Node:
    """Masks in which True is masked, or that are added, as one in SDPA's convention."""
    if all(fx.value(part).dtype == torch.bool for part in parts):
        kept = [fx.insert(gm, torch.logical_not, (part,), like=like) for part in parts]
        join: Any = torch.logical_and
    else:
        kept = [_additive(gm, part, dtype, like) for part in parts]
        join = torch.add
    mask = kept[0]
    for other in kept[1:]:
        mask = fx.insert(gm, join, (mask, other), like=like)
    return mask


def _additive(gm: GraphModule, part: Node, dtype: torch.dtype, like: Node) -> Node:
    if fx.value(part).dtype != torch.bool:
        return part
    zeros = fx.insert(gm, torch.zeros_like, (part,), {"dtype": dtype}, like=like)
    return fx.insert(gm, torch.masked_fill, (zeros, part, -math.inf), like=like)
