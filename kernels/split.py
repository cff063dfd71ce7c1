"""The combined attention on GPUs, in two steps: the platform's attention, then the depth slots.

Forward: (out_seq, lse_seq) of the fastest attention there is, merged with the depth slots by
`depth_forward`. Backward: that attention's own backward with the joint out and lse, then
`depth_backward`. The two parts separate exactly (see `sequence`). The forward of a few queries over
many keys is `decode`'s alone; where the platform has no attention that serves, `fused_forward` and
`fused_backward` do it all.

`forward` and `backward` take the slots as separate tensors, and are to be called from an opaque
operator, or traced where :func:`traceable` says so. The stacked forms take one tensor a side and
can be traced (`torch.library.triton_op`). `merge` is the depth part, the sequence's being given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_compile.kernels import (
    Lowering,
    choose,
    choose_merge,
    configs,
    decode,
    depth_backward,
    depth_forward,
    depth_gather,
    fused_backward,
    fused_forward,
    joint,
    launch,
    masks,
    plain,
    sequence,
    slot_table,
)

_Slots = Sequence[Tensor] | Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: _Slots,
    depth_v: _Slots,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention over the sequence and the depth slots.

    Args:
        q: queries [B, Hq, Tq, d].
        k, v: the layer's own keys and values [B, Hk, Tk, d], Hq a multiple of Hk.
        depth_k, depth_v: S slots of [B, Hk, Tq, d], each with strides of its own.
        is_causal: token t attends to tokens u <= t + Tk - Tq of the sequence.
        scale: factor of every score.
        mask: of the sequence, bool or additive, broadcastable to [B, Hq, Tq, Tk].
        seen: what `visible.run` says of the mask, where it is known; for `decode`.
        lowering: by default what `kernels.choose` says.

    Returns:
        out [B, Hq, Tq, d] in [B, Tq, Hq, d] memory order, and lse [B, Hq, Tq], natural log, float32
        (float64 for float64 inputs). A row without a visible key gives all its weight to the
        slots; without slots its out is 0 and its lse -inf.
    """
    lowering = lowering or lowering_of(q, k, is_causal, mask, queries=q.shape[2])
    if q.numel() == 0:
        return _nothing(q)
    has_slots = _count(depth_k) > 0
    if lowering.name == "decode":
        slots = _slots(depth_k, depth_v, listed=True) if has_slots else None
        return decode.run(q, k, v, slots, is_causal=is_causal, scale=scale, mask=mask, seen=seen)
    if lowering.name == "fused":
        slots = _slots(depth_k, depth_v) if has_slots else None
        return fused_forward.run(q, k, v, slots, is_causal=is_causal, scale=scale, mask=mask)
    is_causal, mask = masks.aligned(q, k, is_causal, mask)
    q = launch.unit_rows(q)
    if mask is not None and not has_slots:
        mask = masks.absorbed(masks.compact(mask), q.dtype)
    out, lse = sequence.forward(
        lowering.sequence, q, k, v, is_causal=is_causal, scale=scale, mask=mask
    )
    if has_slots:
        return _merge(lowering, q, out, lse, depth_k, depth_v, scale)
    if mask is not None:
        out = out.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)
    return launch.token_major(out), launch.contiguous(lse)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    mask_gradient: bool = False,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`forward`, given its joint ``out`` and ``lse``.

    Args:
        grad_out: gradient of ``out`` [B, Hq, T, d], any strides.
        accumulator: [N >= S, 2, B, Hk, T, d], any strides, float32 or the inputs' dtype: row i gets
            ``+= (d depth_k[i], d depth_v[i])`` in place. Rows from S up are not touched.
        mask_gradient: whether to compute the gradient of an additive mask.

    Returns:
        dq [B, Hq, T, d], and the sequence part's dk, dv [B, Hk, T, d]; token-major in memory.
        The mask's gradient, in its shape and dtype, or None.
    """
    grads = None
    if accumulator is not None and depth_k:
        grads = (accumulator.select(1, 0), accumulator.select(1, 1))
    return _backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, grads, True, is_causal, scale, mask,
        mask_gradient, lowering,
    )[:4]  # fmt: skip


def query_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    mask_gradient: bool = False,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """:func:`backward` but for the gradients of the slots, S >= 1, which `gather` computes.

    Returns:
        dq, dk, dv and the mask's gradient, as :func:`backward`; delta = do . o [B, Hq, T], float32
        (float64 for float64 inputs), contiguous.
    """
    dq, dk, dv, dmask, delta = _backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, None, False, is_causal, scale, mask,
        mask_gradient, lowering,
    )  # fmt: skip
    assert delta is not None
    return dq, dk, dv, dmask, delta


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
    """The whole gradients of some slots and sums of others; arguments and results as of
    `depth_gather.run`.
    """
    key, query = keys[0], queries[0]
    what = (grad_outs, queries, lses, deltas, keys, values, readers)
    options: dict[str, Any] = dict(
        scale=scale, dtype=dtype, starts=starts, partials=partials, unfinished=unfinished
    )
    by_kernel = key.numel() > 0 and merge_lowering_of(query).name != "plain"
    if by_kernel:
        products = configs.products(
            head_dim=key.shape[3], group=query.shape[1] // key.shape[1], dtype=key.dtype
        )
        by_kernel = products == "vector"
    return (depth_gather.run if by_kernel else joint.gather)(*what, **options)


def lowering_of(
    q: Tensor,
    k: Tensor,
    is_causal: bool,
    mask: Tensor | None,
    *,
    queries: int | None = None,
    mask_gradient: bool = False,
) -> Lowering:
    """What `kernels.choose` says of these inputs; arguments as of :func:`forward` or, without
    queries, :func:`backward`.
    """
    interpreted = not q.is_cuda  # Triton's interpreter: no fused attention on the CPU
    return choose(
        device_type="cuda",
        dtype=q.dtype,
        head_dim=q.shape[3],
        tokens=k.shape[2],
        queries=queries,
        capability=(8, 0) if interpreted else launch.capability(q),
        available=frozenset() if interpreted else None,
        masked=mask is not None or masks.is_shifted(q, k, is_causal),
        additive=mask is not None and mask.dtype != torch.bool,
        mask_gradient=mask_gradient,
        traced=launch.is_traced(q),
    )


def merge_lowering_of(q: Tensor) -> Lowering:
    """What `kernels.choose_merge` says of these queries."""
    # In Triton's interpreter q is on the CPU.
    return choose_merge(device_type="cuda", dtype=q.dtype, head_dim=q.shape[-1])


def traceable(
    lowering: Lowering, q: Tensor, depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]
) -> bool:
    """Whether a call with these slots, separate tensors, can be traced by a compiler.

    The kernels that take the slots themselves (`slot_table.named`) are those of small groups.

    Args:
        lowering: of the call. q: queries [B, Hq, T, d]. depth_k, depth_v: S slots.
    """
    if lowering.name != "split" or lowering.sequence == "math" or q.numel() == 0:
        return False
    if not depth_k:
        return True
    group = q.shape[1] // depth_k[0].shape[1]
    products = configs.products(head_dim=q.shape[3], group=group, dtype=q.dtype)
    return products == "vector" and slot_table.nameable(depth_k, depth_v)


def forward_stacked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` with the slots as one tensor [S, B, Hk, T, d] a side, any strides."""
    return forward(
        q, k, v, depth_k, depth_v, is_causal=is_causal, scale=scale, mask=mask, lowering=lowering
    )


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
    mask: Tensor | None = None,
    mask_gradient: bool = False,
    lowering: Lowering | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`forward_stacked`, given its joint ``out`` and ``lse``.

    Returns:
        dq [B, Hq, T, d], dk, dv [B, Hk, T, d], d_depth_k, d_depth_v [S, B, Hk, T, d]; all with
        heads inside tokens in memory ([..., T, H, d] order). The mask's gradient, or None.
    """
    grads = (
        launch.token_major_empty(depth_k, depth_k.shape),
        launch.token_major_empty(depth_v, depth_v.shape),
    )
    dq, dk, dv, dmask, _ = _backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, grads, False, is_causal, scale, mask,
        mask_gradient, lowering,
    )  # fmt: skip
    return dq, dk, dv, *grads, dmask


def merge(
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The joint out and lse, as :func:`forward`, given the sequence's own; S >= 1."""
    if q.numel() == 0:
        return _nothing(q)
    q, out = launch.unit_rows(q), launch.unit_rows(sequence_out)
    lse = sequence_lse.to(torch.promote_types(q.dtype, torch.float32))
    return _merge(merge_lowering_of(q), q, out, lse, depth_k, depth_v, scale)


def merge_backward(
    grad_out: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`merge`: of sequence_out, sequence_lse and q; accumulator as above."""
    grads = (accumulator.select(1, 0), accumulator.select(1, 1))
    return _merge_backward(
        grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, grads, scale
    )[:3]


def merge_query_backward(
    grad_out: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`merge_backward` but for the gradients of the slots, and delta, as `query_backward`."""
    dout, dlse, dq, delta = _merge_backward(
        grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, None, scale
    )
    assert delta is not None
    return dout, dlse, dq, delta


def _merge_backward(
    grad_out: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of sequence_out, sequence_lse and q, and delta where there are no grads."""
    if q.numel() == 0:
        dlse = torch.empty_like(sequence_lse)
        return _empty(sequence_out), dlse, _empty(q), None if grads else _no_delta(q)
    q, grad_out = launch.unit_rows(q), launch.token_major(grad_out)
    out, lse = launch.unit_rows(out), launch.contiguous(lse)
    nothing = q.new_zeros(q.shape[-1]).expand(q.shape)  # there is no sequence part of dq
    dq, delta = _depth_backward(
        merge_lowering_of(q), grad_out, q, out, lse, nothing, depth_k, depth_v, grads, True, scale
    )
    of_sequence = joint.sequence_gradients(grad_out, sequence_out, sequence_lse, out, lse)
    return *of_sequence, dq, delta


def _merge(
    lowering: Lowering,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    depth_k: _Slots,
    depth_v: _Slots,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if lowering.name == "plain":
        return plain.forward(q, out, lse, depth_k, depth_v, scale)
    return depth_forward.run(q, out, lse, _slots(depth_k, depth_v), scale)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: _Slots,
    depth_v: _Slots,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor] | None,
    accumulate: bool,
    is_causal: bool,
    scale: float,
    mask: Tensor | None,
    mask_gradient: bool,
    lowering: Lowering | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dmask, delta; fills or adds to grads, the slots' (keys, values).

    Where there are slots but no grads, delta is returned.
    """
    lowering = lowering or lowering_of(q, k, is_causal, mask, mask_gradient=mask_gradient)
    if q.numel() == 0:
        dmask = masks.no_gradient(mask) if mask_gradient else None
        return _empty(q), _empty(k), _empty(v), dmask, None if grads else _no_delta(q)
    if lowering.name == "fused":
        slots = _slots(depth_k, depth_v) if _count(depth_k) > 0 else None
        dq, dk, dv, delta = fused_backward.run(
            grad_out, q, k, v, slots, out, lse, *(grads or (None, None)),
            accumulate=accumulate, is_causal=is_causal, scale=scale, mask=mask,
        )  # fmt: skip
        return dq, dk, dv, None, None if grads else delta
    is_causal, mask = masks.aligned(q, k, is_causal, mask)
    q, grad_out = launch.unit_rows(q), launch.token_major(grad_out)
    out, lse = launch.unit_rows(out), launch.contiguous(lse)
    has_slots = _count(depth_k) > 0
    grad = grad_out
    if mask is not None and mask.is_floating_point() and not has_slots:
        mask = masks.absorbed(mask if mask_gradient else masks.compact(mask), q.dtype)
        grad = sequence.normalised(lowering.sequence, grad_out, q, k, lse, mask)
    dq, dk, dv, dmask = sequence.backward(
        lowering.sequence, grad, q, k, v, out, lse,
        is_causal=is_causal, scale=scale, mask=mask, mask_gradient=mask_gradient,
    )  # fmt: skip
    own_delta = None
    if has_slots:
        dq, own_delta = _depth_backward(
            lowering, grad_out, q, out, lse, dq, depth_k, depth_v, grads, accumulate, scale
        )
    else:
        dq = launch.token_major(dq)
    return dq, launch.token_major(dk), launch.token_major(dv), dmask, own_delta


def _depth_backward(
    lowering: Lowering,
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    sequence_grad_query: Tensor,
    depth_k: _Slots,
    depth_v: _Slots,
    grads: tuple[Tensor, Tensor] | None,
    accumulate: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """The query's whole gradient; fills or adds to grads, the slots' (keys, values), or returns
    delta, too.
    """
    grads_or_none = grads or (None, None)
    first = (grad_out, q, out, lse, sequence_grad_query)
    if lowering.name == "plain":
        slots = (depth_k, depth_v)
        return plain.backward(*first, *slots, *grads_or_none, accumulate=accumulate, scale=scale)
    table = _slots(depth_k, depth_v)
    return depth_backward.run(*first, table, *grads_or_none, accumulate=accumulate, scale=scale)


def _count(slots: _Slots) -> int:
    return slots.shape[0] if isinstance(slots, Tensor) else len(slots)


def _slots(depth_k: _Slots, depth_v: _Slots, *, listed: bool = False) -> slot_table.Slots:
    if isinstance(depth_k, Tensor) and isinstance(depth_v, Tensor):
        return slot_table.stacked(depth_k, depth_v)
    make = slot_table.listed if listed else slot_table.separate
    return make(list(depth_k), list(depth_v))


def _no_delta(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _empty(x: Tensor) -> Tensor:
    return launch.token_major_empty(x, x.shape)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _empty(q), q.new_empty(q.shape[:3], dtype=dtype)
