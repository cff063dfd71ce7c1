"""Products of two tensors, however they are written, with a name for each of their dimensions.

    out[o] = factor * sum over what is not in o of left[l] right[r], + bias_factor * bias[o]

where l, r and o are the dimensions' names as in an einsum: ``("n0", "i", "j")``.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moda_compile import fx

Names = tuple[str, ...]

_MATMULS = {
    "matmul": ("input", "other"),
    "__matmul__": ("input", "other"),
    "bmm": ("input", "mat2"),
    "mm": ("input", "mat2"),
}
_ADDED = {"baddbmm": ("batch1", "batch2"), "addmm": ("mat1", "mat2")}
# What else makes a product of two tensors; how is not looked into.
_OTHERS = ("tensordot", "inner", "mv", "vecdot", "__rmatmul__", "multi_dot", "chain_matmul",
           "addbmm", "addmv")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Product:
    """See the top of the file. A dimension of size 1 is broadcast to the other operand's.

    Attributes:
        node: the result.
        left, right: the operands.
        left_names, right_names, out_names: names of their dimensions.
        factor: of the product.
        bias: what is added, broadcastable to the result, or ``None``.
        bias_factor: of the bias.
    """

    node: Node
    left: Node
    right: Node
    left_names: Names
    right_names: Names
    out_names: Names
    factor: float = 1.0
    bias: Node | None = None
    bias_factor: float = 1.0


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies tensors and sums: matmul, einsum, or written out."""
    return fx.calls(node, *_MATMULS, *_ADDED, *_OTHERS, "einsum") or _summed(node) is not None


def operands(node: Node) -> list[Node]:
    """What a product multiplies."""
    product = as_product(node)
    return [product.left, product.right] if product is not None else node.all_input_nodes


def as_product(node: Node) -> Product | None:
    """``node`` read as a product of two tensors; ``None`` if it is none, or none we can read."""
    if not fx.is_tensor(node):
        return None
    if fx.calls(node, *_MATMULS):
        names = _MATMULS[fx.name_of(node)]
        left, right = (fx.argument(node, i, name) for i, name in enumerate(names))
        return _matmul(node, left, right)
    if fx.calls(node, *_ADDED):
        names = _ADDED[fx.name_of(node)]
        bias = fx.argument(node, 0, "input")
        left, right = (fx.argument(node, 1 + i, name) for i, name in enumerate(names))
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not (isinstance(beta, (int, float)) and isinstance(alpha, (int, float))):
            return None
        return _matmul(node, left, right, bias if beta else None, float(alpha), float(beta))
    if fx.calls(node, "einsum"):
        return _einsum(node)
    return _summed(node)


def _matmul(
    node: Node,
    left: Any,
    right: Any,
    bias: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Product | None:
    if not (fx.is_tensor(left) and fx.is_tensor(right)):
        return None
    ranks = [fx.value(x).dim() for x in (left, right)]
    if min(ranks) < 2:
        return None
    batch = tuple(f"n{i}" for i in range(max(ranks) - 2))
    own = [batch[len(batch) - (rank - 2) :] for rank in ranks]
    return Product(
        node=node,
        left=left,
        right=right,
        left_names=(*own[0], "i", "j"),
        right_names=(*own[1], "j", "k"),
        out_names=(*batch, "i", "k"),
        factor=alpha,
        bias=bias if isinstance(bias, Node) else None,
        bias_factor=beta,
    )


def _einsum(node: Node) -> Product | None:
    equation, *given = node.args
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = list(given[0])
    if not isinstance(equation, str) or len(given) != 2 or not all(fx.is_tensor(x) for x in given):
        return None
    before, arrow, after = equation.replace(" ", "").partition("->")
    terms = before.split(",")
    if len(terms) != 2:
        return None
    names: list[Names] = []
    dots = 0
    for term, x in zip(terms, given, strict=True):
        rank = fx.value(x).dim()
        letters = term.replace("...", "")
        if len(set(letters)) != len(letters) or not set(letters) <= set(string.ascii_letters):
            return None
        count = rank - len(letters) if "..." in term else 0
        dots = max(dots, count)
        names.append(_dotted(term, count))
    if not arrow:
        once = [c for c in sorted(set(before)) if c in string.ascii_letters]
        after = "..." + "".join(c for c in once if before.count(c) == 1)
    return Product(
        node=node,
        left=given[0],  # type: ignore[arg-type]
        right=given[1],  # type: ignore[arg-type]
        left_names=names[0],
        right_names=names[1],
        out_names=_dotted(after, dots),
    )


def _dotted(term: str, count: int) -> Names:
    """Names of a term's dimensions, where "..." are ``count``, numbered from the right."""
    head, dots, tail = term.partition("...")
    middle = tuple(f"n{i}" for i in reversed(range(count))) if dots else ()
    return (*head, *middle, *tail)


def _summed(node: Node) -> Product | None:
    """``(a[..., None, :] * b[:, None]).sum(-1)``: each operand lacks a dimension of the other's."""
    if not fx.calls(node, "sum"):
        return None
    both, dims = fx.argument(node, 0, "input"), fx.argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not (fx.calls(both, "mul", "multiply") and fx.is_tensor(both) and fx.is_tensor(node)):
        return None
    if not isinstance(dims, (tuple, list)) or fx.argument(node, 2, "keepdim", False):
        return None
    left, right = fx.argument(both, 0, "input"), fx.argument(both, 1, "other")
    if not (fx.is_tensor(left) and fx.is_tensor(right)):
        return None
    rank = fx.value(both).dim()
    shapes = [[1] * (rank - fx.value(x).dim()) + _hints(x) for x in (left, right)]
    outer = [any(a == 1 < b for a, b in zip(*pair, strict=True)) for pair in (shapes, shapes[::-1])]
    if not all(outer):
        return None
    names = tuple(f"d{i}" for i in range(rank))
    summed = {names[i] for i in dims}
    return Product(
        node=node,
        left=left,
        right=right,
        left_names=names[rank - fx.value(left).dim() :],
        right_names=names[rank - fx.value(right).dim() :],
        out_names=tuple(n for n in names if n not in summed),
    )


def _hints(node: Node) -> list[int]:
    return [int(fx.hint(s)) for s in fx.value(node).shape]
