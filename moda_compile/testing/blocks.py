"""The modules of a random stack: norms, attentions, feed-forward networks and blocks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile.testing import cores
from moda_compile.testing.stack_config import StackConfig

EPSILON = 1e-5
EXPERTS, CHOSEN = 3, 2
KeyValue = tuple[Tensor, Tensor]


class Norm(nn.Module):
    """LayerNorm or RMS norm over the last dimension, in its weight's dtype."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape and dtype."""
        if x.dtype != self.weight.dtype:
            return self._norm(x.to(self.weight.dtype)).to(x.dtype)
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPSILON)
        if self.kind == "rms_functional":
            return F.rms_norm(x, self.weight.shape, self.weight, EPSILON)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON))


def angles(config: StackConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, d / 2]`."""
    half = torch.arange(config.head_dim // 2, device=like.device, dtype=like.dtype)
    frequency = 100.0 ** (-2.0 * half / config.head_dim)
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(config: StackConfig, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [..., T, d]` (or `[B, T, H, d]` with angles `[T, 1, d / 2]`) by its token."""
    if config.rotary == "half":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Self-attention as one layer's `config` describes it; cross-attention with a `context`."""

    def __init__(self, config: StackConfig, *, shares_kv: bool = False) -> None:
        super().__init__()
        self.config = config
        self.shares_kv = shares_kv
        width, head_dim, bias = config.model_width, config.head_dim, config.bias
        query, kv = config.query_heads * head_dim, config.kv_heads * head_dim
        values = config.kv_heads * config.values
        if shares_kv:
            self.q = nn.Linear(width, query, bias=bias)
        elif config.projection == "separate":
            self.q = nn.Linear(width, query, bias=bias)
            self.k = nn.Linear(width, kv, bias=bias)
            self.v = nn.Linear(width, values, bias=bias)
        else:
            self.qkv = nn.Linear(width, query + kv + values, bias=bias)
        self.out = nn.Linear(config.query_heads * config.values, width, bias=bias)
        kind = "rms" if config.norm == "layer" else config.norm
        if config.qk_norm == "head":
            self.q_norm = Norm(kind, head_dim)
        elif config.qk_norm == "full":
            self.q_norm = Norm(kind, query)
        if config.qk_norm != "none" and not shares_kv:
            self.k_norm = Norm(kind, head_dim if config.qk_norm == "head" else kv)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, Hq * d]`, k and v `[B, T, Hk * d]` (dv), or `[B, T, H, d]` if interleaved."""
        config = self.config
        query, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        if config.projection == "separate":
            return self.q(x), self.k(x), self.v(x)
        packed = self.qkv(x)
        if config.projection == "chunk":
            q, k, v = packed.chunk(3, dim=-1)
        elif config.projection == "sizes":
            q, k, v = packed.split([query, kv, config.kv_heads * config.values], dim=-1)
        elif config.projection == "interleaved":
            q, k, v = packed.view(*x.shape[:2], config.query_heads, 3, config.head_dim).unbind(3)
        else:
            per_kv = packed.view(*x.shape[:2], config.kv_heads, config.groups + 2, config.head_dim)
            q, k, v = per_kv[..., :-2, :].flatten(2, 3), per_kv[..., -2, :], per_kv[..., -1, :]
        return q, k, v

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        shared: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """The output `[B, T, D]`, and K and V `[B, Hk, T, d or dv]` for layers that share them."""
        batch, length, _ = x.shape
        if self.shares_kv:
            assert shared is not None
            q, (k, v) = self.treat(self.q(x), "q", cos, sin), shared
        else:
            q, k, v = self.project(x)
            q, k = self.treat(q, "q", cos, sin), self.treat(k, "k", cos, sin)
            v = self.before(v.reshape(batch, length, -1, self.config.values)).transpose(1, 2)
        keep = k, v
        k, v = self.after(k), self.after(v)
        out = self.attend(q, k, v, mask)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1)), keep

    def treat(self, x: Tensor, side: str, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys as scores use them, `[B, H, T, d]`: norm, rotation; key heads repeated
        where `config` repeats them first.
        """
        config = self.config
        batch, length = x.shape[:2]
        norm = getattr(self, f"{side}_norm", None)
        if config.qk_norm == "full" and norm is not None:
            x = norm(x.reshape(batch, length, -1))
        x = x.reshape(batch, length, -1, config.head_dim)
        if config.qk_norm == "head" and norm is not None:
            x = norm(x)
        if config.rotary != "none" and config.rotary_layout == "token":
            x = rotate(config, x, cos[:, None], sin[:, None])
        x = (self.before(x) if side == "k" else x).transpose(1, 2)
        if config.rotary != "none" and config.rotary_layout == "head":
            x = rotate(config, x, cos, sin)
        return x

    def before(self, x: Tensor) -> Tensor:
        """KV heads `[B, T, Hk, d]` repeated, if that is where they are."""
        config = self.config
        if config.groups == 1 or config.repeat != "expand_before":
            return x
        shape = (*x.shape[:2], config.kv_heads, config.groups, x.shape[-1])
        return x[:, :, :, None].expand(shape).flatten(2, 3)

    def after(self, x: Tensor) -> Tensor:
        """KV heads `[B, Hk, T, d]` repeated, if that is where they are."""
        config = self.config
        if config.groups > 1 and config.repeat == "expand_after":
            batch, heads, length, head_dim = x.shape
            shape = (batch, heads, config.groups, length, head_dim)
            return x[:, :, None].expand(shape).reshape(batch, config.query_heads, length, head_dim)
        if config.groups > 1 and config.repeat == "repeat_interleave":
            return x.repeat_interleave(config.groups, dim=1)
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The core, `[B, Hq, T, dv]`."""
        config = self.config
        how = cores.ByHand() if config.core == "sdpa" else config.core
        if config.near_miss is not None:
            return cores.near_miss(config.near_miss, how, q, k, v, mask, config.scale)
        if config.core != "sdpa":
            return cores.attend(how, q, k, v, mask, config.scale)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=config.mask == "flag",
            scale=config.scale,
            enable_gqa=config.groups > 1 and config.repeat == "enable_gqa",
        )


class Packed(nn.Module):
    """`nn.MultiheadAttention`, with this module's conventions."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.query_heads, config.head_dim
        assert heads * head_dim == config.model_width
        self.attention = nn.MultiheadAttention(
            config.model_width, heads, bias=config.bias, batch_first=config.module == "batch_first"
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[B, T, D]`."""
        packed = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        q, k, v = packed.chunk(3, dim=-1)
        return q, k, v

    def treat(self, x: Tensor, side: str, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, H, T, d]`."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, shared: None = None
    ) -> tuple[Tensor, KeyValue]:
        """The output `[B, T, D]`; its K and V are nobody else's."""
        batch, length, _ = x.shape
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = ~mask  # there, True is what may not be seen
            if mask.dim() > 2:
                mask = mask.expand(batch, self.config.query_heads, length, length).flatten(0, 1)
        if self.config.module == "length_first":
            x = x.transpose(0, 1)
        causal = self.config.mask == "flag"
        out, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False, is_causal=causal)
        out = out if self.config.module == "batch_first" else out.transpose(0, 1)
        return out, (out, out)


class Convolution(nn.Module):
    """A causal depthwise convolution over three tokens: mixes tokens without attention."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.model_width, 3))

    def forward(self, x: Tensor, *_: object) -> tuple[Tensor, None]:
        """`[B, T, D]`."""
        padded = F.pad(x.transpose(1, 2), (2, 0))
        mixed = F.conv1d(padded, self.weight.unsqueeze(1), groups=self.weight.shape[0])
        return mixed.transpose(1, 2), None


class Cross(nn.Module):
    """Attention to another sequence, `[B, U, C]`."""

    def __init__(self, config: StackConfig, context_width: int) -> None:
        super().__init__()
        self.heads = (config.kv_heads, config.head_dim)
        inner = config.kv_heads * config.head_dim
        self.q = nn.Linear(config.model_width, inner, bias=config.bias)
        self.k = nn.Linear(context_width, inner, bias=config.bias)
        self.v = nn.Linear(context_width, inner, bias=config.bias)
        self.out = nn.Linear(inner, config.model_width, bias=config.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`[B, T, D]`."""
        q, k, v = (
            linear(source).unflatten(-1, self.heads).transpose(1, 2)
            for linear, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A multilayer perceptron, or two of `EXPERTS` of them for each token."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.kind = config.ffn
        width, hidden = config.model_width, config.model_width + 8
        if self.kind.startswith("moe"):
            self.router = nn.Linear(width, EXPERTS, bias=False)
            self.up_weights = nn.Parameter(torch.zeros(EXPERTS, 8, width))
            self.down_weights = nn.Parameter(torch.zeros(EXPERTS, width, 8))
            return
        inner = 2 * hidden if config.ffn == "fused_swiglu" else hidden
        self.up = nn.Linear(width, inner, bias=config.bias)
        if config.ffn == "swiglu":
            self.gate = nn.Linear(width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]`."""
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x)))
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "fused_swiglu":
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self._experts(x)

    def _experts(self, x: Tensor) -> Tensor:
        weight, chosen = torch.softmax(self.router(x), dim=-1).topk(CHOSEN, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        if self.kind == "moe_dense":
            by_expert = torch.zeros_like(x[..., :EXPERTS]).scatter(-1, chosen, weight.to(x.dtype))
            hidden = F.gelu(torch.einsum("btd,ehd->bteh", x, self.up_weights))
            made = torch.einsum("bteh,edh->bted", hidden, self.down_weights)
            return (made * by_expert.unsqueeze(-1)).sum(dim=2)
        if self.kind == "moe_gather":
            hidden = F.gelu(torch.einsum("btd,btkhd->btkh", x, self.up_weights[chosen]))
            made = torch.einsum("btkh,btkdh->btkd", hidden, self.down_weights[chosen])
            return (made * weight.unsqueeze(-1).to(x.dtype)).sum(dim=2)
        flat, experts = x.flatten(0, 1), chosen.flatten()
        order = experts.argsort(stable=True)
        token, sorted_experts = order // CHOSEN, experts[order]
        hidden = F.gelu(torch.einsum("nd,nhd->nh", flat[token], self.up_weights[sorted_experts]))
        made = torch.einsum("nh,ndh->nd", hidden, self.down_weights[sorted_experts])
        made = made * weight.flatten()[order].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(flat).index_add(0, token, made.to(x.dtype)).view_as(x)


class Block(nn.Module):
    """One layer: a mixer, cross-attention if there is a context, and an FFN if it has one."""

    def __init__(self, stack: StackConfig, index: int, context_width: int | None = None) -> None:
        super().__init__()
        config = self.config = stack.layer(index)
        if context_width is not None:  # attention, cross-attention and FFN one after another
            config = self.config = replace(config, order="sequential")
        variant = stack.variant(index)
        self.attention: nn.Module
        if variant.mixer == "convolution":
            self.attention = Convolution(config)
        elif config.module != "none":
            self.attention = Packed(config)
        else:
            self.attention = Attention(config, shares_kv=variant.shares_kv)
        self.attention_norm = Norm(config.norm, config.model_width)
        self.cross: nn.Module | None = None
        if context_width is not None:
            self.cross = Cross(config, context_width)
            self.cross_norm = Norm(config.norm, config.model_width)
        if config.ffn != "none":
            self.ffn = FeedForward(config)
            if config.order == "sequential" or config.placement == "branch":
                self.ffn_norm = Norm(config.norm, config.model_width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        shared: KeyValue | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Tokens `[B, T, D]`, and K and V for layers that share them."""
        placement = self.config.placement
        kept: list[KeyValue | None] = []

        def mix(tokens: Tensor) -> Tensor:
            out, key_value = self.attention(tokens, mask, cos, sin, shared)
            kept.append(key_value)
            return out

        if self.config.order != "sequential" and self.config.ffn != "none":
            normed = self.attention_norm(x) if placement == "pre" else x
            if self.config.order == "attention_first":
                attended = mix(normed)
                fed = self.ffn(normed)
            else:
                fed = self.ffn(normed)
                attended = mix(normed)
            if placement == "branch":
                return x + self.attention_norm(attended) + self.ffn_norm(fed), kept[0]
            total = x + attended + fed
            return self.attention_norm(total) if placement == "post" else total, kept[0]
        x = self._residual(x, mix, self.attention_norm)
        cross = self.cross
        if cross is not None:
            x = self._residual(x, lambda tokens: cross(tokens, context), self.cross_norm)
        if self.config.ffn != "none":
            x = self._residual(x, self.ffn, self.ffn_norm)
        return x, kept[0]

    def _residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: Norm) -> Tensor:
        if self.config.placement == "pre":
            return x + branch(norm(x))
        if self.config.placement == "post":
            return norm(x + branch(x))
        return x + norm(branch(x))
