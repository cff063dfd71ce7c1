"""Tiles and splits of the decode kernels: a fixed choice, as in `configs`, by shapes and dtype.

What decides there is how many bytes of K and V are on their way, and how many programs share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moda_compile.kernels.configs import padded


@dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """Of the decode kernel: rows (query heads times query tokens that share a key/value head) and
    keys a step; warps, stages: launch options; programs: as many as are wanted for each SM.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 3


@dataclass(frozen=True, kw_only=True)
class MergeTile:
    """Of the kernel that joins the parts: parts a step; warps: launch option."""

    parts: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class Splits:
    """count splits of the keys, each of `keys` keys (but for the last), a multiple of the tile's.

    The numbers are symbolic where the shapes are.
    """

    count: Any
    keys: Any


def decode_tile(
    *,
    head_dim: int,
    rows: Any,
    keys: Any,
    pairs: Any,
    dtype: torch.dtype,
    capability: tuple[int, int],
    multiprocessors: int,
) -> DecodeTile:
    """Tile of the decode kernel.

    What decides is how many bytes of K and V are on their way to an SM at a time: about 40 KiB hide
    the memory's latency on an H100. Rows beyond one tile go to programs of their own, which read
    the same keys at about the same time, from L2. All programs should run at once: with 128 to 168
    registers a thread three of them fit into an SM. (Measured on an H100, 8 x 4 heads over 2048
    keys: 13.4 us with three wanted for each SM, 15.7 with four.)

    Where batches and heads alone fill the GPU, a program has all keys of its heads and nothing is
    left to join, in larger steps, as the start of a program counts less. Over many keys what counts
    is that every SM has as many programs. (64 x 3 heads: 2048 keys 45 us, in two splits 53; 16384
    keys 294 us, in two splits 280.)

    Args:
        head_dim: d. rows: query heads per key/value head, times query tokens; may be symbolic.
        keys: their number; may be symbolic. pairs: batches times key/value heads; may be symbolic.
        dtype: of q, k, v. capability: as for `configs.forward_tile`. multiprocessors: of the GPU.
    """
    width = padded(head_dim)
    known = rows if type(rows) is int else _DECODE_ROWS
    stages = 3 if capability >= (8, 0) else 1  # without asynchronous copies loads don't run ahead
    if dtype == torch.float32:
        # Products without tensor cores are unrolled: the tile's three sides bound the code's size.
        step, warps = (32, 4) if width <= 128 else (16, 8)
        return DecodeTile(rows=16, keys=step, warps=warps, stages=min(stages, 2))
    most = _DECODE_ROWS if width <= 128 else _DECODE_ROWS // 2
    tile_rows = min(most, padded(known))
    warps = 8 if tile_rows * width > 64 * 64 else 4
    if tile_rows == 16 and width <= 64 and type(pairs) is int and 2 * pairs >= multiprocessors:
        if type(keys) is int and keys >= _MANY_KEYS:
            return DecodeTile(rows=16, keys=128, warps=4, stages=min(stages, 2))
        return DecodeTile(rows=16, keys=128, warps=4, stages=stages, programs=2)
    # Beside a large tile of rows, two stages fit twice into an SM of 228 KiB of shared memory, and
    # once into one of 100 KiB.
    step = 64 if width <= 128 else 32
    return DecodeTile(
        rows=tile_rows, keys=step, warps=warps, stages=stages if warps == 4 else min(stages, 2)
    )


_DECODE_ROWS = 64
_MANY_KEYS = 8192


def decode_splits(*, pairs: Any, tile: DecodeTile, multiprocessors: int) -> Any:
    """How many programs may share the keys of one (batch, key/value head): enough to fill the GPU.

    A plain function of shapes, also of symbolic ones, on which it puts no guard: a captured CUDA
    graph and a traced one replay what was decided here. It hardly depends on how many keys there
    are (see `decode_tile`): that grows with every token.

    Args:
        pairs: batches times key/value heads times tiles of rows.
        tile: of the kernel. multiprocessors: of the GPU.
    """
    return torch.sym_max(1, tile.programs * multiprocessors // pairs)


def equal_splits(*, count: Any, keys: Any, tile_keys: int) -> Splits:
    """At most `count` splits, each of as few whole steps of tile_keys keys as that takes.

    Every split has at least one step's keys, and there is at least one, of no keys if there are
    none.
    """
    steps = -(-keys // tile_keys)
    each = torch.sym_max(1, -(-steps // count))
    return Splits(count=torch.sym_max(1, -(-steps // each)), keys=each * tile_keys)


def decode_slots(*, head_dim: int, dtype: torch.dtype) -> int:
    """Slots that one program of the decode kernel reads at once: all are on their way together.

    Args:
        head_dim: d. dtype: of q, k, v.
    """
    return 16 if dtype == torch.float32 or padded(head_dim) > 128 else 32


def merge_tile(*, head_dim: int, parts: Any) -> MergeTile:
    """Tile of the kernel that joins the parts of one row.

    A program's loads of one step are all on their way at once, so few large steps: [parts,
    head_dim] tiles of 32 elements a thread; of few parts with fewer threads.

    Args:
        head_dim: d. parts: of a row at most; may be symbolic.
    """
    width, most = padded(head_dim), 64
    step = min(most, padded(parts)) if type(parts) is int else most
    step = max(16, min(step, 32 * 32 * 4 // width))
    return MergeTile(parts=step, warps=max(1, min(4, step * width // (32 * 32))))
