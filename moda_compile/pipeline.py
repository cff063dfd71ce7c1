"""The passes in order. ``analyse`` only looks; ``rewrite`` looks and then changes the graph."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from moda_compile import fx, markers, verify
from moda_compile.config import MoDAConfig
from moda_compile.errors import RewriteError
from moda_compile.passes import (
    cleanup,
    detect,
    lower,
    regions,
    rewrite,
    sort_out,
    thread_depth,
)
from moda_compile.plan import Plan

ANALYSE = (detect.run, sort_out.run, thread_depth.run, lower.run)
TRANSFORM = (rewrite.run, cleanup.run)


def analyse(gm: GraphModule, config: MoDAConfig, *, strict: bool) -> Plan:
    """What a rewrite of ``gm`` would do. Marks in the graph override config and strict.

    Leaves the bodies of activation checkpoints in the main graph, which computes the same.

    Raises:
        RewriteError: for what can't be rewritten.
    """
    regions.inline(gm)
    marks = [n for n in gm.graph.nodes if fx.calls_op(n, torch.ops.moda_compile.mark)]
    specs = [markers.spec_of(m.args) for m in marks]
    if specs:
        config, strict = specs[0].config, specs[0].strict
    plan = Plan(config=config, strict=strict, marks=marks)
    for run in ANALYSE:
        run(gm, plan)
    if specs:
        check_whole(plan, specs[0].attentions)
    return plan


def check_whole(plan: Plan, expected: int) -> None:
    """Raise unless the graph holds the whole stack.

    Raises:
        RewriteError: naming the block after which the stack was cut.
    """
    found = len(plan.attentions)
    if found == expected:
        return
    known = [a.node for a in plan.attentions] or plan.marks
    last = known[-1] if known else None
    # Behind a graph break a graph's module paths are relative; a mark knows its block's.
    block = fx.module_path(last) if last is not None else None
    if plan.marks:
        block = markers.spec_of(plan.marks[-1].args).block
    raise RewriteError(
        f"this graph holds {found} attentions of a converted model's {expected}, so depth KV "
        "can't pass through: a graph break between two layers (or DDP's graph splitting, or a "
        "region compiled apart) has cut the stack behind this block.",
        fix="find the break with torch._dynamo.explain(model)(*inputs) or fullgraph=True and "
        "remove it (a branch on a tensor, such as layer drop, is one); with DDP, wrap DDP around "
        "the converted model.",
        block=block,
        source=fx.source_line(last) if last is not None else None,
    )


def transform(gm: GraphModule, config: MoDAConfig, *, strict: bool) -> Plan:
    """Rewrite ``gm`` in place. A pure function of the graph and the options.

    Raises:
        RewriteError: for what can't be rewritten; the graph must then not be used.
    """
    plan = analyse(gm, config, strict=strict)
    for run in TRANSFORM:
        run(gm, plan)
    verify.check(gm, plan)
    regions.outline(gm)
    return plan
