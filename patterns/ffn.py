"""Feed-forward networks: linear layers joined by pointwise operations only, one of them nonlinear.

    down( f( up_1(x), up_2(x), ... ) )        x: the FFN's input [B, T, D]

covers the two-layer MLP and the gated ones, with separate or fused gate and up projections. A
residual sum is no FFN: what it adds up does not come from linear layers over one input. An
attention's output projection is none either: what it reads is not pointwise in a linear layer.

A mixture of experts is one FFN. So are several networks over one input whose outputs meet before
the next layer: a shared expert beside the routed ones, experts that all run and are weighed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch.fx import Graph, Node

from moda_compile import fx
from moda_compile.patterns import experts, linear

_NONLINEAR = (
    "gelu", "silu", "relu", "relu6", "sigmoid", "tanh", "softplus", "mish", "hardswish", "elu",
    "selu", "celu", "leaky_relu", "relu_", "silu_", "erf", "square", "logsigmoid", "quick_gelu",
    "hardsigmoid", "softsign", "exp", "pow", "glu",
)  # fmt: skip
_POINTWISE = (
    *_NONLINEAR, "mul", "add", "sub", "truediv", "div", "neg", "mul_", "add_", "clamp",
    "__mul__", "__add__", "__truediv__", "iadd", "imul", *linear.CASTS, *linear.VIEWS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FFN:
    """One feed-forward network.

    Attributes:
        node: its output [B, T, D] (or with leading dimensions flattened).
        input: what its first linear layers, or its router and experts, read [B, T, D].
        path: dotted path of the innermost module that holds all of it.
        weight: a parameter of its first layer, whose dtype and device new ones take.
    """

    node: Node
    input: Node
    path: str
    weight: Node


def find(graph: Graph, attentions: Collection[Node] = ()) -> list[FFN]:
    """All feed-forward networks of ``graph``, in the order of their outputs.

    ``attentions``: as for :func:`experts.find`.
    """
    mixtures = experts.find(graph, attentions)
    inside = {node for mixture in mixtures for node in mixture.parts}
    found = [
        ffn for node in graph.nodes if node not in inside and (ffn := _match(node)) is not None
    ]
    for mixture in mixtures:
        path = _common([fx.module_stack(node) for node in mixture.products])
        found.append(FFN(node=mixture.node, input=mixture.input, path=path, weight=mixture.weight))
    return _merge(sorted(found, key=lambda ffn: ffn.node))


def _match(node: Node) -> FFN | None:
    down = linear.as_linear(node)
    if down is None:
        return None
    ups: list[linear.Linear] = []
    bent = False
    # Nearest first: where there is a reason to give up, it is near, and the residual stream long.
    todo, seen = deque([down.input]), {down.input}
    while todo:
        current = todo.popleft()
        up = linear.as_linear(current)
        if up is not None:
            ups.append(up)
            if experts.hidden_state(up.input) is not experts.hidden_state(ups[0].input):
                return None
        elif fx.calls(current, *_POINTWISE):
            bent = bent or fx.calls(current, *_NONLINEAR)
            todo.extend(n for n in current.all_input_nodes if n not in seen)
            seen.update(current.all_input_nodes)
        elif fx.is_tensor(current) and not fx.is_parameter(current):
            return None
    # The gate of a gated FFN is itself an activation (a * b), so one product of two layers will do.
    if not ups or not (bent or len(ups) > 1):
        return None
    path = _common([fx.module_stack(n) for n in (node, *(up.node for up in ups))])
    source = experts.unflattened(ups[0].input)
    return FFN(node=node, input=source, path=path, weight=ups[0].weight)


def _merge(found: list[FFN]) -> list[FFN]:
    """Networks over one input whose outputs meet become one."""
    groups: dict[Node, list[list[FFN]]] = {}
    for ffn in found:
        beside = groups.setdefault(experts.hidden_state(ffn.input), [])
        group = next((g for g in beside if _meet(g[-1].node, ffn.node)), None)
        if group is None:
            beside.append([ffn])
        else:
            group.append(ffn)
    merged = [_as_one(group) for beside in groups.values() for group in beside]
    return sorted(merged, key=lambda ffn: ffn.node)


def _as_one(group: list[FFN]) -> FFN:
    if len(group) == 1:
        return group[0]
    return FFN(
        node=group[-1].node,
        input=group[0].input,
        path=_common([_levels(ffn.path) for ffn in group]),
        weight=group[0].weight,
    )


def _meet(first: Node, second: Node) -> bool:
    """Whether two outputs come together before a further linear layer reads either.

    An auxiliary head beside an FFN reads the same input, and goes its own way.
    """
    made_from = {first: 1, second: 2}
    node = first
    while node.next.op not in ("root", "output"):
        node = node.next
        mark = made_from.get(node, 0)
        for used in node.all_input_nodes:
            mark |= made_from.get(used, 0)
        if mark == 3:
            return True
        if not mark:
            continue
        if node is not second and linear.as_linear(node) is not None:
            return False
        made_from[node] = mark
        if fx.writes(node):
            memory = fx.memory(node)
            made_from[memory] = made_from.get(memory, 0) | mark
    return False


def _common(stacks: Iterable[tuple[str, ...]]) -> str:
    """The innermost module that all of these places are in."""
    path = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        path = level[0]
    return path


def _levels(path: str) -> tuple[str, ...]:
    names = path.split(".")
    return ("", *(".".join(names[: i + 1]) for i in range(len(names))))
