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
) -> tuple[Tensor, Tensor]:
    """Joint attention; the slots are one tensor [S, B, Hk, T, d] of any strides."""
    if q.device.type == "cuda":
        return kernels_for(q).forward_stacked(
            q, k, v, depth_k, depth_v, is_causal=is_causal, scale=scale
        )
    return depth_attention(q, k, v, depth_k.unbind(0), depth_v.unbind(0), is_causal, scale)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the slots' gradients [S, B, Hk, T, d]."""
    if q.device.type == "cuda":
        return kernels_for(q).backward_stacked(
            grad_out, q, k, v, depth_k, depth_v, out, lse, is_causal=is_causal, scale=scale
        )
    slots = depth_k.unbind(0), depth_v.unbind(0)
    accumulator = new_accumulator(k, len(slots[0]), accumulator_dtype(k.dtype, "float32"))
    dq, dk, dv = depth_attention_backward(
        grad_out, q, k, v, *slots, out, lse, accumulator, is_causal, scale
    )
    ddk, ddv = (accumulator[:, i].to(k.dtype, copy=True) for i in (0, 1))
    return dq, dk, dv, ddk, ddv


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.moda_compile.attention_backward(
        grad_out, *ctx.saved_tensors, ctx.is_causal, ctx.scale
    )
    return *gradients, None, None


attention.register_autograd(_attention_gradient, setup_context=_save_attention)
