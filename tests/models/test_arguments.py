"""What is asked of `convert` and can't be had is refused: FFN slots, and arguments as such."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile import Backend, InputError, MoDAConfig
from moda_compile.testing import RandomStack, StackConfig, reference
from tests.models.cases import (
    LENGTH,
    WIDTH,
    Attention,
    Layer,
    Stack,
    X,
    causal,
    refusal,
    traces,
)

# --- FFN slots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["projected", "shared"])
@pytest.mark.parametrize("ffns", [0, 2])
def test_ffn_count(ffns: int, mode: Any) -> None:
    refusal(
        Stack(ffns=ffns),
        block="layers.0.attention",
        reason=f"layer 0 has {ffns} feed-forward networks",
        config=MoDAConfig(ffn_kv=mode),
    )


class RotatedInPlace(Attention):
    """The key that an FFN's slot would have to follow is written into."""

    def __init__(self) -> None:
        super().__init__(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.clone(), k.clone()
        for x in (q, k):
            x[..., :4] = -x[..., 4:]
        return causal(q, k, v)


@pytest.mark.parametrize("mode", ["projected", "shared"])
def test_key_changed_in_place(mode: Any) -> None:
    model = nn.Sequential(*(Layer(RotatedInPlace()) for _ in range(2)))
    config = MoDAConfig(ffn_kv=mode)
    refusal(model, block="0.attention", reason="changed in place", config=config)
    expected = reference(copy.deepcopy(model), X)  # the attention's own slots are what it used
    moda_compile.convert(model, example_inputs=(X,), backend="eager")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)  # float32, of order 1


class FlatFFN(nn.Module):
    """All layers' weights live in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(causal) for _ in range(2))
        self.up = nn.ParameterList(torch.randn(64, WIDTH) / 6 for _ in range(2))
        self.down = nn.ParameterList(torch.randn(WIDTH, 64) / 8 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for attention, up, down in zip(self.attentions, self.up, self.down, strict=True):
            x = x + attention(x)
            x = x + F.linear(F.gelu(F.linear(x, up)), down)
        return x


def test_ffn_without_a_module_of_its_own() -> None:
    config = MoDAConfig(ffn_kv="projected")
    refusal(FlatFFN(), block="", reason="no module of its own", config=config, file=__file__)
    model = FlatFFN()
    moda_compile.convert(model, MoDAConfig(ffn_kv="shared"), (X,), backend="eager")
    model(X)


# --- arguments ----------------------------------------------------------------------------------


def stack(**options: Any) -> RandomStack:
    return RandomStack(StackConfig(**{"layers": 2, "mask": "flag", "length": LENGTH, **options}))


IDS = stack().config.inputs()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(config="projected"), "config: got str, expected a MoDAConfig"),
        (dict(config={"ffn_kv": "none"}), "config: got dict, expected a MoDAConfig"),
        (dict(config=MoDAConfig), "config: got type, expected a MoDAConfig"),
        (dict(backend="cudagraphs"), "backend: got 'cudagraphs', expected one of"),
        (dict(backend=None), "backend: got None, expected one of"),
        (dict(example_inputs=IDS), "example_inputs: got Tensor, expected a tuple"),
        (dict(example_inputs="ids"), "example_inputs: got str, expected a tuple"),
        (dict(config=MoDAConfig(ffn_kv="projected")), "pass example_inputs="),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    model = stack()
    before = traces(model)
    with pytest.raises(InputError, match=message):
        moda_compile.convert(model, **arguments)
    assert traces(model) == before


@pytest.mark.parametrize("model", [None, "model", nn.Linear, torch.relu])
def test_not_a_module(model: Any) -> None:
    with pytest.raises(InputError, match="expected a torch.nn.Module"):
        moda_compile.convert(model)


@pytest.mark.parametrize("options", [dict(ffn_kv="all"), dict(depth=None), dict(ffn_kv=None)])
def test_config_values(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected one of"):
        MoDAConfig(**options)


def test_backend_arguments() -> None:
    with pytest.raises(InputError, match="compiler: got 'onnx'"):
        Backend(compiler="onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="config: got str"):
        Backend("none")  # type: ignore[arg-type]


def test_other_options_on_a_converted_model() -> None:
    model = stack()
    assert moda_compile.convert(model, example_inputs=(IDS,), backend="eager") is model
    assert moda_compile.convert(model, example_inputs=(IDS,), backend="eager") is model
    before = traces(model)
    for options in (
        dict(config=MoDAConfig(ffn_kv="shared")),
        dict(backend="aot_eager"),
        dict(backend="eager", strict=False),
    ):
        with pytest.raises(InputError, match="converted already.*revert"):
            moda_compile.convert(model, example_inputs=(IDS,), **options)
    assert traces(model) == before


def test_converted_submodule() -> None:
    model = nn.Sequential(stack(), nn.Identity())
    moda_compile.convert(model[0], example_inputs=(IDS,), backend="eager")
    before = traces(model)
    with pytest.raises(InputError, match="submodule 0 is converted already"):
        moda_compile.convert(model, example_inputs=(IDS,), backend="eager")
    assert traces(model) == before


def test_revert_of_a_plain_model() -> None:
    with pytest.raises(InputError, match="not converted"):
        moda_compile.revert(stack())
    model = moda_compile.convert(stack(), example_inputs=(IDS,), backend="eager")
    moda_compile.revert(model)
    with pytest.raises(InputError, match="not converted"):
        moda_compile.revert(model)


def test_wrong_example_inputs() -> None:
    """The model's own error comes through, and nothing is left behind."""
    model = stack()
    before = traces(model)
    with pytest.raises(Exception, match="positional argument"):
        moda_compile.convert(model, example_inputs=(IDS, IDS, IDS), backend="eager")
    assert traces(model) == before
