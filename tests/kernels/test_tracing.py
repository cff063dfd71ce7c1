"""The stacked forms trace with fake CUDA tensors, on a machine without a GPU.

What is traced is what Inductor sees: the platform's attention operator and the Triton kernel.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

pytest.importorskip("triton")

from moda_compile.kernels import (  # noqa: E402
    Lowering,
    configs,
    depth_backward,
    depth_forward,
    launch,
    slot_table,
    split,
)

pytestmark = pytest.mark.skipif(launch.EMULATED, reason="an interpreted kernel can't be traced")

SEQUENCES = ("cudnn", "flash", "efficient", "math")
B, HQ, HK, T, S = 2, 4, 2, 10, 3


def trace(
    sequence: str,
    dtype: torch.dtype,
    head_dim: int,
    slots: int,
    symbolic: bool = False,
    masked: torch.dtype | None = None,
) -> tuple[GraphModule, GraphModule, list[Tensor], list[Tensor]]:
    """Graphs and (fake) results of forward_stacked and backward_stacked."""
    lowering = Lowering("split", sequence, "named by the test")
    options: dict[str, Any] = dict(is_causal=True, scale=head_dim**-0.5, lowering=lowering)
    shape_env = ShapeEnv()
    tokens: Any = T
    if symbolic:
        symbol = shape_env.create_symbol(T, ConstantSource("tokens"), DimDynamic.DYNAMIC)
        tokens = shape_env.create_symintnode(symbol, hint=T)
    with FakeTensorMode(shape_env=shape_env):

        def fused(heads: int) -> Tensor:  # a slice of a fused projection
            x = torch.empty(B, tokens, heads + 4, head_dim, device="cuda", dtype=dtype)
            return x.narrow(2, 2, heads).transpose(1, 2)

        q, k, v = fused(HQ), fused(HK), fused(HK)
        depth = [
            torch.empty(slots, B, tokens, HK, head_dim, device="cuda", dtype=dtype).transpose(2, 3)
            for _ in range(2)
        ]
        grad = torch.empty(B, HQ, tokens, head_dim, device="cuda", dtype=dtype)
        inputs = (q, k, v, *depth)
        backward_options = dict(options)
        if masked is not None:
            mask = torch.empty(1, HQ, tokens, tokens, device="cuda", dtype=masked)
            options |= dict(is_causal=False, mask=mask)
            backward_options = options | dict(mask_gradient=masked != torch.bool)
        forward = make_fx(lambda *x: split.forward_stacked(*x, **options))(*inputs)
        out = list(split.forward_stacked(*inputs, **options))
        saved = (grad, *inputs, *out)
        backward = make_fx(lambda *x: split.backward_stacked(*x, **backward_options))(*saved)
        grads = list(split.backward_stacked(*saved, **backward_options))
    return forward, backward, out, grads


def launches(graph: GraphModule) -> list[dict[str, Any]]:
    """The keyword arguments of every Triton launch in a graph."""
    return [
        dict(node.kwargs)
        for node in graph.graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 76])
def test_traces_with_fake_cuda_tensors(sequence: str, dtype: torch.dtype, head_dim: int) -> None:
    forward, backward, (out, lse), (*grads, dmask) = trace(sequence, dtype, head_dim, S)
    assert dmask is None
    assert len(launches(forward)) == 1
    assert len(launches(backward)) == 1
    assert (out.shape, out.dtype) == ((B, HQ, T, head_dim), dtype)
    assert (lse.shape, lse.dtype) == ((B, HQ, T), torch.float32)
    shapes = [(B, HQ, T, head_dim), *[(B, HK, T, head_dim)] * 2, *[(S, B, HK, T, head_dim)] * 2]
    assert [x.shape for x in grads] == [torch.Size(x) for x in shapes]
    # Inductor relies on the strides that a fake tensor shows.
    assert all(x.transpose(-3, -2).is_contiguous() for x in (out, *grads))
    assert all(x.device.type == "cuda" for x in (out, lse, *grads))


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_without_slots_it_is_the_sequence_part_alone(sequence: str) -> None:
    forward, backward, (out, lse), grads = trace(sequence, torch.bfloat16, 64, 0)
    assert launches(forward) == []
    assert launches(backward) == []
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert grads[3].shape == (0, B, HK, T, 64)


@pytest.mark.parametrize("sequence", ["efficient", "math"])
@pytest.mark.parametrize("slots", [0, S])
@pytest.mark.parametrize("masked", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_traces_with_a_mask(sequence: str, masked: torch.dtype, slots: int) -> None:
    forward, backward, (out, _), (*grads, dmask) = trace(
        sequence, torch.bfloat16, 64, slots, masked=masked
    )
    assert len(launches(forward)) == len(launches(backward)) == (slots > 0)
    assert all(x.transpose(-3, -2).is_contiguous() for x in (out, *grads))
    if masked == torch.bool:
        assert dmask is None
    else:
        assert (dmask.shape, dmask.dtype) == ((1, HQ, T, T), masked)


@pytest.mark.parametrize("sequence", ["cudnn", "flash"])
def test_a_kernel_that_takes_no_mask_is_not_given_one(sequence: str) -> None:
    with pytest.raises(ValueError, match=f"{sequence} attention takes no mask"):
        trace(sequence, torch.bfloat16, 64, S, masked=torch.bool)


SYMBOLIC = [(x, None) for x in SEQUENCES] + [("efficient", torch.bool), ("math", torch.bfloat16)]


@pytest.mark.parametrize(("sequence", "masked"), SYMBOLIC)
def test_traces_with_symbolic_sizes(sequence: str, masked: torch.dtype | None) -> None:
    forward, backward, _, _ = trace(sequence, torch.bfloat16, 64, S, symbolic=True, masked=masked)
    for graph in (forward, backward):
        (launch_arguments,) = launches(graph)
        assert isinstance(launch_arguments["kwargs"]["tokens"], Node)  # not a number
        assert isinstance(launch_arguments["grid"][0][0], Node)
        arguments = launch_arguments["kwargs"]
        assert (arguments["ALIGN"], arguments["SLOT_ALIGN"]) == (16, 16)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("products", ["vector", "matrix"])
def test_either_kernel_traces(
    products: str, symbolic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "products", lambda **_: products)
    forward, backward, _, _ = trace("flash", torch.float16, 80, S, symbolic=symbolic)
    for graph in (forward, backward):
        (launch_arguments,) = launches(graph)
        programs = -(-T * HK // launch_arguments["kwargs"]["ROWS"]) * B
        assert symbolic or launch_arguments["grid"][0][0] == programs
        assert isinstance(launch_arguments["kwargs"]["tokens"], Node) == symbolic


@pytest.mark.parametrize(
    ("slots", "named", "by_matrix"),
    [
        (configs.MANY_QUERY - 1, False, [False, False]),
        (configs.MANY_QUERY, False, [False, True]),
        (configs.MANY_FORWARD - 1, False, [False, True]),
        (configs.MANY_FORWARD, False, [True, True]),
        (configs.MANY_FORWARD, True, [False, False]),  # vector kernels alone take the slots' names
    ],
)
def test_matrix_kernels_read_many_slots_of_a_group_of_four(
    slots: int, named: bool, by_matrix: list[bool]
) -> None:
    """by_matrix: forward, backward."""
    group = 4
    assert configs.products(head_dim=64, group=group, dtype=torch.bfloat16, many=True) == "matrix"

    def run(q: Tensor, lse: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        sides = k.unbind(0)
        if named:
            given = slot_table.named(*(list(side.unbind(0)) for side in sides))
        else:
            given = slot_table.stacked(*sides)
        out, joint = depth_forward.run(q, q, lse, given, 0.125)
        none = dict(grad_key=None, grad_value=None, accumulate=False, scale=0.125)
        return out, depth_backward.run(q, q, out, joint, q, given, **none)[0]

    with FakeTensorMode():
        q = torch.empty(B, HK * group, T, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, slots, B, HK, T, 64, device="cuda", dtype=torch.bfloat16)
        graph = make_fx(run)(q, torch.empty(q.shape[:3], device="cuda"), k)
    assert ["HEADS" in launched["kwargs"] for launched in launches(graph)] == by_matrix


def test_the_scale_reaches_the_attention_although_head_dim_is_padded() -> None:
    forward, backward, _, _ = trace("flash", torch.bfloat16, 76, S)
    for graph in (forward, backward):
        nodes = [n for n in graph.graph.nodes if "flash_attention" in str(n.target)]
        assert [n.kwargs["scale"] for n in nodes] == [76**-0.5]
        assert [n.args[0].meta["val"].shape[-1] for n in nodes] == [80]


def test_nothing_of_the_size_of_the_slots_is_copied() -> None:
    forward, backward, _, _ = trace("flash", torch.bfloat16, 64, S)
    for graph, allowed in ((forward, 0), (backward, 2)):  # backward: the two gradients
        large = [
            node
            for node in graph.graph.nodes
            if node.op == "call_function"
            and isinstance(node.meta.get("val"), Tensor)
            and node.meta["val"].numel() >= S * B * HK * T * 64
            and not node.target._schema.name.split("::")[1].startswith(("transpose", "permute"))
        ]
        assert len(large) == allowed, large


def test_alignment_is_the_widest_that_holds_for_every_row() -> None:
    dense = torch.zeros(2, 3, 5, 64, dtype=torch.bfloat16)
    assert launch.alignment(dense) == math.gcd(16, dense.data_ptr())
    assert launch.alignment(dense[..., 1:]) == 2
    assert launch.alignment(dense[..., 4:]) == 8
    assert launch.alignment(torch.zeros(2, 3, 5, 76, dtype=torch.bfloat16)) == 8
    assert launch.alignment(torch.zeros(2, 3, 5, 75, dtype=torch.bfloat16)) == 2
    assert launch.alignment(torch.zeros(1, 1, 1, 75, dtype=torch.bfloat16)) == 16
    assert launch.alignment(torch.zeros(2, 3, 5, 75)) == 4
    with FakeTensorMode():
        fake = torch.empty(2, 3, 5, 76, dtype=torch.bfloat16, device="cuda")
        assert launch.alignment(fake) == 8
        assert launch.alignment(fake.narrow(-1, 1, 75)) == 2


def test_stacked_slots_keep_their_strides() -> None:
    base = torch.zeros(B, T, HK, S, 64)
    slots = slot_table.stacked(base.permute(3, 0, 2, 1, 4), base.permute(3, 0, 2, 1, 4))
    assert slots.key.data_ptr() == base.data_ptr()
    assert slots.key_strides == (64, T * HK * S * 64, S * 64, HK * S * 64)
