"""Thousands of random models, in one command:

    python -m moda_compile.testing.soak --count 2000 --seed 7 --jobs 2

Prints how many were run and of which kinds, and for each failure the smallest example found, as a
runnable reproduction.  The exit status is 1 if there was any.  Needs `moda-compile[testing]`.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moda_compile.testing.cases import Case
from moda_compile.testing.shrink import simplest
from moda_compile.testing.strategy import CASE_FEATURES, cases

CHUNK = 20  # examples drawn from one seed


@dataclass(kw_only=True)
class Outcome:
    """How many examples were run, how many of each kind, and how they failed.

    Attributes:
        run: number of examples.
        kinds: how many of them were of each kind.
        failures: how many failed, by headline.
        details: by headline, the message and a reproduction of the simplest one found.
    """

    run: int = 0
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Count the other's examples as well."""
        self.run += other.run
        self.kinds.update(other.kinds)
        self.failures.update(other.failures)
        self.details = other.details | self.details


def run_chunk(
    seed: int,
    count: int,
    features: Sequence[str],
    shrink: float = 300.0,
    known: frozenset[str] = frozenset(),
) -> Outcome:
    """Draw and check `count` examples from `seed`; shrink failures, for so many seconds each.

    `known` are headlines that need no reproduction any more.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase

    torch.set_num_threads(1)
    outcome = Outcome()
    first: dict[str, tuple[Case, Exception]] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=cases(features=features))
    def draw(case: Case) -> None:
        outcome.run += 1
        outcome.kinds.update(set(case.kinds()))
        try:
            case.check()
        except Exception as error:
            outcome.failures[headline(error)] += 1
            first.setdefault(headline(error), (case, error))

    try:
        draw()
    except Exception as broken:  # of the generator itself: the rest of the chunk is lost
        outcome.failures[headline(broken)] += 1
        outcome.details[headline(broken)] = traceback.format_exc()
    for name in sorted(first.keys() - known):
        case, error = smaller(*first[name], seconds=shrink)
        message = "".join(traceback.format_exception_only(error))
        outcome.details[name] = f"{message}\n{reproduction(case)}"
    return outcome


def headline(error: Exception) -> str:
    """Which failure it is, without names of blocks, places and figures."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: " + re.sub(r"\S*\d\S*", "#", first)


def smaller(case: Case, error: Exception, *, seconds: float) -> tuple[Case, Exception]:
    """The simplest case that fails in the same way, and how; the best found in so many seconds."""
    errors = {case: error}
    deadline = time.monotonic() + seconds

    def fails(other: Case) -> bool:
        if time.monotonic() > deadline or not other.answerable():
            return False
        try:
            other.check()
        except Exception as raised:
            errors[other] = raised
            return headline(raised) == headline(error)
        return False

    case = simplest(case, fails)
    return case, errors[case]


def reproduction(case: Case) -> str:
    """Runnable."""
    return f"    from moda_compile.testing import *\n    {case!r}.check()"


def outcomes(
    seed: int, count: int, jobs: int, features: Sequence[str], shrink: float
) -> Iterator[Outcome]:
    """Of chunk after chunk."""
    chunks = [
        (1000 * seed + number, min(CHUNK, count - start))
        for number, start in enumerate(range(0, count, CHUNK))
    ]
    known: set[str] = set()
    if jobs == 1:
        for chunk in chunks:
            outcome = run_chunk(*chunk, features, shrink, frozenset(known))
            known |= outcome.details.keys()
            yield outcome
        return
    # A fresh process now and then: Dynamo never forgets everything.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=5) as pool:
        waiting: collections.deque[Any] = collections.deque()
        while chunks or waiting:
            while chunks and len(waiting) < 2 * jobs:
                arguments = (*chunks.pop(0), features, shrink, frozenset(known))
                waiting.append(pool.apply_async(run_chunk, arguments))
            outcome = waiting.popleft().get()
            known |= outcome.details.keys()
            yield outcome


def progress(found: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """With a bar on a terminal where tqdm is installed, else with a line now and then."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    done = 0
    if tqdm is None or not sys.stderr.isatty():
        for outcome in found:
            done += outcome.run
            print(f"{done} of {count} examples", file=sys.stderr, flush=True)
            yield outcome
        return
    with tqdm(total=count, unit="model", smoothing=0) as bar:
        for outcome in found:
            bar.update(outcome.run)
            yield outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moda_compile.testing.soak")
    parser.add_argument("--count", type=int, default=2000, help="examples to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", nargs="+", choices=CASE_FEATURES, default=CASE_FEATURES)
    parser.add_argument("--without", nargs="+", choices=CASE_FEATURES, default=())
    parser.add_argument("--shrink", type=float, default=300.0, help="seconds for each failure")
    options = parser.parse_args(arguments)
    features = [name for name in options.only if name not in options.without]
    total, start = Outcome(), time.monotonic()
    runs = outcomes(options.seed, options.count, options.jobs, features, options.shrink)
    try:
        for outcome in progress(runs, options.count):
            for name in outcome.details.keys() - total.details.keys():
                print(f"\nFAILURE {name}\n{outcome.details[name]}\n", flush=True)
            total.add(outcome)
    except KeyboardInterrupt:  # what has been found is worth reading
        pass
    print(f"{total.run} examples in {time.monotonic() - start:.0f} s, seed {options.seed}; kinds:")
    for kind, number in sorted(total.kinds.items(), key=lambda item: (-item[1], item[0])):
        print(f"{number:6d}  {kind}")
    print(f"{sum(total.failures.values())} failures, {len(total.failures)} distinct")
    for name, number in total.failures.most_common():
        print(f"{number:6d}  {name}")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
