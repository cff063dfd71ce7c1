"""Detection by dataflow: what is an attention, what is refused by name, what is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile import fx
from moda_compile.patterns import PATTERNS, Refused
from tests.graph.graphs import WIDTH, B, D, H, T, graph_of, matches, one, trace

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


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1), r"attention dropout \(dropout_p=0.1\)"),
        (lambda q, k, v: sdpa(q[:, :, :2], k, v), "2 queries over 5 keys"),
        (lambda q, k, v: sdpa(q[0], k[0], v[0]), r"expected \[B, H, T, d\]"),
        (lambda q, k, v: sdpa(q, k, v[..., :4]), "keys have head_dim 8, values 4"),
        (lambda q, k, v: sdpa(q, torch.ones(B, H, T, D), v), "not projections of one hidden state"),
    ],
)
def test_sdpa_refused(core: Callable[..., Tensor], reason: str) -> None:
    refused = one(graph_of(core))
    assert isinstance(refused, Refused)
    with pytest.raises(Refused, match=reason):
        raise refused
    assert refused.fix.endswith(".")


def test_a_scale_that_is_computed_is_refused() -> None:
    gm = graph_of(sdpa)
    node = one(gm).node
    node.update_kwarg("scale", node.args[0])
    assert "scale is a tensor or a symbolic value" in one(gm).reason


def test_cross_attention_is_refused() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            sources = ((self.q, x), (self.k, memory), (self.v, memory))
            q, k, v = (layer(y).unflatten(-1, (H, D)).transpose(1, 2) for layer, y in sources)
            return F.scaled_dot_product_attention(q, k, v)

    gm = trace(Cross(), *(torch.randn(B, T, WIDTH) for _ in range(2)))
    assert "cross-attention" in one(gm).reason


# --- attention written by hand, and what only looks like it --------------------------------------


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = torch.matmul(q, k.transpose(-2, -1)) * 0.3
    z = z.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return F.dropout(F.softmax(z, dim=-1, dtype=torch.float32), 0.0).to(v.dtype) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhtu,bhud->bhtd", (30 * torch.tanh(q @ k.mT / 30)).softmax(-1), v)


def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v).view(B, H, T, D)


def returned_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q @ k.mT).softmax(-1)
    return p @ v, p.mean(1)


@pytest.mark.parametrize("core", [by_hand, masked, capped, flat, returned_too])
def test_attention_by_hand_is_refused_never_missed(core: Callable[..., Any]) -> None:
    ((name, found),) = matches(graph_of(core))
    assert name == "softmax"
    assert isinstance(found, Refused)
    assert "attn_implementation='sdpa'" in found.fix


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


def test_one_call_attentions_are_refused() -> None:
    layer = nn.MultiheadAttention(WIDTH, H, batch_first=True)
    gm = trace(lambda x: layer(x, x, x, need_weights=False)[0], torch.randn(B, T, WIDTH))
    found = matches(gm)
    assert [name for name, _ in found] == ["packed"]
    assert "multi_head_attention_forward" in found[0][1].reason  # type: ignore[union-attr]


def test_every_row_has_its_words() -> None:
    assert len({pattern.name for pattern in PATTERNS}) == len(PATTERNS)
    for pattern in PATTERNS:
        assert pattern.accepts.endswith(".")
        assert pattern.refuses.endswith(".")
