"""Python's garbage collection while a model is compiled."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_NEVER = 1 << 30  # collections of the middle generation before one of the oldest
_lock = threading.Lock()
_depth = 0
_thresholds = (0, 0, 0)


@contextlib.contextmanager
def only_young() -> Iterator[None]:
    """Meanwhile no collection looks at what has survived two of them.

    A compiler makes millions of objects and keeps most: each of the collections that look at all of
    them takes half a second and finds next to nothing, 7 in the compilation of 12 layers. Those of
    the young go on, and what a collection of all would have found the next one finds. In several
    threads at a time it lasts until the last one is out. One that has come due is not made up for
    at once, in the middle of the next part of a compilation: it is as if there had just been one.
    """
    global _depth, _thresholds
    with _lock:
        _depth += 1
        if _depth == 1:
            _thresholds = gc.get_threshold()
            gc.set_threshold(*_thresholds[:2], _NEVER)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                gc.set_threshold(*_thresholds)
                if not gc.get_freeze_count():  # else these would thaw what somebody froze
                    gc.freeze()  # Python then counts the collections before one of all from 0
                    gc.unfreeze()
