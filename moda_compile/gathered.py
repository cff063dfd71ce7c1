"""Operators of a backward pass that a compiler has in one graph, from the last layer to the first.

`ops.depth_attention_backward` adds to an accumulator, so a slot's gradient is read and written by
every layer that reads the slot. Where one graph holds the backward of all of them, they give back
delta = do . o instead, and ``depth_gather`` computes a slot's gradients from all its readers, once
(see `passes.gather`). Nothing here is mutated, and no accumulator is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moda_compile import ops, registration
from moda_compile.errors import InputError

MOST_SLOTS = 4
"""The most slots of one ``depth_gather``, as many as keep their sums in registers."""


@registration.operator("depth_attention_query_backward")
def depth_attention_query_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    mask_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dmask as `ops.depth_attention_backward`, and delta = do . o [B, Hq, Tq].

    S >= 1 slots, whose gradients are left to ``depth_gather``. delta has the dtype of lse.
    """
    ops.check_slots(q, k, v, depth_k, depth_v)
    ops.check_mask(q, k, mask, is_causal)
    ops.check_some("depth_attention_query_backward", depth_k)
    *gradients, mask_grad, delta = ops.kernels_for(q).query_backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse,
        is_causal=is_causal, scale=scale, mask=mask, mask_gradient=mask_gradient,
    )  # fmt: skip
    return *gradients, q.new_empty(0) if mask_grad is None else mask_grad, delta


@registration.fake("depth_attention_query_backward")
def _(  # type: ignore[no-untyped-def]
    grad_out, q, k, v, depth_k, depth_v, out, lse, is_causal, scale,
    mask=None, mask_gradient=False,
):  # fmt: skip
    gradients = (ops.token_major(x) for x in (q, k, v))
    return *gradients, ops.fake_mask_gradient(q, mask, mask_gradient), ops.fake_lse(q)


@registration.operator("depth_merge_query_backward")
def depth_merge_query_backward(
    grad_out: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d sequence_out, d sequence_lse and dq as `ops.depth_merge_backward`, and delta [B, Hq, T].

    The gradients of the slots are left to ``depth_gather``.
    """
    ops.check_merge(sequence_out, sequence_lse, q, depth_k, depth_v)
    made: tuple[Tensor, Tensor, Tensor, Tensor] = ops.kernels_for(q).merge_query_backward(
        grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, scale=scale
    )
    return made


@registration.fake("depth_merge_query_backward")
def _(grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, scale):  # type: ignore[no-untyped-def]
    dlse = sequence_lse.new_empty(sequence_lse.shape)
    return ops.token_major(sequence_out), dlse, ops.token_major(q), ops.fake_lse(q)


@registration.operator("depth_gather")
def depth_gather(
    grad_outs: Sequence[Tensor],
    queries: Sequence[Tensor],
    lses: Sequence[Tensor],
    deltas: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    readers: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    starts: Sequence[Tensor | None],
    partials: Tensor | None = None,
    unfinished: int = 0,
) -> tuple[Tensor, Tensor]:
    """The whole gradients [M - U, 2, B, Hk, T, d] of slots' (keys, values), in ``dtype``, and sums
    [U, 2, B, Hk, T, d] of the last U slots, which go on in another call; both token-major.

    The sequence of R layers comes with, of each, grad_out and query [B, Hq, T, d], the joint lse
    and delta = grad_out . out [B, Hq, T]. Of M slots, 1 to MOST_SLOTS, slot m, keys[m] and
    values[m] [B, Hk, T, d], is read by the first readers[m] of them::

        p = exp(scale q . k - lse);  dz = p (do . v - delta)
        dk = scale (dk_0 + sum dz q);  dv = dv_0 + sum p do    over these layers and the group

    partials: dk_0 and dv_0 [M, 2, B, Hk, T, d], what another call left as its sums; None: 0. A sum
    is float32 (float64 for float64 inputs) and the keys' has not been multiplied by the scale, so
    that a gradient is rounded once, by the last call.

    starts: of each finished slot's key and value in turn, [B, Hk, T, d] in ``dtype`` or None: what
    its gradient is added to, such as the part that is the slot's own layer's. Empty: nothing.
    """
    _check_gather(grad_outs, queries, lses, deltas, keys, values, readers)
    _check_sums(keys, partials, unfinished)
    _check_starts(starts, keys[: len(keys) - unfinished], dtype)
    made: tuple[Tensor, Tensor] = ops.kernels_for(keys[0]).gather(
        grad_outs, queries, lses, deltas, keys, values, readers,
        scale=scale, dtype=dtype, starts=starts, partials=partials, unfinished=unfinished,
    )  # fmt: skip
    return made


@registration.fake("depth_gather")
def _(  # type: ignore[no-untyped-def]
    grad_outs, queries, lses, deltas, keys, values, readers, scale, dtype, starts,
    partials=None, unfinished=0,
):  # fmt: skip
    (b, hk, t, d), compute = keys[0].shape, _compute_dtype(keys[0])
    kinds = (len(keys) - unfinished, dtype), (unfinished, compute)
    return tuple(
        keys[0].new_empty((slots, 2, b, t, hk, d), dtype=kind).transpose(3, 4)
        for slots, kind in kinds
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_gather(
    grad_outs: Sequence[Tensor],
    queries: Sequence[Tensor],
    lses: Sequence[Tensor],
    deltas: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    readers: Sequence[int],
) -> None:
    """Refuse shapes that would have a kernel read out of bounds."""
    ops.check_some("depth_gather", keys)
    counts = {len(grad_outs), len(queries), len(lses), len(deltas)}
    if len(counts) != 1 or not queries:
        raise InputError(
            f"depth_gather: got {len(grad_outs)} output gradients, {len(queries)} queries, "
            f"{len(lses)} lse and {len(deltas)} delta; expected as many of each, at least 1."
        )
    if not len(keys) == len(values) == len(readers) or not all(
        0 <= count <= len(queries) for count in readers
    ):
        raise InputError(
            f"depth_gather: got {len(keys)} keys, {len(values)} values and readers "
            f"{list(readers)}; expected as many of each, and at most {len(queries)} readers."
        )
    b, hk, t, d = keys[0].shape
    hq = queries[0].shape[1]
    if hk == 0 or hq % hk:
        raise InputError(f"depth_gather: {hq} heads are no multiple of {hk} KV heads.")
    for named, expected, tensors in (
        ("keys or values", (b, hk, t, d), (*keys, *values)),
        ("queries or output gradients", (b, hq, t, d), (*queries, *grad_outs)),
        ("lse or delta", (b, hq, t), (*lses, *deltas)),
    ):
        for x in tensors:
            if x.shape != expected:
                raise InputError(
                    f"depth_gather: got {named} {tuple(x.shape)}, expected {expected} for all."
                )
    rows = (*keys, *values, *queries, *grad_outs)
    if len({(x.dtype, x.device) for x in rows}) > 1:
        raise InputError(
            "depth_gather: keys, values, queries and output gradients differ in dtype or device: "
            f"{sorted({f'{x.dtype} on {x.device}' for x in rows})}."
        )


def _check_sums(keys: Sequence[Tensor], partials: Tensor | None, unfinished: int) -> None:
    if len(keys) > MOST_SLOTS or not 0 <= unfinished < len(keys):
        raise InputError(
            f"depth_gather: got {len(keys)} slots, {unfinished} of them unfinished; expected at "
            f"most {MOST_SLOTS}, one of them finished."
        )
    form = (len(keys), 2, *keys[0].shape), _compute_dtype(keys[0])
    if partials is not None and (partials.shape, partials.dtype) != form:
        raise InputError(
            f"depth_gather: got partial sums {tuple(partials.shape)} of {partials.dtype}, expected "
            f"{form[0]} of {form[1]}."
        )


def _check_starts(
    starts: Sequence[Tensor | None], keys: Sequence[Tensor], dtype: torch.dtype
) -> None:
    if starts and len(starts) != 2 * len(keys):
        raise InputError(
            f"depth_gather: got {len(starts)} starts for {len(keys)} finished slots; expected two "
            "of each, or none at all."
        )
    for x in starts:
        if x is not None and (x.shape, x.dtype) != (keys[0].shape, dtype):
            raise InputError(
                f"depth_gather: got a start {tuple(x.shape)} of {x.dtype}, expected "
                f"{tuple(keys[0].shape)} of {dtype}, as the gradient is."
            )
