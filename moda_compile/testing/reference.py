"""The oracle: mixture-of-depths attention in plain PyTorch, sharing no code with the graph passes.

`moda_attention_reference` writes the method's equations down with a full T x T matrix, and
`ReferenceMode` runs any eager, unconverted model with it: every call of
`torch.nn.functional.scaled_dot_product_attention` (and of other attention functions it is told of)
is computed as one joint softmax over its own keys and the keys that earlier calls of the same stack
left for the same token.  Which call belongs to which stack is written down by hand, model by model.
Source: arXiv 2603.15619, section 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import FunctionType
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
    score_mod: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over the sequence and the depth slots, in the inputs' dtype; differentiable.

    Args:
        q: queries `[B, Hq, T, d]`.
        k: keys `[B, Hk, U, d]`, Hq a multiple of Hk (KV head of query head h is `h // (Hq/Hk)`).
        v: values `[B, Hk, U, dv]`.
        depth_k: slot keys `[S, B, Hk, T, d]`; S may be 0.  Any strides.
        depth_v: slot values `[S, B, Hk, T, dv]`.
        is_causal: query t sees keys u <= t (aligned upper left, as SDPA does).
        attn_mask: bool (True = may attend) or additive, broadcastable to `[B, Hq, T, U]`.  It masks
            the sequence only: a slot belongs to the query's own token, so it is always visible.
        scale: factor on the scores; default `1 / sqrt(d)`.
        score_mod: applied to the scaled scores of the sequence `[B, Hq, T, U]`, before the mask.

    Returns:
        `(out [B, Hq, T, dv], lse [B, Hq, T])`; lse is the natural log of the joint normaliser, in
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
    if score_mod is not None:
        sequence = score_mod(sequence)
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
    """How the FFNs of one stack write depth slots, spelled out by hand for the oracle.

    Attributes:
        modules: paths of the FFN modules that write, in layer order, starting with layer 0 (None
            where a layer's FFN writes nothing).  The last layer writes no slot, so a stack of L
            layers names L - 1 modules.  A path named twice is a module that runs twice.
        key_value: `(layer, ffn_input [B, T, D]) -> (key, value)`, each `[B, Hk or Hq, T, d]`, with
            the key treated as the layer's own attention key is (k-norm, then rotation).
    """

    modules: Sequence[str | None]
    key_value: Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A call that reads its stack's slots and writes none: its K and V are an earlier layer's."""

    stack: Hashable = 0


#: The stack of each attention call: any name, a `Reader` of one, or None for a call that stays as
#: it is.  A sequence by number of call, or a function `(number, query, key, value)`.
StackOf = (
    Sequence[Hashable | Reader | None]
    | Callable[[int, Tensor, Tensor, Tensor], Hashable | Reader | None]
)

#: Attention functions beside SDPA -> adapters `(attend, *args, **kwargs)`: given the arguments of
#: one call, an adapter brings them to SDPA's layout, calls `attend` (`ReferenceMode.attend`'s
#: signature) once and returns what the function would.  A key is a Python function, an operator of
#: `torch.ops`, or what `torch.library.custom_op` returns.
Functions = Mapping[Callable[..., Any], Callable[..., Any]]


class _NothingToRead(Exception):
    """Inside an adapter: this call is the original function's own."""


class ReferenceMode(TorchFunctionMode):
    """Context in which an eager model computes MoDA: attention l reads the slots of layers < l.

    Each call of an attention function inside is one layer of its stack, in call order; its key and
    value become a slot for the later calls of that stack.  Attention functions are
    `scaled_dot_product_attention` (also inside `multi_head_attention_forward`, which is made to
    return no weights) and those of `functions`.  Masks, `is_causal`, `scale`, `enable_gqa` and KV
    heads that the model repeated itself are honoured.  A call that has nothing to read is the
    original function's own, unchanged: so is a row of it that the mask leaves nothing to see.  With
    slots, such a row gives them all its weight.
    One entry serves one forward pass.  A model under activation checkpointing would recompute its
    attention outside of the context, so switch that off first.

    Args:
        model: the model that will run; needed only with `ffn_slots`.
        ffn_slots: FFN writes, by stack; one `FFNSlots` alone is stack 0's; None for attention slots
            only.
        stacks: which stack each call belongs to.  By default calls whose keys and values agree in
            shape are one stack (all of them with a single `FFNSlots`), and attention between
            different lengths belongs to none: right for a model that is one stream of tokens.
        functions: attention functions beside SDPA.

    Attributes:
        attentions: number of attention calls seen since entry that belong to a stack.
        calls: number of all attention calls seen since entry.

    Raises:
        InputError: on dropout inside attention, on attention between different lengths (its keys
            belong to other tokens) or keys of different shapes in one stack, on a call that
            `stacks` does not name, or when an FFN has not run before a later layer's attention.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        ffn_slots: FFNSlots | Mapping[Hashable, FFNSlots] | None = None,
        *,
        stacks: StackOf | None = None,
        functions: Functions | None = None,
    ) -> None:
        super().__init__()
        if ffn_slots is not None and model is None:
            raise InputError("ffn_slots names modules by path: got model=None, expected the model")
        self.model = model
        self.ffn_slots: Mapping[Hashable, FFNSlots] = (
            {0: ffn_slots} if isinstance(ffn_slots, FFNSlots) else ffn_slots or {}
        )
        self._one = isinstance(ffn_slots, FFNSlots)
        self.stacks = stacks
        self.functions = dict(functions or {})
        self.attentions = self.calls = 0
        # By stack: what each call wrote, None for a reader; and (stack, layer) -> an FFN's slot.
        self._written: dict[Hashable, list[tuple[Tensor, Tensor] | None]] = {}
        self._fed: dict[tuple[Hashable, int], tuple[Tensor, Tensor]] = {}
        self._inside = False
        self._cleanup = ExitStack()

    def __enter__(self) -> ReferenceMode:
        """Forget the last pass, and listen to the FFNs' inputs."""
        self.attentions = self.calls = 0
        self._written.clear()
        self._fed.clear()
        for stack, slots in self.ffn_slots.items():
            assert self.model is not None
            layers: dict[str, list[int]] = {}
            for layer, path in enumerate(slots.modules):
                if path is not None:
                    layers.setdefault(path, []).append(layer)
            for path, mine in layers.items():
                hook = self._ffn_hook(stack, slots, mine)
                module = self.model.get_submodule(path)
                self._cleanup.callback(
                    module.register_forward_pre_hook(hook, with_kwargs=True).remove
                )
        for function, adapter in self.functions.items():
            if isinstance(function, FunctionType):
                replacement = partial(self._adapted, function, adapter)
                self._cleanup.enter_context(_replaced(function, replacement))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Remove the hooks."""
        super().__exit__(*exception)
        self._cleanup.close()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace attention, leave everything else alone."""
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        if func is _SDPA:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            bound = signature(func).bind(*args, **kwargs)
            bound.arguments["need_weights"] = False  # else it would not call SDPA
            # Modes are off while one handles a call, so the SDPA inside has to be caught by name.
            with mock.patch.object(F, "scaled_dot_product_attention", self.attend):
                return func(*bound.args, **bound.kwargs)
        for function, adapter in self.functions.items():
            if not isinstance(function, FunctionType) and func in _overloads(function):
                return self._adapted(func, adapter, *args, **kwargs)
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
        score_mod: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """SDPA's signature and `score_mod`; the next call's joint attention."""
        try:
            return self._attend(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, score_mod
            )
        except _NothingToRead:
            self._inside = True
            try:
                return _SDPA(
                    query, key, value, attn_mask, dropout_p, is_causal,
                    scale=scale, enable_gqa=enable_gqa,
                )  # fmt: skip
            finally:
                self._inside = False

    def slots(self, layer: int, stack: Hashable = 0) -> list[tuple[Tensor, Tensor]]:
        """`(key, value)` of every slot that `layer` reads: attention 0, FFN 0, attention 1, ..."""
        found = []
        modules = self.ffn_slots[stack].modules if stack in self.ffn_slots else ()
        for earlier, written in enumerate(self._written.get(stack, ())[:layer]):
            if written is not None:
                found.append(written)
            if earlier >= len(modules) or modules[earlier] is None:
                continue
            if (stack, earlier) not in self._fed:
                raise InputError(
                    f"attention {layer} runs before {modules[earlier]}, which writes for it"
                )
            found.append(self._fed[stack, earlier])
        return found

    def _place(self, query: Tensor, key: Tensor, value: Tensor) -> Hashable | Reader | None:
        """Where the call that is about to run stands."""
        if callable(self.stacks):
            return self.stacks(self.calls, query, key, value)
        if self.stacks is not None:
            if self.calls >= len(self.stacks):
                raise InputError(f"stacks names {len(self.stacks)} calls: got another one")
            return self.stacks[self.calls]
        if query.shape[-2] != key.shape[-2]:
            return None
        return 0 if self._one else (*key.shape, value.shape[-1])

    def _adapted(self, original: Any, adapter: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of one of `functions`."""
        if not self._inside:
            try:
                return adapter(self._attend, *args, **kwargs)
            except _NothingToRead:
                pass
        outer, self._inside = self._inside, True
        try:
            return original(*args, **kwargs)
        finally:
            self._inside = outer

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        score_mod: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The next call's joint attention.

        Raises:
            _NothingToRead: if it is in no stack, or its stack has no slot yet.
        """
        place = self._place(query, key, value)
        number, self.calls = self.calls, self.calls + 1
        if place is None:
            raise _NothingToRead
        if dropout_p:
            raise InputError(
                f"attention {number}: got dropout_p={dropout_p}, expected 0: use eval()"
            )
        if query.shape[-2] != key.shape[-2]:
            lengths = f"{query.shape[-2]} queries and {key.shape[-2]} keys"
            raise InputError(f"attention {number}: got {lengths}, expected self-attention")
        if key.shape[1] not in (1, query.shape[1]) and not enable_gqa:  # one head broadcasts
            raise InputError(
                f"attention {number}: KV heads differ from query heads: set enable_gqa"
            )
        device = query.device.type
        if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
            low = torch.get_autocast_dtype(device)  # SDPA is on autocast's list
            query, key, value = query.to(low), key.to(low), value.to(low)
        stack = place.stack if isinstance(place, Reader) else place
        written = self._written.setdefault(stack, [])
        slots = self.slots(len(written), stack)
        written.append(None if isinstance(place, Reader) else (key, value))
        self.attentions += 1
        if not slots:
            raise _NothingToRead
        if any(slot.shape[::2] != key.shape[::2] for slot, _ in slots):
            raise InputError(f"attention {number}: its stack's slots are of another [B, T]")
        out, _ = moda_attention_reference(
            query,
            _as_query_heads(key, query),
            _as_query_heads(value, query),
            torch.stack([_as_query_heads(slot, query) for slot, _ in slots]),
            torch.stack([_as_query_heads(slot, query) for _, slot in slots]),
            is_causal=is_causal,
            attn_mask=attn_mask,
            scale=scale,
            score_mod=score_mod,
        )
        return out

    def _ffn_hook(self, stack: Hashable, slots: FFNSlots, layers: list[int]) -> Callable[..., None]:
        remaining = iter(layers)

        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = next(remaining, None)
            if layer is not None:
                ffn_input = args[0] if args else next(iter(kwargs.values()))
                self._fed[stack, layer] = slots.key_value(layer, ffn_input)

        return write


def reference(
    model: nn.Module,
    *args: Any,
    ffn_slots: FFNSlots | Mapping[Hashable, FFNSlots] | None = None,
    stacks: StackOf | None = None,
    functions: Functions | None = None,
    **kwargs: Any,
) -> Any:
    """Output of the eager, unconverted `model(*args, **kwargs)` with MoDA in its attention.

    The model is not changed.  For a float64 oracle pass `copy.deepcopy(model).double()`, float64
    inputs, and `ffn_slots` built from that copy.  See `ReferenceMode` for the other arguments.

    Raises:
        InputError: if the model calls no attention function; see also `ReferenceMode`.
    """
    mode = ReferenceMode(model, ffn_slots, stacks=stacks, functions=functions)
    with mode:
        output = model(*args, **kwargs)
    if not mode.attentions:
        raise InputError("got no call of F.scaled_dot_product_attention, expected at least one")
    return output


@contextmanager
def _replaced(function: FunctionType, replacement: Any) -> Iterator[None]:
    """`replacement` under every name that `function` has in any module."""
    names = [
        (module, name)
        for module in list(sys.modules.values())
        for name, thing in list(getattr(module, "__dict__", {}).items())
        if thing is function
    ]
    try:
        for module, name in names:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name in names:
            setattr(module, name, function)


def _overloads(function: Any) -> list[Any]:
    """What a TorchFunctionMode may see when `function`, an operator in some form, is called."""
    operator = getattr(function, "_opoverload", function)  # torch.library.custom_op's
    packet = getattr(operator, "overloadpacket", operator)
    names = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return [operator, packet, *(getattr(packet, name) for name in names)]


def _as_query_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """KV heads `[B, Hk, T, d]`, one for each query head: depth with repeated heads is the same.

    A slot may come from a layer that repeated its KV heads itself, for more query heads than this
    one has: then its heads are equal in groups, and one of each is taken.
    """
    heads, own = query.shape[1], tensor.shape[1]
    common = math.gcd(heads, own)
    if own > common:
        grouped = tensor.unflatten(1, (common, own // common))
        if not torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
            raise InputError(f"got {own} KV heads in a slot, which {heads} query heads can't share")
        tensor = grouped[:, :, 0]
    return tensor.repeat_interleave(heads // common, dim=1).to(query.dtype)
