"""`check_conversion` must fail on conversions that are wrong, each in one way."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda_compile
from moda_compile.config import MoDAConfig
from moda_compile.errors import RewriteError
from moda_compile.testing import (
    Budget,
    ByHand,
    Case,
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
            told = stack.oracle(config.ffn_kv, dict(stack.named_parameters()))
            with self.mode(stack, **told):
                return plain(stack, ids)

        model.forward = MethodType(forward, model)
        return model

    def revert(self, model: Any) -> Any:
        vars(model).pop("forward", None)
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
    def slots(self, layer: int, stack: Any = 0) -> list[tuple[Tensor, Tensor]]:
        return super().slots(layer, stack)[1:] if layer == 2 else super().slots(layer, stack)


class ScalesKeys(ReferenceMode):
    def slots(self, layer: int, stack: Any = 0) -> list[tuple[Tensor, Tensor]]:
        return [(key * 1.001, value) for key, value in super().slots(layer, stack)]


class CutsGradients(ReferenceMode):
    def slots(self, layer: int, stack: Any = 0) -> list[tuple[Tensor, Tensor]]:
        return [(key.detach(), value) for key, value in super().slots(layer, stack)]


class SwapsHeads(ReferenceMode):
    def slots(self, layer: int, stack: Any = 0) -> list[tuple[Tensor, Tensor]]:
        return [(key.flip(1), value.flip(1)) for key, value in super().slots(layer, stack)]


class TwoSoftmaxes(ReferenceMode):
    def attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.attentions
        found = self.slots(layer, (STACK.kv_heads, STACK.head_dim, STACK.values))
        slots = [(k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)) for k, v in found]
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
        def untreated(stack: RandomStack, attention: Any, key: Tensor, x: Tensor) -> Tensor:
            return key.reshape(*x.shape[:2], STACK.kv_heads, STACK.head_dim).transpose(1, 2)

        model._treat = MethodType(untreated, model)
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


# ------------------------------------------------------------------- what it can be told besides


def test_the_oracle_may_be_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeLibrary())
    config = replace(STACK, mask="tril_bool", core=ByHand(), repeat="expand_after")
    model, twin = RandomStack(config), RandomStack(replace(config, core="sdpa"))
    assert check_conversion(model, config.inputs(), oracle=twin)
    other = RandomStack(replace(config, core="sdpa", seed=1))
    with pytest.raises(AssertionError, match="tensors are off"):
        check_conversion(model, config.inputs(), oracle=other)


class BreaksTheLastToken(ReferenceMode):
    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().attend(*args, **kwargs)
        return torch.cat([out[:, :, :-1], out[:, :, -1:] + 1], dim=2)


def test_only_chosen_outputs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack is causal, so a wrong last token is nobody else's business."""
    library = FakeLibrary()
    library.mode = BreaksTheLastToken
    config = MoDAConfig()
    assert check(monkeypatch, library, config, outputs=lambda logits: logits[:, :-1])
    with pytest.raises(AssertionError, match="output"):
        check(monkeypatch, library, config)


class ForgetsWhenLong(ReferenceMode):
    def slots(self, layer: int, stack: Any = 0) -> list[tuple[Tensor, Tensor]]:
        found = super().slots(layer, stack)
        return found if not found or found[0][0].shape[2] < 6 else found[:1]


def test_every_further_call_is_held_to_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    library.mode = ForgetsWhenLong
    short, long = replace(STACK, length=4).inputs(), replace(STACK, length=6).inputs()
    names = [c.name for c in check(monkeypatch, library, MoDAConfig(), more=[short])]
    assert {"output[0]", "call 1: output[0]"} <= set(names)
    with pytest.raises(AssertionError, match="call 2: output"):
        check(monkeypatch, library, MoDAConfig(), more=[short, long])


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    library, config = FakeLibrary(), MoDAConfig()
    none = Budget(condition=0.0, rtol=0.0, atol=0.0)
    compared = check(monkeypatch, library, config, autocast=torch.bfloat16, budget=none)
    # 2^-9 is one rounding to bfloat16; in float32 the same would be 2^-24.
    assert max(comparison.error for comparison in compared) > 2**-12
    library.mode = DropsASlot
    with pytest.raises(AssertionError, match="tensors are off"):
        budget = Budget(condition=1.0)
        check(monkeypatch, library, config, autocast=torch.bfloat16, budget=budget)


def test_compilations_are_counted() -> None:
    """Three lengths: the first alone, then one graph for all others."""
    config = StackConfig()
    more = [replace(config, length=length).inputs() for length in (7, 9)]
    model = RandomStack(config)
    check_conversion(model, config.inputs(), backend="eager", more=more, compilations=2)
    with pytest.raises(AssertionError, match="got 2 compilations, expected <= 1"):
        check_conversion(model, config.inputs(), backend="eager", more=more, compilations=1)


# ---------------------------------------------------------------------- rounding or wrong


class Rounds(FakeLibrary):
    """Off by `relative` of the result, in float32 only."""

    relative = 6e-6

    def convert(self, model: Any, config: MoDAConfig, **options: Any) -> Any:
        if "forward" in vars(model):
            return model
        right = vars(super().convert(model, config, **options))["forward"]
        wrong = 1.0 if model.head.weight.dtype == torch.float64 else 1.0 + self.relative
        model.forward = MethodType(lambda _, ids: right(ids) * wrong, model)
        return model


class RoundsFar(Rounds):
    relative = 1e-2


def test_float64_tells_rounding_from_a_wrong_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 leaves open: a case that is off in float32, by how much?"""
    with pytest.raises(AssertionError, match="tensors are off"):
        check(monkeypatch, Rounds(), MoDAConfig(), backend="eager")
    Case(model=STACK).check()
    for library in (RoundsFar(), Identity()):
        install(monkeypatch, library)
        with pytest.raises(AssertionError, match="tensors are off"):
            Case(model=STACK).check()


# ------------------------------------------------------------------------------- near misses


class Refuses(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **_: Any) -> Any:
        raise RewriteError("near miss", fix="none")


class RefusesTooLate(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **_: Any) -> Any:
        with torch.no_grad():
            model.head.weight.mul_(2)
        raise RewriteError("near miss", fix="none")


class RefusesHalf(FakeLibrary):
    def convert(self, model: Any, config: MoDAConfig, **_: Any) -> Any:
        model.forward = lambda ids: type(model).forward(model, ids) + 1
        raise RewriteError("near miss", fix="none")


def test_a_near_miss_has_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(model=replace(STACK, near_miss="softcap", repeat="expand_after"))
    install(monkeypatch, Refuses())
    case.check()
    for library, message in (
        (Identity(), "was converted"),
        (RefusesTooLate(), "state has changed"),
        (RefusesHalf(), "computes something else"),
    ):
        install(monkeypatch, library)
        with pytest.raises(AssertionError, match=message):
            case.check()


def test_what_is_no_attention_must_not_keep_the_rest_from_conversion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = replace(STACK, near_miss="linear", near_miss_layer=1, repeat="expand_after")
    install(monkeypatch, FakeLibrary())
    Case(model=linear).check()
    install(monkeypatch, Refuses())
    with pytest.raises(RewriteError):
        Case(model=linear).check()
