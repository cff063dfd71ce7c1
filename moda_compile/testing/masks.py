"""Masks that random stacks build in their forward pass, in the spellings that models really use."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

#: What a stack's attention may see.  `none` is everything; `flag` is `is_causal=True`; the rest are
#: tensors, bool (True may attend) or additive.
Mask = Literal[
    "flag", "none",
    # Causal, in ways of writing it.
    "tril_bool", "arange_bool", "batched_bool", "triu_additive", "not_future", "where_additive",
    "min_additive", "buffer",
    # Not expressible by a flag.
    "window_bool", "window_both", "prefix", "alibi", "bias", "bias_causal",
    # These need the second input: 1 for a real token, or the number of its document.
    "padding_right", "padding_right_causal", "padding_left_causal", "documents", "documents_both",
]  # fmt: skip

MASKS: tuple[Mask, ...] = get_args(Mask)
CAUSAL: tuple[Mask, ...] = MASKS[2:10]
GENERAL: tuple[Mask, ...] = MASKS[10:16]
WITH_INPUT: tuple[Mask, ...] = MASKS[16:]

LONGEST = 64  # tokens that the registered buffer holds
BUCKETS = 8  # distances that the learned bias tells apart


def extra_input(kind: Mask, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """The second input `[B, T]` that a mask of `WITH_INPUT` reads."""
    position = torch.arange(length)
    if kind.startswith("documents"):
        starts = torch.rand(batch, length, generator=generator) < 0.4
        return starts.long().cumsum(-1)
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if "left" in kind:
        return (position >= length - real).long()
    return (position < real).long()


def relative_bias(table: Tensor, length: int) -> Tensor:
    """A learned bias `[1, H, T, T]` by distance, of a table `[BUCKETS, H]` (as T5 has it)."""
    position = torch.arange(length, device=table.device)
    distance = position[None, :] - position[:, None]
    bucket = distance.clamp(-BUCKETS // 2, BUCKETS // 2 - 1) + BUCKETS // 2
    return table[bucket].permute(2, 0, 1).unsqueeze(0)


def build(
    kind: Mask,
    like: Tensor,
    *,
    heads: int,
    extra: Tensor | None = None,
    buffer: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor | None:
    """The mask for tokens `like [B, T, D]`, broadcastable to `[B, H, T, T]`; None without one.

    Args:
        kind: which.
        like: gives B, T, dtype and device.
        heads: Hq.
        extra: the second input `[B, T]`, for `WITH_INPUT`.
        buffer: lower triangle `[LONGEST, LONGEST]`, for "buffer".
        table: weights `[BUCKETS, Hq]`, for "bias" and "bias_causal".
    """
    batch, length, device, dtype = *like.shape[:2], like.device, like.dtype
    if kind in ("none", "flag"):
        return None
    if kind == "tril_bool":
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if kind in ("triu_additive", "min_additive"):
        fill = -math.inf if kind == "triu_additive" else torch.finfo(dtype).min
        return torch.full((length, length), fill, device=device, dtype=dtype).triu(1)
    if kind == "buffer":
        assert buffer is not None
        return buffer[None, None, :length, :length]
    position = torch.arange(length, device=device)
    query, key = position[None, None, :, None], position[None, None, None, :]
    causal = query >= key
    if kind in ("arange_bool", "batched_bool"):
        return causal.expand(batch, 1, length, length) if kind == "batched_bool" else causal
    if kind == "not_future":
        return ~(position > position.unsqueeze(-1))
    if kind == "where_additive":
        zero = torch.zeros((), dtype=dtype, device=device)
        return torch.where(causal, zero, -math.inf)
    if kind == "window_bool":
        return causal & (query - key < 3)
    if kind == "window_both":
        return (query - key).abs() <= 2
    if kind == "prefix":
        return causal | (key < 3)
    if kind == "alibi":
        slope = 2.0 ** -torch.arange(1, heads + 1, device=device, dtype=dtype)
        bias = slope[:, None, None] * (key - query)[0].to(dtype)
        return bias.masked_fill(~causal[0], -math.inf)
    if kind in ("bias", "bias_causal"):
        assert table is not None
        bias = relative_bias(table, length)
        return bias if kind == "bias" else bias.masked_fill(~causal, -math.inf)
    assert extra is not None, f"mask {kind!r} needs the second input"
    if kind.startswith("documents"):
        same = extra[:, None, :, None] == extra[:, None, None, :]
        return same if kind == "documents_both" else same & causal
    real = extra[:, None, None, :].bool()
    return real & causal if kind.endswith("causal") else real
