"""Say which kernels each attention will run on, why, and how they want their tensors: the only pass
that knows of kernels in front of AOTAutograd.

The operators choose by the same predicate when they run; this pass only records its answer.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.plan import Plan


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.lowerings`` and ``plan.widths``."""
    from moda_compile import kernels

    replaced = set(plan.replaced)
    widths: dict[int, int | None] = {}
    for layer, attention in enumerate(plan.attentions):
        if layer not in replaced:
            plan.lowerings.append(("unchanged", "there is no slot to attend to"))
            continue
        query, mask = fx.value(attention.query), fx.value(attention.mask)
        what = {
            "device_type": query.device.type,
            "dtype": fx.value(attention.node).dtype,
            "head_dim": int(query.shape[-1]),
        }
        if attention.sequence is not None:
            chosen = kernels.choose_merge(**what)
        else:
            learned = mask is not None and mask.requires_grad
            lengths = [x.shape[-2] for x in (query, fx.value(attention.key))]
            queries, keys = (n if type(n) is int else None for n in lengths)
            chosen = kernels.choose(
                **what,
                queries=queries,
                tokens=keys,
                masked=mask is not None,
                additive=mask is not None and mask.dtype != torch.bool,
                mask_gradient=learned,
            )
            # A KV cache, of which the query's tokens are a part, would be copied as a whole.
            if attention.own_key is None and fx.hint(lengths[0]) == fx.hint(lengths[1]):
                widths[layer] = kernels.row_elements(chosen, what["head_dim"])
        plan.lowerings.append((chosen.name, chosen.reason))
    for stack in plan.stacks:
        found = {widths.get(layer) for layer in stack.members if layer in replaced}
        plan.widths.append(found.pop() if len(found) == 1 else None)
