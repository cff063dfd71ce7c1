"""The pass over the joint graph: accumulated gradients become gathered ones, and stay the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.checkpoint import checkpoint

import moda_compile
from moda_compile import MoDAConfig, backend, kernels, pipeline
from moda_compile.kernels import launch
from moda_compile.passes import gather
from moda_compile.testing import RandomStack, StackConfig
from tests.test_op_merge import sequence_part

OPS = torch.ops.moda_compile
GATHER, ACCUMULATE = OPS.depth_gather.default, OPS.depth_attention_backward.default
# float64 and gradients of order 1: sums in another order.
TIGHT = dict(rtol=0.0, atol=1e-12)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On CPUs the library itself does not choose to gather."""
    monkeypatch.setattr(kernels, "gathers", lambda **_: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Joint:
    """A torch.compile backend that runs the pass on the joint graph, and keeps what it made."""

    def __init__(
        self,
        config: MoDAConfig,
        *,
        gathering: bool = True,
        before: Callable[[GraphModule], None] | None = None,
        rewritten: bool = False,
    ) -> None:
        self.config, self.gathering, self.before = config, gathering, before
        self.rewritten = rewritten
        self.graphs: list[GraphModule] = []
        self.accumulating: list[GraphModule] = []  # the same ones, before the pass
        self.calls_of_parts: list[tuple[list[Node], tuple[Any, ...]]] = []

    def __call__(self, gm: GraphModule, inputs: list[Tensor]) -> Any:
        if not self.rewritten:
            pipeline.transform(gm, self.config, strict=True)
        compiler = aot_autograd(
            fw_compiler=self._keep_inputs,
            partition_fn=self._partition,
            decompositions=select_decomp_table(),
        )
        return compiler(gm, inputs)

    def _keep_inputs(self, part: GraphModule, _: Any) -> Callable[..., Any]:
        placeholders = list(part.graph.find_nodes(op="placeholder"))

        def call(*args: Any) -> Any:
            self.calls_of_parts.append((placeholders, args))
            return part(*args)

        return call

    def _partition(self, joint: GraphModule, inputs: Any, **options: Any) -> Any:
        if self.before is not None:
            self.before(joint)
        if self.gathering:
            self.accumulating.append(copy.deepcopy(joint))
            gather.run(joint.graph)
            joint.recompile()
        self.graphs.append(joint)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    def calls(self, op: Any) -> list[tuple[Any, ...]]:
        """Arguments of an operator's calls, functionalized or not, in the one graph."""
        (joint,) = self.graphs
        return calls(joint, op)

    def inputs(self) -> list[dict[str, Any]]:
        """Of the joint graph by name, for each step there was."""
        steps = zip(self.calls_of_parts[::2], self.calls_of_parts[1::2], strict=True)
        return [
            {node.name: x for part in step for node, x in zip(*part, strict=True)} for step in steps
        ]


def calls(joint: GraphModule, op: Any) -> list[tuple[Any, ...]]:
    return [tuple(n.args) for n in joint.graph.nodes if op in (n.target, *n.args[:1])]


@torch.no_grad()
def results(joint: GraphModule, inputs: dict[str, Any]) -> list[Any]:
    """Outputs and gradients, of nodes run one by one."""
    given = [inputs[node.name] for node in joint.graph.find_nodes(op="placeholder")]
    return list(Interpreter(joint).run(*given, enable_io_processing=False))


def stack(layers: int = 5, **options: Any) -> RandomStack:
    sizes: dict[str, Any] = dict(layers=layers, kv_heads=2, groups=1, head_dim=8, length=9, batch=2)
    return RandomStack(StackConfig(**sizes | dict(dtype="float64", mask="flag") | options))


def gradients(
    model: nn.Module, backend: Joint, *inputs: tuple[Tensor, ...], **options: Any
) -> list[dict[str, Tensor]]:
    """For each of the inputs, of one compiled model."""
    call = torch.compile(model, backend=backend, **options)
    found = []
    for given in inputs:
        model.zero_grad()
        call(*given).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return found


def check(
    model: nn.Module,
    *inputs: tuple[Tensor, ...],
    ffn_kv: Any = "none",
    rewritten: bool = False,
    **options: Any,
) -> Joint:
    """The gathered graph's results are the accumulating one's; the backend that gathered."""
    made = Joint(MoDAConfig(ffn_kv=ffn_kv), rewritten=rewritten)
    found = gradients(model, made, *inputs, **options)
    (gathered,), (accumulating,) = made.graphs, made.accumulating
    assert calls(accumulating, GATHER) == []
    for step, by_name in zip(made.inputs(), found, strict=True):
        expected = results(accumulating, step)
        torch.testing.assert_close(results(gathered, step), expected, **TIGHT)
        # So does what it was cut into, forward and backward.
        for gradient in by_name.values():
            assert any(torch.allclose(x, gradient, **TIGHT) for x in expected if like(x, gradient))
        assert max(g.abs().max() for g in by_name.values()) > 1e-6
    return made


def like(x: Any, y: Tensor) -> bool:
    return isinstance(x, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("ffn_kv", "readers"), [
    ("none", [[1, 2], [3, 4]]),
    ("shared", [[1, 1], [2, 2], [3, 3], [4, 4]]),
])  # fmt: skip
def test_gradients_stay_the_same(ffn_kv: Any, readers: list[list[int]], groups: int) -> None:
    model = stack(groups=groups)
    made = check(model, model.config.inputs(), ffn_kv=ffn_kv)
    # A layer's backward completes its own slot and the one before; an FFN's and its attention's.
    assert [sorted(call[6]) for call in made.calls(GATHER)] == readers
    # The first layer reads no slots; nobody else has an accumulator.
    assert len(made.calls(ACCUMULATE)) == 1
    (joint,) = made.graphs
    assert not any(len(n.meta["val"].shape) == 6 for n in joint.graph.nodes if "full" in n.name)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_any_number_of_slots(layers: int) -> None:
    model = stack(layers=layers)
    assert len(check(model, model.config.inputs()).calls(GATHER)) == layers // 2


def lengths(model: RandomStack, *wanted: int) -> list[tuple[Tensor, ...]]:
    ids, *others = model.config.inputs()
    return [(ids[:, :1].repeat(1, length), *others) for length in wanted]


def test_one_compilation_for_every_length() -> None:
    model = stack(layers=4)
    made = check(model, *lengths(model, 9, 12, 17), dynamic=True)
    assert len(made.calls(GATHER)) == 2


class Checkpointed(nn.Module):
    def __init__(self, groups: int, layers: int = 4) -> None:
        super().__init__()
        self.config = StackConfig(
            layers=layers, kv_heads=2, groups=groups, head_dim=8, length=9, batch=2, dtype="float64"
        )
        self.inner = RandomStack(self.config)
        for block in self.inner.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


@pytest.mark.parametrize("groups", [1, 2])
def test_checkpoints(groups: int) -> None:
    """Of a query that is recomputed, float64 rows of q and do are twice what two heads allow."""
    model = Checkpointed(groups)
    if groups == 1:
        assert len(check(model, model.config.inputs()).calls(GATHER)) == 2
    else:
        made = Joint(MoDAConfig())
        gradients(model, made, model.config.inputs())
        assert made.calls(GATHER) == []
        assert len(made.calls(ACCUMULATE)) == 4


class Merged(nn.Module):
    """Four attentions that tell their lse, rewritten by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 48).double() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        keys: list[Tensor] = []
        values: list[Tensor] = []
        token = None
        for number, layer in enumerate(self.layers):
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            out, lse = sequence_part(q, k, v, None, 0.25)
            if number < 3:
                token = OPS.write_slot(token, k, v, number, 3, torch.float64)
            if keys:
                out, token = OPS.join(out, lse, q, token, list(keys), list(values), 0.25)
            keys.append(k)
            values.append(v)
            x = x + out.transpose(1, 2).flatten(-2)
        return x


def test_behind_attentions_that_tell_their_lse() -> None:
    torch.manual_seed(0)
    made = check(Merged(), (torch.randn(2, 7, 16, dtype=torch.float64),), rewritten=True)
    assert [call[6] for call in made.calls(GATHER)] == [[1, 2], [3]]
    assert len(made.calls(OPS.depth_merge_query_backward.default)) == 3
    assert made.calls(OPS.depth_merge_backward.default) == []


def test_rows_are_rounded_once_when_they_are_written() -> None:
    model = stack(dtype="bfloat16")
    made = Joint(MoDAConfig())
    gradients(model, made, model.config.inputs())
    assert {call[8] for call in made.calls(GATHER)} == {torch.bfloat16}
    (joint,) = made.graphs
    rows = [n for n in joint.graph.nodes if n.target is torch.ops.aten.select.int]
    assert all(n.meta["val"].dtype == torch.bfloat16 for n in rows)


def test_the_own_layer_s_part_is_what_a_gradient_starts_from() -> None:
    model = stack()
    made = check(model, model.config.inputs())
    (joint,) = made.graphs
    for call in made.calls(GATHER):
        starts = call[9]
        # The first slot's layer has run its backward by then, the other's has not.
        assert [x is None for x in starts] == [False, False, True, True]
    sums = [n for n in joint.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    picked = torch.ops.aten.select.int
    added = [n for n in sums if any(x.target is picked for x in n.all_input_nodes)]
    assert len(added) == 2 * len(made.calls(GATHER))


# --- slots begun ahead --------------------------------------------------------------------------


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few layers are not worth it to the library itself."""
    monkeypatch.setattr(kernels, "gathers_ahead", lambda **_: True)


def ahead_calls(made: Joint, slots: int) -> list[tuple[Any, ...]]:
    """The gathers, of which every second one goes on with what the one before has begun."""
    calls = made.calls(GATHER)
    completed = 0
    for place, call in enumerate(calls):
        readers, counts, partials, begun = len(call[0]), call[6], call[10], call[11]
        assert (partials is not None) == (place % 2 == 1)
        assert (begun > 0) == (place % 2 == 0 and place + 1 < len(calls))
        completed += len(counts) - begun
        assert max(counts) == readers
        if partials is not None:
            before, which = partials.args
            assert (before.target, which) == (GATHER, 1)
            assert tuple(before.args) == calls[place - 1]
            assert len(counts) == calls[place - 1][11]
            # Each of their readers in one of the two calls.
            begun_counts = calls[place - 1][6][-len(counts) :]
            assert not set(call[1]) & set(before.args[1])
            assert all(a > 0 and b > 0 for a, b in zip(counts, begun_counts, strict=True))
    assert completed == slots
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 3, 4, 5, 6, 9])
def test_every_other_gather_begins_the_next_one_s(layers: int, ahead: None) -> None:
    model = stack(layers=layers)
    made = check(model, model.config.inputs())
    calls = ahead_calls(made, layers - 1)
    assert len(calls) == layers // 2
    # Two slots more a call, whose last two layers were missing, and so read one or two layers.
    expected: list[list[int]] = []
    for last in range(1, layers, 4):
        waiting = [min(x, last + 1) for x in range(last, layers)][:4]
        expected.append(waiting)
        if last + 2 < layers:
            expected.append([1, 2][: layers - last - 2])
    assert [call[6] for call in calls] == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_ffn_slots_are_begun_ahead(groups: int, ahead: None) -> None:
    model = stack(layers=6, groups=groups)
    made = check(model, model.config.inputs(), ffn_kv="shared")
    assert [call[6] for call in ahead_calls(made, 10)] == [
        [1, 1, 1, 1], [1, 1], [3, 3, 3, 3], [1, 1], [5, 5],
    ]  # fmt: skip


def test_projected_slots_are_begun_ahead(ahead: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for gathering in (False, True):
        torch._dynamo.reset()
        model = stack(layers=4)
        config = MoDAConfig(ffn_kv="projected")
        made = Joint(config, gathering=gathering, rewritten=True)
        monkeypatch.setattr(
            backend, "_inductor", lambda gm, inputs, *_, made=made: made(gm, inputs)
        )
        torch.manual_seed(0)
        moda_compile.convert(model, config, model.config.inputs())
        model(*model.config.inputs()).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], **TIGHT)
    assert [call[6] for call in ahead_calls(made, 6)] == [[1, 1, 1, 1], [1, 1], [3, 3]]


def test_checkpointed_slots_are_begun_ahead(ahead: None) -> None:
    model = Checkpointed(groups=1, layers=5)
    made = check(model, model.config.inputs())
    assert [call[6] for call in ahead_calls(made, 4)] == [[1, 2, 2, 2], [1, 2]]


def test_merged_slots_are_begun_ahead(ahead: None) -> None:
    torch.manual_seed(0)
    made = check(Merged(), (torch.randn(2, 7, 16, dtype=torch.float64),), rewritten=True)
    assert [call[6] for call in ahead_calls(made, 3)] == [[1, 2, 2], [1]]


def test_sums_stay_wide_and_gradients_are_rounded_once(ahead: None) -> None:
    model = stack(dtype="bfloat16")
    made = Joint(MoDAConfig())
    gradients(model, made, model.config.inputs())
    first, second = ahead_calls(made, 4)
    assert second[10].meta["val"].dtype == torch.float32
    assert first[8] == second[8] == torch.bfloat16
    (joint,) = made.graphs
    read = [n for n in joint.graph.nodes if n.target is torch.ops.aten.select.int]
    assert not any(second[10] in n.all_input_nodes for n in read)


def test_any_length_is_begun_ahead(ahead: None) -> None:
    model = stack(layers=4)
    made = check(model, *lengths(model, 9, 12), dynamic=True)
    assert len(ahead_calls(made, 3)) == 2


def test_the_library_is_asked_what_would_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def gathers_ahead(**what: Any) -> bool:
        asked.append(what)
        return what["readers"] == 4  # of 9 layers' slots the second pair, not the first

    monkeypatch.setattr(kernels, "gathers_ahead", gathers_ahead)
    model = stack(layers=9, groups=2)
    made = check(model, model.config.inputs())
    base = dict(dtype=torch.float64, head_dim=model.config.head_dim, group=2, slots=2)
    base |= dict(device=torch.device("cpu"))
    assert asked == [base | dict(readers=2), base | dict(readers=4)]
    assert [call[6] for call in made.calls(GATHER)] == [[1, 2], [3, 4, 4, 4], [1, 2], [7, 8]]


# --- what is left as it is ----------------------------------------------------------------------


def left_alone(change: Callable[[GraphModule], None] | None = None, **options: Any) -> None:
    model = stack(**options)
    made = Joint(MoDAConfig(), before=change)
    gradients(model, made, model.config.inputs())
    assert made.calls(GATHER) == []
    assert len(made.calls(ACCUMULATE)) == 5


def test_where_the_library_does_not_choose_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gathers", lambda **_: False)
    left_alone()


def accumulated(joint: GraphModule) -> list[Any]:
    """The accumulator, with what each reader added to it."""
    readers = [n for n in joint.graph.nodes if ACCUMULATE in n.args[:1] and n.kwargs["_all_bases"]]
    return [user for n in readers for user in n.users if user.args[1] == 4]


def test_an_accumulator_that_something_else_reads() -> None:
    def change(joint: GraphModule) -> None:
        after = accumulated(joint)[1]
        (output,) = joint.graph.find_nodes(op="output")
        with joint.graph.inserting_before(output):
            total = joint.graph.call_function(torch.ops.aten.sum.default, (after,))
            total.meta = dict(after.meta, val=after.meta["val"].sum())
            for grad in list(output.args[0]):
                if grad is not None and grad.meta["val"].dim() == 1:
                    added = joint.graph.call_function(torch.ops.aten.add.Tensor, (grad, total))
                    added.meta = dict(grad.meta)
                    output.replace_input_with(grad, added)
                    return

    left_alone(change)


def test_an_accumulator_that_does_not_start_at_zero() -> None:
    def change(joint: GraphModule) -> None:
        first = next(n for n in joint.graph.nodes if ACCUMULATE in n.args[:1])
        (zeros,) = first.kwargs["_all_bases"]
        zeros.args = (zeros.args[0], 1.0)

    left_alone(change)


def test_layers_of_different_scales() -> None:
    def change(joint: GraphModule) -> None:
        first = next(n for n in joint.graph.nodes if ACCUMULATE in n.args[:1])
        first.kwargs = dict(first.kwargs, scale=0.125)

    left_alone(change)


def test_layers_whose_slots_are_not_one_list() -> None:
    def change(joint: GraphModule) -> None:
        first = next(n for n in joint.graph.nodes if ACCUMULATE in n.args[:1])
        first.kwargs = dict(first.kwargs, depth_k=list(reversed(first.kwargs["depth_k"])))

    left_alone(change)


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "expected"), [
    ({}, True),
    ({"device_type": "cpu"}, False),
    ({"dtype": torch.float64}, False),
    ({"dtype": torch.float32, "group": 2}, True),
    ({"group": 4}, True),
    ({"group": 8}, False),
    ({"head_dim": 256}, True),
    ({"head_dim": 320}, False),
], ids=str)  # fmt: skip
def test_gathers(what: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    base: dict[str, Any] = dict(device_type="cuda", dtype=torch.bfloat16, head_dim=64, group=1)
    assert kernels.gathers(**base | what) == expected


@pytest.mark.parametrize(("what", "readers"), [
    ({}, 60),
    ({"slots": 1}, 30),
    ({"group": 2}, 15),
    ({"group": 4, "head_dim": 128}, 8),
    ({"dtype": torch.float32}, 36),
    ({"group": 3, "dtype": torch.float32}, 6),
], ids=str)  # fmt: skip
def test_gathers_ahead(what: dict[str, Any], readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many readers on: 4 bytes each and head of a group, for 3 or 6 times 20 a slot."""
    base: dict[str, Any] = dict(dtype=torch.bfloat16, head_dim=64, group=1, slots=2)
    base |= what | dict(device=torch.device("cpu"))
    assert kernels.gathers_ahead(**base, readers=readers)
    assert not kernels.gathers_ahead(**base, readers=readers - 1)
    assert not kernels.gathers_ahead(**base | {"head_dim": 80}, readers=10 * readers)
    monkeypatch.setattr(launch, "memory_bandwidth", lambda device: 4.8e12)  # of an H200
    assert not kernels.gathers_ahead(**base, readers=10 * readers)
