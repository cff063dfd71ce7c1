"""The joint softmax, seen from a sequence part that something else computed, or that has no keys.

No Triton: CPUs use this too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, d] and lse [B, Hq, Tq] of a sequence part without keys: zeros, and -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=wide)


def no_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of such a sequence part."""
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def sequence_gradients(
    grad_out: Tensor, sequence_out: Tensor, sequence_lse: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a sequence part's out [B, Hq, T, d] and lse [B, Hq, T] from the joint ones.

    d o_seq = p_seq do;  d lse_seq = p_seq (do . o_seq - do . o);  p_seq = exp(lse_seq - lse)
    """
    compute = lse.dtype
    grad = grad_out.to(compute)
    p = (sequence_lse.to(compute) - lse).exp()
    dlse = p * (grad * (sequence_out.to(compute) - out.to(compute))).sum(-1)
    dout = (grad * p.unsqueeze(-1)).to(sequence_out.dtype)
    token_major = dout.transpose(1, 2).contiguous().transpose(1, 2)
    return token_major, dlse.to(sequence_lse.dtype).contiguous()


def gather(
    grad_outs: Sequence[Tensor],
    queries: Sequence[Tensor],
    lses: Sequence[Tensor],
    deltas: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    readers: Sequence[int],
    *,
    scale: float,
    dtype: torch.dtype,
    starts: Sequence[Tensor | None] = (),
    partials: Tensor | None = None,
    unfinished: int = 0,
) -> tuple[Tensor, Tensor]:
    """The whole gradients of some slots and sums of others, in PyTorch operations; arguments and
    results as of `depth_gather.run`, but sums of float64 inputs are float64.
    """
    (b, hk, t, d), finished = keys[0].shape, len(keys) - unfinished
    compute = torch.promote_types(keys[0].dtype, torch.float32)
    gradients = keys[0].new_empty((finished, 2, b, t, hk, d), dtype=dtype).transpose(3, 4)
    sums = keys[0].new_empty((unfinished, 2, b, t, hk, d), dtype=compute).transpose(3, 4)
    for slot, (key, value, count) in enumerate(zip(keys, values, readers, strict=True)):
        key, value = key.to(compute).unsqueeze(2), value.to(compute).unsqueeze(2)
        total = torch.zeros((2, b, hk, t, d), dtype=compute, device=key.device)
        if partials is not None:
            total += partials[slot]
        dk, dv = total
        for do, q, lse, delta in list(zip(grad_outs, queries, lses, deltas, strict=True))[:count]:
            rows = (b, hk, q.shape[1] // hk, t)
            query, grad = (x.to(compute).reshape(*rows, d) for x in (q, do))
            p = (query * key).sum(-1).mul_(scale).sub_(lse.to(compute).reshape(rows)).exp_()
            dz = (grad * value).sum(-1).sub_(delta.to(compute).reshape(rows)).mul_(p)
            dk += (dz.unsqueeze(-1) * query).sum(2)
            dv += (p.unsqueeze(-1) * grad).sum(2)
        if slot >= finished:
            sums[slot - finished].copy_(total)
            continue
        dk.mul_(scale)
        own = starts[2 * slot : 2 * slot + 2] if starts else (None, None)
        for side, (made, start) in enumerate(zip((dk, dv), own, strict=True)):
            gradients[slot, side].copy_(made if start is None else made.add_(start))
    return gradients, sums
