"""Families that are refused say why and what to do; strict=False converts what it can."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

import moda_compile  # noqa: E402
from moda_compile import RewriteError  # noqa: E402
from moda_compile.testing import reference  # noqa: E402
from tests.models.families.check import refusal, small  # noqa: E402
from tests.models.families.table import NOT_CONVERTED, load  # noqa: E402


@pytest.mark.parametrize("name", NOT_CONVERTED)
def test_refused(name: str) -> None:
    """By convert and explain alike, in the words that the README's table shows."""
    family = NOT_CONVERTED[name]
    model, inputs = small(family), family.inputs("none")
    error = refusal(model, inputs)
    assert family.says in error.reason
    assert family.fix in error.fix
    told = load()["refused"][name]
    assert (told["reason"], told["fix"]) == (error.reason, error.fix)
    report = moda_compile.explain(model, **inputs)
    assert not report.attentions
    if name == "mamba":  # which has no attention to list
        assert not report.refusals
    else:
        assert f"{error.reason} To fix: {error.fix}" in {a.refusal for a in report.refusals}


# --- strict=False -------------------------------------------------------------------------------

WIDTH, HEADS, LENGTH = 16, 2, 6


class Capped(nn.Module):
    """Attention with soft-capped scores by hand, or plain through SDPA."""

    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.capped = capped
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.capped:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            y = F.softmax(5.0 * torch.tanh(scores / 5.0), dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Mixed(nn.Module):
    """Plain, capped, plain, capped, plain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Capped(i % 2 == 1) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (WIDTH,)))
        return x


def gradients(output: Tensor, model: nn.Module) -> dict[str, Tensor]:
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_strict_refuses_a_mixed_model() -> None:
    model = Mixed().double()
    with pytest.raises(RewriteError, match="softcapping") as caught:
        moda_compile.convert(model, example_inputs=(sample(),), backend="eager")
    assert caught.value.block == "layers.1"
    assert "strict=False" in caught.value.fix


def test_not_strict_converts_what_it_can_and_says_what_is_left() -> None:
    """Layers 0, 2 and 4 share depth slots, 1 and 3 stay: the oracle sees SDPA only."""
    torch.manual_seed(0)
    model, x = Mixed().double(), sample()
    report = moda_compile.explain(model, x)
    assert [a.block for a in report.attentions] == ["layers.0", "layers.2", "layers.4"]
    assert [a.reads for a in report.attentions] == [(), (0,), (0, 1)]
    assert [a.block for a in report.refusals] == ["layers.1", "layers.3"]
    assert all("softcapping" in str(a.refusal) for a in report.refusals)
    assert "3 of 5 attentions" in str(report)
    assert str(report).count("refused: layers.") == 2

    oracle, plain = copy.deepcopy(model), model(x).detach()
    expected = reference(oracle, x, stacks=(0, 0, 0))
    converted: Any = moda_compile.convert(model, example_inputs=(x,), backend="eager", strict=False)
    got = converted(x)
    assert (expected - plain).abs().max() > 1e-2
    # float64 and values of order 1: room for a few thousand roundings.
    close = {"rtol": 0.0, "atol": 1e-11}
    torch.testing.assert_close(got, expected, **close)
    left, right = gradients(got, converted), gradients(expected, oracle)
    assert left.keys() == right.keys() and len(left) == 20
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], **close)
    moda_compile.revert(model)
    torch.testing.assert_close(model(x), plain, rtol=0.0, atol=0.0)


def sample() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
