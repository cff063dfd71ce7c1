"""In a graph that Inductor is about to compile: put what an operator does in the operator's place.

To Inductor the operators of `ops` and `gathered` are opaque, and each call runs Python of ours:
with tens of tensors a call, a step of few tokens takes the GPU less than that takes the host. What
a call does is the platform's attention and a Triton kernel. Here the graph gets both: Inductor
calls the attention itself, and an operator launches the kernel (`launches`), of which all but
addresses is known by then.

Why it is safe: the operator is given every slot that its kernel reads (`slot_table.named`), so
Inductor knows who reads a slot, and how long it must live. What `split.traceable` refuses stays as
it is.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from moda_compile import (  # noqa: F401  (gathered: operators)
    fx,
    gathered,
    launches,
    registration,
    traced,
)

_own = torch.ops.moda_compile
_aten = torch.ops.aten
_LAUNCH = _own.launch.default
_TRACED = torch.ops.higher_order.triton_kernel_wrapper_mutation
_OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch
_PERMUTED = (  # views of all the numbers
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.permute.default,
    _aten.transpose.int,
)
_VIEWS = (
    *_PERMUTED,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.select.int,
    _aten.slice.Tensor,
)
_SAME = (*_PERMUTED, _aten.reshape.default, _aten.t.default, _aten.clone.default)
_PRODUCTS = _aten.mm.default, _aten.addmm.default, _aten.bmm.default
_MADE = (operator.getitem, _aten.as_strided.default, *_PRODUCTS)  # tensors, not expressions
_ALLOCATIONS = (_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_strided.default)


def run(graph: Graph) -> None:
    """Replace the operators that can be traced, in place."""
    nodes = [node for node in graph.nodes if _is_traceable(node)]
    for node in nodes:
        if node.target is _own.depth_gather.default:
            _keep_sums(graph, node)
    with _forgetting_kernels():
        # A slot is read by every layer behind it, and a trace looks at each of its inputs.
        changed = _replace(graph, nodes)
        if not changed:
            for node in nodes:
                changed |= _replace(graph, [node])
    if changed:
        launches.teach_inductor()
        _turn_parts(graph)
        _keep_operands(graph)
        _compile_ahead(graph)
        graph.lint()


def _is_traceable(node: Node) -> bool:
    traceable = _TRACEABLE.get(node.target)
    if traceable is None or not all(map(_plain, node.all_input_nodes)):
        return False
    return traceable(_call_by_name(node))


@contextlib.contextmanager
def _forgetting_kernels() -> Iterator[None]:
    """Take out of PyTorch's table of kernels what traces put there; launches from text need none.

    It keeps all it gets as long as the process lives, and Inductor writes all of it into a
    description of each graph, a fiftieth of a compilation's time.
    """
    table = kernel_side_table
    kernels, arguments = len(table.id_to_kernel), len(table.constant_args)
    try:
        yield
    finally:
        with table.lock:
            made = [table.id_to_kernel[i] for i in range(kernels, len(table.id_to_kernel))]
            # It numbers what it gets by its length: only the last ones may go.
            if all(map(_is_own, made)):
                for kernel in made:
                    del table.id_to_kernel[table.kernel_to_id.pop(kernel)]
                for i in range(arguments, len(table.constant_args)):
                    del table.constant_args[i]


def _is_own(kernel: Any) -> bool:
    while hasattr(kernel, "fn"):  # what PyTorch and Triton wrap around the function
        kernel = kernel.fn
    return str(kernel.__module__).startswith("moda_compile.")


def _plain(node: Node) -> bool:
    """On a GPU, and of numbers: of symbolic sizes a trace would decide what others decide anew."""
    x = traced.value(node)
    numbers = (*x.shape, *x.stride(), x.storage_offset())
    return x.device.type == "cuda" and all(type(n) is int for n in numbers)


def _attention(call: dict[str, Any], *, forward: bool) -> bool:
    from moda_compile.kernels import split

    q, k, mask = call["q"], call["k"], call["mask"]
    lowering = split.lowering_of(
        q,
        k,
        call["is_causal"],
        mask,
        queries=q.shape[2] if forward else None,
        mask_gradient=call.get("mask_gradient", False),
    )
    return split.traceable(lowering, q, call["depth_k"], call["depth_v"])


def _forward(call: dict[str, Any]) -> bool:
    return _attention(call, forward=True)


def _backward(call: dict[str, Any]) -> bool:
    return _attention(call, forward=False)


def _last_backward(call: dict[str, Any]) -> bool:
    """Of the first layer, which reads no slots; a kernel that adds to an accumulator stays one."""
    return not call["depth_k"] and _backward(call)


def _merge(call: dict[str, Any]) -> bool:
    from moda_compile.kernels import split

    q = call["q"]
    return split.traceable(split.merge_lowering_of(q), q, call["depth_k"], call["depth_v"])


def _gather(call: dict[str, Any]) -> bool:
    from moda_compile.kernels import split

    q = call["queries"][0]
    sides = (call["queries"], call["grad_outs"]), (call["lses"], call["deltas"])
    lowering = split.merge_lowering_of(q)
    # The kernel for products of vectors is the one that gathers.
    return all(split.traceable(lowering, q, *side) for side in sides)


_TRACEABLE: dict[Any, Callable[[dict[str, Any]], bool]] = {
    _own.depth_attention.default: _forward,
    _own.depth_attention_backward.default: _last_backward,
    _own.depth_merge.default: _merge,
    _own.depth_attention_query_backward.default: _backward,
    _own.depth_merge_query_backward.default: _merge,
    _own.depth_gather.default: _gather,
}


def _call_by_name(node: Node) -> dict[str, Any]:
    """The operator's arguments, fake tensors for nodes."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found = {x.name: x.default_value for x in schema if x.has_default_value()}
    found |= {x.name: given for x, given in zip(schema, node.args, strict=False)}
    found |= node.kwargs
    return {name: traced.values(x) for name, x in found.items()}


def _replace(graph: Graph, nodes: list[Node]) -> bool:
    """Put the operators' bodies in their places, traced as one; False, and nothing changed, if one
    of them isn't the same.
    """
    if not nodes:
        return False
    inputs = [*dict.fromkeys(x for node in nodes for x in node.all_input_nodes)]
    body = _traced(nodes, inputs)
    for node, results in zip(nodes, _made(body), strict=True):
        if [_form(traced.value(x)) for x in results] != [_form(x) for x in _results(node)]:
            return False
    if any(x.op == "get_attr" for x in body.nodes) or not _record(body):
        return False
    order = {x: place for place, x in enumerate(body.nodes)}
    stands_for = dict(zip(inputs, body.find_nodes(op="placeholder"), strict=True))
    taken = [[stands_for[x] for x in node.all_input_nodes] for node in nodes]
    copies: dict[Node, Node] = {}
    for node, results, placeholders in zip(nodes, _made(body), taken, strict=True):
        # By now what an operator before made is what its body made.
        copies.update(zip(placeholders, node.all_input_nodes, strict=True))
        with graph.inserting_before(node):
            own = {x for y in results for x in fx.upstream(y, copies.__contains__)} - copies.keys()
            for x in sorted(own, key=order.__getitem__):
                copies[x] = graph.node_copy(x, copies.__getitem__)
        _put(graph, node, [copies[x] for x in results])
    for launch in _launches(body):
        _give_addresses(copies[launch])
    return True


def _results(node: Node) -> list[Tensor]:
    found = traced.value(node)
    return [found] if isinstance(found, Tensor) else list(found)


def _made(body: Graph) -> list[list[Node]]:
    """What each of the operators makes."""
    return cast(list[list[Node]], body.output_node().args[0])


def _put(graph: Graph, node: Node, results: list[Node]) -> None:
    """Have results in a call's place."""
    if isinstance(traced.value(node), Tensor):
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(node)


def _traced(nodes: list[Node], inputs: list[Node]) -> Graph:
    """The graph of the operators' functions, of all their inputs; it returns each one's results."""

    def call(*tensors: Tensor) -> list[list[Tensor]]:
        given = dict(zip(inputs, tensors, strict=True))
        made = []
        for node in nodes:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
            results = registration.function(node.target)(*args, **kwargs)
            made.append([results] if isinstance(results, Tensor) else list(results))
        return made

    with traced.value(inputs[0]).fake_mode:
        trace = make_fx(call, decomposition_table=select_decomp_table())
        return trace(*map(traced.value, inputs)).graph


def _record(body: Graph) -> bool:
    """Make launches calls of the operator that returns what they write; False where they write to
    what is not theirs alone.

    A launch writes to what was allocated for it, and nothing else.
    """
    for launch in body.find_nodes(op="call_function", target=_TRACED):
        arguments = _arguments(launch)
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Node)}
        written = {name: x for name, x in tensors.items() if _allocation(x)}
        # Another view of what was allocated would go on showing what it was before.
        viewed = [y for x in written.values() for y in _chain(x)[1:]]
        if any(len(y.users) > 1 for y in viewed) or len({*written.values()}) < len(written):
            return False
        given = [*dict.fromkeys(x for name, x in tensors.items() if name not in written)]
        results = {x: [y for y in x.users if y is not launch] for x in written.values()}
        with body.inserting_before(launch):
            made = traced.call(body, _LAUNCH, given, _text(launch, arguments, given, results))
            returned = [x for x, users in results.items() if users]
            for i, x in enumerate(returned):
                result = traced.call(body, operator.getitem, made, i)
                for user in results[x]:
                    user.replace_input_with(x, result)
        body.erase_node(launch)
    body.eliminate_dead_code()
    return True


def _text(
    launch: Node, arguments: dict[str, Any], given: list[Node], results: dict[Node, list[Node]]
) -> str:
    """What `kernels.recorded` keeps of a traced launch; results: what it writes, and its users."""
    from moda_compile.kernels import recorded

    # PyTorch wraps the options of a launch, such as num_warps, into an autotuner.
    kernel: Any = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])  # type: ignore[arg-type]
    (options,) = kernel.configs
    ((programs, *others),) = cast(list[tuple[int, ...]], launch.kwargs["grid"])
    assert all(n == 1 for n in others)
    numbers = {x: recorded.At(i) for i, x in enumerate((*given, *results))}
    return recorded.record(
        kernel.fn,
        grid=programs,
        arguments={name: numbers[x] if isinstance(x, Node) else x for name, x in arguments.items()},
        given=[traced.value(x).dtype for x in given],
        made=[
            recorded.Made(
                shape=tuple(traced.value(x).shape),
                stride=traced.value(x).stride(),
                dtype=traced.value(x).dtype,
                returned=bool(users),
            )
            for x, users in results.items()
        ],
        options={name: x for name in _OPTIONS if (x := getattr(options, name)) is not None},
    )


def _arguments(launch: Node) -> dict[str, Any]:
    """Of a traced launch, by name."""
    constants = kernel_side_table.get_constant_args(launch.kwargs["constant_args_idx"])  # type: ignore[arg-type]
    return {**constants, **launch.kwargs["kwargs"]}  # type: ignore[dict-item]


def _launches(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=_LAUNCH))


def _allocation(node: Node) -> bool:
    return _chain(node)[-1].target in _ALLOCATIONS


def _chain(node: Node) -> list[Node]:
    """The node and, while it is a view, what it views."""
    chain = [node]
    while _is_view(chain[-1]):
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def _is_view(node: Node) -> bool:
    if node.target is _aten.reshape.default:
        return bool(traced.value(node.all_input_nodes[0]).is_contiguous())
    return node.target in _VIEWS


def _give_addresses(launch: Node) -> None:
    """Hand a launch the tensors whose views it was given, where they begin at the same address.

    Of a tensor it gets no more than the address. Inductor makes a tensor of each view in front of
    each call, and there are tens.
    """
    tensors, text = launch.args
    bases = [
        next(y for y in reversed(_chain(x)) if _offset(y) == _offset(x))
        for x in cast(list[Node], tensors)
    ]
    launch.args = (bases, text)
    # Inductor keeps to their strides.
    launch.meta["eager_input_vals"] = traced.values(launch.args), {}


def _keep_sums(graph: Graph, node: Node) -> None:
    """Have sums with gathered gradients made once, token-major, as both their parts are, where a
    product reads them; what else reads them adds as it reads.

    Left alone, Inductor makes them head-major, or anew for each of their readers, and copies them
    for the product that reads them. `as_strided` is what it makes a tensor for.
    """
    gradients = [made for made in node.users if made.args[1] == 0]
    sides = [side for made in gradients for row in made.users for side in row.users]
    for total in dict.fromkeys(x for side in sides for x in side.users):
        if total.target is not _aten.add.Tensor or total.kwargs or not _multiplied(total):
            continue
        value, parts = traced.value(total), total.all_input_nodes
        alike = len(parts) == 2 and all(traced.value(x).shape == value.shape for x in parts)
        if not alike or not value.transpose(1, 2).is_contiguous():
            continue
        with graph.inserting_before(total):
            turned = [traced.call(graph, _aten.permute.default, x, [0, 2, 1, 3]) for x in parts]
            made = traced.call(graph, _aten.add.Tensor, *turned)
            form = list(value.shape), list(value.stride()), 0
            kept = traced.call(graph, _aten.as_strided.default, made, *form)
        total.replace_all_uses_with(kept)
        graph.erase_node(total)


def _multiplied(node: Node) -> bool:
    """A product reads the tensor itself."""
    return any(
        user.target in _PRODUCTS or (user.target in _SAME and _multiplied(user))
        for user in node.users
    )


def _turn_parts(graph: Graph) -> None:
    """Have what is concatenated and then permuted be concatenated permuted.

    So are gradients of rotated queries and keys, which products read token-major. Left alone,
    Inductor makes some of them head-major, and a copy.
    """
    for cat in graph.find_nodes(op="call_function", target=_aten.cat.default):
        order = _order(cat)
        parts, dim = cast(list[Node], cat.args[0]), cast(int, (*cat.args, 0)[1])
        if order is None or any(traced.value(x).dim() != len(order) for x in parts):
            continue
        with graph.inserting_before(cat):
            turned = [traced.call(graph, _aten.permute.default, x, order) for x in parts]
            made = traced.call(graph, _aten.cat.default, turned, order.index(dim % len(order)))
        for user in list(cat.users):
            user.replace_all_uses_with(made)
            graph.erase_node(user)
        graph.erase_node(cat)


def _order(node: Node) -> list[int] | None:
    """How all users of a tensor permute it; None if they don't, or not alike, or if a launch reads
    what they make, which keeps its strides.
    """
    orders = set()
    for user in node.users:
        if user.target is not _aten.permute.default or any(x.target is _LAUNCH for x in user.users):
            return None
        orders.add(tuple(cast(list[int], user.args[1])))
    return list(orders.pop()) if len(orders) == 1 else None


def _keep_operands(graph: Graph) -> None:
    """Have what launches read be made once.

    Inductor may compute anew, for each of its readers, what is not a buffer yet: a gradient that
    was padded on its way would be written for each of the gathers that read it. See `_keep_sums`.
    """
    for launch in _launches(graph):
        for x in cast(list[Node], launch.args[0]):
            _keep(graph, _chain(x)[-1])


def _compile_ahead(graph: Graph) -> None:
    from moda_compile.kernels import recorded

    for tensors, text in (launch.args for launch in _launches(graph)):
        device = traced.value(cast(list[Node], tensors)[0]).device
        recorded.compile_ahead(cast(str, text), device.index or 0)


def _keep(graph: Graph, node: Node) -> None:
    """Have the node's users read one tensor, if it is none yet."""
    if node.op != "call_function" or node.target in _MADE:
        return
    value = traced.value(node)
    if value.storage_offset() or not value.is_contiguous():
        return
    with graph.inserting_after(node):
        form = list(value.shape), list(value.stride()), 0
        kept = traced.call(graph, _aten.as_strided.default, node, *form)
    node.replace_all_uses_with(kept, lambda user: user is not kept)


def _offset(node: Node) -> int:
    return int(traced.value(node).storage_offset())


def _form(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device
