"""The cost formulas against the paper's table, sums over layers, and a plain implementation."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moda_compile import cost
from moda_compile.cost import Cost, layer_cost, leading_term, model_cost

SIZES = {"B": 2, "T": 5, "D": 24, "L": 4, "G": 3, "Hk": 2, "d": 4, "element": 8, "accumulator": 8}
VALUE_DIMS = pytest.mark.parametrize("value_dim", [4, 7])
KINDS = ("none", "projected", "shared")

# arXiv 2603.15619, Table 1, as printed there: depth dense, depth attention, MoDA.
PAPER = {
    "parameters": ("O(L^2 D^2)", "O(L D^2)", "O(L D^2 / G)"),
    "decoding cache": ("O(L D)", "O(L D / G)", "O(L D / G)"),
    "prefill cache": ("O(T L D)", "O(T L D / G)", "O(T L D / G)"),
    "decode FLOPs": ("O(L^2 D^2)", "O(L^2 D)", "O(L^2 D)"),
    "prefill FLOPs": ("O(T L^2 D^2)", "O(T L^2 D)", "O(T L^2 D)"),
}


def test_the_table_is_the_papers() -> None:
    lines = cost.format_table(cost.complexity_table()).splitlines()
    assert lines[0] == "| | depth dense | depth attention | MoDA |"
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]
    assert {row: tuple(cells) for row, *cells in rows} == PAPER


def test_leading_term() -> None:
    L, D, G = cost.L, cost.D, cost.G
    assert leading_term(3 * L**2 * D / 2 + 5 * L * D**9 + 7) == L**2 * D
    assert leading_term(L * D**2 * (4 + 2 / G)) == L * D**2
    assert leading_term((L - 1) * D / G) == L * D / G


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("ffn_kv", KINDS)
def test_closed_forms_are_the_sums_over_layers(layers: int, ffn_kv: Any) -> None:
    parts = [
        layer_cost(cost.slots_read(layer, ffn_kv), writes=layer < layers - 1, ffn_kv=ffn_kv)
        for layer in range(layers)
    ]
    closed = model_cost(ffn_kv).evaluate(L=layers)
    for field in fields(Cost):
        total = sum(getattr(part, field.name) for part in parts)
        assert sympy.expand(getattr(closed, field.name) - total) == 0, field.name


def test_known_figures() -> None:
    """The paper's 700M shape, counted on paper: 36 layers, 16/8 heads of 64, D = 1024, T = 4096."""
    shape = {"B": 1, "T": 4096, "D": 1024, "L": 36, "G": 2, "Hk": 8, "d": 64}
    projected = model_cost("projected").evaluate(**shape, element=2, accumulator=4)
    assert projected.parameters == 35 * 2 * 512 * 1024
    assert projected.depth_flops_forward == 4 * 4096 * 1024 * (2 * 36 * 35 // 2)
    assert projected.accumulator_bytes == 70 * 2 * 8 * 4096 * 64 * 4
    assert projected.saved_bytes == 35 * 2 * 8 * 4096 * 64 * 2
    none = model_cost("none").evaluate(**shape, element=2, accumulator=4)
    assert (none.parameters, none.projection_flops_forward, none.saved_bytes) == (0, 0, 0)
    assert 2 * none.depth_flops_forward == projected.depth_flops_forward
    shared = model_cost("shared").evaluate(**shape, element=2, accumulator=4)
    assert (shared.parameters, shared.flops) == (0, projected.flops)
    assert shared.memory_bytes == projected.saved_bytes + projected.accumulator_bytes


def test_it_imports_sympy_only() -> None:
    tree = ast.parse(Path(cost.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    standard = {"__future__", "collections.abc", "dataclasses", "typing"}
    assert names - standard == {"sympy"}


def test_sizes_may_be_expressions() -> None:
    half = sympy.Symbol("half", positive=True, integer=True)
    evaluated = model_cost("none").evaluate(T=2 * half, L=3, element=cost.ACCUMULATOR)
    assert evaluated.bytes_read_forward == (
        3 * cost.B * cost.HK * 2 * half * (cost.HEAD_DIM + cost.VALUE_DIM) * cost.ACCUMULATOR
    )
    # dv is d's where only that is given.
    assert evaluated.evaluate(d=4).bytes_read_forward == evaluated.bytes_read_forward.subs(
        {cost.HEAD_DIM: 4, cost.VALUE_DIM: 4}
    )


def test_wrong_names_raise() -> None:
    with pytest.raises(ValueError, match="got .'heads'., expected some of"):
        model_cost("none").evaluate(heads=3)
    with pytest.raises(ValueError, match="got 'both', expected 'none'"):
        model_cost("both")  # type: ignore[arg-type]


# --------------------------------------------------------------- a plain implementation to count


class Meter(TorchDispatchMode):
    """Bytes that the operators inside read from and write to the watched tensors' memory."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()
        self.watched = {tensor.untyped_storage().data_ptr() for tensor in watched}
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        a_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        for declared, given in [] if a_view else zip(schema.arguments, args, strict=False):
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                if not isinstance(tensor, Tensor):
                    continue
                if tensor.untyped_storage().data_ptr() not in self.watched:
                    continue
                writes = declared.alias_info is not None and declared.alias_info.is_write
                self.written += tensor.nbytes if writes else 0
                self.read += 0 if func is torch.ops.aten.zero_.default else tensor.nbytes
        return func(*args, **(kwargs or {}))


def forward(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Depth attention alone, one small matrix product a token: q [N, G, d], slots [N, d or dv].

    N runs over batch, KV head and token.
    """
    key, value = torch.stack(keys, dim=1), torch.stack(values, dim=1)  # [N, S, d]
    scores = torch.bmm(q, key.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), value), scores.logsumexp(-1)


def backward(
    grad: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor,
) -> Tensor:
    """dq; adds dk and dv into `accumulator [slots, N, d + dv]`; the scores are recomputed."""
    key, value = torch.stack(keys, dim=1), torch.stack(values, dim=1)
    p = (torch.bmm(q, key.transpose(1, 2)) - lse[..., None]).exp()
    dp = torch.bmm(grad, value.transpose(1, 2))
    dz = p * (dp - (grad * out).sum(-1, keepdim=True))
    dk, dv = torch.bmm(dz.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), grad)
    for slot in range(len(keys)):
        for side, made in zip(_sides(accumulator[slot], q.shape[-1]), (dk, dv), strict=True):
            side.add_(made[:, slot])
    return torch.bmm(dz, key)


def _sides(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    return rows[:, :head_dim], rows[:, head_dim:]


@VALUE_DIMS
@pytest.mark.parametrize("ffn_kv", ["none", "shared"])
def test_flops_and_bytes_of_a_plain_implementation(ffn_kv: Any, value_dim: int) -> None:
    """A whole stack's depth, forward then backward: every count equals its formula."""
    layers, rows = SIZES["L"], SIZES["B"] * SIZES["Hk"] * SIZES["T"]
    per_layer = 1 if ffn_kv == "none" else 2
    slots = per_layer * (layers - 1)
    head_dims = SIZES["d"], value_dim
    keys, values = (
        [torch.randn(rows, width).double() for _ in range(slots)] for width in head_dims
    )
    queries = [torch.randn(rows, SIZES["G"], SIZES["d"]).double() for _ in range(layers)]
    expected = model_cost(ffn_kv).evaluate(**SIZES, dv=value_dim)

    results = []
    with FlopCounterMode(display=False) as counter, Meter(*keys, *values) as meter:
        for layer in range(1, layers):
            seen = per_layer * layer
            results.append(forward(queries[layer], keys[:seen], values[:seen]))
    assert counter.get_total_flops() == expected.depth_flops_forward
    assert (meter.read, meter.written) == (expected.bytes_read_forward, 0)

    accumulator = torch.empty(slots, rows, sum(head_dims), dtype=torch.float64)
    assert accumulator.nbytes == expected.accumulator_bytes
    grads: dict[int, Tensor] = {}
    taken: list[Tensor] = []
    watch = Meter(*keys, *values, accumulator)
    with FlopCounterMode(display=False) as counter, watch as meter:
        accumulator.zero_()
        for layer in reversed(range(1, layers)):
            seen, (out, lse) = per_layer * layer, results[layer - 1]
            arguments = queries[layer], keys[:seen], values[:seen], out, lse
            grads[layer] = backward(torch.ones_like(out), *arguments, accumulator)
            # All readers of layer - 1's slots have run: it takes their gradients out.
            own = accumulator[seen - per_layer : seen]
            taken = [[x.clone() for x in _sides(slot, head_dims[0])] for slot in own] + taken
    assert counter.get_total_flops() == expected.depth_flops_backward
    assert meter.read == expected.bytes_read_backward
    assert meter.written == expected.bytes_written_backward

    # What was counted is depth attention: its gradients are autograd's.
    leaves = [tensor.requires_grad_() for tensor in (*queries[1:], *keys, *values)]
    total = torch.stack(
        [
            forward(queries[x], keys[: per_layer * x], values[: per_layer * x])[0].sum()
            for x in range(1, layers)
        ]
    ).sum()
    found = [grads[layer] for layer in range(1, layers)]
    found += [key for key, _ in taken] + [value for _, value in taken]
    for got, want in zip(found, torch.autograd.grad(total, leaves), strict=True):
        # float64, sums of at most 6 slots and 3 heads: rounding stays near 1e-15
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@VALUE_DIMS
def test_flops_of_the_projections(value_dim: int) -> None:
    tokens, width = SIZES["B"] * SIZES["T"], SIZES["D"]
    expected = model_cost("projected").evaluate(**SIZES, dv=value_dim)
    head_dims = [SIZES["d"], value_dim] * (SIZES["L"] - 1)
    weights = [torch.randn(SIZES["Hk"] * n, width, requires_grad=True) for n in head_dims]
    x = torch.randn(tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        outputs = [torch.nn.functional.linear(x, weight) for weight in weights]
    assert counter.get_total_flops() == expected.projection_flops_forward
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    assert counter.get_total_flops() == expected.projection_flops_backward
    assert sum(weight.numel() for weight in weights) == expected.parameters
