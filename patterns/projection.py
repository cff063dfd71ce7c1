"""How a layer turns a hidden state into a key or a value, and how to do it to another one.

    hidden [B,T,D] --linear--> [B,T,F] --views--> waist --anything--> key [B,Hk,T,d]

"Anything" is a key norm, a rotation, casts; the waist is the last tensor before it, still holding
exactly the Hk * d features of each token in some layout. A fused linear layer also makes other
features (q, v); the views then cut the key's out. An FFN's slot key takes the same way from the
waist on, so it lives in the same space as the layer's attention key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moda_compile import fx
from moda_compile.patterns import linear
from moda_compile.patterns.row import Refused


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The way from a hidden state to one attention's key (or value).

    Attributes:
        layer: the linear layer.
        waist: the last node before anything but views happens.
        rest: the nodes from the waist to the key, in order; empty if the waist is the key.
        result: the key [B, Hk, T, d].
        order: the waist's dimensions, a permutation of "bthd", or "btf" if flat; without "b" if the
            hidden state has no batch dimension, and the waist none, either.
        offset, head_stride: feature (h, x) of the key is the linear layer's output feature
            ``offset + h * head_stride + x``.
        heads, head_dim: of the waist; fewer heads than the key's if the rest repeats them.
    """

    layer: linear.Linear
    waist: Node
    rest: tuple[Node, ...]
    result: Node
    order: str
    offset: int
    head_stride: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Features of a token at the waist."""
        return self.heads * self.head_dim

    def apply(self, gm: GraphModule, features: Node) -> Node:
        """Append what turns features [B, T, width], or [T, width], into a key [B, Hk, T, d]."""
        node = features
        if "f" not in self.order:
            node = fx.insert(
                gm, "unflatten", (node, -1, (self.heads, self.head_dim)), like=self.result
            )
            if "b" in self.order and fx.value(self.layer.input).dim() == 2:
                node = fx.insert(gm, "unsqueeze", (node, 0), like=self.result)
            axes = tuple(sorted(self.order, key="bthd".index).index(axis) for axis in self.order)
            node = fx.insert(gm, "permute", (node, axes), like=self.result)
        replace = {self.waist: node}
        fx.copy_nodes(gm, self.rest, replace)
        return replace[self.result]

    def weight(self, gm: GraphModule) -> tuple[Node, Node | None]:
        """Append what cuts weight [width, D] and bias [width] out of the layer's own."""
        weight, bias = self.layer.weight, self.layer.bias
        if self.layer.transposed:
            weight = fx.insert(gm, "t", (weight,), like=self.result)
        rows = fx.value(weight).shape[0]

        def cut(parameter: Node) -> Node:
            if rows == self.width:
                return parameter
            if self.head_stride == self.head_dim:
                return fx.insert(
                    gm, "narrow", (parameter, 0, self.offset, self.width), like=self.result
                )
            by_head = fx.insert(
                gm, "unflatten", (parameter, 0, (self.heads, self.head_stride)), like=self.result
            )
            part = fx.insert(
                gm, "narrow", (by_head, 1, self.offset, self.head_dim), like=self.result
            )
            return fx.insert(gm, "flatten", (part, 0, 1), like=self.result)

        return cut(weight), None if bias is None else cut(bias)


def trace(result: Node, *, at: Node | None = None) -> Projection:
    """Follow ``result`` (a key or value [B, Hk, T, d]) back to its linear layer.

    Args:
        result: the key or value.
        at: the attention that reads it; what is written into it behind does not count.

    Raises:
        Refused: if it is not made by one linear layer, or cut out of it in an unknown way.
    """
    layers = linear.projections(result)
    if len(layers) != 1:
        raise Refused(
            f"a key or value comes from {len(layers)} linear layers, so an FFN has no single "
            "projection to share its treatment with.",
            "use ffn_kv='none'.",
        )
    (layer,) = layers
    near = set(fx.upstream(result, lambda n: n is layer.node))
    if fx.written_into(near, before=at or fx.last(result.graph)):
        raise Refused(
            "a key or value is changed in place on its way from its projection.",
            "write it without in-place changes (torch.cat, torch.where), or use ffn_kv='none'.",
        )
    chain = [n for n, mask in fx.reach(sorted(near), [layer.node]).items() if mask]
    prefix = [layer.node]
    while prefix[-1] is not result:
        users = [n for n in chain if prefix[-1] in n.all_input_nodes]
        if len(users) != 1 or not fx.calls(users[0], *linear.VIEWS):
            break
        prefix.append(users[0])
    # Each of these nodes is the only way from the one before it to the key, so any could be the
    # waist; the last is best whose layout is known (views go on to cut, repeat or copy a key).
    head_dim = int(fx.value(result).shape[3])
    known = _replay(prefix)
    for waist in reversed(prefix):
        layout = _layout(layer, known.get(waist), head_dim)
        # More features than the key's would make an FFN's own projection wider than its slot.
        if layout is not None and layout[3] <= fx.value(result).shape[1]:
            break
    else:
        raise Refused(
            "the layout in which keys or values are cut out of their projection is not understood.",
            "use ffn_kv='none', or separate q, k and v projections.",
        )
    order, offset, head_stride, heads = layout
    before = set(prefix[: prefix.index(waist) + 1])
    rest = tuple(n for n in chain if n not in before)
    return Projection(
        layer=layer,
        waist=waist,
        rest=rest,
        result=result,
        order=order,
        offset=offset,
        head_stride=head_stride,
        heads=heads,
        head_dim=head_dim,
    )


def _replay(prefix: list[Node]) -> dict[Node, Any]:
    """What true views make of a linear layer's result, on a dense meta tensor in its place."""
    shape = [fx.hint(s) for s in fx.value(prefix[0]).shape]
    known: dict[Node, Any] = {prefix[0]: torch.empty(shape, device="meta")}
    memory = known[prefix[0]].untyped_storage()._cdata
    for node in prefix[1:]:
        args, kwargs = fx.arguments(
            node, lambda n: known[n] if n in known else fx.hint(fx.value(n))
        )
        if node.op == "call_method":
            made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            made = node.target(*args, **kwargs)
        if isinstance(made, Tensor) and made.untyped_storage()._cdata != memory:
            break  # a copy: its strides say nothing about the linear layer's features
        known[node] = made
    return known


def _layout(layer: linear.Linear, waist: Any, head_dim: int) -> tuple[str, int, int, int] | None:
    """Order, offset, head stride and heads of a view into a linear layer's result, off its strides.

    ``None`` if ``waist`` is no such view: it does not hold whole heads of whole tokens.
    """
    hidden = [fx.hint(s) for s in fx.value(layer.input).shape[:-1]]
    if len(hidden) not in (1, 2) or not isinstance(waist, Tensor):
        return None
    length, batch = hidden[-1], 1 if len(hidden) == 1 else hidden[0]
    features = int(fx.value(layer.node).shape[-1])
    flat = "btf"[-len(hidden) - 1 :]
    # A hidden state [T, D] may get a batch dimension on the way.
    by_heads = {3: "thd", 4: "bthd"} if len(hidden) == 1 else {4: "bthd"}
    names = by_heads.get(waist.dim(), flat)
    if waist.dim() != len(names):
        return None
    known = {"b": (batch, length * features), "t": (length, features)}
    known |= {"d": (head_dim, 1), "f": (waist.shape[-1], 1)}
    expected = {axis: found for axis, found in known.items() if axis in names}
    labels: list[str | None] = [None] * waist.dim()
    head_stride = head_dim
    for i, (size, stride) in enumerate(zip(waist.shape, waist.stride(), strict=True)):
        if size > 1:
            match = [a for a, found in expected.items() if found == (size, stride)]
            labels[i] = match[0] if match else "h"
            if not match:
                head_stride = stride
    # A dimension of size 1 has no stride of its own; which of the free names it gets is all one.
    free = iter(a for a in names if a not in labels)
    order = "".join(label or next(free, "?") for label in labels)
    sizes = dict(zip(order, waist.shape, strict=True))
    if sorted(order) != sorted(names) or any(sizes[a] != expected[a][0] for a in expected):
        return None
    offset = int(waist.storage_offset())
    if names is flat:
        whole = order == flat and sizes["f"] % head_dim == 0
        return (flat, offset, head_dim, sizes["f"] // head_dim) if whole else None
    by_head = features % head_stride == 0 and sizes["h"] * head_stride == features
    cut = by_head and offset + head_dim <= head_stride
    return (order, offset, head_stride, sizes["h"]) if head_stride == head_dim or cut else None
