"""Register an operator with as little as possible between its call and its function.

Each layer calls three operators in a step, with dozens of tensors each, and a layer of few tokens
takes the GPU less than the host takes to call them. What ``torch.library.custom_op`` puts around
each call (Python kernels for autograd and for mutation, a comparison of all storages) was half of
what the call itself costs. Here the dispatcher calls the function. Autograd goes through other
operators anyway; see `ops`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("moda_compile", "FRAGMENT")
_functions: dict[Any, Callable[..., Any]] = {}


def operator(name: str, *, mutates: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function becomes ``torch.ops.moda_compile.<name>``, and that is returned.

    Args:
        name: of the operator. mutates: the argument, a tensor or None, that the function writes to;
            it must write to no other and return none of its arguments.
    """

    def register(function: Callable[..., Any]) -> Any:
        changed = () if mutates is None else (mutates,)
        schema = torch.library.infer_schema(function, mutates_args=changed)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        called = function if mutates is None else _counting(function, mutates)
        _library.impl(name, called, "CompositeExplicitAutograd")
        made = getattr(torch.ops.moda_compile, name)
        _functions[made.default] = function
        return made

    return register


def function(operator: Any) -> Callable[..., Any]:
    """What an operator, ``torch.ops.moda_compile.<name>.default``, calls; for a trace of it."""
    return _functions[operator]


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function gives the operator's results without their content."""
    return torch.library.register_fake(f"moda_compile::{name}", lib=_library)


def _counting(function: Callable[..., Any], mutates: str) -> Callable[..., Any]:
    """The function, which autograd learns to have written to the argument ``mutates``."""
    place = list(inspect.signature(function).parameters).index(mutates)

    def call(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        written = args[place] if place < len(args) else kwargs.get(mutates)
        if written is not None:
            torch.autograd.graph.increment_version(written)
        return made

    return call
