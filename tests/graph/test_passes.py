"""What each pass makes of a graph: slots in order, readers, refusals, and nothing where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile import MoDAConfig, RewriteError, fx, pipeline
from moda_compile.passes import cleanup, detect, lower, rewrite, sort_out, thread_depth
from moda_compile.plan import Plan
from moda_compile.testing import RandomStack, StackConfig, reference
from tests.graph import graphs

OPS = torch.ops.moda_compile
WIDTH, HEADS = 16, 2


def analysed(model: nn.Module, *inputs: Any, strict: bool = True, **options: Any) -> Plan:
    gm, _ = graphs.capture(model, *inputs)
    return pipeline.analyse(gm, MoDAConfig(**options), strict=strict)


# --- slots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("ffn_kv", ["none", "shared", "projected"])
def test_slot_order(layers: int, ffn_kv: Any) -> None:
    """Attention 0, FFN 0, attention 1, ...: the last layer writes none and reads all others."""
    config = StackConfig(layers=layers)
    plan = analysed(RandomStack(config), *config.inputs(), ffn_kv=ffn_kv)
    per_layer = 1 if ffn_kv == "none" else 2
    assert [slot.index for slot in plan.slots] == list(range(per_layer * (layers - 1)))
    expected = [(i, ffn) for i in range(layers - 1) for ffn in (False, True)[:per_layer]]
    assert [(slot.layer, slot.ffn is not None) for slot in plan.slots] == expected
    assert plan.reads == [per_layer * i for i in range(layers)]
    assert [s.ffn.path for s in plan.slots if s.ffn] == [
        f"blocks.{i}.ffn" for i in range(layers - 1) if ffn_kv != "none"
    ]
    assert len(plan.lowerings) == layers
    assert plan.lowerings[0][0] == "cpu"


@pytest.mark.parametrize("order", ["sequential", "attention_first", "ffn_first"])
@pytest.mark.parametrize("placement", ["pre", "post", "branch"])
def test_slot_order_of_parallel_blocks(order: Any, placement: Any) -> None:
    """A layer's own FFN is written for the next layer, also where it runs first."""
    config = StackConfig(layers=3, order=order, placement=placement, ffn="swiglu")
    plan = analysed(RandomStack(config), *config.inputs(), ffn_kv="shared")
    assert [(s.layer, s.ffn.path if s.ffn else "") for s in plan.slots] == [
        (0, ""),
        (0, "blocks.0.ffn"),
        (1, ""),
        (1, "blocks.1.ffn"),
    ]


def test_the_rewritten_graph() -> None:
    """attend and write_slot in order, one token through all of them, no SDPA left."""
    gm, plan, _ = graphs.rewritten(StackConfig(layers=4), ffn_kv="shared")
    assert not [n for n in gm.graph.nodes if fx.calls(n, "scaled_dot_product_attention")]
    writers = graphs.nodes_of(gm, OPS.write_slot)
    readers = graphs.nodes_of(gm, OPS.attend)
    assert [n.args[3] for n in writers] == list(range(6))
    assert {n.args[4] for n in writers} == {6}
    assert [len(n.args[4]) for n in readers] == [0, 2, 4, 6]
    assert readers[-1].args[4] == [w.args[1] for w in writers]
    assert readers[-1].args[5] == [w.args[2] for w in writers]
    # Each token is used once: autograd never adds two accumulators up.
    tokens = [*writers, *(u for r in readers[:-1] for u in r.users if u.args[1] == 1)]
    assert [len(token.users) for token in tokens] == [1] * len(tokens)
    # Without fake results AOTAutograd's cache would not take the graph.
    assert all(fx.VALUE in n.meta for n in [*writers, *readers])
    assert all(n.meta.get("stack_trace") for n in [*writers, *readers])


@pytest.mark.parametrize("ffn_kv", ["none", "shared"])
def test_the_rewritten_graph_runs(ffn_kv: Any) -> None:
    config = StackConfig(layers=3, kv_heads=2, groups=2, rotary="half", dtype="float64")
    gm, _, inputs = graphs.rewritten(config, ffn_kv=ffn_kv)
    stack = RandomStack(config)
    slots = stack.ffn_slots("shared", {}) if ffn_kv == "shared" else None
    expected = reference(stack, *config.inputs(), ffn_slots=slots)
    (got,) = gm(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64, three layers


def test_the_rewrite_is_deterministic() -> None:
    """A pure function of graph and options: warm caches depend on it."""
    config = StackConfig(layers=3, repeat="expand_before", groups=2, mask="arange_bool")
    one, other = (graphs.text(graphs.rewritten(config, ffn_kv="shared")[0]) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (StackConfig(layers=1, groups=2, repeat="repeat_interleave"), {}),
        (StackConfig(layers=1, mask="arange_bool"), {"ffn_kv": "shared"}),
        (StackConfig(layers=3), {"depth": False}),
        (StackConfig(layers=3, groups=2), {"depth": False, "ffn_kv": "shared"}),
        (StackConfig(layers=2, groups=2, repeat="expand_before"), {"depth": False}),
    ],
    ids=["one layer", "one layer, shared", "no depth", "no depth, shared", "repeat"],
)
def test_the_graph_is_left_as_it_is(config: StackConfig, options: dict[str, Any]) -> None:
    """Node for node, and bit for bit on the same backend."""
    before, inputs = graphs.capture(RandomStack(config), *config.inputs())
    after, plan, _ = graphs.rewritten(config, **options)
    assert graphs.text(after) == graphs.text(before)
    assert not plan.slots
    assert {name for name, _ in plan.lowerings} == {"unchanged"}
    for x, y in zip(before(*inputs), after(*inputs), strict=True):
        assert torch.equal(x, y)
    aot = torch._dynamo.lookup_backend("aot_eager")
    for x, y in zip(aot(before, inputs)(*inputs), aot(after, inputs)(*inputs), strict=True):
        assert torch.equal(x, y)


# --- stacks that are none -----------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Joined(nn.Module):
    """Parts and how their results come together."""

    def __init__(self, join: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.join, self.parts = join, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, *self.parts)


def towers(x: Tensor, one: Any, two: Any) -> Tensor:
    return one(x) + two(x)


def chained(x: Tensor, *parts: Any) -> Tensor:
    for part in parts:
        x = x + part(x)
    return x


def test_lonely_attentions_are_refused() -> None:
    model, x = Joined(towers, SelfAttention(), SelfAttention()), torch.randn(2, 5, WIDTH)
    with pytest.raises(RewriteError, match="no two of them follow one another") as caught:
        analysed(model, x)
    assert caught.value.block == "parts.1"
    plan = analysed(model, x, strict=False)
    assert plan.reads == [0, 0]
    assert not plan.slots
    assert len(plan.refusals) == 1


def test_a_layer_without_an_ffn() -> None:
    model = Joined(chained, SelfAttention(), SelfAttention())
    x = torch.randn(2, 5, WIDTH)
    assert len(analysed(model, x).slots) == 1
    for strict in (True, False):  # slots of some layers only would be yet another model
        with pytest.raises(RewriteError, match="layer 0 has 0 feed-forward networks"):
            analysed(model, x, strict=strict, ffn_kv="shared")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))


def test_a_layer_with_two_ffns() -> None:
    model = Joined(chained, SelfAttention(), mlp(), mlp(), SelfAttention())
    with pytest.raises(RewriteError, match="layer 0 has 2 feed-forward networks"):
        analysed(model, torch.randn(2, 5, WIDTH), ffn_kv="shared")


def test_ffns_in_front_of_and_behind_the_stack_write_nothing() -> None:
    """An embedding MLP belongs to no layer; the last layer's FFN and the head write no slot."""
    model = Joined(chained, mlp(), SelfAttention(), mlp(), SelfAttention(), mlp(), mlp())
    plan = analysed(model, torch.randn(2, 5, WIDTH), ffn_kv="shared")
    assert [(s.layer, s.ffn.path if s.ffn else "") for s in plan.slots] == [(0, ""), (0, "parts.2")]


def test_an_auxiliary_branch_writes_nothing() -> None:
    """An FFN that no later attention depends on would never be read."""

    def join(x: Tensor, first: Any, ffn: Any, aux: Any, second: Any) -> Tensor:
        x = x + first(x)
        side = aux(x)
        x = x + ffn(x)
        return x + second(x) + side

    model = Joined(join, SelfAttention(), mlp(), mlp(), SelfAttention())
    plan = analysed(model, torch.randn(2, 5, WIDTH), ffn_kv="shared")
    assert [s.ffn.path for s in plan.slots if s.ffn] == ["parts.1"]


def test_a_shared_module_is_as_many_layers_as_calls() -> None:
    block = SelfAttention()
    plan = analysed(Joined(chained, block, block, block), torch.randn(2, 5, WIDTH))
    assert plan.reads == [0, 1, 2]


# --- the order of the passes --------------------------------------------------------------------


def test_passes_are_one_tuple_each() -> None:
    assert pipeline.ANALYSE == (detect.run, sort_out.run, thread_depth.run, lower.run)
    assert pipeline.TRANSFORM == (rewrite.run, cleanup.run)


def test_analysis_changes_nothing() -> None:
    config = StackConfig(layers=3, groups=2, repeat="repeat_interleave")
    gm, _ = graphs.capture(RandomStack(config), *config.inputs())
    before = graphs.text(gm)
    pipeline.analyse(gm, MoDAConfig(ffn_kv="shared"), strict=True)
    assert graphs.text(gm) == before


def test_a_cut_stack_is_refused() -> None:
    config = StackConfig(layers=3)
    plan = analysed(RandomStack(config), *config.inputs())
    pipeline.check_whole(plan, 3)
    with pytest.raises(RewriteError, match="3 attentions of a converted model's 4") as caught:
        pipeline.check_whole(plan, 4)
    assert caught.value.block == "blocks.2.attention"
    with pytest.raises(RewriteError, match="0 attentions of a converted model's 4"):
        pipeline.check_whole(Plan(config=MoDAConfig()), 4)


def test_projected_without_its_weights_is_refused() -> None:
    """torch.compile(model, backend=Backend(...)) can't add parameters."""
    with pytest.raises(RewriteError, match="projection weights for 0 FFNs"):
        graphs.rewritten(StackConfig(layers=2), ffn_kv="projected")


@pytest.mark.parametrize(
    ("dtype", "choice", "expected"),
    [
        ("bfloat16", "float32", torch.float32),
        ("bfloat16", "model", torch.bfloat16),
        ("float64", "float32", torch.float64),
    ],
)
def test_accumulator_dtype(dtype: Any, choice: Any, expected: torch.dtype) -> None:
    gm, _, _ = graphs.rewritten(StackConfig(layers=3, dtype=dtype), accumulator_dtype=choice)
    assert {n.args[5] for n in graphs.nodes_of(gm, OPS.write_slot)} == {expected}


def test_autocast() -> None:
    """SDPA casts under autocast, an operator of ours does not: the rewrite casts for it."""
    config = StackConfig(layers=3, rotary="half", qk_norm="head")
    stack = RandomStack(config)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.stack(ids)

    gm, inputs = graphs.capture(Cast(), *config.inputs())
    pipeline.transform(gm, MoDAConfig(ffn_kv="shared"), strict=True)
    for node in graphs.nodes_of(gm, OPS.attend):
        assert {fx.value(x).dtype for x in (*node.args[:3], *node.args[4], *node.args[5])} == {
            torch.bfloat16
        }
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(stack, *config.inputs(), ffn_slots=stack.ffn_slots("shared", {}))
    (got,) = gm(*inputs)
    # Logits of size 1 to 5, rounded to bfloat16 (eps 2^-7) in each of three layers' branches.
    assert (got - expected).abs().max() <= 3 * 2**-7 * expected.abs().max()


def test_low_rank_adapters_stay_self_attention() -> None:
    """LoRA on q and v: their hidden state is the adapters' input, not the adapters' inside."""

    class Adapted(SelfAttention):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q = q + self.up(self.down(self.drop(x)))
            q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model = Joined(chained, Adapted(), mlp(), Adapted())
    for ffn_kv in ("none", "shared"):
        plan = analysed(model, torch.randn(2, 5, WIDTH), ffn_kv=ffn_kv)
        assert not plan.refusals
        assert plan.reads == [0, 1 if ffn_kv == "none" else 2]
