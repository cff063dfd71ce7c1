"""What the passes hand on to one another: everything found and decided about one graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from moda_compile import fx
from moda_compile.config import MoDAConfig
from moda_compile.errors import RewriteError
from moda_compile.patterns.ffn import FFN
from moda_compile.patterns.projection import Projection
from moda_compile.patterns.row import Attention, Refused


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Attentions that share depth slots: one stream of tokens; keys, values of one shape and dtype.

    Attributes:
        stream: number of the token stream; an encoder and a decoder are two.
        members: numbers of its attentions, in order.
    """

    stream: int
    members: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One depth slot and its single writer.

    Attributes:
        stack: number of the stack it belongs to.
        index: its row in that stack's gradient accumulator; a reader of n slots reads rows
            0 .. n-1.
        layer: number of the attention that wrote it, or whose treatment its FFN's key gets.
        ffn: the FFN that writes it, or ``None`` if the attention does.
        key, value: for an FFN, how its input becomes the slot.
    """

    index: int
    layer: int
    stack: int = 0
    ffn: FFN | None = None
    key: Projection | None = None
    value: Projection | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Form of the rows, one token's of one head each, of an attention's tensors.

    Attributes:
        head_dim: elements of a row; what is narrower gets zeros behind its own.
        token_major: whether the heads of a token lie one behind the other, [B, T, H, d].
    """

    head_dim: int
    token_major: bool


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An attention that was recognised but is left as it is."""

    node: Node
    pattern: str
    reason: str
    fix: str

    def error(self) -> RewriteError:
        """The error that strict conversion raises for it."""
        return RewriteError(
            self.reason,
            fix=self.fix,
            block=fx.module_path(self.node),
            source=fx.source_line(self.node),
        )


@dataclass(frozen=True, kw_only=True)
class Bystander:
    """What looks like an attention but is none of a stack's, such as cross-attention."""

    node: Node
    pattern: str
    reason: str


@dataclass(kw_only=True)
class Plan:
    """Passes fill this in, in the order of the fields.

    Attributes:
        config: the options.
        strict: whether a refused attention is an error.
        marks: markers of a converted model, in graph order.
        attentions: the self-attentions that can be rewritten, in graph order.
        refusals: what is left as it is though it should not be.
        bystanders: what is left as it is because depth is none of its business.
        stacks: which of the attentions share slots; each is in one.
        slots: stack by stack, each by index.
        reads: for each attention, how many slots of its stack it reads.
        replaced: numbers of the attentions that the rewrite replaces, in order.
        lowerings: for each attention, (name, reason).
        rows: for each stack, how queries, keys, values and slots are to lie in memory; None where
            they are left as they come.
    """

    config: MoDAConfig
    strict: bool = True
    marks: list[Node] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    bystanders: list[Bystander] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    lowerings: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Rows | None] = field(default_factory=list)

    def refuse(self, node: Node, pattern: str, refused: Refused, *, fatal: bool = False) -> None:
        """Record a refusal; raises it as RewriteError if the plan is strict or it is ``fatal``."""
        self.refusals.append(
            Refusal(node=node, pattern=pattern, reason=refused.reason, fix=refused.fix)
        )
        if self.strict or fatal:
            raise self.refusals[-1].error()
