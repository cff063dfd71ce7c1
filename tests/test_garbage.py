"""Python's garbage collection while a model is compiled."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch._inductor.compile_fx
from functorch.compile import make_boxed_func
from torch.fx import GraphModule

import moda_compile
from moda_compile import MoDAConfig, capture, garbage, pipeline
from moda_compile.testing import RandomStack, StackConfig

MINE = (500, 7, 9)


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*MINE)
    yield
    gc.set_threshold(*before)


class Ring:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.own = self


def collections_of_all() -> int:
    return int(gc.get_stats()[2]["collections"])


@pytest.fixture
def nothing_old() -> Iterator[None]:
    """Python waits with a collection of all until there is a quarter more than at the last one."""
    gc.freeze()
    gc.collect()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_old")
def test_the_young_are_collected_and_all_afterwards() -> None:
    def work() -> tuple[int, int]:
        before, young = collections_of_all(), gc.get_stats()[1]["collections"]
        kept: list[Any] = []
        for _ in range(100_000):
            Ring()
            kept.append([])
        return collections_of_all() - before, gc.get_stats()[1]["collections"] - young

    with garbage.only_young():
        of_all, of_young = work()
    assert of_all == 0
    assert of_young > 0
    assert gc.get_threshold() == MINE
    assert work()[0] > 0


@pytest.mark.usefixtures("nothing_old")
def test_one_that_has_come_due_meanwhile_waits_as_after_one() -> None:
    def work(count: int) -> int:
        before = collections_of_all()
        for _ in range(count):
            kept.append([])
        return collections_of_all() - before

    kept: list[Any] = []
    most = MINE[0] * (MINE[1] + 1) * MINE[2]  # objects before the middle ones have had their turns
    gc.unfreeze()  # what was frozen may not be thawed: see the next
    with garbage.only_young():
        assert work(2 * most) == 0
    assert work(most // 2) == 0
    assert work(most) > 0


@pytest.mark.usefixtures("nothing_old")
def test_what_is_frozen_stays_frozen() -> None:
    """One object is looked for: their number falls when a frozen object is freed meanwhile."""

    def is_frozen() -> bool:
        return not any(x is mine for x in gc.get_objects())  # lists what is not frozen

    mine: list[Any] = []
    assert not is_frozen()
    gc.freeze()
    assert is_frozen()
    with garbage.only_young():
        pass
    assert is_frozen()


def test_nested_and_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), garbage.only_young():
        with garbage.only_young():
            pass
        assert gc.get_threshold()[:2] == MINE[:2]
        assert gc.get_threshold() != MINE
        raise ZeroDivisionError
    assert gc.get_threshold() == MINE


def test_lasts_until_the_last_thread_is_out() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with garbage.only_young():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with garbage.only_young():
        thread.start()
        assert inside.wait(60)
    assert gc.get_threshold() != MINE
    leave.set()
    thread.join(60)
    assert gc.get_threshold() == MINE


def test_while_a_model_is_looked_at_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In convert(), by Dynamo, forward and backward; Inductor's part is left out."""
    seen: list[tuple[str, bool]] = []

    def note(what: str) -> None:
        seen.append((what, gc.get_threshold() != MINE))

    def compiled(gm: GraphModule, *_inputs: Any, **options: Any) -> Any:
        note("backward" if options.get("is_backward") else "forward")
        return make_boxed_func(gm.forward)

    def noted(what: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(what)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(capture, "spelled_out", noted("analysis", capture.spelled_out))
    monkeypatch.setattr(pipeline, "transform", noted("rewrite", pipeline.transform))
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", compiled)
    config = StackConfig(layers=2)
    model, inputs = RandomStack(config), config.inputs()
    moda_compile.convert(model, MoDAConfig(), inputs)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        model(*inputs).sum().backward()
    assert seen == [(x, True) for x in ("analysis", "rewrite", "forward", "backward")]
    assert gc.get_threshold() == MINE
    monkeypatch.setattr(garbage, "only_young", noted("again", garbage.only_young))
    model(*inputs)
    assert len(seen) == 4
