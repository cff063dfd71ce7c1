"""What a user's mask means to the kernels: a number added to the sequence's scores.

A mask is bool (True attends) or floating (added to the scores), broadcastable to
[B, Hq, Tq, Tk]; it masks the sequence, never the depth slots. A *dead* row is one that it leaves no
key at all: all of its weight goes to the slots. Nothing here becomes larger than the mask itself,
seen without the axes along which it is broadcast. No Triton: CPUs use this too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_Limits = dict[torch.dtype, float]
# Below this a number has no bit left for a score of size 1, in the precision that scores have: a
# key masked by it is invisible beside any other, and rows of such keys alone see them all alike.
_ABSORBING: _Limits = {torch.float64: -(2.0**53), torch.float32: -(2.0**24)}
# What stands for all such numbers. A power of two: times log2(e), as exponentials in base 2 need
# it, it stays exact, so differences of two of them are 0.
_ABSORBED = -(2.0**100)
# And what stands for -inf: finite, also times log2(e).
_HIDDEN = -(2.0**110)


def is_shifted(q: Tensor, k: Tensor, is_causal: bool) -> bool:
    """Whether causal attention of Tq queries over Tk keys needs a mask to say so; see `aligned`."""
    return is_causal and q.shape[2] not in (1, k.shape[2])


def aligned(
    q: Tensor, k: Tensor, is_causal: bool, mask: Tensor | None
) -> tuple[bool, Tensor | None]:
    """is_causal and mask as the platform's attentions take them, for Tq queries over Tk keys.

    Causal means u <= t + Tk - Tq: the last query sees every key. Attentions that take is_causal
    differ in where they put the diagonal if Tq != Tk, so then it becomes a mask [Tq, Tk].
    """
    queries, keys = q.shape[2], k.shape[2]
    if not is_shifted(q, k, is_causal):
        return is_causal and queries == keys, mask
    seen = torch.ones((queries, keys), dtype=torch.bool, device=q.device)
    return False, seen.tril(keys - queries)


def compact(mask: Tensor) -> Tensor:
    """The mask as [B or 1, Hq or 1, T or 1, T or 1], without repeating what was expanded."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    for dim, stride in enumerate(mask.stride()):
        if type(stride) is int and stride == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add: False becomes -inf, and no finite number becomes infinite."""
    if mask.dtype == torch.bool:
        visible = mask.new_zeros((), dtype=dtype)
        return torch.where(mask, visible, mask.new_full((), -math.inf, dtype=dtype))
    if torch.finfo(mask.dtype).max > torch.finfo(dtype).max:
        mask = absorbed(mask, dtype)
    return mask.to(dtype)


def finite(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as finite numbers to add, for kernels that differ in what they make of -inf.

    A hidden key still weighs nothing beside any other. A dead row sees all of its keys, so it is
    the caller's to find (`dead_rows`).
    """
    hidden = max(_HIDDEN, torch.finfo(dtype).min)
    if mask.dtype == torch.bool:
        visible = mask.new_zeros((), dtype=dtype)
        return torch.where(mask, visible, mask.new_full((), hidden, dtype=dtype))
    return mask.to(dtype).clamp(min=hidden)


def absorbed(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask whose huge numbers, in the precision of `dtype`, are replaced by one."""
    if mask.dtype in (torch.bool, torch.float16):  # float16 has none
        return mask
    wide = torch.promote_types(dtype, torch.float32)
    return mask.masked_fill((mask < _ABSORBING[wide]) & (mask != -math.inf), _ABSORBED)


def dead_rows(mask: Tensor) -> Tensor:
    """[.., T or 1, 1]: whether a mask leaves the row no key. NaN leaves it one."""
    if mask.dtype == torch.bool:
        return mask.sum(-1, keepdim=True) == 0  # any() and all() can't be traced without a GPU
    return mask.amax(-1, keepdim=True) == -math.inf


def normalised(grad_out: Tensor, bias: Tensor, lse: Tensor, tokens: int) -> Tensor:
    """grad_out, for a backward that takes p = exp(z - lse), where a mask has rounded lse: if S = 0.

    Where one huge number m masks all n visible keys of a row, z = m and lse = m + log(n) in
    rounded arithmetic, and the p of a row sums to n exp(m - lse), say n, instead of 1. Every
    gradient is linear in p grad_out, so grad_out takes the missing factor. (With slots that see
    the row, p is 0.) tokens: Tk.
    """
    largest = bias.amax(-1, keepdim=True).to(lse.dtype)
    keys = (bias == largest).sum(-1, keepdim=True)
    if bias.shape[-1] == 1:
        keys = keys * tokens
    rounded = (largest < _ABSORBING[lse.dtype]) & (lse.unsqueeze(-1) != -math.inf)
    total = keys * (largest - lse.unsqueeze(-1)).exp()
    return grad_out / torch.where(rounded, total, 1.0).to(grad_out.dtype)


def gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """The gradient of an additive mask, in its shape and dtype, by Tq x Tk scores: batch by batch.

    dmask = dz = p (do . v - do . out), p = exp(z - lse), summed over the axes of the broadcast.
    out, lse: joint; lse +inf in rows without any weight on the sequence.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    (b, hq, t, d), tokens = q.shape, k.shape[2]
    grouped = (k.shape[1], hq // k.shape[1], t, d)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    bias = additive(mask, compute).expand(b, hq, t, tokens)
    total = q.new_zeros(shape, dtype=compute)
    for i in range(b):
        query, grad, joint = (x[i].to(compute).reshape(grouped) for x in (q, grad_out, out))
        z = (
            (query @ k[i].to(compute).unsqueeze(1).mT)
            .mul_(scale)
            .add_(bias[i].reshape(*grouped[:3], tokens))
        )
        p = z.sub_(lse[i].to(compute).reshape(grouped[:3]).unsqueeze(-1)).exp_()
        dp = grad @ v[i].to(compute).unsqueeze(1).mT
        dz = dp.sub_((grad * joint).sum(-1, keepdim=True)).mul_(p).reshape(1, hq, t, tokens)
        row = total if shape[0] == 1 else total[i : i + 1]
        row.add_(dz.sum_to_size((1, *shape[1:])))
    return total.reshape(mask.shape).to(mask.dtype)


def no_gradient(mask: Tensor | None) -> Tensor | None:
    """Of a mask that nothing was masked with, as there are no tokens or no batches."""
    return None if mask is None else mask.new_zeros(mask.shape)


def reduced(scores_gradient: Tensor, mask: Tensor) -> Tensor:
    """The mask's gradient from the scores' [B, Hq, Tq, Tk]: summed over the broadcast's axes."""
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    axes = [i for i in range(4) if shape[i] != scores_gradient.shape[i]]
    if axes:
        wide = torch.promote_types(scores_gradient.dtype, torch.float32)
        scores_gradient = scores_gradient.sum(axes, keepdim=True, dtype=wide)
    return scores_gradient.reshape(mask.shape).to(mask.dtype).contiguous()
