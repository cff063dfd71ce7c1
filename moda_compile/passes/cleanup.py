"""Take the markers out, and what matches appended in vain.

The model's own dead code (repeated heads, a causal mask) is left to AOTAutograd.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.plan import Plan


def run(gm: GraphModule, plan: Plan) -> None:
    """Remove the marks and recompile. The graph's inputs stay: the caller passes them."""
    for marker in plan.marks:
        marker.replace_all_uses_with(marker.args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(marker)
    fx.drop_unused(gm)
    gm.recompile()
