"""The table of model families: what converts, how it was checked, and what is refused and why.

    PYTHONPATH=. python benchmarks/families.py [NAME ...]

Runs every case of every family of tests/models/families on the CPU (or of those named, keeping
the others' results), prints the table, writes benchmarks/results/families.json and puts the table
between its markers in README.md; benchmarks/readme.py puts the number of cases among the figures.
A case that fails is printed and counted, and the exit status is 1. Some six minutes on a quiet
core.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from results import PREFIX, machine, versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.models.families.check import check, refusal, small  # noqa: E402
from tests.models.families.refused import RefusedFamily  # noqa: E402
from tests.models.families.row import Family, cases  # noqa: E402
from tests.models.families.table import (  # noqa: E402
    FAMILIES,
    NOT_CONVERTED,
    RESULTS,
    load,
    put_into,
    render,
    version,
)

README = RESULTS.parents[2] / "README.md"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; default: all")
    names = parser.parse_args().names or [*FAMILIES, *NOT_CONVERTED]
    torch.set_num_threads(1)
    results: dict[str, Any] = {"families": {}, "refused": {}}
    if RESULTS.exists():
        results = load()
    results["torch"] = torch.__version__.partition("+")[0]
    for name in names:
        if name in FAMILIES:
            results["families"][name] = measure(FAMILIES[name])
        else:
            results["refused"][name] = ask(NOT_CONVERTED[name])
    results |= found_in(results["families"])
    order = {"families": FAMILIES, "refused": NOT_CONVERTED}
    for part, rows in order.items():  # those of the table, in its order
        results[part] = {n: results[part][n] for n in rows if n in results[part]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    README.write_text(
        put_into(README.read_text(encoding="utf-8"), render(results)), encoding="utf-8"
    )
    print(render(results))
    failed = [
        f"{name} {case}"
        for name, found in results["families"].items()
        for case, result in found["cases"].items()
        if not result["passed"]
    ]
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")


def found_in(families: dict[str, Any]) -> dict[str, Any]:
    """What benchmarks/readme.py shows of them."""
    passed = [case["passed"] for found in families.values() for case in found["cases"].values()]
    what = f"{len(families)} families of models, forward and every gradient against float64"
    return {
        "command": f"{PREFIX}benchmarks/families.py",
        "machine": machine(),
        "versions": versions(),
        "claims": [[f"{what} ([table](#supported-and-not))", f"{sum(passed)} of {len(passed)}"]],
        "picture": None,
    }


def measure(family: Family) -> dict[str, Any]:
    """Version and, by case, whether it passed and the worst error in units of what is allowed."""
    found = {}
    for case in cases(family):
        torch._dynamo.reset()
        print(f"{family.name} {case} ...", end=" ", file=sys.stderr, flush=True)
        try:
            compared = check(family, case)
            worst = max(c.error / (c.eager_error + c.budget) for c in compared)
            result: dict[str, Any] = {"passed": True, "worst": round(worst, 2)}
        except Exception as error:
            traceback.print_exc()
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:300]}
        found[str(case)] = result
        print(result, file=sys.stderr, flush=True)
    return {"version": version(family.library), "cases": found}


def ask(family: RefusedFamily) -> dict[str, Any]:
    """Version, and what `convert` says."""
    torch._dynamo.reset()
    error = refusal(small(family), family.inputs("none"))
    return {"version": version(family.library), "reason": error.reason, "fix": error.fix}


if __name__ == "__main__":
    main()
