"""Run small cases of every kernel under NVIDIA's compute-sanitizer, on this machine's GPU.

    PYTHONPATH=. python benchmarks/sanitize.py [--tools memcheck racecheck initcheck]

Each tool runs the same cases in a process of its own, all at once, with an allocation for every
tensor, so that a neighbour's memory is nobody's: memcheck finds accesses out of bounds, racecheck
threads that race in shared memory, initcheck reads of what nobody wrote. The cases' results are
checked against float64 as well. Exits with 1 if a tool found something in one of our kernels, or a
case failed; what it found in others' kernels is printed and doesn't count.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import check_decode
import check_gather
import check_gpu
import checking
import torch
import triton
from check_gpu import BF16, FP16, FP32
from results import add_arguments, publish
from tqdm import tqdm

from moda_compile import kernels

TOOLS = ("memcheck", "racecheck", "initcheck")
# memcheck and initcheck say "at kernel+0x10", racecheck "access at kernel+0x10".
_PLACE = re.compile(r"^=+ .*?\bat (?:void )?([A-Za-z_]\w*(?:::\w+)*).*?\+0x", re.MULTILINE)
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ", re.MULTILINE)


def checks() -> list[checking.Check]:
    """Every kernel, with full and partial tiles, aligned rows and not, in the three dtypes."""
    found: list[checking.Check] = []
    attention = check_gpu.Case(t=17, s=5, sequence="efficient")
    for case in (
        attention,
        replace(attention, mode="stacked", dtype=FP16),
        replace(attention, dtype=FP32, d=76, g=2, sequence=""),
        replace(attention, d=128, g=32, hk=1),
        replace(attention, g=1),
        replace(attention, g=3, d=80, mode="stacked"),
        replace(attention, g=1, d=76, layout="slice", accumulator=BF16),
        replace(attention, g=2, layout="mixed", s=17),
        replace(attention, g=1, d=70, layout="odd_offset", dtype=FP16),
        replace(attention, sequence="", t=3, past=130),
        replace(attention, sequence="", mask="alibi + gradient", causal=False, g=2),
        replace(attention, sequence="fused"),
        replace(attention, sequence="fused", d=76, g=1, dtype=FP32, t=9),
        replace(attention, sequence="fused", mode="stacked", mask="bool", causal=False, g=3),
    ):
        found.append((f"attention {case}", partial(check_gpu.check, case)))
    gather = check_gather.Case(t=17, readers=(3, 2))
    for own in (
        gather,
        replace(gather, g=2, readers=(5, 4)),
        replace(gather, g=2, d=76, layout="slice"),
        replace(gather, g=4, made=FP32, readers=(3, 1)),
        replace(gather, readers=(5, 4, 3, 2), begun=2),
        replace(gather, g=3, d=76, readers=(4, 3, 2), begun=2, layout="mixed"),
        replace(gather, d=70, layout="odd_offset", dtype=FP16, made=FP16),
    ):
        found.append((f"gather {own}", partial(check_gather.check, own)))
    decode = check_decode.Case(keys=131)
    for one in (
        decode,
        replace(decode, slots="table", queries=3, causal=True, d=80),
        replace(decode, slots="stacked", dtype=FP32, d=24, mask="position"),
        replace(decode, g=8, queries=16, mask="alibi", layout="mixed"),
    ):
        found.append((f"decode {one}", partial(check_decode.check, one)))
    return found


def own_kernels() -> set[str]:
    """Names of the package's Triton kernels."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    }


def sanitized(tool: str, log: Path) -> subprocess.Popen[bytes]:
    """This script's cases under a tool, started; what they print goes to the file `log`."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100000"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, sys.executable, "-u", __file__, "--cases"],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def main() -> None:
    """Run the tools, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop the tools after that")
    parser.add_argument("--cases", action="store_true", help="run the cases, without a tool")
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sanitize: no CUDA device.")
    if arguments.cases:
        # cuDNN's kernels store through the bulk copy engine, which initcheck doesn't see: all that
        # reads their results would be reported.
        torch.backends.cuda.enable_cudnn_sdp(False)
        ran = list(checking.run(checks))
        print(f"{checking.counted(ran)} checks passed")
        sys.exit(not all(row["passed"] for row in ran))
    if shutil.which("compute-sanitizer") is None:
        sys.exit("sanitize: compute-sanitizer, of NVIDIA's CUDA toolkit, is not on the PATH.")
    names, rows, failed = own_kernels(), [], False
    folder = Path(tempfile.mkdtemp())
    end = time.monotonic() + arguments.seconds
    running = [(tool, sanitized(tool, folder / tool)) for tool in arguments.tools]
    for tool, process in tqdm(running, desc="tools"):
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        text = (folder / tool).read_text(errors="replace")
        places = Counter(_PLACE.findall(text))
        ours = sum(count for name, count in places.items() if name in names)
        summary = _SUMMARY.search(text)
        good = len(re.findall(r"^ok ", text, re.MULTILINE))
        total = len(list(checks()))
        wrong = ours > 0 or good < total or summary is None
        failed |= wrong
        if wrong:
            print(f"== {tool}\n{text[-6000:]}", flush=True)
        rows.append(
            {
                "tool": tool, "cases": f"{good} of {total}", "in our kernels": ours,
                "reported in all": None if summary is None else int(summary[1]),
                "elsewhere": ", ".join(f"{n} {c}" for n, c in places.items() if n not in names),
            }
        )  # fmt: skip
    publish(
        "sanitize",
        "compute-sanitizer over small cases of every kernel",
        rows,
        claims=[
            (
                f"compute-sanitizer ({', '.join(arguments.tools)}), errors in our kernels",
                f"{sum(row['in our kernels'] for row in rows)} in {rows[0]['cases']} cases",
            )
        ],
        setting="every tensor an allocation of its own",
        folder=arguments.out,
    )
    sys.exit(failed)


if __name__ == "__main__":
    main()
