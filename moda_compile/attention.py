"""The public op: one attention over a sequence and depth slots."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_compile.errors import InputError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the sequence and, at the same token, to the depth slots, under one softmax.

    For query head h with KV head j = h // (Hq / Hk) (paper arXiv 2603.15619, section 3)::

        z_seq[u]   = scale * q[t,h] . k[u,j] (+ mask)      u <= t + Tk - Tq if is_causal
        z_depth[i] = scale * q[t,h] . depth_k[i,t,j]       i in 0 .. S-1
        p          = softmax(concat(z_seq, z_depth))
        out[t,h]   = sum_u p_seq[u] v[u,j] + sum_i p_depth[i] depth_v[i,t,j]

    Args:
        q: queries [B, Hq, Tq, d] of float16, bfloat16, float32 or float64.
        k, v: keys [B, Hk, Tk, d] and values [B, Hk, Tk, dv]; Hq must be a multiple of Hk. Tk may
            differ from Tq: with a KV cache the queries are the last of the tokens. The kernels have
            one head_dim: if dv is not d, the narrower ones are copied, with zeros behind them.
        depth_k, depth_v: depth keys [S, B, Hk, Tq, d] and values [S, B, Hk, Tq, dv] of the queries'
            own tokens, any strides; S may be 0, which is plain attention.
        is_causal: whether a token attends to itself and earlier ones only; the last query is the
            last key's token (`torch.nn.functional.scaled_dot_product_attention` takes the first
            query to be the first key's).
        attn_mask: which token attends to which, broadcastable to [B, Hq, Tq, Tk]: bool (True
            attends) or float16, bfloat16, float32 or float64 numbers that are added to z_seq.
            It masks the sequence, never the slots, and may require a gradient. A row that it
            leaves no key (all False or -inf) gives all its weight to the slots; without slots its
            output is 0. On a GPU additive masks are rounded to q's dtype, as
            `torch.nn.functional.scaled_dot_product_attention` would have them.
        scale: factor of every score; ``None`` means 1 / sqrt(d).
        return_lse: also return the log-sum-exp of all scores of a row.

    Returns:
        out [B, Hq, Tq, dv]; with ``return_lse`` also lse [B, Hq, Tq], natural logarithm, float32
        (float64 for float64 inputs), not differentiable. NaN in a row's inputs gives NaN there.

    Raises:
        InputError: if shapes, dtypes or devices don't fit, or a mask comes with is_causal.
    """
    _check(q, k, v, depth_k, depth_v)
    if attn_mask is not None:
        check_mask(q, k, attn_mask, bool(is_causal))
    factor = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    from moda_compile import stacked  # registers a triton_op, which loads Triton

    value_dim, width = v.shape[-1], max(v.shape[-1], q.shape[-1])
    # Zero columns add nothing to a score, and are cut off the output again.
    tensors = [_widened(x, width) for x in (q, k, v, depth_k, depth_v)]
    out, lse = stacked.attention(*tensors, bool(is_causal), factor, attn_mask)
    if value_dim < width:  # dense, and token-major as before
        out = out.transpose(1, 2)[..., :value_dim].contiguous().transpose(1, 2)
    return (out, lse) if return_lse else out


def _widened(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _check(q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor) -> None:
    named = {"q": q, "k": k, "v": v, "depth_k": depth_k, "depth_v": depth_v}
    for name, x in named.items():
        rank = 5 if name.startswith("depth") else 4
        if not isinstance(x, Tensor) or x.dim() != rank:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            axes = "[S, B, Hk, T, d]" if rank == 5 else "[B, H, T, d]"
            raise InputError(f"{name}: got {got}, expected a tensor {axes}.")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise InputError(
                f"{name}: got {x.dtype} beside q's {q.dtype}; expected one dtype for all five, "
                f"out of {', '.join(str(d) for d in _DTYPES)}. Cast with .to(dtype)."
            )
        if x.device != q.device:
            raise InputError(f"{name}: on {x.device}, but q is on {q.device}; move it with .to().")
    b, hq, t, d = q.shape
    hk, keys = k.shape[1], k.shape[2]
    if k.shape != (b, hk, keys, d) or v.shape[:3] != k.shape[:3]:
        raise InputError(
            f"k, v: got {tuple(k.shape)} and {tuple(v.shape)}, expected [B, Hk, Tk, d] = "
            f"[{b}, Hk, Tk, {d}] and [B, Hk, Tk, dv] as q is {tuple(q.shape)}."
        )
    if hq == 0 or hk == 0 or hq % hk:
        raise InputError(f"q has {hq} heads, which is not a multiple of the {hk} KV heads.")
    for name, size in (("q", d), ("v", v.shape[3])):
        if size == 0:
            raise InputError(f"{name} has head_dim 0, expected at least 1.")
    slots = (depth_k.shape[0], b, hk, t)
    if depth_k.shape != (*slots, d) or depth_v.shape != (*slots, v.shape[3]):
        raise InputError(
            f"depth_k, depth_v: got {tuple(depth_k.shape)} and {tuple(depth_v.shape)}, expected "
            f"[S, B, Hk, Tq, d] = [S, {b}, {hk}, {t}, {d}] and [S, B, Hk, Tq, dv] = "
            f"[S, {b}, {hk}, {t}, {v.shape[3]}]."
        )


def check_mask(q: Tensor, k: Tensor, mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise InputError("got both is_causal=True and attn_mask; give one of them.")
    if not isinstance(mask, Tensor):
        raise InputError(f"attn_mask: got {type(mask).__name__}, expected a tensor or None.")
    if mask.dtype not in (torch.bool, *_DTYPES):
        raise InputError(
            f"attn_mask: got {mask.dtype}, expected torch.bool (True attends) or numbers to add, "
            f"out of {', '.join(str(d) for d in _DTYPES)}. Cast with .bool() or .to(dtype)."
        )
    if mask.device != q.device:
        raise InputError(
            f"attn_mask: on {mask.device}, but q is on {q.device}; move it with .to()."
        )
    (b, hq, t, _), keys = q.shape, k.shape[2]
    axes = zip(reversed(mask.shape), (keys, t, hq, b), strict=False)
    if mask.dim() > 4 or any(n not in (1, full) for n, full in axes):
        raise InputError(
            f"attn_mask: got {tuple(mask.shape)}, expected a shape that broadcasts to "
            f"[B, Hq, Tq, Tk] = [{b}, {hq}, {t}, {keys}]."
        )
