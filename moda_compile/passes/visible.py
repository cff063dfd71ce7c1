"""In a graph that Inductor is about to compile: look at each mask once, for all layers under it.

A layer that decodes needs to know which keys its mask leaves, and all layers have the same mask.
Left alone each call of `depth_attention` finds that out for itself; here they are given what one
`visible_keys` says. It computes nothing else, so the results' bits stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moda_compile import ops, traced, visible  # noqa: F401  (register the operators)

_ATTENTION = torch.ops.moda_compile.depth_attention.default
_LOOK = torch.ops.moda_compile.visible_keys.default


def run(graph: Graph) -> None:
    """Share what there is to know about masks, in place."""
    looks: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        q, k, _, _, _, _, _, mask, seen = (*node.args, None, None)[:9]
        if not isinstance(mask, Node) or seen is not None or node.kwargs:
            continue
        rows = _rows(*traced.values((q, k, mask)))
        if rows is None:
            continue
        key = (mask, *rows)
        if key not in looks:
            with graph.inserting_before(node):
                looks[key] = traced.call(graph, _LOOK, *key)
        node.args = (*node.args[:8], looks[key])
        if "eager_input_vals" in node.meta:  # what Inductor keeps to the strides of
            node.meta["eager_input_vals"] = traced.values(node.args), {}
    if looks:
        graph.lint()


def _rows(q: Tensor, k: Tensor, mask: Tensor) -> tuple[int, int] | None:
    """The mask's rows that differ; None where no kernel would ask for what they leave."""
    from moda_compile.kernels import MAX_DECODE_QUERIES
    from moda_compile.kernels import visible as kernel

    queries, keys = q.shape[2], k.shape[2]
    few = type(queries) is int and queries <= MAX_DECODE_QUERIES
    if not few or (type(keys) is int and keys <= queries) or mask.device.type != "cuda":
        return None
    rows = kernel.distinct_rows(mask, q.shape[1] // k.shape[1], queries)
    return rows if rows is not None and all(type(n) is int for n in rows) else None
