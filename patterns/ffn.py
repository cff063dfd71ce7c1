"""Feed-forward networks: linear layers joined by pointwise operations only, one of them nonlinear.

    down( f( up_1(x), up_2(x), ... ) )        x: the FFN's input [B, T, D]

covers the two-layer MLP and the gated ones, with separate or fused gate and up projections. A
residual sum is no FFN: what it adds up does not come from linear layers over one input. An
attention's output projection is none either: what it reads is not pointwise in a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from moda_compile import fx
from moda_compile.patterns import linear

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
        input: what its first linear layers read [B, T, D].
        path: dotted path of the innermost module that holds all its linear layers.
        up: the first of its linear layers that read ``input``.
    """

    node: Node
    input: Node
    path: str
    up: Node


def find(graph: Graph) -> list[FFN]:
    """All feed-forward networks of ``graph``, in its order."""
    return [ffn for node in graph.nodes if (ffn := _match(node)) is not None]


def _match(node: Node) -> FFN | None:
    down = linear.as_linear(node)
    if down is None:
        return None

    def stop(n: Node) -> bool:
        return linear.as_linear(n) is not None or not fx.calls(n, *_POINTWISE)

    between = fx.upstream(down.input, stop)
    ups = [layer for n in between if (layer := linear.as_linear(n)) is not None]
    others = [
        n for n in between
        if fx.is_tensor(n) and stop(n) and linear.as_linear(n) is None and not fx.is_parameter(n)
    ]  # fmt: skip
    # The gate of a gated FFN is itself an activation (a * b), so one product of two layers will do.
    bent = any(fx.calls(n, *_NONLINEAR) for n in between) or len(ups) > 1
    if not ups or others or not bent or any(up.input is not ups[0].input for up in ups):
        return None
    stacks = [fx.module_stack(n) for n in (node, *(up.node for up in ups))]
    path = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        path = level[0]
    return FFN(node=node, input=ups[0].input, path=path, up=ups[-1].node)
