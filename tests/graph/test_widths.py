"""Queries, keys, values and slots that the graph lays out as GPU kernels want them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import moda_compile
from moda_compile import MoDAConfig, kernels, pipeline
from moda_compile.kernels import Lowering, row_elements
from moda_compile.testing import RandomStack, StackConfig, Variant, reference

OPS = torch.ops.moda_compile
TIGHT = dict(rtol=0.0, atol=1e-12)  # float64: zero columns change nothing but the order of sums


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "sequence", "head_dim", "expected"),
    [
        ("split", "cudnn", 70, 72),
        ("split", "flash", 76, 80),
        ("split", "efficient", 64, 64),
        ("split", "math", 70, None),
        ("split", "given", 70, None),
        ("fused", "triton", 70, None),
        ("decode", "triton", 70, None),
        ("cpu", "flash", 70, None),
    ],
)
def test_row_elements(name: str, sequence: str, head_dim: int, expected: int | None) -> None:
    assert row_elements(Lowering(name, sequence, ""), head_dim) == expected


class Kept:
    """A backend that keeps the rewritten graph."""

    def __init__(self, config: MoDAConfig, compiler: str) -> None:
        self.config, self.compiler = config, compiler
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: list[Tensor]) -> Any:
        pipeline.transform(gm, self.config, strict=True)
        self.graphs.append(gm)
        if self.compiler == "eager":
            return gm.forward
        return torch._dynamo.lookup_backend(self.compiler)(gm, inputs)


def results(
    config: StackConfig, options: MoDAConfig, compiler: str
) -> tuple[list[Tensor], GraphModule]:
    """Output and gradients, and the rewritten graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = RandomStack(config).double()
    inputs = config.inputs()
    backend = Kept(options, compiler)
    out = torch.compile(model, backend=backend)(*inputs)  # type: ignore[arg-type]
    out.square().sum().backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    (graph,) = backend.graphs
    return [out.detach(), *grads], graph


def stack(head_dim: int, **options: Any) -> StackConfig:
    """Three layers or as many as asked for, grouped, with rotary keys."""
    sizes: dict[str, Any] = dict(layers=3, kv_heads=2, groups=2, batch=2, length=5)
    kinds: dict[str, Any] = dict(norm="rms", rotary="half", ffn="swiglu")
    return StackConfig(head_dim=head_dim, **sizes | kinds | options)


@pytest.mark.parametrize(
    ("head_dim", "ffn_kv", "compiler"),
    [
        (6, "none", "eager"),
        (8, "none", "eager"),
        (6, "shared", "aot_eager"),
        (8, "shared", "aot_eager"),
        (6, "shared", "inductor"),
    ],
)
def test_same_function(
    head_dim: int, ffn_kv: Any, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = 2 if compiler == "inductor" else 3  # there a layer takes seconds
    config, options = stack(head_dim, layers=layers), MoDAConfig(ffn_kv=ffn_kv)
    expected, plain = results(config, options, compiler)
    monkeypatch.setattr(kernels, "row_elements", lambda _, d: -(-d // 8) * 8)
    got, graph = results(config, options, compiler)
    assert len(got) == len(expected) > 7 * layers
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    for gm, width in ((plain, head_dim), (graph, 8)):
        found = [n for n in gm.graph.nodes if n.target is OPS.attend.default]
        assert len(found) == layers
        for node in found:
            for x in (*node.args[:3], *node.args[4], *node.args[5]):
                value = x.meta["example_value"]
                assert value.shape[-1] == width
                if gm is graph:
                    assert value.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize("value_dim", [4, 14])
def test_values_of_another_head_dim(
    value_dim: int, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as long as the longer of both, or as the kernels want; what is so long is not copied."""
    monkeypatch.setattr(kernels, "row_elements", lambda *_: rows)
    model = stack(6, value_dim=value_dim, dtype="float64")
    made, graph = results(model, MoDAConfig(ffn_kv="shared"), "eager")
    width = rows or max(6, value_dim)
    for node in graph.graph.find_nodes(op="call_function", target=OPS.attend.default):
        query, key, value, _, keys, values, *_ = node.args
        for x in (query, key, value, *keys, *values):
            assert x.meta["example_value"].shape[-1] == width
            padded = rows is not None or (x in (value, *values)) == (value_dim < 6)
            assert (x.target == "transpose" and x.args[0].target is F.pad) == padded
    torch.manual_seed(0)
    plain = RandomStack(model)
    expected = reference(plain, *model.inputs(), ffn_slots=plain.ffn_slots("shared", {}))
    torch.testing.assert_close(made[0], expected.detach(), **TIGHT)


def test_stacks_are_of_values_of_one_head_dim() -> None:
    layers = (Variant(), Variant(value_dim=4))
    model = RandomStack(stack(6, layers=4, variants=layers))
    report = moda_compile.explain(model, *model.config.inputs())
    assert [(a.stack, a.value_dim) for a in report.attentions] == [(0, 6), (1, 4)] * 2
    assert " 6/4 " in str(report)


def test_a_viewed_output_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take the output for memory of its own, which view() may look at as [B, T, H d]."""
    monkeypatch.setattr(kernels, "row_elements", lambda _, d: -(-d // 8) * 8)
    _, graph = results(stack(6), MoDAConfig(), "eager")
    narrowed = [n for n in graph.graph.nodes if n.target == "narrow"]
    assert len(narrowed) == 3
    for node in narrowed:
        (back,) = node.users
        (again,) = back.users
        (dense,) = again.users
        assert dense.target == "contiguous"


def test_a_mixed_stack_keeps_its_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one layer pads another could not read: then none does."""
    found = iter((8, None, 8))
    monkeypatch.setattr(kernels, "row_elements", lambda *_: next(found))
    _, graph = results(stack(6), MoDAConfig(), "eager")
    attends = [n for n in graph.graph.nodes if n.target is OPS.attend.default]
    assert {n.args[0].meta["example_value"].shape[-1] for n in attends} == {6}
