"""A plan as a report."""

from __future__ import annotations

from typing import Any

import torch

from moda_compile import cost, fx, ops
from moda_compile.plan import Plan, Refusal
from moda_compile.report import AttentionReport, Report


def summarize(plan: Plan) -> Report:
    """Describe every attention of ``plan`` and the conversion's cost."""
    return Report(
        config=plan.config,
        attentions=tuple(_attention(plan, layer) for layer in range(len(plan.attentions))),
        refusals=tuple(_refusal(r) for r in plan.refusals),
        costs=_costs(plan) if plan.slots else (),
    )


def _costs(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """(name, formula, value for the plan's shapes) of one training step's extra cost."""
    first = plan.attentions[0]
    query, key = fx.value(first.query), fx.value(first.key)
    dtype = fx.value(first.node).dtype
    batch, kv_heads, length, head_dim = (int(n) for n in key.shape)
    projected = next((slot.ffn for slot in plan.slots if slot.ffn is not None), None)
    formulas = cost.model_cost(plan.config.ffn_kv)
    values = formulas.evaluate(
        B=batch,
        T=length,
        L=len(plan.attentions),
        Hk=kv_heads,
        G=int(query.shape[1]) // kv_heads,
        d=head_dim,
        D=int(fx.value(projected.input).shape[-1]) if projected is not None else 0,
        element=_bytes(dtype),
        accumulator=_bytes(ops.accumulator_dtype(dtype, plan.config.accumulator_dtype)),
    )
    rows = (
        ("new parameters", "parameters", ""),
        ("depth FLOPs, forward", "depth_flops_forward", "FLOP"),
        ("depth FLOPs, backward", "depth_flops_backward", "FLOP"),
        ("projection FLOPs, forward", "projection_flops_forward", "FLOP"),
        ("projection FLOPs, backward", "projection_flops_backward", "FLOP"),
        ("depth bytes read, forward", "bytes_read_forward", "B"),
        ("depth bytes read, backward", "bytes_read_backward", "B"),
        ("depth bytes written, backward", "bytes_written_backward", "B"),
        ("saved for backward (FFN slots)", "saved_bytes", "B"),
        ("gradient accumulator", "accumulator_bytes", "B"),
    )
    return tuple(
        (name, str(getattr(formulas, field)), _quantity(getattr(values, field), unit))
        for name, field, unit in rows
    )


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _quantity(number: Any, unit: str) -> str:
    """``1234567`` as ``"1.23 M"``; powers of 1000."""
    size = float(number)
    for prefix in ("", "K", "M", "G", "T"):
        if size < 1000 or prefix == "T":
            break
        size /= 1000
    digits = f"{size:.3g}" if prefix else f"{int(size)}"
    return f"{digits} {prefix}{unit}".rstrip()


def _attention(plan: Plan, layer: int) -> AttentionReport:
    attention = plan.attentions[layer]
    query, key = fx.value(attention.query), fx.value(attention.key)
    lowering, reason = plan.lowerings[layer] if plan.lowerings else ("", "")
    return AttentionReport(
        block=fx.module_path(attention.node),
        source=fx.source_line(attention.node),
        pattern=attention.pattern,
        heads=int(query.shape[1]),
        kv_heads=int(key.shape[1]),
        head_dim=int(query.shape[3]),
        causal=attention.is_causal,
        reads=tuple(range(plan.reads[layer])) if plan.reads else (),
        writes=tuple(s.index for s in plan.slots if s.layer == layer),
        lowering=lowering,
        reason=reason,
    )


def _refusal(refusal: Refusal) -> AttentionReport:
    return AttentionReport(
        block=fx.module_path(refusal.node),
        source=fx.source_line(refusal.node),
        pattern=refusal.pattern,
        refusal=f"{refusal.reason} To fix: {refusal.fix}",
    )
