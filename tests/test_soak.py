"""The soak run finds what is wrong, makes it small, and prints what runs."""

from __future__ import annotations

import re

import pytest

from moda_compile.testing import ByHand, Case, PairConfig, StackConfig, Variant, soak
from moda_compile.testing.shrink import simplest


def fail_if_deep(case: Case) -> None:
    """A made-up mistake: of stacks of three layers and more."""
    config = case.model
    if not isinstance(config, PairConfig) and config.layers >= 3:
        raise AssertionError(f"got {config.layers} layers")


def test_a_failure_is_shrunk_to_a_runnable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "check", fail_if_deep)
    outcome = soak.run_chunk(0, 30, ["masks", "by_hand", "aot"])
    assert outcome.run >= 1
    assert outcome.kinds["dtype: float32"] == outcome.run
    assert set(outcome.failures) == {"AssertionError: got # layers"}
    (details,) = outcome.details.values()
    lines = [line.strip() for line in details.strip().splitlines()[-2:]]
    assert lines[1] in {f"Case(model=StackConfig(layers={n})).check()" for n in (3, 4)}
    with pytest.raises(AssertionError, match="got . layers"):
        exec("\n".join(lines), {})  # as it stands


def test_what_was_run_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Case] = []
    monkeypatch.setattr(Case, "check", lambda case: ran.append(case))
    assert soak.main(["--count", "25", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("25 examples in ")
    assert len(ran) == 25
    assert lines[-1] == "0 failures, 0 distinct"
    shown = {line[8:]: int(line[:6]) for line in lines[1:-1]}
    assert shown["backend: eager"] == sum(case.backend == "eager" for case in ran)
    again: list[Case] = []
    monkeypatch.setattr(Case, "check", lambda case: again.append(case))
    soak.main(["--count", "25", "--seed", "3"])
    assert again == ran  # a seed is a run


def test_failures_are_told_apart_and_set_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Case, "check", fail_if_deep)
    assert soak.main(["--count", "12", "--only", "aot"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILURE AssertionError: got # layers") == 1
    assert re.search(r"\d+ failures, 1 distinct\n *\d+  AssertionError: got # layers\n", out)


def test_the_simplest_options_that_fail_the_same_way() -> None:
    """Two fields are to blame, one of them inside another; the rest goes back to its default."""
    blamed = Variant(head_dim=16)
    config = StackConfig(
        layers=4,
        kv_heads=3,
        mask="prefix",
        core=ByHand(product="bmm", scaling="key", dropout=True),
        variants=(Variant(), blamed, Variant(mixer="convolution")),
        bias=True,
    )
    tried: list[Case] = []

    def fails(case: Case) -> bool:
        tried.append(case)
        model = case.model
        assert isinstance(model, StackConfig)
        by_hand = isinstance(model.core, ByHand) and model.core.scaling == "key"
        return by_hand and blamed in model.variants

    found = simplest(Case(model=config, backend="aot_eager", lengths=(4, 6)), fails)
    expected = StackConfig(core=ByHand(scaling="key"), variants=(blamed,))
    assert found == Case(model=expected)
    assert len(tried) == len(set(tried)) < 80
