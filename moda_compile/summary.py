"""A plan as a report."""

from __future__ import annotations

from typing import Any

import torch

from moda_compile import cost, fx, ops
from moda_compile.plan import Bystander, Plan, Refusal
from moda_compile.report import AttentionReport, Report


def summarize(plan: Plan) -> Report:
    """Describe every attention of ``plan`` and the conversion's cost."""
    return Report(
        config=plan.config,
        attentions=_attentions(plan),
        refusals=tuple(_refusal(r) for r in plan.refusals),
        bystanders=tuple(_bystander(b) for b in plan.bystanders),
        costs=_costs(plan) if plan.slots else (),
    )


def _costs(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """(name, formula, value for the plan's shapes) of one training step's extra cost.

    The value is the sum over the stacks, each with L, Hk, d ... of its own.
    """
    formulas = cost.model_cost(plan.config.ffn_kv)
    sizes = [_sizes(plan, number) for number in sorted({s.stack for s in plan.slots})]
    values = [formulas.evaluate(**own) for own in sizes]
    if all(own["dv"] == own["d"] for own in sizes):
        formulas = formulas.evaluate(dv=cost.HEAD_DIM)
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
        (
            name,
            str(getattr(formulas, field)),
            _quantity(sum(getattr(v, field) for v in values), unit),
        )
        for name, field, unit in rows
    )


def _sizes(plan: Plan, number: int) -> dict[str, int]:
    """The symbols' values for one stack."""
    members = plan.stacks[number].members
    first = plan.attentions[members[0]]
    query, key = fx.value(first.query), fx.value(first.slot_key)
    dtype = fx.value(first.node).dtype
    batch, kv_heads, length, head_dim = (int(n) for n in key.shape)
    ffn = next((s.ffn for s in plan.slots if s.ffn is not None and s.stack == number), None)
    return {
        "B": batch,
        "T": length,
        "L": len(members),
        "Hk": kv_heads,
        "G": int(query.shape[1]) // kv_heads,
        "d": head_dim,
        "dv": int(fx.value(first.slot_value).shape[3]),
        "D": int(fx.value(ffn.input).shape[-1]) if ffn is not None else 0,
        "element": _bytes(dtype),
        "accumulator": _bytes(ops.accumulator_dtype(dtype, plan.config.accumulator_dtype)),
    }


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


def _attentions(plan: Plan) -> tuple[AttentionReport, ...]:
    stack_of = {layer: n for n, stack in enumerate(plan.stacks) for layer in stack.members}
    writes: dict[int, list[int]] = {}
    for slot in plan.slots:
        writes.setdefault(slot.layer, []).append(slot.index)
    reports = []
    for layer, attention in enumerate(plan.attentions):
        query, key = fx.value(attention.query), fx.value(attention.key)
        lowering, reason = plan.lowerings[layer] if plan.lowerings else ("", "")
        reports.append(
            AttentionReport(
                block=fx.module_path(attention.node),
                source=fx.source_line(attention.node),
                pattern=attention.pattern,
                heads=int(query.shape[1]),
                kv_heads=int(key.shape[1]),
                head_dim=int(query.shape[3]),
                value_dim=int(fx.value(attention.value).shape[3]),
                causal=attention.is_causal,
                masked=attention.mask is not None or attention.sequence is not None,
                stack=stack_of.get(layer),
                reads=tuple(range(plan.reads[layer])) if plan.reads else (),
                writes=tuple(writes.get(layer, ())),
                lowering=lowering,
                reason=reason,
            )
        )
    return tuple(reports)


def _bystander(bystander: Bystander) -> AttentionReport:
    return AttentionReport(
        block=fx.module_path(bystander.node),
        source=fx.source_line(bystander.node),
        pattern=bystander.pattern,
        reason=bystander.reason,
    )


def _refusal(refusal: Refusal) -> AttentionReport:
    return AttentionReport(
        block=fx.module_path(refusal.node),
        source=fx.source_line(refusal.node),
        pattern=refusal.pattern,
        refusal=f"{refusal.reason} To fix: {refusal.fix}",
    )
