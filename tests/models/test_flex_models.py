"""Models on FlexAttention: their own calls stay, depth is merged in by the lse.

On a CPU PyTorch refuses FlexAttention with gradients in front of the call, though the call's own
plain implementation has them; without that check, gradients are tested here too. Inductor has no
lse on a CPU: for the real kernels there is benchmarks/check_flex.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import moda_compile
from moda_compile import MoDAConfig, RewriteError
from moda_compile.testing import check_conversion, reference

B, T, HQ, HK, D = 2, 5, 4, 2, 8
WIDTH, LAYERS = HQ * D, 3

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    # The plain call outside of torch.compile, for comparisons with the reverted model.
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield


class Layer(nn.Module):
    def __init__(self, core: Core, kv_heads: int) -> None:
        super().__init__()
        self.core, self.norm = core, nn.LayerNorm(WIDTH)
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, kv_heads * D) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, D)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(self.core(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm(x))


class Stack(nn.Module):
    def __init__(self, *cores: Core, kv_heads: int = HK) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(core, kv_heads) for core in cores)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def twin(self, *cores: Core) -> Stack:
        """The same weights with other attentions."""
        twin = copy.deepcopy(self)
        for layer, core in zip(twin.layers, cores, strict=True):
            layer.core = core
        return twin


def batch(length: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, length, WIDTH, generator=generator, dtype=torch.float64)


# --- one attention in two spellings ---------------------------------------------------------------

SLOPES = torch.linspace(-1, 1, HQ, dtype=torch.float64)
DOCUMENT = torch.tensor([0, 0, 1, 1, 1])


def slope(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + SLOPES[h] * (j - i)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 2)


def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (DOCUMENT[i] == DOCUMENT[j])


def flexible(mask: Any = None, mod: Any = None, scale: float | None = None) -> Core:
    blocks = None if mask is None else create_block_mask(mask, None, None, T, T, device="cpu")

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(
            q, k, v, score_mod=mod, block_mask=blocks, scale=scale, enable_gqa=True
        )

    return core


def dense(mask: Any = None, mod: Any = None, scale: float | None = None) -> Core:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        i, j = torch.arange(length)[:, None], torch.arange(length)
        h = torch.arange(HQ)[:, None, None]
        bias = torch.zeros(HQ, length, length, dtype=q.dtype)
        if mod is not None:
            bias = mod(bias, None, h, i, j).to(q.dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask(None, h, i, j), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True)

    return core


CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "all": ({},) * LAYERS,
    "causal": ({"mask": causal},) * LAYERS,
    "window": ({"mask": window},) * LAYERS,
    "document": ({"mask": document},) * LAYERS,
    "mixed": ({"mask": causal, "mod": slope, "scale": 0.3}, {"mask": window}, {"mod": slope}),
}


@pytest.mark.parametrize(
    ("case", "kv_heads"),
    [("all", HQ), ("causal", HK), ("window", 1), ("document", HQ), ("mixed", HK)],
)
def test_forward_and_gradients(case: str, kv_heads: int) -> None:
    options = CASES[case]
    model = Stack(*(flexible(**o) for o in options), kv_heads=kv_heads)
    oracle = model.twin(*(dense(**o) for o in options))
    checked = check_conversion(model, (batch(),), backend="aot_eager", oracle=oracle)
    assert len(checked) > 1


@pytest.mark.parametrize("width", [5, 2 * D])
def test_values_of_another_head_dim(width: int) -> None:
    def narrowed(core: Core) -> Core:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = core(q, k, torch.cat([v, v.flip(-1)], -1)[..., :width])
            return F.pad(out, (0, 2 * D - width)).unflatten(-1, (2, D)).sum(-2)

        return call

    options = CASES["mixed"]
    model = Stack(*(narrowed(flexible(**o)) for o in options))
    oracle = model.twin(*(narrowed(dense(**o)) for o in options))
    check_conversion(model, (batch(),), backend="aot_eager", oracle=oracle)


def test_report() -> None:
    report = moda_compile.explain(Stack(*(flexible(causal),) * LAYERS), batch())
    assert [(a.pattern, a.causal, a.kv_heads) for a in report.attentions] == [
        ("flex", False, HK)
    ] * LAYERS


def test_beside_other_attentions() -> None:
    """One stack may hold both: slots are keys and values, whoever attends."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    model = Stack(flexible(causal), sdpa, flexible(window))
    oracle = model.twin(dense(causal), sdpa, dense(window))
    check_conversion(model, (batch(),), backend="aot_eager", oracle=oracle)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_without_gradients(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch allows it on a CPU, with its own check."""
    monkeypatch.undo()
    model = Stack(*(flexible(window, slope),) * LAYERS)
    expected = reference(model.twin(*(dense(window, slope),) * LAYERS), batch())
    with torch.no_grad():
        moda_compile.convert(model, example_inputs=(batch(),), backend=compiler)
        # float64, three layers of 32 channels: a few hundred roundings of numbers of order 1.
        torch.testing.assert_close(model(batch()), expected.detach(), rtol=0, atol=1e-11)


def test_a_block_mask_made_in_the_model() -> None:
    """For each length anew, as transformers does."""

    class Masking(Stack):
        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            blocks = create_block_mask(window, None, None, length, length, device="cpu")
            for layer in self.layers:
                layer.core = lambda q, k, v: flex_attention(
                    q, k, v, block_mask=blocks, enable_gqa=True
                )
                x = layer(x)
            return x

    model = Masking(*(dense(window),) * LAYERS)
    oracle = Stack(*(dense(window),) * LAYERS)
    with torch.no_grad():
        converted = moda_compile.convert(model, example_inputs=(batch(),), backend="aot_eager")
        for length in (T, T + 2):
            expected = reference(oracle, batch(length))
            torch.testing.assert_close(converted(batch(length)), expected, rtol=0, atol=1e-11)


def test_ffn_slots() -> None:
    """Through the layer's own projections, which the call leaves in the graph."""
    model = Stack(*(flexible(causal),) * LAYERS)
    report = moda_compile.explain(model, batch(), config=MoDAConfig(ffn_kv="shared"))
    assert [a.reads for a in report.attentions] == [(), (0, 1), (0, 1, 2, 3)]


def test_an_lse_of_the_models_own_is_refused() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
        return out * lse.sigmoid()[..., None]

    with pytest.raises(RewriteError, match="lse or max_scores is used") as caught:
        moda_compile.convert(Stack(both, both), example_inputs=(batch(),), backend="eager")
    assert caught.value.block == "layers.0"
    assert caught.value.source is not None and caught.value.source.startswith(__file__)


def test_transformers() -> None:
    """attn_implementation="flex_attention", whose block mask is made in the model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HQ, num_key_value_heads=HK, max_position_embeddings=32,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).double().eval()
    ids = torch.arange(B * T).view(B, T) % 32
    with torch.no_grad():
        expected = reference(model, ids).last_hidden_state
        model.set_attn_implementation("flex_attention")
        converted = moda_compile.convert(model, example_inputs=(ids,), backend="aot_eager")
        got = converted(ids).last_hidden_state
    # The model rounds its rotations to float32, alike in both.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
