"""The passes' work grows with the number of nodes, no faster: counted in lines, not seconds."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

import moda_compile
from moda_compile import MoDAConfig, fx, pipeline
from moda_compile.patterns import experts, ffn

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("moda_compile", "patterns", "kernels"))


@functools.cache
def stacks() -> ModuleType:
    """The benchmark's model: what is measured there is counted here."""
    path = ROOT / "benchmarks" / "pass_overhead.py"
    spec = importlib.util.spec_from_file_location("pass_overhead", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_run(function: Callable[[], Any]) -> Counter[str]:
    """How many lines of the library's own source a call runs, by function; loops count each time.

    What torch does inside one call of ours is not counted.
    """
    lines: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            lines[frame.f_code] += 1
        return count

    def enter(frame: FrameType, _event: str, _arg: Any) -> Any:
        return count if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        function()
    finally:
        sys.settrace(before)
    counted: Counter[str] = Counter()
    for code, number in lines.items():
        counted[f"{Path(code.co_filename).name}:{code.co_name}"] += number
    return counted


def growth(small: Counter[str], large: Counter[str]) -> str:
    """The functions whose share grew most, for a failure's message."""
    most = sorted(large, key=lambda name: large[name] - 2 * small[name], reverse=True)[:5]
    return ", ".join(f"{name} {small[name]} -> {large[name]}" for name in most)


@pytest.mark.slow
@pytest.mark.parametrize(("ffn_kv", "layers"), [("none", 25), ("shared", 12)])
def test_twice_the_layers_twice_the_work(ffn_kv: Any, layers: int) -> None:
    """2.1: a layer more is as much work again; the rest is what each of O(layers^2) arguments of
    the rewritten graph costs, a line or two. (Work that is quadratic shows here as it would from
    50 to 100 layers with a bound of 2.2.)
    """
    counts = []
    config = MoDAConfig(ffn_kv=ffn_kv)
    for count in (layers, 2 * layers):
        gm = stacks().graph_of(count)
        run = functools.partial(pipeline.transform, gm, config, strict=True)
        counts.append(lines_run(run))
        assert sum(counts[-1].values()) > 100 * count  # else nothing was counted
    small, large = (sum(c.values()) for c in counts)
    assert large / small <= 2.1, growth(*counts)


# --- the parts, on graphs made by hand ----------------------------------------------------------


def chain(length: int, writes: bool) -> Graph:
    """x -> x.view -> [x.add_] -> relu, and so on."""
    graph = Graph()
    node = graph.placeholder("x")
    for _ in range(length):
        view = graph.call_method("view", (node, -1))
        if writes:
            graph.call_method("add_", (view, 1.0))
        node = graph.call_function(torch.relu, (node,))
    graph.output(node)
    return graph


@pytest.mark.parametrize("writes", [False, True])
def test_writes_are_indexed_once(writes: bool) -> None:
    def ask_everywhere(graph: Graph) -> None:
        (last,) = [n for n in graph.nodes if n.op == "output"]
        found = [fx.written_into([n], before=last) for n in graph.nodes if n.op != "output"]
        assert any(found) == writes

    small, large = (
        sum(lines_run(functools.partial(ask_everywhere, chain(n, writes))).values())
        for n in (200, 400)
    )
    assert large / small <= 2.1


@pytest.mark.parametrize("find", [ffn.find, experts.find])
def test_residual_streams_are_not_walked_again_and_again(find: Callable[[Graph], Any]) -> None:
    """Norms written by hand are pointwise up to the mean; the stream before is a chain of sums."""

    def stack(layers: int) -> Graph:
        from torch._subclasses.fake_tensor import FakeTensorMode

        graph, mode = Graph(), FakeTensorMode()

        def placed(value: Any) -> Node:
            node = graph.placeholder(f"p{len(graph.nodes)}")
            node.meta[fx.VALUE] = value
            return node

        with mode:
            x = placed(torch.empty(2, 3, 8))
            weights = [placed(torch.nn.Parameter(torch.empty(8, 8))) for _ in range(2)]
        out = graph.output(x)
        gm = GraphModule(torch.nn.Module(), graph)
        graph.inserting_before(out)
        for _ in range(layers):
            # x first: a walk that takes the first operand first goes up the stream.
            normed = fx.insert(gm, torch.mean, (x, -1, True), like=x)
            normed = fx.insert(gm, torch.mul, (x, normed), like=x)
            made = fx.insert(gm, torch.nn.functional.linear, (normed, weights[0]), like=x)
            made = fx.insert(gm, torch.nn.functional.gelu, (made,), like=x)
            made = fx.insert(gm, torch.nn.functional.linear, (made, weights[1]), like=x)
            x = fx.insert(gm, torch.add, (x, made), like=x)
        out.args = (x,)
        return graph

    small, large = (lines_run(functools.partial(find, stack(n))) for n in (40, 80))
    assert len(ffn.find(stack(3))) == 3
    assert sum(large.values()) / sum(small.values()) <= 2.1, growth(small, large)


def test_only_the_library_is_counted() -> None:
    assert lines_run(lambda: sorted(range(9))) == Counter()
    assert Path(moda_compile.__file__).is_relative_to(ROOT)
    assert lines_run(MoDAConfig)
