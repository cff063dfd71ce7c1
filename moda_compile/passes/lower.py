"""Say which kernels each attention will run on, why, and how they want their tensors: the only pass
that knows of kernels in front of AOTAutograd.

The operators choose by the same predicate when they run; this pass only records its answer.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.patterns.row import Attention
from moda_compile.plan import Plan, Rows


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.lowerings`` and ``plan.rows``."""
    from moda_compile import kernels

    replaced = set(plan.replaced)
    wanted: dict[int, int | None] = {}
    for layer, attention in enumerate(plan.attentions):
        if layer not in replaced:
            plan.lowerings.append(("unchanged", "there is no slot to attend to"))
            continue
        query, mask = fx.value(attention.query), fx.value(attention.mask)
        what = {
            "device_type": query.device.type,
            "dtype": fx.value(attention.node).dtype,
            "head_dim": max(_head_dims(attention)),
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
                wanted[layer] = kernels.row_elements(chosen, what["head_dim"])
        plan.lowerings.append((chosen.name, chosen.reason))
    for stack in plan.stacks:
        found = {wanted.get(layer) for layer in stack.members if layer in replaced}
        plan.rows.append(_rows(plan.attentions[stack.members[0]], found))


def _rows(member: Attention, wanted: set[int | None]) -> Rows | None:
    """Of a stack with this member.

    Args:
        member: one of the stack's attentions, which have the same head_dims.
        wanted: the row elements that its lowerings want, if they want any.
    """
    elements = wanted.pop() if len(wanted) == 1 else None
    if elements is not None:
        return Rows(head_dim=elements, token_major=True)
    head_dims = _head_dims(member)
    # The kernels, and a slot of one accumulator, have one head_dim.
    return Rows(head_dim=max(head_dims), token_major=False) if len({*head_dims}) > 1 else None


def _head_dims(attention: Attention) -> tuple[int, int]:
    """Of keys, and so of queries, and of values."""
    key, value = (int(fx.value(x).shape[-1]) for x in (attention.key, attention.value))
    return key, value
