"""What must hold of a graph after the rewrite, whatever the model. A failure is a bug of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.errors import MoDAError
from moda_compile.plan import Plan


def check(gm: GraphModule, plan: Plan) -> None:
    """Check slot order, one writer per slot, no reader before its writer, shapes and dtypes.

    Raises:
        MoDAError: naming the node and the rule that it breaks.
    """
    gm.graph.lint()  # an argument defined after its use, a node of another graph, ...
    written: list[tuple[Node, Node]] = []
    token: Node | None = None
    readers = 0
    for node in gm.graph.nodes:
        if fx.calls_op(node, torch.ops.moda_compile.mark):
            _fail(node, "a mark was left in the graph")
        elif fx.calls_op(node, torch.ops.moda_compile.write_slot):
            previous, key, value, index, slots, _ = node.args
            _require(node, index == len(written), f"slot {index} is written out of order")
            _require(node, slots == len(plan.slots), f"{slots} slots, planned {len(plan.slots)}")
            _require(node, previous is token, "the token does not come from the writer before it")
            written.append((key, value))
            token = node
        elif fx.calls_op(node, torch.ops.moda_compile.attend):
            query, key, value, previous, keys, values, _, _ = node.args
            reads = len(keys)
            planned = plan.reads[readers]
            _require(node, reads == planned, f"reads {reads} slots, planned {planned}")
            _require(
                node,
                list(zip(keys, values, strict=True)) == written[:reads],
                "does not read the slots in the order they were written",
            )
            _require(node, previous is token, "the token does not come from the writer before it")
            _agree(node, query, [key, value, *keys, *values])
            token = next((u for u in node.users if u.args[1] == 1), None)
            readers += 1
    expected = len(plan.attentions) if plan.slots else 0
    _require(None, readers == expected, f"{readers} attentions rewritten, planned {expected}")
    _require(None, len(written) == len(plan.slots), f"{len(written)} slots written")


def _agree(node: Node, query: Node, tensors: list[Node]) -> None:
    q, k = fx.value(query), fx.value(tensors[0])
    _require(node, q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} heads over {k.shape[1]}")
    for tensor in tensors:
        x = fx.value(tensor)
        same = x.shape == k.shape and (x.shape[0], *x.shape[2:]) == (q.shape[0], *q.shape[2:])
        _require(node, same and x.dtype == q.dtype, f"{tensor} is {tuple(x.shape)} {x.dtype}")
    out = fx.value(node)[0]
    _require(node, out.shape == q.shape and out.dtype == q.dtype, f"yields {tuple(out.shape)}")


def _require(node: Node | None, holds: bool, message: str) -> None:
    if not holds:
        _fail(node, message)


def _fail(node: Any, message: str) -> None:
    raise MoDAError(
        f"internal error after the rewrite, at {node}: {message}. Please report it, with the "
        "model and moda_compile.explain(model, ...)."
    )
