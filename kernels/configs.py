"""Tile shapes of the depth kernels: a fixed choice by capability, head_dim, group and dtype.

There is no autotuning at run time: a tile changes the speed, never the result beyond rounding, and
a first step that compiles a dozen candidates per layer costs more than it gains. What decides:

- The kernels are bound by memory bandwidth: enough loads in flight matter, not the arithmetic.
- A program has rows, of one (token, key/value head) each. Its product is one tiny matrix product
  per row, and Triton gives whole rows to its warps: as many rows as warps, or one row whose matrix
  the warps share.
- A float32 tile [head_dim, group] of a row stays in registers through forward; backward has three
  of them and [slots, head_dim]. Where they don't fit beside several rows, one row a program.
- 16 slots a step is the least that a tensor-core product takes.
- It also takes 16 query heads on its inner side and as rows, 8 as columns. Where a key/value head
  has few of its own, `products` chooses the vector kernels, which multiply without tensor cores. A
  program of theirs has as many rows as its threads cover in one access a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """rows: (token, key/value head) pairs a program; slots: depth slots a step; warps, stages:
    launch options.

    In a vector kernel with 2 stages a step's slots are loaded a step ahead, into registers; with
    more, stages - 1 steps ahead, into shared memory. registers: the most a thread may have, or
    None: what the compiler likes.
    """

    rows: int
    slots: int
    warps: int
    stages: int
    registers: int | None = None

    def programs(self, batch: Any, tokens: Any, kv_heads: Any) -> Any:
        """How many have all rows of tensors of these sizes, which may be symbolic."""
        return batch * -(-tokens * kv_heads // self.rows)


def padded(n: int) -> int:
    """n rounded up to a power of two, at least 16: what a tensor-core product needs."""
    return max(16, power_of_two(n))


def product_heads(group: int) -> int:
    """A group of query heads rounded up to what the columns of a product take: 8 on NVIDIA's
    tensor cores, for 16 of them on AMD's.
    """
    return max(8 if torch.version.hip is None else 16, power_of_two(group))


def power_of_two(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << (n - 1).bit_length()


Products = Literal["vector", "matrix"]
"""How a depth kernel multiplies: element by element, or with tensor cores."""

_VECTOR_STATE = 32


def products(*, head_dim: int, group: int, dtype: torch.dtype, many: bool = False) -> Products:
    """Which kernels serve the depth part.

    Of a tensor-core product, padded to 8 or 16 query heads, a group of 4 uses half or a quarter;
    its operands' registers are lost to loads on their way, and those decide. Without tensor cores
    the arithmetic grows with the group instead. What a thread of the vector kernels keeps for each
    query head, a few elements of q, out and, backward, three gradients, must stay in registers
    beside the loads: by the compiler's report for compute capability 9.0, _VECTOR_STATE elements of
    each do.

    Args:
        head_dim: d. group: query heads per key/value head. dtype: of q, k, v.
        many: a kernel that doesn't write the slots' gradients has MANY_FORWARD slots or more or,
            backward, MANY_QUERY.
    """
    elements = max(16 // dtype.itemsize, padded(head_dim) // 32)
    # A program of the matrix kernels takes longer to begin, and its steps are shorter. At a group
    # of 3 they are level or slower up to 40 slots.
    many = many and group > 3 and dtype.itemsize < 4
    return "vector" if group * elements <= _VECTOR_STATE and not many else "matrix"


# Measured on an H200 at a group of 4, vector and matrix kernels, us (T=8192, 8 key heads). Forward
# at 12, 16, 20 and 24 slots: 85, 103, 121, 140 and 92, 96, 126, 133; d=128, 12 to 20: 165, 202, 239
# and 181, 184, 255. Query at 8, 12, 20: 122, 144, 188 and 122, 126, 172; d=128: 236, 280, 372 and
# 243, 246, 322.
MANY_FORWARD = 24
MANY_QUERY = 12


def vector_forward_tile(
    *, head_dim: int, group: int, dtype: torch.dtype, width: int, capability: tuple[int, int]
) -> Tile:
    """Tile of the forward vector kernel.

    Args:
        head_dim: d. group: query heads per key/value head. dtype: of q, k, v.
        width: elements of a slot's row that a thread can load at once: 16 bytes, or fewer where
            the rows' addresses don't allow it.
        capability: (major, minor) compute capability; (0, 0) if unknown.
    """
    if _copied(head_dim, group, dtype, width, capability):
        return _copying(head_dim, width)
    # Measured on an H100. Loading a step ahead is 7% faster at groups of 2 and 3, level at 1 and 4,
    # and for 4 takes more registers than two programs an SM leave. Where an access is half as wide,
    # two of them a thread are 13% faster than one.
    if group <= 3 and width * dtype.itemsize >= 16:
        return _rows(head_dim, width, slots=2, stages=2)
    wide = 2 * width if group == 1 and width * dtype.itemsize < 16 else width
    return _rows(head_dim, wide, slots=4 if group <= 4 else 2, stages=1)


def vector_backward_tile(
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    width: int,
    capability: tuple[int, int],
    accumulate: bool,
) -> Tile:
    """Tile of the backward vector kernel; arguments as for `vector_forward_tile`, but width that of
    the slot's and its gradients' rows together. accumulate: it adds to gradients.
    """
    if not accumulate and _copied(head_dim, group, dtype, width, capability):
        return _copying(head_dim, width)
    return _rows(head_dim, min(width, 4), slots=2 if group <= 2 else 1, stages=2)


def vector_query_tile(
    *, head_dim: int, group: int, dtype: torch.dtype, width: int, capability: tuple[int, int]
) -> Tile:
    """Tile of the backward vector kernel without the slots' gradients; arguments as for
    `vector_forward_tile`.
    """
    if _copied(head_dim, group, dtype, width, capability):
        return _copying(head_dim, width)
    # Measured on an H200. From a group of 3 on instructions bind rather than the memory: accesses
    # of 8 elements take the fewest and leave no registers for loads ahead; 17 to 27% faster than
    # accesses of 4 with them.
    return _rows(head_dim, width, slots=2, stages=2 if group <= 2 or width <= 4 else 1)


def gather_tile(
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    width: int,
    capability: tuple[int, int],
    slots: int,
) -> Tile:
    """Tile of the gather kernel, which keeps k, v, dk and dv of its slots in registers; its slots
    are the readers a step.

    Args:
        head_dim: d. group: query heads per key/value head. dtype: of q, k, v.
        width: as for `vector_backward_tile`. capability: as for `vector_forward_tile`.
        slots: of a launch.
    """
    # Measured on an H200, d=64: of four slots, half accesses keep everything in registers, and at a
    # group of 2 one reader does: 722 us, with two of them 1149.
    if slots > 2:
        return _rows(head_dim, min(width, 4), slots=2 if group == 1 else 1, stages=2)
    full = width * dtype.itemsize >= 16
    if group > 1 and full and _copies(capability):
        # As in `_copied`, which is 18, 32 and 30% faster at groups of 2, 3 and 4, and also with
        # padding. With a limit of registers the assembler begins copies among a step's arithmetic
        # rather than behind it, even where it would take no more: 456 us for 523 at a group of 2.
        registers = 128 if group <= 3 else 168
        return _rows(head_dim, width, slots=1, stages=3, warps=2, registers=registers)
    # Full accesses with two readers a step are 6% faster than half ones at a group of 1, and 7%
    # faster than one reader at 2. At a head_dim of 80 and 96 it is 7 to 9% faster to have more
    # programs run than to have every register that is asked for, at 64 it is 7% slower.
    if group <= 2:
        limit = 128 if full and padded(head_dim) > head_dim else None
        return _rows(head_dim, width, slots=2, stages=2, registers=limit)
    return _rows(head_dim, min(width, 4), slots=1, stages=2)


def _copied(
    head_dim: int, group: int, dtype: torch.dtype, width: int, capability: tuple[int, int]
) -> bool:
    """Whether a vector kernel has the slots of its next steps copied to shared memory.

    That takes no registers, so more of them are on their way, and at 16 bytes at a time it takes
    few instructions. Measured on an H200 (benchmarks/results/tiles_h200.txt) against loads into
    registers, at groups of 1, 2, 3 and 4, d=64, bf16: forward 3, 5 to 15, 0 and 8% faster, query 2,
    7 to 9, 10 and 5%, backward 12, 5, 16 and 19%. Copies of padding are in vain, at d=80 all of it
    up to 8% slower. In float32, which has twice the bytes for each instruction, 2 to 5% slower at
    groups of 1 and 2, and 11 to 18% faster at 4.
    """
    full = width * dtype.itemsize >= 16 and padded(head_dim) == head_dim
    return full and (dtype.itemsize < 4 or group > 2) and _copies(capability)


def _copying(head_dim: int, width: int) -> Tile:
    # Two slots a step, three stages, one warp or four: within 2% of it.
    return _rows(head_dim, width, slots=1, stages=4, warps=2)


def _rows(
    head_dim: int,
    width: int,
    *,
    slots: int,
    stages: int,
    warps: int = 4,
    registers: int | None = None,
) -> Tile:
    # A row that several warps share would be summed through shared memory.
    warps = warps if padded(head_dim) // width <= 32 else 1
    rows = max(1, 32 * warps * width // padded(head_dim))
    return Tile(rows=rows, slots=slots, warps=warps, stages=stages, registers=registers)


def forward_tile(
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    table: bool,
) -> Tile:
    """Tile of the forward kernel.

    Args:
        head_dim: d. group: query heads per key/value head. dtype: of q, k, v.
        capability: (major, minor) compute capability; (0, 0) if unknown.
        table: the slots' addresses are read from a table.
    """
    # A third stage of a table has its addresses copied ahead, with a barrier for each side: up to a
    # head_dim of 80 that costs 0 to 10%, at 256 it saves 25%, at 128 and few heads 4%.
    if table:
        stages = 3 if head_dim > 128 or (head_dim == 128 and group <= 8) else 2
    else:
        stages = 3 if padded(head_dim) <= 128 else 2
    limit = None
    if head_dim <= 64 and group <= 8 and dtype.itemsize < 4 and _copies(capability):
        limit = 72  # of a table up to 11% faster
    return _reading(head_dim, group, dtype, capability, stages, limit)


def query_tile(
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    table: bool,
) -> Tile:
    """Tile of the backward kernel without the slots' gradients; arguments as for `forward_tile`."""
    if 64 < head_dim <= 128 and group <= 8:
        # Of a table 2 to 9% faster than two stages without a limit, of stacked slots 2 to 4%.
        return _reading(head_dim, group, dtype, capability, 3, 168)
    if table:
        stages = 3 if padded(head_dim) > 128 else 2
    else:
        stages = 3 if head_dim <= 64 else 2
    return _reading(head_dim, group, dtype, capability, stages, None)


def backward_tile(
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    accumulate: bool,
) -> Tile:
    """Tile of the backward kernel with them; arguments as for `forward_tile`.

    accumulate: it adds to gradients.

    Measured on an H200 (benchmarks/results/tiles_h200.txt, section 15).
    """
    few = padded(group) == 16 and dtype.itemsize < 4
    in_two_rows = _in_two_rows(head_dim, group, dtype)
    if head_dim <= 64 and in_two_rows:
        limit = 168 if accumulate and few and group <= 8 else None
        stages = _stages(capability, 2 if accumulate else 3)
        return Tile(rows=2, slots=16, warps=2, stages=stages, registers=limit)
    if padded(head_dim) <= 128 and in_two_rows:
        stages = _stages(capability, 2 if few and not accumulate else 1)
        return Tile(rows=2 if few or not accumulate else 1, slots=16, warps=2, stages=stages)
    if few and not accumulate:
        # Without that number, the most there is, the assembler for capability 8.0 takes 32.
        return Tile(rows=2, slots=16, warps=4, stages=1, registers=255)
    return _one_row(head_dim, group, dtype)


_SMALL = 64 * 16


def _reading(
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    stages: int,
    limit: int | None,
) -> Tile:
    """Tile of a matrix kernel that doesn't write the slots' gradients. limit: of registers.

    Measured on an H200 (benchmarks/results/tiles_h200.txt, sections 11, 12 and 14) at head dims of
    64, 80, 128 and 256 and groups of 8, 16 and 32: two rows with a warp each are 1.1 to 2 times as
    fast as the tiles before. Four rows, one row, and two warps a row are slower.
    """
    if not _in_two_rows(head_dim, group, dtype):
        return _one_row(head_dim, group, dtype)
    if head_dim <= 64 and _cost(head_dim, group, dtype) > _SMALL:
        limit = 168  # with a group of 32 and 64 elements a few more keep a sixth program out
    stages = _stages(capability, stages)
    return Tile(rows=2, slots=16, warps=2, stages=stages, registers=limit)


def _in_two_rows(head_dim: int, group: int, dtype: torch.dtype) -> bool:
    """Whether two rows of a matrix kernel, of a warp each, fit."""
    cost = _cost(head_dim, group, dtype)
    return cost <= _SMALL or (dtype.itemsize < 4 and cost <= 4 * _SMALL and padded(group) <= 32)


def _cost(head_dim: int, group: int, dtype: torch.dtype) -> int:
    """Elements of a row's [head_dim, group] tile; float32 operands take twice the registers."""
    return padded(head_dim) * padded(group) * (2 if dtype == torch.float32 else 1)


def _one_row(head_dim: int, group: int, dtype: torch.dtype) -> Tile:
    # Chosen by the compiler's resource report for compute capability 9.0: no registers spilled.
    warps = 4 if _cost(head_dim, group, dtype) <= 128 * 32 else 8
    return Tile(rows=1, slots=16, warps=warps, stages=1)


def _copies(capability: tuple[int, int]) -> bool:
    """Whether memory can be copied to shared memory while a program goes on."""
    return capability >= (8, 0)


def _stages(capability: tuple[int, int], stages: int = 2) -> int:
    return stages if _copies(capability) else 1  # such copies let loads run ahead


@dataclass(frozen=True, kw_only=True)
class FusedTile:
    """Of the fused kernels: tokens a program, with all their query heads of one key/value head;
    keys a step; warps, stages: launch options.
    """

    tokens: int
    keys: int
    warps: int
    stages: int


def fused_tile(
    *, head_dim: int, group: int, dtype: torch.dtype, capability: tuple[int, int]
) -> FusedTile:
    """Tile of the fused kernels; arguments as for `forward_tile`.

    Rows are tokens times query heads, the group padded to a power of two; a product takes at least
    16. float32 products are unrolled, so their tiles are small. All fit into the 99 KiB of shared
    memory that the smallest GPUs since capability 8.0 have.
    """
    heads = power_of_two(group)
    width = padded(head_dim)
    rows = (16 if width > 128 else 32) if dtype == torch.float32 else (32 if width > 128 else 64)
    keys = 16 if dtype == torch.float32 else 64 if width <= 64 else 32
    stages = _stages(capability) if dtype != torch.float32 else 1
    return FusedTile(tokens=max(1, rows // heads), keys=keys, warps=4, stages=stages)
