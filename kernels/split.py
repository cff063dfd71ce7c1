"""The combined attention on GPUs, in two steps: the platform's attention, then the depth slots.

Forward: (out_seq, lse_seq) of the fastest attention there is, merged with the depth slots by
`depth_forward`. Backward: that attention's own backward with the joint out and lse, then
`depth_backward`. The two parts separate exactly (see `sequence`).

`forward` and `backward` take the slots as separate tensors, and are to be called from an opaque
operator. The stacked forms take one tensor a side and can be traced (`torch.library.triton_op`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moda_compile.kernels import (
    Lowering,
    choose,
    depth_backward,
    depth_forward,
    launch,
    plain,
    sequence,
    slot_table,
)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    *,
    is_causal: bool,
    scale: float,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention over the sequence and the depth slots.

    Args:
        q: queries [B, Hq, T, d].
        k, v: the layer's own keys and values [B, Hk, T, d], Hq a multiple of Hk.
        depth_k, depth_v: S slots of [B, Hk, T, d], each with strides of its own.
        is_causal: token t attends to tokens u <= t of the sequence.
        scale: factor of every score.
        lowering: by default what `kernels.choose` says.

    Returns:
        out [B, Hq, T, d] in [B, T, Hq, d] memory order, and lse [B, Hq, T], natural log, float32
        (float64 for float64 inputs).
    """
    lowering = _lowering(q, lowering)
    if q.numel() == 0:
        return _nothing(q)
    q = launch.unit_rows(q)
    out, lse = sequence.forward(lowering.sequence, q, k, v, is_causal=is_causal, scale=scale)
    if not depth_k:
        return launch.token_major(out), launch.contiguous(lse)
    if lowering.name == "plain":
        return plain.forward(q, out, lse, depth_k, depth_v, scale)
    return depth_forward.run(q, out, lse, slot_table.table(depth_k, depth_v), scale)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor,
    *,
    is_causal: bool,
    scale: float,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`, given its joint ``out`` and ``lse``.

    Args:
        grad_out: gradient of ``out`` [B, Hq, T, d], any strides.
        accumulator: [N >= S, 2, B, Hk, T, d], any strides, float32 or the inputs' dtype: row i gets
            ``+= (d depth_k[i], d depth_v[i])`` in place. Rows from S up are not touched.

    Returns:
        dq [B, Hq, T, d], and the sequence part's dk, dv [B, Hk, T, d]; token-major in memory.
    """
    lowering = _lowering(q, lowering)
    if q.numel() == 0:
        return _empty(q), _empty(k), _empty(v)
    q, grad_out = launch.unit_rows(q), launch.token_major(grad_out)
    out, lse = launch.unit_rows(out), launch.contiguous(lse)
    dq, dk, dv = sequence.backward(
        lowering.sequence, grad_out, q, k, v, out, lse, is_causal=is_causal, scale=scale
    )
    if not depth_k:
        dq = launch.token_major(dq)
    else:
        grads = (accumulator.select(1, 0), accumulator.select(1, 1))
        if lowering.name == "plain":
            dq = plain.backward(
                grad_out, q, out, lse, dq, depth_k, depth_v, *grads, accumulate=True, scale=scale
            )
        else:
            slots = slot_table.table(depth_k, depth_v)
            dq = depth_backward.run(
                grad_out, q, out, lse, dq, slots, *grads, accumulate=True, scale=scale
            )
    return dq, launch.token_major(dk), launch.token_major(dv)


def forward_stacked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    is_causal: bool,
    scale: float,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` with the slots as one tensor [S, B, Hk, T, d] a side, any strides."""
    lowering = _lowering(q, lowering)
    if q.numel() == 0:
        return _nothing(q)
    q = launch.unit_rows(q)
    out, lse = sequence.forward(lowering.sequence, q, k, v, is_causal=is_causal, scale=scale)
    if depth_k.shape[0] == 0:
        return launch.token_major(out), launch.contiguous(lse)
    if lowering.name == "plain":
        return plain.forward(q, out, lse, depth_k, depth_v, scale)
    return depth_forward.run(q, out, lse, slot_table.stacked(depth_k, depth_v), scale)


def backward_stacked(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward_stacked`, given its joint ``out`` and ``lse``.

    Returns:
        dq [B, Hq, T, d], dk, dv [B, Hk, T, d], d_depth_k, d_depth_v [S, B, Hk, T, d]; all with
        heads inside tokens in memory ([..., T, H, d] order).
    """
    lowering = _lowering(q, lowering)
    d_depth_k = launch.token_major_empty(depth_k, depth_k.shape)
    d_depth_v = launch.token_major_empty(depth_v, depth_v.shape)
    if q.numel() == 0:
        return _empty(q), _empty(k), _empty(v), d_depth_k, d_depth_v
    q, grad_out = launch.unit_rows(q), launch.token_major(grad_out)
    out, lse = launch.unit_rows(out), launch.contiguous(lse)
    dq, dk, dv = sequence.backward(
        lowering.sequence, grad_out, q, k, v, out, lse, is_causal=is_causal, scale=scale
    )
    grads = (d_depth_k, d_depth_v)
    if depth_k.shape[0] == 0:
        dq = launch.token_major(dq)
    elif lowering.name == "plain":
        dq = plain.backward(
            grad_out, q, out, lse, dq, depth_k, depth_v, *grads, accumulate=False, scale=scale
        )
    else:
        slots = slot_table.stacked(depth_k, depth_v)
        dq = depth_backward.run(
            grad_out, q, out, lse, dq, slots, *grads, accumulate=False, scale=scale
        )
    return dq, launch.token_major(dk), launch.token_major(dv), *grads


def _lowering(q: Tensor, given: Lowering | None) -> Lowering:
    if given is not None:
        return given
    if not q.is_cuda:  # Triton's interpreter
        return Lowering("split", "math", "Triton's interpreter: no fused attention on the CPU.")
    capability = launch.capability(q)
    b, h, t, d = q.shape
    return choose(device_type="cuda", dtype=q.dtype, head_dim=d, tokens=t, capability=capability)


def _empty(x: Tensor) -> Tensor:
    return launch.token_major_empty(x, x.shape)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _empty(q), q.new_empty(q.shape[:3], dtype=dtype)
