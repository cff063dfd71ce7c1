"""What benchmarks time with: calls, a device copy, and rows that are compiled side by side."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton

LEAD = 30.0
turn: AbstractContextManager[Any] = contextlib.nullcontext()  # held while this process is timing


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of a call on the GPU."""
    return float(triton.testing.do_bench(call, warmup=10, rep=60, return_mode="median"))


def in_turns(*calls: Callable[[], Any], seconds: float = 0.5, least: int = 5) -> list[float]:
    """Median milliseconds on the GPU of calls whose difference counts, in turns: what slows the GPU
    down for a while meets them all.

    Heavy calls lower its clock, so what runs before a call changes its time by as much as 8%. Each
    turn therefore begins with LEAD milliseconds of the same call, which don't count. The L2 cache
    is emptied before each that does.
    """
    cache = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    leads = [max(1, round(LEAD / milliseconds(call))) for call in calls]
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < least:
        for call, lead, samples in zip(calls, leads, taken, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(lead):
                call()
            cache.zero_()
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(stop))
    return [statistics.median(samples) for samples in taken]


def once(call: Callable[[], Any]) -> float:
    """Milliseconds of one call: on a GPU from its first launch to its last kernel."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes a millisecond of a large device copy, read and written counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source))


def each(measure: Callable[..., Any], work: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """measure(*arguments) for each of `work`, in its order; with several jobs in processes of their
    own, of which one at a time holds `turn`. With a job for each, none does before all have come to
    it: a step that waits for the host is not timed while others compile.

    SIGTERM ends it: see `until_told`.
    """
    work = list(work)
    return until_told(_each(measure, work, jobs), len(work))


def until_told(results: Iterator[Any], total: int) -> Iterator[Any]:
    """`results`, of which there are `total`; SIGTERM, as of `timeout`, ends them with those that
    have come so far.
    """
    done = 0
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for result in results:
            done += 1
            yield result
    except _Stopped:
        print(f"told to stop after {done} of {total}", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stopped(BaseException):
    """The process was told to stop."""


def _stop(*_: object) -> None:
    raise _Stopped


def _each(measure: Callable[..., Any], work: list[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    if jobs == 1:
        yield from (measure(*arguments) for arguments in work)
        return
    threads = max(2, (os.cpu_count() or 1) // jobs)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs,
        spawn,
        initializer=_take_turns,
        initargs=(spawn.Lock(), spawn.Value("i", len(work) if jobs >= len(work) else 0)),
        max_tasks_per_child=1,  # what a row leaves in GPU memory goes with its process
    ) as pool:
        try:
            yield from (x.result() for x in [pool.submit(_counted, measure, own) for own in work])
        except _Stopped:
            for child in multiprocessing.active_children():
                child.terminate()  # else they would be waited for
            raise


class _Turn:
    """A lock that is not given before `waited_for` processes have asked for it, or ended."""

    def __init__(self, lock: Any, waited_for: Any) -> None:
        self.lock, self.waited_for, self.counted = lock, waited_for, False

    def count(self) -> None:
        """This process is no longer waited for."""
        if not self.counted:
            self.counted = True
            with self.waited_for.get_lock():
                self.waited_for.value -= 1

    def __enter__(self) -> None:
        self.count()
        while self.waited_for.value > 0:
            time.sleep(0.1)
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _take_turns(lock: Any, waited_for: Any) -> None:
    """Have this process time nothing but with the lock."""
    global turn
    turn = _Turn(lock, waited_for)


def _counted(measure: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return measure(*arguments)
    finally:
        assert isinstance(turn, _Turn)
        turn.count()  # also of one that failed before its turn
