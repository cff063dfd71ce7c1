"""What only looks like an attention, or like one that we understand: refused, or left as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile.patterns import Refused
from tests.graph.graphs import WIDTH, Attend, B, D, H, T, graph_of, matches, one, trace

Core = Callable[..., Tensor]


def hidden(x: Tensor) -> Tensor:
    """True above the diagonal."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (30 * torch.tanh(q @ k.mT / 30)).softmax(-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q.new_ones(B, H, T, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def divided_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.mean(1)


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


def overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Between the products the keys become something else, and a slot would hold that."""
    k = k.clone()
    scores = q @ k.mT
    k.mul_(2.0)
    return scores.softmax(-1) @ v + k


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "softcap": (capped, "tanh"),
    "sinks": (sinks, "attention sinks"),
    "written out": (written_out, "written out"),
    "divided late": (divided_late, "written out"),
    "logsumexp": (by_logsumexp, "written out"),
    "log_softmax": (lambda q, k, v: F.log_softmax(q @ k.mT, -1).exp() @ v, "written out"),
    "sigmoid": (lambda q, k, v: (q @ k.mT).sigmoid() @ v, "sigmoid"),
    "over the queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "not over the keys"),
    "over the heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, "not over the keys"),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1) @ v, "dropout in training"),
    "a gate": (lambda q, k, v: ((q @ k.mT).softmax(-1) * q.mean()) @ v, "changed by mul"),
    "clamped": (lambda q, k, v: (q @ k.mT).clamp(-5, 5).softmax(-1) @ v, "changed by clamp"),
    "a mild fill": (
        lambda q, k, v: (q @ k.mT).masked_fill(hidden(q), -50.0).softmax(-1) @ v,
        "set to -50, not to -inf",
    ),
    "a negative scale": (lambda q, k, v: (q @ k.mT * -0.3).softmax(-1) @ v, "scale is -0.3"),
    "weights returned": (weights_returned, "the model also uses otherwise"),
    "scores returned": (scores_returned, "the model also uses otherwise"),
    "overwritten": (overwritten, "written in place"),
    "two scores": (lambda q, k, v: (q @ k.mT + k @ q.mT).softmax(-1) @ v, "sum of two products"),
    "three factors": (
        lambda q, k, v: torch.einsum("bhtu,bhud,bhtd->bhtd", (q @ k.mT).softmax(-1), v, q),
        "einsum",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_refused_never_missed(name: str) -> None:
    core, reason = REFUSED[name]
    ((pattern, found),) = matches(graph_of(core))
    assert pattern == "by hand"
    assert isinstance(found, Refused)
    assert reason in found.reason
    assert found.reason.startswith("attention written by hand")
    assert found.fix.endswith(".")


def test_a_scale_of_a_symbolic_size_is_refused() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(q.shape[2])).softmax(-1) @ v

    gm = trace(Attend(core), torch.randn(B, T, WIDTH), dynamic=True)
    assert "not understood" in one(gm).reason


def test_other_users_are_told_what_to_do() -> None:
    assert "output_attentions=False" in one(graph_of(weights_returned)).fix


def test_talking_heads_are_refused() -> None:
    """A linear layer over the heads of the scores: no end of the attention."""

    class Talking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
            )
            scores = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return scores.softmax(-1) @ v

    assert "talking heads" in one(trace(Talking(), torch.randn(B, T, WIDTH))).reason


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


NO_ATTENTION: dict[str, Core] = {
    "linear attention": linear_attention,
    "no softmax": lambda q, k, v: (q @ k.mT).relu() @ v,
    "scores only": lambda q, k, v: (q @ k.mT).softmax(-1),
    "a gated product": lambda q, k, v: (q * k.sigmoid()) @ v.mT,
    "rotated, then linear": lambda q, k, v: linear_attention(
        q * (torch.arange(T).to(q.dtype)[:, None] @ q.new_ones(1, D)).cos(), k, v
    ),
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_attention_is_kept(name: str) -> None:
    assert matches(graph_of(NO_ATTENTION[name])) == []


def test_pooling_by_a_learned_query_is_kept() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.kv = (
                nn.Parameter(torch.randn(1, 2, WIDTH)),
                nn.Linear(WIDTH, 2 * WIDTH),
            )

        def forward(self, x: Tensor) -> Tensor:
            k, v = self.kv(x).chunk(2, dim=-1)
            return (self.query @ k.mT).softmax(-1) @ v

    assert matches(trace(Pool(), torch.randn(B, T, WIDTH))) == []
