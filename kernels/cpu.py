"""The combined attention on a CPU: the platform's flash attention plus the depth slots.

The sequence part is one call of ATen's CPU flash attention, which returns the log-sum-exp of its
scores and takes a (joint) one back in backward; no T x T matrix is ever formed. The depth part is
token-local: a dot product per (token, slot), so it streams over the slots' K and V once forward
and twice backward, with temporaries of one layer's query at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
) -> tuple[Tensor, Tensor]:
    """Joint attention over the sequence and the depth slots.

    Args:
        q: queries [B, Hq, T, d].
        k, v: the layer's own keys and values [B, Hk, T, d], Hq a multiple of Hk.
        depth_k, depth_v: S slots of [B, Hk, T, d].
        is_causal: token t attends to tokens u <= t of the sequence.
        scale: factor of every score.

    Returns:
        out [B, Hq, T, d] in [B, T, Hq, d] memory order, and lse [B, Hq, T], natural log.
    """
    if q.numel() == 0:
        return _empty(q), q.new_empty(q.shape[:3], dtype=_accumulate(q))
    query, factor, _ = _positive(q, scale)
    out, lse = _flash(*_dense(query, k, v), 0.0, is_causal, scale=factor)
    if not depth_k:
        return _token_major(out), lse.contiguous()
    b, hq, t, d = q.shape
    grouped = (b, k.shape[1], hq // k.shape[1], t)
    compute = _accumulate(q)
    query = q.to(compute).reshape(*grouped, d)
    # z[i] = scale * q . kd_i, one row of scores per slot: [S, B, Hk, G, T].
    z = torch.stack([(query * key.to(compute).unsqueeze(2)).sum(-1) for key in depth_k]).mul_(scale)
    lse_seq = lse.to(compute).reshape(grouped)
    joint = torch.logaddexp(lse_seq, z.logsumexp(0))
    p = z.sub_(joint).exp_()
    # o = exp(lse_seq - lse) o_seq + sum_i p_i vd_i
    acc = out.to(compute).reshape(*grouped, d) * (lse_seq - joint).exp_().unsqueeze(-1)
    for weight, value in zip(p, depth_v, strict=True):
        acc.addcmul_(weight.unsqueeze(-1), value.to(compute).unsqueeze(2))
    return _token_major(acc.reshape(q.shape).to(q.dtype)), joint.reshape(b, hq, t).contiguous()


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`, given its joint ``out`` and ``lse``.

    The sequence part and the depth part separate exactly once p is taken relative to the joint
    lse, so flash attention's own backward serves the first:
    ``p = exp(z - lse); dz = p (do . v - do . o); dq = scale sum dz k; dk = scale sum_heads dz q``.

    Args:
        grad_out: gradient of ``out`` [B, Hq, T, d].
        accumulator: [N, 2, B, Hk, T, d], N >= S; row i gets ``+= (d depth_k[i], d depth_v[i])``
            in place. Rows from S up are not touched.

    Returns:
        dq [B, Hq, T, d], and the sequence part's dk, dv [B, Hk, T, d]; token-major in memory.
    """
    if q.numel() == 0:
        return _empty(q), _empty(k), _empty(v)
    query, factor, sign = _positive(q, scale)
    dense = _dense(query, k, v)
    dq, dk, dv = _flash_backward(
        grad_out.contiguous(), *dense, out, lse, 0.0, is_causal, scale=factor
    )
    if sign != 1.0:
        dq = dq * sign
    if not depth_k:
        return _token_major(dq), _token_major(dk), _token_major(dv)
    b, hq, t, d = q.shape
    grouped = (b, k.shape[1], hq // k.shape[1], t)
    compute = _accumulate(q)
    query = q.to(compute).reshape(*grouped, d)
    grad = grad_out.to(compute).reshape(*grouped, d)
    delta = (grad * out.to(compute).reshape(*grouped, d)).sum(-1)
    joint = lse.to(compute).reshape(grouped)
    dquery = dq.to(compute).reshape(*grouped, d).clone()
    for slot, (key, value) in enumerate(zip(depth_k, depth_v, strict=True)):
        key, value = key.to(compute).unsqueeze(2), value.to(compute).unsqueeze(2)
        p = (query * key).sum(-1).mul_(scale).sub_(joint).exp_()
        dz = (grad * value).sum(-1).sub_(delta).mul_(p).mul_(scale)
        dquery.addcmul_(dz.unsqueeze(-1), key)
        accumulator[slot, 0].add_((dz.unsqueeze(-1) * query).sum(2))
        accumulator[slot, 1].add_((p.unsqueeze(-1) * grad).sum(2))
    return _token_major(dquery.reshape(q.shape).to(q.dtype)), _token_major(dk), _token_major(dv)


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
