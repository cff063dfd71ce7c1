"""The oracle: mixture-of-depths attention in plain PyTorch, sharing no code with the graph passes.

`moda_attention_reference` writes the method's equations down with a full T x T matrix, and
`ReferenceMode` runs any eager, unconverted model with it: every call of
`torch.nn.functional.scaled_dot_product_attention` is computed as one joint softmax over its own
keys and the keys that earlier calls left for the same token.  Source: arXiv 2603.15619, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moda_compile.errors import InputError

# Bound at import: `ReferenceMode` replaces the attribute of F while it runs multi_head_attention.
_SDPA = F.scaled_dot_product_attention


def moda_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over the sequence and the depth slots, in the inputs' dtype; differentiable.

    Args:
        q: queries `[B, Hq, T, d]`.
        k: keys `[B, Hk, U, d]`, Hq a multiple of Hk (KV head of query head h is `h // (Hq/Hk)`).
        v: values `[B, Hk, U, d]`.
        depth_k: slot keys `[S, B, Hk, T, d]`; S may be 0.  Any strides.
        depth_v: slot values `[S, B, Hk, T, d]`.
        is_causal: query t sees keys u <= t (aligned upper left, as SDPA does).
        attn_mask: bool (True = may attend) or additive, broadcastable to `[B, Hq, T, U]`.  It masks
            the sequence only: a slot belongs to the query's own token, so it is always visible.
        scale: factor on the scores; default `1 / sqrt(d)`.

    Returns:
        `(out [B, Hq, T, d], lse [B, Hq, T])`; lse is the natural log of the joint normaliser, in
        float32 (float64 for float64 inputs).  A row that may attend to nothing gives zeros and
        an lse of -inf.

    Raises:
        InputError: if shapes do not fit, or both `is_causal` and `attn_mask` are given.

    Source: arXiv 2603.15619, section 2 (the unified softmax over sequence and depth).
    """
    batch, query_heads, length, head_dim = q.shape
    kv_heads, key_length = k.shape[1], k.shape[2]
    slots = depth_k.shape[0]
    if query_heads % kv_heads:
        raise InputError(f"query heads: got {query_heads}, expected a multiple of {kv_heads}")
    if depth_k.shape != (slots, batch, kv_heads, length, head_dim):
        expected = ("S", batch, kv_heads, length, head_dim)
        raise InputError(f"depth_k: got shape {tuple(depth_k.shape)}, expected {expected}")
    if depth_v.shape[:-1] != depth_k.shape[:-1]:
        raise InputError(f"depth_v: got {tuple(depth_v.shape)}, expected {tuple(depth_k.shape)}")
    if is_causal and attn_mask is not None:
        raise InputError("got both is_causal=True and attn_mask; give one of them")

    factor = 1.0 / math.sqrt(head_dim) if scale is None else scale
    grouped = q.unflatten(1, (kv_heads, query_heads // kv_heads))
    # z_seq[u] = scale * q[t,h] . k[u,j];  z_depth[i] = scale * q[t,h] . kd_i[t,j];  j = h // G
    sequence = torch.einsum("bhgtd,bhud->bhgtu", grouped, k).flatten(1, 2) * factor
    depth = torch.einsum("bhgtd,sbhtd->bhgts", grouped, depth_k).flatten(1, 2) * factor
    if is_causal:
        attn_mask = torch.ones(length, key_length, dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        sequence = sequence.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        sequence = sequence + attn_mask.to(sequence.dtype)

    # p = softmax(concat(z_seq, z_depth)): one normaliser.  A dead row would give -inf - -inf.
    scores = torch.cat([sequence, depth], dim=-1)
    dead = (scores == -math.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    lse = torch.logsumexp(scores.to(wide), dim=-1).masked_fill(dead.squeeze(-1), -math.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(dead, 0.0)
    weights = weights.unflatten(1, (kv_heads, query_heads // kv_heads)).to(v.dtype)
    on_sequence, on_depth = weights.split([key_length, slots], dim=-1)
    out = torch.einsum("bhgtu,bhud->bhgtd", on_sequence, v)
    out = out + torch.einsum("bhgts,sbhtd->bhgtd", on_depth, depth_v)
    return out.flatten(1, 2), lse


@dataclass(frozen=True, kw_only=True)
class FFNSlots:
    """How the FFNs of one model write depth slots, spelled out by hand for the oracle.

    Attributes:
        modules: paths of the FFN modules that write, in layer order, starting with layer 0.  The
            last layer writes no slot, so a stack of L layers names L - 1 modules.
        key_value: `(layer, ffn_input [B, T, D]) -> (key, value)`, each `[B, Hk or Hq, T, d]`, with
            the key treated as the layer's own attention key is (k-norm, then rotation).
    """

    modules: Sequence[str]
    key_value: Callable[[int, Tensor], tuple[Tensor, Tensor]]


class ReferenceMode(TorchFunctionMode):
    """Context in which an eager model computes MoDA: attention l reads the slots of layers < l.

    Each `scaled_dot_product_attention` call inside is one layer, in call order (also inside
    `multi_head_attention_forward`); its key and value become a slot for the later ones.  Masks,
    `is_causal`, `scale`, `enable_gqa` and KV heads that the model repeated itself are honoured.
    One entry serves one forward pass.  A model under activation checkpointing would recompute its
    attention outside of the context, so switch that off first.

    Args:
        model: the model that will run; needed only with `ffn_slots`.
        ffn_slots: FFN writes, or None for attention slots only.

    Attributes:
        attentions: number of attention calls seen since entry.

    Raises:
        InputError: on dropout inside attention, on attention between different lengths (its keys
            belong to other tokens), or when an FFN has not run before a later layer's attention.
    """

    def __init__(self, model: nn.Module | None = None, ffn_slots: FFNSlots | None = None) -> None:
        super().__init__()
        if ffn_slots is not None and model is None:
            raise InputError("ffn_slots names modules by path: got model=None, expected the model")
        self.model = model
        self.ffn_slots = ffn_slots
        self.attentions = 0
        self._attention_slots: list[tuple[Tensor, Tensor]] = []
        self._ffn_slots: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ReferenceMode:
        """Forget the last pass, and listen to the FFNs' inputs."""
        self.attentions = 0
        self._attention_slots.clear()
        self._ffn_slots.clear()
        if self.ffn_slots is not None and self.model is not None:
            for layer, path in enumerate(self.ffn_slots.modules):
                module = self.model.get_submodule(path)
                hook = self._ffn_hook(layer)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Remove the hooks."""
        super().__exit__(*exception)
        while self._handles:
            self._handles.pop().remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace attention, leave everything else alone."""
        kwargs = kwargs or {}
        if func is _SDPA:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Modes are off while one handles a call, so the SDPA inside has to be caught by name.
            with mock.patch.object(F, "scaled_dot_product_attention", self.attend):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """SDPA's signature; the next layer's joint attention."""
        layer = self.attentions
        if dropout_p:
            raise InputError(
                f"attention {layer}: got dropout_p={dropout_p}, expected 0: use eval()"
            )
        if query.shape[-2] != key.shape[-2]:
            lengths = f"{query.shape[-2]} queries and {key.shape[-2]} keys"
            raise InputError(f"attention {layer}: got {lengths}, expected self-attention")
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise InputError(f"attention {layer}: KV heads differ from query heads: set enable_gqa")
        device = query.device.type
        if torch.is_autocast_enabled(device):  # SDPA is on autocast's list
            low = torch.get_autocast_dtype(device)
            query, key, value = query.to(low), key.to(low), value.to(low)
        slots = self.slots(layer)
        out, _ = moda_attention_reference(
            query,
            _as_query_heads(key, query),
            _as_query_heads(value, query),
            _stack([_as_query_heads(slot, query) for slot, _ in slots], query),
            _stack([_as_query_heads(slot, query) for _, slot in slots], query),
            is_causal=is_causal,
            attn_mask=attn_mask,
            scale=scale,
        )
        self._attention_slots.append((key, value))
        self.attentions += 1
        return out

    def slots(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """`(key, value)` of every slot that `layer` reads: attention 0, FFN 0, attention 1, ..."""
        found = []
        for earlier in range(layer):
            found.append(self._attention_slots[earlier])
            if self.ffn_slots is None or earlier >= len(self.ffn_slots.modules):
                continue
            if earlier not in self._ffn_slots:
                path = self.ffn_slots.modules[earlier]
                raise InputError(f"attention {layer} runs before {path}, which writes for it")
            found.append(self._ffn_slots[earlier])
        return found

    def _ffn_hook(self, layer: int) -> Callable[..., None]:
        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self.ffn_slots is not None
            ffn_input = args[0] if args else next(iter(kwargs.values()))
            self._ffn_slots[layer] = self.ffn_slots.key_value(layer, ffn_input)

        return write


def reference(
    model: nn.Module, *args: Any, ffn_slots: FFNSlots | None = None, **kwargs: Any
) -> Any:
    """Output of the eager, unconverted `model(*args, **kwargs)` with MoDA in its attention.

    The model is not changed.  For a float64 oracle pass `copy.deepcopy(model).double()`, float64
    inputs, and `ffn_slots` built from that copy.

    Raises:
        InputError: if the model calls no `scaled_dot_product_attention`; see also `ReferenceMode`.
    """
    mode = ReferenceMode(model, ffn_slots)
    with mode:
        output = model(*args, **kwargs)
    if not mode.attentions:
        raise InputError("got no call of F.scaled_dot_product_attention, expected at least one")
    return output


def _as_query_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat KV heads up to the query's: depth with repeated heads is mathematically the same."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1).to(query.dtype)


def _stack(slots: list[Tensor], query: Tensor) -> Tensor:
    """`[S, B, Hq, T, d]`, also for S = 0."""
    return torch.stack(slots) if slots else query.new_empty((0, *query.shape))
