"""What depth slots cost on a CPU: the operator over PyTorch's attention without them.

    PYTHONPATH=. python benchmarks/cpu_attention.py [--threads 2]

float32, causal, B=1, head_dim 64; slots are separate tensors, as in a model. Forward, and forward +
backward into an accumulator; medians, the two sides timed in turns. "floor" is the ratio if every
operation of depth (4 S d a token and query head, beside 2 T d of causal attention; 2.5 times that
backward, each) cost what one of attention does: depth has S / T as many and reads a slot for each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import Picture, add_arguments, publish
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from moda_compile import ops

SHAPES = [(512, 4, 8), (512, 4, 24), (2048, 4, 8), (2048, 4, 24), (2048, 1, 24), (4096, 8, 24)]
KV_HEADS, HEAD_DIM = 2, 64


def medians(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Median milliseconds of each, in turns."""
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(samples[0]) < 4:
        for own, call in zip(samples, calls, strict=True):
            before = time.perf_counter()
            call()
            own.append((time.perf_counter() - before) * 1e3)
    return [statistics.median(own[1:]) for own in samples]


def row(tokens: int, group: int, slots: int, seconds: float) -> dict[str, Any]:
    """A line of the table."""

    def make(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, HEAD_DIM).transpose(1, 2)

    q, k, v = make(group * KV_HEADS), make(KV_HEADS), make(KV_HEADS)
    depth_k, depth_v = ([make(KV_HEADS) for _ in range(slots)] for _ in range(2))
    scale = HEAD_DIM**-0.5
    grad = make(group * KV_HEADS)
    accumulator = ops.new_accumulator(q, depth_k[0].shape, slots, torch.float32)
    own_q, own_k, own_v = (x.clone().requires_grad_() for x in (q, k, v))

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def plain_both() -> None:
        y = F.scaled_dot_product_attention(own_q, own_k, own_v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, (own_q, own_k, own_v), grad)

    def deep() -> tuple[Tensor, Tensor]:
        return ops.depth_attention(q, k, v, depth_k, depth_v, True, scale)

    def deep_both() -> None:
        out, lse = deep()
        ops.depth_attention_backward(
            grad, q, k, v, depth_k, depth_v, out, lse, accumulator, True, scale
        )

    one, two, three, four = medians([plain, deep, plain_both, deep_both], seconds)
    return {
        "T": tokens, "group and slots": f"G={group}, S={slots}",
        "forward ms": one, "with depth ms": two, "forward ratio": two / one,
        "both ms": three, "both with depth ms": four, "ratio": four / three,
        "floor": 1 + 2 * slots / tokens,
    }  # fmt: skip


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing, a row")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [row(t, g, s, args.seconds) for t, g, s in tqdm(SHAPES, desc="shapes")]
    ratios = sorted(x["ratio"] for x in rows)
    publish(
        "cpu_attention",
        "Attention on a CPU with depth slots over PyTorch's without",
        rows,
        claims=[
            (
                "op on a CPU over plain SDPA, forward + backward, T 512 to 4096, S 8 and 24",
                f"{ratios[0]:.2f}x to {ratios[-1]:.2f}x; no T x T matrix",
            )
        ],
        picture=Picture(
            x="T", ys=("ratio",), split="group and slots", log_x=True, unit="with depth / without"
        ),
        setting="float32, causal, B=1, head_dim 64, 2 KV heads; medians, the sides in turns",
        folder=args.out,
    )


if __name__ == "__main__":
    main()
