"""The Triton kernels, forward and every gradient, in Triton's interpreter on the CPU.

One process runs all cases (tests/kernels/interpreter_cases.py): the interpreter must be chosen
before Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("interpreter_cases.py")
EPS = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def tolerance(name: str, case: dict[str, Any], eager: float) -> float:
    """The error that eager PyTorch makes in the same precision, and a rounding budget."""
    # A relative error of 2^-23 in a score of size |z| is an error of |z| 2^-23 in exp(z).
    exact = (8 + abs(case.get("shift", 0.0))) * EPS["fp32"]
    if name == "lse":
        return exact  # float32 throughout, from whatever inputs
    if case["dtype"] == "fp32":
        return eager + exact
    # Once more than eager: p and dz are rounded to 16 bits for the products, or a 16-bit
    # accumulator is. Twice half a unit, because the interpreter truncates to bfloat16.
    return eager + EPS[case["dtype"]]


def test_every_case_ran(lines: list[dict[str, Any]]) -> None:
    failures = [(x["case"], x["traceback"]) for x in lines if "traceback" in x]
    assert failures == []
    assert len(lines) == 192


def test_errors_stay_within_eager_plus_rounding(lines: list[dict[str, Any]]) -> None:
    wrong = []
    for line in lines:
        case, result = line["case"], line["result"]
        for name, error in result["error"].items():
            limit = tolerance(name, case, result["eager"][name])
            if not error <= limit:  # NaN is not <= anything
                wrong.append((name, error, limit, case))
    assert wrong == []


def test_rows_past_the_last_slot_keep_their_bits(lines: list[dict[str, Any]]) -> None:
    assert [x["case"] for x in lines if not x["result"]["untouched"]] == []


def test_results_are_token_major(lines: list[dict[str, Any]]) -> None:
    assert [x["case"] for x in lines if not x["result"]["token_major"]] == []


def test_dtypes(lines: list[dict[str, Any]]) -> None:
    names = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
    for line in lines:
        own = names[line["case"]["dtype"]]
        assert line["result"]["dtypes"] == [own, "torch.float32", own, own, own]
