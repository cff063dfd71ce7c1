"""The operators of a rewritten model, registered in the namespace ``moda_compile``.

``depth_attention``, ``depth_merge`` and their backwards are the kernels; ``attend``, ``join`` and
``write_slot`` are autograd on top of them, and what a rewritten model is made of: ``attend``
computes an attention together with its depth slots, ``join`` adds the slots to one that something
else computed and that told its log-sum-exp (FlexAttention). Nothing is copied into a depth buffer:
the slots ARE the earlier layers' K and V. Instead of returning a gradient per (layer, slot) pair,
which would be O(L^2) tensors, the layers pass on a *token*: a scalar zero expanded to the shape of
the gradient accumulator G [N, 2, B, Hk, T, d], so it takes no memory. The token's gradient IS the
accumulator:

    forward    t0 -> write_slot(0) -> attend(0) -> write_slot(1) -> attend(1) -> ... -> attend(L-1)
    backward   attend(L-1) allocates G = 0; each attend adds into the slots it has read, in place;
               write_slot(i) takes row i out, which is complete: every reader of i ran before.

A join takes part as an attend does. Each token is used once, so autograd never sums two
accumulators. (Inductor gets less traffic out of the same graph: see `passes.gather`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moda_compile import registration
from moda_compile.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType


def check_slots(
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
    sequence, slot = (b, hk, k.shape[2], d), (b, hk, t, d)
    for named, expected, tensors in (
        ("keys or values", sequence, (k, v)),
        ("depth keys or values", slot, (*depth_k, *depth_v)),
    ):
        for x in tensors:
            if x.shape != expected:
                raise InputError(
                    f"depth_attention: got {named} {tuple(x.shape)}, expected [B, Hk, T, d] = "
                    f"{expected} for all, as q is {tuple(q.shape)} and k {tuple(k.shape)}."
                )
    if hq == 0 or hk == 0 or hq % hk:
        raise InputError(f"depth_attention: {hq} heads are no multiple of {hk} KV heads.")


def check_mask(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    """Refuse a mask that the kernels would read out of bounds, or could not mean."""
    if mask is None:
        return
    (b, hq, t, _), keys = q.shape, k.shape[2]
    if is_causal:
        raise InputError("depth_attention: got both is_causal=True and a mask; give one of them.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"depth_attention: got a mask of {mask.dtype}, expected bool (True attends) or a "
            "floating point number to add. Cast with .bool() or .to(dtype)."
        )
    pairs = zip(reversed(mask.shape), (keys, t, hq, b), strict=False)
    if mask.dim() > 4 or any(n not in (1, full) for n, full in pairs):
        raise InputError(
            f"depth_attention: got a mask {tuple(mask.shape)}, expected one that broadcasts to "
            f"[B, Hq, Tq, Tk] = {(b, hq, t, keys)}."
        )
    if mask.device != q.device:
        raise InputError(f"depth_attention: the mask is on {mask.device}, q on {q.device}.")


def check_seen(q: Tensor, k: Tensor, mask: Tensor | None, seen: Tensor | None) -> None:
    """Refuse what `visible_keys` can't have said of this mask."""
    if seen is None:
        return
    from moda_compile.kernels import mask_chunks

    b, hk, entries = *k.shape[:2], 3 * mask_chunks(k.shape[2])
    fits = seen.dim() == 3 and seen.shape[0] in (1, b) and seen.shape[1] in (1, hk)
    if mask is None or not fits or seen.shape[2] != entries or not seen.is_contiguous():
        raise InputError(
            f"depth_attention: got seen {tuple(seen.shape)}, expected a mask's visible_keys, "
            f"contiguous [B or 1, Hk or 1, {entries}], as k is {tuple(k.shape)}."
        )
    if seen.dtype != torch.int32 or seen.device != q.device:
        raise InputError(
            f"depth_attention: seen is {seen.dtype} on {seen.device}, expected int32 on {q.device}."
        )


def check_some(name: str, depth_k: Sequence[Tensor]) -> None:
    """Refuse an operator `name` without slots."""
    if not depth_k:
        raise InputError(f"{name}: got no depth slots, expected at least 1.")


def check_merge(
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
) -> None:
    """As `check_slots`; the keys and values of the sequence are none of our business."""
    check_some("depth_merge", depth_k)
    check_slots(q, depth_k[0], depth_v[0] if depth_v else depth_k[0], depth_k, depth_v)
    if sequence_out.shape != q.shape or sequence_lse.shape != q.shape[:3]:
        raise InputError(
            f"depth_merge: got a sequence part {tuple(sequence_out.shape)} with an lse "
            f"{tuple(sequence_lse.shape)}, expected {tuple(q.shape)} and {tuple(q.shape[:3])}, "
            "as q is."
        )


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


def fake_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


# --- slots as S separate tensors ----------------------------------------------------------------
# Opaque on purpose: on a GPU the kernel finds its slots through a device table of addresses. An
# address is not a data dependence that a compiler can see, so only the call, which names every slot
# as an argument, keeps them alive until the kernel is queued. Where the kernel itself can be given
# every slot, `passes.unfold` puts it in the call's place.


@registration.operator("depth_attention")
def depth_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of q [B, Hq, Tq, d] over k, v [B, Hk, Tk, d] and S slots [B, Hk, Tq, d].

    The slots are separate tensors of any strides. is_causal: the last query sees all keys, the one
    before all but one, and so on: u <= t + Tk - Tq. mask: bool (True attends) or added to the
    scores, broadcastable to [B, Hq, Tq, Tk]. It masks the sequence only. A row that it leaves no
    key gives all its weight to the slots. seen: the mask's `visible.visible_keys`, if known.
    """
    check_slots(q, k, v, depth_k, depth_v)
    check_mask(q, k, mask, is_causal)
    check_seen(q, k, mask, seen)
    return kernels_for(q).forward(
        q, k, v, depth_k, depth_v, is_causal=is_causal, scale=scale, mask=mask, seen=seen
    )


@registration.fake("depth_attention")
def _(q, k, v, depth_k, depth_v, is_causal, scale, mask=None, seen=None):  # type: ignore[no-untyped-def]
    return token_major(q), fake_lse(q)


@registration.operator("depth_attention_backward", mutates="accumulator")
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
    mask: Tensor | None = None,
    mask_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dmask; the slots' gradients are added to accumulator[:S] [N, 2, B, Hk, Tq, d].

    ``accumulator`` may be ``None`` only if there are no slots. ``dmask`` has the mask's own shape
    and dtype; without ``mask_gradient`` it is an empty tensor [0].
    """
    check_slots(q, k, v, depth_k, depth_v)
    check_mask(q, k, mask, is_causal)
    *gradients, mask_grad = kernels_for(q).backward(
        grad_out, q, k, v, depth_k, depth_v, out, lse, accumulator,
        is_causal=is_causal, scale=scale, mask=mask, mask_gradient=mask_gradient,
    )  # fmt: skip
    return *gradients, q.new_empty(0) if mask_grad is None else mask_grad


@registration.fake("depth_attention_backward")
def _(  # type: ignore[no-untyped-def]
    grad_out, q, k, v, depth_k, depth_v, out, lse, accumulator, is_causal, scale,
    mask=None, mask_gradient=False,
):  # fmt: skip
    return *(token_major(x) for x in (q, k, v)), fake_mask_gradient(q, mask, mask_gradient)


def fake_mask_gradient(q: Tensor, mask: Tensor | None, wanted: bool) -> Tensor:
    """What a kernel returns as the mask's gradient: like the mask, dense; [0] if not wanted."""
    if mask is None or not wanted:
        return q.new_empty(0)
    return mask.new_empty(mask.shape)


@registration.operator("depth_merge")
def depth_merge(
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The joint attention, given the sequence's share of it; S >= 1 slots [B, Hk, T, d].

    sequence_out [B, Hq, T, d] is normalised by itself, sequence_lse [B, Hq, T] the natural
    logarithm of its normaliser (-inf where no key was visible, and sequence_out then finite)::

        lse = log(exp(sequence_lse) + sum_i exp(z_i)),    z_i = scale * q . depth_k[i]
        out = exp(sequence_lse - lse) sequence_out + sum_i exp(z_i - lse) depth_v[i]
    """
    check_merge(sequence_out, sequence_lse, q, depth_k, depth_v)
    return kernels_for(q).merge(sequence_out, sequence_lse, q, depth_k, depth_v, scale=scale)


@registration.fake("depth_merge")
def _(sequence_out, sequence_lse, q, depth_k, depth_v, scale):  # type: ignore[no-untyped-def]
    return token_major(q), fake_lse(q)


@registration.operator("depth_merge_backward", mutates="accumulator")
def depth_merge_backward(
    grad_out: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    q: Tensor,
    depth_k: Sequence[Tensor],
    depth_v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    accumulator: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d sequence_out, d sequence_lse and the slots' part of dq, given the joint out and lse.

    The slots' gradients are added to accumulator[:S] [N, 2, B, Hk, T, d]. With
    p_seq = exp(sequence_lse - lse) and do = grad_out::

        d sequence_out = p_seq do;    d sequence_lse = p_seq (do . sequence_out - do . out)
    """
    check_merge(sequence_out, sequence_lse, q, depth_k, depth_v)
    return kernels_for(q).merge_backward(
        grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, accumulator,
        scale=scale,
    )  # fmt: skip


@registration.fake("depth_merge_backward")
def _(  # type: ignore[no-untyped-def]
    grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, accumulator, scale
):
    dlse = sequence_lse.new_empty(sequence_lse.shape)
    return token_major(sequence_out), dlse, token_major(q)


# --- a rewritten model's operators --------------------------------------------------------------


def accumulator_dtype(dtype: torch.dtype, choice: str) -> torch.dtype:
    """dtype of the accumulator of a model in ``dtype``; see MoDAConfig.accumulator_dtype."""
    return dtype if choice == "model" else torch.promote_types(dtype, torch.float32)


def new_accumulator(like: Tensor, shape: Sequence[int], slots: int, dtype: torch.dtype) -> Tensor:
    """Zeros [slots, 2, B, Hk, T, d], token-major in memory, for slots of ``shape``."""
    b, hk, t, d = shape
    return like.new_zeros(slots, 2, b, t, hk, d, dtype=dtype).transpose(3, 4)


def _new_token(like: Tensor, shape: Sequence[int], slots: int, dtype: torch.dtype) -> Tensor:
    return like.new_zeros((), dtype=dtype).expand(slots, 2, *shape)


def _slot_shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """[B, Hk, Tq, d]: a slot belongs to the query's tokens, however many keys there are."""
    return q.shape[0], k.shape[1], q.shape[2], q.shape[3]


def _writable(accumulator: Tensor | None, ctx: Any, like: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient that came in for the token, or zeros, as memory that can be added to."""
    if accumulator is None:  # the last layer, or one that no later layer's loss reaches
        return new_accumulator(like, shape, ctx.slots, ctx.dtype)
    # An expanded gradient has no memory to add to.
    return accumulator.contiguous() if 0 in accumulator.stride() else accumulator


class _WriteSlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token, key, value, slot, slots, dtype):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.slot, ctx.dtype = slot, key.dtype
        return _new_token(key, key.shape, slots, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        if grad is None:  # nobody read this slot, nor any later one
            return None, None, None, None, None, None
        dkey, dvalue = grad[ctx.slot, 0].to(ctx.dtype), grad[ctx.slot, 1].to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, dkey, dvalue, None, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, token, depth_k, depth_v, is_causal, scale, mask):  # type: ignore[no-untyped-def]
        out, lse = torch.ops.moda_compile.depth_attention(
            q, k, v, depth_k, depth_v, is_causal, scale, mask
        )
        ctx.set_materialize_grads(False)
        # The slots are other layers' saved K and V, so saving them here adds nothing.
        ctx.save_for_backward(q, k, v, out, lse, mask, *depth_k, *depth_v)
        ctx.slots, ctx.dtype = token.shape[0], token.dtype
        ctx.is_causal, ctx.scale = is_causal, scale
        return out, _new_token(q, _slot_shape(q, k), ctx.slots, ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out, accumulator):  # type: ignore[no-untyped-def]
        unused = (None,) * 4
        q, k, v, out, lse, mask, *slots = ctx.saved_tensors
        if grad_out is None:  # the loss misses this layer's output
            return None, None, None, accumulator, *unused, None
        depth_k, depth_v = slots[: len(slots) // 2], slots[len(slots) // 2 :]
        if depth_k or accumulator is not None:
            accumulator = _writable(accumulator, ctx, q, _slot_shape(q, k))
        *gradients, dmask = torch.ops.moda_compile.depth_attention_backward(
            grad_out, q, k, v, depth_k, depth_v, out, lse, accumulator if depth_k else None,
            ctx.is_causal, ctx.scale, mask, ctx.needs_input_grad[8],
        )  # fmt: skip
        accumulator = accumulator if ctx.needs_input_grad[3] else None
        return *gradients, accumulator, *unused, dmask if ctx.needs_input_grad[8] else None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sequence_out, sequence_lse, q, token, depth_k, depth_v, scale):  # type: ignore[no-untyped-def]
        out, lse = torch.ops.moda_compile.depth_merge(
            sequence_out, sequence_lse, q, depth_k, depth_v, scale
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sequence_out, sequence_lse, q, out, lse, *depth_k, *depth_v)
        ctx.slots, ctx.dtype, ctx.scale = token.shape[0], token.dtype, scale
        return out, _new_token(q, depth_k[0].shape, ctx.slots, ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out, accumulator):  # type: ignore[no-untyped-def]
        unused = (None,) * 3
        if grad_out is None:  # the loss misses this layer's output
            return None, None, None, accumulator, *unused
        sequence_out, sequence_lse, q, out, lse, *slots = ctx.saved_tensors
        depth_k, depth_v = slots[: len(slots) // 2], slots[len(slots) // 2 :]
        accumulator = _writable(accumulator, ctx, q, depth_k[0].shape)
        gradients = torch.ops.moda_compile.depth_merge_backward(
            grad_out, sequence_out, sequence_lse, q, depth_k, depth_v, out, lse, accumulator,
            ctx.scale,
        )  # fmt: skip
        return *gradients, accumulator if ctx.needs_input_grad[3] else None, *unused


# The dispatcher leaves out arguments that have their default value, so `attend` comes with or
# without a mask, but an autograd.Function returns one gradient for each argument it was given.
def _attend_autograd(q, k, v, token, depth_k, depth_v, is_causal, scale, mask=None):  # type: ignore[no-untyped-def]
    return _Attend.apply(q, k, v, token, depth_k, depth_v, is_causal, scale, mask)


def _attend(q, k, v, token, depth_k, depth_v, is_causal, scale, mask=None):  # type: ignore[no-untyped-def]
    out, _ = torch.ops.moda_compile.depth_attention(
        q, k, v, depth_k, depth_v, is_causal, scale, mask
    )
    return out, _new_token(q, _slot_shape(q, k), token.shape[0], token.dtype)


def _join(sequence_out, sequence_lse, q, token, depth_k, depth_v, scale):  # type: ignore[no-untyped-def]
    out, _ = torch.ops.moda_compile.depth_merge(
        sequence_out, sequence_lse, q, depth_k, depth_v, scale
    )
    return out, _new_token(q, depth_k[0].shape, token.shape[0], token.dtype)


def _write_slot(token, key, value, slot, slots, dtype):  # type: ignore[no-untyped-def]
    return _new_token(key, key.shape, slots, dtype)


# torch.library.register_autograd refuses gradients that mutate, hence the dispatcher by hand.
_library = torch.library.Library("moda_compile", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor token, Tensor[] depth_k, Tensor[] depth_v, "
    "bool is_causal, float scale, Tensor? mask=None) -> (Tensor, Tensor)"
)
_library.define(
    "join(Tensor sequence_out, Tensor sequence_lse, Tensor q, Tensor token, Tensor[] depth_k, "
    "Tensor[] depth_v, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "write_slot(Tensor? token, Tensor key, Tensor value, int slot, int slots, ScalarType dtype) "
    "-> Tensor"
)
for _name, _plain, _function in (
    ("attend", _attend, _attend_autograd),
    ("join", _join, _Join.apply),
    ("write_slot", _write_slot, _WriteSlot.apply),
):
    _library.impl(_name, _function, "Autograd")
    _library.impl(_name, _plain, "CompositeExplicitAutograd")
