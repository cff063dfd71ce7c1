"""Options whose repr is short and runnable, and the simplest of them that still fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from moda_compile.errors import InputError

Options = TypeVar("Options")
Path = tuple[str | int, ...]


class ShortRepr:
    """For dataclasses: a runnable repr that names only what differs from the defaults."""

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints."""
        printer.text(repr(self))


def simplest(options: Options, fails: Callable[[Options], bool]) -> Options:
    """Put as many fields as possible back to their defaults, in dataclasses inside as well.

    Tries all changed fields at once, then halves of them, down to single ones, from the start after
    each success: some twenty tries where Hypothesis, which knows no fields, needs hundreds.

    Args:
        options: a dataclass with a default for every field, for which `fails` holds.
        fails: never called with the same options twice.
    """
    tried = {options}
    while True:
        paths = list(_changed(options))
        for other in _candidates(options, paths):
            if other not in tried:
                tried.add(other)
                if fails(other):
                    options = other
                    break
        else:
            return options


def _candidates(options: Options, paths: list[Path]) -> Iterator[Options]:
    size = len(paths)
    while size:
        for start in range(0, len(paths), size):
            other = options
            # Backwards: a tuple's last elements go first, and parts go before their whole.
            for path in reversed(paths[start : start + size]):
                try:
                    other = _reset(other, path)
                except InputError:  # cannot be built
                    continue
            yield other
        size //= 2


def _changed(options: Any) -> Iterator[Path]:
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        yield (field.name,)
        if is_dataclass(value):
            yield from ((field.name, *path) for path in _changed(value))
        elif isinstance(value, tuple):
            yield from ((field.name, i) for i in range(len(value)))


def _reset(options: Any, path: Path) -> Any:
    """With the field, or the element of a tuple, at its default."""
    if isinstance(options, tuple):
        assert isinstance(path[0], int)
        return options[: path[0]] + options[path[0] + 1 :]
    name = str(path[0])
    if len(path) > 1:
        return replace(options, **{name: _reset(getattr(options, name), path[1:])})
    default = next(field.default for field in fields(options) if field.name == name)
    return replace(options, **{name: default})
