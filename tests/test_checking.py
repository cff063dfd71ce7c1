"""How benchmarks run their checks: rows, failures, processes side by side, and what is written."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import check_flex  # noqa: E402
import checking  # noqa: E402
import readme  # noqa: E402
import results  # noqa: E402

from tests.stopping import tell_to_stop  # noqa: E402

SCRIPTS = sorted(file.stem for file in (ROOT / "benchmarks").glob("check_*.py"))


def right() -> str:
    return "2e-08/1e-07"


def wrong() -> str:
    raise AssertionError("dq too far off")


def checks() -> list[checking.Check]:
    return [("right", right), ("wrong  one", wrong), ("right again", right)]


claims = partial(checking.claim, "what is checked", checks)


def stop(benchmark: int, one_has_come: Path) -> str:
    tell_to_stop(benchmark, one_has_come)
    return ""


def stopping(benchmark: int, one_has_come: Path) -> list[checking.Check]:
    halt = partial(stop, benchmark, one_has_come)
    return [("right", right), ("stop", halt), ("right again", right)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_check_has_a_row(jobs: int, capfd: pytest.CaptureFixture[str]) -> None:
    rows = list(checking.run(checks, jobs=jobs))
    assert [(row["check"], row["passed"], row["said"]) for row in rows] == [
        ("right", True, "2e-08/1e-07"),
        ("wrong one", False, "AssertionError: dq too far off"),
        ("right again", True, "2e-08/1e-07"),
    ]
    assert all(row["seconds"] >= 0 for row in rows)
    printed = capfd.readouterr().out
    assert "ok   right: 2e-08/1e-07 (" in printed and "ok   right again: " in printed
    assert "FAIL wrong  one\n" in printed and "AssertionError: dq too far off" in printed


def test_some_of_them(capfd: pytest.CaptureFixture[str]) -> None:
    assert [row["check"] for row in checking.run(checks, only="again")] == ["right again"]
    assert "right again" in capfd.readouterr().out
    assert list(checking.run(checks, only="nothing of the kind")) == []


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def run_main(
    checks_of: Callable[[], Sequence[checking.Check]],
    only: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """The exit status."""
    arguments = ["check_it.py", "--only", only, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        checking.main("Check it.\n\nMore.", checks_of, claims)
    return int(left.value.code or 0)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("only", "status", "passed"),
    [("", 1, "2 of 3"), ("right", 0, "2 of 2 that ran, of 3")],
)
def test_the_exit_status_says_whether_one_failed(
    only: str, status: int, passed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_main(checks, only, tmp_path, monkeypatch) == status
    printed = capsys.readouterr().out
    assert printed.startswith(f"a GPU; torch {torch.__version__}, ")
    assert printed.endswith(f"{passed[:6]} checks passed\n")
    found = json.loads((tmp_path / "check_it.json").read_text(encoding="utf-8"))
    assert found["title"] == "Check it."
    assert found["claims"] == [["what is checked", passed]]
    assert [row["check"] for row in found["rows"]][0] == "right"


def test_no_check_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check_it.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device"):
        checking.main("Check it.", checks, claims)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("a_gpu")
def test_what_has_been_checked_is_written_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks_of = partial(stopping, os.getpid(), tmp_path)  # which is there: they run one by one
    assert run_main(checks_of, "", tmp_path, monkeypatch) == 1
    found = json.loads((tmp_path / "check_it.json").read_text(encoding="utf-8"))
    assert [row["check"] for row in found["rows"]] == ["right"]
    assert found["claims"] == [["what is checked", "1 of 1 that ran, of 3"]]


def test_processes_are_not_waited_for_when_time_is_up(tmp_path: Path) -> None:
    start = time.perf_counter()
    one_has_come, came = tmp_path / "one", []
    for row in checking.run(partial(stopping, os.getpid(), one_has_come), jobs=2):
        came.append(row["check"])
        one_has_come.touch()
    assert came == ["right"]
    assert time.perf_counter() - start < 100


def test_errors_beside_what_is_allowed() -> None:
    errors = {"dq": (1e-3, 2e-3), "dk": (1e-3, 4e-3)}
    assert checking.verdict(errors) == "dq 1e-03/2e-03 dk 1e-03/4e-03"
    assert checking.worst(errors) == "0.50 of what is allowed: dq 1e-03/2e-03"


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (3e-3, 2e-3),
        (math.inf, 2e-3),
        (math.nan, 2e-3),
        (math.inf, math.inf),
        (1e-3, math.nan),
        (0, math.inf),
    ],
)
@pytest.mark.parametrize("judge", [checking.verdict, checking.worst])
def test_an_error_that_is_too_large(
    judge: Callable[[checking.Errors], str], error: float, limit: float
) -> None:
    for name in ("dq", "dk", "dv"):
        errors = {"dq": (1e-3, 2e-3), "dk": (1e-3, 2e-3), "dv": (1e-3, 2e-3)}
        errors[name] = (error, limit)
        with pytest.raises(AssertionError, match=f"^{name} too far off: "):
            judge(errors)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_checks_of_a_script(script: str) -> None:
    """Rows of a later run find their places by name: no two may have the same."""
    module = importlib.import_module(script)
    names = [" ".join(name.split()) for name, _ in module.checks()]
    assert names
    assert len(set(names)) == len(names)
    rows = [{"check": name, "passed": True, "said": "", "seconds": 1.0} for name in names]
    ((_, said),) = module.claims(rows)
    assert said == f"{len(names)} of {len(names)}"
    ((_, said),) = module.claims([rows[0] | {"passed": False}])
    assert said == f"0 of 1 that ran, of {len(names)}"
    for name, found in readme.of_benchmark(readme.FOLDER, script):
        assert {row["check"] for row in found["rows"]} <= set(names), name
        claimed = [list(x) for x in module.claims(found["rows"])]
        file = f"benchmarks/results/{name}.json"
        again = f"PYTHONPATH=. python benchmarks/results.py {file} {file} --by check"
        assert found["claims"] == claimed, f"run {again}, and benchmarks/readme.py"


def test_a_failure_of_the_unconverted_model_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where one is expected, and only the same."""
    dynamic, static = (check_flex.Case(dynamic=x) for x in (True, False))

    class CantSplit(Exception):
        pass

    def fail(_case: check_flex.Case) -> checking.Errors:
        raise CantSplit("not divisible")

    monkeypatch.setattr(check_flex, "errors", fail)
    monkeypatch.setattr(check_flex, "unconverted", lambda _case: "CantSplit")
    said = check_flex.check(dynamic)
    assert said == "CantSplit: not divisible; so does the unconverted model"
    ((_, figure),) = check_flex.claims([{"check": "", "passed": True, "said": said}])
    assert figure.endswith("; in 1 of them the unconverted model raises the same error")
    with pytest.raises(CantSplit):
        check_flex.check(static)
    monkeypatch.setattr(check_flex, "unconverted", lambda _case: "")
    with pytest.raises(CantSplit):
        check_flex.check(dynamic)
    monkeypatch.setattr(check_flex, "errors", lambda _case: {"out": (2.0, 1.0)})
    with pytest.raises(AssertionError, match="out too far off"):
        check_flex.check(dynamic)


def test_checks_of_a_later_run_take_their_places(tmp_path: Path) -> None:
    rows = [{"check": x, "passed": True, "said": "", "seconds": 1.0} for x in ("NaN", "CUDA graph")]
    base = {
        "title": "A title", "command": "PYTHONPATH=. python benchmarks/check_decode.py",
        "machine": "a GPU", "versions": {}, "setting": "", "claims": [], "picture": None,
    }  # fmt: skip
    old, new = tmp_path / "check_decode.json", tmp_path / "new.json"
    old.write_text(json.dumps(base | {"rows": [rows[0] | {"passed": False}]}), encoding="utf-8")
    new.write_text(json.dumps(base | {"rows": rows}), encoding="utf-8")
    results.merge(old, new, ["check"], add=True)
    found = json.loads(old.read_text(encoding="utf-8"))
    assert found["rows"] == rows
    assert found["claims"][0][1].startswith("2 of 2 that ran, of ")
