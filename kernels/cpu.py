"""The combined attention on a CPU: the platform's flash attention plus the depth slots.

The sequence part is one call of ATen's CPU flash attention, which returns the log-sum-exp of its
scores and takes a (joint) one back in backward; no T x T matrix is ever formed, unless a mask that
is one wants a gradient. The depth part is
token-local: a dot product per (token, slot), so it streams over the slots' K and V once forward
and twice backward, with temporaries of one layer's query at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moda_compile.kernels import joint, masks

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention over the sequence and the depth slots.

    Args:
        q: queries [B, Hq, Tq, d].
        k, v: the layer's own keys and values [B, Hk, Tk, d], Hq a multiple of Hk.
        depth_k, depth_v: S slots of [B, Hk, Tq, d].
        is_causal: token t attends to tokens u <= t + Tk - Tq of the sequence.
        scale: factor of every score.
        mask: of the sequence, bool or additive, broadcastable to [B, Hq, Tq, Tk].
        seen: as of `split.forward`; of no use here.

    Returns:
        out [B, Hq, Tq, d] in [B, Tq, Hq, d] memory order, and lse [B, Hq, Tq], natural log. A row
        without a visible key gives all its weight to the slots; without slots it is 0, lse -inf.
    """
    if q.numel() == 0:
        return _empty(q), q.new_empty(q.shape[:3], dtype=_accumulate(q))
    is_causal, mask = masks.aligned(q, k, is_causal, mask)
    query, factor, _ = _positive(q, scale)
    bias = _bias(mask, q)
    if k.shape[2] == 0:
        out, lse = joint.nothing(q)
    else:
        out, lse = _flash(*_dense(query, k, v), 0.0, is_causal, attn_mask=bias, scale=factor)
        if bias is not None:  # ATen gives a row without a visible key out = 0 and lse = 0
            lse = lse.masked_fill(masks.dead_rows(bias).squeeze(-1), -math.inf)
    if not depth_k:
        return _token_major(out), lse.contiguous()
    return merge(out, lse, q, depth_k, depth_v, scale=scale)


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
        return _empty(q), q.new_empty(q.shape[:3], dtype=_accumulate(q))
    b, hq, t, d = q.shape
    hk = depth_k[0].shape[1]
    grouped = (b, hk, hq // hk, t)
    compute = _accumulate(q)
    query = q.to(compute).reshape(*grouped, d)
    # z[i] = scale * q . kd_i, one row of scores per slot: [S, B, Hk, G, T].
    z = torch.stack([(query * key.to(compute).unsqueeze(2)).sum(-1) for key in depth_k]).mul_(scale)
    lse_seq = sequence_lse.to(compute).reshape(grouped)
    lse = torch.logaddexp(lse_seq, z.logsumexp(0))
    p = z.sub_(lse).exp_()
    # o = exp(lse_seq - lse) o_seq + sum_i p_i vd_i
    weight = (lse_seq - lse).exp_().unsqueeze(-1)
    acc = sequence_out.to(compute).reshape(*grouped, d) * weight
    for weight, value in zip(p, depth_v, strict=True):
        acc.addcmul_(weight.unsqueeze(-1), value.to(compute).unsqueeze(2))
    return _token_major(acc.reshape(q.shape).to(q.dtype)), lse.reshape(b, hq, t).contiguous()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`forward`, given its joint ``out`` and ``lse``.

    The sequence part and the depth part separate exactly once p is taken relative to the joint
    lse, so flash attention's own backward serves the first:
    ``p = exp(z - lse); dz = p (do . v - do . o); dq = scale sum dz k; dk = scale sum_heads dz q``.

    Args:
        grad_out: gradient of ``out`` [B, Hq, T, d].
        accumulator: [N, 2, B, Hk, T, d], N >= S; row i gets ``+= (d depth_k[i], d depth_v[i])``
            in place. Rows from S up are not touched.
        mask_gradient: whether to compute the gradient of an additive mask, by T x T scores.

    Returns:
        dq [B, Hq, T, d], and the sequence part's dk, dv [B, Hk, T, d]; token-major in memory.
        The mask's gradient, in its shape and dtype, or None.
    """
    return _backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, accumulator, is_causal, scale, mask,
        mask_gradient,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """:func:`backward` but for the gradients of the slots, S >= 1, which `gather` computes.

    Returns:
        dq, dk, dv and the mask's gradient, as :func:`backward`; delta = do . o [B, Hq, T], in the
        dtype of lse, contiguous.
    """
    return _backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, None, is_causal, scale, mask, mask_gradient
    )


gather = joint.gather


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor | None,
    is_causal: bool,
    scale: float,
    mask: Tensor | None,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """dq, dk, dv, dmask, and delta where there are slots; adds to the accumulator, if any."""
    delta = torch.empty_like(lse)
    if q.numel() == 0:
        dmask = masks.no_gradient(mask) if mask_gradient else None
        return _empty(q), _empty(k), _empty(v), dmask, delta
    is_causal, mask = masks.aligned(q, k, is_causal, mask)
    query, factor, sign = _positive(q, scale)
    bias = _bias(mask, q)
    grad, sequence_lse = grad_out, lse
    if k.shape[2] == 0:
        dq, dk, dv = joint.no_gradients(q, k, v)
    else:
        if bias is not None:
            sequence_lse = lse.masked_fill(lse == -math.inf, math.inf)  # p = exp(-inf - inf) = 0
            if not depth_k and mask is not None and mask.dtype != torch.bool:
                grad = masks.normalised(grad_out, bias, lse, k.shape[2])
        dq, dk, dv = _flash_backward(
            grad.contiguous(), *_dense(query, k, v), out, sequence_lse, 0.0, is_causal,
            attn_mask=bias, scale=factor,
        )  # fmt: skip
    if sign != 1.0:
        dq = dq * sign
    dmask = None
    if mask is not None and mask_gradient:
        dmask = masks.gradient(grad, q, k, v, out, sequence_lse, mask, scale)
    if depth_k:
        dq, delta = _depth_backward(grad_out, q, depth_k, depth_v, out, lse, accumulator, dq, scale)
    return _token_major(dq), _token_major(dk), _token_major(dv), dmask, delta


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
    return _merge_backward(
        grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, accumulator, scale
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
    return _merge_backward(
        grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, None, scale
    )


def _merge_backward(
    grad_out: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sequence_out, sequence_lse and q, and delta; adds to the accumulator, if any."""
    if q.numel() == 0:
        dlse = torch.empty_like(sequence_lse)
        return _empty(q), dlse, _empty(q), torch.empty_like(lse)
    dq, delta = _depth_backward(grad_out, q, depth_k, depth_v, out, lse, accumulator, None, scale)
    of_sequence = joint.sequence_gradients(grad_out, sequence_out, sequence_lse, out, lse)
    return *of_sequence, _token_major(dq), delta


def _depth_backward(
    grad_out: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor | None,
    sequence_grad_query: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dq of sequence and depth together, and delta; adds to the accumulator, if any."""
    b, hq, t, d = q.shape
    hk = depth_k[0].shape[1]
    grouped = (b, hk, hq // hk, t)
    compute = _accumulate(q)
    query = q.to(compute).reshape(*grouped, d)
    grad = grad_out.to(compute).reshape(*grouped, d)
    delta = (grad * out.to(compute).reshape(*grouped, d)).sum(-1)
    lse = lse.to(compute).reshape(grouped)
    if sequence_grad_query is None:
        dquery = torch.zeros_like(query)
    else:
        dquery = sequence_grad_query.to(compute).reshape(*grouped, d).clone()
    for slot, (key, value) in enumerate(zip(depth_k, depth_v, strict=True)):
        key, value = key.to(compute).unsqueeze(2), value.to(compute).unsqueeze(2)
        p = (query * key).sum(-1).mul_(scale).sub_(lse).exp_()
        dz = (grad * value).sum(-1).sub_(delta).mul_(p).mul_(scale)
        dquery.addcmul_(dz.unsqueeze(-1), key)
        if accumulator is None:
            continue
        accumulator[slot, 0].add_((dz.unsqueeze(-1) * query).sum(2))
        accumulator[slot, 1].add_((p.unsqueeze(-1) * grad).sum(2))
    return dquery.reshape(q.shape).to(q.dtype), delta.reshape(q.shape[:3]).contiguous()


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as ATen's CPU kernel takes it: four axes, numbers of q's dtype or float32."""
    if mask is None:
        return None
    bias = masks.additive(masks.compact(mask), _accumulate(q))
    return bias if bias.shape[-1] == 1 or bias.stride(-1) == 1 else bias.contiguous()


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """sign * q and a positive scale, with sign * scale' * q = scale * q, and that sign.

    ATen's CPU kernel masks with -inf before it scales: a scale <= 0 would make NaN of it.
    """
    if scale > 0.0:
        return q, scale, 1.0
    sign = -1.0 if scale < 0.0 else 0.0
    return q * sign, -scale or 1.0, sign


def _dense(*tensors: Tensor) -> list[Tensor]:
    # ATen's CPU kernel requires the last dimension to be contiguous; the others may be strided.
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _token_major(x: Tensor) -> Tensor:
    """[B, H, T, d] in [B, T, H, d] memory order: the transpose that follows attention is free."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)
