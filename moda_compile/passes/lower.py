"""Say which kernels each attention will run on, and why: the only pass that knows of kernels.

The operators choose by the same predicate when they run; this pass only records its answer.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.plan import Plan


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.lowerings``."""
    from moda_compile import kernels

    for attention in plan.attentions:
        if not plan.slots:
            plan.lowerings.append(("unchanged", "there is no slot to attend to"))
            continue
        query = fx.value(attention.node)
        chosen = kernels.choose(
            device_type=query.device.type, dtype=query.dtype, head_dim=int(query.shape[-1])
        )
        plan.lowerings.append((chosen.name, chosen.reason))
