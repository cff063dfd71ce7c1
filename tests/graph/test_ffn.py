"""Feed-forward networks: found by dataflow, and nothing else taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile import fx
from moda_compile.patterns import ffn as ffn_pattern
from tests.graph.graphs import WIDTH, Attend, B, T, trace

# --- feed-forward networks ----------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(8, 12), nn.Linear(12, 8), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Gated(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(8, 24 if fused else 12)
        self.gate, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.797 * (x + 0.044 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(
    "module",
    [
        TwoLayers(F.gelu),
        TwoLayers(gelu_by_hand),
        TwoLayers(lambda x: F.relu(x).square()),
        TwoLayers(lambda x: x * torch.sigmoid(1.702 * x)),
        TwoLayers(lambda x: F.dropout(F.gelu(x), 0.1)),
        Gated(fused=False),
        Gated(fused=True),
    ],
    ids=["gelu", "by hand", "relu squared", "quick", "dropout", "gated", "fused gate"],
)
def test_ffn(module: nn.Module) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), module

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    gm = trace(Inside(), torch.randn(2, 3, 8))
    (found,) = ffn_pattern.find(gm.graph)
    assert found.path == "mlp"
    assert fx.calls(found.input, "layer_norm")
    assert fx.calls(found.node, "linear")
    assert {fx.calls(user, "add") for user in found.node.users} == {True}


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


class Residual(nn.Module):
    """The second layer reads a sum that holds the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x + F.gelu(self.one(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.down = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.one(x)) * self.two(x.cumsum(1)))


class Normed(nn.Module):
    """A norm between two layers makes no FFN of them: it is no pointwise operation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.norm(self.one(x))))


@pytest.mark.parametrize("module", [LoRA(), Residual(), TwoInputs(), Normed()], ids=type)
def test_no_ffn(module: nn.Module) -> None:
    assert ffn_pattern.find(trace(module, torch.randn(2, 3, 8)).graph) == []


def test_attention_projections_are_no_ffn() -> None:
    class Layer(Attend):
        def __init__(self) -> None:
            super().__init__(by_sdpa)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            attended = super().forward(x).transpose(1, 2).flatten(2)
            return x + self.out(attended)

    def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    assert ffn_pattern.find(trace(Layer(), torch.randn(B, T, WIDTH)).graph) == []


def test_lora_on_an_ffn_is_still_seen_or_left_alone() -> None:
    """Adapters around up and down: never an FFN whose input is the adapter's inner rank."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = LoRA(), LoRA()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    gm = trace(Adapted(), torch.randn(2, 3, 8))
    for found in ffn_pattern.find(gm.graph):
        assert found.input.op == "placeholder"


def test_parallel_blocks() -> None:
    """Attention and FFN read one normed tensor, and their sum joins the residual."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(WIDTH), Attend(F.scaled_dot_product_attention)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return x + self.attention(normed).transpose(1, 2).flatten(2) + self.mlp(normed)

    gm = trace(Block(), torch.randn(B, T, WIDTH))
    (found,) = ffn_pattern.find(gm.graph)
    assert found.path == "mlp"
    assert fx.calls(found.input, "layer_norm")
