"""Find every attention of the graph: to be rewritten, refused with a reason, or left alone."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import registry
from moda_compile.patterns.row import LeftAlone, Refused
from moda_compile.plan import Bystander, Plan


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.attentions``, ``plan.refusals`` and ``plan.bystanders``.

    Raises:
        RewriteError: for the first refusal, if the plan is strict.
    """
    for node in list(gm.graph.nodes):
        _match(node, plan)
    for call, inner in fx.subgraphs(gm):
        inside = next((n for n in list(inner.graph.nodes) if _recognised(n)), None)
        if inside is not None:
            region = Refused(
                f"the attention is inside a region of its own ({call.target}), which depth KV "
                "can't cross.",
                "call the block directly instead of through torch.cond, a nested compile region or "
                "the like.",
            )
            plan.refuse(inside, "region", region)


def _match(node: Node, plan: Plan) -> None:
    for pattern in registry.rows():
        try:
            attention = registry.apply(pattern, node)
        except Refused as refused:
            plan.refuse(node, pattern.name, refused)
            return
        except LeftAlone as left:
            plan.bystanders.append(Bystander(node=node, pattern=pattern.name, reason=left.reason))
            return
        if attention is not None:
            plan.attentions.append(attention)
            return


def _recognised(node: Node) -> bool:
    for pattern in registry.rows():
        try:
            if registry.apply(pattern, node) is not None:
                return True
        except Refused:
            return True
        except LeftAlone:
            return False
    return False
