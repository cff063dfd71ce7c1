"""What the scripts that run kernels in Triton's interpreter share: one JSON line a case."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def poison_new_memory() -> None:
    """Fill what the kernels allocate with NaN: an element that is never written shows."""
    original: Callable[..., Tensor] = Tensor.new_empty

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    Tensor.new_empty = new_empty  # type: ignore[assignment, method-assign]


def patch_each_module_once() -> None:
    """The interpreter patches Triton's language for a launch, and again, for good, for the module
    of each function that is called inside: all members of all of it, in every call. Once will do.
    """
    from triton.runtime.interpreter import InterpretedFunction

    first: Callable[..., Any] = InterpretedFunction.__call__
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            patched.add(module)
            return first(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def report(cases: Iterable[dict[str, Any]], run: Callable[[dict[str, Any]], Any]) -> None:
    """Print {"case": ..., "result": ...} or {"case": ..., "traceback": ...} for every case."""
    torch.set_num_threads(1)
    poison_new_memory()
    patch_each_module_once()
    for case in cases:
        line: dict[str, Any] = {"case": case}
        try:
            line["result"] = run(case)
        except Exception:
            line["traceback"] = traceback.format_exc()[-2000:]
        print(json.dumps(line), flush=True)
