"""What benchmarks time with: calls, a device copy, and rows that are compiled side by side."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton

turn: AbstractContextManager[Any] = contextlib.nullcontext()  # held while this process is timing


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of a call on the GPU."""
    return float(triton.testing.do_bench(call, warmup=10, rep=60, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes a millisecond of a large device copy, read and written counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source))


def each(measure: Callable[..., Any], work: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """measure(*arguments) for each of `work`, in its order; with several jobs in processes of their
    own, of which one at a time holds `turn`.
    """
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
        initargs=(spawn.Lock(),),
        max_tasks_per_child=1,  # what a row leaves in GPU memory goes with its process
    ) as pool:
        yield from (x.result() for x in [pool.submit(measure, *own) for own in work])


def _take_turns(lock: AbstractContextManager[Any]) -> None:
    """Have this process time nothing but with the lock."""
    global turn
    turn = lock
