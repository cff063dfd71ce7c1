"""F.multi_head_attention_forward taken to pieces: put together again, they are what it was.

Each match is checked by the attention it names: SDPA of its query, key, value, mask and scale, and
the steps behind it, in place of the call, must give what the call gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.patterns import Attention, Refused, packed, projection
from tests.graph.graphs import trace

B, T, E, H = 3, 5, 16, 4
D = E // H
# float64, one softmax and two linear layers of 16 features: errors of a few 1e-16 were seen.
TIGHT = dict(rtol=0.0, atol=1e-13)


def found(gm: GraphModule) -> Attention:
    """The graph's one match."""
    matches = [m for n in list(gm.graph.nodes) if (m := packed.match(n)) is not None]
    assert len(matches) == 1
    return matches[0]


def refused(gm: GraphModule) -> Refused:
    with pytest.raises(Refused) as caught:
        for node in list(gm.graph.nodes):
            packed.match(node)
    assert caught.value.fix.endswith(".")
    return caught.value


def put_together(gm: GraphModule, attention: Attention) -> GraphModule:
    """The graph with SDPA of the match's parts in place of the call."""
    node = attention.node
    with gm.graph.inserting_before(node):
        out = fx.insert(
            gm,
            F.scaled_dot_product_attention,
            (attention.query, attention.key, attention.value),
            {"attn_mask": attention.mask, "is_causal": attention.is_causal,
             "scale": attention.scale},
            like=node,
        )  # fmt: skip
        for step in attention.restore:
            out = fx.insert(gm, step.target, (out, *step.args), dict(step.kwargs), like=node)
    node.replace_all_uses_with(out)
    gm.graph.eliminate_dead_code()
    assert not any(fx.calls(n, "multi_head_attention_forward") for n in gm.graph.nodes)
    gm.graph.lint()
    gm.recompile()
    return gm


def check(module: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Attention:
    """Trace, match, put together, compare."""
    expected = module(*inputs)
    assert isinstance(expected, Tensor)
    captured: list[Any] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        attention = found(gm)
        captured.append(attention)
        return put_together(gm, attention).forward

    torch._dynamo.reset()
    got = torch.compile(module, backend=keep, dynamic=dynamic)(*inputs)
    torch.testing.assert_close(got, expected, **TIGHT)
    return captured[0]


class Self(nn.Module):
    """Self-attention by nn.MultiheadAttention; ``options`` go to its forward."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"batch_first": True, "dtype": torch.float64} | options
        self.inner = nn.MultiheadAttention(E, H, **options)
        for parameter in self.inner.parameters():  # biases start at 0, which would hide them
            nn.init.normal_(parameter, std=0.5)
        self.call = {"need_weights": False} | (call or {})

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.inner(x, x, x, **self.call, **masks)[0]


def batch(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (B, T, E)), generator=generator, dtype=torch.float64)


def shapes(attention: Attention) -> list[tuple[int, ...]]:
    parts = (attention.query, attention.key, attention.value)
    return [tuple(fx.value(x).shape) for x in parts]


# --- projections --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(batch_first: bool, bias: bool, need_weights: bool) -> None:
    module = Self({"need_weights": need_weights}, batch_first=batch_first, bias=bias)
    attention = check(module, batch(B, T, E) if batch_first else batch(T, B, E))
    assert shapes(attention) == [(B, H, T, D)] * 3
    assert (attention.is_causal, attention.mask, attention.scale) == (False, None, None)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", ["front", "behind", "both"])
def test_swapped_dimensions(batch_first: bool, side: str) -> None:
    """Whoever swaps dimensions around the call, and whether or not it swaps them back."""

    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Self(batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1) if side in ("front", "both") else x
            y = self.attention(x)
            return y.transpose(0, 1) if side in ("behind", "both") else y

    attention = check(Swapping(), batch(T, B, E))
    first, second = (B, T) if side in ("front", "both") else (T, B)  # as the module gets them
    rows = (first, second) if batch_first else (second, first)
    assert shapes(attention)[0] == (rows[0], H, rows[1], D)


def test_a_view_of_the_result() -> None:
    """It works on the call's own memory order, [T, B, E], so it has to work on what replaces it."""
    module = Self(batch_first=False)
    check(lambda x: module(x.transpose(0, 1)).view(T * B, E), batch())


def test_one_linear_layer_for_one_input() -> None:
    attention = check(Self(), batch())
    layers = [projection.trace(x) for x in (attention.query, attention.key, attention.value)]
    assert len({layer.layer.node for layer in layers}) == 1
    assert [layer.offset for layer in layers] == [0, E, 2 * E]
    assert [(layer.order, layer.heads) for layer in layers] == [("bhtd", H)] * 3


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6}, {"kdim": 6, "vdim": 10}])
def test_inputs_of_their_own(batch_first: bool, bias: bool, widths: dict[str, int]) -> None:
    """Three inputs make three layers, whose weights an FFN can share as well."""

    class Three(Self):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            key = x.flip(-1)[..., : widths.get("kdim", E)]
            value = x.cos()[..., : widths.get("vdim", E)]
            return self.inner(x, key, value, need_weights=False)[0]

    module = Three(batch_first=batch_first, bias=bias, **widths)
    attention = check(module, batch(B, T, E) if batch_first else batch(T, B, E))
    for part, name in ((attention.key, "kdim"), (attention.value, "vdim")):
        traced = projection.trace(part)
        assert traced.offset == 0 and traced.width == E
        assert fx.value(traced.layer.input).shape[-1] == widths.get(name, E)
        assert (traced.layer.bias is not None) == bias


def test_queries_and_keys_of_one_input() -> None:
    """Positions added to queries and keys only; the module swaps dimensions of each by itself."""

    class Positions(Self):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            here = x + torch.linspace(0, 1, T, dtype=x.dtype)[:, None]
            return self.inner(here, here, x, need_weights=False)[0]

    attention = check(Positions(), batch())
    key, value = (projection.trace(x) for x in (attention.key, attention.value))
    assert key.layer.input is not value.layer.input


def test_cross_attention_is_matched_with_its_own_length() -> None:
    """Whether it is of one's business is for the passes to say."""

    class Cross(Self):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
            return self.inner(x, memory, memory, need_weights=False)[0]

    attention = check(Cross(), batch(), batch(B, 7, E))
    assert shapes(attention) == [(B, H, T, D), (B, H, 7, D), (B, H, 7, D)]


def test_dynamic_shapes() -> None:
    attention = check(Self(), batch(), dynamic=True)
    assert [isinstance(s, torch.SymInt) for s in fx.value(attention.key).shape] == [
        True,
        False,
        True,
        False,
    ]


def test_inside_autocast() -> None:
    """The fake results in front of the call are made under the graph's own autocast."""

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Self(dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.attention(x)

    module, x = Low(), batch().float()
    gm = trace(module, x)
    attention = found(gm)
    parts = (attention.node, attention.query, attention.key, attention.value)
    assert {fx.value(part).dtype for part in parts} == {torch.bfloat16}
    put_together(gm, attention)


# --- masks --------------------------------------------------------------------------------------

FUTURE = torch.ones(T, T, dtype=torch.bool).triu(1)
WINDOW = FUTURE | torch.ones(T, T, dtype=torch.bool).tril(-3)
PADDING = torch.arange(T)[None] >= torch.tensor([T, 3, 4])[:, None]  # True is masked


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)


def biased(mask: Tensor) -> Tensor:
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)).double()
    return additive(mask) + noise


def functional(module: Self, x: Tensor, **masks: Any) -> Tensor:
    """The call itself: the module makes bool masks additive in front of it."""
    inner = module.inner
    x = x.transpose(0, 1)
    out = F.multi_head_attention_forward(
        x, x, x, E, H, inner.in_proj_weight, inner.in_proj_bias, None, None, False, 0.0,
        inner.out_proj.weight, inner.out_proj.bias, need_weights=False, **masks,
    )[0]  # fmt: skip
    return out.transpose(0, 1)


@pytest.mark.parametrize("through", ["module", "functional"])
@pytest.mark.parametrize("kind", [lambda m: m, additive, biased], ids=["bool", "float", "bias"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("padding", [None, lambda m: m, additive], ids=["-", "bool", "float"])
def test_masks(through: str, kind: Any, rank: int, padding: Any) -> None:
    """Of two bool masks the joint one is bool; with an additive one among them it is additive."""
    mask = kind(WINDOW)
    mixed = padding is not None and (padding(PADDING).dtype != mask.dtype)
    if mixed and through == "module":
        pytest.skip("the module warns of it, which breaks the graph")
    if rank == 3:  # another one for each head
        mask = torch.stack([kind(WINDOW.roll(i % 2, 0)) for i in range(B * H)])
    masks = {"attn_mask": mask}
    if padding is not None:
        masks["key_padding_mask"] = padding(PADDING)
    module = Self()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
            if through == "module":
                return self.module(x, **masks)
            return functional(self.module, x, **masks)

    model, x = Masked(), batch()
    expected = model(x, **masks)
    torch._dynamo.reset()
    matched: list[Attention] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        matched.append(found(gm))
        return put_together(gm, matched[0]).forward

    got = torch.compile(model, backend=keep)(x, **masks)
    torch.testing.assert_close(got, expected, **TIGHT)
    (attention,) = matched
    assert attention.mask is not None and not attention.is_causal
    all_bool = {m.dtype for m in masks.values()} == {torch.bool} and through == "functional"
    assert (fx.value(attention.mask).dtype == torch.bool) == all_bool


def test_padding_alone() -> None:
    attention = check(lambda x: functional(MODULE, x, key_padding_mask=PADDING), batch())
    assert attention.mask is not None
    assert fx.value(attention.mask).shape == (B, 1, 1, T)


MODULE = Self()


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_mask_that_the_graph_builds_is_shown(form: str, need_weights: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if form == "float":
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return MODULE.inner(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    attention = check(forward, batch())
    assert attention.is_causal and attention.mask is None


def test_a_mask_that_is_nearly_causal_is_kept() -> None:
    def forward(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(2)
        return functional(MODULE, x, attn_mask=mask)

    attention = check(forward, batch())
    assert not attention.is_causal and attention.mask is not None


def test_a_causal_mask_with_padding_is_no_causal_mask() -> None:
    def forward(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return functional(MODULE, x, attn_mask=mask, key_padding_mask=PADDING)

    attention = check(forward, batch())
    assert not attention.is_causal and attention.mask is not None


@pytest.mark.parametrize(
    ("options", "causal"),
    [
        # The call drops the mask and attends causally: what it does, not what the mask says.
        ({"need_weights": False}, True),
        # Here it looks at the mask, whatever the hint says.
        ({"need_weights": True}, False),
        ({"need_weights": False, "key_padding_mask": additive(PADDING)}, False),
    ],
)
def test_a_hint_is_believed_only_where_the_call_believes_it(
    options: dict[str, Any], causal: bool
) -> None:
    lie = torch.zeros(T, T, dtype=torch.float64)  # says: all of it

    def forward(x: Tensor) -> Tensor:
        masks = {"key_padding_mask": options.get("key_padding_mask"), "is_causal": True}
        weights = options["need_weights"]
        return MODULE.inner(x, x, x, attn_mask=lie, need_weights=weights, **masks)[0]

    attention = check(forward, batch())
    assert attention.is_causal == causal


# --- refused ------------------------------------------------------------------------------------


def test_weights_that_are_used_are_refused() -> None:
    def both(x: Tensor) -> Tensor:
        out, weights = MODULE.inner(x, x, x)
        return out + weights.sum()

    assert "weights are used" in refused(trace(both, batch())).reason


def test_weights_that_are_only_computed_are_not_missed() -> None:
    def dropped(x: Tensor) -> Tensor:
        out, weights = MODULE.inner(x, x, x, average_attn_weights=False)
        weights.mean(1).log()
        return out

    check(dropped, batch())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"dropout": 0.1}, r"dropout=0.1"),
    ],
)
def test_options_refused(options: dict[str, Any], reason: str) -> None:
    assert reason in refused(trace(Self(**options), batch())).reason


def test_dropout_in_evaluation_is_none() -> None:
    check(Self(dropout=0.1).eval(), batch())


def test_unbatched_input_is_refused() -> None:
    error = refused(trace(Self(), batch(T, E)))
    assert "unbatched" in error.reason and "x[None]" in error.fix


def test_static_keys_are_refused() -> None:
    static = batch(B * H, T, D)
    gm = trace(lambda x: functional(MODULE, x, static_k=static), batch())
    assert "static_k" in refused(gm).reason


def test_nothing_else_is_matched() -> None:
    """Of the call's results only the first is the attention's; the call itself is none."""
    gm = trace(lambda x: MODULE.inner(x, x, x)[0], batch())
    ours = [n for n in list(gm.graph.nodes) if packed.match(n) is not None]
    assert [fx.name_of(n) for n in ours] == ["getitem"]
