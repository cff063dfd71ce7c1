"""The pass over Inductor's graphs: operators become what they do, with every slot in sight.

With fake CUDA tensors: nothing is launched, and the platform's attention is said to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

pytest.importorskip("triton")

from moda_compile import gathered, kernels, ops  # noqa: E402, F401  (register the operators)
from moda_compile.kernels import configs, launch, recorded, slot_table  # noqa: E402
from moda_compile.passes import unfold  # noqa: E402

pytestmark = pytest.mark.skipif(launch.EMULATED, reason="an interpreted kernel can't be traced")

OPS = torch.ops.moda_compile
ATEN = torch.ops.aten
LAUNCH = OPS.launch.default
B, H, T, D = 1, 4, 32, 64


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available_sequence_kernels", lambda: frozenset({"cudnn"}))
    monkeypatch.setattr(launch, "capability", lambda x: (9, 0))


def tensor(heads: int = H, tokens: Any = T, dim: int = D, **options: Any) -> Tensor:
    """Token-major, as a projection makes it."""
    options = dict(device="cuda", dtype=torch.bfloat16) | options
    return torch.empty(B, tokens, heads, dim, **options).transpose(1, 2)


def attend(slots: int, **options: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, *depth: Tensor) -> Any:
        sides = list(depth[:slots]), list(depth[slots:])
        return OPS.depth_attention(q, k, v, *sides, True, 0.125, **options)

    return call


def unfolded(call: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Graph, Graph]:
    """The graph of a call before and after the pass."""
    made = []
    for changed in (False, True):
        gm: GraphModule = make_fx(call)(*inputs)
        if changed:
            unfold.run(gm.graph)
            gm.graph.lint()
        made.append(gm.graph)
    return made[0], made[1]


def own(graph: Graph) -> list[Node]:
    """Operators of the library's that are no launches."""
    found = [n for n in graph.nodes if getattr(n.target, "namespace", "") == "moda_compile"]
    return [n for n in found if n.target is not LAUNCH]


def launches(graph: Graph) -> list[dict[str, Any]]:
    """Of each launch, the kernel's arguments by name: of what it makes, the node that the graph has
    of it, or, where it has none, `recorded.Made`.
    """
    found = []
    for node in graph.find_nodes(op="call_function", target=LAUNCH):
        given, text = node.args
        read = recorded._read(text)
        taken = {user.args[1]: user for user in node.users}
        order = [i for i, x in enumerate(read.made) if x.returned]
        made = [taken[order.index(i)] if i in order else x for i, x in enumerate(read.made)]
        tensors = [*given, *made]
        found.append(
            {
                parameter.name: tensors[x["tensor"]] if isinstance(x, dict) else x
                for parameter, x in zip(read.function.params, read.arguments, strict=True)
            }
        )
    return found


def written(graph: Graph) -> list[list[str]]:
    """Names of what each launch makes."""
    nodes = graph.find_nodes(op="call_function", target=LAUNCH)
    return [
        sorted(
            name
            for name, x in call.items()
            if isinstance(x, recorded.Made) or (isinstance(x, Node) and node in x.all_input_nodes)
        )
        for node, call in zip(nodes, launches(graph), strict=True)
    ]


def named(call: dict[str, Any], letter: str) -> list[Any]:
    """Rows that a launch was given, once each, in order."""
    given = [x for name, x in call.items() if name[0] == letter and name[1:].isdigit()]
    return list(dict.fromkeys(x for x in given if x is not None))


def test_pytorch_s_table_of_kernels_is_left_as_it_was() -> None:
    table = triton_kernel_wrap.kernel_side_table

    def sizes() -> list[int]:
        return [len(x) for x in (table.id_to_kernel, table.kernel_to_id, table.constant_args)]

    with FakeTensorMode():
        gm = make_fx(attend(2))(*(tensor() for _ in range(7)))
        before = sizes()
        unfold.run(gm.graph)
        assert own(gm.graph) == []
        assert sizes() == before
        # What came from elsewhere meanwhile is not known to be the last: all of it stays.
        gm = make_fx(attend(2))(*(tensor() for _ in range(7)))
        with unfold._forgetting_kernels():
            table.add_kernel(object)  # type: ignore[arg-type]
    assert sizes() == [n + (i < 2) for i, n in enumerate(before)]
    del table.id_to_kernel[table.kernel_to_id.pop(object)]  # type: ignore[call-overload]


@pytest.mark.parametrize("slots", [0, 1, 9])
def test_forward_is_the_platform_s_attention_and_a_launch(slots: int) -> None:
    with FakeTensorMode():
        before, after = unfolded(attend(slots), [tensor() for _ in range(3 + 2 * slots)])
    assert len(own(before)) == 1
    assert own(after) == []
    assert (
        len(
            after.find_nodes(
                op="call_function", target=ATEN._scaled_dot_product_cudnn_attention.default
            )
        )
        == 1
    )  # noqa: E501
    assert len(launches(after)) == min(slots, 1)
    for x, y in zip(before.output_node().args[0], after.output_node().args[0], strict=True):
        x, y = x.meta["val"], y.meta["val"]
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    if slots:
        _, _, _, *depth = after.find_nodes(op="placeholder")
        pairs = zip(depth[:slots], depth[slots:], strict=True)
        (call,) = launches(after)
        assert named(call, "n") == [x for pair in pairs for x in pair]
        assert call["slots"] == slots


def whole_layer(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *depth: Tensor
) -> tuple[Tensor, ...]:
    """Forward, backward and gathering of one reader of two slots."""
    keys, values = list(depth[:2]), list(depth[2:])
    out, lse = OPS.depth_attention(q, k, v, keys, values, True, 0.125)
    dq, dk, dv, _, delta = OPS.depth_attention_query_backward(
        grad, q, k, v, keys, values, out, lse, True, 0.125
    )
    made, _ = OPS.depth_gather(
        [grad], [q], [lse], [delta], keys, values, [1, 1], 0.125, q.dtype, [dk, dv, None, None]
    )
    first, second = (made.select(0, i).select(0, 0) for i in (0, 1))
    return out, dq, first, second + dk


def test_one_that_would_make_another_layout_stays_and_the_others_go() -> None:
    """Of three layers, whose functions are traced together; each reads what the one before made."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, _ = OPS.depth_attention(q, k, v, [], [], True, 0.125)
        second, _ = OPS.depth_attention(first, k, v, [k], [v], True, 0.125)
        third, _ = OPS.depth_attention(second, k, v, [k], [v], True, 0.125)
        return third

    for odd in (None, 0, 1, 2):
        with FakeTensorMode():
            graph = make_fx(call)(*(tensor() for _ in range(3))).graph
            nodes = own(graph)
            assert len(nodes) == 3
            if odd is not None:
                out, lse = nodes[odd].meta["val"]
                nodes[odd].meta["val"] = (
                    torch.empty(out.shape, device=out.device, dtype=out.dtype),
                    lse,
                )
            unfold.run(graph)
            graph.lint()
        assert own(graph) == ([] if odd is None else [nodes[odd]])
        assert len(launches(graph)) == 2 - (odd in (1, 2))
        platform = ATEN._scaled_dot_product_cudnn_attention.default
        assert len(graph.find_nodes(op="call_function", target=platform)) == 3 - (odd is not None)


def test_backward_and_gathering() -> None:
    with FakeTensorMode():
        _, after = unfolded(whole_layer, [tensor() for _ in range(8)])
    assert own(after) == []
    grad, q, _, _, *depth = after.find_nodes(op="placeholder")
    forward, backward, gathering = launches(after)
    expected = [depth[0], depth[2], depth[1], depth[3]]
    assert named(forward, "n") == named(backward, "n") == expected
    assert named(gathering, "n") == [q, grad]
    lse, delta = named(gathering, "m")
    assert lse is backward["lse"]
    assert delta is backward["delta_out"]
    # Written to what was allocated for it, and nothing else.
    assert written(after) == [
        ["lse", "out", "table"],
        ["delta_out", "grad_query", "table"],
        ["gradients", "numbers_table", "rows_table"],
    ]


def test_sums_that_one_gather_leaves_to_another() -> None:
    def call(grad: Tensor, q: Tensor, lse: Tensor, delta: Tensor, *depth: Tensor) -> Any:
        readers = [[x] * 3 for x in (grad, q, lse, delta)]
        keys, values = list(depth[:3]), list(depth[3:])
        made, sums = OPS.depth_gather(
            *readers, keys, values, [2, 3, 3], 0.125, q.dtype, [], unfinished=2
        )
        whole, _ = OPS.depth_gather(
            *readers, keys[1:], values[1:], [1, 2], 0.125, q.dtype, [], sums
        )
        total = whole.select(0, 0).select(0, 1) + grad
        return made.select(0, 0).select(0, 0), multiplied(total)

    with FakeTensorMode():
        numbers = [torch.empty(B, H, T, device="cuda") for _ in range(2)]
        inputs = [tensor(), tensor(), *numbers, *(tensor() for _ in range(6))]
        _, after = unfolded(call, inputs)
    assert own(after) == []
    first, second = launches(after)
    assert (first["SLOTS"], first["UNFINISHED"], first.get("partials")) == (3, 2, None)
    assert (second["SLOTS"], second["UNFINISHED"], second.get("sums")) == (2, 0, None)
    # What the one has written is what the other starts from, and nothing is copied in between.
    partials = second["partials"]
    assert partials is first["sums"]
    assert partials.meta["val"].dtype == torch.float32
    assert not [n for n in after.nodes if n.target is ATEN.clone.default]
    assert written(after) == [
        ["gradients", "numbers_table", "rows_table", "sums"],
        ["gradients", "numbers_table", "rows_table"],
    ]
    # Sums with the gradients, not with the sums, are made token-major.
    (_, product) = after.output_node().args[0]
    assert unfold._chain(product.args[0])[-1].target is ATEN.as_strided.default


def multiplied(x: Tensor) -> Tensor:
    """By a projection's weight, after the layout's steps back to [B * T, H * D]."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
    return rows @ rows.t()


def test_a_sum_with_a_gathered_gradient_is_made_token_major() -> None:
    def call(*inputs: Tensor) -> Tensor:
        return multiplied(whole_layer(*inputs)[-1])

    with FakeTensorMode():
        _, after = unfolded(call, [tensor() for _ in range(8)])
    product = after.output_node().args[0]
    total = unfold._chain(product.args[0])[-1]
    assert total.target is ATEN.as_strided.default
    assert total.args[0].meta["val"].is_contiguous()
    assert total.meta["val"].shape == (B, H, T, D)
    assert total.meta["val"].transpose(1, 2).is_contiguous()


def test_merging() -> None:
    def call(out: Tensor, lse: Tensor, q: Tensor, grad: Tensor, key: Tensor, value: Tensor) -> Any:
        made, joint = OPS.depth_merge(out, lse, q, [key], [value], 0.125)
        return OPS.depth_merge_query_backward(grad, out, lse, q, [key], [value], made, joint, 0.125)

    with FakeTensorMode():
        lse = torch.empty(B, H, T, device="cuda")
        inputs = [tensor(), lse, *(tensor() for _ in range(4))]
        before, after = unfolded(call, inputs)
    assert len(own(before)) == 2
    assert own(after) == []
    assert len(launches(after)) == 2


def test_kernels_get_tensors_for_views_that_begin_where_they_do() -> None:
    def call(flat: Tensor, fused: Tensor, q: Tensor) -> Any:
        key = flat.view(B, T, H, D).transpose(1, 2)
        value = fused.view(B, T, 2 * H, D).narrow(2, H, H).transpose(1, 2)
        return OPS.depth_attention(q, q, q, [key], [value], True, 0.125)

    with FakeTensorMode():
        flat = torch.empty(B * T, H * D, device="cuda", dtype=torch.bfloat16)
        fused = torch.empty(B * T, 2 * H * D, device="cuda", dtype=torch.bfloat16)
        _, after = unfolded(call, [flat, fused, tensor()])
    base, _, query = after.find_nodes(op="placeholder")
    (launched,) = launches(after)
    key, value = named(launched, "n")
    assert (launched["query"], launched["key"], key) == (query, base, base)
    assert value.target is ATEN.slice.Tensor
    assert value.meta["val"].storage_offset() == H * D


def gather_of(readers: int) -> Callable[..., Any]:
    def call(grad: Tensor, q: Tensor, lse: Tensor, delta: Tensor, *depth: Tensor) -> Any:
        read = [[x] * readers for x in (grad, q, lse, delta)]
        counts = [readers, readers - 1]
        return OPS.depth_gather(*read, depth[:2], depth[2:], counts, 0.125, q.dtype, [])[0]

    return call


@pytest.mark.parametrize(("group", "limit"), [(1, {}), (2, {"maxnreg": 128})])
def test_a_launch_keeps_its_limit_of_registers(group: int, limit: dict[str, int]) -> None:
    with FakeTensorMode():
        numbers = [torch.empty(B, group * H, T, device="cuda") for _ in range(2)]
        rows = [tensor(group * H), tensor(group * H)]
        _, after = unfolded(gather_of(3), [*rows, *numbers, *(tensor() for _ in range(4))])
    ((_, text),) = [n.args for n in after.find_nodes(op="call_function", target=LAUNCH)]
    tile = configs.gather_tile(
        head_dim=D, group=group, dtype=torch.bfloat16, width=launch.WIDEST_ACCESS // 2,
        capability=(9, 0), slots=2,
    )  # fmt: skip
    assert recorded._read(text).options == {"num_warps": tile.warps, "num_stages": 3} | limit


@pytest.mark.parametrize("what", ["slots", "readers"])
def test_layers_launch_the_same_kernel(what: str) -> None:
    """Compiled once: whatever the number of slots, or of their readers, up to eight."""
    with FakeTensorMode():
        numbers = [torch.empty(B, H, T, device="cuda") for _ in range(2)]
        gathered_from = [tensor(), tensor(), *numbers, *(tensor() for _ in range(4))]
        graphs = [
            unfolded(attend(n), [tensor() for _ in range(3 + 2 * n)])[1]
            if what == "slots"
            else unfolded(gather_of(n), gathered_from)[1]
            for n in (1, 2, 8)
        ]
    texts = [n.args[1] for g in graphs for n in g.nodes if n.target is LAUNCH]
    assert len({*texts}) == 3
    assert len({recorded._read(text).source_key for text in texts}) == 1


def test_what_several_launches_read_is_made_once() -> None:
    """A gradient that is padded on its way, say: to Inductor that is an expression."""

    def call(flat: Tensor, *rest: Tensor) -> Any:
        padded = torch.nn.functional.pad(flat.view(B, T, H, D - 8), (0, 8))
        return whole_layer(padded.transpose(1, 2), *rest)

    with FakeTensorMode():
        flat = torch.empty(B * T, H * (D - 8), device="cuda", dtype=torch.bfloat16)
        _, after = unfolded(call, [flat, *(tensor() for _ in range(7))])
    _, backward, gathering = launches(after)
    (_, grad) = named(gathering, "n")
    assert grad is backward["grad_out"]
    assert grad.target is ATEN.as_strided.default
    (padded,) = grad.all_input_nodes
    assert list(padded.users) == [grad]
    x, y = grad.meta["val"], padded.meta["val"]
    assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    (platform,) = after.find_nodes(
        op="call_function", target=ATEN._scaled_dot_product_cudnn_attention_backward.default
    )
    assert unfold._chain(platform.args[0])[-1] is grad


def symbolic() -> Any:
    shape_env = ShapeEnv()
    symbol = shape_env.create_symbol(T, ConstantSource("tokens"), DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=T)


@pytest.mark.parametrize(
    "what",
    ["cpu", "symbolic length", "eight heads a key", "too many slots", "mixed strides", "float64",
     "few queries", "no attention of the platform"],
)  # fmt: skip
def test_what_stays_an_operator(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slot_table.NAMED + 1 if what == "too many slots" else 2
    options: dict[str, Any] = {}
    heads, tokens, shape_env = H, T, None
    if what == "cpu":
        options["device"] = "cpu"
    if what == "float64":
        options["dtype"] = torch.float64
    if what == "symbolic length":
        tokens = symbolic()
        shape_env = tokens.node.shape_env
    if what == "eight heads a key":
        heads = 8 * H
    if what == "no attention of the platform":
        monkeypatch.setattr(kernels, "available_sequence_kernels", lambda: frozenset())
    with FakeTensorMode(shape_env=shape_env):
        queries = 2 if what == "few queries" else tokens
        q = tensor(heads, queries, **options)
        k, v = (tensor(H, tokens, **options) for _ in range(2))
        depth = [tensor(H, queries, **options) for _ in range(2 * slots)]
        if what == "mixed strides":
            depth[1] = tensor(2 * H).narrow(1, 0, H)
        _, after = unfolded(attend(slots), [q, k, v, *depth])
    assert len(own(after)) == 1
    assert launches(after) == []


def test_a_layer_that_adds_to_an_accumulator_stays_an_operator() -> None:
    def call(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, accumulator: Tensor) -> Any:
        out, lse = OPS.depth_attention(q, k, v, [k], [v], True, 0.125)
        return OPS.depth_attention_backward(
            grad, q, k, v, [k], [v], out, lse, accumulator, True, 0.125
        )

    with FakeTensorMode():
        zeros = torch.zeros(1, 2, B, H, T, D, device="cuda")
        _, after = unfolded(call, [*(tensor() for _ in range(4)), zeros])
    assert [n.target for n in own(after)] == [OPS.depth_attention_backward.default]


def test_the_first_layer_s_backward() -> None:
    def call(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = OPS.depth_attention(q, k, v, [], [], True, 0.125)
        return OPS.depth_attention_backward(grad, q, k, v, [], [], out, lse, None, True, 0.125)

    with FakeTensorMode():
        _, after = unfolded(call, [tensor() for _ in range(4)])
    assert own(after) == []
    backward = ATEN._scaled_dot_product_cudnn_attention_backward.default
    assert len(after.find_nodes(op="call_function", target=backward)) == 1


def test_a_sum_made_token_major_is_the_same_sum() -> None:
    """What the pass does to a graph of sums, run on a CPU."""
    torch.manual_seed(0)
    rows = [torch.randn(B, T, H, D).transpose(1, 2) for _ in range(6)]
    numbers = [torch.randn(B, H, T) for _ in range(2)]

    def call(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, *two: Tensor):  # type: ignore[no-untyped-def]
        made, _ = OPS.depth_gather(
            [grad], [q], [two[0]], [two[1]], [k, k], [v, v], [1, 1], 0.125, q.dtype, []
        )
        sums = made[0, 0] + dk, dv + made[1, 1], made[0, 1], made[1, 0] + 1.0, made[1, 0] + q[:, :1]
        rotated = made[0, 1] + dv  # as rotated keys' gradients: another kernel reads it anyway
        return *map(multiplied, sums), rotated[..., :8] * 2.0

    gm = make_fx(call, tracing_mode="fake")(*rows, *numbers)
    (node,) = own(gm.graph)
    unfold._keep_sums(gm.graph, node)
    gm.graph.lint()
    gm.recompile()
    products = gm.graph.find_nodes(op="call_function", target=ATEN.mm.default)
    kept = [unfold._chain(x.args[0])[-1].target is ATEN.as_strided.default for x in products]
    assert kept == [True, True, False, False, False]
    assert len(gm.graph.find_nodes(op="call_function", target=ATEN.as_strided.default)) == 2
    for x, y in zip(gm(*rows, *numbers), call(*rows, *numbers), strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


@pytest.mark.parametrize("dim", [-1, 3, 1])
def test_what_is_permuted_after_it_is_concatenated_is_concatenated_permuted(dim: int) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(B, T, H, D).transpose(1, 2) for _ in range(2))

    def call(x: Tensor, y: Tensor) -> list[Tensor]:
        turned, also, kept = (torch.cat([x * n, y - n], dim) for n in (1.0, 2.0, 3.0))
        rows = turned.transpose(1, 2)
        return [rows.sin(), rows.cos(), also.permute(0, 2, 1, 3), kept.transpose(1, 2), kept + 1.0]

    gm = make_fx(call, tracing_mode="fake", decomposition_table=unfold.select_decomp_table())(x, y)
    unfold._turn_parts(gm.graph)
    gm.graph.lint()
    gm.recompile()
    cats = gm.graph.find_nodes(op="call_function", target=ATEN.cat.default)
    shapes = sorted(tuple(c.meta["val"].shape) for c in cats)
    whole = torch.cat([x, y], dim)
    assert shapes == sorted([tuple(whole.shape), *[tuple(whole.transpose(1, 2).shape)] * 2])
    for found, expected in zip(gm(x, y), call(x, y), strict=True):
        assert torch.equal(found, expected)
