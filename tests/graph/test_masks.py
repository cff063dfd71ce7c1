"""A mask that the graph builds is causal, or it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.patterns import Attention, Refused, masks, sdpa

B, T, H, D = 2, 6, 2, 4
Mask = Callable[[Tensor], Tensor]


class Masked(nn.Module):
    """One attention over x [B, T, D * H] with a mask made from x."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask, self.qkv = mask, nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))


def match(mask: Mask, length: int = T, dynamic: bool = False) -> Attention:
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        graphs.append(gm)
        (node,) = (n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention"))
        found.append(sdpa.match(node))  # in the backend: here guards may still be installed
        return gm.forward

    found: list[Any] = []
    x = torch.randn(B, length, H * D)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    try:
        torch.compile(Masked(mask), backend=keep, dynamic=dynamic or None)(x)
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        raise failure.inner_exception from None
    (attention,) = found
    return attention


def position(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def low(x: Tensor, value: float) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), value).triu(1)


def transformers_way(x: Tensor) -> Tensor:
    """and_ of new_ones and an arange comparison, expanded over the batch."""
    rows, columns = position(x)[None, None, :, None], position(x)[None, None, None, :]
    allowed = columns.new_ones((), dtype=torch.bool) & (columns <= rows)
    return allowed.expand(x.shape[0], -1, x.shape[1], x.shape[1])


CAUSAL: dict[str, Mask] = {
    "tril": lambda x: torch.ones(x.shape[1], x.shape[1]).tril().bool(),
    "tril of bool": lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)),
    "not triu": lambda x: ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
    "arange": lambda x: position(x)[:, None] >= position(x)[None, :],
    "additive -inf": lambda x: low(x, -math.inf),
    "additive finfo.min": lambda x: low(x, torch.finfo(torch.float32).min),
    "masked_fill": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(
        ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -math.inf
    ),
    "where": lambda x: torch.where(position(x)[:, None] >= position(x), 0.0, -math.inf),
    "batched": lambda x: (position(x)[:, None] >= position(x)).expand(B, H, -1, -1),
    "transformers": transformers_way,
    "like the input": lambda x: x.new_full((x.shape[1], x.shape[1]), -math.inf).triu(1),
    "a window as wide": lambda x: (
        (position(x)[:, None] >= position(x)) & (position(x)[:, None] - position(x) < T)
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    attention = match(CAUSAL[name])
    assert (attention.is_causal, attention.max_length) == (True, T)


REFUSED: dict[str, tuple[Mask, str]] = {
    "all": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), "not causal"),
    "window": (
        lambda x: (position(x)[:, None] >= position(x)) & (position(x)[:, None] - position(x) < 3),
        "not causal",
    ),
    "prefix": (lambda x: (position(x)[:, None] >= position(x)) | (position(x) < 2), "not causal"),
    "strictly causal": (lambda x: position(x)[:, None] > position(x), "not causal"),
    "anticausal": (lambda x: position(x)[:, None] <= position(x), "not causal"),
    "blocks": (
        lambda x: (
            (position(x)[:, None] >= position(x)) & (position(x)[:, None] // 3 == position(x) // 3)
        ),
        "not causal",
    ),
    "one head differs": (
        lambda x: torch.stack(
            [
                torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
                torch.ones(x.shape[1], x.shape[1], dtype=torch.bool),
            ]
        ),
        "not causal",
    ),
    "alibi": (
        lambda x: low(x, -math.inf) + (position(x) - position(x)[:, None]).tril() * 0.5,
        "not causal",
    ),
    "a mild penalty": (lambda x: low(x, -1e4), "not causal"),
    "positive infinity": (lambda x: low(x, math.inf), "not causal"),
    "not a number": (lambda x: low(x, math.nan), "not causal"),
    "values of the input": (
        lambda x: (position(x)[:, None] >= position(x)) & (x[..., :1] > 0),
        "values of an input",
    ),
    "one row for all": (lambda x: position(x)[None, :] >= 0, r"shape \(1, 6\), not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    mask, reason = REFUSED[name]
    with pytest.raises(Refused, match=reason) as caught:
        match(mask)
    assert caught.value.fix


def test_a_mask_given_as_an_argument_is_refused() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    gm = torch.fx.symbolic_trace(Given())
    _, mask, attention, _ = gm.graph.nodes
    mask.meta[fx.VALUE] = torch.ones(T, T, dtype=torch.bool).tril()  # its values may change
    with pytest.raises(Refused, match="values of an input"):
        masks.classify(mask, length=T, at=attention)


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in ("batched", "a window as wide")])
def test_symbolic_length(name: str) -> None:
    """One graph for many lengths: shown up to the next power of two, and at least to 64."""
    attention = match(CAUSAL[name], dynamic=True)
    assert isinstance(fx.value(attention.query).shape[2], torch.SymInt)
    assert (attention.is_causal, attention.max_length) == (True, 64)
    assert match(CAUSAL[name], length=65, dynamic=True).max_length == 128


def window_of(size: int) -> Mask:
    def mask(x: Tensor) -> Tensor:
        near = position(x)[:, None] - position(x) < size
        return (position(x)[:, None] >= position(x)) & near

    return mask


@pytest.mark.parametrize("window", [T, T + 1, 40, 63, 64, 65, 1000])
def test_a_window_is_causal_as_long_as_it_is_guarded(window: int) -> None:
    """At T = 6 each of these is a triangle; the graph would serve longer inputs, which are not."""
    attention = match(window_of(window), dynamic=True)
    assert attention.is_causal
    assert attention.max_length == min(window, 64)


def test_a_window_that_is_narrower_is_refused() -> None:
    with pytest.raises(Refused, match="not causal"):
        match(window_of(T - 1), dynamic=True)


def test_a_length_that_is_computed() -> None:
    """nanoGPT-like training steps feed idx[:, :-1]."""

    def shorter(x: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()

    class Shorter(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :-1])

    torch._dynamo.reset()
    found: list[Any] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        (node,) = (n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention"))
        found.append(sdpa.match(node))
        return gm.forward

    x = torch.randn(B, 10, H * D)
    torch._dynamo.mark_dynamic(x, 1)
    torch.compile(Shorter(shorter), backend=keep)(x)
    assert [(a.is_causal, a.max_length) for a in found] == [(True, 64)]
