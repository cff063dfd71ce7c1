"""The marker: an operator in a converted model that says so, and that refuses to run.

A conversion changes the function a model computes, so a converted model must never run without
the rewrite. A forward hook passes one tensor of each block through ``moda_compile::mark``. The
rewrite takes the marks out. Anything else that runs the model (an eager stance, a skipped frame,
another backend, export, a call of an inner module) reaches the operator's kernel, which raises.

The same operator brings new parameters into the graph as ordinary inputs, which a backend can't
do, and carries the conversion's options, so that the graph alone says what it shall become.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from moda_compile.config import MoDAConfig
from moda_compile.errors import NotRewrittenError, RewriteError

KEY_WEIGHT, VALUE_WEIGHT = "moda_key_weight", "moda_value_weight"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a mark says about the conversion it belongs to.

    Attributes:
        block: dotted path of the marked module.
        config: the conversion's options.
        attentions: how many attentions one graph must hold; fewer means the graph was split.
        strict: whether every attention must be rewritten.
        ffn: whether the mark carries an FFN's projection weights.
    """

    block: str
    config: MoDAConfig
    attentions: int
    strict: bool
    ffn: bool

    def to_json(self) -> str:
        """The specification as one line, which is how a graph holds it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Inverse of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"config": MoDAConfig(**fields["config"])})


def spec_of(arguments: Sequence[Any]) -> Spec:
    """The specification among the arguments of a call of :func:`mark`."""
    return Spec.from_json(arguments[2])


@torch.library.custom_op("moda_compile::mark", mutates_args=())
def mark(x: Tensor, weights: Sequence[Tensor], spec: str) -> Tensor:
    """x, in a traced graph. Runs nowhere: raises NotRewrittenError."""
    raise NotRewrittenError(
        f"{Spec.from_json(spec).block}: this model was converted to MoDA but is about to run "
        "without the rewrite, which would silently be another model. Call the converted model "
        "itself (not an inner module, nor under torch.compiler.disable, an eager stance, another "
        "backend, torch.export or with Dynamo disabled). If it ran before, a recompile limit may "
        "be hit: raise torch._dynamo.config.recompile_limit. moda_compile.revert(model) undoes it."
    )


@mark.register_fake
def _(x: Tensor, weights: Sequence[Tensor], spec: str) -> Tensor:
    return torch.empty_like(x)


def _count_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.weights = len(inputs[1])


def _mark_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    return grad, [None] * ctx.weights, None


mark.register_autograd(_mark_gradient, setup_context=_count_weights)


class Marker:
    """Forward hook that marks the first tensor of a module's output."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.text = spec, spec.to_json()

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """Mark ``output``; structures are rebuilt around the marked tensor.

        Raises:
            RewriteError: if no tensor is found in it, for an unmarked block would be unguarded.
        """
        names = (KEY_WEIGHT, VALUE_WEIGHT) if self.spec.ffn else ()
        weights = [getattr(module, name) for name in names]
        marked, done = _mark_first(output, weights, self.text)
        if not done:
            raise RewriteError(
                f"this module returns {type(output).__name__}, in which no tensor can be marked.",
                fix="return a tensor, or a tuple, list or dict with one.",
                block=self.spec.block,
            )
        return marked

    def __reduce__(self) -> tuple[Any, ...]:
        return Marker, (self.spec,)


class Hold:
    """Pre-hook on the submodules of a model that is converted but has not been looked at yet."""

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Raise NotRewrittenError."""
        raise NotRewrittenError(
            "a part of a model that was converted without example_inputs was called before the "
            "model itself: call the model once first, or pass example_inputs= to convert."
        )


def remove_hooks(model: nn.Module, *kinds: type) -> None:
    """Remove hooks of these kinds from all modules of ``model``."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, kinds)]:
                del hooks[key]


def _mark_first(output: Any, weights: list[Tensor], text: str) -> tuple[Any, bool]:
    if isinstance(output, (Tensor, Proxy)):  # a Proxy: torch.fx.symbolic_trace runs hooks too
        return torch.ops.moda_compile.mark(output, weights, text), True
    if isinstance(output, dict):
        for key, item in output.items():
            marked, done = _mark_first(item, weights, text)
            if done:
                output[key] = marked
                return output, True
    if isinstance(output, (tuple, list)):
        items = list(output)
        for i, item in enumerate(items):
            items[i], done = _mark_first(item, weights, text)
            if done:
                named = hasattr(output, "_fields")
                return (type(output)(*items) if named else type(output)(items)), True
    return output, False
