"""The operators of a rewritten model, registered in the namespace ``moda_compile``.

``depth_attention`` and its backward are the kernels; ``attend`` and ``write_slot`` are autograd on
top of them, and what a rewritten model is made of. Nothing is copied into a depth
buffer: the slots ARE the earlier layers' K and V. Instead of returning a gradient per (layer,
slot) pair, which would be O(L^2) tensors, the layers pass on a *token*: a scalar zero expanded to
the shape of the gradient accumulator G [N, 2, B, Hk, T, d], so it takes no memory. The token's
gradient IS the accumulator:

    forward    t0 -> write_slot(0) -> attend(0) -> write_slot(1) -> attend(1) -> ... -> attend(L-1)
    backward   attend(L-1) allocates G = 0; each attend adds into the slots it has read, in place;
               write_slot(i) takes row i out, which is complete: every reader of i ran before.

Each token is used once, so autograd never sums two accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moda_compile.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType


def _check_slots(
    q: Tensor, k: Tensor, v: Tensor, depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]
) -> None:
    """Refuse shapes that would have a kernel read or write out of bounds. When it runs, not in
    its fake: comparing symbolic shapes there would install guards.
    """
    (b, hq, t, d), hk = q.shape, k.shape[1]
    if len(depth_k) != len(depth_v):
        raise InputError(
            f"depth_attention: {len(depth_k)} depth keys but {len(depth_v)} depth values."
        )
    expected = (b, hk, t, d)
    for x in (k, v, *depth_k, *depth_v):
        if x.shape != expected:
            raise InputError(
                f"depth_attention: got keys or values {tuple(x.shape)}, expected [B, Hk, T, d] = "
                f"{expected} for all, as q is {tuple(q.shape)} and k {tuple(k.shape)}."
            )
    if hq == 0 or hk == 0 or hq % hk:
        raise InputError(f"depth_attention: {hq} heads are no multiple of {hk} KV heads.")


def kernels_for(x: Tensor) -> ModuleType:
    """The kernels for x's device, loaded at first use: importing this file loads no Triton."""
    if x.device.type == "cpu":
        from moda_compile.kernels import cpu

        return cpu
    if x.device.type == "cuda":
        from moda_compile.kernels import split

        return split
    raise InputError(f"moda_compile has kernels for cpu and cuda, not for {x.device.type}.")


def token_major(like: Tensor) -> Tensor:
    """An uninitialised [B, H, T, d] whose memory is [B, T, H, d]: what every kernel returns."""
    b, h, t, d = like.shape
    return like.new_empty(b, t, h, d).transpose(1, 2)


def _fake_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


# --- slots as S separate tensors ----------------------------------------------------------------
# Opaque to Inductor on purpose: on a GPU the kernel finds its slots through a device table of
# addresses. An address is not a data dependence that Inductor can see, so only the opaque call,
# which names every slot as an argument, keeps them alive until the kernel is queued.


@torch.library.custom_op("moda_compile::depth_attention", mutates_args=())
def depth_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Joint attention; the slots are S separate tensors [B, Hk, T, d] of any strides."""
    _check_slots(q, k, v, depth_k, depth_v)
    return kernels_for(q).forward(q, k, v, depth_k, depth_v, is_causal=is_causal, scale=scale)


@depth_attention.register_fake
def _(q, k, v, depth_k, depth_v, is_causal, scale):  # type: ignore[no-untyped-def]
    return token_major(q), _fake_lse(q)


@torch.library.custom_op("moda_compile::depth_attention_backward", mutates_args=("accumulator",))
def depth_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; the slots' gradients are added to accumulator[:S] [N, 2, B, Hk, T, d] in place.

    ``accumulator`` may be ``None`` only if there are no slots.
    """
    _check_slots(q, k, v, depth_k, depth_v)
    return kernels_for(q).backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, accumulator, is_causal=is_causal, scale=scale
    )


@depth_attention_backward.register_fake
def _(grad_out, q, k, v, depth_k, depth_v, out, lse, accumulator, is_causal, scale):  # type: ignore[no-untyped-def]
    return tuple(token_major(x) for x in (q, k, v))


# --- a rewritten model's two operators ----------------------------------------------------------


def accumulator_dtype(dtype: torch.dtype, choice: str) -> torch.dtype:
    """dtype of the accumulator of a model in ``dtype``; see MoDAConfig.accumulator_dtype."""
    return dtype if choice == "model" else torch.promote_types(dtype, torch.float32)


def new_accumulator(key: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Zeros [slots, 2, B, Hk, T, d], token-major in memory, for slots shaped like ``key``."""
    b, hk, t, d = key.shape
    return key.new_zeros(slots, 2, b, t, hk, d, dtype=dtype).transpose(3, 4)


def _new_token(key: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    return key.new_zeros((), dtype=dtype).expand(slots, 2, *key.shape)


class _WriteSlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token, key, value, slot, slots, dtype):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.slot, ctx.dtype = slot, key.dtype
        return _new_token(key, slots, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        if grad is None:  # nobody read this slot, nor any later one
            return None, None, None, None, None, None
        dkey, dvalue = grad[ctx.slot, 0].to(ctx.dtype), grad[ctx.slot, 1].to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, dkey, dvalue, None, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, token, depth_k, depth_v, is_causal, scale):  # type: ignore[no-untyped-def]
        out, lse = torch.ops.moda_compile.depth_attention(
            q, k, v, depth_k, depth_v, is_causal, scale
        )
        ctx.set_materialize_grads(False)
        # The slots are other layers' saved K and V, so saving them here adds nothing.
        ctx.save_for_backward(q, k, v, out, lse, *depth_k, *depth_v)
        ctx.slots, ctx.dtype = token.shape[0], token.dtype
        ctx.is_causal, ctx.scale = is_causal, scale
        return out, _new_token(k, ctx.slots, ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out, accumulator):  # type: ignore[no-untyped-def]
        unused = (None,) * 4
        q, k, v, out, lse, *slots = ctx.saved_tensors
        if grad_out is None:  # the loss misses this layer's output
            return None, None, None, accumulator, *unused
        depth_k, depth_v = slots[: len(slots) // 2], slots[len(slots) // 2 :]
        if depth_k and accumulator is None:
            accumulator = new_accumulator(k, ctx.slots, ctx.dtype)
        if accumulator is not None and 0 in accumulator.stride():
            accumulator = accumulator.contiguous()  # an expanded gradient has no memory to add to
        gradients = torch.ops.moda_compile.depth_attention_backward(
            grad_out, q, k, v, depth_k, depth_v, out, lse,
            accumulator if depth_k else None, ctx.is_causal, ctx.scale,
        )  # fmt: skip
        return *gradients, accumulator if ctx.needs_input_grad[3] else None, *unused


def _attend(q, k, v, token, depth_k, depth_v, is_causal, scale):  # type: ignore[no-untyped-def]
    out, _ = torch.ops.moda_compile.depth_attention(q, k, v, depth_k, depth_v, is_causal, scale)
    return out, _new_token(k, token.shape[0], token.dtype)


def _write_slot(token, key, value, slot, slots, dtype):  # type: ignore[no-untyped-def]
    return _new_token(key, slots, dtype)


# torch.library.register_autograd refuses gradients that mutate, hence the dispatcher by hand.
_library = torch.library.Library("moda_compile", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor token, Tensor[] depth_k, Tensor[] depth_v, "
    "bool is_causal, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "write_slot(Tensor? token, Tensor key, Tensor value, int slot, int slots, ScalarType dtype) "
    "-> Tensor"
)
for _name, _plain, _function in (
    ("attend", _attend, _Attend),
    ("write_slot", _write_slot, _WriteSlot),
):
    _library.impl(_name, _function.apply, "Autograd")
    _library.impl(_name, _plain, "CompositeExplicitAutograd")
