"""Attention within each of many sequences that lie in one row, their ends given by offsets.

On GPUs ATen's flash attention, which knows offsets; on a CPU, for which PyTorch has no such kernel,
its attention of one sequence after the other. Both tell the log-sum-exp of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moda_compile.kernels import cpu

Window = tuple[int, int]
CAUSAL: Window = (-1, 0)
_aten = torch.ops.aten


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, window: Window, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within each sequence.

    Args:
        q: queries [T, Hq, d] of all sequences, one behind the other.
        k, v: their keys and values [T, Hk, d], Hq a multiple of Hk.
        offsets: where sequences start and the last one ends [N + 1], int32, from 0 to T.
        longest: tokens of the longest sequence, or more.
        window: (left, right): token t of a sequence attends to t - left .. t + right of it; -1 is
            without end. (-1, 0) is causal.
        scale: factor of every score.

    Returns:
        out [T, Hq, d] and lse [Hq, T], natural log, float32 (float64 for float64 inputs).
    """
    if q.is_cuda:
        left, right = window
        result = _aten._flash_attention_forward.default(
            q, k, v, offsets, offsets, longest, longest, 0.0, window == CAUSAL, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return result[0], result[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    lse.fill_(-torch.inf)
    for part, options in _sequences(offsets, window):
        own_q, own_k, own_v = (_batched(x[part]) for x in (q, k, v))
        y, z = cpu.forward(own_q, own_k, own_v, (), (), scale=scale, **options)
        out[part], lse[:, part] = y[0].transpose(0, 1), z[0]
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    longest: int,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, Hq, d], dk and dv [T, Hk, d] of :func:`forward`, shapes as there.

    A gradient of the lse is taken only for tokens whose ``grad_out`` is not zero; of the joint
    softmax it is zero where that is (see `joint.sequence_gradients`).
    """
    if grad_lse is not None:
        out = _with_gradient_of_lse(out, grad_out, grad_lse)
    if q.is_cuda:
        left, right = window
        unused = q.new_empty(0)
        random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # without dropout
        dq, dk, dv = _aten._flash_attention_backward.default(
            grad_out.contiguous(), q, k, v, out, lse, offsets, offsets, longest, longest, 0.0,
            window == CAUSAL, random_state, unused,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for part, options in _sequences(offsets, window):
        do, own_q, own_k, own_v, own_out = (_batched(x[part]) for x in (grad_out, q, k, v, out))
        made = cpu.backward(
            do, own_q, own_k, own_v, (), (), own_out, lse[None, :, part], None,
            scale=scale, **options,
        )  # fmt: skip
        dq[part], dk[part], dv[part] = (x[0].transpose(0, 1) for x in made[:3] if x is not None)
    return dq, dk, dv


def _with_gradient_of_lse(out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    """An out whose product with grad_out is less by grad_lse.

    Backward kernels use out for nothing but delta = do . o, in dz = p (do . v - delta), and the
    lse's gradient adds p dlse to dz. So delta - dlse does it: o - do dlse / (do . do). Of the joint
    softmax dlse / |do| is at most the distance of two outputs, and nothing grows.
    """
    compute = torch.promote_types(out.dtype, torch.float32)
    direction = grad_out.to(compute)
    size = direction.abs().amax(-1, keepdim=True)  # squares of small numbers would vanish
    still = size == 0
    size = size.masked_fill(still, 1.0)
    direction = direction / size
    square = direction.square().sum(-1, keepdim=True).masked_fill(still, 1.0)
    share = grad_lse.to(compute).transpose(0, 1).unsqueeze(-1) / size / square
    return (out.to(compute) - direction * share).to(out.dtype)


def _sequences(offsets: Tensor, window: Window) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Where each sequence lies, and is_causal or the mask of its window."""
    ends = offsets.tolist()
    left, right = window
    for start, end in zip(ends, ends[1:], strict=False):
        if end == start:
            continue
        options: dict[str, Any] = {"is_causal": window == CAUSAL}
        if not options["is_causal"] and window != (-1, -1):
            token = torch.arange(end - start)
            ahead = token - token[:, None]  # of the query, the key
            seen = torch.ones_like(ahead, dtype=torch.bool)
            if left >= 0:
                seen &= ahead >= -left
            if right >= 0:
                seen &= ahead <= right
            options["mask"] = seen
        yield slice(start, end), options


def _batched(x: Tensor) -> Tensor:
    """x [T, H, d] as [1, H, T, d]."""
    return x.transpose(0, 1).unsqueeze(0)
