"""What patterns and passes ask of a Dynamo graph: values, places in the user's code, edits."""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node
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


def hint(size: Any) -> Any:
    """A symbolic size's value here, or a shape's: comparing symbols would tie the graph to them."""
    if isinstance(size, torch.Size):
        return torch.Size([hint(s) for s in size])
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def equal(x: Any, y: Any) -> bool:
    """Whether two sizes are equal; symbolic ones that merely agree now are compared, which guards
    on it.
    """
    return bool(hint(x) == hint(y)) and bool(x == y)


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


def values(arguments: Any) -> Any:
    """Arguments of a call, nested as they are, each node in them replaced by its fake result."""
    return map_arg(arguments, value)


def is_parameter(node: Any) -> bool:
    """Whether ``node`` is a parameter of the model, or only a view or cast of parameters."""
    while isinstance(node, Node) and calls(node, *_PARAMETER_VIEWS):
        node = argument(node, 0, "input")
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return False
    if isinstance(value(node), torch.nn.Parameter):
        return True
    # torch.func.functional_call puts plain tensors where a module keeps its parameters.
    source = getattr(getattr(node.meta.get("grapharg"), "source", None), "base", None)
    return getattr(source, "member", None) == "_parameters"


def is_weight(node: Any) -> bool:
    """Whether ``node`` is a parameter, or computed from parameters only (a parametrization).

    So is an input of the graph that a linear layer takes as its weight, Parameter or not. Of a few
    operations at most: what is computed from activations is told by looking upstream.
    """
    todo, seen = [node], 0
    while todo:
        current = todo.pop()
        seen += 1
        if is_parameter(current) or _given_as_weight(current):
            continue
        if seen > _WEIGHT_OPERATIONS or not isinstance(current, Node):
            return False
        if not current.op.startswith("call") or not current.all_input_nodes:
            return False
        todo.extend(current.all_input_nodes)
    return True


_WEIGHT_OPERATIONS = 32


def _given_as_weight(node: Any) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and any(
            calls(user, "linear") and argument(user, 1, "weight") is node for user in node.users
        )
    )


_PARAMETER_VIEWS = ("t", "transpose", "to", "permute", "mT", "T", "narrow", "type", "float",
                    "half", "bfloat16", "double", "type_as")  # fmt: skip


# --- places in the user's code ------------------------------------------------------------------

_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>-?\d+)\]|\['(?P<key>[^']*)'\]")


def module_stack(node: Node) -> tuple[str, ...]:
    """Dotted paths, outermost first, of the modules whose forward made ``node``; the root is "".

    ``("", "model.layers.0", "model.layers.0.self_attn")``, from Dynamo's ``nn_module_stack``.
    """
    stack = [""]
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        dotted = _dotted(path)
        if dotted and dotted != stack[-1]:
            stack.append(dotted)
    return tuple(stack)


@functools.lru_cache(maxsize=1 << 14)  # all the nodes of a module share its path
def _dotted(path: str) -> str:
    steps = _STEP.finditer(re.sub(r"^L\['\w+'\]", "", path))
    dotted = ".".join(next(g for g in s.groups() if g is not None) for s in steps)
    return dotted.replace("__dict__.", "").replace("_modules.", "")


def module_path(node: Node) -> str:
    """Dotted path of the innermost module whose forward made ``node``; the root is ``""``."""
    return module_stack(node)[-1]


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_line(node: Node) -> str | None:
    """``file:line`` of the innermost frame of the user's code that made ``node``.

    Frames of torch itself are skipped. ``None`` if Dynamo recorded no stack.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return own_place(f"{file}:{line}" for file, line in frames)


def own_place(places: Iterable[str]) -> str | None:
    """The last of these ``file:line`` that is not in torch itself."""
    return next((p for p in reversed([*places]) if "/torch/nn/" not in p), None)


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

    A source depends on itself; what is read after a write in place depends on what was written.
    One pass over the graph, whatever the number of sources.
    """
    bit = {source: 1 << i for i, source in enumerate(sources)}
    masks: dict[Node, int] = {}
    owner: dict[Node, Node] = {}  # of the memory that a view shows
    written: dict[Node, int] = {}  # into that memory, so far
    for node in nodes:
        mask = bit.get(node, 0)
        for used in node.all_input_nodes:
            mask |= masks.get(used, 0) | written.get(owner.get(used, used), 0)
        masks[node] = mask
        first = node.args[0] if node.args else None
        if isinstance(first, Node):
            root = owner.get(first, first)
            if writes(node):
                written[root] = written.get(root, 0) | mask
            if is_view(node):
                owner[node] = root
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


_VIEWS = ("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "narrow",
          "select", "expand", "diagonal", "t", "flatten", "unflatten", "chunk", "split", "unbind",
          "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "T", "view_as", "expand_as",
          "tensor_split", "split_with_sizes", "detach", "contiguous", "to", "float",
          "type_as")  # fmt: skip


def is_view(node: Node) -> bool:
    """Whether ``node`` may show its first argument's memory, as ``x.t()`` and ``x.add_(y)`` do.

    ``x[i]`` with a tensor i is a copy.
    """
    if calls(node, "getitem"):
        return not any(map(is_tensor, node.all_input_nodes[1:]))
    if node.target is getattr:  # as Dynamo writes x.mT
        return is_tensor(node)
    return calls(node, *_VIEWS) or (writes(node) and is_tensor(node))


def memory(node: Node) -> Node:
    """The node whose result's memory ``node`` shows, or may show: ``node``, if it is no view."""
    while is_view(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def writes(node: Node) -> bool:
    """Whether ``node`` changes its first argument in place: ``x[i] = y``, ``x.add_(y)``."""
    name = name_of(node)
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op.startswith("call") and (in_place or name in ("setitem", *_IN_PLACE))


def last(graph: Graph) -> Node:
    """The graph's last node, which is its output; what comes before it is all of the graph."""
    return next(iter(reversed(graph.nodes)))  # before torch 2.13 reversed nodes are no iterator


def written_into(nodes: Iterable[Node], *, before: Node) -> list[Node]:
    """Nodes outside of ``nodes`` that write, in place, into a result of theirs or a view of it.

    ``x[i] = y``, ``x.add_(y)`` and ``x[i].fill_(y)``: the dataflow of whatever reads x afterwards,
    up to ``before``, does not show them. Costs what ``nodes`` cost to look at, not the graph.
    """
    by_memory = _writers(before.graph)
    if not by_memory:
        return []
    known = set(nodes)
    memories = {memory(node) for node in known}
    found = [writer for m in memories for writer in by_memory.get(m, ())]
    return sorted(w for w in found if w not in known and w < before)


_WRITERS = "_moda_writers"  # of a graph: see below
_OURS: WeakKeyDictionary[Graph, int] = WeakKeyDictionary()  # how many nodes of a graph are ours


def _writers(graph: Graph) -> dict[Node, list[Node]]:
    """A graph's in-place writers by the memory they write into.

    Found in one pass, and kept on the graph (in a weak table the nodes would keep it alive) for as
    long as it has as many nodes that are not ours: what we insert never writes into the model's.
    """
    size = len(graph.nodes) - _OURS.get(graph, 0)
    known: tuple[int, dict[Node, list[Node]]] | None = graph.__dict__.get(_WRITERS)
    if known is None or known[0] != size:
        found: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            if node.args and isinstance(node.args[0], Node) and writes(node):
                found.setdefault(memory(node.args[0]), []).append(node)
        known = graph.__dict__[_WRITERS] = size, found
    return known[1]


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ior", "iand", "ixor", "ipow", "ifloordiv")


# --- edits --------------------------------------------------------------------------------------


def insert(
    gm: GraphModule,
    target: Callable[..., Any] | str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node,
    instead: tuple[Any, ...] | None = None,
) -> Node:
    """Append a call at the graph's insertion point, with its fake result.

    A string is a method's name. The place in the user's code is taken from ``like``. Without a
    fake result AOTAutograd's cache would not take the graph. ``instead`` are fewer arguments that
    give the same fake result: that of a call with hundreds of tensors takes long.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    node = gm.graph.create_node(op, target, args, kwargs or {})
    _own(node)
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if instead is not None:
        node.args = instead
    annotate(node)
    node.args = args
    return node


def again(gm: GraphModule, node: Node, args: tuple[Any, ...]) -> Node:
    """Append the call ``node`` with other arguments, of which its fake result does not depend.

    For calls that :func:`insert` can't make a fake result of: those that take graphs.
    """
    made = gm.graph.create_node(node.op, node.target, args, dict(node.kwargs))
    made.meta.update(node.meta)
    _own(made)
    return made


def drop_unused(gm: GraphModule) -> None:
    """Erase what :func:`insert` appended and nothing uses, such as views of a match not taken."""
    for node in reversed(gm.graph.nodes):
        if node.meta.get(_MADE) and not node.users:
            gm.graph.erase_node(node)
            _OURS[gm.graph] = _OURS.get(gm.graph, 0) - 1


def _own(node: Node) -> None:
    node.meta[_MADE] = True
    _OURS[node.graph] = _OURS.get(node.graph, 0) + 1


def item(gm: GraphModule, node: Node, index: int) -> Node:
    """``node[index]``, appended at the insertion point."""
    return insert(gm, operator.getitem, (node, index), like=node)


def annotate(node: Node) -> None:
    """Compute the fake result of a call from those of its arguments, if all are known."""
    args, kwargs = arguments(node, lambda n: n.meta.get(VALUE))
    modes = [x.fake_mode for x in tree_leaves((args, kwargs)) if hasattr(x, "fake_mode")]
    if not modes:
        return
    # As Dynamo does: without the Python dispatcher torch 2.11 takes a symbolic size of linear's
    # input for the number that it is now, and compiles anew for every batch.
    with modes[0], enable_python_dispatcher(), torch.no_grad(), autocast_at(node):
        if node.op == "call_method":
            node.meta[VALUE] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            node.meta[VALUE] = node.target(*args, **kwargs)


@contextlib.contextmanager
def autocast_at(node: Node) -> Iterator[None]:
    """The autocast regions of the graph itself that ``node`` is in."""
    find = functools.partial(node.graph.find_nodes, op="call_function")
    closed = {n.args[0] for n in find(target=_exit_autocast) if n < node}
    with contextlib.ExitStack() as regions:
        for enter in find(target=_enter_autocast):
            if enter < node and enter not in closed:
                regions.callback(_exit_autocast, _enter_autocast(*enter.args))
        yield


def copy_nodes(gm: GraphModule, nodes: Iterable[Node], replace: dict[Node, Node]) -> None:
    """Append copies of ``nodes`` (in order); arguments follow ``replace``, which gains the copies.

    Everything that is not replaced (weights, rotation tables) is shared with the original.
    """
    for node in nodes:
        args, kwargs = arguments(node, lambda n: replace.get(n, n))
        replace[node] = insert(gm, node.target, args, kwargs, like=node)
