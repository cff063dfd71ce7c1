"""Attention over a KV cache, however it is kept: a slot is what this call put into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile import MoDAConfig, RewriteError, kernels
from moda_compile.testing import moda_attention_reference

B, HEADS, KV_HEADS, D, PAST, NEW, LAYERS = 2, 4, 2, 8, 5, 3, 3
WIDTH = HEADS * D
# (cache, new [B, Hk, Tq, d], position [Tq]) -> what is attended to [B, Hk, Tk, d]
Put = Callable[[Tensor, Tensor, Tensor], Tensor]


def cat(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return torch.cat([cache[:, :, :PAST], new], dim=2)


def cat_of_an_empty_one(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return torch.cat([torch.tensor([], dtype=new.dtype), new], dim=-2)


def window(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return torch.cat([cache[:, :, :PAST], new], dim=-2)[:, :, -NEW - 2 :]


def index_copy(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache.index_copy_(2, position, new)
    return cache


def index_copy_result(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return cache.index_copy_(2, position, new)


def functional_copy(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return cache.index_copy(2, position, new)


def assigned(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, position] = new
    return cache[:, :, : PAST + NEW]


def sliced(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, PAST : PAST + NEW] = new
    return cache


def narrowed(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache.narrow(2, PAST, NEW).copy_(new)
    return cache


def rolled(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    moved = cache.roll(-NEW, dims=2)
    moved[:, :, torch.arange(-NEW, 0)] = new
    cache.copy_(moved)
    return cache


def token_major(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    held = cache.transpose(1, 2).contiguous()
    return torch.cat([held[:, :PAST], new.transpose(1, 2)], dim=1).permute(0, 2, 1, 3)


PUTS: tuple[Put, ...] = (
    cat, cat_of_an_empty_one, window, index_copy, index_copy_result, functional_copy, assigned,
    sliced, narrowed, rolled, token_major,
)  # fmt: skip


def rotated_behind(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """Keys that are changed between the cache and the attention: of which the new are no part."""
    return cat(cache, new, position) * torch.linspace(0.5, 1.5, PAST + NEW)[:, None]


def changed_inside(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """The same, in the cache's own memory."""
    cache.index_copy_(2, position, new)
    cache[:, :, position] *= 2.0
    return cache


def turned(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """Heads in another order than they were put in."""
    return cat(cache, new, position)[:, torch.arange(KV_HEADS).flip(0)]


class Layer(nn.Module):
    def __init__(self, put: Put, by_hand: bool, value_dim: int) -> None:
        super().__init__()
        self.put, self.by_hand = put, by_hand
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(HEADS * value_dim, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * n) for n in (D, value_dim))

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k and v, [B, H, Tq, d]."""
        sides = (self.q, HEADS), (self.k, KV_HEADS), (self.v, KV_HEADS)
        return [f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f, heads in sides]

    def forward(self, x: Tensor, caches: list[Tensor], position: Tensor, mask: Any) -> Tensor:
        q, k, v = self.project(x)
        keys, values = (
            self.put(cache, new, position) for cache, new in zip(caches, (k, v), strict=True)
        )
        y = self.attend(q, keys, values, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
        if not self.by_hand:
            return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
        scores = q @ keys.mT * D**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ values


class Model(nn.Module):
    def __init__(self, put: Put, by_hand: bool = False, value_dim: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(put, by_hand, value_dim) for _ in range(LAYERS))
        self.double()

    def forward(self, x: Tensor, caches: list[list[Tensor]], position: Tensor, mask: Any) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + layer(F.layer_norm(x, (WIDTH,)), cache, position, mask)
        return x


def example(
    length: int = PAST + NEW + 2, value_dim: int = D
) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    caches = [[draw(B, KV_HEADS, length, n) for n in (D, value_dim)] for _ in range(LAYERS)]
    return draw(B, NEW, WIDTH), caches, torch.arange(PAST, PAST + NEW)


def attended(put: Put) -> int:
    """Tk."""
    _, caches, position = example()
    return put(caches[0][0], torch.zeros(B, KV_HEADS, NEW, D).double(), position).shape[2]


def oracle(model: Model, x: Tensor, caches: Any, position: Tensor, mask: Any) -> Tensor:
    """The same layers, with each layer's own K and V of these tokens handed on by hand."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer, cache in zip(model.layers, caches, strict=True):
        h = F.layer_norm(x, (WIDTH,))
        q, k, v = layer.project(h)
        held = [layer.put(c, new, position) for c, new in zip(cache, (k, v), strict=True)]
        stacks = [torch.stack([*s, new])[:-1] for s, new in ((keys, k), (values, v))]
        y, _ = moda_attention_reference(q, *held, *stacks, attn_mask=mask)
        x = x + layer.out(y.transpose(1, 2).flatten(2))
        keys.append(k)
        values.append(v)
    return x


def clone(caches: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[x.clone() for x in pair] for pair in caches]


def hold(model: Model, x: Tensor, caches: list[list[Tensor]], position: Tensor, mask: Any) -> None:
    """The converted model's output and caches are the oracle's, and the output not the plain's."""
    ours, theirs = clone(caches), clone(caches)
    with torch.no_grad():
        plain = model(x, clone(caches), position, mask)
        expected = oracle(model, x, theirs, position, mask)
    torch._dynamo.reset()
    inputs = (x, clone(caches), position, mask)
    converted = moda_compile.convert(model, example_inputs=inputs, backend="eager")
    with torch.no_grad():
        found = converted(x, ours, position, mask)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    assert (expected - plain).abs().max() > 1e-2
    for one, other in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("by_hand", [False, True], ids=["sdpa", "by hand"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
def test_however_it_is_kept(put: Put, masked: bool, by_hand: bool) -> None:
    """Output, gradients where the cache takes any, and the caches' own contents."""
    model, (x, caches, position) = Model(put, by_hand), example()
    mask = None
    if masked:
        keys = attended(put)
        mask = torch.arange(keys) <= torch.arange(NEW)[:, None] + max(keys - NEW, 0) // 2
    hold(model, x, caches, position, mask)


def test_a_cache_is_not_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding it, or putting its tokens in front of its heads, would copy it with every token."""
    width = Mock(return_value=16)
    monkeypatch.setattr(kernels, "row_elements", width)
    model, inputs = Model(cat), (*example(), None)
    torch._dynamo.reset()
    converted = moda_compile.convert(model, example_inputs=inputs, backend="eager")
    with torch.no_grad():
        converted(*inputs)
    width.assert_not_called()


@pytest.mark.parametrize("value_dim", [5, 12])
@pytest.mark.parametrize("put", [cat, index_copy], ids=lambda put: put.__name__)
def test_values_of_another_head_dim(put: Put, value_dim: int) -> None:
    """What is narrower is padded, in a copy: the cache itself stays as it is."""
    hold(Model(put, value_dim=value_dim), *example(value_dim=value_dim), None)


@pytest.mark.parametrize("value_dim", [D, 12])
@pytest.mark.parametrize("put", [cat, window, functional_copy], ids=lambda put: put.__name__)
def test_gradients(put: Put, value_dim: int) -> None:
    """Of every parameter, through the attended keys and through the slots."""
    model, (x, caches, position) = Model(put, value_dim=value_dim), example(value_dim=value_dim)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)

    def gradients(output: Tensor) -> dict[str, Tensor]:
        (output * weight).sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected = gradients(oracle(model, x, caches, position, None))
    torch._dynamo.reset()
    inputs = (x, caches, position, None)
    converted = moda_compile.convert(model, example_inputs=inputs, backend="aot_eager")
    found = gradients(converted(*inputs))
    assert found.keys() == expected.keys() and len(found) == 8 * LAYERS
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0.0, atol=1e-11)


def test_the_report_counts_the_queries_tokens() -> None:
    x, caches, position = example()
    report = moda_compile.explain(Model(cat), x, caches, position, None)
    assert [a.reads for a in report.attentions] == [(), (0,), (0, 1)]
    accumulator = next(value for name, _, value in report.costs if name == "gradient accumulator")
    assert accumulator == f"{2 * B * KV_HEADS * NEW * D * 8 * (LAYERS - 1) / 1000:.3g} KB"


@pytest.mark.parametrize(
    "put", [rotated_behind, changed_inside, turned], ids=lambda put: put.__name__
)
def test_keys_that_are_changed_behind_the_cache_are_refused(put: Put) -> None:
    """Their slot would be another key than the one that is attended to."""
    x, caches, position = example()
    model = Model(put)
    with pytest.raises(RewriteError, match="queries over|over a cache") as caught:
        moda_compile.convert(model, example_inputs=(x, caches, position, None), backend="eager")
    assert "as they are attended to" in caught.value.fix
    assert "forward" not in vars(model)


def test_a_cache_that_nothing_is_put_into_is_refused() -> None:
    x, caches, position = example()
    model = Model(lambda cache, new, position: cache)
    with pytest.raises(RewriteError, match="attention over learned vectors, or over a cache"):
        moda_compile.convert(model, example_inputs=(x, caches, position, None), backend="eager")


class UpperLeft(Model):
    """SDPA's is_causal over more keys than queries: query t sees keys 0 .. t, whatever for."""

    def __init__(self) -> None:
        super().__init__(cat)
        for layer in self.layers:
            layer.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(  # type: ignore
                q, k, v, is_causal=True, enable_gqa=True
            )


def test_sdpas_own_alignment_of_causality_stays() -> None:
    model, (x, caches, position) = UpperLeft(), example()
    seen = torch.ones(NEW, PAST + NEW, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = oracle(model, x, caches, position, seen)
        torch._dynamo.reset()
        inputs = (x, caches, position, None)
        converted = moda_compile.convert(model, example_inputs=inputs, backend="eager")
        found = converted(*inputs)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_ffn_slots_take_the_new_tokens_only() -> None:
    """An FFN's slot goes through what is done to the new keys, not through the cache."""
    x, caches, position = example()

    class WithFFN(Model):
        def __init__(self) -> None:
            super().__init__(index_copy)
            self.up, self.down = (
                nn.ModuleList(nn.Linear(a, b) for _ in range(LAYERS)).double()
                for a, b in ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH))
            )

        def forward(self, x: Tensor, caches: Any, position: Tensor, mask: Any) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = x + layer(F.layer_norm(x, (WIDTH,)), caches[i], position, mask)
                x = x + self.down[i](F.gelu(self.up[i](F.layer_norm(x, (WIDTH,)))))
            return x

    report = moda_compile.explain(
        WithFFN(), x, caches, position, None, config=MoDAConfig(ffn_kv="shared")
    )
    assert not report.refusals
    assert [a.reads for a in report.attentions] == [(), (0, 1), (0, 1, 2, 3)]
