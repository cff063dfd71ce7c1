"""Repeated keys and values: the repetition is seen through, or kept as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_compile import fx
from moda_compile.patterns import grouped_query
from tests.graph.graphs import B, D, H, T, deviation, graph_of, one, values_of

# --- grouped-query attention --------------------------------------------------------------------

HK, G = 2, H // 2


def shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], HK, G, x.shape[2], D)


SEEN_THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.repeat_interleave(G, dim=1),
    "method, negative": lambda x: x.repeat_interleave(G, -3),
    "function": lambda x: torch.repeat_interleave(x, G, dim=1),
    "function, keywords": lambda x: torch.repeat_interleave(input=x, repeats=G, dim=1),
    "reshape, keywords": lambda x: torch.reshape(
        input=torch.unsqueeze(input=x, dim=2).expand(shape(x)), shape=(B, H, T, D)
    ),
    "transpose, keywords": lambda x: torch.transpose(
        input=x.transpose(1, 2).repeat_interleave(G, dim=2), dim0=1, dim1=2
    ),
    "None index": lambda x: x[:, :, None].expand(shape(x)).reshape(B, H, T, D),
    "None index, slices": lambda x: (
        x[:, :, None, :, :].expand(B, HK, G, T, D).reshape(B, HK * G, T, D)
    ),
    "None index, ellipsis": lambda x: x[..., None, :, :].expand(shape(x)).flatten(1, 2),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, G, -1, -1).reshape(B, H, T, D),
    "unsqueeze, negative": lambda x: torch.unsqueeze(x, -3).expand(shape(x)).flatten(1, 2),
    "contiguous": lambda x: x.repeat_interleave(G, dim=1).contiguous(),
    "before transpose": lambda x: x.transpose(1, 2).repeat_interleave(G, dim=2).transpose(1, 2),
    "expand before transpose": lambda x: (
        x.transpose(1, 2)[:, :, :, None].expand(B, T, HK, G, D).reshape(B, T, H, D).transpose(2, 1)
    ),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda x: x.repeat(1, G, 1, 1),
    "tile": lambda x: torch.tile(x, (1, G, 1, 1)),
    "cat": lambda x: torch.cat([x] * G, dim=1),
    "tiling expand": lambda x: x[:, None].expand(B, G, HK, T, D).reshape(B, H, T, D),
    "head pairs swapped": lambda x: x.repeat_interleave(G, dim=1).flip(1),
}


def repeating(repeat: Callable[[Tensor], Tensor]) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)


def expanded(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_a_repetition_is_seen_through(name: str) -> None:
    gm = graph_of(repeating(SEEN_THROUGH[name]), HK)
    attention = one(gm)
    assert fx.value(attention.key).shape == fx.value(attention.value).shape == (B, HK, T, D)
    gm.graph.lint()
    for ours, argument in ((attention.key, 1), (attention.value, 2)):
        before, after = values_of(gm, [attention.node.args[argument], ours])
        assert torch.equal(expanded(after, H), before)


@pytest.mark.parametrize("name", KEPT)
def test_another_order_is_kept(name: str) -> None:
    """Head h there is not KV head h // G; the slots then hold all the heads, as they are."""
    gm = graph_of(repeating(KEPT[name]), HK)
    attention = one(gm)
    assert (attention.key, attention.value) == attention.node.args[1:3]


def test_one_repeated_side_is_kept() -> None:
    """Keys and values of a slot need the same number of heads."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        late = k.repeat_interleave(G, dim=1)  # and then rotated
        late = late * late.new_ones(T, D).cos() + late.roll(1, -1) * late.new_ones(T, D).sin()
        return F.scaled_dot_product_attention(q, late, v.repeat_interleave(G, dim=1))

    attention = one(graph_of(core, HK))
    assert fx.value(attention.key).shape == fx.value(attention.value).shape == (B, H, T, D)


def test_another_user_of_the_repetition_keeps_it() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        many = k.repeat_interleave(G, dim=1)
        out = F.scaled_dot_product_attention(q, many, v.repeat_interleave(G, dim=1))
        return out, many

    gm = graph_of(core, HK)  # type: ignore[arg-type]
    assert fx.value(one(gm).key).shape == (B, HK, T, D)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    assert fx.calls(output.args[0][1], "repeat_interleave")


def test_heads_that_differ_from_the_queries_are_no_repetition() -> None:
    gm = graph_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), HK)
    attention = one(gm)
    assert grouped_query.before_repeat(attention.key, H) is attention.key
    assert fx.value(attention.key).shape == (B, HK, T, D)


BY_HAND = {name: repeat for name, repeat in SEEN_THROUGH.items() if "keywords" not in name}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_repetition_is_seen_through_by_hand_too(name: str) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ BY_HAND[name](k).mT).softmax(-1) @ BY_HAND[name](v)

    gm = graph_of(core, HK, torch.float64)
    attention = one(gm)
    assert fx.value(attention.key).shape == fx.value(attention.value).shape == (B, HK, T, D)
    assert deviation(gm, attention) < 1e-13  # both in float64, of sums of a few terms


@pytest.mark.parametrize("name", KEPT)
def test_another_order_is_kept_by_hand_too(name: str) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ KEPT[name](k).mT).softmax(-1) @ KEPT[name](v)

    gm = graph_of(core, HK, torch.float64)
    attention = one(gm)
    assert fx.value(attention.key).shape == fx.value(attention.value).shape == (B, H, T, D)
    assert deviation(gm, attention) < 1e-13  # as above


def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention: keys without an axis of heads."""
    scores = torch.einsum("bhtd,bud->bhtu", q, k[:, 0])
    return torch.einsum("bhtu,bud->bthd", scores.softmax(-1), v[:, 0])


def broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (-1, H // k.shape[1]))
    return ((q @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def groups_in_the_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as more tokens of one head: [B, Hk, G * T, d]."""
    rows = q.reshape(B, k.shape[1], -1, D)
    return ((rows @ k.mT).softmax(-1) @ v).view(B, H, T, D)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1)).permute(0, 3, 1, 2, 4)
    scores = torch.einsum("btkgd,bkud->bkgtu", q, k)
    return torch.einsum("bkgtu,bkud->btkgd", scores.softmax(-1), v).flatten(2)


def groups_outermost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head h belongs to KV head h % Hk: its queries have to change places, and its output back."""
    q = q.unflatten(1, (-1, k.shape[1]))
    scores = torch.einsum("bgktd,bkud->bgktu", q, k)
    return torch.einsum("bgktu,bkud->bgktd", scores.softmax(-1), v)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("core", [broadcast, groups_in_the_rows, grouped_einsum, groups_outermost])
def test_groups_without_repetition(core: Callable[..., Tensor], kv_heads: int) -> None:
    gm = graph_of(core, kv_heads, torch.float64)
    attention = one(gm)
    assert fx.value(attention.query).shape == (B, H, T, D)
    assert fx.value(attention.key).shape == (B, kv_heads, T, D)
    assert deviation(gm, attention) < 1e-13  # as above


def test_multi_query_attention() -> None:
    gm = graph_of(one_key_head, 1, torch.float64)
    attention = one(gm)
    assert fx.value(attention.key).shape == fx.value(attention.value).shape == (B, 1, T, D)
    assert deviation(gm, attention) < 1e-13  # as above
