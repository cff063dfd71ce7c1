"""What Inductor writes for a launch: a call of what launches, with its tensors in their places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch._inductor.utils import fresh_cache, run_and_get_code  # noqa: E402

from moda_compile import launches  # noqa: E402
from moda_compile.kernels import recorded  # noqa: E402
from tests.kernels.test_recorded import inputs, text  # noqa: E402

OPERATOR = torch.ops.moda_compile.launch.default
TEXT = text()


def out(tensors: Sequence[Tensor]) -> Tensor:
    """Stands for what the kernel computes."""
    return tensors[0] * 2 + tensors[3]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Strides of what each launch was given; it launches nothing."""
    seen: list[tuple[Any, ...]] = []

    def launch(tensors: Sequence[Tensor]) -> list[Tensor]:
        seen.append(tuple(x.stride() for x in tensors))
        return [out(tensors), tensors[2] + 1]

    monkeypatch.setattr(recorded, "_prepared", defaultdict(dict, {-1: {TEXT: launch}}))
    return seen


def test_inductor_calls_what_launches(given: list[tuple[Any, ...]]) -> None:
    launches.teach_inductor()
    tensors = inputs()

    def step(*tensors: Tensor) -> Tensor:
        made, lse = OPERATOR([tensors[0] + 1, *tensors[1:]], TEXT)
        return made.float() * lse.unsqueeze(-1)

    with fresh_cache():
        found, codes = run_and_get_code(torch.compile(step, fullgraph=True), *tensors)
    expected = out([tensors[0] + 1, *tensors[1:]]).float() * (tensors[2] + 1).unsqueeze(-1)
    assert torch.equal(found, expected)
    assert given == [tuple(x.stride() for x in tensors)]
    code = "".join(codes)
    assert code.count("moda_compile_launch([") == 1
    assert "torch.ops.moda_compile.launch" not in "".join(
        line for line in code.splitlines() if not line.lstrip().startswith("#")
    )


def test_the_operator_launches_too(given: list[tuple[Any, ...]]) -> None:
    tensors = inputs()
    made, lse = OPERATOR(tensors, TEXT)
    assert torch.equal(made, out(tensors))
    assert torch.equal(lse, tensors[2] + 1)
    assert len(given) == 1
