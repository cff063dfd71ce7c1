"""What must hold of a graph after the rewrite, whatever the model. A failure is a bug of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.errors import MoDAError
from moda_compile.plan import Plan

_READERS = ("moda_compile.attend", "moda_compile.join")


def check(gm: GraphModule, plan: Plan) -> None:
    """Check slot order, one writer per slot, no reader before its writer, shapes and dtypes.

    Raises:
        MoDAError: naming the node and the rule that it breaks.
    """
    gm.graph.lint()  # an argument defined after its use, a node of another graph, ...
    written: dict[Node, list[tuple[Node, Node]]] = {}  # of each stack, by its newest token
    sizes: list[int] = []
    replaced = iter(plan.replaced)
    for node in gm.graph.nodes:
        if fx.calls_op(node, torch.ops.moda_compile.mark):
            _fail(node, "a mark was left in the graph")
        elif fx.calls_op(node, torch.ops.moda_compile.write_slot):
            previous, key, value, index, slots, _ = node.args
            known = previous is None or previous in written
            _require(node, known, "the token does not come from the writer before it")
            chain = [] if previous is None else written.pop(previous)
            sizes += [slots] if previous is None else []
            _require(node, index == len(chain), f"slot {index} is written out of order")
            _require(node, index < slots, f"slot {index} of {slots}")
            chain.append((key, value))
            written[node] = chain
        elif _name(node) in _READERS:
            number = next(replaced, None)
            _require(node, number is not None, f"more than {len(plan.replaced)} attentions")
            assert number is not None
            known = node.args[3] in written
            _require(node, known, "the token does not come from the writer before it")
            chain = written.pop(node.args[3])
            _check_reader(node, chain, plan.reads[number])
            token = next((u for u in node.users if u.args[1] == 1), node)
            written[token] = chain
    _require(None, next(replaced, None) is None, f"not all of {len(plan.replaced)} were replaced")
    planned = [sum(slot.stack == i for slot in plan.slots) for i in range(len(plan.stacks))]
    made = sorted(len(chain) for chain in written.values())
    _require(None, made == sorted(filter(None, planned)), f"{made} slots written, not {planned}")
    _require(None, sorted(sizes) == made, f"accumulators of {sizes} slots, planned {planned}")


def _check_reader(node: Node, written: list[tuple[Node, Node]], planned: int) -> None:
    arguments: Any = node.args
    first, second, third, _, keys, values, *_ = arguments
    reads = list(zip(keys, values, strict=True))
    _require(node, len(reads) == planned, f"reads {len(reads)} slots, planned {planned}")
    in_order = reads == written[: len(reads)]
    _require(node, in_order, "does not read the slots in the order they were written")
    if _name(node) == "moda_compile.join":  # (out, lse, query, ...)
        _require(node, fx.value(first).shape == fx.value(third).shape, "out is not like query")
        _agree(node, third, [*keys, *values])
    else:
        _agree(node, first, [*keys, *values])
        _agree(node, first, [second, third], tokens=False)


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def _agree(node: Node, query: Node, tensors: list[Node], *, tokens: bool = True) -> None:
    """Check tensors against the query; without ``tokens`` they may be of any number of tokens."""
    q = fx.value(query)
    dims = (0, 2, 3) if tokens else (0, 3)
    for tensor in tensors:
        x, k = fx.value(tensor), fx.value(tensors[0])
        _require(node, q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} heads over {k.shape[1]}")
        same = x.shape == k.shape and all(x.shape[i] == q.shape[i] for i in dims)
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
