"""The depth part in plain PyTorch operations, slot by slot, for what the Triton kernels don't take.

The same formulas as `depth_forward` and `depth_backward`; any dtype, any head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moda_compile.kernels import launch


def forward(
    q: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    depth_k: Sequence[Tensor] | Tensor,
    depth_v: Sequence[Tensor] | Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Joint out [B, Hq, T, d] (token-major) and lse [B, Hq, T]; arguments as `depth_forward.run`.

    depth_k, depth_v: S slots [B, Hk, T, d].
    """
    grouped = _grouped(q, depth_k[0].shape[1])
    compute = torch.promote_types(q.dtype, torch.float32)
    query = q.to(compute).reshape(grouped)
    # z[i] = scale * q . kd_i: [S, B, Hk, G, T]
    z = torch.stack([(query * key.to(compute).unsqueeze(2)).sum(-1) * scale for key in depth_k])
    lse_seq = sequence_lse.to(compute).reshape(grouped[:4])
    lse = torch.logaddexp(lse_seq, z.logsumexp(0))
    out = sequence_out.to(compute).reshape(grouped) * (lse_seq - lse).exp().unsqueeze(-1)
    for p, value in zip((z - lse).exp(), depth_v, strict=True):
        out = out + p.unsqueeze(-1) * value.to(compute).unsqueeze(2)
    joint = launch.token_major(out.reshape(q.shape).to(q.dtype))
    return joint, launch.contiguous(lse.reshape(q.shape[:3]))


def backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    sequence_grad_query: Tensor,
    depth_k: Sequence[Tensor] | Tensor,
    depth_v: Sequence[Tensor] | Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    *,
    accumulate: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """The query's whole gradient (token-major); fills or adds to grad_key and grad_value.

    Arguments and results as `depth_backward.run`; depth_k, depth_v: S slots [B, Hk, T, d].
    """
    grouped = _grouped(q, depth_k[0].shape[1])
    compute = torch.promote_types(q.dtype, torch.float32)
    query, grad = q.to(compute).reshape(grouped), grad_out.to(compute).reshape(grouped)
    delta = (grad * out.to(compute).reshape(grouped)).sum(-1)
    joint = lse.to(compute).reshape(grouped[:4])
    dq = sequence_grad_query.to(compute).reshape(grouped)
    for slot, (key, value) in enumerate(zip(depth_k, depth_v, strict=True)):
        key, value = key.to(compute).unsqueeze(2), value.to(compute).unsqueeze(2)
        p = ((query * key).sum(-1) * scale - joint).exp()
        dz = p * ((grad * value).sum(-1) - delta) * scale
        dq = dq + dz.unsqueeze(-1) * key
        if grad_key is None or grad_value is None:
            continue
        dk, dv = (dz.unsqueeze(-1) * query).sum(2), (p.unsqueeze(-1) * grad).sum(2)
        if accumulate:
            grad_key[slot].add_(dk)
            grad_value[slot].add_(dv)
        else:
            grad_key[slot].copy_(dk)
            grad_value[slot].copy_(dv)
    dq = launch.token_major(dq.reshape(q.shape).to(q.dtype))
    return dq, launch.contiguous(delta.reshape(lse.shape)) if grad_key is None else None


def _grouped(q: Tensor, kv_heads: int) -> tuple[int, int, int, int, int]:
    b, hq, t, d = q.shape
    return (b, kv_heads, hq // kv_heads, t, d)
