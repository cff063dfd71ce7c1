"""`check_conversion` must fail on conversions that are wrong, each in one way."""

from __future__ import annotations

import copy
import math
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda_compile
from moda_compile.config import MoDAConfig
from moda_compile.testing import (
    Budget,
    RandomStack,
    ReferenceMode,
    StackConfig,
    check_conversion,
)


class FakeLibrary:
    """A right conversion made of the oracle itself; subclasses break one thing each."""

    mode: type[ReferenceMode] = ReferenceMode

    def convert(self, model: Any, config: MoDAConfig, **_: Any) -> Any:
        if "forward" in vars(model):
            return model
        attentions = model.config.layers
        kv = model.config.kv_heads * model.config.head_dim
        if config.ffn_kv == "projected":
            for block in model.blocks[: attentions - 1]:
                for name in ("moda_key_weight", "moda_value_weight"):
                    weight = nn.Parameter(model.head.weight.new_empty(kv, model.config.model_width))
                    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                    block.ffn.register_parameter(name, weight)
        plain = type(model).forward

        def forward(stack: RandomStack, ids: Tensor) -> Tensor:
            slots = None
            if config.ffn_kv != "none":
                slots = stack.ffn_slots(config.ffn_kv, dict(stack.named_parameters()))
            with self.mode(stack, slots):
                return plain(stack, ids)

        model.forward = MethodType(forward, model)
        return model

    def revert(self, model: Any) -> Any:
        del model.forward
        for block in model.blocks:
            for name in ("moda_key_weight", "moda_value_weight"):
                block.ffn._parameters.pop(name, None)
        return model

    def explain(self, model: Any, *args: Any, config: MoDAConfig, **kwargs: Any) -> Any:
        return SimpleNamespace(attentions=list(model.blocks))


STACK = StackConfig(layers=3, kv_heads=2, groups=2, qk_norm="head", rotary="half")


def install(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary) -> None:
    for name in ("convert", "revert", "explain"):
        monkeypatch.setattr(moda_compile, name, getattr(library, name))


def check(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary, config: MoDAConfig, **options: Any
) -> list[Any]:
    install(monkeypatch, library)
    return check_conversion(RandomStack(STACK), STACK.inputs(), config, **options)


@pytest.mark.parametrize("ffn_kv", ["none", "shared", "projected"])
def test_a_right_conversion_passes(monkeypatch: pytest.MonkeyPatch, ffn_kv: Any) -> None:
    config = MoDAConfig(ffn_kv=ffn_kv)
    none = Budget(condition=0.0, rtol=0.0, atol=0.0)  # the oracle's own arithmetic
    comparisons = check(monkeypatch, FakeLibrary(), config, budget=none)
    names = {comparison.name for comparison in comparisons}
    assert "output[0]" in names
    assert ("gradient of blocks.1.ffn.moda_key_weight" in names) == (ffn_kv == "projected")
    assert "gradient of blocks.2.ffn.moda_key_weight" not in names


class DropsASlot(ReferenceMode):
    def slots(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return super().slots(layer)[1:] if layer == 2 else super().slots(layer)


class ScalesKeys(ReferenceMode):
    def slots(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(key * 1.001, value) for key, value in super().slots(layer)]


class CutsGradients(ReferenceMode):
    def slots(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(key.detach(), value) for key, value in super().slots(layer)]


class SwapsHeads(ReferenceMode):
    def slots(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(key.flip(1), value.flip(1)) for key, value in super().slots(layer)]


class TwoSoftmaxes(ReferenceMode):
    def attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.attentions
        slots = [
            (k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)) for k, v in self.slots(layer)
        ]
        out = super().attend(query, *args, **kwargs)
        if not slots:
            return out
        scores = torch.stack([(query * key).sum(-1) for key, _ in slots]).softmax(0)
        return out + sum(s[..., None] * v for s, (_, v) in zip(scores, slots, strict=True))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (DropsASlot, "output"),
        (ScalesKeys, "output"),
        (SwapsHeads, "output"),
        (TwoSoftmaxes, "output"),
        (CutsGradients, "gradient of blocks"),
    ],
)
@pytest.mark.parametrize("ffn_kv", ["none", "shared", "projected"])
def test_wrong_mathematics_fail(
    monkeypatch: pytest.MonkeyPatch, mode: type[ReferenceMode], message: str, ffn_kv: Any
) -> None:
    library = FakeLibrary()
    library.mode = mode
    with pytest.raises(AssertionError, match=f"tensors are off(.|\n)*{message}") as caught:
        check(monkeypatch, library, MoDAConfig(ffn_kv=ffn_kv))
    assert "check_conversion(model, model.config.inputs(), MoDAConfig(" in str(caught.value)


class Identity(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **_: Any) -> Any:
        return model


class SkipsKeyNorm(FakeLibrary):
    """FFN keys miss their layer's key norm and rotation."""

    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        model._treat = MethodType(lambda self, _, key, x: self._by_head(key, x), model)
        return super().convert(model, config, **options)


class ReturnsACopy(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        return super().convert(copy.deepcopy(model), config, **options)


class ChangesTheClass(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        model.__class__ = type("Converted", (RandomStack,), {})
        return super().convert(model, config, **options)


class AddsABuffer(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        if "moda" not in dict(model.named_buffers()):
            model.register_buffer("moda", torch.zeros(1))
        return super().convert(model, config, **options)


class TouchesWeights(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        with torch.no_grad():
            model.head.weight.mul_(1 + 1e-6)
        return super().convert(model, config, **options)


class DrawsAgain(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        vars(model).pop("forward", None)
        return super().convert(model, config, **options)


class MissesOne(FakeLibrary):
    def explain(self, model: Any, *args: Any, config: MoDAConfig, **kwargs: Any) -> Any:
        return SimpleNamespace(attentions=list(model.blocks)[1:])


class RevertsHalf(FakeLibrary):
    def revert(self, model: Any) -> Any:
        del model.forward
        return model


class LeavesAHook(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        model.blocks[0].register_forward_hook(lambda *_: None)
        return super().convert(model, config, **options)


@pytest.mark.parametrize(
    ("library", "ffn_kv", "message"),
    [
        (Identity(), "none", "tensors are off"),
        (SkipsKeyNorm(), "shared", "tensors are off"),
        (SkipsKeyNorm(), "projected", "tensors are off"),
        (ReturnsACopy(), "none", "same object"),
        (ChangesTheClass(), "none", "class: got"),
        (AddsABuffer(), "projected", "keys added .* got .'moda'."),
        (TouchesWeights(), "none", "other values: got .'head.weight'."),
        (DrawsAgain(), "projected", "converting twice"),
        (MissesOne(), "none", "number of attentions: got 2, expected 3"),
        (RevertsHalf(), "projected", "revert: state_dict keys"),
        (LeavesAHook(), "none", "revert: module attributes"),
    ],
)
def test_broken_promises_fail(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary, ffn_kv: Any, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(monkeypatch, library, MoDAConfig(ffn_kv=ffn_kv))


def test_the_ffn_oracle_is_required() -> None:
    with pytest.raises(AssertionError, match="got ffn_slots=None"):
        check_conversion(nn.Linear(2, 2), (torch.zeros(1, 2),), MoDAConfig(ffn_kv="shared"))


def test_depth_off_must_be_bitwise_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, Identity(), MoDAConfig(depth=False)) == []
    with pytest.raises(AssertionError, match="depth=False: output"):
        check(monkeypatch, FakeLibrary(), MoDAConfig(depth=False))


def test_the_model_is_not_modified(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeLibrary())
    stack = RandomStack(STACK)
    before = copy.deepcopy(stack.state_dict())
    check_conversion(stack, {"ids": STACK.inputs()[0]}, MoDAConfig(ffn_kv="projected"))
    assert list(before) == list(stack.state_dict())
    assert all(torch.equal(before[name], value) for name, value in stack.state_dict().items())
    assert all(parameter.grad is None for parameter in stack.parameters())
