"""What the hardware's counters say of the depth kernels, on this machine's GPU.

    PYTHONPATH=. python benchmarks/counters.py [--ncu /usr/local/cuda/bin/ncu]

Nsight Compute reads, for each kernel and shape: its time, the bytes that went to and from the
memory over those that must, how busy memory, multiprocessors and tensor cores were, of what the
hardware can, and how many warps were there to hide latency. Shapes are those of benchmarks/model.py
(one layer in the middle of a stack) and of benchmarks/kernel_table.py.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from depth_kernels import Shape, rows
from results import add_arguments, publish
from torch import Tensor

from moda_compile.kernels import configs, depth_backward, depth_forward, depth_gather, slot_table

DTYPE = torch.bfloat16
SHAPES = (
    Shape(8, 2048, 16, 1, 64, 12),
    Shape(8, 2048, 16, 1, 80, 8),
    Shape(4, 4096, 8, 2, 64, 18),
    Shape(8, 2048, 4, 4, 64, 12),
    Shape(1, 4096, 8, 8, 64, 64),
    Shape(1, 4096, 8, 8, 128, 64),
    Shape(1, 4096, 8, 32, 64, 64),
)
METRICS = {
    "us": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "memory %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "SM %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor cores %": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "warps % of most": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
TIMES = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def launches() -> Iterator[tuple[Shape, str, float, Callable[[], Any]]]:
    """(shape, kernel, bytes that must move, a call that launches it once)."""
    for shape in SHAPES:
        torch.manual_seed(0)
        heads, scale = shape.kv_heads * shape.group, shape.head_dim**-0.5
        q, sequence_out, grad, sequence_dq = (rows(shape, heads) for _ in range(4))
        size = (shape.batch, heads, shape.tokens)
        lse = torch.randn(size, device="cuda") + 4
        sides = [[rows(shape, shape.kv_heads) for _ in range(shape.slots)] for _ in range(2)]
        table = slot_table.table(*sides)
        yield (
            shape, "forward", shape.bytes(None),
            partial(depth_forward.run, q, sequence_out, lse, table, scale),
        )  # fmt: skip
        # Gathered where they are small, gradients of larger groups are the backward kernel's.
        products = configs.products(head_dim=shape.head_dim, group=shape.group, dtype=DTYPE)
        gathered = products == "vector"
        made: list[Tensor | None] = [None, None]
        if not gathered:
            slots = (shape.slots, shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
            made = [torch.empty(slots, device="cuda", dtype=DTYPE).transpose(2, 3) for _ in "kv"]
        yield (
            shape, "backward", shape.bytes(0 if gathered else DTYPE.itemsize),
            partial(
                depth_backward.run, grad, q, sequence_out, lse, sequence_dq, table, *made,
                accumulate=False, scale=scale,
            ),
        )  # fmt: skip
        if gathered:
            queries, grads = ([rows(shape, heads) for _ in range(shape.slots)] for _ in range(2))
            lses, deltas = (
                [torch.randn(size, device="cuda") + 4 for _ in queries] for _ in range(2)
            )
            for begun in (0, 2):
                keys, values = (side[: 2 + begun] for side in sides)
                readers = (shape.slots, shape.slots - 1, *[shape.slots] * begun)
                yield (
                    shape, f"gather, {begun} begun" if begun else "gather",
                    shape.gather_bytes(shape.slots, begun=begun),
                    partial(
                        depth_gather.run, grads, queries, lses, deltas, keys, values, readers,
                        scale=scale, dtype=DTYPE, unfinished=begun,
                    ),
                )  # fmt: skip
        torch.cuda.empty_cache()


def counted(ncu: str) -> list[dict[str, str]]:
    """The counters of each launch of a depth kernel, in order, as text with its unit behind."""
    command = [
        ncu, "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", "regex:^depth_",
        "--metrics", ",".join(METRICS.values()), sys.executable, __file__, "--launch",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        sys.exit(f"counters: {command[0]} printed no table.\n{done.stdout[-2000:]}{done.stderr}")
    units, *found = csv.DictReader(lines)
    return [{name: f"{row[name]} {units[name]}" for name in METRICS.values()} for row in found]


def number(text: str) -> float:
    """Of a counter: bytes, microseconds, or as it is."""
    value, _, unit = text.partition(" ")
    return float(value.replace(",", "")) * UNITS.get(unit, TIMES.get(unit, 1.0))


def claims(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The README's row."""
    said = []
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        busy = [row["memory %"] for row in found if row["kernel"] == kernel]
        said.append(f"{kernel} {min(busy):.0f} to {max(busy):.0f} %")
    text = "memory bandwidth of the depth kernels, of the hardware's, by its counters"
    return [(text, "; ".join(said))]


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ncu", default=shutil.which("ncu"), help="Nsight Compute's command")
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, each twice")
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("counters: no CUDA device.")
    if arguments.launch:
        for _, _, _, call in launches():
            call()  # compiles it
            call()
        return
    if arguments.ncu is None:
        sys.exit("counters: ncu, of NVIDIA's Nsight Compute, is not on the PATH; --ncu says where.")
    every_second = counted(arguments.ncu)[1::2]
    found: list[dict[str, Any]] = []
    for (shape, kernel, least, _), counters in zip(launches(), every_second, strict=True):
        values = {name: number(counters[metric]) for name, metric in METRICS.items()}
        moved = values.pop("read") + values.pop("written")
        taken = values.pop("us")
        found.append(
            {"shape": str(shape), "kernel": kernel, "us": taken, "moved / least": moved / least}
            | {"TB/s": moved / taken * 1e-6}
            | values
        )
    publish(
        "counters",
        "Hardware counters of the depth kernels",
        found,
        claims=claims(found),
        setting=f"{DTYPE}; caches empty in front of each launch; clocks as they are",
        folder=arguments.out,
    )


if __name__ == "__main__":
    main()
