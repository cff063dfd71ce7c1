"""The choice of a lowering is a pure function of the inputs and of what torch reports."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from moda_compile import kernels
from moda_compile.kernels import Lowering, available_sequence_kernels, choose, choose_merge

ALL = frozenset({"cudnn", "flash", "efficient"})


def pick(**changes: Any) -> Lowering:
    usual: dict[str, Any] = dict(
        device_type="cuda",
        dtype=torch.bfloat16,
        head_dim=64,
        tokens=128,
        capability=(9, 0),
        available=ALL,
    )
    return choose(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "name", "sequence", "reason"),
    [
        ({}, "split", "cudnn", "capability 9.0"),
        ({"capability": (10, 0)}, "split", "cudnn", "capability 10.0"),
        ({"capability": (8, 0)}, "split", "flash", "capability 8.0"),
        ({"available": ALL - {"cudnn"}}, "split", "flash", "cudnn: not available or disabled"),
        ({"available": frozenset()}, "fused", "triton", "no attention of the platform"),
        ({"available": frozenset(), "masked": True}, "fused", "triton", "efficient: not"),
        ({"available": frozenset(), "dtype": torch.float32}, "fused", "triton", "one Triton"),
        ({"available": frozenset(), "traced": True}, "split", "math", "no attention of the"),
        (
            {"available": frozenset(), "masked": True, "additive": True},
            *("split", "math", "no attention of the platform"),
        ),
        (
            {"available": frozenset(), "masked": True, "mask_gradient": True},
            *("split", "math", "no attention of the platform"),
        ),
        ({"tokens": 1}, "split", "flash", "a key sequence of one token"),
        ({"tokens": None}, "split", "cudnn", "cudnn"),
        ({"queries": 1}, "decode", "triton", "few queries over many keys"),
        ({"queries": 16, "masked": True}, "decode", "triton", "few queries over many keys"),
        ({"queries": 1, "available": frozenset()}, "decode", "triton", "few queries"),
        ({"queries": 1, "dtype": torch.float32}, "decode", "triton", "few queries"),
        ({"queries": 1, "dtype": torch.float64}, "plain", "math", "float64"),
        ({"queries": 17}, "split", "cudnn", "capability 9.0"),
        ({"queries": 9, "tokens": 9}, "split", "cudnn", "capability 9.0"),
        ({"queries": 1, "tokens": None}, "split", "cudnn", "capability 9.0"),
        ({"queries": 1, "capability": (7, 5)}, "split", "math", "bfloat16 needs capability 8.0"),
        ({"head_dim": 76}, "split", "cudnn", "cudnn"),
        ({"head_dim": 192}, "split", "flash", "exceeds 128"),
        ({"head_dim": 256}, "split", "flash", "exceeds 128"),
        ({"head_dim": 256, "capability": (8, 9)}, "split", "efficient", "exceeds 192"),
        ({"head_dim": 257}, "plain", "math", "head_dim 257 exceeds 256"),
        ({"dtype": torch.float32}, "split", "efficient", "not a 16-bit type"),
        ({"dtype": torch.float64}, "plain", "math", "float64"),
        ({"dtype": torch.float16, "capability": (7, 5)}, "split", "efficient", "capability 8.0"),
        ({"capability": (7, 5)}, "split", "math", "bfloat16 needs capability 8.0"),
        ({"device_type": "cpu"}, "cpu", "flash", "'cpu'"),
        ({"masked": True}, "split", "efficient", "cudnn: takes no mask; not flash: takes no mask"),
        ({"masked": True, "mask_gradient": True}, "split", "efficient", "capability 9.0"),
        ({"masked": True, "head_dim": 256}, "split", "efficient", "takes no mask"),
        ({"masked": True, "tokens": 1}, "split", "efficient", "takes no mask"),
        ({"masked": True, "available": ALL - {"efficient"}}, "fused", "triton", "efficient: not"),
        ({"masked": True, "dtype": torch.float64}, "plain", "math", "float64"),
        ({"masked": True, "device_type": "cpu"}, "cpu", "flash", "slots by PyTorch."),
        (
            {"masked": True, "mask_gradient": True, "device_type": "cpu"},
            *("cpu", "flash", "the mask's gradient by T x T scores"),
        ),
    ],
)
def test_choice(changes: dict[str, Any], name: str, sequence: str, reason: str) -> None:
    lowering = pick(**changes)
    assert (lowering.name, lowering.sequence) == (name, sequence)
    assert reason in lowering.reason


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({}, "split", "the attention's own out and lse"),
        ({"dtype": torch.float64}, "plain", "float64"),
        ({"head_dim": 257}, "plain", "exceeds 256"),
        ({"device_type": "cpu"}, "cpu", "'cpu'"),
    ],
)
def test_choice_for_a_given_sequence_part(changes: dict[str, Any], name: str, reason: str) -> None:
    usual: dict[str, Any] = dict(device_type="cuda", dtype=torch.bfloat16, head_dim=64)
    lowering = choose_merge(**(usual | changes))
    assert (lowering.name, lowering.sequence) == (name, "given")
    assert reason in lowering.reason


def test_lowering_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pick().name = "other"  # type: ignore[misc]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")
def test_nothing_is_available_without_a_gpu() -> None:
    assert available_sequence_kernels() == frozenset()
    assert choose(device_type="cuda", dtype=torch.float16, head_dim=64).name == "fused"


def test_choosing_imports_no_triton() -> None:
    # The file alone, without the rest of the library around it.
    code = f"""
import importlib.util, sys
name, path = "moda_compile.kernels", {kernels.__file__!r}
spec = importlib.util.spec_from_file_location(name, path)
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.choose(device_type="cuda", dtype=module.torch.float64, head_dim=64).name == "plain"
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
