"""Activation checkpoints: their bodies go into the main graph first, and come out of it last.

Dynamo gives each ``torch.utils.checkpoint`` a graph of its own, but depth KV passes from block to
block. Between :func:`inline` and :func:`outline` there is one flat graph, so that no other pass
knows of regions: a begin and an end that nobody reads stand where a body was, and whatever lies
between them at the end becomes the body again, wherever it came from.

Why it is safe: a flat graph computes what the nested one does, in the same order; and what stands
between two places of an ordered graph can be cut out, with what it reads from in front as its
inputs and what is read behind as its outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import has_side_effect

from moda_compile import fx

_REGION = "moda_region"


@has_side_effect  # nobody reads it, and it must stay
def begin_region(**_options: Any) -> None:
    """Stands in front of a body's first node, with the call's keyword arguments."""


@has_side_effect
def end_region() -> None:
    """Stands behind a body's last node."""


@dataclass(frozen=True, kw_only=True)
class _Region:
    """What is needed to call a body again as it was called.

    Attributes:
        target: the higher-order operator.
        name: of the body among the graph module's attributes.
        body: the body's own meta, such as the context_fn of selective checkpointing.
        attribute, call: meta of the node that fetches the body, and of the call.
    """

    target: Any
    name: str
    body: dict[str, Any]
    attribute: dict[str, Any]
    call: dict[str, Any]


def inline(gm: GraphModule) -> None:
    """Replace every checkpoint, nested ones too, by its body between a begin and an end.

    Other regions (``torch.cond``, nested compiled regions) are left: they do not always run.
    """
    nodes = gm.graph.nodes
    fetched: set[str] = set()
    node = next(iter(nodes))
    while node.op != "output":
        body = _body(gm, node)
        if body is None:
            node = node.next
            continue
        fetched.add(str(node.all_input_nodes[0].target))
        node = _inline(gm, node, body)  # goes on inside: there may be more
    _drop_attributes(gm, fetched)


def outline(gm: GraphModule) -> None:
    """Undo :func:`inline`: what stands between a begin and its end becomes a body again."""
    fetched: set[str] = set()
    open_: list[tuple[Node, list[Node]]] = []
    for node in list(gm.graph.nodes):
        if node.target is begin_region:
            open_.append((node, []))
        elif node.target is end_region:
            begin, inside = open_.pop()
            fetched |= {str(n.target) for n in inside if n.op == "get_attr"}
            made = _outline(gm, begin, node, inside)
            if open_:
                open_[-1][1].extend(made)
        elif open_:
            open_[-1][1].append(node)
    _drop_attributes(gm, fetched)
    gm.graph.lint()
    gm.recompile()


def _body(gm: GraphModule, node: Node) -> GraphModule | None:
    """The body of a checkpoint that can be inlined."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    fetch = node.args[0]
    body = getattr(gm, str(fetch.target), None) if isinstance(fetch, Node) else None
    if not isinstance(body, GraphModule):
        return None
    results = _results(body)
    taken = all(
        user.target is operator.getitem
        and isinstance(user.args[1], int)
        and user.args[1] < len(results)
        and isinstance(results[user.args[1]], Node)
        for user in node.users
    )
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    return body if taken and len(inputs) == len(node.args) - 1 else None


def _results(body: GraphModule) -> tuple[Any, ...]:
    results = fx.last(body.graph).args[0]
    return tuple(results) if isinstance(results, (tuple, list)) else ()


def _inline(gm: GraphModule, call: Node, body: GraphModule) -> Node:
    """Put ``body`` in the place of ``call``; returns the begin."""
    fetch = call.args[0]
    assert isinstance(fetch, Node)
    replace: dict[Node, Any] = {}
    inputs = iter(call.args[1:])
    with gm.graph.inserting_before(call):
        begin = gm.graph.call_function(begin_region, (), dict(call.kwargs))
        begin.meta[_REGION] = _Region(
            target=call.target,
            name=str(fetch.target),
            body=dict(body.meta),
            attribute=dict(fetch.meta),
            call=dict(call.meta),
        )
        for node in body.graph.nodes:
            if node.op == "placeholder":
                replace[node] = next(inputs)
            elif node.op != "output":
                replace[node] = gm.graph.node_copy(node, replace.__getitem__)
                if node.op == "get_attr":
                    attribute = operator.attrgetter(str(node.target))(body)
                    replace[node].target = _add_attribute(gm, str(node.target), attribute)
        gm.graph.call_function(end_region)
    results = _results(body)
    for user in list(call.users):
        user.replace_all_uses_with(replace[results[user.args[1]]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not fetch.users:
        gm.graph.erase_node(fetch)
    return begin


def _outline(gm: GraphModule, begin: Node, end: Node, inside: list[Node]) -> list[Node]:
    """Move ``inside`` into a body; returns the nodes that stand for it."""
    region: _Region = begin.meta[_REGION]
    members = set(inside)
    used = dict.fromkeys(x for n in inside for x in n.all_input_nodes if x not in members)
    graph, replace = Graph(), {}
    # A body can be no argument of another.
    bodies = [x for x in used if x.op == "get_attr" and not fx.is_tensor(x)]
    inputs = [x for x in used if x not in bodies]
    for x in inputs:
        replace[x] = graph.placeholder(x.name)
        replace[x].meta = dict(x.meta)
    for node in [*bodies, *inside]:
        replace[node] = graph.node_copy(node, replace.__getitem__)
    results = [n for n in inside if any(user not in members for user in n.users)]
    graph.output(tuple(replace[n] for n in results))
    body = GraphModule(gm, graph)  # takes along the attributes that it reads
    body.meta = dict(region.body)
    name = _add_attribute(gm, region.name, body)
    with gm.graph.inserting_before(end):
        fetch = gm.graph.get_attr(name)
        fetch.meta = dict(region.attribute)
        call = gm.graph.call_function(region.target, (fetch, *inputs), dict(begin.kwargs))
        call.meta = {**region.call, fx.VALUE: tuple(fx.value(n) for n in results)}
        made = [fetch, call]
        for i, node in enumerate(results):
            item = gm.graph.call_function(operator.getitem, (call, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in members)
            made.append(item)
    for node in (*reversed(inside), end, begin):
        gm.graph.erase_node(node)
    return made


def _add_attribute(gm: GraphModule, wanted: str, value: Any) -> str:
    """Give ``gm`` an attribute of that name, or of one like it; returns the name."""
    stem = wanted.replace(".", "_")
    name, number = stem, 0
    while hasattr(gm, name):
        number += 1
        name = f"{stem}_{number}"
    setattr(gm, name, value)
    return name


def _drop_attributes(gm: GraphModule, names: Iterable[str]) -> None:
    """Delete those of the attributes that no node fetches any more."""
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in set(names) - used:
        if "." not in name:
            delattr(gm, name)
