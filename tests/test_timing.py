"""Rows that benchmarks compile side by side, and what is left of them when time is up."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import timing  # noqa: E402

from tests.stopping import tell_to_stop  # noqa: E402


def squared(n: int) -> int:
    with timing.turn:
        return n * n


def told_to_stop_at_two(n: int, benchmark: int, two_have_come: Path) -> int:
    if n < 2:
        return n
    if n == 2:
        tell_to_stop(benchmark, two_have_come)
    time.sleep(120)
    return n


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_rows_come_in_their_order(jobs: int) -> None:
    assert list(timing.each(squared, [(n,) for n in range(4)], jobs)) == [0, 1, 4, 9]


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_a_benchmark_that_is_told_to_stop_keeps_its_rows(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    start = time.perf_counter()
    two_have_come = tmp_path / "two"
    came = []
    for n in timing.each(
        told_to_stop_at_two, [(n, os.getpid(), two_have_come) for n in range(4)], jobs
    ):
        came.append(n)
        if len(came) == 2:
            two_have_come.touch()
    assert came == [0, 1]
    assert time.perf_counter() - start < 100
    assert "told to stop after 2 of 4" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
