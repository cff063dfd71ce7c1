"""How long the first training step takes, cold and warm, as it is and converted.

    PYTHONPATH=. python benchmarks/compile_time.py [--layers 12] [--jobs 3] [--device cpu]

Each run is a process of its own, imports (of both sides' compilers) and the model's making not
counted: "cold" with empty caches, "warm" with those that the cold one left. Backend: Inductor,
forward and backward. The sides' runs take turns, or, with --jobs 3, go side by side, where a
machine has cores enough, of which each then gives Inductor a third. Memory of a step is not the
matter here, so sizes are small.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import timing
import torch
from results import add_arguments, publish
from torch._dynamo.utils import counters
from tqdm import tqdm

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.testing import RandomStack, StackConfig

SIDES = ("plain", "none", "projected")
FLOOR = 1.3


def compiled_here() -> list[str]:
    """Names of the kernels that this process has Triton compile from now on, for want of them in
    its cache.
    """
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(src.name)

    with contextlib.suppress(ImportError):  # a CPU needs no Triton
        triton = importlib.import_module("triton")
        triton.knobs.compilation.listener = listen
    return names


def caches(folder: str) -> dict[str, str]:
    """Variables of the environment that have Inductor and Triton keep what they make there."""
    return {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}


def first_step(side: str, layers: int, device: str) -> None:
    """Print the seconds of the first step, how many graphs came out of a cache, and which kernels
    Triton had to compile in this process.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = StackConfig(
        layers=layers, kv_heads=4, groups=2, head_dim=64, norm="rms_functional", rotary="half",
        ffn="swiglu", batch=2, length=128,
    )  # fmt: skip
    model = RandomStack(config).to(device, dtype)
    (tokens,) = (x.to(device) for x in config.inputs())
    (tokens * 1.0).sum().item()  # the device is up
    for name in ("torch._inductor.compile_fx", "triton", "moda_compile.kernels.split"):
        with contextlib.suppress(ImportError):  # a CPU needs no Triton
            importlib.import_module(name)
    kernels = compiled_here()
    start = time.perf_counter()
    call = torch.compile(model)
    if side != "plain":
        call = moda_compile.convert(model, MoDAConfig(ffn_kv=side), (tokens,))  # type: ignore[arg-type]
    call(tokens).float().square().mean().backward()
    timing.synchronize()
    seconds = time.perf_counter() - start
    hits = (
        counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    )
    print("RESULT", seconds, hits, *kernels)


def run(side: str, layers: int, device: str, cache: str) -> tuple[float, int, int]:
    """Seconds, graphs and how many kernels, in a process of its own with its caches in a folder."""
    environment = os.environ | caches(cache)
    command = [sys.executable, __file__, "--side", side, "--layers", str(layers)]
    done = subprocess.run(
        [*command, "--device", device], env=environment, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    _, seconds, hits, *kernels = found[0].split()
    return float(seconds), int(hits), len(kernels)


def cold_and_warm(side: str, layers: int, device: str) -> tuple[str, float, float, int, int]:
    """The side, its seconds cold and warm, and of the second run how many graphs came out of a
    cache and how many kernels did not.
    """
    with tempfile.TemporaryDirectory() as cache:
        cold, *_ = run(side, layers, device, cache)
        return side, cold, *run(side, layers, device, cache)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="sides that run at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_arguments(parser)
    parser.add_argument("--side", choices=SIDES, help="only print one step's seconds")
    args = parser.parse_args()
    if args.side is not None:
        first_step(args.side, args.layers, args.device)
        return
    cold: dict[str, list[float]] = {side: [] for side in SIDES}
    warm: dict[str, list[float]] = {side: [] for side in SIDES}
    hits: dict[str, int] = {}
    misses: dict[str, int] = {}
    work = [(side, args.layers, args.device) for _ in range(args.runs) for side in SIDES]
    done = timing.each(cold_and_warm, work, args.jobs)
    for side, first, second, found, made in tqdm(done, desc="processes", total=len(work)):
        cold[side].append(first)
        warm[side].append(second)
        hits[side], misses[side] = found, made
    if not all(cold.values()):
        raise SystemExit("not every side has run; nothing to compare")
    rows = []
    for side in SIDES:
        first, second = (statistics.median(x[side]) for x in (cold, warm))
        of_cold, of_warm = (
            x / statistics.median(of["plain"]) for x, of in ((first, cold), (second, warm))
        )
        rows.append(
            {
                "model": side, "cold s": first, "cold of plain": of_cold, "floor": FLOOR,
                "warm s": second, "warm of plain": of_warm, "graphs from a cache": hits[side],
                "kernels compiled": misses[side],
            }
        )  # fmt: skip
    said = ", ".join(f"{row['cold of plain']:.2f}x" for row in rows[1:])
    warmed = ", ".join(f"{row['warm s']:.1f} of {row['cold s']:.1f} s" for row in rows)
    publish(
        "compile_time",
        f"First training step of {args.layers} layers, cold and from Inductor's caches",
        rows,
        claims=[
            (
                f"cold compile of {args.layers} layers over plain: `none`, `projected` "
                f"(at most {FLOOR}x)",
                said,
            ),
            ("a second process's first step of the cold one's: plain and these", warmed),
        ],
        setting="medians of processes of their own, the sides "
        + ("in turns" if args.jobs == 1 else "side by side")
        + "; imports not counted",
        folder=args.out,
    )


if __name__ == "__main__":
    main()
