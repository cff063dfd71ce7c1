"""For every test."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.guards


def pytest_collection_finish() -> None:
    """Let Python's garbage collector not look at half a million imported objects again and again.

    Tracing a model makes and drops hundreds of thousands of objects, and the collector would take a
    tenth of the tests' time. It still runs, on what tests made, after more of it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    # Pytest hangs handlers on loggers that do not propagate, and PyTorch writes whole graphs into
    # this one, for a tool that reads them, as soon as it has one: a twentieth of the tests' time.
    logging.getLogger("torch.__trace").propagate = True
    # Dynamo reports how long a graph's guards take, with the processor's caches emptied before: a
    # fifteenth of the tests' time, and of the other worker's, whose caches they are as well.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two workers get files in this order, and end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small shapes run faster on one thread, and CI has two cores for two workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
