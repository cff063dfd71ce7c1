"""The marker: an operator in a converted model that says so, and that refuses to run.

A conversion changes the function a model computes, so a converted model must never run without
the rewrite. A forward hook passes one tensor of each block through ``moda_compile::mark``. The
rewrite takes the marks out. Anything else that runs the model (an eager stance, a skipped frame,
another backend, export, a call of an inner module) reaches the operator's kernel, which raises.

The same operator brings new parameters into the graph as ordinary inputs, which a backend can't
do, and carries the conversion's options, so that the graph alone says what it shall become.

A state_dict says so too: two more hooks add an entry with the options to it, and look at that entry
when one is loaded.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from moda_compile.config import MoDAConfig
from moda_compile.errors import InputError, NotRewrittenError, RewriteError

KEY_WEIGHT, VALUE_WEIGHT = "moda_key_weight", "moda_value_weight"
_SPEC = "_moda_mark"  # attribute of a marked module: its Spec as JSON
CONFIG_KEY = "moda_config"
FORMAT = 1  # of that entry: another number is another set of fields, or another meaning of one
_LONGEST = 1 << 16  # bytes of that entry: ours take about a hundred, and a file may say anything


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
        found = json.loads(text)
        return cls(**found | {"config": MoDAConfig(**found["config"])})


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


def attach(module: nn.Module, spec: Spec) -> None:
    """Have the module mark its output.

    Dynamo checks in every call all that it read of a hook. Of a function and a text it reads next
    to nothing, and such a module counts as one that can be passed over while its attributes stay.
    """
    module.__dict__[_SPEC] = spec.to_json()
    module.register_forward_hook(mark_ffn_output if spec.ffn else mark_output)


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`, if it was done."""
    _remove(module, is_marking)
    module.__dict__.pop(_SPEC, None)


def is_marking(hook: object) -> bool:
    """Whether a hook is one of those that :func:`attach` registers."""
    return hook is mark_output or hook is mark_ffn_output


def mark_output(module: nn.Module, _args: Any, output: Any) -> Any:
    """Forward hook that marks the first tensor of a module's output.

    Raises:
        RewriteError: if no tensor is found in it, for an unmarked block would be unguarded.
    """
    return marked(output, getattr(module, _SPEC))


def mark_ffn_output(module: nn.Module, _args: Any, output: Any) -> Any:
    """As :func:`mark_output`, of an FFN that has projection weights."""
    weights = [getattr(module, KEY_WEIGHT), getattr(module, VALUE_WEIGHT)]
    return marked(output, getattr(module, _SPEC), weights)


def marked(output: Any, spec: str, weights: Sequence[Tensor] = ()) -> Any:
    """``output`` with its first tensor marked; structures are rebuilt around that.

    Args:
        output: of a block. spec: of :meth:`Spec.to_json`. weights: that the mark carries.

    Raises:
        RewriteError: if there is no tensor in it.
    """
    found, done = _mark_first(output, list(weights), spec)
    if not done:
        raise RewriteError(
            f"this module returns {type(output).__name__}, in which no tensor can be marked.",
            fix="return a tensor, or a tuple, list or dict with one.",
            block=Spec.from_json(spec).block,
        )
    return found


class Hold:
    """Pre-hook on the submodules of a model that is converted but has not been looked at yet."""

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Raise NotRewrittenError."""
        raise NotRewrittenError(
            "a part of a model that was converted without example_inputs was called before the "
            "model itself: call the model once first, or pass example_inputs= to convert."
        )


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a state_dict says about the conversion that its weights belong to.

    Attributes:
        config: the conversion's options.
        strict: whether every attention had to be rewritten: without, it may be another function.
    """

    config: MoDAConfig
    strict: bool

    def to_tensor(self) -> Tensor:
        """As JSON in a tensor of bytes: the only thing that every format of checkpoint can hold."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    @classmethod
    def from_tensor(cls, entry: object, name: str = CONFIG_KEY) -> Saved:
        """Inverse of :meth:`to_tensor`. Nothing of ``entry`` is run; it may come from anywhere.

        Raises:
            InputError: if it is anything but what :meth:`to_tensor` of this format writes.
        """
        if not isinstance(entry, Tensor) or entry.is_meta:
            raise InputError(f"{name}: got {reprlib.repr(entry)}, expected a tensor of bytes.")
        if entry.dtype != torch.uint8 or entry.dim() != 1 or entry.numel() > _LONGEST:
            raise InputError(
                f"{name}: got {entry.dtype} {list(entry.shape)}, expected the bytes of a JSON text "
                f"(torch.uint8, one dimension, at most {_LONGEST})."
            )
        try:
            found = json.loads(bytes(entry.tolist()).decode())
        except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
            raise InputError(f"{name}: its bytes are no JSON text: {error}") from error
        version = found.get("format") if isinstance(found, dict) else None
        if type(version) is not int or version != FORMAT:
            raise InputError(
                f"{name}: got {reprlib.repr(found)}, expected format {FORMAT}; another version of "
                "moda_compile may have written it."
            )
        _expect_fields(name, found, ("format", "config", "strict"))
        _expect_fields(f"{name}: config", found["config"], [f.name for f in fields(MoDAConfig)])
        if type(found["strict"]) is not bool:
            raise InputError(f"{name}: strict: got {found['strict']!r}, expected true or false.")
        return cls(config=MoDAConfig(**found["config"]), strict=found["strict"])


class WriteConfig:
    """state_dict hook of a converted model: adds the entry that says how it was converted."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved

    def __call__(self, _module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Add the entry."""
        state[prefix + CONFIG_KEY] = self.saved.to_tensor()


class CheckConfig:
    """load_state_dict pre-hook of a converted model: takes that entry out again, or objects."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Compare the entry with the model's own conversion.

        Raises:
            InputError: if it is another conversion's, or is missing and new weights with it.
        """
        key = prefix + CONFIG_KEY
        if key not in state:
            # A plain model's weights are how pretrained ones get in, if they are all there is.
            if self.saved.config.ffn_kv == "projected":
                _refuse_plain(module, state, prefix)
            return
        saved = Saved.from_tensor(state.pop(key), key)  # else load_state_dict finds it unexpected
        if saved != self.saved:
            raise InputError(
                f"{key}: the state_dict is of a model converted with {saved.config}, "
                f"strict={saved.strict}, this model is converted with {self.saved.config}, "
                f"strict={self.saved.strict}. Revert it and use moda_compile.load, which converts "
                f"as the checkpoint says; to load the weights all the same, leave out {key!r}."
            )


def hook_state(model: nn.Module, saved: Saved) -> None:
    """Have ``model``'s state_dict say how it was converted, and load_state_dict look at that."""
    model.register_state_dict_post_hook(WriteConfig(saved))
    model.register_load_state_dict_pre_hook(CheckConfig(saved))
    # torch.distributed.checkpoint and torch.func.functional_call look for what stands behind a name
    # in a state_dict. As a buffer it would be broadcast, averaged and cast with the others.
    model.__dict__[CONFIG_KEY] = saved.to_tensor()


def unhook_state(model: nn.Module) -> None:
    """Undo :func:`hook_state`."""
    remove_hooks(model, WriteConfig, CheckConfig)
    model.__dict__.pop(CONFIG_KEY, None)  # a model pickled by an older version has none


def remove_hooks(model: nn.Module, *kinds: type) -> None:
    """Remove hooks of these kinds from all modules of ``model``."""
    for module in model.modules():
        _remove(module, lambda hook: isinstance(hook, kinds))


def _remove(module: nn.Module, is_meant: Callable[[object], bool]) -> None:
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,  # torch wraps these, and calls what it wraps `hook`
    ):
        for key in [k for k, h in hooks.items() if is_meant(getattr(h, "hook", h))]:
            del hooks[key]


def _expect_fields(name: str, got: object, expected: Iterable[str]) -> None:
    if not isinstance(got, dict) or set(got) != set(expected):
        have = sorted(got) if isinstance(got, dict) else got
        raise InputError(
            f"{name}: got {reprlib.repr(have)}, expected the fields {sorted(expected)}."
        )


def _refuse_plain(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Raise InputError if an FFN's own weights are all in ``state``, but not its projection.

    Part of a state_dict, such as an adapter's, is none of our business: strict=True refuses that.
    """
    for path, ffn in module.named_modules():
        if KEY_WEIGHT not in ffn._parameters:
            continue
        names = [name for name, _ in ffn.named_parameters()]
        own = [n for n in names if n.rpartition(".")[2] not in (KEY_WEIGHT, VALUE_WEIGHT)]
        start = f"{prefix}{path}."
        new = [start + KEY_WEIGHT, start + VALUE_WEIGHT]
        if own and all(start + n in state for n in own) and not all(n in state for n in new):
            raise InputError(
                f"the state_dict is a plain model's: it holds the weights of {prefix}{path} but "
                f"neither {prefix}{CONFIG_KEY} nor {' and '.join(new)}, so the projections that "
                "ffn_kv='projected' adds would stay random. To start from a plain model's weights, "
                "load them first and convert the model afterwards (moda_compile.revert undoes a "
                "conversion)."
            )


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
