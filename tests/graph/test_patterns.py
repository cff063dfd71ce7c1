"""Detection by dataflow: calls of SDPA, and what is no attention. By hand: test_by_hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile import fx
from moda_compile.patterns import PATTERNS, Refused
from tests.graph.graphs import WIDTH, B, D, H, T, deviation, graph_of, matches, one, trace

# --- SDPA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_sdpa(is_causal: bool, scale: float | None, by_keyword: bool) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if by_keyword:
            return F.scaled_dot_product_attention(
                query=q, key=k, value=v, is_causal=is_causal, scale=scale
            )
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, scale=scale)

    attention = one(graph_of(core))
    assert (attention.pattern, attention.is_causal, attention.scale) == ("sdpa", is_causal, scale)
    assert attention.max_length is None
    shapes = [fx.value(x).shape for x in (attention.query, attention.key, attention.value)]
    assert shapes == [(B, H, T, D)] * 3


def sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


def test_values_of_another_head_dim() -> None:
    gm = graph_of(lambda q, k, v: sdpa(q, k, v[..., :4]))
    attention = one(gm)
    shapes = [fx.value(x).shape for x in (attention.query, attention.key, attention.value)]
    assert shapes == [(B, H, T, D), (B, H, T, D), (B, H, T, 4)]


def test_sdpa_with_dropout_is_refused() -> None:
    refused = one(graph_of(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1)))
    assert isinstance(refused, Refused)
    assert "attention dropout (dropout_p=0.1)" in refused.reason
    assert refused.fix.endswith(".")


def test_a_scale_that_is_computed_is_refused() -> None:
    gm = graph_of(sdpa)
    node = one(gm).node
    node.update_kwarg("scale", node.args[0])
    assert "scale is a tensor or a symbolic value" in one(gm).reason


def test_a_scale_that_the_graph_builds() -> None:
    gm = graph_of(sdpa)
    node = one(gm).node
    with gm.graph.inserting_before(node):
        node.update_kwarg("scale", fx.insert(gm, torch.full, ((), 0.25), like=node))
    with node.args[0].meta[fx.VALUE].fake_mode:  # type: ignore[union-attr]
        node.kwargs["scale"].meta[fx.VALUE] = torch.full((), 0.25)  # type: ignore[union-attr]
    assert one(gm).scale == 0.25


RANKS: dict[str, Callable[..., Tensor]] = {
    "one head": lambda q, k, v: sdpa(q[:, 0], k[:, 0], v[:, 0], is_causal=True),
    "batch and heads merged": lambda q, k, v: sdpa(
        *(x.reshape(B * H, T, D) for x in (q, k, v)), is_causal=True
    ),
    "no batch": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "two batch dimensions": lambda q, k, v: sdpa(*(x[:, None] for x in (q, k, v))),
    "a mask of its own": lambda q, k, v: sdpa(
        *(x.reshape(B * H, T, D) for x in (q, k, v)),
        attn_mask=torch.arange(B * H, dtype=q.dtype)[:, None, None] * torch.ones(T).to(q.dtype),
    ),
}


@pytest.mark.parametrize("name", RANKS)
def test_sdpa_of_other_ranks(name: str) -> None:
    gm = graph_of(RANKS[name], dtype=torch.float64)
    attention = one(gm)
    assert fx.value(attention.query).dim() == 4
    assert deviation(gm, attention) < 1e-13  # both in float64, of sums of a few terms


def test_a_scaled_key_is_unscaled() -> None:
    """So that a slot holds the same key as in a layer that scales its queries, or its scores."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q * D**-0.25, k * D**-0.25, v, scale=1.0)

    gm = graph_of(core, dtype=torch.float64)
    attention = one(gm)
    assert attention.key.name == "k"
    assert attention.scale == pytest.approx(D**-0.5)
    assert deviation(gm, attention) < 1e-13  # as above


# --- what is no attention ------------------------------------------------------------------------


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax of q and of k, but of no product: no attention over tokens."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def no_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).relu() @ v


def scores_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


@pytest.mark.parametrize("core", [linear_attention, no_softmax, scores_only])
def test_near_misses_are_kept(core: Callable[..., Tensor]) -> None:
    assert matches(graph_of(core)) == []


def test_a_router_is_kept() -> None:
    """softmax of a linear layer's result weighs experts: no product of activations before it."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 3)
            self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            outs = torch.einsum("btd,edf->btef", x, self.experts)
            return (weights[..., None, :] @ outs).squeeze(-2)

    assert matches(trace(Router(), torch.randn(B, T, WIDTH))) == []


def test_every_row_has_its_words() -> None:
    assert len({pattern.name for pattern in PATTERNS}) == len(PATTERNS)
    for pattern in PATTERNS:
        assert pattern.accepts.endswith(".")
        assert pattern.refuses.endswith(".")
