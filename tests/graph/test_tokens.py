"""Depth slots pass only between layers that agree on which row is which token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile.patterns.tokens import BATCH, TOKEN, Factor, merge, reshape
from moda_compile.testing import reference

HEIGHT = WIDTH = 4
CHANNELS = 8


def test_reshape_splits_and_merges() -> None:
    layout = ((Factor(BATCH, 6),), (Factor(TOKEN, 4),))
    windows = reshape(layout, [3, 2, 2, 2])
    assert windows == (
        (Factor(BATCH, 3, 2),), (Factor(BATCH, 2),), (Factor(TOKEN, 2, 2),), (Factor(TOKEN, 2),),
    )  # fmt: skip
    assert windows is not None and reshape(windows, [6, 4]) == layout
    assert reshape(layout, [24]) == ((Factor(BATCH, 6), Factor(TOKEN, 4)),)
    assert reshape(layout, [5, 5]) is None
    assert merge((Factor(TOKEN, 2), Factor(TOKEN, 2, 2))) == (
        Factor(TOKEN, 2), Factor(TOKEN, 2, 2),
    )  # fmt: skip  # swapped: not the old dimension


class Layer(nn.Module):
    """Attention over the second dimension of [N, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Image(nn.Module):
    """Three layers over images [B, H, W, C]; ``arrange`` says how a layer sees them."""

    def __init__(self, arrange: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.arrange = arrange

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.arrange(layer, x, i)
        return x


def whole(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    return layer(x.flatten(1, 2)).view(x.shape)


def rows(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    return layer(x.reshape(-1, WIDTH, CHANNELS)).view(x.shape)


def rows_and_columns(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    if i % 2 == 0:
        return rows(layer, x, i)
    return rows(layer, x.transpose(1, 2), i).transpose(1, 2)


def windows(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    b = x.shape[0]
    parts = x.view(b, 2, 2, 2, 2, CHANNELS).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, CHANNELS)
    out = layer(parts).view(b, 2, 2, 2, 2, CHANNELS)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def shifted_windows(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    if i % 2 == 0:
        return windows(layer, x, i)
    return windows(layer, x.roll((1, 1), (1, 2)), i).roll((-1, -1), (1, 2))


def time_first(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    """Layers that agree, on a stream kept as [T, B, C]."""
    stream = x.flatten(1, 2).transpose(0, 1).contiguous()
    return layer(stream.transpose(0, 1)).transpose(0, 1).transpose(0, 1).reshape(x.shape)


def picked(layer: nn.Module, x: Tensor, i: int) -> Tensor:
    order = torch.arange(HEIGHT * WIDTH - 1, -1, -1)
    flat = x.flatten(1, 2)
    return layer(flat[:, order] if i == 1 else flat).view(x.shape)


@pytest.mark.parametrize("arrange", [rows_and_columns, shifted_windows, picked])
def test_rearranged_tokens_are_refused(arrange: Callable[..., Tensor]) -> None:
    model, x = Image(arrange), torch.randn(2, HEIGHT, WIDTH, CHANNELS)
    with pytest.raises(moda_compile.RewriteError, match="tokens are rearranged") as error:
        moda_compile.convert(model, example_inputs=(x,), backend="eager")
    assert error.value.block == "layers.1"  # the first that reads another order


@pytest.mark.parametrize("arrange", [whole, rows, windows, time_first])
def test_layers_that_agree_are_converted(arrange: Callable[..., Tensor]) -> None:
    model, x = Image(arrange).double(), torch.randn(2, HEIGHT, WIDTH, CHANNELS).double()
    expected = reference(model, x)
    moda_compile.convert(model, example_inputs=(x,), backend="eager")
    # float64, another order of the same sums
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
