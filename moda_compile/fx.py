"""What patterns and passes ask of a Dynamo graph: values, places in the user's code, edits."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

VALUE = "example_value"  # where Dynamo keeps a node's fake result
_MADE = "moda_made"  # set on the nodes that are ours


def value(node: Any) -> Any:
    """The fake result Dynamo recorded for ``node``; ``None`` if there is none."""
    return node.meta.get(VALUE) if isinstance(node, Node) else None


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is a node that yields one tensor."""
    return isinstance(value(node), Tensor)


def name_of(node: Node) -> str:
    """The operation's bare name: ``"transpose"`` for a method, a function or an overload alike."""
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def calls(node: Any, *names: str) -> bool:
    """Whether ``node`` calls a function or a method of one of these bare names."""
    return (
        isinstance(node, Node)
        and node.op in ("call_function", "call_method")
        and name_of(node) in names
    )


def calls_op(node: Node, op: Any) -> bool:
    """Whether ``node`` calls the registered operator ``op`` (a packet), under either name."""
    return node.target is op or node.target is op.default


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def arguments(node: Node, of: Callable[[Node], Any]) -> tuple[Any, Any]:
    """A call's args and kwargs, each node in them replaced by what ``of`` says."""
    return map_arg((node.args, node.kwargs), of)


def is_parameter(node: Any) -> bool:
    """Whether ``node`` is a parameter of the model, or only a view or cast of parameters."""
    while isinstance(node, Node) and calls(node, "t", "transpose", "to", "permute", "mT", "T"):
        node = argument(node, 0, "input")
    return (
        isinstance(node, Node)
        and node.op in ("placeholder", "get_attr")
        and isinstance(value(node), torch.nn.Parameter)
    )


# --- places in the user's code ------------------------------------------------------------------

_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>-?\d+)\]|\['(?P<key>[^']*)'\]")


def module_stack(node: Node) -> tuple[str, ...]:
    """Dotted paths, outermost first, of the modules whose forward made ``node``; the root is "".

    ``("", "model.layers.0", "model.layers.0.self_attn")``, from Dynamo's ``nn_module_stack``.
    """
    stack = [""]
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        steps = _STEP.finditer(re.sub(r"^L\['\w+'\]", "", path))
        dotted = ".".join(next(g for g in s.groups() if g is not None) for s in steps)
        dotted = dotted.replace("__dict__.", "").replace("_modules.", "")
        if dotted and dotted != stack[-1]:
            stack.append(dotted)
    return tuple(stack)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module whose forward made ``node``; the root is ``""``."""
    return module_stack(node)[-1]


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_line(node: Node) -> str | None:
    """``file:line`` of the innermost frame of the user's code that made ``node``.

    Frames of torch itself are skipped. ``None`` if Dynamo recorded no stack.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if "/torch/nn/" not in file]
    return own[-1] if own else None


# --- dataflow -----------------------------------------------------------------------------------


def subgraphs(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Higher-order calls with each graph they run, e.g. activation checkpoints; also nested."""
    for node in gm.graph.nodes:
        for argument_ in node.all_input_nodes if node.op == "call_function" else ():
            if argument_.op == "get_attr":
                inner = getattr(gm, str(argument_.target), None)
                if isinstance(inner, GraphModule):
                    yield node, inner
                    yield from subgraphs(inner)


def reach(nodes: Iterable[Node], sources: Iterable[Node]) -> dict[Node, int]:
    """For each of ``nodes`` (in order) a bit mask: bit i is set if it depends on source i.

    A source depends on itself. One pass over the graph, whatever the number of sources.
    """
    bit = {source: 1 << i for i, source in enumerate(sources)}
    masks: dict[Node, int] = {}
    for node in nodes:
        mask = bit.get(node, 0)
        for used in node.all_input_nodes:
            mask |= masks.get(used, 0)
        masks[node] = mask
    return masks


def upstream(node: Node, stop: Callable[[Node], bool]) -> list[Node]:
    """Nodes that ``node`` is made from, itself included, not looking behind those that stop."""
    seen: dict[Node, None] = {}
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen[current] = None
        if not stop(current):
            todo.extend(current.all_input_nodes)
    return list(seen)


_VIEWS = ("getitem", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "narrow",
          "select", "expand", "diagonal", "t", "flatten", "unflatten", "chunk", "split",
          "swapaxes", "mT")  # fmt: skip


def written_into(nodes: Iterable[Node], *, before: Node) -> list[Node]:
    """Nodes outside of ``nodes`` that write, in place, into a result of theirs or a view of it.

    ``x[i] = y``, ``x.add_(y)`` and ``x[i].fill_(y)``: the dataflow of whatever reads x afterwards,
    up to ``before``, does not show them.
    """
    known = set(nodes)
    memory = set(known)  # and the views of it
    found = []
    for node in before.graph.nodes:
        if node is before:
            break
        target = node.args[0] if node.args else None
        if node in known or target not in memory:
            continue
        in_place = name_of(node).endswith("_") and not name_of(node).endswith("__")
        if node.op.startswith("call") and (in_place or calls(node, "setitem", *_IN_PLACE)):
            found.append(node)
        elif calls(node, *_VIEWS):
            memory.add(node)
    return found


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ior", "iand", "ixor", "ipow", "ifloordiv")


# --- edits --------------------------------------------------------------------------------------


def insert(
    gm: GraphModule,
    target: Callable[..., Any] | str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node,
) -> Node:
    """Append a call at the graph's insertion point, with its fake result.

    A string is a method's name. The place in the user's code is taken from ``like``. Without a
    fake result AOTAutograd's cache would not take the graph.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    node = gm.graph.create_node(op, target, args, kwargs or {})
    node.meta[_MADE] = True
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    annotate(node)
    return node


def drop_unused(gm: GraphModule) -> None:
    """Erase what :func:`insert` appended and nothing uses, such as views of a match not taken."""
    for node in reversed(gm.graph.nodes):
        if node.meta.get(_MADE) and not node.users:
            gm.graph.erase_node(node)


def item(gm: GraphModule, node: Node, index: int) -> Node:
    """``node[index]``, appended at the insertion point."""
    return insert(gm, operator.getitem, (node, index), like=node)


def annotate(node: Node) -> None:
    """Compute the fake result of a call from those of its arguments, if all are known."""
    args, kwargs = arguments(node, lambda n: n.meta.get(VALUE))
    modes = [x.fake_mode for x in tree_leaves((args, kwargs)) if hasattr(x, "fake_mode")]
    if not modes:
        return
    with modes[0], torch.no_grad():
        if node.op == "call_method":
            node.meta[VALUE] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            node.meta[VALUE] = node.target(*args, **kwargs)


def copy_nodes(gm: GraphModule, nodes: Iterable[Node], replace: dict[Node, Node]) -> None:
    """Append copies of ``nodes`` (in order); arguments follow ``replace``, which gains the copies.

    Everything that is not replaced (weights, rotation tables) is shared with the original.
    """
    for node in nodes:
        args, kwargs = arguments(node, lambda n: replace.get(n, n))
        replace[node] = insert(gm, node.target, args, kwargs, like=node)
