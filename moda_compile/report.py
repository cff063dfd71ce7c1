"""What a conversion found and decided, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moda_compile.config import MoDAConfig


@dataclass(frozen=True, kw_only=True)
class AttentionReport:
    """One attention, in the order of execution.

    Attributes:
        block: dotted path of the module whose forward calls it.
        source: ``file:line`` of the call, or ``None``.
        pattern: name of the row of ``moda_compile.patterns.PATTERNS`` that recognised it.
        heads, kv_heads, head_dim, value_dim: Hq, Hk, d, dv; 0 if refused before they were known.
        causal: whether it was proven that token t sees tokens u <= t, and all of these.
        masked: whether the sequence part keeps a mask of the model's own instead.
        stack: number of the stack whose slots it shares; ``None`` if it is in none.
        reads, writes: depth slots of that stack, by index.
        lowering, reason: the kernels it runs on, and why these.
        refusal: why it is left as it is, and how to change that; ``None`` if it is rewritten, or
            none of a stack's (cross-attention), for which see ``reason``.
    """

    block: str
    source: str | None
    pattern: str
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    causal: bool = False
    masked: bool = False
    stack: int | None = None
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    lowering: str = ""
    reason: str = ""
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every attention of a model, and what the conversion costs. ``str()`` is a table.

    Attributes:
        config: the options that were asked for.
        attentions: those that are rewritten, in order.
        refusals: those that are not, though they belong to a stack.
        bystanders: those that belong to none, such as cross-attention: left as they are.
        costs: (name, formula, value) rows for the given shapes.
    """

    config: MoDAConfig
    attentions: Sequence[AttentionReport]
    refusals: Sequence[AttentionReport] = ()
    costs: Sequence[tuple[str, str, str]] = field(default=())
    bystanders: Sequence[AttentionReport] = ()

    def __str__(self) -> str:
        found = len(self.attentions) + len(self.refusals)
        lines = [
            f"{len(self.attentions)} of {found} attentions converted to MoDA "
            f"(ffn_kv={self.config.ffn_kv!r}, depth={self.config.depth})",
            "",
        ]
        rows = [
            ("#", "block", "pattern", "heads", "d", "mask", "stack", "reads", "writes", "lowering")
        ]
        for i, a in enumerate(self.attentions):
            rows.append(
                (
                    str(i), a.block or "(model)", a.pattern, f"{a.heads}/{a.kv_heads}",
                    _head_dim(a), _mask(a), "-" if a.stack is None else str(a.stack),
                    spans(a.reads), spans(a.writes), a.lowering,
                )
            )  # fmt: skip
        lines += table(rows)
        for line in dict.fromkeys(f"{a.lowering}: {a.reason}" for a in self.attentions):
            lines.append(f"  {line}")
        for place in dict.fromkeys(a.source for a in self.attentions if a.source):
            lines.append(f"  source: {place}")
        for a in self.refusals:
            lines.append(f"refused: {a.block or '(model)'} ({a.source}): {a.refusal}")
        for a in self.bystanders:
            lines.append(f"left alone: {a.block or '(model)'} ({a.source}): {a.reason}")
        if self.costs:
            lines += ["", *table([("cost", "formula", "here"), *self.costs])]
        return "\n".join(lines)


def _head_dim(attention: AttentionReport) -> str:
    """``"64"``, or ``"192/128"`` of keys and of values."""
    sizes = dict.fromkeys((attention.head_dim, attention.value_dim))
    return "/".join(map(str, sizes))


def _mask(attention: AttentionReport) -> str:
    if attention.masked:
        return "own"
    return "causal" if attention.causal else "full"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as aligned lines; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return [lines[0].rstrip(), "  ".join("-" * w for w in widths), *(x.rstrip() for x in lines[1:])]


def spans(numbers: Iterable[int]) -> str:
    """``(0, 1, 2, 5)`` as ``"0-2,5"``; nothing as ``"-"``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts) or "-"
