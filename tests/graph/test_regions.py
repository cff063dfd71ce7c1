"""Checkpoint bodies go into the main graph and come out again, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from moda_compile import fx
from moda_compile.passes import regions
from tests.graph.graphs import capture
from tests.models.checkpointed import WAYS, decoder

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """One region of every kind of node that is easily lost."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.plain = torch.full((8,), 2.0)

    def counts(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.linear(x) + self.calls

    def in_place(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[0] = self.linear(x)[1]
        y.mul_(self.plain)
        return y

    def autocast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() + x

    def no_grad(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.linear(x).abs().amax()
        return self.linear(x) / scale

    def random(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x)) + torch.rand_like(x)

    def sizes(self, x: Tensor) -> Tensor:
        return self.linear(x).view(x.shape[0] * x.shape[1], 8).view(x.shape) * x.shape[1]

    def returns_its_input(self, x: Tensor) -> Tensor:
        return x


class Regions(nn.Module):
    """Two checkpoints with something in front, between and behind."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(Body() for _ in range(2))
        self.kind, self.options = kind, {"use_reentrant": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        for body in self.bodies:
            x = checkpoint(getattr(body, self.kind), x * 0.5, **self.options) + 1
        return x


# What a recomputation would change again has no backward in eager mode, whoever checkpoints it.
FORWARD_ONLY = ("counts", "returns_its_input")
KINDS = [n for n in vars(Body) if not n.startswith("_") and n != "forward"]


def calls(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is CHECKPOINT]


def body(gm: GraphModule, call: Node) -> GraphModule:
    return getattr(gm, call.args[0].target)


def step(
    gm: GraphModule, inputs: Any, backward: bool = True
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """Result, gradients and what became of the inputs, from the same random numbers."""
    own = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else int(x)
        for x in inputs
    ]
    torch.manual_seed(1)
    (out,) = gm(*own)
    tensors = [x for x in own if isinstance(x, Tensor)]
    if backward:
        out.square().sum().backward()
    return out.detach(), [x.grad for x in tensors], [x.detach() for x in tensors]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, dynamic: bool) -> None:
    gm, inputs = capture(Regions(kind), X, dynamic=dynamic)
    assert len(calls(gm)) == 2
    before = copy.deepcopy(gm)
    run = functools.partial(step, inputs=inputs, backward=kind not in FORWARD_ONLY)
    expected = run(before)
    regions.inline(gm)
    assert not calls(gm)
    gm.recompile()
    flat = run(gm)
    regions.outline(gm)
    assert len(calls(gm)) == 2
    sizes = [[len(body(g, c).graph.nodes) for c in calls(g)] for g in (gm, before)]
    assert all(n <= m for n, m in zip(*sizes, strict=True))  # unused inputs are dropped
    # The same operations in the same order: equal to the last bit. But eager recomputation draws
    # random numbers anew (Inductor's does not), so with them only the nested graphs agree.
    if kind != "random":
        torch.testing.assert_close(flat, expected, rtol=0, atol=0)
    torch.testing.assert_close(run(gm), expected, rtol=0, atol=0)
    for call in calls(gm):
        assert call.kwargs == {"use_reentrant": False}
        assert [tuple(t.shape) for t in fx.value(call)] == [X.shape] * len(fx.value(call))


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder(way: str) -> None:
    ids = torch.arange(10).view(2, 5)
    gm, inputs = capture(decoder(WAYS[way]), ids)
    expected = step(copy.deepcopy(gm), inputs)
    context_fns = [m.meta.get("_checkpoint_context_fn") for _, m in fx.subgraphs(gm)]
    assert len(context_fns) == (6 if way == "nested" else 3)
    assert all((f is not None) == (way == "selective") for f in context_fns)
    number = len(calls(gm))
    regions.inline(gm)
    attentions = [n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention")]
    assert [fx.module_path(n) for n in attentions] == [f"blocks.{i}.attention" for i in range(3)]
    assert all("checkpointed.py:" in (fx.source_line(n) or "") for n in attentions)
    assert all(fx.is_tensor(n) for n in attentions)
    assert fx.is_parameter(attentions[0].args[0].all_input_nodes[0]) is False
    linears = [n for n in gm.graph.nodes if fx.calls(n, "linear")]
    assert all(fx.is_parameter(n.args[1]) for n in linears)  # not a body's stand-in
    regions.outline(gm)
    assert len(calls(gm)) == number
    torch.testing.assert_close(step(gm, inputs), expected, rtol=0, atol=0)
    after = [m.meta.get("_checkpoint_context_fn") for _, m in fx.subgraphs(gm)]
    assert len(after) == len(context_fns)
    assert all(f is g for f, g in zip(after, context_fns, strict=True))


def test_options_survive() -> None:
    gm, _ = capture(Regions("sizes", determinism_check="none"), X)
    kwargs = [dict(c.kwargs) for c in calls(gm)]
    assert kwargs[0]["determinism_check"] == "none"
    regions.inline(gm)
    regions.outline(gm)
    assert [dict(c.kwargs) for c in calls(gm)] == kwargs


def flat_regions() -> tuple[GraphModule, Any, list[Node], list[Node]]:
    """A flat graph with its begins and ends."""
    gm, inputs = capture(Regions("sizes"), X)
    regions.inline(gm)
    nodes = list(gm.graph.nodes)
    begins = [n for n in nodes if n.target is regions.begin_region]
    ends = [n for n in nodes if n.target is regions.end_region]
    assert len(begins) == len(ends) == 2
    return gm, inputs, begins, ends


@pytest.mark.parametrize("inside", [True, False])
def test_a_node_belongs_where_it_stands(inside: bool) -> None:
    gm, inputs, _, ends = flat_regions()
    x = next(n for n in gm.graph.nodes if fx.calls(n, "mul"))
    with gm.graph.inserting_before(ends[0] if inside else ends[0].next):
        added = fx.insert(gm, torch.sin, (x,), like=x)
    output = fx.last(gm.graph)
    output.args = ((output.args[0][0], added),)
    regions.outline(gm)
    held = [sum(n.target is torch.sin for n in body(gm, c).graph.nodes) for c in calls(gm)]
    assert held == [int(inside), 0]
    assert len(fx.value(calls(gm)[0])) == 1 + int(inside)
    torch.testing.assert_close(gm(*inputs)[1], torch.sin(X * 0.5), rtol=0, atol=0)


def test_what_later_regions_read_is_handed_on() -> None:
    """A tensor of the first region, read in the second, is the one's output, the other's input."""
    gm, inputs, begins, ends = flat_regions()
    first = next(n for n in gm.graph.nodes if fx.calls(n, "linear"))
    last = next(n for n in reversed(gm.graph.nodes) if fx.calls(n, "mul"))
    assert begins[0] < first < ends[0] < begins[1] < last < ends[1]
    with gm.graph.inserting_before(last):
        last.args = (fx.insert(gm, torch.add, (last.args[0], first), like=last), *last.args[1:])
    gm.recompile()
    expected = step(gm, inputs)
    regions.outline(gm)
    torch.testing.assert_close(step(gm, inputs), expected, rtol=0, atol=0)
    one, two = calls(gm)
    assert len(fx.value(one)) == 2 and len(fx.value(two)) == 1
    items = {n for n in one.users if n.target is operator.getitem}
    assert items & set(two.args)


def by_hand(taken: Callable[[Graph, Node], Node]) -> GraphModule:
    """A checkpoint of a body with a constant of its own; ``taken`` makes the graph's result."""
    inner = Graph()
    y = inner.call_function(torch.add, (inner.placeholder("x"), inner.get_attr("constant")))
    inner.output((y, None))
    root = nn.Module()
    root.constant = torch.full((2,), 3.0)
    outer_root = nn.Module()
    outer_root.wrap_body_0 = GraphModule(root, inner)
    outer_root.constant = torch.full((2,), 5.0)
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.mul, (x, graph.get_attr("constant")))
    args = (graph.get_attr("wrap_body_0"), first)
    call = graph.call_function(CHECKPOINT, args, {"use_reentrant": False})
    graph.output((taken(graph, call),))
    return GraphModule(outer_root, graph)


def test_constants_of_one_name() -> None:
    gm = by_hand(lambda graph, call: graph.call_function(operator.getitem, (call, 0)))
    x = torch.tensor([1.0, 2.0])
    expected = x * 5 + 3
    regions.inline(gm)
    assert not hasattr(gm, "wrap_body_0")
    gm.recompile()
    assert torch.equal(gm(x)[0], expected)
    regions.outline(gm)
    assert torch.equal(gm(x)[0], expected)
    held = [n for n in body(gm, calls(gm)[0]).graph.nodes if n.op == "get_attr"]
    assert len(held) == 1
    # The constant is where it is read, and nowhere else.
    assert [n for n, _ in gm.named_buffers(recurse=False)] == ["constant"]
    assert not any(isinstance(v, Tensor) for v in vars(gm).values())
    assert gm.constant[0] == 5


@pytest.mark.parametrize("index", [1, slice(0, 1)])
def test_results_that_are_no_nodes_are_left_alone(index: Any) -> None:
    gm = by_hand(lambda graph, call: graph.call_function(operator.getitem, (call, index)))
    before = [n.format_node() for n in gm.graph.nodes]
    regions.inline(gm)
    assert [n.format_node() for n in gm.graph.nodes] == before


def test_other_regions_are_left_alone() -> None:
    def branches(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: F.relu(x), (x,))

    gm, _ = capture(branches, X)
    before = [n.format_node() for n in gm.graph.nodes]
    regions.inline(gm)
    regions.outline(gm)
    assert [n.format_node() for n in gm.graph.nodes] == before


def apply(inner: GraphModule, x: Tensor) -> Tensor:
    return inner(x)


def test_a_region_that_stays_in_a_region() -> None:
    """Such as torch.cond in a checkpoint: its graphs go along."""

    def of(root: nn.Module, call: Callable[[Graph, Node], Any]) -> GraphModule:
        graph = Graph()
        graph.output(call(graph, graph.placeholder("x")))
        return GraphModule(root, graph)

    root = nn.Module()
    root.inner = of(nn.Module(), lambda graph, x: graph.call_function(torch.sin, (x,)))
    root.wrap_body_0 = of(
        root, lambda graph, x: (graph.call_function(apply, (graph.get_attr("inner"), x)),)
    )
    gm = of(
        root,
        lambda graph, x: graph.call_function(
            operator.getitem,
            (graph.call_function(CHECKPOINT, (graph.get_attr("wrap_body_0"), x)), 0),
        ),
    )
    expected = X.sin()
    regions.inline(gm)
    gm.recompile()
    torch.testing.assert_close(gm(X), expected, rtol=0, atol=0)
    regions.outline(gm)
    torch.testing.assert_close(gm(X), expected, rtol=0, atol=0)
    assert len(calls(gm)) == 1
    children = [len(list(g.children())) for g in (gm, body(gm, calls(gm)[0]))]
    assert children == [1, 1]


def test_dead_code_elimination_keeps_the_ends() -> None:
    gm, inputs, begins, ends = flat_regions()
    gm.graph.eliminate_dead_code()
    assert all(n in gm.graph.nodes for n in (*begins, *ends))
    regions.outline(gm)
    assert len(calls(gm)) == 2
