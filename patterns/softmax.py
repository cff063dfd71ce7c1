"""Attention written by hand, softmax(q k^T) v: recognised, so that it is never missed silently."""

from __future__ import annotations

from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns.linear import as_linear
from moda_compile.patterns.row import Attention, Refused

_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
_WEIGHTS = ("softmax", "log_softmax", "_softmax", "softmax_")


def match(node: Node) -> Attention | None:
    """Refuse a softmax between two products of activations; anything else is no attention."""
    if not fx.calls(node, *_WEIGHTS) or not (_scores(node) and _weighs(node)):
        return None
    raise Refused(
        "attention written by hand (softmax of a product, times values) is not rewritten yet.",
        "use F.scaled_dot_product_attention (transformers: attn_implementation='sdpa').",
    )


def _product(node: Node) -> bool:
    """Whether both factors are activations: a factor that is a parameter makes a linear layer."""
    return fx.calls(node, *_PRODUCTS) and not any(
        fx.is_parameter(used) for used in node.all_input_nodes
    )


# Whatever stands between the products and the softmax (scale, bias, mask, cap, dropout, a head's
# gate) is the attention's own, as long as it is no linear layer: no list of operations is complete.


def _scores(node: Node) -> bool:
    def stop(n: Node) -> bool:
        return n is not node and (_product(n) or _ends(n))

    return any(_product(n) for n in fx.upstream(node, stop))


def _weighs(node: Node) -> bool:
    todo, seen = list(node.users), set()
    while todo:
        user = todo.pop()
        if _product(user):
            return True
        if user not in seen and not _ends(user):
            todo.extend(user.users)
        seen.add(user)
    return False


def _ends(node: Node) -> bool:
    return as_linear(node) is not None or fx.calls(node, "scaled_dot_product_attention")
