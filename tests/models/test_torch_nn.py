"""torch.nn's own: nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerDecoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile import MoDAConfig, RewriteError, fx, pipeline
from moda_compile.capture import has_torch_s_attention, spelled_out
from moda_compile.testing import FFNSlots, check_conversion, reference
from tests.graph.graphs import trace

B, T, WIDTH, HEADS, HIDDEN, LAYERS = 2, 5, 16, 2, 24, 3
# float64, outputs of order 1, three layers: a few hundred roundings.
TIGHT = dict(rtol=0.0, atol=1e-11)
NEVER_PLAIN = 1e-3  # the plain model is farther away than that


def batch(batch_first: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (B, T, WIDTH) if batch_first else (T, B, WIDTH)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def wide(model: nn.Module) -> nn.Module:
    """Weights large enough, and biases different enough from 0, for every part to count."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.2 * noise.to(parameter))
    return model


class Encoder(nn.Module):
    """nn.TransformerEncoder with fixed keywords of its call."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64} | options
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options)
        self.inner = nn.TransformerEncoder(layer, LAYERS)
        self.call = call or {}
        wide(self)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.inner(x, **self.call, **masks)


FUTURE = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
PADDING = torch.arange(T)[None] >= torch.tensor([T, 3])[:, None]  # True is masked


# --- the encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "bias": False}], ids=["post", "pre"])
def test_encoder(batch_first: bool, options: dict[str, Any]) -> None:
    model = Encoder(batch_first=batch_first, **options)
    check_conversion(model, (batch(batch_first),), backend="eager")


@pytest.mark.parametrize(
    "masks",
    [
        {"mask": FUTURE, "is_causal": True},
        {"mask": FUTURE},
        {"mask": FUTURE == 0},  # bool, and not causal: True is masked
        {"src_key_padding_mask": PADDING},
        {"mask": FUTURE < 0, "src_key_padding_mask": PADDING},
    ],
    ids=["hint", "causal", "bool", "padding", "both"],
)
def test_encoder_masks(masks: dict[str, Any]) -> None:
    tensors = {n: m for n, m in masks.items() if isinstance(m, Tensor)}
    model = Encoder({n: m for n, m in masks.items() if n not in tensors})
    check_conversion(model, {"x": batch(), **tensors}, backend="eager")


def test_a_mask_made_in_the_model_is_shown_to_be_causal() -> None:
    class Causal(Encoder):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.inner(x, mask)

    model = Causal()
    report = moda_compile.explain(model, batch())
    assert [a.causal for a in report.attentions] == [True] * LAYERS
    check_conversion(model, (batch(),), backend="eager")


@pytest.mark.parametrize(("masks", "left"), [((), 0), ((FUTURE,), 1)], ids=["-", "mask"])
def test_replaced_calls_are_gone(masks: tuple[Tensor, ...], left: int) -> None:
    """Else a graph that is not compiled would run them too. With a mask the first layer's stays."""
    with spelled_out():
        gm = trace(lambda x, *given: MODEL.inner(x, *given), batch(), *masks)
    pipeline.transform(gm, MoDAConfig(), strict=True)
    calls = [n for n in gm.graph.nodes if fx.calls(n, "multi_head_attention_forward")]
    assert len(calls) == left


MODEL = Encoder()


def test_only_such_modules_are_spelled_out() -> None:
    alone = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    assert has_torch_s_attention(MODEL)
    assert has_torch_s_attention(alone)
    assert not has_torch_s_attention(alone[0])


def test_through_inductor() -> None:
    masks = {"mask": FUTURE < 0, "src_key_padding_mask": PADDING}
    model = Encoder(dtype=torch.float32)
    inputs = {"x": batch(dtype=torch.float32), **masks}
    check_conversion(model, inputs, backend="inductor")


def ffn_slots(model: nn.Module, leaves: Mapping[str, Tensor]) -> FFNSlots:
    """By hand: keys and values of the layer's own projection, or of the new weights."""
    layers = model.inner.layers  # type: ignore[union-attr]
    batch_first = layers[0].self_attn.batch_first  # type: ignore[union-attr, index]
    names = [f"inner.layers.{i}" for i in range(LAYERS - 1)]

    def key_value(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        attention = layers[layer].self_attn  # type: ignore[union-attr, index]
        made = []
        for i, name in ((1, "moda_key_weight"), (2, "moda_value_weight")):
            weight = attention.in_proj_weight.chunk(3)[i]
            bias = attention.in_proj_bias.chunk(3)[i]
            if leaves:
                weight, bias = leaves[f"{names[layer]}.{name}"], None
            by_head = F.linear(x, weight, bias).unflatten(-1, (HEADS, -1))
            by_head = by_head if batch_first else by_head.transpose(0, 1)
            made.append(by_head.transpose(1, 2))
        return made[0], made[1]

    return FFNSlots(modules=[f"{name}.linear1" for name in names], key_value=key_value)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("ffn_kv", ["shared", "projected"])
def test_ffn_slots(batch_first: bool, ffn_kv: Any) -> None:
    model = Encoder(batch_first=batch_first)
    config = MoDAConfig(ffn_kv=ffn_kv)
    check_conversion(model, (batch(batch_first),), config, backend="eager", ffn_slots=ffn_slots)


def test_ffn_slots_where_batch_and_length_agree() -> None:
    """Then no shape tells a time-major layer's dimensions apart."""
    model = Encoder(batch_first=False)
    square = torch.randn(T, T, WIDTH, dtype=torch.float64)
    config = MoDAConfig(ffn_kv="shared")
    check_conversion(model, (square,), config, backend="eager", ffn_slots=ffn_slots)


def test_dynamic_lengths_compile_twice() -> None:
    model = Encoder()
    converted = moda_compile.convert(
        copy.deepcopy(model), example_inputs=(batch(),), backend="eager"
    )
    counter = torch._dynamo.utils.counters
    counter.clear()
    for length in (5, 7, 9, 12):
        x = torch.randn(B, length, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(converted(x), reference(model, x), **TIGHT)
    assert counter["stats"]["unique_graphs"] == 2


def test_autocast() -> None:
    check_conversion(
        Encoder(dtype=torch.float32), (batch(dtype=torch.float32),), backend="aot_eager",
        autocast=torch.bfloat16,
    )  # fmt: skip


# --- the fast path ------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["-", "padding"])
@pytest.mark.parametrize("mask_check", [True, False])
def test_evaluation_takes_no_shortcut(grad: Any, padding: Tensor | None, mask_check: bool) -> None:
    """There each layer is one call, and with padding all of them work on nested tensors."""
    model = Encoder().eval()
    model.inner.mask_check = mask_check
    masks = {} if padding is None else {"src_key_padding_mask": padding}
    expected = reference(model, batch(), **masks)  # with gradients: no shortcut
    with grad():
        plain = model(batch(), **masks)
        converted = moda_compile.convert(
            copy.deepcopy(model), example_inputs={"x": batch(), **masks}, backend="eager"
        )
        got = converted(batch(), **masks)
        again = model(batch(), **masks)
    read = torch.ones(B, T, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(got[read], expected[read], **TIGHT)
    assert (got - plain)[read].abs().max() > NEVER_PLAIN
    assert torch.equal(plain, again)


def test_the_shortcut_is_on_again_afterwards() -> None:
    enabled, module = torch.backends.mha.get_fastpath_enabled, torch.nn.modules.transformer
    detect = module._detect_is_causal_mask
    model = Encoder(call={"mask": torch.zeros(3, 3)}).eval()
    converted = moda_compile.convert(model, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="3"):  # the mask does not fit
        converted(batch())
    assert enabled() and module._detect_is_causal_mask is detect
    converted.call = {}
    with torch.no_grad():
        converted(batch())
    assert enabled() and module._detect_is_causal_mask is detect
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        converted(batch())
        assert not enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_graph_with_the_shortcut_is_refused() -> None:
    """As torch.compile with our backend alone gets it."""
    model = Encoder().eval()
    backend = moda_compile.Backend(compiler="eager", attentions=LAYERS)
    with torch.no_grad(), pytest.raises(Exception, match="set_fastpath_enabled") as caught:
        torch.compile(model, backend=backend)(batch())
    assert isinstance(caught.value.inner_exception, RewriteError)  # type: ignore[attr-defined]


# --- the decoder, the whole, and blocks of one's own ---------------------------------------------


class Decoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, dtype=torch.float64, **options
        )
        self.inner = nn.TransformerDecoder(layer, LAYERS)
        wide(self)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.inner(x, memory, tgt_mask=mask, tgt_is_causal=True)


def own_stacks(*places: int | None) -> Any:
    return list(places)


@pytest.mark.parametrize("length", [T + 2, T])
def test_decoder(length: int) -> None:
    """Its self-attentions are a stack, its cross-attentions are none: whatever their length."""
    memory = torch.randn(B, length, WIDTH, dtype=torch.float64)
    stacks = own_stacks(*(0, None) * LAYERS)
    check_conversion(Decoder(), (batch(), memory), backend="eager", stacks=stacks)


def test_encoder_and_decoder() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Transformer(
                WIDTH, HEADS, 2, 2, HIDDEN, dropout=0.0, batch_first=True, dtype=torch.float64
            )
            wide(self)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.inner(source, target)

    stacks = own_stacks(0, 0, 1, None, 1, None)
    target = torch.randn(B, T, WIDTH, dtype=torch.float64)
    check_conversion(Whole(), (batch(), target), backend="eager", stacks=stacks)


class Blocks(nn.Module):
    """Pre-norm blocks around nn.MultiheadAttention, its weights thrown away."""

    def __init__(self, layers: int = LAYERS, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, "dtype": torch.float64} | options
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, **options) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
        wide(self)

    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            y = self.norm(x)
            x = x + attention(y, y[..., : attention.kdim], y[..., : attention.vdim])[0]
        return x


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}], ids=str)
def test_blocks(batch_first: bool, options: dict[str, Any]) -> None:
    model = Blocks(batch_first=batch_first, **options)
    check_conversion(model, (batch(batch_first),), backend="eager")


def test_positions_on_queries_and_keys() -> None:
    """Of one token each, though projected from two hidden states."""

    class Positions(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            here = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
            for attention in self.attentions:
                x = x + attention(self.norm(x) + here, self.norm(x) + here, self.norm(x))[0]
            return x

    check_conversion(Positions(), (batch(),), backend="eager")


def test_a_tensor_that_is_neither_parameter_nor_buffer() -> None:
    class Positions(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.positions)

    model = Positions()
    model.positions = batch()[0]
    check_conversion(model, (batch(),), backend="eager")


@pytest.mark.parametrize(
    ("model", "reason", "fix"),
    [
        (Blocks(dropout=0.1), "attention dropout", "dropout"),
        (Blocks(add_bias_kv=True), "add_bias_kv", "strict=False"),
        (Blocks(add_zero_attn=True), "add_zero_attn", "add_zero_attn=False"),
    ],
    ids=["dropout", "add_bias_kv", "add_zero_attn"],
)
def test_refused(model: nn.Module, reason: str, fix: str) -> None:
    with pytest.raises(RewriteError, match=reason) as caught:
        moda_compile.convert(model, example_inputs=(batch(),), backend="eager")
    assert fix in caught.value.fix and caught.value.block == "attentions.0"
    assert caught.value.source is not None and caught.value.source.startswith(__file__)


def test_weights_that_are_returned_are_refused_and_left_if_not_strict() -> None:
    class Watched(Blocks):
        watched = True

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            total = x.new_zeros(())
            for i, attention in enumerate(self.attentions):
                y, weights = attention(x, x, x)
                x = x + y
                if i == 1 and self.watched:
                    total = total + weights.square().sum()
            return x, total

    model = Watched()
    with pytest.raises(RewriteError, match="weights are used") as caught:
        moda_compile.convert(model, example_inputs=(batch(),), backend="eager")
    assert caught.value.block == "attentions.1"
    report = moda_compile.explain(model, batch())
    assert [a.reads for a in report.attentions] == [(), (0,)]
    blind = copy.deepcopy(model)
    blind.watched = False  # the oracle's attention gives no weights
    expected, _ = reference(blind, batch(), stacks=[0, None, 0])
    moda_compile.convert(model, example_inputs=(batch(),), backend="eager", strict=False)
    got, total = model(batch())
    torch.testing.assert_close(got, expected, **TIGHT)
    assert total > 0
