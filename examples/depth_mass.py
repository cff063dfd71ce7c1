"""Where attention looks: how much of each layer's softmax goes to the sequence and to each slot.

The converted model's joint softmax exists only inside a kernel. Here the same function is
computed again, the slow and readable way: a mode stands in for PyTorch's attention while the
*plain* GPT runs in eager mode on the converted model's weights. That makes it also a check of the
compiled model that shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt import GPT, Block, rotary_angles, rotate


@dataclass(frozen=True, kw_only=True)
class DepthMass:
    """What :func:`depth_mass` found.

    Attributes:
        slots: name of each depth slot, in the order written: ``a0`` is layer 0's attention,
            ``f0`` its feed-forward network.
        mass: [layers, 1 + slots], each row summing to 1: mean share of the softmax on the
            sequence (column 0) and on each slot; NaN for a slot the layer can't read.
        logits: [B, T, vocab_size] of the eager computation.
    """

    slots: tuple[str, ...]
    mass: Tensor
    logits: Tensor


@dataclass
class _Slots:
    names: list[str] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def write(self, name: str, key: Tensor, value: Tensor) -> None:
        self.names.append(name)
        self.keys.append(key)
        self.values.append(value)


class _JointAttention(TorchFunctionMode):
    """Replaces each causal attention call by the joint softmax over sequence and depth slots."""

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots
        self.rows: list[Tensor] = []  # one per layer: share on the sequence, then on each slot

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention(*args[:3])
        return func(*args, **(kwargs or {}))

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, Hq, T, d], key and value [B, Hk, T, d] -> [B, Hq, T, d]."""
        length, group = query.shape[2], query.shape[1] // key.shape[1]

        def spread(x: Tensor) -> Tensor:  # [B, Hk, T, d] -> [B, Hq, T, d]
            return x.repeat_interleave(group, dim=1)

        scale = query.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = (query @ spread(key).transpose(-1, -2) * scale).masked_fill(future, -torch.inf)
        # A slot holds one key per token: z_i[t] = scale * q[t] . k_i[t]
        depth = [(query * spread(k)).sum(-1, keepdim=True) * scale for k in self.slots.keys]
        weight = torch.cat([scores, *depth], dim=-1).softmax(-1)  # [B, Hq, T, T + slots]
        self.rows.append(
            torch.cat([weight[..., :length].sum(-1, keepdim=True), weight[..., length:]], -1).mean(
                (0, 1, 2)
            )
        )
        out = weight[..., :length] @ spread(value)
        for i, v in enumerate(self.slots.values):
            out = out + weight[..., length + i, None] * spread(v)
        self.slots.write(f"a{len(self.rows) - 1}", key, value)
        return out


def depth_mass(converted: nn.Module, plain: GPT, tokens: Tensor) -> DepthMass:
    """Runs ``plain`` on ``converted``'s weights and measures each layer's attention.

    Args:
        converted: a converted :class:`gpt.GPT` with ``ffn_kv`` "none" or "projected".
        plain: an unconverted GPT of the same configuration; its weights are overwritten.
        tokens: [B, T] (int64).
    """
    weights = dict(converted.named_parameters())
    slots = _Slots()
    angles = rotary_angles(
        torch.arange(tokens.shape[1], device=tokens.device), plain.config.head_dim
    )
    hooks = []
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])

        for i, block in enumerate(plain.blocks[:-1]):  # nobody reads what the last layer writes
            assert isinstance(block, Block)
            key_weight = weights.get(f"blocks.{i}.ffn.moda_key_weight")
            value_weight = weights.get(f"blocks.{i}.ffn.moda_value_weight")
            if key_weight is None or value_weight is None:
                continue

            # The layer's own treatment of a key: split into heads, rotated like its token.
            def write(
                ffn: nn.Module,
                inputs: tuple[Tensor, ...],
                name: str = f"f{i}",
                split: Callable[[Tensor], Tensor] = block.attention.split_heads,
                key_weight: Tensor = key_weight,
                value_weight: Tensor = value_weight,
            ) -> None:
                key = rotate(split(F.linear(inputs[0], key_weight)), *angles)
                slots.write(name, key, split(F.linear(inputs[0], value_weight)))

            hooks.append(block.ffn.register_forward_pre_hook(write))
        with _JointAttention(slots) as mode:
            logits = plain(tokens)
    for hook in hooks:
        hook.remove()

    names = slots.names[:-1]  # without the last layer's attention
    mass = torch.full((len(mode.rows), 1 + len(names)), torch.nan)
    for layer, row in enumerate(mode.rows):
        mass[layer, : row.numel()] = row.cpu()
    return DepthMass(slots=tuple(names), mass=mass, logits=logits)
