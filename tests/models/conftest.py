"""Small models, one thread, and a fresh Dynamo for every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_compile.testing import reference
from tests.models.cases import IDS, stack

NEVER_PLAIN = 0.1  # distance of the plain model's outputs, which are of order 1


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """One thread, as CI has two cores; no compiled code or stance left over from another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What ``stack()`` gives for `IDS` with MoDA in it."""
    model = stack()
    moda, plain = reference(model, IDS).detach(), model(IDS).detach()
    assert (moda - plain).abs().max() > NEVER_PLAIN
    return moda


@pytest.fixture
def inductor_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Inductor is asked for, as it is asked; nothing is compiled then."""
    seen: dict[str, Any] = {}

    def compile_fx(gm: Any, _inputs: Any, _inner: Any, patches: dict[str, Any]) -> Any:
        seen.update(patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen
