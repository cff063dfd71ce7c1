"""Run checks on this machine's GPU, one after another or side by side: what check_*.py do as main.

A check is a name and a function that returns the rest of its row, or raises.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton

Check = tuple[str, Callable[[], str]]


def main(about: str, checks: Callable[[], Sequence[Check]]) -> None:
    """Print a row for each check as it ends; exit with 1 if one fails.

    Args:
        about: the script's docstring.
        checks: of a module, not of a call: a process of its own asks for them again.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--only", default="", help="run the checks whose row contains this text")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes: most of a check's time is its compilation"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device.")
    cudnn = torch.backends.cudnn.version()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"cuDNN {cudnn}; each entry: error / allowed (eager's own error + rounding)", flush=True)
    passed = run(checks, arguments.only, arguments.jobs)
    print(f"{passed.count(True)} of {len(passed)} checks passed")
    sys.exit(not all(passed))


def run(checks: Callable[[], Sequence[Check]], only: str = "", jobs: int = 1) -> list[bool]:
    """Whether each check passed whose name contains `only`."""
    every = checks()
    chosen = [i for i, (name, _) in enumerate(every) if only in name]
    if jobs == 1:
        return [guarded(*every[i]) for i in chosen]
    # A process that has the GPU can't be forked.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.map(partial(_numbered, checks), chosen, chunksize=1)


def _numbered(checks: Callable[[], Sequence[Check]], number: int) -> bool:
    return guarded(*checks()[number])


def guarded(name: str, check: Callable[[], str]) -> bool:
    """Run a check, print its row, and report whether it passed."""
    start = time.perf_counter()
    try:
        note = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        last = "\n        ".join(traceback.format_exc().strip().splitlines()[-6:])
        print(f"FAIL {name}\n        {last}", flush=True)
        return False
    finally:
        torch.cuda.empty_cache()
    print(f"ok   {name}: {note} ({time.perf_counter() - start:.1f} s)", flush=True)
    return True
