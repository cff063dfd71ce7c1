"""Tile shapes of the depth kernels: a fixed choice by capability, head_dim, group and dtype.

There is no autotuning at run time: a tile changes the speed, never the result beyond rounding, and
a first step that compiles a dozen candidates per layer costs more than it gains. What decides:

- The kernels are bound by memory bandwidth: enough loads in flight matter, not the arithmetic.
- A program's product is one tiny matrix product per token, and Triton gives whole tokens to its
  warps: as many tokens as warps, or one token whose rows and columns the warps share.
- A float32 tile [head_dim, group] of a token stays in registers through forward; backward has three
  of them and [slots, head_dim]. Where they don't fit beside several tokens, one token a program.
- 16 slots a step is the least that a tensor-core product takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """tokens: tokens a program; slots: depth slots a step; warps, stages: launch options."""

    tokens: int
    slots: int
    warps: int
    stages: int


def padded(n: int) -> int:
    """n rounded up to a power of two, at least 16: what a tensor-core product needs."""
    return max(16, 1 << (n - 1).bit_length())


def forward_tile(
    *, head_dim: int, group: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Tile:
    """Tile of the forward kernel.

    Args:
        head_dim: d. group: query heads per key/value head. dtype: of q, k, v.
        capability: (major, minor) compute capability; (0, 0) if unknown.
    """
    if _cost(head_dim, group, dtype) <= 64 * 16:
        return Tile(tokens=4, slots=16, warps=4, stages=_stages(capability))
    return _one_token(head_dim, group, dtype)


def backward_tile(
    *, head_dim: int, group: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Tile:
    """Tile of the backward kernel; arguments as for `forward_tile`."""
    if _cost(head_dim, group, dtype) <= 64 * 16:
        return Tile(tokens=4, slots=16, warps=4, stages=1)
    return _one_token(head_dim, group, dtype)


def _cost(head_dim: int, group: int, dtype: torch.dtype) -> int:
    """Elements of a token's [head_dim, group] tile; float32 operands take twice the registers."""
    return padded(head_dim) * padded(group) * (2 if dtype == torch.float32 else 1)


def _one_token(head_dim: int, group: int, dtype: torch.dtype) -> Tile:
    # Chosen by the compiler's resource report for compute capability 9.0: no registers spilled.
    warps = 4 if _cost(head_dim, group, dtype) <= 128 * 32 else 8
    return Tile(tokens=1, slots=16, warps=warps, stages=1)


def _stages(capability: tuple[int, int]) -> int:
    # Asynchronous copies into shared memory (compute capability 8.0) let loads run ahead.
    return 2 if capability >= (8, 0) else 1
