"""How a key comes out of its projection: redone on the attention's own input, it is that key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from moda_compile import fx
from moda_compile.patterns import Refused, projection, sdpa

HEAD_DIM, WIDTH = 4, 12


def rotated(x: Tensor) -> Tensor:
    """Half-split rotation of [.., T, d] by the token."""
    angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(nn.Module):
    """A self-attention; ``cut`` makes q, k, v [B, H, T, d] from x."""

    def __init__(
        self,
        cut: Callable[[Any, Tensor], tuple[Tensor, ...]],
        *,
        kv_heads: int = 2,
        groups: int = 1,
        bias: bool = False,
        norm: str = "none",
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.cut, self.kv_heads, self.groups = cut, kv_heads, groups
        self.norm, self.rotary = norm, rotary
        self.heads = kv_heads * groups
        query, kv = self.heads * HEAD_DIM, kv_heads * HEAD_DIM
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=bias) for n in (query, kv, kv))
        self.qkv = nn.Linear(WIDTH, query + 2 * kv, bias=bias)
        self.conv_weight = nn.Parameter(torch.randn(WIDTH, query + 2 * kv))
        self.conv_bias = nn.Parameter(torch.randn(query + 2 * kv))
        self.k_norm = nn.RMSNorm(kv if norm == "full" else HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self, x)
        if self.norm == "head":
            k = self.k_norm(k)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)


def by_head(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], -1, HEAD_DIM).transpose(1, 2)


def separate(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    k = m.k(x)
    if m.norm == "full":
        k = m.k_norm(k)
    return by_head(m.q(x)), by_head(k), by_head(m.v(x))


def permuted(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        y.reshape(*x.shape[:2], -1, HEAD_DIM).permute(0, 2, 1, 3) for y in (m.q(x), m.k(x), m.v(x))
    )


def chunk(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(by_head(y) for y in m.qkv(x).chunk(3, dim=-1))


def sizes(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    kv = m.kv_heads * HEAD_DIM
    return tuple(by_head(y) for y in m.qkv(x).split([m.heads * HEAD_DIM, kv, kv], dim=2))


def sliced(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    query, kv = m.heads * HEAD_DIM, m.kv_heads * HEAD_DIM
    packed = m.qkv(x)
    parts = (packed[..., :query], packed[..., query : query + kv], packed[:, :, query + kv :])
    return tuple(by_head(y) for y in parts)


def three_first(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """timm's: [3, B, H, T, d].unbind(0)."""
    packed = m.qkv(x).reshape(*x.shape[:2], 3, m.heads, HEAD_DIM)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def heads_first(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, 3, d]"""
    packed = m.qkv(x).view(*x.shape[:2], m.heads, 3, HEAD_DIM)
    return tuple(y.transpose(1, 2) for y in packed.unbind(3))


def heads_first_joined(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """GPT-NeoX: [B, T, H, 3 d].chunk"""
    packed = m.qkv(x).view(*x.shape[:2], m.heads, 3 * HEAD_DIM).transpose(1, 2)
    return packed.chunk(3, dim=-1)


def grouped(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Falcon, InternLM2: [B, T, Hk, G + 2, d]"""
    packed = m.qkv(x).view(*x.shape[:2], m.kv_heads, m.groups + 2, HEAD_DIM)
    q, k, v = packed[..., :-2, :].flatten(2, 3), packed[..., -2, :], packed[..., -1, :]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def conv1d(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """GPT-2: addmm over flattened tokens, weights [in, out]."""
    flat = torch.addmm(m.conv_bias, x.view(-1, x.size(-1)), m.conv_weight)
    kv = m.kv_heads * HEAD_DIM
    parts = flat.view(*x.shape[:2], -1).split([m.heads * HEAD_DIM, kv, kv], dim=2)
    return tuple(by_head(y) for y in parts)


def matmul(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    kv = m.kv_heads * HEAD_DIM
    return tuple(
        by_head(y) for y in (x @ m.conv_weight).split([m.heads * HEAD_DIM, kv, kv], dim=-1)
    )


def keywords(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    flat = torch.addmm(
        input=m.conv_bias, mat1=torch.flatten(input=x, end_dim=1), mat2=m.conv_weight
    )
    kv = m.kv_heads * HEAD_DIM
    packed = torch.reshape(input=flat, shape=(*x.shape[:2], -1))
    parts = packed.split(dim=2, split_size=[m.heads * HEAD_DIM, kv, kv])
    return tuple(by_head(y) for y in parts)


def repeated(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """KV repeated before the rotation, which then works on Hq heads."""
    k, v = (y.repeat_interleave(m.groups, dim=1) for y in (by_head(m.k(x)), by_head(m.v(x))))
    return by_head(m.q(x)), k, v


EQUAL = [separate, permuted, chunk, sizes, sliced, three_first, heads_first, heads_first_joined]
ALL = [separate, permuted, sizes, sliced, grouped, conv1d, matmul, keywords]


def run(gm: GraphModule, *nodes: Any, inputs: Any) -> Any:
    graph = Graph()
    copied: dict[Any, Any] = {}
    graph.graph_copy(gm.graph, copied)
    graph.output(tuple(copied[n] for n in nodes))
    return GraphModule(gm, graph)(*inputs)


def redo(layer: nn.Module, x: Tensor) -> None:
    """Trace, redo keys and values from the attention's own input, compare bit for bit."""
    torch._dynamo.reset()
    seen: list[Any] = []

    def keep(gm: GraphModule, inputs: Any) -> Any:
        seen.extend((gm, inputs))
        return gm.forward

    layer(x)
    torch.compile(layer, backend=keep, dynamic=False)(x)
    gm, inputs = seen
    (node,) = (n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention"))
    attention = sdpa.match(node)
    assert attention is not None
    again = []
    for result in (attention.key, attention.value):
        found = projection.trace(result)
        shape = fx.value(result).shape
        assert (found.heads, found.head_dim) == (shape[1], shape[3])
        with gm.graph.inserting_before(node):
            weight, bias = found.weight(gm)
            features = fx.insert(gm, F.linear, (found.layer.input, weight, bias), like=node)
            again.append(found.apply(gm, features))
        assert fx.value(again[-1]).shape == shape
    gm.graph.lint()
    key, value, key_again, value_again = run(
        gm, attention.key, attention.value, *again, inputs=inputs
    )
    # A fused product may block its sums over WIDTH terms differently: a few roundings of float64.
    torch.testing.assert_close(key_again, key, rtol=0, atol=1e-14)
    torch.testing.assert_close(value_again, value, rtol=0, atol=1e-14)


def make(cut: Any, **options: Any) -> Layer:
    torch.manual_seed(0)
    layer = Layer(cut, **options).double()
    with torch.no_grad():
        layer.k_norm.weight.add_(0.3 * torch.randn_like(layer.k_norm.weight))
    return layer


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cut", EQUAL, ids=lambda f: f.__name__)
def test_layouts_of_equal_heads(cut: Any, bias: bool) -> None:
    redo(make(cut, kv_heads=3, bias=bias, norm="head", rotary=True), tokens(2, 5))


@pytest.mark.parametrize("cut", ALL, ids=lambda f: f.__name__)
def test_layouts_of_groups(cut: Any) -> None:
    redo(make(cut, kv_heads=2, groups=3, bias=True, norm="head", rotary=True), tokens(2, 5))


@pytest.mark.parametrize("cut", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("batch", "length", "kv_heads"), [(1, 5, 2), (2, 1, 2), (1, 1, 2), (2, 5, 1), (1, 1, 1)]
)
def test_axes_of_size_one(cut: Any, batch: int, length: int, kv_heads: int) -> None:
    """They have no stride to be told by."""
    redo(make(cut, kv_heads=kv_heads, groups=2, rotary=True), tokens(batch, length))


@pytest.mark.parametrize("cut", EQUAL, ids=lambda f: f.__name__)
def test_one_head_only(cut: Any) -> None:
    redo(make(cut, kv_heads=1, norm="head", bias=True), tokens(2, 3))


@pytest.mark.parametrize("size", [HEAD_DIM, 2, 3])
def test_axes_of_equal_size(size: int) -> None:
    """B = T = Hk (= d): only strides tell them apart."""
    for cut in (separate, sizes, grouped):
        redo(make(cut, kv_heads=size, groups=2, norm="head", rotary=True), tokens(size, size))


def test_norm_over_the_full_width() -> None:
    """OLMo2: the waist is flat."""
    redo(make(separate, kv_heads=2, norm="full", rotary=True), tokens(2, 5))


def test_a_repetition_that_is_seen_through() -> None:
    redo(make(repeated, kv_heads=2, groups=2), tokens(2, 5))


def refusal(module: nn.Module, *inputs: Tensor) -> str:
    torch._dynamo.reset()
    seen: list[GraphModule] = []
    torch.compile(module, backend=lambda gm, _: (seen.append(gm), gm.forward)[1])(*inputs)
    (node,) = (n for n in seen[0].graph.nodes if fx.calls(n, "scaled_dot_product_attention"))
    attention = sdpa.match(node)
    assert attention is not None
    with pytest.raises(Refused) as caught:
        projection.trace(attention.key)
    assert "ffn_kv='none'" in caught.value.fix
    return caught.value.reason


def test_two_layers_are_refused() -> None:
    """LoRA on k is still self-attention, but there is no single projection to share."""

    class Adapted(Layer):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.adapted(x))
            self.a, self.b = nn.Linear(WIDTH, 2), nn.Linear(2, 8)
            self.drop = nn.Dropout(0.1)

        def adapted(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                by_head(self.q(x)),
                by_head(self.k(x) + self.b(self.a(self.drop(x)))),
                by_head(self.v(x)),
            )

    assert "comes from 2 linear layers" in refusal(Adapted(), torch.randn(2, 5, WIDTH))


def test_features_cut_in_an_unknown_way_are_refused() -> None:
    """Every second feature is a key's: no offset and stride over heads says that."""

    def strided(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        packed = m.qkv(x)[..., :16]
        return by_head(m.q(x)), *(by_head(packed[..., i::2].contiguous()) for i in (0, 1))

    assert "layout" in refusal(Layer(strided), torch.randn(2, 5, WIDTH))
