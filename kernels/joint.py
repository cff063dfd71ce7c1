"""The joint softmax, seen from a sequence part that something else computed, or that has no keys.

No Triton: CPUs use this too.
"""

from __future__ import annotations

import math

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
