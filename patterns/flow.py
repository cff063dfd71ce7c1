"""What a tensor has been through since the last linear layer: enough to miss no attention.

No list of operations is complete. So whatever stands between two products of activations and holds
a softmax is an attention until shown otherwise: these bits follow the dataflow through any
operation, and only a product with weights (a linear layer) ends them.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node

from moda_compile import fx
from moda_compile.patterns import linear, products

PARAMETER, FLOATS, INPUT = 1, 2, 4  # made from a parameter, a floating input, any input
PRODUCT = 8  # from a product of two activations
SOFTMAX = 16  # ... and a softmax behind it
EXP, TOTAL = 32, 64  # ... an exponential behind it; a sum of those
SIGMOID = 128  # ... a sigmoid behind it
WEIGHTED = 256  # from a product of exponentials and values, still to be divided by their sum
_KIND = PARAMETER | FLOATS | INPUT

SHAPE_ONLY = ("new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like",
              "full_like", "empty_like")  # fmt: skip
_SOFTMAXES = ("softmax", "log_softmax", "_softmax", "softmax_", "_safe_softmax", "softmin")
_EXPS = ("exp", "exp_", "exp2", "expm1")
_SIGMOIDS = ("sigmoid", "sigmoid_", "hardsigmoid", "logsigmoid")
_RATIOS = ("div", "truediv", "true_divide", "divide", "div_", "itruediv", "mul", "mul_", "imul")
_CALLS = ("linear", "embedding", "embedding_bag")

_known: WeakKeyDictionary[Node, int] = WeakKeyDictionary()


def bits(node: Node) -> int:
    """The union of the bits above for ``node``. All of a graph's are found in one pass."""
    todo = [node]
    while todo:
        current = todo[-1]
        ahead = [n for n in _read_by(current) if n not in _known]
        if ahead and current not in _known:
            todo += ahead
        else:
            todo.pop()
            if current not in _known:
                _known[current] = _bits(current)
    return _known[node]


def is_attention_product(node: Node) -> bool:
    """Whether ``node`` is a product of two activations."""
    if not products.is_product(node):
        return False
    bits(node)
    factors = [_seen(x, node) for x in products.operands(node)]
    return sum(map(_activation, factors)) >= 2 and not any(map(_weight, factors))


def divides_by_sum(node: Node) -> bool:
    """exp(scores) @ v / exp(scores).sum(-1): the last step of a softmax that is written out."""
    of = [bits(x) for x in node.all_input_nodes]
    return (
        fx.calls(node, *_RATIOS)
        and len(of) == 2
        and any(x & WEIGHTED and y & TOTAL and not y & WEIGHTED for x, y in (of, of[::-1]))
    )


def _activation(x: int) -> bool:
    """Of hidden states: floating inputs, or looked up or projected from inputs by parameters."""
    return bool(x & FLOATS or (x & PARAMETER and x & INPUT))


def _weight(x: int) -> bool:
    return bool(x & PARAMETER) and not x & INPUT


def _read_by(node: Node) -> list[Node]:
    """What ``node`` reads: its inputs, and what was written into them in place in front of it."""
    inputs = node.all_input_nodes
    return [*inputs, *fx.written_into(inputs, before=node)] if inputs else []


def _seen(x: Node, reader: Node) -> int:
    """The bits of ``x`` at the time that ``reader`` reads it, such as of a cache's buffer."""
    found = _known[x]
    for writer in fx.written_into([x], before=reader):
        found |= _known[writer]
    return found


def _bits(node: Node) -> int:
    result = fx.value(node)
    if not node.op.startswith("call"):
        if isinstance(result, torch.nn.Parameter):
            return PARAMETER
        if isinstance(result, Tensor) and node.op != "output":
            return FLOATS | INPUT if result.is_floating_point() else INPUT
        return 0
    nothing = not isinstance(result, (Tensor, tuple, list)) and not fx.writes(node)
    if nothing or fx.calls(node, *SHAPE_ONLY):
        return 0
    of = [_seen(x, node) for x in node.all_input_nodes]
    union = 0
    for x in of:
        union |= x
    return _step(node, of, union)


def _step(node: Node, of: list[int], union: int) -> int:
    if products.is_product(node):
        factors = [_seen(x, node) for x in products.operands(node)]
        if any(map(_weight, factors)):
            return union if _mixes_scores(node) else union & _KIND
        if sum(map(_activation, factors)) >= 2:
            return union & _KIND | PRODUCT | (WEIGHTED if union & EXP else 0)
        return union
    name = fx.name_of(node)
    if fx.calls(node, *_CALLS) or linear.as_linear(node) is not None:
        return union if _mixes_scores(node) else union & _KIND
    if "attention" in name:
        return union & _KIND
    if not union & PRODUCT:
        return union
    if name in _SOFTMAXES:
        return union | SOFTMAX
    if name == "logsumexp":
        return union | TOTAL
    if name in _EXPS:
        return union | (SOFTMAX if union & TOTAL else EXP)
    if name == "sum" and union & EXP:
        return union | TOTAL
    if name == "normalize" and union & EXP:
        return union | SOFTMAX
    if name in _RATIOS and any(x & EXP and not x & TOTAL for x in of) and union & TOTAL:
        return union | SOFTMAX
    if name in _SIGMOIDS:
        return union | SIGMOID
    return union


def _mixes_scores(node: Node) -> bool:
    """Whether this linear layer mixes the heads of scores [.., T, T, H] ("talking heads")."""
    for source in node.all_input_nodes:
        if _known[source] & PRODUCT and fx.is_tensor(source) and fx.value(source).dim() >= 4:
            shape = fx.hint(fx.value(source).shape)
            if shape[-2] == shape[-3]:
                return True
    return False
