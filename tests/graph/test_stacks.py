"""Which attentions share slots: streams of tokens, K and V of one shape, and who is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moda_compile import MoDAConfig, RewriteError, fx, pipeline, verify
from moda_compile.plan import Plan
from moda_compile.testing import moda_attention_reference
from tests.graph import graphs

OPS = torch.ops.moda_compile
WIDTH, LENGTH = 16, 6
X = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)


class Attention(nn.Module):
    """Attention of x over ``context`` (itself by default); keys, values can be given."""

    def __init__(self, heads: int = 2, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads, d = heads, kv_heads or heads, WIDTH // heads
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, self.kv_heads * d) for _ in range(2))
        self.double()

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f in (self.k, self.v))
        return k, v

    def forward(self, x: Tensor, context: Tensor | None = None, kv: Any = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv or self.key_value(x if context is None else context)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
        return self.o(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Attentions ``parts``, put together by a function."""

    def __init__(self, join: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.join, self.parts = join, nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Any:
        return self.join(*inputs, *self.parts)


def planned(model: nn.Module, *inputs: Tensor, strict: bool = True, **options: Any) -> Plan:
    gm, _ = graphs.capture(model, *inputs)
    return pipeline.analyse(gm, MoDAConfig(**options), strict=strict)


def members(plan: Plan) -> list[list[str]]:
    """Module paths of each stack's attentions."""
    paths = [fx.module_path(a.node) for a in plan.attentions]
    return [[paths[m] for m in stack.members] for stack in plan.stacks]


def computes(model: nn.Module, *inputs: Tensor, stacks: list[int | None]) -> None:
    """The rewritten graph against an oracle that is told each call's stack, in call order."""
    gm, graph_inputs = graphs.capture(model, *inputs)
    plan = pipeline.transform(gm, MoDAConfig(), strict=True)
    verify.check(gm, plan)
    slots: dict[int, list[tuple[Tensor, Tensor]]] = {}
    calls = iter(stacks)

    def attend(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool = False) -> Tensor:
        stack = next(calls)
        own = slots.setdefault(stack, []) if stack is not None else []
        keys, values = ([pair[i] for pair in own] for i in (0, 1))
        depth = [torch.stack(x) if x else q.new_empty(0, *k.shape) for x in (keys, values)]
        if stack is None:
            depth = [q.new_empty(0, q.shape[0], k.shape[1], *q.shape[2:])] * 2
        elif not any(k is key for key in keys):
            own.append((k, v))
        return moda_attention_reference(q, k, v, *depth)[0]

    before = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = attend
        expected = model(*inputs)
    finally:
        F.scaled_dot_product_attention = before
    assert next(calls, "all") == "all"
    (got,) = gm(*graph_inputs)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)  # float64, a few layers


def chained(x: Tensor, *parts: Any) -> Tensor:
    for part in parts:
        x = x + part(x)
    return x


def attentions(count: int, **options: Any) -> list[Attention]:
    return [Attention(**options) for _ in range(count)]


def test_layers_with_other_heads_are_a_stack_of_their_own() -> None:
    one, other = attentions(3), attentions(2, heads=4)
    model = Model(chained, one[0], other[0], one[1], other[1], one[2])
    plan = planned(model, X)
    assert members(plan) == [["parts.0", "parts.2", "parts.4"], ["parts.1", "parts.3"]]
    assert plan.reads == [0, 0, 1, 1, 2]
    assert [(s.stack, s.index, s.layer) for s in plan.slots] == [(0, 0, 0), (0, 1, 2), (1, 0, 1)]
    computes(model, X, stacks=[0, 1, 0, 1, 0])


def test_kv_heads_decide_not_query_heads() -> None:
    """Four query heads over two KV heads, beside eight over ... the same two of the same size."""
    model = Model(chained, Attention(4, 2), Attention(4, 2), Attention(4))
    assert members(planned(model, X)) == [["parts.0", "parts.1"], ["parts.2"]]
    computes(model, X, stacks=[0, 0, 1])


def encoder_decoder(source: Tensor, target: Tensor, *parts: Any) -> Tensor:
    encoder, decoder = parts[:2], parts[2:]
    for layer in encoder:
        source = source + layer(source)
    for own, cross in zip(decoder[::2], decoder[1::2], strict=True):
        target = target + own(target)
        target = target + cross(target, source)
    return target


def test_encoder_and_decoder_are_two_stacks() -> None:
    """Of equal length even, which says nothing: token t of one is not token t of the other."""
    model = Model(encoder_decoder, *attentions(6))
    plan = planned(model, X, X.flip(0) * 2)
    assert members(plan) == [["parts.0", "parts.1"], ["parts.2", "parts.4"]]
    assert [stack.stream for stack in plan.stacks] == [0, 1]
    assert [fx.module_path(b.node) for b in plan.bystanders] == ["parts.3", "parts.5"]
    assert not plan.refusals
    computes(model, X, X.flip(0) * 2, stacks=[0, 0, 1, None, 1, None])


def test_a_decoder_of_another_length() -> None:
    model = Model(encoder_decoder, *attentions(6))
    inputs = X, X[:, :4] * 2
    assert members(planned(model, *inputs)) == [["parts.0", "parts.1"], ["parts.2", "parts.4"]]
    computes(model, *inputs, stacks=[0, 0, 1, None, 1, None])


def test_two_towers() -> None:
    def towers(x: Tensor, y: Tensor, *parts: Any) -> Tensor:
        return chained(x, *parts[:2]) + chained(y, *parts[2:])

    model = Model(towers, *attentions(4))
    assert members(planned(model, X, X * 2)) == [["parts.0", "parts.1"], ["parts.2", "parts.3"]]
    computes(model, X, X * 2, stacks=[0, 0, 1, 1])


def test_what_follows_two_towers_is_refused() -> None:
    def fused(x: Tensor, y: Tensor, *parts: Any) -> Tensor:
        x = chained(x, *parts[:2]) + chained(y, *parts[2:4])
        return chained(x, *parts[4:])

    model = Model(fused, *attentions(6))
    with pytest.raises(RewriteError, match="do not depend on all earlier ones") as caught:
        planned(model, X, X * 2)
    assert caught.value.block == "parts.4"
    plan = planned(model, X, X * 2, strict=False)
    assert len(plan.refusals) == 1 and not plan.slots and not plan.replaced


def test_parallel_attentions_are_refused() -> None:
    def parallel(x: Tensor, *parts: Any) -> Tensor:
        x = x + parts[0](x)
        x = x + parts[1](x) + parts[2](x)
        return x + parts[3](x)

    with pytest.raises(RewriteError, match="do not depend on all earlier ones"):
        planned(Model(parallel, *attentions(4)), X)


def test_shared_keys_and_values_are_written_once() -> None:
    """A layer that attends with an earlier layer's KV has produced none: it only reads."""

    def shared(x: Tensor, *parts: Any) -> Tensor:
        x = x + parts[0](x)
        kv = parts[1].key_value(x)
        x = x + parts[1](x, kv=kv)
        x = x + parts[2](x, kv=kv)
        return x + parts[3](x)

    model = Model(shared, *attentions(4))
    plan = planned(model, X)
    assert members(plan) == [[f"parts.{i}" for i in range(4)]]
    assert [s.layer for s in plan.slots] == [0, 1]
    assert plan.reads == [0, 1, 2, 2]
    computes(model, X, stacks=[0] * 4)


def test_layers_used_again() -> None:
    """Weights tied across depth: every call is a layer, and produces keys and values."""
    block = Attention()
    model = Model(chained, block, block, block)
    assert planned(model, X).reads == [0, 1, 2]
    computes(model, X, stacks=[0] * 3)


def test_other_mixers_in_between() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x.mT, (2, 0))).mT

    model = Model(chained, Attention(), Mixer(), Attention(), Mixer(), Attention())
    assert planned(model, X).reads == [0, 1, 2]
    computes(model, X, stacks=[0] * 3)


def test_other_tokens_after_pooling() -> None:
    """And coming back to the first length does not bring the first tokens back."""

    def hourglass(x: Tensor, *parts: Any) -> Tensor:
        x = chained(x, *parts[:2])
        x = F.avg_pool1d(x.mT, 2).mT
        x = chained(x, *parts[2:4])
        return chained(x.repeat_interleave(2, dim=1), *parts[4:])

    model = Model(hourglass, *attentions(6))
    stacks = [[f"parts.{i}", f"parts.{i + 1}"] for i in (0, 2, 4)]
    assert members(planned(model, X)) == stacks
    computes(model, X, stacks=[0, 0, 1, 1, 2, 2])


def test_merged_tokens() -> None:
    """Two tokens become one of twice the width, as in merged patches: that is no rearrangement."""

    def merged(x: Tensor, *parts: Any) -> Tensor:
        x = chained(x, *parts[:2])
        x = x.reshape(x.shape[0], LENGTH // 2, 2 * WIDTH)[..., :WIDTH]
        return chained(x, *parts[2:])

    model = Model(merged, *attentions(4))
    assert members(planned(model, X)) == [["parts.0", "parts.1"], ["parts.2", "parts.3"]]
    computes(model, X, stacks=[0, 0, 1, 1])


def test_features_scattered_into_another_stream() -> None:
    """Images among words: the language model's tokens are its own, of equal number or not."""

    def multimodal(image: Tensor, words: Tensor, *parts: Any) -> Tensor:
        image = chained(image, *parts[:2])
        mask = torch.arange(words.shape[1]) < 3
        words = words.masked_scatter(mask[None, :, None], image)
        return chained(words, *parts[2:])

    model = Model(multimodal, *attentions(4))
    assert members(planned(model, X, X * 2)) == [["parts.0", "parts.1"], ["parts.2", "parts.3"]]
    computes(model, X, X * 2, stacks=[0, 0, 1, 1])


def in_place(x: Tensor, *parts: Any) -> Tensor:
    x = x.clone()
    for part in parts:
        x.add_(part(x))
    return x


def written_slice(x: Tensor, *parts: Any) -> Tensor:
    x = x.clone()
    for part in parts:
        y = x + part(x)
        x[:, :] = y
    return x


@pytest.mark.parametrize("join", [in_place, written_slice])
def test_a_stream_that_is_updated_in_place(join: Callable[..., Tensor]) -> None:
    """No value hands one layer's result on, only memory does."""
    model = Model(join, *attentions(3))
    assert planned(model, X).reads == [0, 1, 2]
    computes(model, X, stacks=[0] * 3)


def test_position_added_to_queries_and_keys_only() -> None:
    """Values come from another tensor then, but of the same tokens."""

    class Positioned(Attention):
        def forward(self, x: Tensor, context: Any = None, kv: Any = None) -> Tensor:
            position = torch.arange(x.shape[1], dtype=x.dtype)[:, None].expand(-1, WIDTH)
            moved = x + position
            k, v = self.key_value(moved)[0], self.key_value(x)[1]
            return super().forward(moved, kv=(k, v))

    model = Model(chained, *(Positioned() for _ in range(3)))
    assert planned(model, X).reads == [0, 1, 2]
    computes(model, X, stacks=[0] * 3)


def test_values_of_the_first_layer_mixed_in() -> None:
    """A value residual: v = v_l + v_0."""

    def residual(x: Tensor, *parts: Any) -> Tensor:
        first = parts[0].key_value(x)[1]
        for part in parts:
            k, v = part.key_value(x)
            x = x + part(x, kv=(k, v + first))
        return x

    model = Model(residual, *attentions(3))
    assert planned(model, X).reads == [0, 1, 2]
    computes(model, X, stacks=[0] * 3)


def test_keys_without_a_source_are_refused() -> None:
    """Such as a cache's."""
    cache = torch.randn(2, 2, LENGTH, WIDTH // 2, dtype=torch.float64)

    def cached(x: Tensor, cache: Tensor, *parts: Any) -> Tensor:
        x = x + parts[0](x)
        return x + parts[1](x, kv=(cache, cache))

    with pytest.raises(RewriteError, match="attention over learned vectors, or over a cache"):
        planned(Model(cached, *attentions(2)), X, cache)


@pytest.mark.parametrize("joins", [False, True], ids=["cut in two", "joined"])
def test_tokens_that_move_between_batch_and_sequence_are_refused(joins: bool) -> None:
    """As many as before, in sequences of another length: not pooled, but cut up."""

    def cut(x: Tensor, *parts: Any) -> Tensor:
        b, t, d = x.shape
        shape = (b // 2, 2 * t, d) if joins else (2 * b, t // 2, d)
        x = x + parts[0](x)
        return parts[1](x.reshape(shape)).reshape(b, t, d)

    x = torch.randn(2, 2 * LENGTH, WIDTH, dtype=torch.float64)
    with pytest.raises(RewriteError, match="tokens are rearranged"):
        planned(Model(cut, *attentions(2)), x)


def test_attention_between_channels_is_left_alone() -> None:
    """As in XCiT: its "tokens" are features. The others of the stack are converted."""

    class Channels(Attention):
        def forward(self, x: Tensor, context: Any = None, kv: Any = None) -> Tensor:
            q, k, v = (
                f(x).unflatten(-1, (2, -1)).permute(0, 2, 3, 1) for f in (self.q, self.k, self.v)
            )
            out = F.scaled_dot_product_attention(q, k, v)
            return self.o(out.permute(0, 3, 1, 2).flatten(2))

    x = torch.randn(2, WIDTH // 2, WIDTH, dtype=torch.float64)  # as many tokens as channels a head
    model = Model(chained, Attention(), Channels(), Attention(), Channels())
    plan = planned(model, x)
    assert members(plan) == [["parts.0", "parts.2"]]
    assert [fx.module_path(b.node) for b in plan.bystanders] == ["parts.1", "parts.3"]
    assert all("channels" in b.reason for b in plan.bystanders)


def test_the_slots_of_ffns_go_to_their_own_layers_stack() -> None:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)).double()

    one, other = attentions(3), attentions(2, heads=4)
    parts = [one[0], mlp(), other[0], mlp(), one[1], mlp(), other[1], mlp(), one[2], mlp()]
    plan = planned(Model(chained, *parts), X, ffn_kv="shared")
    found = [(s.stack, s.index, s.layer, s.ffn.path if s.ffn else "") for s in plan.slots]
    assert found == [
        (0, 0, 0, ""), (0, 1, 0, "parts.1"), (0, 2, 2, ""), (0, 3, 2, "parts.5"),
        (1, 0, 1, ""), (1, 1, 1, "parts.3"),
    ]  # fmt: skip
    assert plan.reads == [0, 0, 2, 2, 4]


def test_one_token_chain_a_stack() -> None:
    one, other = attentions(3), attentions(3, heads=4)
    model = Model(chained, one[0], other[0], one[1], other[1], one[2], other[2])
    gm, _ = graphs.capture(model, X)
    pipeline.transform(gm, MoDAConfig(), strict=True)

    def root(token: Any) -> Node:
        while not (fx.calls_op(token, OPS.write_slot) and token.args[0] is None):
            token = token.args[0] if fx.calls_op(token, OPS.write_slot) else token.args[0].args[3]
        assert isinstance(token, Node)
        return token

    roots = [root(reader.args[3]) for reader in graphs.nodes_of(gm, OPS.attend)]
    assert roots[0] is roots[2] is roots[4] and roots[1] is roots[3] is roots[5]
    assert roots[0] is not roots[1]


def test_a_block_used_again_has_one_projection() -> None:
    """ffn_kv="projected": the module's weights, drawn once, serve each of its calls."""
    import moda_compile

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.up, self.down = nn.Linear(WIDTH, 20).double(), nn.Linear(20, WIDTH).double()
            self.ffn = nn.Sequential(self.up, nn.GELU(), self.down)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x) + x
            return self.ffn(x)

    model = Model(chained, *[Block()] * 3)
    moda_compile.convert(model, MoDAConfig(ffn_kv="projected"), (X,), backend="eager")
    ffn: Any = model.parts[0].ffn
    new = [name for name, _ in model.named_parameters() if "moda_" in name]
    assert len(new) == 2
    got = model(X)

    x, slots = X, []
    block: Any = model.parts[0]
    for _ in range(3):
        q = block.attention.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = block.attention.key_value(x)
        depth = [
            torch.stack([s[i] for s in slots]) if slots else q.new_empty(0, *k.shape)
            for i in (0, 1)
        ]
        out, _ = moda_attention_reference(q, k, v, *depth)
        h = block.attention.o(out.transpose(1, 2).flatten(2)) + x
        written = (F.linear(h, ffn.moda_key_weight), F.linear(h, ffn.moda_value_weight))
        written = tuple(w.unflatten(-1, (2, -1)).transpose(1, 2) for w in written)
        slots += [(k, v), written]
        x = x + block.down(F.gelu(block.up(h)))
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)  # float64, three layers
