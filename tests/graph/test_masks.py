"""A mask that the graph builds is causal, masks nothing, or stays the mask it is."""

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
from moda_compile.patterns import Attention, masks, sdpa

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


def match(mask: Mask, length: int = T, dynamic: bool = False, x: Tensor | None = None) -> Attention:
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        graphs.append(gm)
        (node,) = (n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention"))
        found.append(sdpa.match(node))  # in the backend: here guards may still be installed
        return lambda *_: (torch.zeros(()),)  # what is asked for is the match alone

    found: list[Any] = []
    x = torch.randn(B, length, H * D) if x is None else x
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    torch.compile(Masked(mask), backend=keep, dynamic=dynamic or None)(x)
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
    "additive -1e4": lambda x: low(x, -1e4),
    "additive -1e4 in bfloat16": lambda x: low(x, -1e4).bfloat16().to(x.dtype),
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
    assert (attention.is_causal, attention.mask, attention.max_length) == (True, None, T)


FULL: dict[str, Mask] = {
    "all": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool),
    "zeros": lambda x: x.new_zeros(x.shape[0], 1, 1, x.shape[1]),
    "one row for all": lambda x: position(x)[None, :] >= 0,
    "wide": lambda x: (position(x)[:, None] - position(x)).abs() < 5000,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FULL)
def test_everything_visible(name: str, dynamic: bool) -> None:
    attention = match(FULL[name], dynamic=dynamic)
    longest = 2048 if dynamic else T
    assert (attention.is_causal, attention.mask, attention.max_length) == (False, None, longest)


GENERAL: dict[str, Mask] = {
    "window": lambda x: (
        (position(x)[:, None] >= position(x)) & (position(x)[:, None] - position(x) < 3)
    ),
    "prefix": lambda x: (position(x)[:, None] >= position(x)) | (position(x) < 2),
    "strictly causal": lambda x: position(x)[:, None] > position(x),
    "anticausal": lambda x: position(x)[:, None] <= position(x),
    "blocks": lambda x: (
        (position(x)[:, None] >= position(x)) & (position(x)[:, None] // 3 == position(x) // 3)
    ),
    "one head differs": lambda x: torch.stack(
        [
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool),
        ]
    ),
    "alibi": lambda x: (
        low(x, -math.inf) + (position(x) - position(x)[:, None]).tril().to(x.dtype) * 0.5
    ),
    "a mild penalty": lambda x: low(x, -1e3),
    "positive infinity": lambda x: low(x, math.inf),
    "not a number": lambda x: low(x, math.nan),
    "values of the input": lambda x: ((position(x)[:, None] >= position(x)) & (x[..., :1] > 0))[
        :, None
    ],
    "random": lambda x: torch.rand(x.shape[1], x.shape[1]) < 2,
    "a row of padding": lambda x: position(x)[None, :] < 4,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", GENERAL)
def test_general(name: str, dynamic: bool) -> None:
    attention = match(GENERAL[name], dynamic=dynamic)
    assert attention.mask is attention.node.kwargs["attn_mask"]
    assert (attention.is_causal, attention.max_length) == (False, None)


def test_a_mask_given_as_an_argument_is_general() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    gm = torch.fx.symbolic_trace(Given())
    _, mask, attention, _ = gm.graph.nodes
    mask.meta[fx.VALUE] = torch.ones(T, T, dtype=torch.bool).tril()  # its values may change
    assert masks.classify(mask, queries=T, keys=T, at=attention).mask is mask


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in ("batched", "a window as wide")])
def test_symbolic_length(name: str) -> None:
    """One graph for many lengths: shown for 2048 tokens at least."""
    attention = match(CAUSAL[name], dynamic=True)
    assert isinstance(fx.value(attention.query).shape[2], torch.SymInt)
    assert (attention.is_causal, attention.max_length) == (True, 2048)


@pytest.mark.parametrize(("length", "longest"), [(1024, 2048), (1025, 4096), (5000, 8192)])
def test_a_longer_hint_shows_more(length: int, longest: int) -> None:
    """Twice as many tokens as there are, and on to a power of two; not beyond 2**26 elements."""
    assert match(CAUSAL["tril of bool"], length=length, dynamic=True).max_length == longest


def test_the_batch_counts_once() -> None:
    """A mask of [B, 1, T, T] is shown for one sequence where B is symbolic."""

    def mask(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool)
        return ones & (position(x)[:, None] >= position(x))

    x = torch.randn(40, 1500, H * D)
    torch._dynamo.mark_dynamic(x, 0)
    assert match(mask, dynamic=True, x=x).max_length == 4096


def window_of(size: int) -> Mask:
    def mask(x: Tensor) -> Tensor:
        near = position(x)[:, None] - position(x) < size
        return (position(x)[:, None] >= position(x)) & near

    return mask


@pytest.mark.parametrize("window", [2048, 2049, 5000])
def test_a_wide_window_is_causal_as_long_as_it_is_guarded(window: int) -> None:
    """At T = 1025 each is a triangle; the graph would serve longer inputs, where it is none."""
    attention = match(window_of(window), length=1025, dynamic=True)
    assert attention.is_causal
    assert attention.max_length == min(window, 4096)


@pytest.mark.parametrize("window", [T - 1, T, 64, 2047])
def test_a_narrow_window_is_general_at_every_length(window: int) -> None:
    """One graph for all lengths, rather than another once the window is full."""
    attention = match(window_of(window), dynamic=True)
    assert (attention.is_causal, attention.max_length) == (False, None)
    assert attention.mask is not None


def test_the_same_window_is_causal_where_the_length_is_fixed() -> None:
    assert match(window_of(T)).is_causal
    assert match(window_of(T - 1)).mask is not None


def test_masks_built_alike_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    build = masks._build
    monkeypatch.setattr(masks, "_build", lambda *args: built.append(1) or build(*args))

    class Two(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x).transpose(1, 2).flatten(2))

    torch._dynamo.reset()
    found: list[Any] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        calls = [n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention")]
        assert len({n.kwargs["attn_mask"] for n in calls}) == 2
        found.extend(sdpa.match(node) for node in calls)
        return gm.forward

    torch.compile(Two(CAUSAL["tril"]), backend=keep, dynamic=False)(torch.randn(B, T, H * D))
    assert [a.is_causal for a in found] == [True, True]
    assert len(built) == 1


def test_what_is_written_in_place_counts() -> None:
    def mask(x: Tensor) -> Tensor:
        made = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        made[0] = True
        return made

    assert match(mask).mask is not None
    assert match(CAUSAL["tril"]).is_causal


def test_like_another_tensor() -> None:
    """type_as, expand_as and a shape of scores: nothing of the values is read."""

    def mask(x: Tensor) -> Tensor:
        scores = x @ x.mT
        low = torch.full_like(scores[:, None], -math.inf).triu(1)
        return low.type_as(x).expand_as(scores[:, None])

    assert match(mask).is_causal


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
    assert [(a.is_causal, a.max_length) for a in found] == [(True, 2048)]
