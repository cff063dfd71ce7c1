"""Time tiles of the decode kernels against PyTorch's fastest attention without depth, on a GPU.

    PYTHONPATH=. python benchmarks/decode_kernels.py [--models llama24] [--batches 1 8 64]

Microseconds a layer of decode.py's models, one token for each batch entry: CUDA graphs of as many
layers as their caches are more than the GPU's caches hold, each an elementwise kernel and the
attention over a full cache with a mask. A column is a tile: keys a step, stages, and programs that
are wanted for each SM; "chosen" is that of `decode_configs.decode_tile`. cuDNN stands in front of
them and behind them, as a GPU's clocks change.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import decode as models
import torch
from results import add_arguments, publish
from torch import Tensor
from tqdm import tqdm

from moda_compile.kernels import decode, decode_configs, slot_table, visible

TILES = ((64, 3, 3), (64, 3, 4), (64, 2, 3), (128, 2, 3), (128, 2, 8), (128, 3, 2))
CHOSEN = decode_configs.decode_tile
COLD = 600e6  # bytes of keys and values, twelve times an H100's L2
MOST_LAYERS = 24


def microseconds(call: Callable[[], Any], layers: int) -> float:
    """Of a layer, in a CUDA graph; the median of its replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    times = []
    for _ in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]) * 1e3 / layers


def measure(name: str, shape: models.Shape, batch: int, context: int) -> dict[str, Any]:
    """A line of the table."""
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
    options: dict[str, Any] = dict(device="cuda", dtype=models.DTYPE)
    scale, size = d**-0.5, (batch, kv_heads, context, d)
    layers = int(min(MOST_LAYERS, max(3, COLD // (4 * batch * kv_heads * context * d))))
    caches = [[torch.randn(size, **options) for _ in range(2)] for _ in range(layers)]
    first = torch.randn(batch, 1, heads, d, **options)
    slots = shape.layers // 2
    depth = [
        torch.randn(batch, 1, kv_heads, d, **options).transpose(1, 2) for _ in range(2 * slots)
    ]
    mask = torch.ones(1, 1, 1, context, device="cuda", dtype=torch.bool)
    seen = visible.run(mask, 1, 1)  # as a compiled model has it, once for all layers
    bias = torch.zeros(1, 1, 1, context, **options).expand(batch, heads, 1, context)

    def chain(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            q = first
            for key, value in caches:
                q = attend((q * 1.0001).transpose(1, 2), key, value).transpose(1, 2)
            return q

        return run

    def plain(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, key, value, bias, False, 0.0, False, False, scale=scale
        )
        out: Tensor = made[0]
        return out

    def ours(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        filled = slot_table.listed(depth[:slots], depth[slots:])
        given: dict[str, Any] = dict(is_causal=False, scale=scale, mask=mask, seen=seen)
        return decode.run(q, key, value, filled, **given)[0]

    def timed(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        return microseconds(chain(attend), layers)

    row: dict[str, Any] = {"model": name, "batch": batch, "context": context, "chain": layers}
    row |= {"elementwise": timed(lambda q, *_: q), "cuDNN": timed(plain), "chosen": timed(ours)}
    for keys, stages, programs in TILES:
        tile = decode_configs.DecodeTile(
            rows=16, keys=keys, warps=4, stages=stages, programs=programs
        )
        with mock.patch.object(decode_configs, "decode_tile", lambda tile=tile, **_: tile):
            row[f"{keys}/{stages}/{programs}"] = timed(ours)
    return row | {"cuDNN again": timed(plain)}


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    work = list(itertools.product(arguments.models, arguments.batches, arguments.contexts))
    for name, batch, context in tqdm(work, desc="shapes"):
        yield measure(name, models.MODELS[name], batch, context)
        torch.cuda.empty_cache()


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 16384])
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("decode_kernels: no CUDA device.")
    publish(
        "decode_kernels",
        "Decode kernels with slots, microseconds a layer, over PyTorch's attention without",
        list(rows(arguments)),
        claims=[],
        setting=f"{models.DTYPE}; CUDA graphs of layers with caches of their own",
        folder=arguments.out,
    )


if __name__ == "__main__":
    main()
