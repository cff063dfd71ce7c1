"""What PyTorch's analysis of a kernel found is kept for as much as the kernel's code depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap

from moda_compile import effects

NAME = "identify_mutated_tensors"


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Mapping[str, Any]]]:
    """The arguments of each analysis that was made."""
    seen: list[Mapping[str, Any]] = []

    def analyse(kernel: Any, kwargs: Mapping[str, Any], metadata: Any = None) -> list[str]:
        seen.append(kwargs)
        return [name for name, x in kwargs.items() if isinstance(x, torch.Tensor)]

    for name in effects._ANALYSES:
        monkeypatch.delattr(triton_kernel_wrap, name, raising=False)
    monkeypatch.setattr(triton_kernel_wrap, NAME, analyse, raising=False)
    effects.remember()
    yield seen


class Kernel:
    """As Triton's functions are: of the module of the Python function."""

    def __init__(self, module: str = "moda_compile.kernels.depth_forward") -> None:
        self.__module__ = module
        self.params = [
            SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ("x", "n", "S")
        ]


def analyse(*arguments: Any) -> Any:
    return getattr(triton_kernel_wrap, NAME)(*arguments)


def arguments(**changed: Any) -> dict[str, Any]:
    return {"x": torch.zeros(2), "n": 3, "y": None, "S": 16} | changed


def test_this_pytorch_has_the_function() -> None:
    """If it goes by another name one day, compiling takes longer, and nothing else says so."""
    assert any(hasattr(triton_kernel_wrap, name) for name in effects._ANALYSES)


def test_numbers_and_sizes_do_not_count(analysed: list[Any]) -> None:
    own = Kernel()
    first = analyse(own, arguments(), {})
    assert analyse(own, arguments(n=4, x=torch.zeros(7, 2)), {}) == first == ["x"]
    assert len(analysed) == 1


@pytest.mark.parametrize(
    "changed",
    [{"S": 32}, {"x": torch.zeros(2, dtype=torch.float16)}, {"y": torch.zeros(2)}, {"n": 0.5}],
    ids=["constant", "dtype", "no longer None", "kind of number"],
)
def test_all_else_counts(analysed: list[Any], changed: dict[str, Any]) -> None:
    own = Kernel()
    analyse(own, arguments(), {})
    made = analyse(own, arguments(**changed), {})
    assert made == [name for name in ("x", "y") if name in {"x"} | changed.keys() - {"n", "S"}]
    assert len(analysed) == 2


def test_a_kernel_with_a_launch_s_options_is_itself(analysed: list[Any]) -> None:
    """PyTorch makes a new autotuner of one for each launch."""
    own = Kernel()

    def launched(warps: int) -> Any:
        return SimpleNamespace(fn=own, configs=[f"num_warps: {warps}"])

    for warps in (4, 4, 8):
        assert analyse(launched(warps), arguments(), {}) == ["x"]
    assert len(analysed) == 2


def test_another_kernel_counts(analysed: list[Any]) -> None:
    analyse(Kernel(), arguments(), {})
    analyse(Kernel(), arguments(), {})
    assert len(analysed) == 2


@pytest.mark.parametrize("other", ["a kernel of the user's", "descriptors"])
def test_what_is_not_ours_is_analysed_each_time(analysed: list[Any], other: str) -> None:
    own = Kernel("their.kernels") if other == "a kernel of the user's" else Kernel()
    metadata = {"x": "a descriptor"} if other == "descriptors" else {}
    for _ in range(2):
        analyse(own, arguments(), metadata)
    assert len(analysed) == 2


def test_installed_once(analysed: list[Any]) -> None:
    first: Callable[..., Any] = getattr(triton_kernel_wrap, NAME)
    effects.remember()
    assert getattr(triton_kernel_wrap, NAME) is first
