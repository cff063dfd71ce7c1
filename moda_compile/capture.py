"""See a model's graphs without running it: Dynamo traces a copy whose tensors have no memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from moda_compile.markers import Hold, Marker, remove_hooks

_numbers = itertools.count()


def entry(forward: Callable[..., Any], marker: Marker | None = None) -> Callable[..., Any]:
    """A function ``(self, *args, **kwargs)`` for torch.compile, with a code object of its own.

    Dynamo keeps its cache, and counts its recompile limit, per code object; models of one class
    share their forward's.

    Args:
        forward: the model's forward, as a function that takes the model first.
        marker: marks the model's own output, where an attention is in the model's own forward.
    """

    def moda_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return output if marker is None else marker(self, args, output)

    code: CodeType = moda_forward.__code__
    own = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    return FunctionType(own, globals(), own.co_name, None, moda_forward.__closure__)


def graphs(
    model: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> list[GraphModule]:
    """Every graph that Dynamo makes of ``forward(model, *args, **kwargs)``, in order.

    Nothing is computed and ``model`` is not touched: parameters, buffers and inputs of a copy are
    fake tensors of the same shape, dtype and device. More than one graph means graph breaks.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        return mode.from_tensor(x.detach(), static_shapes=True) if isinstance(x, Tensor) else x

    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        twin = fake(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    found: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    # Whatever keeps Dynamo from compiling where this is called, here it only has to look.
    looking = torch._dynamo.config.patch(disable=False, suppress_errors=False)
    with torch.compiler.set_stance("default"), looking, mode:
        twin_model = copy.deepcopy(model, memo)
        remove_hooks(twin_model, Hold)
        inputs, keywords = tree_map(fake, (tuple(args), dict(kwargs)))
        traced = torch.compile(entry(forward), backend=keep, dynamic=False)
        traced(twin_model, *inputs, **keywords)
    return found
