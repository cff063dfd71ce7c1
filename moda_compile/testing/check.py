"""One call that holds a conversion to everything it promises, against the float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

import moda_compile
from moda_compile.backend import Compiler
from moda_compile.config import MoDAConfig
from moda_compile.testing.reference import FFNSlots, Functions, ReferenceMode, StackOf
from moda_compile.testing.stacks import RandomPair, RandomStack

Inputs = tuple[Any, ...] | Mapping[str, Any]

#: Builds the FFN oracle for one copy of the model (the float64 one, then the one in the model's
#: dtype), given the converted model's parameters by name in that dtype.
FFNSlotsFactory = Callable[[nn.Module, Mapping[str, Tensor]], FFNSlots]

NEW_PARAMETERS = ("moda_key_weight", "moda_value_weight")
CONFIG_ENTRY = "moda_config"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Rounding allowed on top of the eager oracle's own error, which is one draw of a random thing.

    The sum of `condition * c`, `rtol * eps * max|expected|` and `atol * eps * max|any gradient|`,
    with eps of the model's dtype, and c how far the exact result moves when every parameter is
    rounded once more.

    Attributes:
        condition: a right conversion in another order of operations (two softmaxes merged by their
            lse) needed up to 2.4 in float32 and 0.4 in bfloat16, over 150 random stacks each: give
            1 for bfloat16.  Without c it needed up to 47 eps, as post-norm stacks may be
            ill-conditioned, and that would be far too much for all others.
        rtol: a few roundings of the result itself.
        atol: what remains where an exact gradient cancels to zero (a key's bias under softmax).
    """

    condition: float = 4.0
    rtol: float = 4.0
    atol: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor against the oracle: `error <= eager_error + budget` is what was required.

    Attributes:
        name: "output[i]" or "gradient of <parameter>".
        error: largest absolute difference, converted model to float64 oracle.
        eager_error: the same for the eager oracle in the model's own dtype.
        budget: the rounding allowed on top.
        conditioning: what one rounding of every parameter does to the exact result.
    """

    name: str
    error: float
    eager_error: float
    budget: float
    conditioning: float

    @property
    def ok(self) -> bool:
        """Whether the error is within bounds (NaN is not)."""
        return self.error <= self.eager_error + self.budget


@dataclass(frozen=True, kw_only=True)
class _Run:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def check_conversion(
    model: nn.Module,
    inputs: Inputs,
    config: MoDAConfig | None = None,
    *,
    backend: Compiler = "inductor",
    ffn_slots: FFNSlotsFactory | None = None,
    stacks: StackOf | None = None,
    functions: Functions | None = None,
    oracle: nn.Module | None = None,
    outputs: Callable[[Any], Any] | None = None,
    more: Sequence[Inputs] = (),
    compilations: int | None = None,
    autocast: torch.dtype | None = None,
    explain: bool = True,
    budget: Budget | None = None,
) -> list[Comparison]:
    """Convert a copy of `model` and require everything that `moda_compile.convert` promises.

    Required: outputs and the gradient of every parameter (also the new ones) equal the float64
    oracle up to the error that the eager oracle makes in the model's own dtype, plus `budget`;
    converting twice is converting once; class, `state_dict` keys and values stay (`moda_config`
    joins them, and under `ffn_kv="projected"` the new parameters); `moda_compile.explain` lists
    every attention call; `revert` restores state and outputs bitwise.  The loss is a fixed random
    projection of the outputs.  Calls `torch._dynamo.reset()`.

    Args:
        model: eager, unconverted, without dropout; not modified.
        inputs: arguments of one forward pass, a tuple (positional) or a mapping (keywords).
        config: default `MoDAConfig()`.
        backend: as for `convert`.
        ffn_slots: the FFN oracle if `config.ffn_kv` is not "none".
        stacks, functions: for `ReferenceMode`: which stack each attention call belongs to, and
            attention functions beside SDPA.  A `RandomStack` or `RandomPair` knows them itself, and
            `ffn_slots`.
        oracle: an eager model with parameters of the same names and values whose attentions the
            oracle can see (an SDPA twin of attention written by hand); default `model` itself.
        outputs: what of the model's return value is compared and differentiated; default: all
            floating tensors.
        more: arguments of further forward passes of the same converted model, of other lengths or
            batches; each is held to the oracle too.
        compilations: at most so many over all passes; None does not count.
        autocast: run model, conversion and eager oracle under `torch.autocast` to this dtype.
        explain: whether to look at `moda_compile.explain` as well, a third of the time taken.
        budget: how much rounding to allow on top of the eager oracle's own error.

    Returns:
        The comparisons, all of them ok (none for `depth=False`, which has to be bitwise the model).

    Raises:
        AssertionError: with got, expected and, for a `RandomStack`, a runnable reproduction.
    """
    config = MoDAConfig() if config is None else config
    check = _Check(
        model=model,
        config=config,
        backend=backend,
        ffn_slots=ffn_slots,
        told={"stacks": stacks, "functions": functions},
        oracle=model if oracle is None else oracle,
        outputs=(lambda output: output) if outputs is None else outputs,
        autocast=autocast,
        budget=budget or Budget(),
    )
    try:
        return check.run([inputs, *more], compilations, explain)
    except AssertionError as error:
        if isinstance(model, (RandomStack, RandomPair)):
            error.args = (f"{error}\n{_reproduction(model, config, backend)}",)
        raise


@dataclass(frozen=True, kw_only=True)
class _Check:
    """The arguments of `check_conversion`, which says what they are."""

    model: nn.Module
    config: MoDAConfig
    backend: Compiler
    ffn_slots: FFNSlotsFactory | None
    told: dict[str, Any]
    oracle: nn.Module
    outputs: Callable[[Any], Any]
    autocast: torch.dtype | None
    budget: Budget

    def run(
        self, inputs: Sequence[Inputs], compilations: int | None, explain: bool
    ) -> list[Comparison]:
        """All of it."""
        model, config = self.model, self.config
        known = isinstance(self.oracle, (RandomStack, RandomPair))
        if self.ffn_slots is None and not known and config.ffn_kv != "none":
            raise AssertionError(
                f"ffn_kv={config.ffn_kv!r}: got ffn_slots=None, expected its oracle"
            )
        args, kwargs = _split(inputs[0])
        torch._dynamo.reset()  # stacks share code objects: stale entries hit the recompile limit
        original = copy.deepcopy(model)
        plain = self.forward(original, args, kwargs)

        converted = copy.deepcopy(model)
        example = args or kwargs
        options: dict[str, Any] = {"example_inputs": example, "backend": self.backend}
        with torch.random.fork_rng(), self.low():
            torch.manual_seed(0)  # new parameters are drawn: a reproduction has to draw the same
            result = moda_compile.convert(converted, config, **options)
            _expect("convert returns the same object", result is converted, True)
            _check_state(original, converted, config)
            once = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
            moda_compile.convert(converted, config, **options)
        _same_state("converting twice", converted.state_dict(), once)

        comparisons: list[Comparison] = []
        if config.depth:
            calls = 0
            counters["stats"].pop("unique_graphs", None)
            for number, one in enumerate(inputs):
                name = f"call {number}: " if number else ""
                found, calls = self.compare(converted, *_split(one), name)
                comparisons += found
            compiled = counters["stats"].get("unique_graphs", 0)
            if compilations is not None and compiled > compilations:
                raise AssertionError(f"got {compiled} compilations, expected <= {compilations}")
            if explain:
                with self.low():
                    twin = copy.deepcopy(model)
                    report = moda_compile.explain(twin, *args, config=config, **kwargs)
                _expect("explain: number of attentions", len(report.attentions), calls)
        else:  # the ablation: nothing may change, so the oracle is the model itself
            for one in inputs:
                got, expected = (self.forward(m, *_split(one)) for m in (converted, original))
                _same_outputs("depth=False", got, expected)

        moda_compile.revert(converted)
        _expect("revert: class", type(converted), type(original))
        _same_state("revert", converted.state_dict(), original.state_dict())
        _expect("revert: module attributes", _attributes(converted), _attributes(original))
        _same_outputs("revert", self.forward(converted, args, kwargs), plain)
        return comparisons

    def low(self) -> AbstractContextManager[Any]:
        """Autocast, if asked for."""
        if self.autocast is None:
            return nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.autocast)

    def forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tensors of one forward pass that count."""
        with self.low():
            return _tensors(self.outputs(model(*args, **kwargs)))

    def compare(
        self, converted: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> tuple[list[Comparison], int]:
        """One pass against the oracle; also the oracle's number of attention calls."""
        with self.low():
            got = _run(converted, args, kwargs, self.outputs)
        new = {
            name: parameter
            for name, parameter in converted.named_parameters()
            if name.rpartition(".")[2] in NEW_PARAMETERS
        }
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        dtypes += [self.autocast] if self.autocast is not None else []
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        expected, calls = self.reference(args, kwargs, new, exact=True)
        with self.low():
            eager, _ = self.reference(args, kwargs, new, exact=False)
        shaken, _ = self.reference(args, kwargs, new, exact=True, noise=eps)
        return _compare(got, expected, eager, shaken, eps, self.budget, name), calls

    def reference(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        new: Mapping[str, Tensor],
        *,
        exact: bool,
        noise: float = 0.0,
    ) -> tuple[_Run, int]:
        """Run the oracle, in float64 if `exact`; also return its number of attention calls.

        With `noise`, every parameter is first multiplied by `1 + noise * x`, x standard normal.
        """

        def cast(tensor: Tensor) -> Tensor:
            wide = exact and tensor.is_floating_point()
            return tensor.to(torch.float64) if wide else tensor

        twin = copy.deepcopy(self.oracle)
        twin = twin.to(torch.float64) if exact else twin
        for module in twin.modules():
            if isinstance(module, RandomStack):
                module.checkpoint = False
        leaves = {name: cast(p.detach()).clone().requires_grad_() for name, p in new.items()}
        if noise:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in (*twin.parameters(), *leaves.values()):
                    shake = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.mul_(1.0 + noise * shake.to(parameter))
        told = self.told
        if isinstance(twin, (RandomStack, RandomPair)):
            told = twin.oracle(self.config.ffn_kv, leaves)
        if self.ffn_slots is not None:
            told = told | {"ffn_slots": self.ffn_slots(twin, leaves)}
        mode = ReferenceMode(twin, **told)
        args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        with mode:
            run = _run(twin, args, kwargs, self.outputs, leaves)
        return run, mode.attentions


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    choose: Callable[[Any], Any],
    extra: Mapping[str, Tensor] | None = None,
) -> _Run:
    """Outputs and gradients, in float64, of a fixed random projection of the outputs."""
    model.zero_grad(set_to_none=True)
    outputs = _tensors(choose(model(*args, **kwargs)))
    generator = torch.Generator().manual_seed(0)
    projections = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs
    ]
    torch.autograd.backward(outputs, projections)
    parameters = dict(model.named_parameters()) | dict(extra or {})
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in parameters.items()
        if p.requires_grad
    }
    return _Run(
        outputs=[out.detach().double() for out in outputs],
        gradients={name: gradient.double() for name, gradient in gradients.items()},
    )


def _compare(
    got: _Run,
    expected: _Run,
    eager: _Run,
    shaken: _Run,
    eps: float,
    budget: Budget,
    prefix: str,
) -> list[Comparison]:
    _expect("parameters", sorted(got.gradients), sorted(expected.gradients))
    _expect("number of outputs", len(got.outputs), len(expected.outputs))
    names = [f"{prefix}output[{i}]" for i in range(len(got.outputs))]
    names += [f"{prefix}gradient of {name}" for name in expected.gradients]
    runs = (got, expected, eager, shaken)
    columns = [[*r.outputs, *(r.gradients[name] for name in expected.gradients)] for r in runs]
    largest = max((g.abs().max().item() for g in expected.gradients.values()), default=0.0)
    comparisons = []
    for name, converted, oracle, low, other in zip(names, *columns, strict=True):
        _expect(f"{name}: shape", tuple(converted.shape), tuple(oracle.shape))
        conditioning = (other - oracle).abs().max().item()
        comparison = Comparison(
            name=name,
            error=(converted - oracle).abs().max().item(),
            eager_error=(low - oracle).abs().max().item(),
            budget=budget.condition * conditioning
            + eps * (budget.rtol * oracle.abs().max().item() + budget.atol * largest),
            conditioning=conditioning,
        )
        comparisons.append(comparison)
    bad = [str(comparison) for comparison in comparisons if not comparison.ok]
    if bad:
        head = f"{len(bad)} of {len(comparisons)} tensors are off: got error, expected at most"
        raise AssertionError("\n".join([f"{head} eager_error + budget", *bad]))
    return comparisons


def _check_state(original: nn.Module, converted: nn.Module, config: MoDAConfig) -> None:
    """Class unchanged; old entries bitwise kept; new ones only for "projected", rightly named."""
    _expect("class", type(converted), type(original))
    before, after = original.state_dict(), converted.state_dict()
    added = [name for name in after if name not in before and name != CONFIG_ENTRY]
    if config.ffn_kv == "projected":
        added = [name for name in added if name.rpartition(".")[2] not in NEW_PARAMETERS]
    _expect(f"state_dict keys added under ffn_kv={config.ffn_kv!r}", added, [])
    _same_state("convert", {name: after[name] for name in after if name in before}, before)


def _same_state(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    _expect(f"{what}: state_dict keys", sorted(got), sorted(expected))
    changed = [name for name in expected if not torch.equal(got[name], expected[name])]
    _expect(f"{what}: state_dict entries with other values", changed, [])


def _same_outputs(what: str, got: list[Tensor], expected: list[Tensor]) -> None:
    for index, (left, right) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(left, right):
            gap = (left - right).abs().max().item()
            raise AssertionError(f"{what}: output[{index}] is {gap} off, expected bitwise equality")


def _attributes(model: nn.Module) -> dict[str, list[str]]:
    """Instance attributes and number of hooks of every module: what a conversion could leave."""
    found = {}
    for path, module in model.named_modules():
        # nn.Module itself declares this one on the class; None on the instance is the same state.
        names = {name for name in vars(module) if name != "_compiled_call_impl"}
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        found[path] = [*sorted(names), *(str(len(hook)) for hook in hooks)]
    return found


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of a model's output, caches and other objects left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise AssertionError(f"{what}: got {got}, expected {expected}")


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _reproduction(model: RandomStack | RandomPair, config: MoDAConfig, backend: Compiler) -> str:
    return (
        "reproduce:\n"
        "    from moda_compile import MoDAConfig\n"
        "    from moda_compile.testing import *\n"
        f"    model = {model!r}\n"
        f"    check_conversion(model, model.config.inputs(), {config!r}, backend={backend!r})"
    )
