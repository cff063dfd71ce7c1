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


def test_weights() -> None:
    """Parameters, what is made from them only, and inputs that a linear layer takes as weight."""
    g = Graph()
    weight, other, x, given = (g.placeholder(name) for name in ("weight", "other", "x", "given"))
    for node in (weight, other):
        node.meta[fx.VALUE] = nn.Parameter(torch.empty(3, 3))
    merged = g.call_function(torch.add, (weight, g.call_function(torch.matmul, (other, weight))))
    mixed = g.call_function(torch.add, (weight, x))
    made = g.call_function(torch.ones, (3, 3))
    g.call_function(torch.nn.functional.linear, (x, given))
    assert [fx.is_weight(n) for n in (weight, merged, given, mixed, x, made, None)] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip
    long = weight
    for _ in range(100):  # what takes long to tell is not taken for one
        long = g.call_function(torch.sin, (long,))
    assert not fx.is_weight(long)


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


# --- writes in place ----------------------------------------------------------------------------


def test_written_into() -> None:
    """x -> v = x.view(-1); v.add_(1); c = x[i] (a copy); c.add_(1); s = x[0]; s += 1; x.relu()"""
    g = Graph()
    mode = FakeTensorMode()
    x, i = g.placeholder("x"), g.placeholder("i")
    x.meta[fx.VALUE] = mode.from_tensor(torch.randn(2, 3))
    i.meta[fx.VALUE] = mode.from_tensor(torch.tensor([1, 0]))
    out = g.output(x)
    gm = GraphModule(nn.Module(), g)
    g.inserting_before(out)
    v = fx.insert(gm, "view", (x, -1), like=x)
    to_view = fx.insert(gm, "add_", (v, 1.0), like=x)
    copied = fx.insert(gm, operator.getitem, (x, i), like=x)
    to_copy = fx.insert(gm, "add_", (copied, 1.0), like=x)
    row = fx.insert(gm, operator.getitem, (x, 0), like=x)
    to_row = fx.insert(gm, operator.iadd, (row, 1.0), like=x)
    again = fx.insert(gm, "mul_", (to_row, 2.0), like=x)
    read = fx.insert(gm, "relu", (x,), like=x)
    assert fx.written_into([x], before=read) == [to_view, to_row, again]
    assert fx.written_into([row], before=read) == [to_view, to_row, again]
    assert fx.written_into([x, to_row], before=again) == [to_view]
    assert fx.written_into([x], before=to_view) == []
    assert fx.written_into([copied], before=read) == [to_copy]
    assert fx.written_into([i], before=read) == []
    assert [fx.memory(n) for n in (v, to_view, row, copied, to_copy)] == [x, x, x, copied, copied]


def test_written_into_sees_what_was_added_later() -> None:
    g = Graph()
    x = g.placeholder("x")
    read = g.call_method("relu", (x,))
    assert fx.written_into([x], before=read) == []
    with g.inserting_before(read):
        write = g.call_method("zero_", (x,))
    assert fx.written_into([x], before=read) == [write]
    g.erase_node(write)
    assert fx.written_into([x], before=read) == []


def test_reach_through_writes() -> None:
    """What is read from memory depends on what was written there before, and on nothing later."""
    g = Graph()
    a, b = g.placeholder("a"), g.placeholder("b")
    base = g.call_method("new_zeros", (a, 4))
    view = g.call_method("view", (base, 2, 2))
    before = g.call_method("relu", (base,))
    g.call_method("index_add_", (view, 0, b, b))
    after = g.call_method("relu", (base,))
    found = fx.reach(g.nodes, [a, b])
    assert [found[n] for n in (base, before, after)] == [0b01, 0b01, 0b11]


def test_a_fake_result_from_fewer_arguments() -> None:
    gm, n = graph()
    with gm.graph.inserting_before(n["c"]):
        both = fx.insert(gm, torch.add, (n["a"], n["x"]), like=n["c"], instead=(n["a"], n["a"]))
    assert both.args == (n["a"], n["x"])
    assert both in n["x"].users
    assert fx.value(both).shape == (2, 3)
