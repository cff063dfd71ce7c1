"""Peak memory of a training step against the number of layers, as it is and converted.

    PYTHONPATH=. python benchmarks/memory.py [--layers 12 24 36]

Forward + backward of the blocks in bfloat16 through Inductor: the peak of a step over what the
weights, their gradients and the input hold anyway, and over the plain model's. The plain stack of
model.py's last shape, B=1. Exits with 1 where a converted model takes more than its bound.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from typing import Any

import timing
import torch
from model import SHAPES, VARIANTS, step_of
from results import Picture, add_arguments, publish
from tqdm import tqdm

BOUND = 1.15  # of the whole peak, with attention slots, at 36 layers


def peak(shape: Any, variant: str) -> tuple[float, float]:
    """MiB of the whole step's peak, and of what was there before it: of this process's tensors."""
    torch._dynamo.reset()
    step = step_of(shape, VARIANTS[variant])
    step()
    step()
    timing.synchronize()
    before = torch.cuda.memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    step()
    timing.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20, before


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=[12, 24, 36])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--jobs", type=int, default=1, help="models compiled at a time")
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("memory: no CUDA device.")
    rows: list[dict[str, Any]] = []
    sizes = [
        replace(SHAPES["36"], layers=n, batch=1, tokens=arguments.tokens) for n in arguments.layers
    ]
    work = [(shape, variant) for shape in sizes for variant in VARIANTS]
    peaks = timing.each(peak, work, arguments.jobs)
    for (shape, variant), (most, before) in tqdm(
        zip(work, peaks, strict=True), desc="models", total=len(work)
    ):
        layers = shape.layers
        plain = next((x["peak MiB"] for x in rows if x["layers"] == layers), most)
        slot = 2 * shape.tokens * shape.kv_heads * shape.head_dim * 2 / 2**20
        rows.append(
            {
                "layers": layers, "ffn_kv": variant, "peak MiB": most, "step's MiB": most - before,
                "of plain": most / plain, "slots MiB": (layers - 1) * slot,
                "bound": BOUND if variant == "none" and layers == 36 else None,
            }
        )  # fmt: skip
        torch.cuda.empty_cache()
    grown = {
        v: [x["step's MiB"] for x in rows if x["ffn_kv"] == v] for v in VARIANTS if v != "plain"
    }
    said = []
    for variant, found in grown.items():
        rates = [
            (after - before) / (more - layers)
            for (layers, before), (more, after) in itertools.pairwise(
                zip(arguments.layers, found, strict=True)
            )
        ]
        said.append(f"{variant} {', '.join(f'{rate:.0f}' for rate in rates)}")
    last = [row for row in rows if row["layers"] == max(arguments.layers)]
    publish(
        "memory",
        "Peak memory of a training step against layers",
        rows,
        claims=[
            (
                f"peak training memory over plain, {max(arguments.layers)} layers, "
                f"`none` (at most {BOUND}), `projected`",
                ", ".join(f"{row['of plain']:.3f}x" for row in last if row["ffn_kv"] != "plain"),
            ),
            ("what a layer adds to a step's peak between these depths, MiB", "; ".join(said)),
        ],
        picture=Picture(x="layers", ys=("peak MiB",), split="ffn_kv", unit="peak MiB"),
        setting=f"bf16, B=1, T={arguments.tokens}, {SHAPES['36']}; weights and gradients counted",
        folder=arguments.out,
    )
    sys.exit(any(row["bound"] and row["of plain"] > row["bound"] for row in rows))


if __name__ == "__main__":
    main()
