"""Random transformer stacks in plain PyTorch, alone and in pairs.

Nothing here knows MoDA, except `oracle` and `ffn_slots`, which spell out by hand which attention
belongs to which stack and what the FFNs write.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moda_compile.testing import cores, masks
from moda_compile.testing.blocks import Attention, Block, Norm, Packed, angles
from moda_compile.testing.reference import FFNSlots, Reader
from moda_compile.testing.stack_config import VOCABULARY, PairConfig, StackConfig

FFNMode = Literal["projected", "shared"]


class RandomStack(nn.Module):
    """A transformer stack as `config` describes it: `forward(ids [B, T]) -> logits [B, T, V]`.

    Weights come from `config.seed` and are livelier than the default initialisation, so that the
    softmax is far from uniform and norms and biases matter.  `repr` is runnable.

    Args:
        config: what it is made of.
        context_width: C of the sequence that `hidden` is given to attend to, if it is a decoder.
    """

    def __init__(self, config: StackConfig, context_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.checkpoint = config.checkpoint
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(VOCABULARY, config.model_width)
            self.blocks = nn.ModuleList(
                Block(config, i, context_width) for i in range(config.layers)
            )
            self.norm = Norm(config.norm, config.model_width)
            self.head = nn.Linear(config.model_width, VOCABULARY, bias=False)
            if any(kind in ("bias", "bias_causal") for kind in config.masks):
                self.relative = nn.Embedding(masks.BUCKETS, config.query_heads)
            if "buffer" in config.masks:
                triangle = torch.ones(masks.LONGEST, masks.LONGEST, dtype=torch.bool).tril()
                self.register_buffer("triangle", triangle)
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.dim() == 2:
                        nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[1]))
                    else:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        self.to(getattr(torch, config.dtype))
        if config.norm_dtype != "same":
            for module in self.modules():
                if isinstance(module, Norm):
                    module.to(getattr(torch, config.norm_dtype))

    def __repr__(self) -> str:
        """Runnable."""
        return f"RandomStack({self.config!r})"

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`; some masks read `extra [B, T]`."""
        x = self.hidden(self.embedding(ids), extra)
        return self.head(self.norm(x))

    def hidden(
        self, x: Tensor, extra: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Tokens `[B, T, D]` behind all layers."""
        made: dict[tuple[Any, ...], Tensor | None] = {}
        turns: dict[int, tuple[Tensor, Tensor]] = {}
        shared = None
        for block in [*self.blocks] * self.config.passes:
            config = cast(Block, block).config
            key = (config.mask, config.query_heads)
            if key not in made:
                made[key] = self._mask(config, x, extra)
            if config.head_dim not in turns:
                turns[config.head_dim] = angles(config, x.shape[1], x)
            shares = getattr(block.attention, "shares_kv", False)
            args = (x, made[key], *turns[config.head_dim], shared if shares else None, context)
            if self.checkpoint and self.training:
                x, kept = checkpoint(block, *args, use_reentrant=False)
            else:
                x, kept = block(*args)
            shared = shared if shares or kept is None else kept
        return x

    def _mask(self, config: StackConfig, x: Tensor, extra: Tensor | None) -> Tensor | None:
        by_hand = config.core != "sdpa" or config.near_miss is not None or config.module != "none"
        table = getattr(self, "relative", None)
        return masks.build(
            "tril_bool" if by_hand and config.mask == "flag" else config.mask,
            x,
            heads=config.query_heads,
            extra=extra,
            buffer=getattr(self, "triangle", None),
            table=None if table is None else table.weight,
        )

    def _places(self) -> list[tuple[int, Hashable]]:
        """`(block, stack)` for each block that runs, in order; the stack is None for no attention
        that the oracle sees.
        """
        places: list[tuple[int, Hashable]] = []
        for i in range(self.config.layers):
            layer, variant = self.config.layer(i), self.config.variant(i)
            stack: Hashable = (layer.kv_heads, layer.head_dim, layer.values)
            if variant.mixer != "attention" or layer.near_miss is not None:
                stack = None
            places.append((i, Reader(stack=stack) if variant.shares_kv else stack))
        return places * self.config.passes

    def oracle(
        self, mode: Literal["none"] | FFNMode, parameters: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What `ReferenceMode` has to be told about this stack: its keyword arguments."""
        cross = cast(Block, self.blocks[0]).cross is not None
        stacks: list[Hashable] = []
        layers: dict[Hashable, list[int]] = {}
        for layer, place in self._places():
            if place is not None:
                stacks.append(place)
                stack = place.stack if isinstance(place, Reader) else place
                layers.setdefault(stack, []).append(layer)
            if cross:
                stacks.append(None)
        slots = None
        if mode != "none":
            slots = {stack: self._slots(mode, parameters, mine) for stack, mine in layers.items()}
        return {"stacks": stacks, "functions": cores.ADAPTERS, "ffn_slots": slots}

    def ffn_slots(self, mode: FFNMode, parameters: Mapping[str, Tensor]) -> FFNSlots:
        """What this stack's FFNs write, from its own modules and, for "projected", `parameters`.

        Args:
            mode: which weights make the slot; see `MoDAConfig.ffn_kv`.
            parameters: the converted model's parameters by name, of which
                `blocks.<i>.ffn.moda_key_weight` `[Hk * d, D]` and `..._value_weight` `[Hk * dv, D]`
                are used.
        """
        return self._slots(mode, parameters, list(range(self.config.layers)))

    def _slots(
        self, mode: FFNMode, parameters: Mapping[str, Tensor], layers: list[int]
    ) -> FFNSlots:
        def key_value(number: int, ffn_input: Tensor) -> tuple[Tensor, Tensor]:
            layer = layers[number]
            attention = cast(Attention | Packed, cast(Block, self.blocks[layer]).attention)
            config = attention.config
            if mode == "projected":
                prefix = f"blocks.{layer}.ffn."
                key = torch.nn.functional.linear(ffn_input, parameters[prefix + "moda_key_weight"])
                value = torch.nn.functional.linear(
                    ffn_input, parameters[prefix + "moda_value_weight"]
                )
            else:
                _, key, value = attention.project(ffn_input)
            value = value.reshape(*ffn_input.shape[:2], config.kv_heads, config.values)
            return self._treat(attention, key, ffn_input), value.transpose(1, 2)

        return FFNSlots(modules=[f"blocks.{i}.ffn" for i in layers[:-1]], key_value=key_value)

    def _treat(self, attention: Attention | Packed, key: Tensor, ffn_input: Tensor) -> Tensor:
        """The attention's own treatment of a key: k-norm, then its token's rotation."""
        return attention.treat(key, "k", *angles(attention.config, ffn_input.shape[1], ffn_input))


class RandomPair(nn.Module):
    """Two stacks in one model, as `config` says: `forward(ids, other_ids)`.  `repr` is runnable."""

    def __init__(self, config: PairConfig) -> None:
        super().__init__()
        self.config = config
        width = config.first.model_width
        self.first = RandomStack(config.first)
        self.second = RandomStack(config.second, width if config.join == "cross" else None)
        if config.join == "pool":
            self.merge = nn.Linear(2 * width, width, dtype=getattr(torch, config.dtype))

    def __repr__(self) -> str:
        """Runnable."""
        return f"RandomPair({self.config!r})"

    def forward(self, ids: Tensor, other_ids: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Logits of ids `[B, T]` and `[B, U]`."""
        first, second, join = self.first, self.second, self.config.join
        x = first.hidden(first.embedding(ids))
        if join == "pool":
            x = self.merge(x.reshape(x.shape[0], x.shape[1] // 2, -1))
            return second.head(second.norm(second.hidden(x)))
        assert other_ids is not None
        y = second.embedding(other_ids)
        if join == "append":
            return second.head(second.norm(second.hidden(torch.cat([x, y], dim=1))))
        context = first.norm(x)
        if join == "cross":
            return second.head(second.norm(second.hidden(y, context=context)))
        y = second.norm(second.hidden(y))
        if join == "sum":
            return second.head(context + y)
        return first.head(context), second.head(y)

    def oracle(
        self, mode: Literal["none"] | FFNMode, parameters: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What `ReferenceMode` has to be told about this model: its keyword arguments."""
        assert mode == "none", "FFN slots of two stacks are not spelled out"
        found: list[Hashable] = []
        for name, stack in (("first", self.first), ("second", self.second)):
            for place in stack.oracle(mode, parameters)["stacks"]:
                if isinstance(place, Reader):
                    found.append(Reader(stack=(name, place.stack)))
                else:
                    found.append(None if place is None else (name, place))
        return {"stacks": found, "functions": cores.ADAPTERS, "ffn_slots": None}
