"""The pass over Inductor's graphs that has layers under one mask look at it once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from moda_compile import backend
from moda_compile.passes import visible

OPS = torch.ops.moda_compile
B, HQ, HK, D = 2, 4, 2, 64
KEYS = 5000  # two chunks


@pytest.fixture(autouse=True)
def shape_env() -> Iterator[ShapeEnv]:
    """All tensors are fake: there need be no GPU."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        yield env


def mask_of(*shape: Any, device: str = "cuda", dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype)


def traced(masks: list[Tensor | None], *, queries: int = 1, kv_heads: int = HK) -> GraphModule:
    """A layer under each of the masks, each with one slot. None: it has no mask."""
    own = [mask for mask in masks if mask is not None]
    device, keys = own[0].device, own[0].shape[-1]
    inputs = [
        torch.empty(B, HQ, queries, D, device=device),
        torch.empty(B, kv_heads, keys, D, device=device),
        *dict.fromkeys(own),  # a tensor once
    ]

    def call(q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        place = {id(mask): x for mask, x in zip(dict.fromkeys(own), given, strict=True)}
        for mask in masks:
            slot = [q.narrow(1, 0, kv_heads)]
            which = None if mask is None else place[id(mask)]
            q, _ = OPS.depth_attention(q, k, k, slot, slot, False, 0.125, which)
        return q

    return make_fx(call)(*inputs)


def changed(masks: list[Tensor | None], **options: int) -> Graph:
    """The graph after the pass."""
    graph = traced(masks, **options).graph
    visible.run(graph)
    return graph


def looks(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=OPS.visible_keys.default))


def given(graph: Graph) -> list[Any]:
    """What each layer is told of its mask."""
    found = graph.find_nodes(op="call_function", target=OPS.depth_attention.default)
    return [node.args[8] if len(node.args) > 8 else None for node in found]


def test_layers_under_one_mask_share_a_look() -> None:
    first, second = mask_of(1, 1, 1, KEYS), mask_of(B, 1, 1, KEYS, dtype=torch.float32)
    graph = changed([first, second, first, None, second])
    one, other = looks(graph)
    assert given(graph) == [one, other, one, None, other]
    assert (one.args[1:], other.args[1:]) == ((1, 1), (B, 1))
    assert one.meta["val"].shape == (1, 1, 3 * 2)  # of two chunks
    assert other.meta["val"].dtype == torch.int32
    again = [node.args for node in graph.nodes]
    visible.run(graph)  # there is nothing left to do
    assert [node.args for node in graph.nodes] == again


@pytest.mark.parametrize(
    ("shape", "expanded", "kv_heads", "rows"),
    [
        ((B, 1, 1, KEYS), (B, HQ, 1, KEYS), HK, (B, 1)),
        ((1, 1, 1, KEYS), (B, HQ, 3, KEYS), HK, (1, 1)),
        ((KEYS,), (KEYS,), HK, (1, 1)),
        ((1, HQ, 1, KEYS), (B, HQ, 1, KEYS), HQ, (1, HQ)),
    ],
    ids=str,
)
def test_what_is_expanded_is_looked_at_once(
    shape: tuple[int, ...], expanded: tuple[int, ...], kv_heads: int, rows: tuple[int, int]
) -> None:
    mask = mask_of(*shape).expand(expanded)
    queries = mask.shape[2] if mask.dim() == 4 else 1
    (look,) = looks(changed([mask], queries=queries, kv_heads=kv_heads))
    assert look.args[1:] == rows


@pytest.mark.parametrize(
    ("shape", "queries"),
    [
        ((1, HQ, 1, KEYS), 1),  # the heads of a key head differ
        ((1, 1, 3, KEYS), 3),  # so do its tokens
        ((1, 1, 1, KEYS), 17),  # more queries than `decode` takes
        ((1, 1, 1, 5), 5),  # nor does it take as many as there are keys
    ],
    ids=str,
)
def test_what_no_kernel_asks_for_is_left(shape: tuple[int, ...], queries: int) -> None:
    graph = changed([mask_of(*shape)], queries=queries)
    assert not looks(graph)
    assert given(graph) == [None]


def test_a_cpu_needs_none() -> None:
    assert not looks(changed([mask_of(1, 1, 1, KEYS, device="cpu")]))


def test_any_number_of_keys_replays_the_graph(shape_env: ShapeEnv) -> None:
    symbol = shape_env.create_symbol(KEYS, ConstantSource("keys"), DimDynamic.DYNAMIC)
    keys = shape_env.create_symintnode(symbol, hint=KEYS)
    mask = mask_of(1, 1, 1, keys)
    graph = changed([mask, mask])
    (look,) = looks(graph)
    assert given(graph) == [look, look]
    assert not shape_env.guards


def test_inductor_compiles_the_changed_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[GraphModule] = []
    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda gm, inputs: seen.append(gm))
    mask = mask_of(1, 1, 1, KEYS)
    backend._unfold_and_compile(traced([mask, mask]), [])
    assert len(looks(seen[0].graph)) == 1
    assert seen[0].code.count("visible_keys.default(") == 1
