"""The small questions that patterns and passes ask of a graph."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from moda_compile import fx

PREFIX = "L['self']."


def graph() -> tuple[GraphModule, dict[str, Node]]:
    """x -> a = relu(x); b = a.transpose(0, 1); c = a + x; output (b, c)"""
    g = Graph()
    x = g.placeholder("x")
    a = g.call_function(F.relu, (x,), {"inplace": False})
    b = g.call_method("transpose", (a, 0, 1))
    c = g.call_function(operator.add, (a, x))
    g.output((b, c))
    mode = FakeTensorMode()
    x.meta[fx.VALUE] = mode.from_tensor(torch.randn(2, 3))
    for node in (a, b, c):
        fx.annotate(node)
    return GraphModule(nn.Module(), g), {"x": x, "a": a, "b": b, "c": c}


def test_values_follow_the_calls() -> None:
    _, n = graph()
    assert fx.value(n["b"]).shape == (3, 2)
    assert fx.is_tensor(n["c"])
    assert fx.value(None) is None
    assert fx.value(3) is None
    assert not fx.is_tensor("x")


def test_names() -> None:
    _, n = graph()
    assert [fx.name_of(n[i]) for i in "abc"] == ["relu", "transpose", "add"]
    assert fx.calls(n["b"], "permute", "transpose")
    assert not fx.calls(n["x"], "x")
    assert not fx.calls(None, "relu")


def test_arguments_by_position_and_by_name() -> None:
    _, n = graph()
    assert fx.argument(n["b"], 1, "dim0") == 0
    assert fx.argument(n["a"], 1, "inplace") is False
    assert fx.argument(n["a"], 5, "nothing", default=7) == 7


def test_calls_op_under_either_name() -> None:
    g = Graph()
    op = torch.ops.aten.relu
    for target in (op, op.default):
        assert fx.calls_op(g.call_function(target, ()), op)
    assert not fx.calls_op(g.call_function(torch.ops.aten.gelu, ()), op)


def test_parameters_and_their_views() -> None:
    g = Graph()
    mode = FakeTensorMode()
    weight, x = g.placeholder("weight"), g.placeholder("x")
    with mode:
        weight.meta[fx.VALUE] = nn.Parameter(torch.empty(2, 3))
        x.meta[fx.VALUE] = torch.empty(2, 3)
    turned = g.call_method("t", (weight,))
    by_name = g.call_function(torch.transpose, (), {"input": weight, "dim0": 0, "dim1": 1})
    scaled = g.call_function(operator.mul, (weight, 2.0))
    assert [fx.is_parameter(n) for n in (weight, turned, by_name, x, scaled)] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert not fx.is_parameter(None)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], ("",)),
        (["L['self']"], ("",)),
        ([PREFIX + "layers.0", PREFIX + "layers.0.attn"], ("", "layers.0", "layers.0.attn")),
        ([PREFIX + "h[3]"], ("", "h.3")),
        (["L['self']._modules['h']._modules['3'].mlp"], ("", "h.3.mlp")),
        (["L['self']._modules['layers'][0]", "L['self']._modules['layers'][0]"], ("", "layers.0")),
        (["L['fn'].model.layers[11].self_attn"], ("", "model.layers.11.self_attn")),
    ],
)
def test_module_stack(paths: list[str], expected: tuple[str, ...]) -> None:
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {str(i): (path, nn.Module) for i, path in enumerate(paths)}
    assert fx.module_stack(node) == expected
    assert fx.module_path(node) == expected[-1]


def test_module_paths_of_a_real_graph_name_real_modules() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Inner(), Inner()])
            self.named = nn.ModuleDict({"one": Inner()})
            self.chain = nn.Sequential(nn.Identity(), Inner())

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.chain(self.named["one"](x)).relu()

    model = Model()
    seen: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any) -> Any:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep)(torch.randn(2))
    found = [n for n in seen[0].graph.nodes if fx.calls(n, "relu")]
    paths = [fx.module_path(n) for n in found]
    assert paths == ["blocks.0", "blocks.1", "named.one", "chain.1", ""]
    assert all(model.get_submodule(path) is not None for path in paths)
    lines = {fx.source_line(n) for n in found}
    assert len(lines) == 2
    assert all(str(line).rpartition(":")[0] == __file__ for line in lines)


def test_source_line_skips_torch() -> None:
    node = Graph().placeholder("x")
    assert fx.source_line(node) is None
    node.meta["stack_trace"] = (
        '  File "/home/me/model.py", line 12, in forward\n    return self.mlp(x)\n'
        '  File "/env/torch/nn/modules/linear.py", line 134, in forward\n    return F.linear()\n'
    )
    assert fx.source_line(node) == "/home/me/model.py:12"


def test_reach() -> None:
    gm, n = graph()
    found = fx.reach(gm.graph.nodes, [n["a"], n["b"]])
    assert [found[n[i]] for i in "xabc"] == [0b00, 0b01, 0b11, 0b01]


def test_upstream_stops() -> None:
    _, n = graph()
    assert set(fx.upstream(n["c"], lambda node: False)) == {n["c"], n["a"], n["x"]}
    assert set(fx.upstream(n["b"], lambda node: node is n["a"])) == {n["b"], n["a"]}
    assert fx.upstream(n["b"], lambda node: True) == [n["b"]]


def test_insert_and_copy() -> None:
    gm, n = graph()
    n["c"].meta["stack_trace"] = 'File "model.py", line 3'
    with gm.graph.inserting_before(n["c"]):
        doubled = fx.insert(gm, operator.mul, (n["x"], 2.0), like=n["c"])
        pair = fx.insert(gm, torch.unbind, (doubled,), like=n["c"])
        second = fx.item(gm, pair, 1)
        replace = {n["x"]: doubled}
        fx.copy_nodes(gm, [n["a"], n["b"]], replace)
    assert doubled.meta["stack_trace"] == n["c"].meta["stack_trace"]
    assert fx.value(second).shape == (3,)
    assert fx.value(replace[n["b"]]).shape == (3, 2)
    assert replace[n["a"]].args[0] is doubled
    n["c"].replace_input_with(n["x"], replace[n["a"]])
    gm.recompile()
    gm.graph.lint()
    x = torch.randn(2, 3)
    assert torch.equal(gm(x)[1], x.relu() + (2 * x).relu())


def test_annotate_without_fake_values() -> None:
    g = Graph()
    node = g.call_function(operator.add, (g.placeholder("x"), 1))
    fx.annotate(node)
    assert fx.VALUE not in node.meta


def test_subgraphs() -> None:
    inner = GraphModule(nn.Module(), graph()[0].graph)
    root = nn.Module()
    root.body = inner
    g = Graph()
    x = g.placeholder("x")
    body = g.get_attr("body")
    call = g.call_function(torch.ops.higher_order.invoke_subgraph, (body, "body", x))
    g.output(call)
    gm = GraphModule(root, g)
    assert list(fx.subgraphs(gm)) == [(call, gm.body)]
    assert list(fx.subgraphs(inner)) == []
