"""Where the host's time goes in a first training step of compile_time.py's model.

    PYTHONPATH=. python benchmarks/host_profile.py projected [--layers 12] [--cache FOLDER]

Stacks of the thread that works, the one of backward while the main one waits for it, looked at
every 10 ms: a tree of calls with the seconds in each, those that only call one other left out. A
thread that gives Python up often gets it back at once, before the one that looks: what passes then
stands apart, as does what Python's collections of all its objects take. A second run with the same
folder starts from Inductor's caches. Each kernel that this process had Triton compile, for want of
it in its cache, is named.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import compile_time
import torch

_EVERY = 0.01  # seconds
_LEAST = 0.15  # seconds of a call that is shown
_ALONE = 0.93  # of a call's time in one other: it is left out
_LATE = 0.1  # seconds since the last look: nobody knows what was done meanwhile
_UNSEEN = "not looked at"
_BACKWARD = "_engine_run_backward"  # where a thread waits for that of backward


@dataclass
class Call:
    """Seconds in a function, and in those it calls."""

    seconds: float = 0.0
    inner: dict[str, Call] = field(default_factory=dict)

    def add(self, names: list[str], seconds: float) -> None:
        """Count time of a stack, the outermost function first."""
        here = self
        here.seconds += seconds
        for name in names:
            here = here.inner.setdefault(name, Call())
            here.seconds += seconds

    def lines(self, name: str, depth: int = 0) -> Iterator[str]:
        """The tree, indented."""
        here = self
        while found := [x for x in here.inner.items() if x[1].seconds > _ALONE * self.seconds]:
            name, here = found[0]
        yield f"{'  ' * depth}{self.seconds:6.2f} {name}"
        for inner, call in sorted(here.inner.items(), key=lambda x: -x[1].seconds):
            if call.seconds >= _LEAST:
                yield from call.lines(inner, depth + 1)


def stack(frame: FrameType | None) -> list[str]:
    """Functions on a stack, the outermost first, as "folder/file.py function"."""
    names = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{'/'.join(Path(code.co_filename).parts[-2:])} {code.co_name}")
        frame = frame.f_back
    return names[::-1]


def sample(tree: Call, main: int, done: threading.Event) -> None:
    """Until done, add what works to the tree."""
    last = time.perf_counter()
    while not done.wait(_EVERY):
        frames, now = sys._current_frames(), time.perf_counter()
        names = stack(frames.get(main))
        if names and names[-1].endswith(_BACKWARD):
            others = [stack(frame) for thread, frame in frames.items() if thread != main]
            names += next((x for x in others if x[0].startswith("autograd/function.py")), [])
        tree.add(names if now - last < _LATE else [_UNSEEN], now - last)
        last = now


class Collections:
    """Counts Python's collections of all its objects, as one of `gc.callbacks`."""

    def __init__(self) -> None:
        self.count, self.seconds, self.start = 0, 0.0, 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self.start = time.perf_counter()
        else:
            self.count += 1
            self.seconds += time.perf_counter() - self.start


def main() -> None:
    """Take a step, print the tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=compile_time.SIDES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cache", type=Path, help="folder of the caches; by default a new one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as new:
        os.environ.update(compile_time.caches(str(arguments.cache or new)))
        tree, done = Call(), threading.Event()
        sampler = threading.Thread(target=sample, args=(tree, threading.get_ident(), done))
        collections = Collections()
        gc.callbacks.append(collections)
        sampler.start()
        try:
            compile_time.first_step(arguments.side, arguments.layers, arguments.device)
        finally:  # or the process would wait for it for ever
            done.set()
            sampler.join()
            gc.callbacks.remove(collections)
    print("\n".join(tree.lines("all")))
    print(f"{collections.count} collections of all objects, {collections.seconds:.2f} s")


if __name__ == "__main__":
    main()
