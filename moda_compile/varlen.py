"""The operator for attention within sequences of different lengths, with its log-sum-exp.

PyTorch's own (`torch.nn.attention.varlen`) tells the lse as well, but has no gradient for it, and
where depth is merged in the lse is what says how much the sequence counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moda_compile.errors import InputError


@torch.library.custom_op("moda_compile::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    longest: int,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention within each of N sequences that lie one behind the other.

    q [T, Hq, d]; k, v [T, Hk, d]; offsets [N + 1], int32, from 0 to T; longest: tokens of the
    longest sequence. Token t sees t - left .. t + right of its own sequence; -1 is without end, and
    (-1, 0) causal. Returns out [T, Hq, d] and lse [Hq, T], natural log. The lse's gradient is
    exact for tokens whose out has a gradient, too, as in the joint softmax.
    """
    _check(q, k, v, offsets)
    from moda_compile.kernels import varlen

    return varlen.forward(q, k, v, offsets, longest, (left, right), scale)


@varlen_attention.register_fake
def _(q, k, v, offsets, longest, left, right, scale):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


@torch.library.custom_op("moda_compile::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    longest: int,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, Hq, d], dk and dv [T, Hk, d], given gradients of out [T, Hq, d] and lse [Hq, T]."""
    from moda_compile.kernels import varlen

    return varlen.backward(
        grad_out, grad_lse, q, k, v, out, lse, offsets, longest, (left, right), scale
    )


@varlen_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_out, grad_lse, q, k, v, out, lse, offsets, longest, left, right, scale
):
    return _like(q), _like(k), _like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:  # see `varlen_attention`: then the lse has none either
        return (None,) * 8
    q, k, v, out, lse, offsets = ctx.saved_tensors
    gradients = torch.ops.moda_compile.varlen_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, offsets, *ctx.rest
    )
    return *gradients, *(None,) * 5


varlen_attention.register_autograd(_backward, setup_context=_setup)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[::2] != k.shape[::2]:
        raise InputError(
            f"varlen_attention: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected [T, Hq, d], [T, Hk, d] and [T, Hk, d]."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"varlen_attention: {q.shape[1]} query heads over {k.shape[1]} key heads; expected a "
            "multiple."
        )
    if offsets.dim() != 1 or offsets.dtype != torch.int32:
        raise InputError(
            f"varlen_attention: offsets are {offsets.dtype} {tuple(offsets.shape)}; expected int32 "
            "[N + 1]."
        )
