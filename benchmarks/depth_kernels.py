"""Time the kernels of the depth part alone against the memory's bandwidth, on this machine's GPU.

    python benchmarks/depth_kernels.py [--shape B T HK G D S]... [--seconds 140]

For each shape forward; backward adding to float32 and to bfloat16 accumulators; backward without
the slots' gradients, and these gathered, for two slots read by S layers, with two more begun, and
for two begun slots with 2 layers missing: with and without tensor cores, and with several tiles,
best first. Times are of CUDA graphs; slots are bf16
tensors [B, T, Hk, d] behind a table built beforehand. "floor" is what the bytes that must move cost
at the bandwidth of a device copy. Every configuration's result is compared with plain PyTorch's
first; one that fails is named and left out. The arrow marks what `kernels.configs` chooses.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch import Tensor

from moda_compile.kernels import (
    configs,
    depth_backward,
    depth_forward,
    depth_gather,
    joint,
    plain,
    slot_table,
)

DTYPE, BYTES = torch.bfloat16, 2
ROUNDING = 2.0**-7  # of bf16 results, and of the matrix kernels' bf16 probabilities


@dataclass(frozen=True)
class Shape:
    """B, tokens T, kv_heads Hk, group G = Hq / Hk, head_dim d, slots S."""

    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    slots: int

    def __str__(self) -> str:
        return (
            f"B={self.batch} T={self.tokens} Hk={self.kv_heads} G={self.group}"
            f" d={self.head_dim} S={self.slots}"
        )

    def bytes(self, gradient_bytes: int | None) -> int:
        """Bytes that a kernel must move, a forward one if gradient_bytes is None.

        gradient_bytes: moved for each element of a slot's gradient.
        """
        rows = self.batch * self.tokens * self.kv_heads
        slots = 2 * self.slots * rows * self.head_dim
        query, lse = rows * self.group * self.head_dim * BYTES, rows * self.group * 4
        if gradient_bytes is None:  # q, the sequence part's out, and out; lse in and out
            return slots * BYTES + 3 * query + 2 * lse
        # q, out, grad_out, the sequence part's dq, and dq
        return slots * (BYTES + gradient_bytes) + 5 * query + lse

    def gather_bytes(self, readers: int, *, begun: int = 0, going_on: bool = False) -> int:
        """Bytes that gathering must move: q and grad_out, lse and delta of the readers; K, V and
        the gradients of two slots.

        begun: slots more whose K and V are read and whose float32 sums are written. going_on: the
        two slots' sums are read.
        """
        rows = self.batch * self.tokens * self.kv_heads
        reader = 2 * rows * self.group * (self.head_dim * BYTES + 4)
        slots = 2 * 2 * BYTES + begun * (BYTES + 4) + 2 * 4 * going_on
        return readers * reader + 2 * rows * self.head_dim * slots


SHAPES = (
    Shape(8, 2048, 4, 4, 64, 11),
    Shape(64, 2048, 3, 3, 64, 14),
    Shape(8, 2048, 16, 1, 64, 12),
    Shape(1, 2048, 16, 1, 64, 12),
    Shape(8, 2048, 16, 1, 76, 8),
    Shape(4, 4096, 8, 2, 64, 18),
    Shape(1, 16384, 8, 2, 64, 64),
    Shape(1, 4096, 8, 2, 128, 72),
    Shape(1, 16384, 8, 8, 64, 64),
)

Configuration = tuple[configs.Products, configs.Tile | None]


def configurations(shape: Shape, title: str) -> Iterator[Configuration]:
    """What to time. (elements of a row in a thread, slots a step, warps, stages) of a tile; None is
    what is chosen. Of the gathering kernel the slots are readers.
    """
    yield "vector", None
    if title.startswith("gather"):
        found = [(4, 1, 4, 2), (4, 2, 4, 2), (8, 1, 4, 2), (8, 2, 4, 2), (2, 2, 4, 2), (4, 4, 4, 2)]
        yield from _tiles(shape, found)
        return
    yield "matrix", None
    if title == "backward, no slots":
        found = [(8, 2, 4, 1), (8, 2, 4, 2), (8, 4, 4, 1), (4, 2, 4, 2), (4, 4, 4, 2), (4, 4, 4, 1)]
    elif title != "forward":
        found = [(4, 1, 4, 1), (4, 1, 4, 2), (4, 2, 4, 1), (4, 2, 4, 2), (4, 1, 1, 2)]
    elif shape.group <= 2:
        found = [(8, 4, 4, 1), (8, 4, 1, 1), (8, 2, 4, 2), (4, 4, 4, 1), (4, 8, 4, 1), (4, 4, 4, 2)]
    elif shape.group <= 4:
        found = [(8, 4, 4, 1), (8, 2, 4, 2), (8, 2, 2, 1), (4, 4, 4, 1), (4, 4, 2, 2), (4, 2, 4, 2)]
        found += [(8, 8, 4, 1), (8, 8, 2, 1), (8, 4, 2, 1), (8, 4, 1, 1)]  # where rows are few
    else:
        found = [(4, 2, 4, 1), (4, 1, 4, 2), (8, 2, 4, 1)]
    yield from _tiles(shape, found)
    yield "matrix", configs.Tile(rows=1, slots=16, warps=1, stages=1)


def _tiles(shape: Shape, found: list[tuple[int, int, int, int]]) -> Iterator[Configuration]:
    for elements, slots, warps, stages in found:
        rows = max(1, 32 * warps * elements // configs.padded(shape.head_dim))
        yield "vector", configs.Tile(rows=rows, slots=slots, warps=warps, stages=stages)


def named(configuration: Configuration) -> str:
    products, tile = configuration
    if tile is None:
        return f"{products} <- chosen tile"
    return (
        f"{products} rows={tile.rows:<2} slots={tile.slots:<2} warps={tile.warps}"
        f" stages={tile.stages}"
    )


def microseconds(call: Callable[[], Any]) -> float:
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=5, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes a microsecond of a large device copy, read and written counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / microseconds(lambda: target.copy_(source))


def rows(shape: Shape, heads: int) -> Tensor:
    size = (shape.batch, shape.tokens, heads, shape.head_dim)
    return torch.randn(size, device="cuda", dtype=DTYPE).transpose(1, 2)


def check(got: Tensor, expected: Tensor, limit: float) -> None:
    """Raise if ||got - expected|| / ||expected|| is more than the limit, or not a number."""
    error = 0.0
    size = 0.0
    for x, y in zip(got.unbind(0), expected.unbind(0), strict=True):  # in less memory than at once
        error += (x.float() - y.float()).square().sum().item()
        size += y.float().square().sum().item()
    if not error <= limit**2 * size:
        raise AssertionError(f"result off by {(error / size) ** 0.5:.1e}")


def time_kernel(
    title: str,
    shape: Shape,
    floor: float,
    call: Callable[..., Any],
    verify: Callable[[Callable[[], Any]], None],
    deadline: float,
) -> None:
    """Print the times of one kernel's configurations, best first.

    call: takes products and tile. verify: calls what it is given, and raises if the result is off.
    """
    chosen = configs.products(head_dim=shape.head_dim, group=shape.group, dtype=DTYPE)
    print(f"{shape}  {title}: floor {floor:.1f} us; {chosen} chosen", flush=True)
    timed: list[tuple[float, str]] = []
    for configuration in configurations(shape, title):
        name = named(configuration)
        if time.monotonic() > deadline:
            print(f"    {name}: no time left")
            continue
        run = partial(call, products=configuration[0], tile=configuration[1])
        try:
            verify(run)
            timed.append((microseconds(run), name))
        except Exception as error:  # wrong, or more than this GPU has: the others go on
            first = (str(error).splitlines() or [""])[0]
            print(f"    {name}: {type(error).__name__}: {first[:100]}")
    for taken, name in sorted(timed):
        print(f"    {taken:9.1f} us  x{taken / floor:5.2f}  {name}", flush=True)


def time_shape(shape: Shape, bandwidth: float, deadline: float, only: str) -> None:
    """Print the tables of one shape's kernels whose title contains `only`."""
    hq = shape.kv_heads * shape.group
    q, sequence_out, grad, sequence_dq = (rows(shape, hq) for _ in range(4))
    sequence_lse = torch.randn(shape.batch, hq, shape.tokens, device="cuda") + 2
    depth_k, depth_v = ([rows(shape, shape.kv_heads) for _ in range(shape.slots)] for _ in range(2))
    table = slot_table.table(depth_k, depth_v)
    scale = shape.head_dim**-0.5
    out, lse = plain.forward(q, sequence_out, sequence_lse, depth_k, depth_v, scale)

    def verify_forward(run: Callable[[], tuple[Tensor, Tensor]]) -> None:
        got_out, got_lse = run()
        check(got_out, out, ROUNDING)
        check(got_lse, lse, 1e-5)

    call: Callable[..., Any] = partial(
        depth_forward.run, q, sequence_out, sequence_lse, table, scale
    )
    floor = shape.bytes(None) / bandwidth
    if only in "forward":
        time_kernel("forward", shape, floor, call, verify_forward, deadline)

    saved = (grad, q, out, lse, sequence_dq)
    size = (shape.slots, 2, shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
    for dtype in (torch.float32, DTYPE):
        title = f"backward += {str(dtype).removeprefix('torch.')}"
        if only not in title:
            continue
        expected, got = (
            torch.zeros(size, device="cuda", dtype=dtype).transpose(3, 4) for _ in range(2)
        )
        options: dict[str, Any] = dict(accumulate=True, scale=scale)
        gradients = (expected[:, 0], expected[:, 1])
        dq, _ = plain.backward(*saved, depth_k, depth_v, *gradients, **options)
        verify = partial(verify_backward, dq, got, expected)
        call = partial(depth_backward.run, *saved, table, got[:, 0], got[:, 1], **options)
        floor = shape.bytes(2 * dtype.itemsize) / bandwidth
        time_kernel(title, shape, floor, call, verify, deadline)
        del expected, got

    if only in (title := "backward, no slots"):
        options = dict(accumulate=False, scale=scale)
        dq, _ = plain.backward(*saved, depth_k, depth_v, None, None, **options)
        call = partial(depth_backward.run, *saved, table, None, None, **options)
        verify = partial(verify_query, dq, (grad.float() * out.float()).sum(-1))
        time_kernel(title, shape, shape.bytes(0) / bandwidth, call, verify, deadline)
    for begun, going_on in ((0, False), (2, False), (0, True)):
        title = f"gather, {begun} begun" if begun else "gather, going on" if going_on else "gather"
        if only in title:
            time_gather(title, shape, bandwidth, begun, going_on, deadline)


def time_gather(
    title: str, shape: Shape, bandwidth: float, begun: int, going_on: bool, deadline: float
) -> None:
    """Print the table of two slots' gradients, read by S layers and by S - 1.

    begun: sums of so many slots more, over S layers. going_on: the two slots have been begun, and
    are read by 2 layers and by 1 yet.
    """
    hq, readers = shape.kv_heads * shape.group, 2 if going_on else shape.slots
    slots = 2 + begun
    keys, values = ([rows(shape, shape.kv_heads) for _ in range(slots)] for _ in range(2))
    queries, grads = ([rows(shape, hq) for _ in range(readers)] for _ in range(2))
    size = (shape.batch, hq, shape.tokens)
    lses = [torch.randn(size, device="cuda") + 4 for _ in queries]
    deltas = [torch.randn(size, device="cuda") for _ in queries]
    counts = (readers, readers - 1, *[readers] * begun)
    partials = None
    if going_on:
        block = (2, 2, shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
        partials = torch.randn(block, device="cuda").transpose(3, 4)
    arguments = (grads, queries, lses, deltas, keys, values, counts)
    options: dict[str, Any] = dict(scale=shape.head_dim**-0.5, dtype=DTYPE)
    options |= dict(partials=partials, unfinished=begun)
    expected, expected_sums = joint.gather(*arguments, **options)

    def call(*, products: str, tile: configs.Tile | None) -> tuple[Tensor, Tensor]:
        return depth_gather.run(*arguments, **options, tile=tile)

    def verify(run: Callable[[], tuple[Tensor, Tensor]]) -> None:
        made, sums = run()
        check(made, expected, ROUNDING)
        if begun:
            check(sums, expected_sums, 1e-5)

    floor = shape.gather_bytes(readers, begun=begun, going_on=going_on) / bandwidth
    time_kernel(title, shape, floor, call, verify, deadline)


def verify_backward(
    dq: Tensor, got: Tensor, expected: Tensor, run: Callable[[], tuple[Tensor, Tensor | None]]
) -> None:
    got.zero_()  # timing another configuration has added to it
    check(run()[0], dq, ROUNDING)
    check(got, expected, ROUNDING)


def verify_query(dq: Tensor, delta: Tensor, run: Callable[[], tuple[Tensor, Tensor]]) -> None:
    got, got_delta = run()
    check(got, dq, ROUNDING)
    check(got_delta, delta, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", type=int, nargs=6, action="append", metavar=("B", "T", "HK", "G", "D", "S")
    )
    parser.add_argument("--seconds", type=float, default=140, help="start nothing new after that")
    parser.add_argument("--only", default="", help="the kernels whose title contains this text")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("depth_kernels: no CUDA device.")
    deadline = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__};"
        f" copy {bandwidth / 1e6:.2f} TB/s; median of CUDA graphs, {DTYPE}, table of slots"
    )
    shapes = [Shape(*sizes) for sizes in arguments.shape] if arguments.shape else SHAPES
    for shape in shapes:
        if time.monotonic() > deadline:
            print(f"{shape}: no time left")
            continue
        time_shape(shape, bandwidth, deadline, arguments.only)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
