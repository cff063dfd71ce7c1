"""Ordinary training of a converted model equals ordinary training of the oracle.

The oracle is the same model, eager and unconverted, run under `moda_compile.testing.reference`.
In float64 both round at 1e-16, so 1e-9 is far above rounding (a few AdamW steps included, which
divide by the root of tiny second moments) and far below any difference that means something.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moda_compile import MoDAConfig
from moda_compile.testing import RandomStack, reference
from tests.models.cases import (
    IDS,
    PROJECTED,
    TIGHT,
    Oracle,
    assert_gradients,
    convert,
    deep,
    gradients,
    loss_of,
    pair,
)

# --- optimizers, dtypes, modes ------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, PROJECTED], ids=["none", "projected"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_adamw(config: MoDAConfig | None, backend: str) -> None:
    model, oracle = pair(config, backend)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, oracle)]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in oracle.parameters())
    for step in range(4):
        for m, optimizer in zip((model, oracle), optimizers, strict=True):
            loss_of(m((IDS + step) % 29)).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = oracle.state()
    for name, value in model.named_parameters():
        # AdamW turns gradients into steps of lr times their sign, where a gradient that is zero
        # but for rounding (1e-16) still counts as about 1e-8 (its eps) of a step: 1e-9 is enough
        # for that, and a step is 1e-3.
        torch.testing.assert_close(value, expected[name], **TIGHT)


def test_gradient_accumulation() -> None:
    model, oracle = pair(PROJECTED, "aot_eager")
    for m in (model, oracle):
        for ids in (IDS, IDS.flip(1)):
            (loss_of(m(ids)) / 2).backward()
    assert_gradients(model, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_dtype(dtype: torch.dtype) -> None:
    """Converted in float64, then moved; back in float64 it is exact again."""
    model, oracle = pair(PROJECTED)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to(dtype)
    low = Oracle(oracle.model).to(dtype)
    low.new = copy.deepcopy(oracle.new).to(dtype)
    got, eager, exact = model(IDS), low(IDS), oracle(IDS)
    assert got.dtype == dtype
    # The eager oracle in the same dtype sets the measure: a merge of two softmaxes instead of one
    # rounds differently, not more often, so twice its own largest error is generous.
    error = (got.double() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    model.zero_grad()
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    loss_of(model(IDS)).backward()
    loss_of(oracle(IDS)).backward()
    assert_gradients(model, oracle)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.dropout = deep(), nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.stack(ids))


def test_train_and_eval() -> None:
    model = convert(WithDropout())
    expected = reference(deep(), IDS)
    trained = model.train()(IDS)
    kept = trained != 0
    assert 0.3 < kept.double().mean() < 0.7  # of 522, half is dropped, give or take 0.02
    torch.testing.assert_close(trained[kept], 2 * expected[kept], **TIGHT)
    torch.testing.assert_close(model.eval()(IDS), expected, **TIGHT)
    assert (model.train()(IDS) == 0).any()


def test_autocast() -> None:
    """Rotary in float32 makes q, k float32 beside a bfloat16 v; SDPA casts them, and so must we."""
    options = dict(dtype="float32", rotary="half", qk_norm="head")
    model, oracle = pair(PROJECTED, "aot_eager", **options)
    exact = copy.deepcopy(oracle).double()
    for m in (model, oracle):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = m(IDS)
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
    loss_of(exact(IDS)).backward()
    low, high = oracle.gradients(), exact.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        scale = high[name].norm()  # type: ignore[union-attr]
        error = (parameter.grad - high[name]).norm() / scale
        # As in test_to_dtype, in the norm; bfloat16's eps covers gradients that came out lucky.
        bound = 2 * (low[name] - high[name]).norm() / scale + torch.finfo(torch.bfloat16).eps
        assert error <= bound, f"{name}: {error} > {bound}"


def test_accumulator_dtype() -> None:
    """In float32 nothing changes; in bfloat16 every reading layer rounds once more."""
    low = MoDAConfig(accumulator_dtype="model")
    model, oracle = pair(low, "aot_eager")
    loss_of(model(IDS)).backward()
    loss_of(oracle(IDS)).backward()
    assert_gradients(model, oracle)
    errors = {}
    exact = oracle.gradients()
    for choice in ("float32", "model"):
        config = MoDAConfig(accumulator_dtype=choice)  # type: ignore[arg-type]
        half = convert(deep(), config, "aot_eager").bfloat16()
        half(IDS).float().square().mean().backward()
        name = "blocks.0.attention.k.weight"
        name = name if name in exact else next(n for n in exact if "attention" in n)
        grad = dict(half.named_parameters())[name].grad
        errors[choice] = ((grad - exact[name]).norm() / exact[name].norm()).item()  # type: ignore
    # Weights and activations in bfloat16 (eps 0.008) dominate through 3 layers: the accumulator
    # may not make it worse than one more rounding of the whole gradient.
    assert errors["model"] <= errors["float32"] + 2 * torch.finfo(torch.bfloat16).eps


# --- backward, in all ways ----------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, PROJECTED], ids=["none", "projected"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backward_twice(backend: str, config: MoDAConfig | None) -> None:
    """The second pass adds the same again: nothing that the first one read was overwritten."""
    model, oracle = pair(config, backend, layers=3 if backend != "inductor" else 2)
    loss = loss_of(model(IDS))
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss_of(oracle(IDS)).backward()
    assert_gradients(model, oracle)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, once[name] + once[name] + once[name]), name


class Hidden(nn.Module):
    """Also returns the hidden state behind each layer."""

    def __init__(self, model: RandomStack) -> None:
        super().__init__()
        self.stack = model

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        model = self.stack
        x = model.embedding(ids)
        hidden = []
        for block in model.blocks:
            x, _ = block(x, None, x, x)
            hidden.append(x)
        return model.head(model.norm(x)), hidden


class HiddenOracle(Oracle):
    def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
        return reference(Hidden(self.model), ids)


def hidden_pair(backend: str) -> tuple[nn.Module, Oracle]:
    model = deep()
    oracle = HiddenOracle(model)
    return convert(Hidden(copy.deepcopy(model)), None, backend), oracle


def assert_hidden(model: nn.Module, oracle: Oracle) -> None:
    assert_gradients(model.stack, oracle)


def zeros_for_none(model: nn.Module) -> None:
    """A compiled graph gives zeros where eager leaves None: that is AOTAutograd's, not ours."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_losses(backend: str, order: tuple[int, int]) -> None:
    model, oracle = hidden_pair(backend)
    for m in (model, oracle):
        logits, hidden = m(IDS)
        losses = [loss_of(logits), hidden[1].mean()]
        losses[order[0]].backward(retain_graph=True)
        losses[order[1]].backward()
    assert_hidden(model, oracle)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layer", [0, 1])
def test_loss_that_misses_the_last_layers(backend: str, layer: int) -> None:
    model, oracle = hidden_pair(backend)
    for m in (model, oracle):
        loss_of(m(IDS)[1][layer]).backward()
        zeros_for_none(m)
    assert_hidden(model, oracle)


FROZEN: dict[str, Callable[[str], bool]] = {
    "first layers": lambda n: n.startswith(("embedding", "blocks.0", "blocks.1")),
    "middle layer": lambda n: n.startswith("blocks.1"),
    "last layer": lambda n: n.startswith(("blocks.2", "norm", "head")),
    "all but attention of the last": lambda n: not n.startswith("blocks.2.attention"),
    "all but the new": lambda n: "moda_" not in n,
}


@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_frozen_layers(what: str, backend: str) -> None:
    model, oracle = pair(PROJECTED, backend)
    frozen = 0
    for m in (model, oracle.model):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(not FROZEN[what](name))
            frozen += not parameter.requires_grad
    for name, parameter in oracle.new.items():
        parameter.requires_grad_(not FROZEN[what](name.replace("/", ".")))
    assert frozen
    for m in (model, oracle):
        loss_of(m(IDS)).backward()
    assert_gradients(model, oracle)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradient_of_an_input(backend: str) -> None:
    """Through functional use, too: torch.autograd.grad for some of the parameters only."""
    model, oracle = pair(None, backend)
    name = "blocks.0.attention"
    some = [
        [p for n, p in m.named_parameters() if n.startswith(name)] for m in (model, oracle.model)
    ]
    got = torch.autograd.grad(loss_of(model(IDS)), some[0])
    expected = torch.autograd.grad(loss_of(oracle(IDS)), some[1])
    torch.testing.assert_close(got, expected, **TIGHT)
    assert all(p.grad is None for p in model.parameters())
