"""The vocabulary of the pattern table: what a row is, and what a match says.

To teach the library an attention of your own, write a row and hand it to
:func:`moda_compile.register_pattern` (a worked one: ``examples/custom_pattern.py``)::

    def match(node):
        if not fx.calls_op(node, torch.ops.mine.attention):     # q, k, v [B, T, H, d]
            return None
        gm = node.graph.owning_module
        with gm.graph.inserting_before(node):
            q, k, v = (fx.insert(gm, "transpose", (x, 1, 2), like=node) for x in node.args[:3])
        back = Step("transpose", (1, 2))
        return Attention(node=node, pattern="mine", query=q, key=k, value=v, is_causal=True,
                         scale=None, restore=(back,))

    moda_compile.register_pattern(Pattern(name="mine", accepts="...", refuses="...", match=match))

``match`` is given every node of the graph that Dynamo made, in order. It goes by dataflow (which
operation, on what), never by names of modules or attributes, and leaves the graph as it is but for
calls that it inserts in front of ``node``. Of :mod:`moda_compile.fx` a row needs:

    value(node)                 the node's fake result, for shapes and dtypes; is_tensor(node)
    calls(node, "transpose")    whether it calls a function or method of that name
    calls_op(node, op)          whether it calls a registered operator, torch.ops.ns.name
    argument(node, 0, "q")      an argument of a call, by position or keyword, with a default
    insert(gm, target, args, like=node)     append a call of a function, or of a method by its name
    item(gm, node, i)           append node[i]

What a match returns is checked (shapes, order of nodes, whether ``restore`` leads back), and a
mistake is an error that names the row. Whether the rewritten model is right only an oracle can
tell: ``moda_compile.testing.check_conversion(..., functions={operator: adapter})`` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node


class Refused(Exception):
    """A row recognises an attention that it may not rewrite.

    Args:
        reason: what was found, one sentence.
        fix: what the model's owner can change, one sentence.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


class LeftAlone(Exception):
    """A row recognises what is no self-attention, so no part of a stack: it stays as it is.

    Args:
        reason: what was found, one sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Step:
    """One call on the way from the combined attention's output to what the model goes on with.

    ``target(x, *args, **kwargs)`` of the value x so far, or its method if ``target`` is a name:
    ``Step("transpose", (1, 2))``. Arguments may hold nodes of the graph.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention, softmax(scale q k^T + mask) v, as dataflow.

    Queries [B, Hq, Tq, d], keys [B, Hk, Tk, d] and values [B, Hk, Tk, dv] come in one layout; with
    a KV cache there are more keys than queries. Where the graph has another, the
    match appends views (:func:`moda_compile.fx.insert`) in front of ``node``; those that nothing
    comes to use are removed again. Whether it is self-attention, and of which stack, is for the
    passes to find out.

    Attributes:
        node: the node whose result is replaced.
        pattern: name of the row that found it.
        query: node of the queries [B, Hq, Tq, d], as its scores use them (normed, rotated).
        key, value: nodes of [B, Hk, Tk, d] and [B, Hk, Tk, dv] before any repetition over the query
            heads of a group.
        is_causal: whether token t sees tokens u <= t only, the last query being the last key's
            token; otherwise what ``mask`` says, or all.
        scale: factor of every score; ``None`` means 1 / sqrt(d).
        mask: node of a mask of the sequence's scores, broadcastable to [B, Hq, Tq, Tk]: bool (True
            attends) or additive. ``None`` with ``is_causal``.
        max_length: the longest Tk for which ``is_causal`` was checked; ``None`` if for every one.
        restore: how ``node``'s result is made from the combined attention's [B, Hq, Tq, dv].
        sequence: nodes of the sequence part's own output [B, Hq, Tq, dv] and lse [B, Hq, Tq]
            (natural logarithm), where the graph computes it by a call that is to stay; depth is
            then merged into it, and mask and is_causal are that call's own business.
        own_key, own_value: nodes [B, Hk, Tq, d] and [B, Hk, Tq, dv] of what key and value hold of
            the queries' own tokens, where they hold others as well. A row may leave them ``None``:
            what is put into a KV cache is found for it (`moda_compile.patterns.cache`).
    """

    node: Node
    pattern: str
    query: Node
    key: Node
    value: Node
    is_causal: bool
    scale: float | None
    mask: Node | None = None
    max_length: int | None = None
    restore: tuple[Step, ...] = ()
    sequence: tuple[Node, Node] | None = None
    own_key: Node | None = None
    own_value: Node | None = None

    @property
    def slot_key(self) -> Node:
        """The keys [B, Hk, Tq, d] that a depth slot is made of."""
        return self.key if self.own_key is None else self.own_key

    @property
    def slot_value(self) -> Node:
        """The values [B, Hk, Tq, dv] that a depth slot is made of."""
        return self.value if self.own_value is None else self.own_value


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A row of the table.

    Attributes:
        name: what reports call it.
        accepts: one sentence: which attentions it rewrites.
        refuses: one sentence: which it recognises and refuses, and why.
        match: given any node, an Attention if this node is the output of one, ``None`` if it is
            something else, or raises :class:`Refused` or :class:`LeftAlone`.
    """

    name: str
    accepts: str
    refuses: str
    match: Callable[[Node], Attention | None]
