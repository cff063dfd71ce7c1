"""Nodes of graphs that AOTAutograd has traced, as passes over Inductor's graphs read and make them.

`fx` is the same for the graphs that Dynamo made, whose fake results lie elsewhere.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves


def value(node: Node) -> Any:
    """The node's fake result: a tensor, a number, or several."""
    return node.meta["val"]


def values(arguments: Any) -> Any:
    """Arguments of a call, nested as they are, each node in them replaced by its fake result."""
    return map_arg(arguments, value)


def call(graph: Graph, target: Any, *args: Any, like: Node | None = None) -> Node:
    """A new call, with its fake result.

    Args:
        graph: where it is inserted, at the graph's own insertion point.
        target: an operator, or `operator.getitem`. args: of it, at least one node among them.
        like: a node that knows what else the partitioner may ask of this one.
    """
    node = graph.call_function(target, args)
    fakes = values(args)
    if like is not None:
        # Inductor keeps to the strides that an operator's tensors have here.
        node.meta = {**like.meta, "eager_input_vals": (fakes, {})}
    with next(x.fake_mode for x in tree_leaves(fakes) if hasattr(x, "fake_mode")):
        node.meta["val"] = target(*fakes)
    return node
