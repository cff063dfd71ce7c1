"""The platform's attentions without depth, by length: a shape's first call, and every later one.

    PYTHONPATH=. python benchmarks/sequence_table.py [--tokens 128 512 2048] [--batch 8]

Forward + backward, causal, bf16, each of those that `kernels.choose` may take. cuDNN builds a plan
for each shape that a thread has not seen, forward and backward; "first over later" is how many of
the later calls that takes. Each row is of another shape, so none finds another's plan.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from results import add_arguments, publish
from timing import milliseconds, once
from tqdm import tqdm

from moda_compile.kernels import available_sequence_kernels, sequence

NAMES = ("cudnn", "flash")
HEADS = ((16, 16, 64), (16, 8, 64), (32, 8, 128))  # query heads, key heads, head_dim


def both_passes(
    name: str, batch: int, tokens: int, heads: tuple[int, int, int]
) -> Callable[[], None]:
    """A call of one attention, forward and backward."""
    hq, hk, d = heads

    def make(count: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, count, d, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2)

    q, k, v, grad = make(hq), make(hk), make(hk), make(hq)
    options: dict[str, Any] = dict(is_causal=True, scale=d**-0.5)

    def call() -> None:
        out, lse = sequence.forward(name, q, k, v, **options)
        sequence.backward(name, grad, q, k, v, out, lse, **options)

    return call


def rows(lengths: list[int], batch: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """One for each length, heads and attention."""
    for name in names:  # loads its kernels
        once(both_passes(name, 1, 64, HEADS[0]))
    work = [(heads, tokens) for heads in HEADS for tokens in lengths]
    for heads, tokens in tqdm(work, desc="shapes"):
        for name in names:
            call = both_passes(name, batch, tokens, heads)
            first, later = once(call), milliseconds(call)
            yield {
                "B": batch, "T": tokens, "heads": f"{heads[0]}/{heads[1]}", "d": heads[2],
                "attention": name, "first ms": first, "later ms": later,
                "first over later": first / later,
            }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--batch", type=int, default=8)
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sequence_table: no CUDA device.")
    names = [name for name in NAMES if name in available_sequence_kernels()]
    publish(
        "sequence_table",
        "The platform's attentions without depth, forward + backward",
        list(rows(arguments.tokens, arguments.batch, names)),
        claims=[],
        setting="bf16, causal; later: medians",
        folder=arguments.out,
    )


if __name__ == "__main__":
    main()
