"""The sequence part: the platform's own attention, by the ATen operators that return the lse.

The same operators' backward, handed the JOINT out and lse of sequence and depth, returns the exact
gradients of the sequence part: they use out and lse only as delta = do . o and p = exp(z - lse).
Every function takes q [B, Hq, Tq, d] and k, v [B, Hk, Tk, d], Hq a multiple of Hk; is_causal only
where Tq = Tk (see `masks.aligned`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moda_compile.kernels import ROW_ELEMENTS, joint, launch, masks

_aten = torch.ops.aten
_MASK_ELEMENTS = 16  # and efficient attention rows of a mask that are multiples of this
_LSE_TILE = 32  # efficient attention rounds the length of its lse up to a multiple of this


def forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the sequence alone.

    Args:
        name: "cudnn", "flash", "efficient" or "math". The first two take no mask.
        is_causal: token t attends to tokens u <= t. scale: factor of every score.
        mask: bool or additive, broadcastable to [B, Hq, Tq, Tk].

    Returns:
        out [B, Hq, Tq, d] (last stride 1, otherwise any layout) and lse [B, Hq, Tq], natural log.
        A row without a visible key has lse -inf and any finite out.
    """
    if k.shape[2] == 0:
        return joint.nothing(q)
    out, lse = _forward(name, q, k, v, is_causal, scale, _bias(name, mask, q))
    if mask is not None:
        lse = lse.masked_fill(masks.dead_rows(masks.compact(mask)).squeeze(-1), -math.inf)
    return out, lse


def _forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if name == "math":
        return _math_forward(q, k, v, is_causal, scale, bias)
    b, hq, t, d = q.shape
    # Zero columns add nothing to a score and only zeros to the output: padding is exact, because
    # the scale is given and not derived from the padded head_dim.
    q, k, v = (_operand(x) for x in (q, k, v))
    if name == "cudnn":
        result = _aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
    elif name == "flash":
        result = _aten._scaled_dot_product_flash_attention.default(
            q, k, v, 0.0, is_causal, False, scale=scale
        )
    elif name == "efficient":
        k, v = _repeat_heads(k, hq), _repeat_heads(v, hq)
        result = _aten._scaled_dot_product_efficient_attention.default(
            q, k, v, _mask_operand(bias, b, hq, t, k.shape[2]), True, 0.0, is_causal, scale=scale
        )
    else:
        raise ValueError(f"no such attention: {name!r}")
    out, lse = result[0], result[1]
    if name == "efficient":  # its lse is longer than Tq
        lse = lse.narrow(-1, 0, t)
    return _columns(out, d), lse.reshape(b, hq, t)  # cuDNN's lse is [B, Hq, T, 1]


def backward(
    name: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    mask_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The sequence part's gradients, given the joint out and lse.

    Args:
        grad_out: gradient of out [B, Hq, T, d]; out, lse: of the joint softmax, lse [B, Hq, T].
        mask: as in forward. mask_gradient: whether to compute an additive mask's gradient.

    Returns:
        dq [B, Hq, T, d], dk, dv [B, Hk, T, d]: last stride 1, otherwise any layout; the mask's
        gradient, in its shape and dtype, or None.
    """
    if k.shape[2] == 0:
        no_mask = masks.no_gradient(mask) if mask_gradient else None
        return *joint.no_gradients(q, k, v), no_mask
    bias = _bias(name, mask, q)
    if bias is not None:
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # p = exp(z - inf) = 0
    learned = mask if mask_gradient else None
    if name == "math":
        dq, dk, dv, dz = _math_backward(grad_out, q, k, v, out, lse, is_causal, scale, bias)
        return dq, dk, dv, None if learned is None else masks.reduced(dz, learned)
    (b, hq, t, d), tokens = q.shape, k.shape[2]
    hk, dbias = k.shape[1], None
    grad_out, q, k, v, out = (_operand(x) for x in (grad_out, q, k, v, out))
    # With dropout 0 no kernel reads the random state; the arguments are there to be filled.
    seed = offset = q.new_empty((1,), dtype=torch.int64)
    if name == "cudnn":
        # torch keeps cuDNN's backward graphs by the strides of q, k and v alone, built for an out
        # in q's own order of dimensions, as cuDNN's forward returns it. A plain model's graph in
        # the same process is thus ours too, and read a differently ordered out as garbage.
        out, grad_out = (launch.token_major(x) for x in (out, grad_out))
        q = q if _is_token_major(q) else launch.token_major(q)
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward.default(
            grad_out, q, k, v, out, lse.unsqueeze(-1), seed, offset,
            None, None, None, t, tokens, 0.0, is_causal, scale=scale,
        )  # fmt: skip
    elif name == "flash":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward.default(
            grad_out, q, k, v, out, lse,
            None, None, t, tokens, 0.0, is_causal, seed, offset, scale=scale,
        )  # fmt: skip
    elif name == "efficient":
        # A padded row weighs exp(z - inf) = 0. out must be token-major: the kernel derives its
        # token stride from the shape.
        rest = lse.new_full((*lse.shape[:2], -t % _LSE_TILE), math.inf)
        padded = torch.cat((lse, rest), -1)
        wanted = [True, True, True, learned is not None]
        dq, dk, dv, dbias = _aten._scaled_dot_product_efficient_attention_backward.default(
            grad_out, q, _repeat_heads(k, hq), _repeat_heads(v, hq),
            _mask_operand(bias, b, hq, t, tokens),
            launch.token_major(out), padded, seed, offset, 0.0, wanted, is_causal,
            scale=scale,
        )  # fmt: skip
        dk, dv = _sum_heads(dk, hk), _sum_heads(dv, hk)
    else:
        raise ValueError(f"no such attention: {name!r}")
    dmask = None if learned is None or dbias is None else masks.reduced(dbias, learned)
    return _columns(dq, d), _columns(dk, d), _columns(dv, d), dmask


def normalised(
    name: str, grad_out: Tensor, q: Tensor, k: Tensor, lse: Tensor, mask: Tensor
) -> Tensor:
    """grad_out for :func:`backward` where there are no slots; see `masks.normalised`."""
    bias = _bias(name, mask, q)
    assert bias is not None
    return launch.token_major(masks.normalised(grad_out, bias, lse, k.shape[2]))


def _bias(name: str, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as numbers to add, in the dtype that attention `name` takes it in."""
    if mask is None:
        return None
    if name not in ("efficient", "math"):
        raise ValueError(f"{name} attention takes no mask.")
    dtype = torch.promote_types(q.dtype, torch.float32) if name == "math" else q.dtype
    return masks.finite(masks.compact(mask), dtype)


def _mask_operand(bias: Tensor | None, b: int, heads: int, t: int, tokens: int) -> Tensor | None:
    """bias [B, Hq, Tq, Tk] as efficient attention takes it: rows on 16-byte boundaries.

    Axes along which the mask is the same stay expanded, but for the last.
    """
    if bias is None:
        return None
    bias = bias.expand(-1, -1, -1, tokens)
    padding = -tokens % _MASK_ELEMENTS
    if type(padding) is not int or padding:  # a symbolic length may need it
        bias = torch.cat((bias, bias.new_zeros((*bias.shape[:-1], padding))), -1)
    elif bias.stride(-1) != 1 or launch.alignment(bias) != 16:
        bias = bias.clone(memory_format=torch.contiguous_format)
    return bias.narrow(-1, 0, tokens).expand(b, heads, t, tokens)


def _operand(x: Tensor) -> Tensor:
    """x as the fused kernels take it: rows of a multiple of 8 elements, on 16-byte boundaries.

    They load 16 bytes at once and trust their input: a slice that starts at an odd element would be
    an illegal access, not an error message.
    """
    if x.shape[-1] % ROW_ELEMENTS:
        x = launch.token_major(F.pad(x, (0, -x.shape[-1] % ROW_ELEMENTS)))
    if x.stride(-1) != 1 or launch.alignment(x) != 16:
        x = x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return x


def _is_token_major(x: Tensor) -> bool:
    """Whether heads of a token lie closer together than tokens of a head, as in [B, T, H, d]."""
    b, h, t, _ = x.shape
    inner = h == 1 or t == 1 or x.stride(1) < x.stride(2)
    return bool(inner and (b == 1 or max(x.stride(1), x.stride(2)) < x.stride(0)))


def _columns(x: Tensor, head_dim: int) -> Tensor:
    """x without the columns that `_operand` added."""
    return x if x.shape[-1] == head_dim else x.narrow(-1, 0, head_dim)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, T, d] with every head repeated for its group: [B, heads, T, d], token-major."""
    b, hk, t, d = x.shape
    if hk == heads:
        return x
    rows = x.transpose(1, 2).unsqueeze(3).expand(b, t, hk, heads // hk, d)
    return rows.reshape(b, t, heads, d).transpose(1, 2)


def _sum_heads(x: Tensor, heads: int) -> Tensor:
    """The transpose of `_repeat_heads`, summed in float32 where x is 16 bits wide."""
    b, hq, t, d = x.shape
    if hq == heads:
        return x
    grouped = x.reshape(b, heads, hq // heads, t, d)
    return grouped.sum(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def _math_scores(
    q: Tensor, k: Tensor, is_causal: bool, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Grouped queries [B, Hk, G, Tq, d] and scores [B, Hk, G, Tq, Tk], at least in float32."""
    b, hq, t, d = q.shape
    hk = k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    query = q.to(compute).reshape(b, hk, hq // hk, t, d)
    z = query @ k.to(compute).unsqueeze(2).mT * scale
    if is_causal:
        future = torch.ones((t, t), dtype=torch.bool, device=q.device).triu(1)
        z = z.masked_fill(future, -math.inf)
    if bias is not None:
        z = z + bias.expand(b, hq, t, k.shape[2]).reshape(z.shape)
    return query, z


def _math_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    query, z = _math_scores(q, k, is_causal, scale, bias)
    lse = z.logsumexp(-1)
    # Not exp(z - lse): where a mask of huge numbers has rounded lse, its p would not sum to 1.
    out = z.softmax(-1) @ v.to(query.dtype).unsqueeze(2)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])


def _math_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the scores' gradient [B, Hq, Tq, Tk]."""
    query, z = _math_scores(q, k, is_causal, scale, bias)
    grouped = query.shape
    p = (z - lse.to(z.dtype).reshape(grouped[:4]).unsqueeze(-1)).exp()
    grad = grad_out.to(z.dtype).reshape(grouped)
    delta = (grad * out.to(z.dtype).reshape(grouped)).sum(-1, keepdim=True)
    dz = p * (grad @ v.to(z.dtype).unsqueeze(2).mT - delta)
    dq = (dz @ k.to(z.dtype).unsqueeze(2)).reshape(q.shape) * scale
    dk, dv = (dz.mT @ query).sum(2) * scale, (p.mT @ grad).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dz.flatten(1, 2)
