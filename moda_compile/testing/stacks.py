"""Random transformer stacks in plain PyTorch, and a Hypothesis strategy over their shapes.

Nothing here knows MoDA, except `RandomStack.ffn_slots`, which spells out by hand what the FFNs of
such a stack write (the oracle for `ffn_kv="projected"` and `"shared"`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile.errors import InputError
from moda_compile.testing.reference import FFNSlots

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

DType = Literal["float32", "float64", "bfloat16", "float16"]
VOCABULARY = 29
EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One random stack; its repr is runnable, so a failure prints its own reproduction.

    Attributes:
        layers, kv_heads, groups, head_dim: L, Hk, G (query heads are G * Hk) and d.
        width: D; 0 means G * Hk * d.
        norm: LayerNorm, RMS norm written out, or `F.rms_norm`.
        placement: norm before the branch, after the residual sum, or on the branch's output.
        qk_norm: none, one per head (over d), or over the full width of q and of k.
        projection: how q, k, v come out: three linears; one linear in `chunk(3)`; one linear viewed
            `[B, T, H, 3, d]`; one linear `split` by sizes; one viewed `[B, T, Hk, G + 2, d]`.
            `chunk` and `interleaved` need groups = 1.
        rotary: none, half-split, or interleaved pairs; `rotary_layout` says whether it is applied
            on `[B, T, H, d]` ("token") or on `[B, H, T, d]` ("head").
        repeat: how KV heads reach the query heads (ignored for groups = 1).
        mask: none (an encoder), `is_causal=True`, or a mask tensor built in the forward pass.
            `window_bool` is causal with a window of 3 tokens: not expressible by a flag.
        ffn: GELU MLP, SwiGLU with two linears, or SwiGLU with one linear and `chunk(2)`.
        order: attention then FFN, or a parallel block calling either one first.
        bias: of every linear in attention and FFN.
        scale: SDPA's scale argument, None for its default.
        batch, length, seed, dtype: of `inputs()`, of the weights, and of both.
    """

    layers: int = 2
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 8
    width: int = 0
    norm: Literal["layer", "rms", "rms_functional"] = "layer"
    placement: Literal["pre", "post", "branch"] = "pre"
    qk_norm: Literal["none", "head", "full"] = "none"
    projection: Literal["separate", "chunk", "interleaved", "sizes", "grouped"] = "separate"
    rotary: Literal["none", "half", "pairs"] = "none"
    rotary_layout: Literal["token", "head"] = "head"
    repeat: Literal["enable_gqa", "repeat_interleave", "expand_before", "expand_after"] = (
        "enable_gqa"
    )
    mask: Literal[
        "none",
        "flag",
        "tril_bool",
        "arange_bool",
        "batched_bool",
        "triu_additive",
        "window_bool",
    ] = "flag"
    ffn: Literal["gelu", "swiglu", "fused_swiglu"] = "gelu"
    order: Literal["sequential", "attention_first", "ffn_first"] = "sequential"
    bias: bool = False
    scale: float | None = None
    batch: int = 1
    length: int = 5
    seed: int = 0
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.groups > 1 and self.projection in ("chunk", "interleaved"):
            raise InputError(f"projection={self.projection!r}: got groups={self.groups}, needs 1")

    @property
    def query_heads(self) -> int:
        """Hq = G * Hk."""
        return self.groups * self.kv_heads

    @property
    def model_width(self) -> int:
        """D."""
        return self.width if self.width else self.query_heads * self.head_dim

    def inputs(self) -> tuple[Tensor]:
        """Token ids `[B, T]` from the seed: the arguments of one forward pass."""
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randint(VOCABULARY, (self.batch, self.length), generator=generator),)


class _Norm(nn.Module):
    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPSILON)
        if self.kind == "rms_functional":
            return F.rms_norm(x, self.weight.shape, self.weight, EPSILON)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON))


def _angles(config: StackConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, d / 2]`."""
    half = torch.arange(config.head_dim // 2, device=like.device, dtype=like.dtype)
    frequency = 100.0 ** (-2.0 * half / config.head_dim)
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()


def _rotate(config: StackConfig, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [..., T, d]` (or `[B, T, H, d]` with angles `[T, 1, d / 2]`) by its token."""
    if config.rotary == "half":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class _Attention(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        width, head_dim, bias = config.model_width, config.head_dim, config.bias
        query, kv = config.query_heads * head_dim, config.kv_heads * head_dim
        if config.projection == "separate":
            self.q = nn.Linear(width, query, bias=bias)
            self.k = nn.Linear(width, kv, bias=bias)
            self.v = nn.Linear(width, kv, bias=bias)
        else:
            self.qkv = nn.Linear(width, query + 2 * kv, bias=bias)
        self.out = nn.Linear(query, width, bias=bias)
        kind = "rms" if config.norm == "layer" else config.norm
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = _Norm(kind, head_dim), _Norm(kind, head_dim)
        elif config.qk_norm == "full":
            self.q_norm, self.k_norm = _Norm(kind, query), _Norm(kind, kv)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, Hq * d]`, k and v `[B, T, Hk * d]`, except `[B, T, H, d]` when interleaved."""
        config = self.config
        query, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        if config.projection == "separate":
            return self.q(x), self.k(x), self.v(x)
        packed = self.qkv(x)
        if config.projection == "chunk":
            q, k, v = packed.chunk(3, dim=-1)
        elif config.projection == "sizes":
            q, k, v = packed.split([query, kv, kv], dim=-1)
        elif config.projection == "interleaved":
            q, k, v = packed.view(*x.shape[:2], config.query_heads, 3, config.head_dim).unbind(3)
        else:
            per_kv = packed.view(*x.shape[:2], config.kv_heads, config.groups + 2, config.head_dim)
            q, k, v = per_kv[..., :-2, :].flatten(2, 3), per_kv[..., -2, :], per_kv[..., -1, :]
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        by_head = (batch, length, -1, config.head_dim)
        q, k, v = self.project(x)
        if config.qk_norm == "full":
            q = self.q_norm(q.reshape(batch, length, -1))
            k = self.k_norm(k.reshape(batch, length, -1))
        q, k, v = q.reshape(by_head), k.reshape(by_head), v.reshape(by_head)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rotary != "none" and config.rotary_layout == "token":
            q = _rotate(config, q, cos[:, None], sin[:, None])
            k = _rotate(config, k, cos[:, None], sin[:, None])
        if config.groups > 1 and config.repeat == "expand_before":
            shape = (batch, length, config.kv_heads, config.groups, config.head_dim)
            k = k[:, :, :, None].expand(shape).reshape(by_head)
            v = v[:, :, :, None].expand(shape).reshape(by_head)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if config.rotary != "none" and config.rotary_layout == "head":
            q, k = _rotate(config, q, cos, sin), _rotate(config, k, cos, sin)
        if config.groups > 1 and config.repeat == "expand_after":
            shape = (batch, config.kv_heads, config.groups, length, config.head_dim)
            heads = (batch, config.query_heads, length, config.head_dim)
            k = k[:, :, None].expand(shape).reshape(heads)
            v = v[:, :, None].expand(shape).reshape(heads)
        elif config.groups > 1 and config.repeat == "repeat_interleave":
            k = k.repeat_interleave(config.groups, dim=1)
            v = v.repeat_interleave(config.groups, dim=1)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=config.mask == "flag",
            scale=config.scale,
            enable_gqa=config.groups > 1 and config.repeat == "enable_gqa",
        )
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class _FeedForward(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.kind = config.ffn
        width, hidden = config.model_width, config.model_width + 8
        inner = 2 * hidden if config.ffn == "fused_swiglu" else hidden
        self.up = nn.Linear(width, inner, bias=config.bias)
        if config.ffn == "swiglu":
            self.gate = nn.Linear(width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x)))
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class _Block(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = _Attention(config)
        self.ffn = _FeedForward(config)
        self.attention_norm = _Norm(config.norm, config.model_width)
        if config.order == "sequential" or config.placement == "branch":
            self.ffn_norm = _Norm(config.norm, config.model_width)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        placement = self.config.placement
        if self.config.order != "sequential":
            normed = self.attention_norm(x) if placement == "pre" else x
            if self.config.order == "attention_first":
                attended = self.attention(normed, mask, cos, sin)
                fed = self.ffn(normed)
            else:
                fed = self.ffn(normed)
                attended = self.attention(normed, mask, cos, sin)
            if placement == "branch":
                return x + self.attention_norm(attended) + self.ffn_norm(fed)
            total = x + attended + fed
            return self.attention_norm(total) if placement == "post" else total
        if placement == "pre":
            x = x + self.attention(self.attention_norm(x), mask, cos, sin)
            return x + self.ffn(self.ffn_norm(x))
        if placement == "post":
            x = self.attention_norm(x + self.attention(x, mask, cos, sin))
            return self.ffn_norm(x + self.ffn(x))
        x = x + self.attention_norm(self.attention(x, mask, cos, sin))
        return x + self.ffn_norm(self.ffn(x))


class RandomStack(nn.Module):
    """A transformer stack as `config` describes it: `forward(ids [B, T]) -> logits [B, T, V]`.

    Weights come from `config.seed` and are livelier than the default initialisation, so that the
    softmax is far from uniform and norms and biases matter.  `repr` is runnable.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(VOCABULARY, config.model_width)
            self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
            self.norm = _Norm(config.norm, config.model_width)
            self.head = nn.Linear(config.model_width, VOCABULARY, bias=False)
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.dim() == 2:
                        nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[1]))
                    else:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        self.to(getattr(torch, config.dtype))

    def __repr__(self) -> str:
        """Runnable."""
        return f"RandomStack({self.config!r})"

    def _mask(self, length: int, batch: int, like: Tensor) -> Tensor | None:
        kind, device = self.config.mask, like.device
        if kind in ("none", "flag"):
            return None
        if kind == "tril_bool":
            return torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if kind == "triu_additive":
            return torch.full((length, length), -math.inf, device=device, dtype=like.dtype).triu(1)
        position = torch.arange(length, device=device)
        causal = position[None, None, :, None] >= position[None, None, None, :]
        if kind == "window_bool":
            return causal & (position[None, None, :, None] - position[None, None, None, :] < 3)
        return causal.expand(batch, 1, length, length) if kind == "batched_bool" else causal

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`."""
        x = self.embedding(ids)
        batch, length, _ = x.shape
        mask = self._mask(length, batch, x)
        cos, sin = _angles(self.config, length, x)
        for block in self.blocks:
            x = block(x, mask, cos, sin)
        return self.head(self.norm(x))

    def ffn_slots(
        self, mode: Literal["projected", "shared"], parameters: Mapping[str, Tensor]
    ) -> FFNSlots:
        """What this stack's FFNs write, from its own modules and, for "projected", `parameters`.

        Args:
            mode: which weights make the slot; see `MoDAConfig.ffn_kv`.
            parameters: the converted model's parameters by name, of which
                `blocks.<i>.ffn.moda_key_weight` and `..._value_weight` `[Hk * d, D]` are used.
        """

        def key_value(layer: int, ffn_input: Tensor) -> tuple[Tensor, Tensor]:
            attention = cast(_Block, self.blocks[layer]).attention
            if mode == "projected":
                prefix = f"blocks.{layer}.ffn."
                key = F.linear(ffn_input, parameters[prefix + "moda_key_weight"])
                value = F.linear(ffn_input, parameters[prefix + "moda_value_weight"])
            else:
                _, key, value = attention.project(ffn_input)
            return self._treat(attention, key, ffn_input), self._by_head(value, ffn_input)

        return FFNSlots(
            modules=[f"blocks.{layer}.ffn" for layer in range(self.config.layers - 1)],
            key_value=key_value,
        )

    def _by_head(self, x: Tensor, ffn_input: Tensor) -> Tensor:
        batch, length, _ = ffn_input.shape
        return x.reshape(batch, length, self.config.kv_heads, self.config.head_dim).transpose(1, 2)

    def _treat(self, attention: _Attention, key: Tensor, ffn_input: Tensor) -> Tensor:
        """The attention's own treatment of a key: k-norm, then its token's rotation."""
        config = self.config
        if config.qk_norm == "full":
            key = attention.k_norm(key.reshape(*ffn_input.shape[:2], -1))
        key = self._by_head(key, ffn_input)
        if config.qk_norm == "head":
            key = attention.k_norm(key)
        if config.rotary == "none":
            return key
        return _rotate(config, key, *_angles(config, ffn_input.shape[1], ffn_input))


def stacks(
    *, max_layers: int = 5, general_masks: bool = False, dtype: DType = "float32"
) -> SearchStrategy[RandomStack]:
    """Hypothesis strategy over `RandomStack`: 1 to `max_layers` layers of any `StackConfig` kind.

    Args:
        max_layers: largest L drawn.
        general_masks: also draw masks that no `is_causal` flag can express.
        dtype: of the weights.

    Raises:
        ImportError: without Hypothesis (install the extra `moda-compile[testing]`).
    """
    from hypothesis import strategies as st

    masks = ["flag", "none", "tril_bool", "arange_bool", "batched_bool", "triu_additive"]

    orders = ["sequential", "sequential", "attention_first", "ffn_first"]

    @st.composite
    def draw_config(draw: st.DrawFn) -> RandomStack:
        groups = draw(st.integers(1, 4))
        projections = ["separate", "sizes", "grouped"]
        if groups == 1:
            projections += ["chunk", "interleaved"]
        return RandomStack(
            StackConfig(
                layers=draw(st.sampled_from([*range(2, max_layers + 1), 1])),
                kv_heads=draw(st.integers(1, 3)),
                groups=groups,
                head_dim=draw(st.sampled_from([8, 16, 24])),
                width=draw(st.sampled_from([0, 0, 24, 40])),
                norm=draw(st.sampled_from(["layer", "rms", "rms_functional"])),
                placement=draw(st.sampled_from(["pre", "post", "branch"])),
                qk_norm=draw(st.sampled_from(["none", "head", "full"])),
                projection=draw(st.sampled_from(projections)),
                rotary=draw(st.sampled_from(["none", "half", "pairs"])),
                rotary_layout=draw(st.sampled_from(["head", "token"])),
                repeat=draw(
                    st.sampled_from(
                        ["enable_gqa", "repeat_interleave", "expand_before", "expand_after"]
                    )
                ),
                mask=draw(st.sampled_from(masks + ["window_bool"] * general_masks)),
                ffn=draw(st.sampled_from(["gelu", "swiglu", "fused_swiglu"])),
                order=draw(st.sampled_from(orders)),
                bias=draw(st.booleans()),
                scale=draw(st.sampled_from([None, 0.3])),
                batch=draw(st.integers(1, 3)),
                length=draw(st.sampled_from([5, 1, 2, 3, 7, 16, 17, 33])),
                seed=draw(st.integers(0, 9)),
                dtype=dtype,
            )
        )

    return draw_config()
