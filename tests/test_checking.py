"""How benchmarks run their checks: rows, failures, and processes side by side."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import checking  # noqa: E402


def right() -> str:
    return "2e-08/1e-07"


def wrong() -> str:
    raise AssertionError("dq too far off")


def checks() -> list[checking.Check]:
    return [("right", right), ("wrong", wrong), ("right again", right)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_check_has_a_row(jobs: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert checking.run(checks, jobs=jobs) == [True, False, True]
    rows = capfd.readouterr().out
    assert "ok   right: 2e-08/1e-07 (" in rows and "ok   right again: " in rows
    assert "FAIL wrong\n" in rows and "AssertionError: dq too far off" in rows


def test_some_of_them(capfd: pytest.CaptureFixture[str]) -> None:
    assert checking.run(checks, only="again") == [True]
    assert "right again" in capfd.readouterr().out
    assert checking.run(checks, only="nothing of the kind") == []


@pytest.mark.parametrize(("only", "status"), [("", True), ("right", False)])
def test_the_exit_status_says_whether_one_failed(
    only: str, status: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check.py", "--only", only])
    with pytest.raises(SystemExit, match="no CUDA device"):
        checking.main("Check.", checks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(SystemExit) as left:
        checking.main("Check.", checks)
    assert left.value.code == status
    said = capsys.readouterr().out
    assert said.startswith("a GPU, torch ")
    assert ("2 of 3 checks passed" if status else "2 of 2 checks passed") in said
