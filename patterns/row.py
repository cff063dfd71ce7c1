"""The vocabulary of the pattern table: what a row is, and what a match says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One self-attention, as dataflow.

    Attributes:
        node: the node whose result is the attention's output [B, Hq, T, d].
        pattern: name of the row that found it.
        query: node of the queries [B, Hq, T, d], as its scores use them (normed, rotated).
        key, value: nodes of [B, Hk, T, d] before any repetition over the query heads of a group.
        is_causal: whether token t sees tokens u <= t only; otherwise it sees all.
        scale: factor of every score; ``None`` means 1 / sqrt(d).
        max_length: the longest T for which ``is_causal`` was checked; ``None`` if for every T.
    """

    node: Node
    pattern: str
    query: Node
    key: Node
    value: Node
    is_causal: bool
    scale: float | None
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A row of the table.

    Attributes:
        name: what reports call it.
        accepts: one sentence: which attentions it rewrites.
        refuses: one sentence: which it recognises and refuses, and why.
        match: given any node, an Attention if this node is the output of one, ``None`` if it is
            something else, or raises :class:`Refused`.
    """

    name: str
    accepts: str
    refuses: str
    match: Callable[[Node], Attention | None]
