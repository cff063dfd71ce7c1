"""The operator behind ``moda_attention``: all slots of a side in one tensor [S, B, Hk, T, d].

A ``triton_op``: Inductor sees through it to the Triton kernels. On a CPU its body is the operator
of :mod:`moda_compile.ops`. Registering one makes torch load Triton, so import this file late.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moda_compile.ops import (
    accumulator_dtype,
    depth_attention,
    depth_attention_backward,
    kernels_for,
    new_accumulator,
)


@torch.library.triton_op("moda_compile::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of q [B, Hq, Tq, d] over k, v [B, Hk, Tk, d]; see `ops.depth_attention`.

    The slots are one tensor [S, B, Hk, Tq, d] of any strides. mask: of the sequence, bool or
    additive, broadcastable to [B, Hq, Tq, Tk].
    """
    if q.device.type == "cuda":
        return kernels_for(q).forward_stacked(
            q, k, v, depth_k, depth_v, is_causal=is_causal, scale=scale, mask=mask
        )
    return depth_attention(q, k, v, depth_k.unbind(0), depth_v.unbind(0), is_causal, scale, mask)


@torch.library.triton_op("moda_compile::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    mask_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, the slots' gradients [S, B, Hk, Tq, d], and the mask's ([0] if not wanted)."""
    if q.device.type == "cuda":
        *gradients, dmask = kernels_for(q).backward_stacked(
            grad_out, q, k, v, depth_k, depth_v, out, lse,
            is_causal=is_causal, scale=scale, mask=mask, mask_gradient=mask_gradient,
        )  # fmt: skip
        return *gradients, q.new_empty(0) if dmask is None else dmask
    slots = depth_k.unbind(0), depth_v.unbind(0)
    accumulator = new_accumulator(
        k, depth_k.shape[1:], len(slots[0]), accumulator_dtype(k.dtype, "float32")
    )
    dq, dk, dv, dmask = depth_attention_backward(
        grad_out, q, k, v, *slots, out, lse, accumulator, is_causal, scale, mask, mask_gradient
    )
    ddk, ddv = (accumulator[:, i].to(k.dtype, copy=True) for i in (0, 1))
    return dq, dk, dv, ddk, ddv, dmask


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, mask = inputs
    ctx.mask_gradient = mask is not None and mask.requires_grad
    ctx.save_for_backward(*tensors, *output, mask)
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *saved, mask = ctx.saved_tensors
    *gradients, dmask = torch.ops.moda_compile.attention_backward(
        grad_out, *saved, ctx.is_causal, ctx.scale, mask, ctx.mask_gradient
    )
    return *gradients, None, None, dmask if ctx.mask_gradient else None


attention.register_autograd(_attention_gradient, setup_context=_save_attention)
