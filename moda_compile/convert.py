"""convert, revert and explain: the public face."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import Node

from moda_compile import capture, fx, garbage, markers, pipeline
from moda_compile.backend import Compilation, Compiler, in_ddp
from moda_compile.config import MoDAConfig
from moda_compile.errors import InputError, MoDAError, NotRewrittenError, RewriteError
from moda_compile.markers import (
    CONFIG_KEY,
    KEY_WEIGHT,
    VALUE_WEIGHT,
    Hold,
    Saved,
    Spec,
    hook_state,
    remove_hooks,
    unhook_state,
)
from moda_compile.plan import Plan
from moda_compile.report import AttentionReport, Report
from moda_compile.summary import summarize

Model = TypeVar("Model", bound=nn.Module)
ExampleInputs = tuple[Any, ...] | Mapping[str, Any]


def convert(
    model: Model,
    config: MoDAConfig | None = None,
    example_inputs: ExampleInputs | None = None,
    backend: Compiler = "inductor",
    strict: bool = True,
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Model:
    """Turn ``model`` into a Mixture-of-Depths Attention model, in place.

    From then on ``model(...)`` runs, compiled, with each attention also attending to the keys and
    values of all earlier layers at the same token (paper arXiv 2603.15619). The object, its class,
    its methods and the keys of its state_dict stay; ``ffn_kv="projected"`` adds parameters. Build
    the optimizer afterwards. Where the model would run without the rewrite, it raises
    :class:`~moda_compile.errors.NotRewrittenError`.

    The state_dict gains one entry, ``moda_config``, which says how the model was converted: see
    :func:`moda_compile.load`. A state_dict with another one can't be loaded into it; a plain
    model's, without any, can, unless the conversion added parameters: they would stay random.

    Args:
        model: a transformer whose attentions are ``F.scaled_dot_product_attention``.
        config: the options; default ``MoDAConfig()``.
        example_inputs: a tuple of positional or a dict of keyword arguments of ``model``. Only
            shapes, dtypes and devices matter; nothing is run. With ``None``, the model is looked
            at in its first call, and mistakes are found only then.
        backend: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"``, ``"eager"``.
        strict: if False, attentions that can't be rewritten are left as they are; see
            :func:`explain` for which.
        mode: Inductor's, such as ``"reduce-overhead"`` or ``"max-autotune"``.
        options: of Inductor, on top of the mode's; see ``torch._inductor.list_options()``.
        dynamic: as for ``torch.compile``: True takes every size as variable from the start, False
            none; with ``None`` a size is, once it has changed.

    Returns:
        ``model`` itself. Converting it again with the same options changes nothing.

    Raises:
        InputError: for bad arguments, or a model that is converted already with other options.
        RewriteError: if no attention is found, or one can't be rewritten. ``model`` is then as it
            was.
    """
    config = MoDAConfig() if config is None else config
    if not isinstance(config, MoDAConfig):
        raise InputError(f"config: got {type(config).__name__}, expected a MoDAConfig.")
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    if isinstance(model, OptimizedModule):
        raise InputError(
            "model: got what torch.compile returned; pass the model itself (model._orig_mod): "
            "a converted model is compiled in any case."
        )
    options = dict(options) if options else None
    compilation = Compilation(backend=backend, mode=mode, options=options, dynamic=dynamic)
    args, kwargs = _arguments(example_inputs)
    existing = _conversion(model)
    if existing is not None:
        asked = (config, strict, compilation)
        if (existing.config, existing.strict, existing.compilation) == asked:
            return model
        raise InputError(
            f"the model is converted already, with {existing.config}, strict={existing.strict} and "
            f"{existing.compilation}; call moda_compile.revert(model) first."
        )
    for path, module in model.named_modules():
        if _conversion(module) is not None:
            raise InputError(f"the submodule {path} is converted already; revert it first.")
        if any(markers.is_marking(hook) or isinstance(hook, Hold) for hook in _hooks(module)):
            raise InputError(
                f"{path or 'the model'} is part of another, converted model, which would lose its "
                "guards when this one is reverted; revert that one first."
            )
    if hasattr(model, CONFIG_KEY):
        raise InputError(f"model: it has an attribute {CONFIG_KEY} already; rename it.")
    conversion = _Conversion(model, config, compilation, strict)
    if example_inputs is not None:
        conversion.attach(args, kwargs)
    elif config.ffn_kv == "projected":
        raise InputError(
            "ffn_kv='projected' adds parameters, which must exist before the optimizer is built: "
            "pass example_inputs=."
        )
    else:
        conversion.hold()
    hook_state(model, Saved(config=config, strict=strict))
    model.__dict__["forward"] = conversion
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert` exactly. New parameters are removed with their values.

    Returns:
        ``model`` itself.

    Raises:
        InputError: if ``model`` is not converted.
    """
    conversion = _conversion(model)
    if conversion is None:
        raise InputError("the model is not converted.")
    conversion.detach()
    unhook_state(model)
    del model.__dict__["forward"]
    if conversion.original is not None:
        model.__dict__["forward"] = conversion.original
    return model


def explain(
    model: nn.Module, *args: Any, config: MoDAConfig | None = None, **kwargs: Any
) -> Report:
    """Say what :func:`convert` would do, and what it costs. Nothing is changed or run.

    Args:
        model: the model, converted or not.
        *args, **kwargs: arguments of ``model``; only shapes, dtypes and devices matter.
        config: the options; default ``MoDAConfig()``, or a converted model's own.

    Returns:
        A report of every attention in order, with refusals and their reasons, and the conversion's
        cost for these shapes. ``str(report)`` is a table.
    """
    conversion = _conversion(model)
    config = config or (conversion.config if conversion is not None else MoDAConfig())
    plans: list[Plan] = []
    try:
        plans = _plans(model, args, kwargs, config, strict=False)
        return summarize(_whole(plans, model, args, kwargs, config, strict=False))
    except RewriteError as error:  # what no choice of strict gets around
        refused = AttentionReport(
            block=error.block or "",
            source=error.source,
            pattern="",
            refusal=f"{error.reason} To fix: {error.fix}",
        )
        others = (refusal for plan in plans for refusal in summarize(plan).refusals)
        return Report(config=config, attentions=(), refusals=(refused, *others))


def _arguments(example_inputs: ExampleInputs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs: got {type(example_inputs).__name__}, expected a tuple of positional or "
        "a dict of keyword arguments."
    )


def _conversion(module: nn.Module) -> _Conversion | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, _Conversion) else None


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward as a function that takes the model first."""
    own = model.__dict__.get("forward")
    if isinstance(own, _Conversion):
        own = own.original
    if own is None:
        return type(model).forward
    return lambda _self, *args, **kwargs: own(*args, **kwargs)


def _analyse(
    model: nn.Module, args: Any, kwargs: dict[str, Any], config: MoDAConfig, *, strict: bool
) -> Plan:
    """The plan for the one graph of ``model`` that holds its attentions."""
    plans = _plans(model, args, kwargs, config, strict=strict)
    return _whole(plans, model, args, kwargs, config, strict=strict)


def _plans(
    model: nn.Module, args: Any, kwargs: dict[str, Any], config: MoDAConfig, *, strict: bool
) -> list[Plan]:
    """One for each graph of ``model`` that holds attentions."""
    with garbage.only_young():
        graphs = capture.graphs(model, _forward_of(model), args, kwargs)
        found = [pipeline.analyse(gm, config, strict=strict) for gm in graphs]
    return [plan for plan in found if plan.attentions or plan.refusals]


def _whole(
    plans: list[Plan],
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    config: MoDAConfig,
    *,
    strict: bool,
) -> Plan:
    """The only plan, or an empty one; more than one is an error."""
    if len(plans) > 1:
        last = [*(a.node for a in plans[0].attentions), *(r.node for r in plans[0].refusals)][-1]
        reason, place = capture.first_break(model, _forward_of(model), args, kwargs) or ("", None)
        first = f" (The first break is at {place}: {reason}.)" if place is not None else ""
        raise RewriteError(
            f"the model's attentions are spread over {len(plans)} graphs: a graph break behind "
            f"this block cuts the stack, and depth KV can't cross it.{first}",
            fix="find the break with torch._dynamo.explain(model)(*inputs) and remove it.",
            block=fx.module_path(last),
            source=fx.source_line(last),
        )
    return plans[0] if plans else Plan(config=config, strict=strict)


class _Conversion:
    """What stands in for a converted model's ``forward``; holds all that revert needs.

    It is the instance's ``forward`` attribute, so it is called by ``model(...)`` and by
    ``model.forward(...)`` alike, and goes along in deepcopy and pickle.
    """

    def __init__(
        self, model: nn.Module, config: MoDAConfig, compilation: Compilation, strict: bool
    ) -> None:
        self.model, self.config, self.strict = model, config, strict
        self.compilation = compilation
        self.original = model.__dict__.get("forward")
        self.attentions: int | None = None  # unknown before the model has been looked at
        self.root_spec: str | None = None  # of the mark on the model's own output
        self.added: list[str] = []  # modules that gained parameters
        self.spelled_out = capture.has_torch_s_attention(model)
        self._compiled: Callable[..., Any] | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(_forward_of(self.model))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> Any:
        # torch.export looks at it before it calls the model, which then says what is wrong.
        return getattr(_forward_of(self.model), "__code__", _run.__code__)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # To Dynamo before torch 2.13 everything is an export; what it may not do says `_run`.
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            raise NotRewrittenError(
                "model: this model was converted to MoDA, which torch.export can't carry along; "
                "export it after moda_compile.revert(model)."
            )
        return _run(self, args, kwargs)

    @property
    def is_new(self) -> bool:
        """Whether the next call is the first, which compiles."""
        return self._compiled is None

    def compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The compiled forward; at the first call, look at the model and ready it first."""
        if self.attentions is None:
            self._attach_late(args, kwargs)
        if self._compiled is None:
            traced = capture.entry(_forward_of(self.model), self.root_spec)
            self._compiled = self.compilation.compile(
                traced, self.config, strict=self.strict, attentions=self.attentions
            )
        return self._compiled

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the model, then add markers and parameters; all of it or nothing."""
        plan = _analyse(self.model, args, kwargs, self.config, strict=self.strict)
        if not plan.attentions:
            raise _nothing_found(plan)
        parameters, marks = _additions(self.model, plan)
        for module, weights in parameters:
            for name, weight in weights.items():
                module.register_parameter(name, weight)
        for path, spec in marks.items():
            if path:
                markers.attach(_module(self.model, path), spec)
            else:
                self.root_spec = spec.to_json()
        self.added = [path for path, spec in marks.items() if spec.ffn]
        self.attentions = len(plan.attentions)

    def detach(self) -> None:
        """Take markers and parameters out again."""
        remove_hooks(self.model, Hold)
        for module in self.model.modules():
            markers.detach(module)
        for path in self.added:
            module = _module(self.model, path)
            del module._parameters[KEY_WEIGHT], module._parameters[VALUE_WEIGHT]

    def hold(self) -> None:
        """Until the first call has looked at the model, no submodule may run by itself."""
        for module in self.model.modules():
            if module is not self.model:
                module.register_forward_pre_hook(Hold())

    def _attach_late(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.detach()
        try:
            self.attach(args, kwargs)
        except BaseException:
            self.hold()
            raise


# Under somebody else's torch.compile this frame is left out of the outer graph, but what it calls
# is compiled as ever; under the outer fullgraph=True that is an error, as it must be. The compiled
# forward is called from this very frame: Dynamo would put it into the graph of any other.
@torch.compiler.disable(
    recursive=False,
    reason="a model converted by moda_compile compiles itself: it can't be part of an outer "
    "fullgraph=True or of torch.export. moda_compile.revert(model) undoes the conversion",
)
def _run(conversion: _Conversion, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch._dynamo.config.disable:  # else Dynamo would skip the frame, and ever after
        raise NotRewrittenError(
            "model: this model was converted to MoDA but Dynamo is disabled "
            "(torch._dynamo.config.disable or TORCH_COMPILE_DISABLE=1), so it would run without "
            "the rewrite. Enable it, or undo the conversion with moda_compile.revert(model)."
        )
    young = garbage.only_young() if conversion.is_new else nullcontext()
    compiled = conversion.compiled(args, kwargs)
    try:
        # DDP around the model would have Dynamo split the stack into one graph per bucket.
        # Elsewhere the option is let alone, for setting it takes as long as two launches, and so
        # does spelling out what is not there.
        unsplit = torch._dynamo.config.patch(optimize_ddp=False) if in_ddp() else nullcontext()
        spelled_out = capture.spelled_out() if conversion.spelled_out else nullcontext()
        with young, unsplit, spelled_out:
            return compiled(conversion.model, *args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, MoDAError):
            raise failure.inner_exception from None
        raise


def _nothing_found(plan: Plan) -> RewriteError:
    if plan.refusals:
        return plan.refusals[0].error()
    return RewriteError(
        "no attention was found in the model's graph.",
        fix="torch._dynamo.explain(model)(*inputs) shows what Dynamo skips; an attention that the "
        "library does not know is taught with moda_compile.register_pattern.",
    )


def _additions(
    model: nn.Module, plan: Plan
) -> tuple[list[tuple[nn.Module, dict[str, nn.Parameter]]], dict[str, Spec]]:
    """New parameters by module, and marks by path; nothing is attached yet."""
    if not plan.slots:
        return [], {}  # the rewrite will change nothing, so nothing needs guarding
    names: dict[nn.Module, str] = {}  # a module that has several names goes by the first

    def name_of(path: str) -> str:
        return names.setdefault(_module(model, path), path)

    writers = [s for s in plan.slots if s.ffn is not None and plan.config.ffn_kv == "projected"]
    paths = [name_of(slot.ffn.path) for slot in writers if slot.ffn is not None]
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    first: dict[str, Node] = {}
    for slot, path in zip(writers, paths, strict=True):
        assert slot.ffn is not None and slot.key is not None and slot.value is not None
        module = _module(model, path)
        if first.setdefault(path, slot.ffn.weight) is not slot.ffn.weight or path == "":
            raise RewriteError(
                "this feed-forward network has no module of its own to hold its K/V projection.",
                fix="put each FFN into an nn.Module of its own, or use ffn_kv='shared' or 'none'.",
                block=path,
                source=fx.source_line(slot.ffn.node),
            )
        if path in parameters:
            continue  # the same module, called once more
        if hasattr(module, KEY_WEIGHT):
            raise RewriteError(
                f"this feed-forward network's module has an attribute {KEY_WEIGHT} already.",
                fix="rename it, or use ffn_kv='shared' or 'none'.",
                block=path,
                source=fx.source_line(slot.ffn.node),
            )
        width = int(fx.value(slot.ffn.input).shape[-1])
        like = fx.value(slot.ffn.weight)
        parameters[path] = {
            KEY_WEIGHT: _new_weight(slot.key.width, width, like),
            VALUE_WEIGHT: _new_weight(slot.value.width, width, like),
        }
    marks: dict[str, Spec] = {}
    attentions = [name_of(fx.module_path(a.node)) for a in plan.attentions]
    for path in dict.fromkeys([*attentions, *paths]):
        marks[path] = Spec(
            block=path or type(model).__name__,
            config=plan.config,
            attentions=len(plan.attentions),
            strict=plan.strict,
            ffn=path in parameters,
        )
    return [(_module(model, path), weights) for path, weights in parameters.items()], marks


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise RewriteError(
            f"the graph holds a module under the name {path!r}, which the model does not have: a "
            "forward was replaced by a function that comes to its modules past self.",
            fix="define that forward in the module's class.",
        ) from None


def _new_weight(rows: int, columns: int, like: Tensor) -> nn.Parameter:
    """[rows, columns], initialised as nn.Linear does."""
    linear = nn.Linear(columns, rows, bias=False, dtype=like.dtype, device=like.device)
    return nn.Parameter(linear.weight.detach())
