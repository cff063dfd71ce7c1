"""For every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_finish() -> None:
    """Let Python's garbage collector not look at half a million imported objects again and again.

    Tracing a model makes and drops hundreds of thousands of objects, and the collector would take a
    tenth of the tests' time. It still runs, on what tests made, after more of it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


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
