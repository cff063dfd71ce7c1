"""Linear layers, what they read, and views in between."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from moda_compile import fx

# Results share memory with the input, or are a copy of it in another layout.
VIEWS = (
    "view", "reshape", "transpose", "permute", "contiguous", "getitem", "split", "chunk", "unbind",
    "unflatten", "flatten", "squeeze", "unsqueeze", "movedim", "swapaxes", "narrow", "select",
    "tensor_split", "split_with_sizes", "mT", "view_as", "reshape_as",
)  # fmt: skip
# Results have the input's shape and values, up to precision or in training.
CASTS = ("to", "float", "type_as", "type", "half", "bfloat16", "double", "clone", "dropout")
_NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``input @ weight.T + bias``, however it was written.

    Attributes:
        node: the result [..., out].
        input: [..., in]; a flattening of leading dimensions in front of it is looked through.
        weight: [out, in], or [in, out] if ``transposed``.
        bias: [out] or ``None``.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool


def as_linear(node: object) -> Linear | None:
    """``node`` read as a linear layer with parameters as weight; ``None`` if it is none."""
    if fx.calls(node, "linear"):
        assert isinstance(node, Node)
        source, weight = fx.argument(node, 0, "input"), fx.argument(node, 1, "weight")
        bias, transposed = fx.argument(node, 2, "bias"), False
    elif fx.calls(node, "addmm"):
        assert isinstance(node, Node)
        names = ("input", "mat1", "mat2")
        bias, source, weight = (fx.argument(node, i, name) for i, name in enumerate(names))
        transposed = True
    elif fx.calls(node, "matmul", "mm", "__matmul__"):
        assert isinstance(node, Node)
        source = fx.argument(node, 0, "input")
        weight = fx.argument(node, 1, "mat2" if fx.calls(node, "mm") else "other")
        bias, transposed = None, True
    else:
        return None
    if not (isinstance(source, Node) and isinstance(weight, Node) and fx.is_weight(weight)):
        return None
    if fx.value(weight).dim() != 2:
        return None
    if fx.calls(source, "view", "reshape", "flatten"):
        whole = fx.argument(source, 0, "input")
        if fx.is_tensor(whole) and fx.value(whole).shape[-1] == fx.value(source).shape[-1]:
            source = whole
    return Linear(node=node, input=source, weight=weight, bias=bias, transposed=transposed)


def projections(node: Node, ends: Collection[Node] = ()) -> list[Linear]:
    """The linear layers nearest upstream of ``node`` on every path.

    Attentions are not crossed: SDPA's calls, and the nodes in ``ends``.
    """

    def stop(n: Node) -> bool:
        crossed = n in ends or fx.calls(n, "scaled_dot_product_attention")
        return crossed or as_linear(n) is not None

    return [layer for n in fx.upstream(node, stop) if (layer := as_linear(n)) is not None]


def sources(node: Node, ends: Collection[Node] = ()) -> tuple[Node, ...]:
    """The hidden states that ``node`` is projected from; ``ends`` as for :func:`projections`.

    Norms, casts and further linear layers are looked through, such as a LoRA adapter's two: all of
    them work token by token.
    """
    return tuple(dict.fromkeys(_hidden(layer.input) for layer in projections(node, ends)))


def _hidden(node: Node) -> Node:
    while True:
        layer = as_linear(node)
        if layer is not None:
            node = layer.input
        elif fx.calls(node, *CASTS, *_NORMS, "contiguous"):
            node = fx.argument(node, 0, "input")
        else:
            return node
