"""A benchmark that is told to stop, as `timeout` tells it, by what it runs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def tell_to_stop(benchmark: int, ready: Path) -> None:
    """Send SIGTERM to the process `benchmark` once the file `ready` is there; wait for one's own
    end, which it brings about.
    """
    while not ready.exists():
        time.sleep(0.05)
    time.sleep(0.5)  # the benchmark, which has made the file, waits for the next row by now
    os.kill(benchmark, signal.SIGTERM)
    time.sleep(120)
