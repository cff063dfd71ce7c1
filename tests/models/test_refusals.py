"""What can't be rewritten is refused: block, line, reason and way out, and the model as it was.

Every model here is plain PyTorch with one thing in it that MoDA can't take yet.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moda_compile
from moda_compile import RewriteError
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
    refusal,
    sdpa,
    traces,
)

# --- attentions that are not SDPA ---------------------------------------------------------------


def triangle(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.3
    return scores.masked_fill(~triangle(scores), -1e9).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.3
    scores[..., ~triangle(scores)] = -1e9
    return torch.softmax(scores, -1, dtype=torch.float32).type_as(q) @ v


def masked_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.mT, dim=-1)
    return torch.nan_to_num(weights.masked_fill(~triangle(weights), 0.0)) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).clamp(-5, 5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights * torch.ones(HEADS, 1, 1), v)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 10) * 10
    return torch.log_softmax(scores, -1).exp() @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(b * h, t, t), q, k.mT, beta=0.0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


@pytest.mark.parametrize("core", [by_hand, in_place, masked_after, gated, softcapped, baddbmm])
def test_attention_by_hand(core: Core) -> None:
    error = refusal(
        Stack(Attention(core)), block="layers.1.attention", reason="written by hand", file=__file__
    )
    assert "scaled_dot_product_attention" in error.fix


def aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True)


def aten_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


@pytest.mark.parametrize("core", [aten, aten_flash])
def test_attention_in_one_call(core: Core) -> None:
    refusal(
        Stack(Attention(core)),
        block="layers.1.attention",
        reason="its parts are not in the",
        file=__file__,
    )


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training: bool) -> None:
    model = Stack(MultiHead()).train(training)
    refusal(
        model,
        block="layers.1.attention.inner",
        reason="multi_head_attention_forward is not rew",
        file=__file__,
    )


def test_nothing_to_convert() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    before = traces(model)
    with pytest.raises(RewriteError, match="no attention was found.*explain"):
        moda_compile.convert(model, example_inputs=(X,), backend="eager")
    assert traces(model) == before


# --- dropout and masks --------------------------------------------------------------------------


class Dropout(Attention):
    def __init__(self) -> None:
        super().__init__(causal)
        self.core = self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)


def test_dropout_in_training() -> None:
    model = Stack(Dropout())
    error = refusal(model, block="layers.1.attention", reason=r"dropout_p=0\.1")
    assert ".eval()" in error.fix


def test_dropout_in_eval_and_then_in_training() -> None:
    model = Stack(Dropout()).eval()
    expected = reference(copy.deepcopy(model), X)
    moda_compile.convert(model, example_inputs=(X,), backend="eager")
    # a few roundings in float32 of outputs of order 1; the plain model is 0.01 away
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
    model.train()
    with pytest.raises(RewriteError, match="dropout"):
        model(X)
    torch.testing.assert_close(model.eval()(X), expected, rtol=0, atol=1e-5)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, attn_mask=(i[:, None] >= i) & (i[:, None] - i < 4))


def anticausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2]).triu().bool())


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    bias = torch.zeros(len(i), len(i)).masked_fill(i[:, None] < i, -torch.inf)
    return sdpa(q, k, v, attn_mask=bias - 0.1 * (i[:, None] - i).abs())


def soft_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2]).triu(1)
    return sdpa(q, k, v, attn_mask=-10.0 * future)


def one_head_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(HEADS, q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask[0] = True
    return sdpa(q, k, v, attn_mask=mask)


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask[:, :3].fill_(True)  # nothing uses the result of what changes the mask
    return sdpa(q, k, v, attn_mask=mask)


MASKS = [window, anticausal, alibi, soft_causal, one_head_full, prefix]


@pytest.mark.parametrize("core", MASKS)
def test_mask_that_is_not_causal(core: Core) -> None:
    refusal(Stack(Attention(core)), block="layers.1.attention", reason="mask is not causal")


def set_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2])
    mask[torch.ones_like(mask).triu(1).bool()] = -torch.inf
    return sdpa(q, k, v, attn_mask=mask)


def test_causal_mask_written_in_place() -> None:
    model = Stack(Attention(set_causal))
    expected = reference(copy.deepcopy(model), X)
    moda_compile.convert(model, example_inputs=(X,), backend="eager")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)  # float32, of order 1


class LearnedBias(Attention):
    def __init__(self) -> None:
        super().__init__(self.attend)
        self.bias = nn.Parameter(torch.zeros(LENGTH, LENGTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=self.bias)


def test_learned_bias() -> None:
    refusal(Stack(LearnedBias()), block="layers.1.attention", reason="depends on the values")


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(Attention(self.attend)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal_mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return sdpa(q, k, v, attn_mask=causal_mask & self.keep[:, None, None, :])

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.keep = keep
        for layer in self.layers:
            x = layer(x)
        del self.keep
        return x


def test_padding_mask() -> None:
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    refusal(
        Padded(), (X, keep), block="layers.0.attention", reason="depends on the values of an input"
    )


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
    for length in (9, 12, 13, size - 1, size):
        expected = reference(plain, x[:, :length])
        # float64, outputs of order 1
        torch.testing.assert_close(model(x[:, :length]), expected, rtol=0, atol=1e-10)
    for length in (size + 1, 2 * size):
        with pytest.raises(RewriteError, match="mask is not causal"):
            model(x[:, :length])
    torch.testing.assert_close(model(x[:, :size]), reference(plain, x[:, :size]))


# --- not one stack of self-attentions -----------------------------------------------------------


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(causal if i % 2 == 0 else sdpa) for i in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + (layer(x) if i % 2 == 0 else layer(x, memory))
        return x


@pytest.mark.parametrize("length", [LENGTH, 5])
def test_cross_attention(length: int) -> None:
    refusal(Cross(), (X, X[:, :length]), block="layers.1", reason="cross-attention")


def test_other_number_of_keys() -> None:
    def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k[:, :, :5], v[:, :, :5])

    refusal(Stack(Attention(half)), block="layers.1.attention", reason="9 queries over 5 keys")


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def test_mixed_kv_heads() -> None:
    odd = Attention(grouped, kv_heads=2)
    refusal(Stack(odd), block="layers.1.attention", reason="only if their KV agree")


def test_mixed_head_dim() -> None:
    refusal(Stack(Attention(causal, d=16)), block="layers.1.attention", reason="if their KV agree")


def test_other_head_dim_of_values() -> None:
    def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, torch.cat([v, v], -1))[..., :8]

    refusal(Stack(Attention(wide)), block="layers.1.attention", reason="keys have head_dim 8")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(Attention(causal)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_activation_checkpointing() -> None:
    model = Checkpointed()
    error = refusal(model, block="layers.0.attention", reason="activation checkpoint")
    assert "activation checkpointing off" in error.fix


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_two_towers() -> None:
    block = "right.layers.0.attention"
    error = refusal(Towers(), block=block, reason="do not form one stack")
    assert "each stack" in error.fix
    model = Towers()  # and the way out is one
    expected = reference(copy.deepcopy(model.left), X) + reference(copy.deepcopy(model.right), X)
    for tower in (model.left, model.right):
        moda_compile.convert(tower, example_inputs=(X,), backend="eager")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)  # float32 of order 1


# --- strict=False -------------------------------------------------------------------------------


def test_not_strict_converts_the_rest() -> None:
    """A cross-attention after each self-attention stays as it is; the others are MoDA."""
    model = Cross()
    report = moda_compile.explain(model, X, X[:, :5])
    assert [a.block for a in report.attentions] == ["layers.0", "layers.2"]
    assert [a.block for a in report.refusals] == ["layers.1", "layers.3"]
    assert all("cross-attention" in str(a.refusal) for a in report.refusals)
    assert str(report).count("refused: layers.") == 2 and "2 of 4 attentions" in str(report)
    plain = copy.deepcopy(model)
    moda_compile.convert(model, None, (X, X[:, :5]), backend="eager", strict=False)
    got = model(X, X[:, :5])

    slots: list[tuple[Tensor, Tensor]] = []  # by hand: only the self-attentions leave slots

    def joint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ones = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        scores = [(q @ k.mT * 8**-0.5).masked_fill(~ones.tril(), -torch.inf)]
        scores += [(q * key).sum(-1, keepdim=True) * 8**-0.5 for key, _ in slots]
        on_sequence, *on_depth = (
            torch.cat(scores, -1).softmax(-1).split([LENGTH] + [1] * len(slots), -1)
        )
        out = on_sequence @ v + sum(
            p * value for p, (_, value) in zip(on_depth, slots, strict=True)
        )
        slots.append((k, v))
        return out

    expected = copy.deepcopy(plain)
    expected.layers[0].core = expected.layers[2].core = joint
    want = expected(X, X[:, :5])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # float32, outputs of order 1
    assert (want - plain(X, X[:, :5])).abs().max() > 1e-3  # and it is not the plain model


def test_not_strict_with_nothing_left() -> None:
    """Not even one: that is no conversion."""
    model = nn.Sequential(Layer(Attention(by_hand)), Layer(Attention(by_hand)))
    before = traces(model)
    with pytest.raises(RewriteError, match="written by hand"):
        moda_compile.convert(model, example_inputs=(X,), backend="eager", strict=False)
    assert traces(model) == before
