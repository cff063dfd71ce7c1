"""How long the first training step takes, cold and warm, as it is and converted.

    PYTHONPATH=. python benchmarks/compile_time.py [--layers 12] [--device cpu]

Each run is a process of its own, imports and the model's making not counted: "cold" with empty
caches, "warm" with those that the cold one left. Backend: Inductor, forward and backward. The
sides' runs take turns. Memory of a step is not the matter here, so sizes are small.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import triton
from torch._dynamo.utils import counters
from tqdm import tqdm

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.report import table
from moda_compile.testing import RandomStack, StackConfig

SIDES = ("plain", "none", "projected")


def first_step(side: str, layers: int, device: str) -> None:
    """Print the seconds of the first step, and how many graphs came out of a cache."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = StackConfig(
        layers=layers, kv_heads=4, groups=2, head_dim=64, norm="rms_functional", rotary="half",
        ffn="swiglu", batch=2, length=128,
    )  # fmt: skip
    model = RandomStack(config).to(device, dtype)
    (tokens,) = (x.to(device) for x in config.inputs())
    (tokens * 1.0).sum().item()  # the device is up
    start = time.perf_counter()
    call = torch.compile(model)
    if side != "plain":
        call = moda_compile.convert(model, MoDAConfig(ffn_kv=side), (tokens,))  # type: ignore[arg-type]
    call(tokens).float().square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    hits = (
        counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    )
    print("RESULT", seconds, hits)


def run(side: str, layers: int, device: str, cache: str) -> tuple[float, int]:
    """The same, in a process of its own with its caches under a folder."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
    }
    command = [sys.executable, __file__, "--side", side, "--layers", str(layers)]
    done = subprocess.run(
        [*command, "--device", device], env=environment, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    _, seconds, hits = found[0].split()
    return float(seconds), int(hits)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", choices=SIDES, help="only print one step's seconds")
    args = parser.parse_args()
    if args.side is not None:
        first_step(args.side, args.layers, args.device)
        return
    cold: dict[str, list[float]] = {side: [] for side in SIDES}
    warm: dict[str, list[float]] = {side: [] for side in SIDES}
    hits: dict[str, int] = {}
    for side in tqdm([side for _ in range(args.runs) for side in SIDES], desc="processes"):
        with tempfile.TemporaryDirectory() as cache:
            cold[side].append(run(side, args.layers, args.device, cache)[0])
            seconds, hits[side] = run(side, args.layers, args.device, cache)
            warm[side].append(seconds)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}; {args.layers} layers")
    rows = [("model", "cold s", "of plain", "warm s", "of plain", "graphs from a cache")]
    for side in SIDES:
        first, second = (statistics.median(x[side]) for x in (cold, warm))
        ratios = (x / statistics.median(of["plain"]) for x, of in ((first, cold), (second, warm)))
        of_cold, of_warm = (f"{x:.2f}" for x in ratios)
        rows.append((side, f"{first:.1f}", of_cold, f"{second:.1f}", of_warm, str(hits[side])))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
