"""A converted model computes MoDA or raises; it never returns what the plain model would.

Each way of running a model past the rewrite is tried once, and its outcome is pinned: the oracle's
output, or one error.  The models are in float64, where rounding is 1e-12 of the outputs and the
plain model is more than 0.1 away, so nothing in between can pass for either.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

import moda_compile
from moda_compile import Backend, InputError, NotRewrittenError, RewriteError
from moda_compile.testing import RandomStack, reference
from tests.models.cases import (
    IDS,
    LAYERS,
    Bracketed,
    Stack,
    X,
    assert_moda,
    converted,
    dynamo,
    graph_break,
    stack,
)

BROKEN = rf"holds \d attentions of a converted model's {LAYERS}"


# --- eager stances, limits and switches ---------------------------------------------------------


def narrow(ids: Tensor) -> Tensor:
    return ids.int()


def longer(ids: Tensor) -> Tensor:
    return torch.cat([ids, ids], 1)


def stance(name: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.compiler.set_stance(name)


# (context, whether the model ran before, change of the input): where the model would be run eagerly
EAGER = {
    "force_eager": (stance("force_eager"), False, None),
    "force_eager, warm": (stance("force_eager"), True, None),
    "eager_on_recompile, dtype": (stance("eager_on_recompile"), True, narrow),
    "eager_on_recompile, shape": (stance("eager_on_recompile"), True, longer),
    "eager_on_recompile, cold": (stance("eager_on_recompile"), False, None),
    "dynamo disabled": (lambda: dynamo(disable=True), False, None),
    "dynamo disabled, warm": (lambda: dynamo(disable=True), True, None),
    "recompile limit, dtype": (lambda: dynamo(recompile_limit=1), True, narrow),
    "recompile limit, shape": (lambda: dynamo(recompile_limit=1), True, longer),
    "accumulated limit": (lambda: dynamo(accumulated_recompile_limit=1), True, narrow),
}


@pytest.mark.parametrize("case", EAGER)
def test_eager_fallback_raises(case: str) -> None:
    context, warm, change = EAGER[case]
    model = converted()
    if warm:
        model(IDS)
    with context(), pytest.raises(NotRewrittenError, match="this model was converted to MoDA"):
        model(change(IDS) if change else IDS)


# Contexts under which the rewritten graph runs all the same.
COMPILED = {
    "default": (nullcontext, False),
    "eager_on_recompile, nothing new": (stance("eager_on_recompile"), True),
    "fail_on_recompile, nothing new": (stance("fail_on_recompile"), True),
    "suppress_errors": (lambda: dynamo(suppress_errors=True), False),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_anyway(case: str, expected: Tensor) -> None:
    context, warm = COMPILED[case]
    model = converted()
    if warm:
        model(IDS)
    with context():
        assert_moda(model(IDS), expected)


def test_fail_on_recompile() -> None:
    model = converted()
    model(IDS)
    with torch.compiler.set_stance("fail_on_recompile"):
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            model(IDS.int())


def test_fail_on_recompile_limit() -> None:
    model = converted()
    model(IDS)
    with dynamo(recompile_limit=1, fail_on_recompile_limit_hit=True):
        with pytest.raises(FailOnRecompileLimitHit):
            model(IDS.int())


@pytest.mark.parametrize("case", ["force_eager", "dynamo disabled"])
def test_usable_again_afterwards(case: str, expected: Tensor) -> None:
    context, _, _ = EAGER[case]
    model = converted()
    with context(), pytest.raises(NotRewrittenError):
        model(IDS)
    assert_moda(model(IDS), expected)


def test_recompile_limit_spares_what_is_compiled(expected: Tensor) -> None:
    model = converted()
    model(IDS)
    with dynamo(recompile_limit=1):
        for other in (IDS.int(), IDS[:, :4], IDS[:1]):
            with pytest.raises(NotRewrittenError, match="recompile_limit"):
                model(other)
        assert_moda(model(IDS), expected)


def test_recompile_limit_is_per_model(expected: Tensor) -> None:
    """Models of one class share their forward's code, but not Dynamo's count."""
    with dynamo(recompile_limit=1):
        for _ in range(3):
            assert_moda(converted()(IDS), expected)


# --- torch.compiler.disable and graph breaks ----------------------------------------------------


def test_disable_around_the_model(expected: Tensor) -> None:
    """The conversion compiles its own frame, whoever calls it."""
    model = converted()
    assert_moda(torch.compiler.disable(model)(IDS), expected)
    assert_moda(torch.compiler.disable(lambda ids: model(ids))(IDS), expected)


@pytest.mark.parametrize("wrap", [graph_break, torch.compiler.disable])
@pytest.mark.parametrize("layer", [1, 2])
def test_cut_between_layers(wrap: Callable[..., Any], layer: int) -> None:
    model = moda_compile.convert(stack(layers=3), example_inputs=(IDS,), backend="eager")
    block = model.blocks[layer]
    block.forward = wrap(block.forward)
    with pytest.raises(
        RewriteError, match=r"holds \d attentions of a converted model's 3"
    ) as error:
        model(IDS)
    assert str(error.value).startswith("blocks.")
    assert "graph break" in error.value.reason and "blocks.py:" in str(error.value.source)


def test_cut_in_front_of_the_first_layer() -> None:
    """Inside blocks[0]'s call, so what follows is compiled without the rest of the stack."""
    model = converted()
    model.blocks[0].forward = graph_break(model.blocks[0].forward)
    with pytest.raises(RewriteError, match=BROKEN):
        model(IDS)


def test_first_layer_disabled() -> None:
    model = converted()
    model.blocks[0].forward = torch.compiler.disable(model.blocks[0].forward)
    with pytest.raises(NotRewrittenError, match="blocks.0"):
        model(IDS)


@pytest.mark.parametrize("wrap", [graph_break, torch.compiler.disable])
def test_cut_with_suppressed_errors(wrap: Callable[..., Any]) -> None:
    model = converted()
    model.blocks[1].forward = wrap(model.blocks[1].forward)
    with dynamo(suppress_errors=True), pytest.raises(NotRewrittenError):
        model(IDS)


def test_cut_that_convert_sees() -> None:
    model = stack()
    model.blocks[1].forward = graph_break(model.blocks[1].forward)
    with pytest.raises(RewriteError, match="spread over"):
        moda_compile.convert(model, example_inputs=(IDS,), backend="eager")


@pytest.mark.parametrize("strict", [True, False])
def test_breaks_around_the_stack(strict: bool, expected: Tensor) -> None:
    model = moda_compile.convert(Bracketed(), example_inputs=(IDS,), backend="eager", strict=strict)
    assert_moda(model(IDS), 2 * expected)
    with pytest.raises(NotRewrittenError):
        model.stack(IDS)


# --- other compilers and tracers ----------------------------------------------------------------

OUTER: dict[str, Callable[[], Any]] = {
    "eager": lambda: "eager",
    "aot_eager": lambda: "aot_eager",
    "Backend": lambda: Backend(compiler="eager"),
}


@pytest.mark.parametrize("backend", OUTER)
def test_outer_compile(backend: str, expected: Tensor) -> None:
    model = converted()
    outer = torch.compile(lambda ids: model(ids) * 2, backend=OUTER[backend]())
    assert_moda(outer(IDS), 2 * expected)
    assert_moda(torch.compile(model, backend=OUTER[backend]())(IDS), expected)


@pytest.mark.parametrize("backend", OUTER)
def test_outer_compile_fullgraph(backend: str) -> None:
    model = converted()
    outer = torch.compile(lambda ids: model(ids), backend=OUTER[backend](), fullgraph=True)
    with pytest.raises(Unsupported, match="moda_compile compiles itself"):
        outer(IDS)


@pytest.mark.parametrize("backend", ["inductor", "moda_compile"])
def test_outer_compile_of_a_wrapper(backend: str, expected: Tensor) -> None:
    """Nothing is left for the outer Inductor but the doubling, so this is quick."""
    model = converted()
    pytest.importorskip("torch._inductor")
    name = OUTER["Backend"]() if backend == "moda_compile" else backend
    model.compile(backend=name)  # nn.Module.compile
    assert_moda(model(IDS), expected)


def test_compiled_block_of_a_converted_model(expected: Tensor) -> None:
    """Dynamo inlines what is compiled already: the stack stays in one graph."""
    model = converted()
    model.blocks[1].compile(backend="eager")
    assert_moda(model(IDS), expected)


def test_compiled_block_called_directly() -> None:
    model = converted()
    attention = torch.compile(model.blocks[1].attention, backend="eager")
    with pytest.raises(NotRewrittenError):
        attention(torch.zeros(2, 9, 32, dtype=torch.float64), None, None, None)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    model = converted()
    error = Unsupported if strict else NotRewrittenError
    with pytest.raises(error, match="moda_compile.revert"):
        torch.export.export(model, (IDS,), strict=strict)


def test_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model = converted()
    with pytest.raises(RuntimeError, match="symbolically trace a dynamo-optimized function"):
        make_fx(lambda ids: model(ids))(IDS)


def test_symbolic_trace() -> None:
    """FX traces the class's forward, past the conversion, but through the marked blocks."""
    model = moda_compile.convert(Stack(), example_inputs=(X,), backend="eager")
    traced = torch.fx.symbolic_trace(model)
    with pytest.raises(NotRewrittenError):
        traced(X)


def test_jit_trace() -> None:
    with pytest.raises(RuntimeError, match="dynamo-optimized function"):
        torch.jit.trace(converted(), (IDS,))


# --- calls past the model -----------------------------------------------------------------------


def test_functional_call(expected: Tensor) -> None:
    model = converted()
    assert_moda(torch.func.functional_call(model, dict(model.named_parameters()), (IDS,)), expected)
    halved = {n: nn.Parameter(p.detach() / 2) for n, p in model.named_parameters()}
    twin = stack()
    twin.load_state_dict(halved)
    got = torch.func.functional_call(model, halved, (IDS,))
    assert_moda(got, reference(twin, IDS).detach())


def test_functional_call_with_plain_tensors() -> None:
    """Weights that are no nn.Parameter, and others than the model's own."""
    model, twin = converted(), stack()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    weights = {name: p.detach().clone() for name, p in twin.named_parameters()}
    got = torch.func.functional_call(model, weights, (IDS,))
    assert_moda(got, reference(twin, IDS).detach())


def test_forward_method(expected: Tensor) -> None:
    assert_moda(converted().forward(IDS), expected)


def test_class_forward() -> None:
    """``type(model).forward`` is the plain code, but it runs into the marked blocks."""
    model = converted()
    with pytest.raises(NotRewrittenError):
        type(model).forward(model, IDS)


def tables(model: RandomStack) -> tuple[Any, ...]:
    return None, torch.zeros(9, 8).double(), torch.zeros(9, 8).double()


@pytest.mark.parametrize("path", ["blocks.0", "blocks.1.attention"])
@pytest.mark.parametrize("grad", [True, False])
def test_inner_module(path: str, grad: bool) -> None:
    model = converted()
    x = torch.zeros(2, 9, 32, dtype=torch.float64)
    with torch.set_grad_enabled(grad), pytest.raises(NotRewrittenError, match=path):
        model.get_submodule(path)(x, *tables(model))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def test_inner_model_of_a_wrapper(expected: Tensor) -> None:
    model = moda_compile.convert(Wrapper(), example_inputs=(IDS,), backend="eager")
    with pytest.raises(NotRewrittenError):
        model.inner(IDS)
    assert_moda(model(IDS), expected)


def test_part_of_a_converted_model_is_not_converted_again(expected: Tensor) -> None:
    """Else revert(inner) would take the outer model's guards away."""
    model = moda_compile.convert(Wrapper(), example_inputs=(IDS,), backend="eager")
    with pytest.raises(InputError, match="part of another, converted model"):
        moda_compile.convert(model.inner, example_inputs=(IDS,), backend="eager")
    assert_moda(model(IDS), expected)
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotRewrittenError):
        model(IDS)


def test_shared_trunk(expected: Tensor) -> None:
    first = moda_compile.convert(Wrapper(), example_inputs=(IDS,), backend="eager")
    second = Wrapper()
    second.inner = first.inner
    with pytest.raises(NotRewrittenError):
        second(IDS)
    with pytest.raises(InputError, match="part of another, converted model"):
        moda_compile.convert(second, example_inputs=(IDS,), backend="eager")
    assert_moda(first(IDS), expected)


class InRoot(nn.Module):
    """The attentions are in the model's own forward: there is no module to put a mark on."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for qkv in self.qkv:
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.transpose(1, 2).flatten(2)
        return x


def test_attention_in_the_root() -> None:
    model, x = InRoot(), torch.randn(2, 9, 32, dtype=torch.float64)
    moda, plain = reference(model, x).detach(), model(x).detach()
    moda_compile.convert(model, example_inputs=(x,), backend="eager")
    assert_moda(model(x), moda)
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotRewrittenError):
        model(x)
    with dynamo(recompile_limit=1), pytest.raises(NotRewrittenError):
        model(x[:, :4])
    # Known limit: the class's own function, called past the object, is the plain model. No hook
    # is passed on the way; model.forward(x) and model(x) are guarded.
    assert_moda(type(model).forward(model, x), plain)


class Boxed:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class BoxedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Boxed:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return Boxed(attended.transpose(1, 2).flatten(2))


class BoxedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BoxedAttention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).hidden
        return x


def test_block_that_can_not_be_marked() -> None:
    """Its output is an object that no mark can go through, so it would run unguarded."""
    model = moda_compile.convert(
        BoxedStack(), example_inputs=(torch.zeros(2, 9, 32),), backend="eager"
    )
    with pytest.raises(RewriteError):
        model(torch.zeros(2, 9, 32))
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(RewriteError, match="no tensor can be marked"):
            model(torch.zeros(2, 9, 32))


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_converted(
    duplicate: Callable[[nn.Module], nn.Module], warm: bool, expected: Tensor
) -> None:
    model = converted()
    if warm:
        model(IDS)
    twin = duplicate(model)
    assert_moda(twin(IDS), expected)
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotRewrittenError):
        twin(IDS)
    moda_compile.revert(twin)  # and their conversion is their own
    assert torch.equal(twin(IDS), stack()(IDS))
    assert_moda(model(IDS), expected)


def test_shallow_copy_is_the_model(expected: Tensor) -> None:
    assert_moda(copy.copy(converted())(IDS), expected)


# --- converted before anything is known ---------------------------------------------------------


def test_without_example_inputs(expected: Tensor) -> None:
    model = converted(example_inputs=None)
    x = torch.zeros(2, 9, 32, dtype=torch.float64)
    for part in (model.blocks[1], model.blocks[0].attention):
        with pytest.raises(NotRewrittenError, match="call the model once first"):
            part(x, *tables(model))
    with pytest.raises(NotRewrittenError, match="call the model once first"):
        type(model).forward(model, IDS)
    assert_moda(model(IDS), expected)
    with pytest.raises(NotRewrittenError, match="blocks.0.attention"):
        model.blocks[0].attention(x, *tables(model))


def test_without_example_inputs_under_an_eager_stance(expected: Tensor) -> None:
    model = converted(example_inputs=None)
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotRewrittenError):
        model(IDS)
    assert_moda(model(IDS), expected)


def test_without_example_inputs_a_failing_first_call() -> None:
    model = converted(example_inputs=None)
    model.blocks[1].forward = graph_break(model.blocks[1].forward)
    for _ in range(2):  # and it stays guarded
        with pytest.raises(RewriteError, match="spread over"):
            model(IDS)
        with pytest.raises(NotRewrittenError):
            type(model).forward(model, IDS)
