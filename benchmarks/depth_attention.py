"""Time the combined attention against the sequence attention alone, on this machine's GPU.

    python benchmarks/depth_attention.py [--sweep]

Rows are those of arXiv 2603.15619's kernel table (B=1, bf16, causal). "floor" is what reading and
writing the depth slots must cost at the bandwidth of a device copy; "extra" is what the operator
takes beyond the sequence attention. --sweep times tile shapes of the two depth kernels instead.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from timing import copy_bandwidth, milliseconds
from torch import Tensor

from moda_compile.kernels import (
    choose,
    configs,
    depth_backward,
    depth_forward,
    sequence,
    slot_table,
    split,
)

DTYPE, BYTES = torch.bfloat16, 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """tokens T, group G = Hq / Hk, kv_heads Hk, head_dim d, slots S; B = 1."""

    tokens: int
    group: int
    kv_heads: int
    head_dim: int
    slots: int

    def __str__(self) -> str:
        heads = f"G={self.group:<2} Hk={self.kv_heads:<2}"
        return f"T={self.tokens:<6} {heads} d={self.head_dim:<3} S={self.slots}"

    def bytes(self, *, backward: bool, gradient_bytes: int) -> int:
        """Bytes that a depth kernel must move: slots once, and the per-query tensors.

        gradient_bytes: bytes moved for each element of a slot's gradient.
        """
        slots = 2 * self.slots * self.tokens * self.kv_heads * self.head_dim
        query = self.tokens * self.kv_heads * self.group * self.head_dim * BYTES
        if backward:  # q, out, grad_out, the sequence part's dq, and dq
            return slots * (BYTES + gradient_bytes) + 5 * query
        return slots * BYTES + 3 * query  # q, the sequence part's out, and out


SHAPES = (
    Shape(tokens=4096, group=8, kv_heads=8, head_dim=64, slots=64),
    Shape(tokens=16384, group=8, kv_heads=8, head_dim=64, slots=64),
    Shape(tokens=16384, group=2, kv_heads=8, head_dim=64, slots=64),
    Shape(tokens=4096, group=2, kv_heads=8, head_dim=128, slots=72),
    Shape(tokens=4096, group=1, kv_heads=16, head_dim=76, slots=32),
)


def rows(shape: Shape, heads: int) -> Tensor:
    size = (1, shape.tokens, heads, shape.head_dim)
    return torch.randn(size, device="cuda", dtype=DTYPE).transpose(1, 2)


def time_shape(shape: Shape, bandwidth: float) -> None:
    """Print the sequence attention's row and one for each form of the operator."""
    hq = shape.kv_heads * shape.group
    q, grad = rows(shape, hq), rows(shape, hq)
    k, v = rows(shape, shape.kv_heads), rows(shape, shape.kv_heads)
    size = (shape.slots, 1, shape.tokens, shape.kv_heads, shape.head_dim)
    depth_k, depth_v = (
        torch.randn(size, device="cuda", dtype=DTYPE).transpose(2, 3) for _ in range(2)
    )
    lists = list(depth_k.unbind(0)), list(depth_v.unbind(0))
    lowering = choose(device_type="cuda", dtype=DTYPE, head_dim=shape.head_dim, tokens=shape.tokens)
    options: dict[str, Any] = dict(is_causal=True, scale=shape.head_dim**-0.5)
    name = lowering.sequence
    out, lse = sequence.forward(name, q, k, v, **options)
    base_forward = milliseconds(lambda: sequence.forward(name, q, k, v, **options))
    base_backward = milliseconds(
        lambda: sequence.backward(name, grad, q, k, v, out, lse, **options)
    )
    print(f"\n{shape}")
    print(
        f"  {name + ' alone':24} fwd {base_forward:7.3f}  "
        f" fwd+bwd {base_forward + base_backward:7.3f}"
    )

    def report(label: str, forward: float, backward: float, gradient_bytes: int) -> None:
        floor = shape.bytes(backward=False, gradient_bytes=0) / bandwidth
        floors = floor + shape.bytes(backward=True, gradient_bytes=gradient_bytes) / bandwidth
        both, base = forward + backward, base_forward + base_backward
        print(
            f"  {label:24} fwd {forward:7.3f} (extra {forward - base_forward:6.3f},"
            f" floor {floor:6.3f})   fwd+bwd {both:7.3f} (extra {both - base:6.3f},"
            f" floor {floors:6.3f})   x{both / base:.3f}",
            flush=True,
        )

    joint, joint_lse = split.forward_stacked(q, k, v, depth_k, depth_v, **options)
    report(
        "stacked",
        milliseconds(lambda: split.forward_stacked(q, k, v, depth_k, depth_v, **options)),
        milliseconds(
            lambda: split.backward_stacked(
                grad, q, k, v, depth_k, depth_v, joint, joint_lse, **options
            )
        ),
        BYTES,
    )
    forward = milliseconds(lambda: split.forward(q, k, v, *lists, **options))
    for dtype, width in ((DTYPE, BYTES), (torch.float32, 4)):
        acc = torch.zeros((shape.slots, 2, *size[1:]), device="cuda", dtype=dtype).transpose(3, 4)
        arguments = (grad, q, k, v, *lists, joint, joint_lse, acc)
        backward = milliseconds(partial(split.backward, *arguments, **options))
        label = f"table, += {str(dtype).removeprefix('torch.')}"
        report(label, forward, backward, 2 * width)


def sweep(shape: Shape, bandwidth: float) -> None:
    """Print the times of tile shapes of the tensor-core kernels, best first: forward, and backward
    with += in float32. For the kernels alone see depth_kernels.py.
    """
    hq = shape.kv_heads * shape.group
    q, out, grad, dq = (rows(shape, hq) for _ in range(4))
    lse = torch.randn(1, hq, shape.tokens, device="cuda") + 10
    slots = [[rows(shape, shape.kv_heads) for _ in range(shape.slots)] for _ in range(2)]
    table = slot_table.table(*slots)
    size = (shape.slots, 2, 1, shape.tokens, shape.kv_heads, shape.head_dim)
    acc = torch.zeros(size, device="cuda").transpose(3, 4)
    scale = shape.head_dim**-0.5
    runs: dict[str, Callable[..., Any]] = {
        "forward": partial(depth_forward.run, q, out, lse, table, scale),
        "backward": partial(
            depth_backward.run, grad, q, out, lse, dq, table, acc[:, 0], acc[:, 1],
            accumulate=True, scale=scale,
        ),
    }  # fmt: skip
    candidates = [
        (1, 16, 1), (1, 16, 2), (1, 16, 4), (1, 32, 2), (1, 32, 4), (1, 64, 4),
        (2, 16, 2), (2, 32, 2), (4, 16, 4), (8, 16, 8),
    ]  # fmt: skip
    for name, run in runs.items():
        backward = name == "backward"
        floor = shape.bytes(backward=backward, gradient_bytes=8 * backward) / bandwidth
        timed = []
        for (tokens, width, warps), stages in itertools.product(candidates, (1, 2)):
            if backward and stages == 2 and (tokens, width) != (1, 16):
                continue
            tile = configs.Tile(tokens=tokens, slots=width, warps=warps, stages=stages)
            candidate = partial(run, products="matrix", tile=tile)
            try:
                timed.append((milliseconds(candidate), (tokens, width, warps, stages)))
            except Exception as error:  # a tile that does not fit this GPU
                print(f"    {tile}: {type(error).__name__}")
        print(f"{shape} {name}: now {milliseconds(run):.3f} ms, floor {floor:.3f} ms", flush=True)
        for time, numbers in sorted(timed)[:5]:
            print(f"    {time:.3f} ms (tokens, slots, warps, stages) = {numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time tile shapes instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("depth_attention: no CUDA device.")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__},"
        f" cuDNN {torch.backends.cudnn.version()}; copy {bandwidth / 1e9:.2f} TB/s;"
        f" ms, median, B=1, {DTYPE}, causal"
    )
    for shape in (SHAPES[0], *SHAPES[3:]) if arguments.sweep else SHAPES:
        (sweep if arguments.sweep else time_shape)(shape, bandwidth)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
