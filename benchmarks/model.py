"""Training throughput and memory of a plain stack, as it is and converted, on this machine's GPU.

    PYTHONPATH=. python benchmarks/model.py [--layers 24] [--batch 8]

Forward + backward of the blocks (no LM head), bfloat16, both sides compiled by Inductor; medians
after warm-up, and the ratio of tokens per second to the unconverted model's in the same run.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import triton

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.report import table
from moda_compile.testing import RandomStack, StackConfig


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    config = StackConfig(
        layers=args.layers, kv_heads=args.kv_heads, groups=args.groups, head_dim=args.head_dim,
        norm="rms_functional", rotary="half", ffn="swiglu", batch=args.batch, length=args.tokens,
    )  # fmt: skip
    variants: dict[str, MoDAConfig | None] = {
        "plain": None,
        "none": MoDAConfig(),
        "none, accumulator in bf16": MoDAConfig(accumulator_dtype="model"),
        "projected": MoDAConfig(ffn_kv="projected"),
    }
    rows = [("variant", "ms", "tokens/s", "of plain", "peak MiB", "of plain", "compile s")]
    first: tuple[float, float] | None = None
    for name, options in variants.items():
        milliseconds, peak, compiling = measure(config, options)
        speed = args.batch * args.tokens / milliseconds * 1e3
        first = first or (milliseconds, peak)
        rows.append(
            (
                name, f"{milliseconds:.2f}", f"{speed:,.0f}",
                f"{first[0] / milliseconds:.3f}", f"{peak:,.0f}", f"{peak / first[1]:.3f}",
                f"{compiling:.0f}",
            )
        )  # fmt: skip
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(config)
    print("\n".join(table(rows)))


def measure(config: StackConfig, options: MoDAConfig | None) -> tuple[float, float, float]:
    """Median milliseconds of forward + backward, peak MiB, seconds of compiling."""
    torch._dynamo.reset()
    model: Any = RandomStack(config).to("cuda", torch.bfloat16)
    inputs = tuple(x.cuda() for x in config.inputs())
    if options is None:
        model = torch.compile(model)
    else:
        moda_compile.convert(model, options, inputs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(*inputs).mean().backward()

    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compiling = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    milliseconds = triton.testing.do_bench(step, warmup=200, rep=1500, return_mode="median")
    peak = torch.cuda.max_memory_allocated() / 2**20
    return milliseconds, peak, compiling


if __name__ == "__main__":
    main()
