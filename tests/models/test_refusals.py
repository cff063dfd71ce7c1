"""What can't be rewritten is refused: block, line, reason and way out, and the model as it was.

Every model here is plain PyTorch with one thing in it that MoDA can't take yet.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile import RewriteError
from moda_compile.testing import reference
from tests.models.cases import (
    WIDTH,
    Attention,
    Core,
    Layer,
    Stack,
    X,
    causal,
    refusal,
    sdpa,
    traces,
)

# --- attentions that are nearly softmax(q k^T) v ------------------------------------------------


def triangle(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.3
    scores[..., ~triangle(scores)] = -1e9
    return torch.softmax(scores, -1).type_as(q) @ v


def masked_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.mT, dim=-1)
    return torch.nan_to_num(weights.masked_fill(~triangle(weights), 0.0)) @ v


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).clamp(-5, 5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 10) * 10
    return torch.softmax(scores, -1) @ v


def logarithmic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.log_softmax(q @ k.mT, -1).exp() @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT) @ v


@pytest.mark.parametrize(
    "core", [in_place, masked_after, clamped, softcapped, logarithmic, sigmoid]
)
def test_nearly_attention(core: Core) -> None:
    refusal(Stack(Attention(core)), block="layers.1.attention", reason=".", file=__file__)


def aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True)


def aten_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


@pytest.mark.parametrize("core", [aten, aten_flash])
def test_attention_in_one_call(core: Core) -> None:
    refusal(
        Stack(Attention(core)),
        block="layers.1.attention",
        reason="whose parts are not in the graph",
        file=__file__,
    )


def test_nothing_to_convert() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    before = traces(model)
    with pytest.raises(RewriteError, match="no attention was found.*explain"):
        moda_compile.convert(model, example_inputs=(X,), backend="eager")
    assert traces(model) == before


# --- dropout ----------------------------------------------------------------------------------


class Dropout(Attention):
    def __init__(self) -> None:
        super().__init__(causal)
        self.core = self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)


def test_dropout_in_training() -> None:
    model = Stack(Dropout())
    error = refusal(model, block="layers.1.attention", reason=r"dropout_p=0\.1")
    assert ".eval()" in error.fix


def test_dropout_in_eval_and_then_in_training() -> None:
    model = Stack(Dropout()).eval()
    expected = reference(copy.deepcopy(model), X)
    moda_compile.convert(model, example_inputs=(X,), backend="eager")
    # a few roundings in float32 of outputs of order 1; the plain model is 0.01 away
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
    model.train()
    with pytest.raises(RewriteError, match="dropout"):
        model(X)
    torch.testing.assert_close(model.eval()(X), expected, rtol=0, atol=1e-5)


# --- not one stack of self-attentions -----------------------------------------------------------


def test_other_number_of_keys() -> None:
    def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k[:, :, :5], v[:, :, :5])

    refusal(Stack(Attention(half)), block="layers.1.attention", reason="9 queries over 5 keys")


@pytest.mark.parametrize("late", [False, True])
def test_one_graph_that_runs_for_every_layer(late: bool) -> None:
    """Breaks around each attention, frozen weights: Dynamo then makes one graph for all blocks."""

    class Broken(Attention):
        def forward(self, x: Tensor, *context: Any) -> Tensor:
            torch._dynamo.graph_break()
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x

    model = nn.Sequential(*(Broken(causal) for _ in range(3))).requires_grad_(False)
    with pytest.raises(RewriteError, match="spread over 3 graphs"):
        moda_compile.convert(model, None, None if late else (X,), backend="eager")
        model(X)


# --- strict=False -------------------------------------------------------------------------------


def test_not_strict_converts_the_rest() -> None:
    """A softcapped layer stays as it is; the others are MoDA, and read nothing of it."""
    model = Stack(Attention(softcapped))
    report = moda_compile.explain(model, X)
    assert [a.block for a in report.attentions] == ["layers.0.attention", "layers.2.attention"]
    assert [a.block for a in report.refusals] == ["layers.1.attention"]
    assert "refused: layers.1" in str(report) and "2 of 3 attentions" in str(report)
    plain = copy.deepcopy(model)
    moda_compile.convert(model, None, (X,), backend="eager", strict=False)
    expected = reference(plain, X)  # knows SDPA's calls only
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)  # float32, of order 1
    assert (expected - plain(X)).abs().max() > 1e-3  # and it is not the plain model


def test_not_strict_with_nothing_left() -> None:
    """Not even one: that is no conversion."""
    model = nn.Sequential(Layer(Attention(softcapped)), Layer(Attention(softcapped)))
    before = traces(model)
    with pytest.raises(RewriteError, match="softcap"):
        moda_compile.convert(model, example_inputs=(X,), backend="eager", strict=False)
    assert traces(model) == before
