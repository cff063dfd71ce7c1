"""What plain models have in their stacks, one thing each, against an oracle without the pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile.testing import reference
from tests.models.cases import (
    HEADS,
    LENGTH,
    WIDTH,
    Attention,
    Core,
    Layer,
    Stack,
    X,
    causal,
    sdpa,
)

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-11}  # float64, results of order 1, three layers


def check(model: nn.Module, *inputs: Tensor, oracle: nn.Module | None = None, **how: Any) -> None:
    """Output and every gradient in float64; ``oracle`` has the same parameters."""
    model = model.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    oracle = (copy.deepcopy(model) if oracle is None else oracle).double()
    oracle.load_state_dict(model.state_dict())
    expected = reference(oracle, *inputs, **how)
    plain = model(*inputs)
    moda_compile.convert(model, example_inputs=inputs, backend="aot_eager")
    got = model(*inputs)
    torch.testing.assert_close(got, expected, **EXACT)
    assert (plain - expected).abs().max() > 1e-4  # it is another function than the plain model's
    weights = torch.randn_like(expected)
    got.backward(weights)
    expected.backward(weights)
    for (name, mine), other in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}", **EXACT
        )


# --- masks --------------------------------------------------------------------------------------


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, attn_mask=(i[:, None] >= i) & (i[:, None] - i < 4))


def anticausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2]).triu().bool())


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    bias = torch.zeros(len(i), len(i)).masked_fill(i[:, None] < i, -torch.inf)
    return sdpa(q, k, v, attn_mask=(bias - 0.1 * (i[:, None] - i).abs()).to(q.dtype))


def soft_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).triu(1)
    return sdpa(q, k, v, attn_mask=-10.0 * future)


def one_head_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(HEADS, q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask[0] = True
    return sdpa(q, k, v, attn_mask=mask)


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask[:, :3].fill_(True)  # nothing uses the result of what changes the mask
    return sdpa(q, k, v, attn_mask=mask)


def blind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second token sees nothing: with slots, it attends to these alone."""
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask[1] = False
    return sdpa(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    "core", [window, anticausal, alibi, soft_causal, one_head_full, prefix, blind]
)
def test_mask(core: Core) -> None:
    check(Stack(Attention(core)), X)


def test_a_window_in_the_first_layer() -> None:
    """Which reads no slot, so it is left as it is, but its slot is written."""
    model = nn.Sequential(Layer(Attention(window)), Layer(Attention(causal)))
    report = moda_compile.explain(model, X)
    assert [(a.lowering, a.masked, a.writes) for a in report.attentions] == [
        ("unchanged", True, (0,)), ("cpu", False, ()),
    ]  # fmt: skip
    check(model, X)


class LearnedBias(Attention):
    def __init__(self) -> None:
        super().__init__(self.attend)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=self.bias)


def test_learned_bias() -> None:
    """Its gradient too: ``check`` compares every parameter's."""
    check(Stack(LearnedBias()), X)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(Attention(self.attend)) for _ in range(3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal_mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return sdpa(q, k, v, attn_mask=causal_mask & self.keep[:, None, None, :])

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.keep = keep
        for layer in self.layers:
            x = layer(x)
        del self.keep
        return x


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    """One compiled graph, whatever is padded."""
    keep = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])
    check(Padded(), X, keep.flip(1) if side == "left" else keep)


class Sliding(nn.Module):
    """Causal with a window, as Mistral has it: causal while T fits."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(Layer(Attention(self.attend)) for _ in range(2))
        self.double()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return sdpa(q, k, v, attn_mask=(i[:, None] >= i) & (i[:, None] - i < self.size))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("size", [20, 100])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_window_with_dynamic_length(size: int, backend: Any) -> None:
    """Fits, fits, fits with T symbolic, fits exactly; one more, and it must not pass for causal."""
    model = Sliding(size)
    plain = copy.deepcopy(model)
    x = torch.randn(1, 2 * size, WIDTH, dtype=torch.float64)
    moda_compile.convert(model, example_inputs=(x[:, :9],), backend=backend)
    for length in (9, 12, 13, size - 1, size, size + 1, 2 * size, size):
        expected = reference(plain, x[:, :length])
        torch.testing.assert_close(model(x[:, :length]), expected, **EXACT)


def set_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype)
    mask[torch.ones_like(mask).triu(1).bool()] = -torch.inf
    return sdpa(q, k, v, attn_mask=mask)


def test_a_causal_mask_written_in_place_is_causal() -> None:
    model = Stack(Attention(set_causal))
    assert [a.causal for a in moda_compile.explain(model, X).attentions] == [True] * 3
    check(model, X)


# --- attention by hand --------------------------------------------------------------------------


def triangle(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.3
    return scores.masked_fill(~triangle(scores), -1e9).softmax(-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    mask = torch.full((t, t), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(mask.expand(b * h, t, t), q, k.mT, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


def equivalent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, scale=0.3)


@pytest.mark.parametrize("core", [by_hand, baddbmm])
def test_attention_by_hand(core: Core) -> None:
    """The oracle is the same model with the same attention as one call."""
    check(Stack(Attention(core)), X, oracle=Stack(Attention(equivalent)))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training: bool) -> None:
    check(Stack(MultiHead()).train(training), X)


# --- stacks that are not uniform ----------------------------------------------------------------


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, torch.cat([v, v.flip(-1)], -1), is_causal=True)[..., 4:12]


@pytest.mark.parametrize(
    ("core", "options"), [(grouped, {"kv_heads": 2}), (grouped, {"d": 16}), (wide, {})]
)
def test_a_layer_with_other_keys_or_values(core: Core, options: dict[str, int]) -> None:
    """It shares slots with its like only."""
    model = Stack(Attention(core, **options), Attention(causal), Attention(core, **options))
    report = moda_compile.explain(model, X)
    assert [a.stack for a in report.attentions] == [0, 1, 0, 1, 0]
    assert [a.reads for a in report.attentions] == [(), (), (0,), (0,), (0, 1)]
    check(model, X, stacks=[0, 1, 0, 1, 0])


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(causal if i % 2 == 0 else sdpa) for i in range(6))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + (layer(x) if i % 2 == 0 else layer(x, memory))
        return x


@pytest.mark.parametrize("length", [LENGTH, 5])
def test_cross_attention_is_left_alone(length: int) -> None:
    """Of equal length or not; nothing is refused, and the report names it."""
    inputs = X, X.flip(0)[:, :length]
    report = moda_compile.explain(Cross(), *inputs)
    assert [a.block for a in report.attentions] == ["layers.0", "layers.2", "layers.4"]
    assert [a.block for a in report.bystanders] == ["layers.1", "layers.3", "layers.5"]
    assert not report.refusals
    assert str(report).count("left alone: layers.") == 3
    check(Cross(), *inputs, stacks=[0, None, 0, None, 0, None])


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_two_towers() -> None:
    check(Towers(), X, stacks=[0, 0, 1, 1])


class Gathered(nn.Module):
    """A decoder over an encoder, with the encoder's states added to the input where they fit."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(Attention(causal) for _ in range(2))
        self.cross = nn.ModuleList(Attention(F.scaled_dot_product_attention) for _ in range(2))
        self.encoder = Stack()

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(x.flip(1))
        for own, cross in zip(self.own, self.cross, strict=True):
            x = x + own(x)
            x = x + cross(x, memory)
        return x


def test_encoder_and_decoder_from_one_input() -> None:
    """Both begin with the same x, but token t of one is not token t of the other."""
    check(Gathered(), X, stacks=[0, 0, 1, None, 1, None])
