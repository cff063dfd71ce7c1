"""See a model's graphs without running it: Dynamo traces a copy whose tensors have no memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from moda_compile import fx
from moda_compile.errors import RewriteError
from moda_compile.markers import Hold, marked, remove_hooks

_numbers = itertools.count()


def entry(forward: Callable[..., Any], spec: str | None = None) -> Callable[..., Any]:
    """A function ``(self, *args, **kwargs)`` for torch.compile, with a code object of its own.

    Dynamo keeps its cache, and counts its recompile limit, per code object; models of one class
    share their forward's.

    Args:
        forward: the model's forward, as a function that takes the model first.
        spec: with which the model's own output is marked, where an attention is in its own forward.
    """

    def moda_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return output if spec is None else marked(output, spec)

    code: CodeType = moda_forward.__code__
    own = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    return FunctionType(own, globals(), own.co_name, None, moda_forward.__closure__)


def _only_the_hint(
    mask: Tensor | None, is_causal: bool | None = None, size: int | None = None
) -> bool:
    return is_causal is True


def has_torch_s_attention(model: nn.Module) -> bool:
    """Whether any module of the model is one that :func:`spelled_out` changes anything for."""
    encoder, decoder = nn.TransformerEncoder, nn.TransformerDecoder
    layers = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    kinds = nn.MultiheadAttention, encoder, decoder, *layers
    return any(isinstance(module, kinds) for module in model.modules())


@contextlib.contextmanager
def spelled_out() -> Iterator[None]:
    """``torch.nn``'s attentions in parts that a graph can hold, for tracing and for running.

    In evaluation without gradients they would be one call for a whole layer, on nested tensors if
    there is padding (whose rows then come out as zeros, which nobody should read). And where a mask
    comes without a hint, ``nn.TransformerEncoder`` compares its values with the causal triangle,
    which breaks the graph; without that, the mask is applied as it is, which gives the same.
    """
    module, detect = torch.nn.modules.transformer, "_detect_is_causal_mask"
    enabled, original = torch.backends.mha.get_fastpath_enabled(), getattr(module, detect)
    torch.backends.mha.set_fastpath_enabled(False)
    setattr(module, detect, _only_the_hint)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        setattr(module, detect, original)


def graphs(
    model: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> list[GraphModule]:
    """Every graph that is run in ``forward(model, *args, **kwargs)``, in order.

    Nothing is computed and ``model`` is not touched: parameters, buffers and inputs of a copy are
    fake tensors of the same shape, dtype and device. More than one graph means graph breaks; where
    they are in the blocks, Dynamo may have made one graph that is run for each of them.

    Raises:
        RewriteError: if the code that is run depends on a tensor's values, as with layer drop.
    """
    found: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            found.append(gm)
            return gm.forward(*inputs)

        return run

    try:
        _look(model, forward, args, kwargs, keep, fullgraph=False)
    except (DataDependentOutputException, DynamicOutputShapeException, UserError) as error:
        if isinstance(error, UserError) and "data-dependent" not in str(error):
            raise
        reason, source = first_break(model, forward, args, kwargs) or (str(error), None)
        raise RewriteError(
            f"which code of this model runs depends on the values of a tensor ({reason}), so it is "
            "no one graph.",
            fix="take the branch out: with layer drop, set its probability to 0 or call "
            "model.eval() (gradients flow there, too); with a loop over experts, run them as one "
            "(transformers: experts_implementation='grouped_mm'); else use torch.where, or convert "
            "the part of the model behind it.",
            source=source,
        ) from None
    return found


def first_break(
    model: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, str | None] | None:
    """Why, and at which ``file:line``, Dynamo first breaks the graph; ``None`` if it does not."""
    try:
        _look(model, forward, args, kwargs, lambda gm, _inputs: gm.forward, fullgraph=True)
    except (torch._dynamo.exc.Unsupported, UserError) as broken:
        places = [f"{frame.filename}:{frame.lineno}" for frame in broken.real_stack]
        said = str(broken).strip()
        cause = said.rpartition("Caused by: ")[2] if isinstance(broken, UserError) else said
        return cause.splitlines()[0].partition("  #")[0], fx.own_place(places)
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass  # Dynamo took it all as one graph, which can't run without values
    return None


def _look(
    model: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    backend: Callable[..., Any],
    *,
    fullgraph: bool,
) -> None:
    """Have Dynamo trace a copy of ``model`` whose tensors have no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        return mode.from_tensor(x.detach(), static_shapes=True) if isinstance(x, Tensor) else x

    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        twin = fake(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    twin_model = copy.deepcopy(model, memo)  # in no fake mode: plain tensor attributes are copied
    remove_hooks(twin_model, Hold)
    # Whatever keeps Dynamo from compiling where this is called, here it only has to look.
    looking = torch._dynamo.config.patch(disable=False, suppress_errors=False)
    with torch.compiler.set_stance("default"), looking, spelled_out(), mode:
        inputs, keywords = tree_map(fake, (tuple(args), dict(kwargs)))
        traced = torch.compile(entry(forward), backend=backend, dynamic=False, fullgraph=fullgraph)
        traced(twin_model, *inputs, **keywords)
