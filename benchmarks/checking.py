"""Run checks on this machine's GPU, one after another or side by side: what check_*.py do as main.

A check is a name and a function that returns what its row says, or raises.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
from results import Row, add_arguments, machine, publish, versions

Check = tuple[str, Callable[[], str]]
Claims = Callable[[Sequence[Row]], list[tuple[str, str]]]
Errors = Mapping[str, tuple[float, float]]  # by name: the error, and what is allowed


def verdict(errors: Errors) -> str:
    """What a row says of a few tensors, each with its error / what is allowed.

    Raises:
        AssertionError: if an error is larger, or either is not finite.
    """
    said = " ".join(f"{name} {error:.0e}/{limit:.0e}" for name, (error, limit) in errors.items())
    # Nor is NaN; and where eager's own error is infinite, nothing has been compared.
    wrong = [name for name, (error, limit) in errors.items() if not error <= limit < math.inf]
    if wrong:
        raise AssertionError(f"{', '.join(wrong)} too far off: {said}")
    return said


def worst(errors: Errors) -> str:
    """`verdict` of many tensors: of the one whose error is the largest share of what is allowed."""

    def share(name: str) -> float:
        error, limit = errors[name]
        known = math.isfinite(limit) and not math.isnan(error)
        return error / limit if known else math.inf

    name = max(errors, key=share)
    return f"{share(name):.2f} of what is allowed: {verdict({name: errors[name]})}"


def claim(
    what: str, checks: Callable[[], Sequence[Check]], rows: Sequence[Row]
) -> list[tuple[str, str]]:
    """What the README's table says: how many of the checks passed, and how many never ran."""
    in_all = len(checks())
    rest = f" that ran, of {in_all}" if len(rows) < in_all else ""
    return [(what, counted(rows) + rest)]


def counted(rows: Sequence[Row]) -> str:
    """How many checks passed."""
    return f"{sum(row['passed'] for row in rows)} of {len(rows)}"


def main(about: str, checks: Callable[[], Sequence[Check]], claims: Claims) -> None:
    """Print a row for each check as it ends, and write them; exit with 1 if one fails.

    SIGTERM, as of `timeout`, ends it: what has been checked is written, and the exit is with 1.

    Args:
        about: the script's docstring.
        checks: of a module, not of a call: a process of its own asks for them again.
        claims: what the README's table says of the rows.
    """
    title = about.splitlines()[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--only", default="", help="run the checks whose row contains this text")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes: most of a check's time is its compilation"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device.")
    installed = ", ".join(f"{k} {v}" for k, v in versions().items())
    print(f"{machine()}; {installed}; error / allowed (eager's own error + rounding)", flush=True)
    rows = list(run(checks, arguments.only, arguments.jobs))
    print(f"{counted(rows)} checks passed")
    name = Path(sys.argv[0]).stem
    publish(name, title, rows, claims=claims(rows), folder=arguments.out, printed=True)
    complete = len(rows) == len(chosen(checks(), arguments.only))
    sys.exit(not (complete and all(row["passed"] for row in rows)))


def run(checks: Callable[[], Sequence[Check]], only: str = "", jobs: int = 1) -> Iterator[Row]:
    """A row of each check whose name contains `only`, in their order; printed when it ends."""
    wanted = chosen(checks(), only)
    return timing.until_told(_run(checks, wanted, jobs), len(wanted))


def chosen(checks: Sequence[Check], only: str) -> list[int]:
    """Which of them have a name that contains `only`."""
    return [i for i, (name, _) in enumerate(checks) if only in name]


def _run(checks: Callable[[], Sequence[Check]], wanted: list[int], jobs: int) -> Iterator[Row]:
    if jobs == 1:
        every = checks()
        yield from (guarded(*every[i]) for i in wanted)
        return
    # A process that has the GPU can't be forked.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(partial(_numbered, checks), wanted)


def _numbered(checks: Callable[[], Sequence[Check]], number: int) -> Row:
    return guarded(*checks()[number])


def guarded(name: str, check: Callable[[], str]) -> Row:
    """Run a check and print its row."""
    row: dict[str, Any] = {"check": " ".join(name.split()), "passed": False}
    start = time.perf_counter()
    try:
        row["said"] = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        row["passed"] = True
        printed = f"ok   {name}: {row['said']}"
    except Exception as error:
        row["said"] = f"{type(error).__name__}: {error}"
        last = "\n        ".join(traceback.format_exc().strip().splitlines()[-6:])
        printed = f"FAIL {name}\n        {last}"
    finally:
        torch.cuda.empty_cache()
    row["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{printed} ({row['seconds']} s)", flush=True)
    return row
