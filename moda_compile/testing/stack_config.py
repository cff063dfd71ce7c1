"""The options of a random stack, and of two of them in one model.  A repr is a reproduction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moda_compile.errors import InputError
from moda_compile.testing import masks
from moda_compile.testing.cores import ByHand, NearMiss
from moda_compile.testing.masks import Mask
from moda_compile.testing.shrink import ShortRepr

DType = Literal["float32", "float64", "bfloat16", "float16"]
VOCABULARY = 29
#: Projections whose values may be of another width than the keys.
UNEVEN = ("separate", "sizes")
_PACKED = {
    "groups": 1, "value_dim": 0, "qk_norm": "none", "rotary": "none", "projection": "separate",
    "scale": None, "variants": (),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Variant(ShortRepr):
    """How some layers of a stack differ from the rest; None is the stack's own.

    Attributes:
        mask: another mask (local and global layers in turn).
        kv_heads, groups, head_dim, value_dim: other attention shapes.
        mixer: attention, or a causal depthwise convolution.
        shares_kv: the layer uses the K and V of the nearest attention layer before it that has some
            of its own, and has no projections for them.
    """

    mask: Mask | None = None
    kv_heads: int | None = None
    groups: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    mixer: Literal["attention", "convolution"] = "attention"
    shares_kv: bool = False


@dataclass(frozen=True, kw_only=True, repr=False)
class StackConfig(ShortRepr):
    """One random stack; its repr is runnable, so a failure prints its own reproduction.

    Attributes:
        layers, kv_heads, groups, head_dim: L, Hk, G (query heads are G * Hk) and d.
        value_dim: dv, of the values; 0 means d. Otherwise the projection is "separate" or "sizes".
        width: D; 0 means G * Hk * d.
        norm: LayerNorm, RMS norm written out, or `F.rms_norm`.
        norm_dtype: of norms' weights and arithmetic; "same" is the stack's.
        placement: norm before the branch, after the residual sum, or on the branch's output.
        qk_norm: none, one per head (over d), or over the full width of q and of k.
        projection: how q, k, v come out: three linears; one linear in `chunk(3)`; one linear viewed
            `[B, T, H, 3, d]`; one linear `split` by sizes; one viewed `[B, T, Hk, G + 2, d]`.
            `chunk` and `interleaved` need groups = 1.
        rotary: none, half-split, or interleaved pairs; `rotary_layout` says whether it is applied
            on `[B, T, H, d]` ("token") or on `[B, H, T, d]` ("head").
        repeat: how KV heads reach the query heads (ignored for groups = 1).
        core: `F.scaled_dot_product_attention`, or how attention is written by hand.
        module: `nn.MultiheadAttention` in place of all of the above, `[B, T, D]` or `[T, B, D]`.
        near_miss: every layer computes this in place of attention; with `near_miss_layer` only
            that one does.
        mask: see `moda_compile.testing.masks.Mask`.
        ffn: GELU MLP, SwiGLU with two linears, SwiGLU with one linear and `chunk(2)`, none, or a
            mixture of three experts of which each token takes two: all computed and weighted,
            their weights gathered by token, or the tokens sorted by expert and put back.
        order: attention then FFN, or a parallel block calling either one first.
        bias: of every linear in attention and FFN.
        scale: SDPA's scale argument, None for its default.
        variants: layer i is `variants[i % len(variants)]`.
        passes: how often the tokens go through all layers (weights tied across depth).
        checkpoint: `torch.utils.checkpoint` around each block while training.
        batch, length, seed, dtype: of `inputs()`, of the weights, and of both.
    """

    layers: int = 2
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 8
    value_dim: int = 0
    width: int = 0
    norm: Literal["layer", "rms", "rms_functional"] = "layer"
    norm_dtype: Literal["same", "float32"] = "same"
    placement: Literal["pre", "post", "branch"] = "pre"
    qk_norm: Literal["none", "head", "full"] = "none"
    projection: Literal["separate", "chunk", "interleaved", "sizes", "grouped"] = "separate"
    rotary: Literal["none", "half", "pairs"] = "none"
    rotary_layout: Literal["token", "head"] = "head"
    repeat: Literal["enable_gqa", "repeat_interleave", "expand_before", "expand_after"] = (
        "enable_gqa"
    )
    core: Literal["sdpa"] | ByHand = "sdpa"
    module: Literal["none", "batch_first", "length_first"] = "none"
    near_miss: NearMiss | None = None
    near_miss_layer: int | None = None
    mask: Mask = "flag"
    ffn: Literal[
        "gelu", "swiglu", "fused_swiglu", "none", "moe_dense", "moe_gather", "moe_sorted"
    ] = "gelu"
    order: Literal["sequential", "attention_first", "ffn_first"] = "sequential"
    bias: bool = False
    scale: float | None = None
    variants: tuple[Variant, ...] = ()
    passes: int = 1
    checkpoint: bool = False
    batch: int = 1
    length: int = 5
    seed: int = 0
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.groups > 1 and self.projection in ("chunk", "interleaved"):
            raise InputError(f"projection={self.projection!r}: got groups={self.groups}, needs 1")
        if self.values != self.head_dim and self.projection not in UNEVEN:
            raise InputError(f"projection={self.projection!r}: got value_dim={self.value_dim}")
        by_hand = self.core != "sdpa" or self.near_miss is not None
        if by_hand and self.groups > 1 and self.repeat == "enable_gqa":
            raise InputError("repeat='enable_gqa' is SDPA's own; by hand, KV heads are repeated")
        if self.module != "none":
            other = [name for name, usual in _PACKED.items() if getattr(self, name) != usual]
            if other:
                raise InputError(f"nn.MultiheadAttention has no {', '.join(other)}")
        if self.module != "none" and by_hand:
            raise InputError("nn.MultiheadAttention brings its own core")
        if self.variants and (self.variants[0].shares_kv or self.variants[0].mixer != "attention"):
            raise InputError("the first variant needs attention with K and V of its own")
        shapes = any(v.kv_heads or v.groups or v.head_dim or v.value_dim for v in self.variants)
        if any(v.shares_kv for v in self.variants) and (self.repeat == "expand_before" or shapes):
            raise InputError("shared K and V need one shape, and are repeated after sharing")

    @property
    def query_heads(self) -> int:
        """Hq = G * Hk."""
        return self.groups * self.kv_heads

    @property
    def values(self) -> int:
        """Dv."""
        return self.value_dim or self.head_dim

    @property
    def model_width(self) -> int:
        """D."""
        return self.width if self.width else self.query_heads * self.head_dim

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Of all layers, each once."""
        return tuple(dict.fromkeys(self.layer(i).mask for i in range(self.layers)))

    def variant(self, layer: int) -> Variant:
        """How layer `layer` differs."""
        return self.variants[layer % len(self.variants)] if self.variants else Variant()

    def layer(self, layer: int) -> StackConfig:
        """What layer `layer` is made of; D is the stack's."""
        chosen = self.variant(layer)
        changes: dict[str, Any] = {
            name: getattr(chosen, name)
            for name in ("mask", "kv_heads", "groups", "head_dim", "value_dim")
            if getattr(chosen, name) is not None
        }
        if self.near_miss_layer not in (None, layer):
            changes["near_miss"] = None
        return replace(self, width=self.model_width, variants=(), **changes)

    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of one forward pass: token ids `[B, T]`, and what its masks read."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(VOCABULARY, (self.batch, self.length), generator=generator)
        reading = [kind for kind in self.masks if kind in masks.WITH_INPUT]
        if not reading:
            return (ids,)
        return ids, masks.extra_input(reading[0], self.batch, self.length, generator)

    def kinds(self) -> Iterator[str]:
        """What is special about it, for a histogram."""
        if isinstance(self.core, ByHand):
            yield f"by hand: {self.core.product}"
        elif self.module != "none":
            yield f"nn.MultiheadAttention {self.module}"
        else:
            yield "sdpa"
        if self.near_miss:
            yield f"near miss: {self.near_miss}"
        for kind in self.masks:
            yield f"mask: {kind}"
        if self.groups > 1:
            yield "grouped query"
        yield f"ffn: {self.ffn}" + ("" if self.order == "sequential" else ", parallel")
        if self.values != self.head_dim:
            yield "wider values" if self.values > self.head_dim else "narrower values"
        shapes = {(v.kv_heads, v.head_dim, v.value_dim) for v in self.variants}
        if len(shapes) > 1:
            yield "KV shapes by layer"
        if len(self.masks) > 1:
            yield "masks by layer"
        if any(v.shares_kv for v in self.variants):
            yield "KV shared between layers"
        if any(v.mixer == "convolution" for v in self.variants):
            yield "convolution layers"
        if self.passes > 1:
            yield "layers reused"
        if self.checkpoint:
            yield "checkpoint"
        if self.norm_dtype != "same":
            yield "norm in another dtype"


@dataclass(frozen=True, kw_only=True, repr=False)
class PairConfig(ShortRepr):
    """Two stacks in one model; its repr is runnable.

    Attributes:
        first, second: the stacks; each has its own depth slots.
        join: how they meet:

            - "sum": two towers over two inputs of one length, added at the end.
            - "apart": two towers, two outputs.
            - "cross": encoder and decoder: each layer of the second also attends to the first's
              output (cross-attention, which writes and reads no slot).
            - "pool": the second goes on with the first's tokens, two merged into one.
            - "append": the second goes on with the first's tokens and its own input's behind them.
    """

    first: StackConfig = StackConfig()
    second: StackConfig = StackConfig()
    join: Literal["sum", "apart", "cross", "pool", "append"] = "sum"

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        one, two = self.first, self.second
        if one.batch != two.batch or one.dtype != two.dtype:
            raise InputError("both stacks need the same batch and dtype")
        if self.join != "cross" and one.model_width != two.model_width:
            raise InputError(f"join={self.join!r}: both stacks need the same width")
        if self.join == "sum" and one.length != two.length:
            raise InputError("join='sum': both stacks need the same length")
        if self.join == "pool" and one.length % 2:
            raise InputError(f"join='pool': got length {one.length}, needs an even one")
        if any(kind in masks.WITH_INPUT for kind in (*one.masks, *two.masks)):
            raise InputError("a pair has no second input for masks")

    @property
    def dtype(self) -> DType:
        """Of both."""
        return self.first.dtype

    def inputs(self) -> tuple[Tensor, ...]:
        """Token ids of the first stack and, unless it only goes on, of the second."""
        both = self.first.inputs() + replace(self.second, seed=self.second.seed + 1).inputs()
        return both[:1] if self.join == "pool" else both

    def kinds(self) -> Iterator[str]:
        """What is special about it, for a histogram."""
        yield f"two stacks: {self.join}"
        yield from {*self.first.kinds(), *self.second.kinds()}
