"""Every error this library raises on purpose. Imports nothing, so that everything may import it."""

from __future__ import annotations


class MoDAError(RuntimeError):
    """Base of all errors raised on purpose by ``moda_compile``.

    The message says what was found, what was expected, and what to change.
    """


class InputError(MoDAError, ValueError):
    """A public function was given arguments it can't take: shapes, dtypes, devices or options."""


class RewriteError(MoDAError):
    """A model, or one block of it, can't be turned into MoDA.

    Args:
        reason: one sentence: what was found and why it can't be rewritten.
        fix: one sentence: what the model's owner can change.
        block: dotted path of the module that holds the attention, or ``None`` if unknown.
        source: ``file:line`` of the user's code, or ``None`` if unknown.
    """

    def __init__(
        self, reason: str, *, fix: str, block: str | None = None, source: str | None = None
    ) -> None:
        self.reason, self.fix, self.block, self.source = reason, fix, block, source
        where = f"{block or 'model'}" + (f" ({source})" if source else "")
        super().__init__(f"{where}: {reason} To fix: {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.reason, self.fix, self.block, self.source)


class NotRewrittenError(MoDAError):
    """A converted model was about to run without the rewrite, that is, as another model."""


def _rebuild(reason: str, fix: str, block: str | None, source: str | None) -> RewriteError:
    return RewriteError(reason, fix=fix, block=block, source=source)
