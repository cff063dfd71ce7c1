"""Calls that yield several things, of which the first is an attention's output."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from moda_compile import fx


def first_of(node: Node) -> Node | None:
    """The call whose result, or the first of whose results, ``node`` is; ``None`` for all else.

    For a call that yields one tensor that is the call itself, for one that yields several it is
    ``call[0]``: the node that a match of this call is about.
    """
    if node.op != "call_function":
        return None
    if node.target is not operator.getitem:
        return None if isinstance(fx.value(node), (tuple, list)) else node
    call, index = node.args
    several = isinstance(call, Node) and call.op == "call_function" and not fx.is_tensor(call)
    return call if several and index == 0 else None  # type: ignore[return-value]


def others_used(call: Node, *, but: int = 0) -> bool:
    """Whether anything comes of a result of ``call`` other than number ``but``."""
    return any(
        user.target is not operator.getitem or (user.args[1] != but and used(user))
        for user in call.users
    )


def used(node: Node) -> bool:
    """Whether anything comes of ``node``: it reaches the graph's output, or is written somewhere.

    ``weights.mean(1)`` and ``lse * 0.69`` stay in a graph though the model drops the result.
    """
    todo: list[Node] = [node]
    seen: set[Node] = set()
    while todo:
        user = todo.pop()
        if user.op == "output" or fx.writes(user) or (user is not node and user.is_impure()):
            return True
        if user not in seen:
            seen.add(user)
            todo.extend(user.users)
    return False


def swapped(node: Any) -> Node | None:
    """x, if ``node`` is x [a, b, ..] with its first two dimensions swapped."""
    if not fx.calls(node, "transpose", "swapaxes", "swapdims"):
        return None
    source = fx.argument(node, 0, "input")
    dims = [
        fx.argument(node, i, name, fx.argument(node, i, f"axis{i - 1}"))
        for i, name in ((1, "dim0"), (2, "dim1"))
    ]
    if not fx.is_tensor(source) or not all(isinstance(d, int) for d in dims):
        return None
    rank = fx.value(source).dim()
    return source if {d % rank for d in dims} == {0, 1} else None
