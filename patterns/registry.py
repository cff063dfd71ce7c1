"""Rows of the user's own, and the way from any row to a match that holds what a row promises."""

from __future__ import annotations

from types import TracebackType

from torch.fx import Node

from moda_compile import fx
from moda_compile.errors import InputError, MoDAError
from moda_compile.patterns import contract
from moda_compile.patterns.row import Attention, LeftAlone, Pattern, Refused

# Newest first. Replaced as a whole, so that a reader in another thread sees one state or the other.
_own: tuple[Pattern, ...] = ()


class Registration:
    """A registered row. Leaving a ``with`` block, or :meth:`remove`, takes it out again."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def remove(self) -> None:
        """Take the row out. Doing it twice is no error."""
        global _own
        _own = tuple(p for p in _own if p is not self.pattern)

    def __enter__(self) -> Registration:
        """The registration itself; the row is there already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the row out."""
        self.remove()

    def __repr__(self) -> str:
        state = "registered" if self.pattern in _own else "removed"
        return f"<pattern {self.pattern.name!r}, {state}>"


def register_pattern(pattern: Pattern) -> Registration:
    """Teach the library an attention of your own: a row that is tried before the built-in ones.

    Register it before :func:`moda_compile.convert`, and keep it registered while the model runs: a
    graph is traced anew for new shapes. A model whose row is gone raises then; it never runs
    without depth KV. Rows registered later are tried first.

    Args:
        pattern: the row; see :mod:`moda_compile.patterns.row` for what ``match`` owes.

    Returns:
        A handle to remove it with, also a context manager.

    Raises:
        InputError: if it is no row, or another has its name.
    """
    global _own
    if not isinstance(pattern, Pattern):
        raise InputError(
            f"register_pattern: got {type(pattern).__name__}, expected a "
            "moda_compile.patterns.Pattern."
        )
    for field in ("name", "accepts", "refuses"):
        text = getattr(pattern, field)
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"register_pattern: pattern {pattern.name!r}: {field} is {text!r}, expected words."
            )
    if not callable(pattern.match):
        raise InputError(
            f"register_pattern: pattern {pattern.name!r}: match is {pattern.match!r}, expected a "
            "function of one node."
        )
    if any(p.name == pattern.name for p in rows()):
        raise InputError(
            f"register_pattern: there is a pattern {pattern.name!r} already; names tell rows apart "
            "in reports. Remove the other one first, or choose another name."
        )
    _own = (pattern, *_own)
    return Registration(pattern)


def rows() -> tuple[Pattern, ...]:
    """All rows in the order in which they are tried: the user's, newest first, then the built-in.

    For each node of the graph, the first row that has something to say about it decides.
    """
    from moda_compile.patterns import PATTERNS  # the table imports this file

    return _own + PATTERNS


def apply(pattern: Pattern, node: Node) -> Attention | None:
    """``pattern.match(node)``, and whatever the row does wrong as an error that names it.

    Raises:
        Refused, LeftAlone: as the row does.
        InputError: if the row raises anything else, or returns what is no attention of ``node``.
    """
    try:
        attention = pattern.match(node)
        wrong = None if attention is None else contract.broken(attention, node, pattern.name)
    except (Refused, LeftAlone, MoDAError):
        raise
    except Exception as error:
        raise InputError(
            _blame(pattern, node, f"it raised {type(error).__name__}: {error}")
        ) from error
    if wrong is not None:
        raise InputError(_blame(pattern, node, wrong))
    return attention


def _blame(pattern: Pattern, node: Node, what: str) -> str:
    place = fx.source_line(node)
    where = f"{node.format_node()}" + (f" ({place})" if place else "")
    advice = "" if pattern in _own else " This row is the library's own: please report it."
    return f"pattern {pattern.name!r}, given the node {where}: {what}.{advice}"
