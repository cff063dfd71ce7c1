"""Training throughput of plain stacks, as they are and converted, on this machine's GPU.

    PYTHONPATH=. python benchmarks/model.py [--shapes 16 24 36] [--batches 1 8] [--jobs 3]

Forward + backward of the blocks (no embedding, no LM head) in bfloat16, both sides compiled by
Inductor: medians of steps timed in turns, and the ratio of tokens per second to the unconverted
model's in the same run. Exits with 1 if a row is below its floor. "qwen" has many query heads a key
head, in the sizes of Qwen2.5-0.5B; it has no floor, and is not run unless asked for. --jobs: rows
compiled at a time, each in a process of its own; one of them is timed at a time. --quick: tiny
sizes, also on a CPU; no floors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import timing
import torch
from plain_stack import Shape, Stack
from results import Picture, add_arguments, publish
from tqdm import tqdm

import moda_compile
from moda_compile import MoDAConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "16": Shape(layers=16, width=1216, heads=16, kv_heads=16, head_dim=76, ffn=3248),
    "20": Shape(layers=20, width=1120, heads=16, kv_heads=16, head_dim=70, ffn=2992),
    "24": Shape(layers=24, width=1024, heads=16, kv_heads=16, head_dim=64, ffn=2736),
    "36": Shape(
        layers=36, width=1024, heads=16, kv_heads=8, head_dim=64, ffn=4096, batch=4, tokens=4096
    ),
    "qwen": Shape(layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864),
}
# (shape, batch) -> the least ratio with ffn_kv "none" and "projected".
FLOORS = {
    ("16", 1): (0.90, 0.76), ("20", 1): (0.90, 0.76), ("24", 1): (0.90, 0.76),
    ("16", 8): (0.89, 0.73), ("20", 8): (0.87, 0.70), ("24", 8): (0.81, 0.62),
    ("36", 4): (0.87, 0.75),
}  # fmt: skip
VARIANTS: dict[str, MoDAConfig | None] = {
    "plain": None,
    "none": MoDAConfig(),
    "projected": MoDAConfig(ffn_kv="projected"),
}


def step_of(shape: Shape, options: MoDAConfig | None) -> Callable[[], None]:
    """One step of forward and backward, compiled."""
    model: Any = Stack(shape).to(DEVICE, torch.bfloat16)
    x = shape.inputs(DEVICE, torch.bfloat16)
    call = torch.compile(model) if options is None else moda_compile.convert(model, options, (x,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        call(x).float().square().mean().backward()

    return step


def measure(name: str, shape: Shape, seconds: float, floors: bool) -> list[dict[str, Any]]:
    """The rows of one shape."""
    torch._dynamo.reset()
    steps, compiling, peaks = {}, {}, {}
    for variant, options in VARIANTS.items():
        start = time.perf_counter()
        steps[variant] = step_of(shape, options)
        steps[variant]()
        timing.synchronize()
        compiling[variant] = time.perf_counter() - start
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # other rows are compiled beside this one
    samples: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with timing.turn:
        if DEVICE == "cuda":
            for variant, step in steps.items():
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                peaks[variant] = (torch.cuda.max_memory_allocated() - before) / 2**20
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples["plain"]) < 5:
            for variant, step in steps.items():
                step()  # several of one kind at a time: a model's own steady state
                samples[variant] += [timing.once(step) for _ in range(3)]
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    rows = []
    least = (None, *FLOORS.get((name, shape.batch), (None, None)))
    plain = statistics.median(samples["plain"])
    for (variant, found), floor in zip(samples.items(), least, strict=True):
        taken = statistics.median(found)
        rows.append(
            {
                "shape": str(shape), "layers": shape.layers, "B": shape.batch, "T": shape.tokens,
                "ffn_kv": variant, "ms": taken,
                "tokens/s": int(shape.batch * shape.tokens / taken * 1e3),
                "of plain": plain / taken, "floor": floor if floors else None,
                "step's peak MiB": peaks.get(variant),
                "peak of plain": peaks[variant] / peaks["plain"] if peaks else None,
                "compile s": compiling[variant],
            }
        )  # fmt: skip
    return rows


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    for name in arguments.shapes:
        shape = SHAPES[name]
        if arguments.quick:
            yield name, replace(shape, layers=3, width=64, ffn=96, batch=1, tokens=64)
        elif name == "36":
            yield name, shape
        else:
            yield from ((name, replace(shape, batch=batch)) for batch in arguments.batches)


def results(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Each shape's rows, as they come."""
    work = [(n, s, arguments.seconds, not arguments.quick) for n, s in chosen(arguments)]
    yield from timing.each(measure, work, arguments.jobs)


PICTURE = Picture(
    x="layers", ys=("of plain",), split="ffn_kv", floor="floor", unit="tokens/s of plain"
)


def claims(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The README's rows: one for each stack."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["ffn_kv"] != "plain":
            what = f"training {row['shape']}, B={row['B']}, T={row['T']}: tokens/s of plain"
            floor = "" if row["floor"] is None else f" (floor {row['floor']})"
            found.setdefault(what, []).append(f"`{row['ffn_kv']}` {row['of plain']:.3f}{floor}")
    return [(what, ", ".join(figures)) for what, figures in found.items()]


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    with_floors = list(dict.fromkeys(shape for shape, _ in FLOORS))
    parser.add_argument("--shapes", nargs="+", default=with_floors, choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, a shape")
    parser.add_argument("--jobs", type=int, default=1, help="shapes compiled at a time")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no floors, also on a CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.quick:
        sys.exit("model: no CUDA device (--quick runs tiny sizes on a CPU).")
    arguments.seconds = 0.2 if arguments.quick else arguments.seconds
    rows: list[dict[str, Any]] = []
    for found in tqdm(results(arguments), desc="shapes", total=len(list(chosen(arguments)))):
        for row in found:
            print(row, flush=True)  # as they come: a run may be cut short
        rows += found
    rows.sort(key=lambda row: (row["layers"], row["B"]))
    held = [row for row in rows if row["floor"] is not None]
    publish(
        "model",
        "Training throughput of converted stacks over plain",
        rows,
        claims=claims(rows),
        picture=PICTURE,
        setting="bf16, forward + backward of the blocks, both sides compiled; medians, in turns",
        folder=arguments.out,
    )
    below = [row for row in held if row["of plain"] < row["floor"]]
    print(f"{len(held) - len(below)} of {len(held)} rows hold")
    sys.exit(len(below) > 0)


if __name__ == "__main__":
    main()
