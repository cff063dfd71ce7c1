"""Find every attention of the graph: to be rewritten, or refused with a reason."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import PATTERNS
from moda_compile.patterns.row import Attention, LeftAlone, Refused
from moda_compile.plan import Plan


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.attentions`` and ``plan.refusals``.

    Raises:
        RewriteError: for the first refusal, if the plan is strict.
    """
    for node in list(gm.graph.nodes):
        _match(node, plan)
    for call, inner in fx.subgraphs(gm):
        attention_inside = next((n for n in inner.graph.nodes if _recognised(n)), None)
        if attention_inside is not None:
            inside = Refused(
                f"the attention is inside a region of its own ({call.target}), such as an "
                "activation checkpoint, which depth KV can't cross yet.",
                "switch activation checkpointing off (transformers: "
                "model.gradient_checkpointing_disable()).",
            )
            plan.refuse(attention_inside, "region", inside)
    _one_shape(plan)
    for attention in plan.attentions:
        length = fx.value(attention.query).shape[2]
        if isinstance(length, torch.SymInt) and attention.max_length is not None:
            # Comparing a symbolic length installs a guard: beyond it, the graph is traced anew.
            assert length <= attention.max_length


def _match(node: Node, plan: Plan) -> None:
    for pattern in PATTERNS:
        try:
            attention = pattern.match(node)
        except Refused as refused:
            plan.refuse(node, pattern.name, refused)
            return
        except LeftAlone:
            return
        if attention is not None:
            plan.attentions.append(attention)
            return


def _recognised(node: Node) -> bool:
    for pattern in PATTERNS:
        try:
            if pattern.match(node) is not None:
                return True
        except Refused:
            return True
    return False


def _one_shape(plan: Plan) -> None:
    """Slots are read by every later layer, so all keys must have one shape and dtype."""
    kept: list[Attention] = []
    for attention in plan.attentions:
        first, own = (fx.value(a.key) for a in ((kept or [attention])[0], attention))
        if own.shape == first.shape and fx.value(attention.node).device == own.device:
            kept.append(attention)
            continue
        mixed = Refused(
            f"its keys [B, Hk, T, d] are {tuple(own.shape)}, but the first attention's are "
            f"{tuple(first.shape)}: layers can share depth slots only if their KV agree.",
            "give all layers the same number of KV heads, head_dim and length.",
        )
        plan.refuse(attention.node, attention.pattern, mixed)
    plan.attentions = kept
