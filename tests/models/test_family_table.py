"""The README's table of families is what benchmarks/results/families.json says: all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.models.families.libraries import NAMES, timm  # noqa: E402
from tests.models.families.row import cases  # noqa: E402
from tests.models.families.table import (  # noqa: E402
    BEGIN,
    END,
    FAMILIES,
    NOT_CONVERTED,
    load,
    put_into,
    render,
)

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "run PYTHONPATH=. python benchmarks/families.py"


def test_the_readme_shows_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert put_into(readme, render(load())) == readme, AGAIN


def test_a_table_is_put_between_its_markers_only() -> None:
    text = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert put_into(text, "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    assert put_into("no markers", "new") == "no markers"


def test_the_results_are_of_these_families_and_cases() -> None:
    results = load()
    assert list(results["families"]) == list(FAMILIES), AGAIN
    assert list(results["refused"]) == list(NOT_CONVERTED), AGAIN
    for name, found in results["families"].items():
        assert list(found["cases"]) == [str(c) for c in cases(FAMILIES[name])], AGAIN


def test_every_case_passed() -> None:
    failed = [
        (name, case, result)
        for name, found in load()["families"].items()
        for case, result in found["cases"].items()
        if not (result["passed"] and result["worst"] <= 1.0)
    ]
    assert failed == []


def test_cases_cover_what_a_row_says() -> None:
    for family in FAMILIES.values():
        padded = {case.padding for case in cases(family)}
        assert ("padded" in padded) == family.padded
        tried = {case.implementation for case in cases(family)}
        assert tried == set(family.implementations)
        assert {case.training for case in cases(family)} == {True, False}


def test_versions_are_the_ones_that_ci_installs() -> None:
    pins = dict(
        re.match(r"([\w-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
        for file in ("requirements-ci.txt", "requirements-families.txt")
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    results = load()
    assert results["torch"] == pins["torch"]
    for part, families in (("families", FAMILIES), ("refused", NOT_CONVERTED)):
        for name, family in families.items():
            assert results[part][name]["version"] == pins[family.library], AGAIN


def test_timm_leaves_no_stand_in_behind() -> None:
    """transformers asks whether there is a torchvision: it has to find the truth."""
    import sys

    assert timm().__name__ == "timm"
    left = [name for name in NAMES if name in sys.modules]
    assert all(hasattr(sys.modules[name], "__spec__") for name in left)
    assert not any(type(sys.modules[name]).__name__ == "_StandIn" for name in left)
