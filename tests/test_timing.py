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


def squared(n: int) -> int:
    with timing.turn:
        return n * n


def told_to_stop_at_two(n: int, benchmark: int) -> int:
    if n < 2:
        return n
    if n == 2:
        time.sleep(1)
        os.kill(benchmark, signal.SIGTERM)
    time.sleep(120)
    return n


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_rows_come_in_their_order(jobs: int) -> None:
    assert list(timing.each(squared, [(n,) for n in range(4)], jobs)) == [0, 1, 4, 9]


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_a_benchmark_that_is_told_to_stop_keeps_its_rows(
    jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    start = time.perf_counter()
    work = [(n, os.getpid()) for n in range(4)]
    assert list(timing.each(told_to_stop_at_two, work, jobs)) == [0, 1]
    assert time.perf_counter() - start < 100
    assert "told to stop after 2 of 4" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
