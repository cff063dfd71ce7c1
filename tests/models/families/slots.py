"""What an FFN's depth slot has to be, by the eager model's own attention module.

The key and value that layer l's attention would compute if it read the FFN's input: its module is
called once more with that input, and its call of `F.scaled_dot_product_attention` is caught. For
"projected", with the new weights in place of its own. No part of the graph passes takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from moda_compile.testing import FFNSlots

_SDPA = F.scaled_dot_product_attention

#: (attention module, new key weight, new value weight [Hk * d, D]) -> parameters to put in place.
Replace = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where a family's attentions and FFNs are; `{}` stands for the layer's number.

    Attributes:
        attention: path of the module that projects and attends.
        ffn: path of a module that reads the FFN's input first.
        owner: path of the module that gains the FFN's projections, by default `ffn`.
        replace: how to put weights in place of the attention's own key and value projections.
    """

    attention: str
    ffn: str
    replace: Replace
    owner: str | None = None

    def new(self, layer: int) -> tuple[str, str]:
        """Names of the parameters that ``ffn_kv="projected"`` adds to a layer's FFN."""
        path = (self.owner or self.ffn).format(layer)
        return f"{path}.moda_key_weight", f"{path}.moda_value_weight"

    def layers(self, model: nn.Module) -> int:
        """L of ``model``."""
        paths = {path for path, _ in model.named_modules()}
        found = next(n for n in range(len(paths)) if self.attention.format(n) not in paths)
        assert found > 1, f"no {self.attention} in this model"
        return found


def separate(key: str, value: str) -> Replace:
    """Two linear layers by name; a projected slot has no bias."""

    def replace(attention: nn.Module, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        found = {f"{key}.weight": k, f"{value}.weight": v}
        for name in (key, value):
            bias = getattr(attention.get_submodule(name), "bias", None)
            if bias is not None:
                found[f"{name}.bias"] = torch.zeros_like(bias)
        return found

    return replace


def fused(
    path: str, key: list[int], value: list[int], *, weight: str = "weight", transposed: bool = False
) -> Replace:
    """One projection of which ``key`` and ``value`` are the rows (columns, if transposed)."""
    dim = 1 if transposed else 0

    def replace(attention: nn.Module, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        module = attention.get_submodule(path)
        found: dict[str, Tensor] = {}
        prefix = f"{path}." if path else ""
        whole = getattr(module, weight)
        for rows, new in ((key, k), (value, v)):
            index = torch.tensor(rows, device=whole.device)
            whole = whole.index_copy(dim, index, new.t() if transposed else new)
        found[f"{prefix}{weight}"] = whole
        name = weight.replace("weight", "bias")
        bias = getattr(module, name, None)
        if bias is not None:
            found[f"{prefix}{name}"] = bias.index_fill(
                0, torch.tensor([*key, *value], device=bias.device), 0.0
            )
        return found

    return replace


class _Catch(TorchFunctionMode):
    """Keeps the keys and values of the SDPA call inside; the attention's result is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._keep(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # With the modes off: the oracle's, which is on outside of this one, must not see it.
            with (
                torch._C.DisableTorchFunction(),
                mock.patch.object(F, "scaled_dot_product_attention", self._keep),
            ):
                return func(*args, **kwargs | {"need_weights": False})
        return func(*args, **kwargs)

    def _keep(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        self.caught.append((key, value))
        return query


def slots_factory(heads: Heads, kind: str) -> Any:
    """The FFN oracle of `check_conversion`; see `FFNSlotsFactory`."""
    if kind == "none":
        return None

    def factory(twin: nn.Module, new: Mapping[str, Tensor]) -> FFNSlots:
        layers = heads.layers(twin)
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def listen(layer: int) -> None:
            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.setdefault(layer, (args, kwargs))  # the first call is the model's own

            module = twin.get_submodule(heads.attention.format(layer))
            module.register_forward_pre_hook(note, with_kwargs=True)

        for layer in range(layers - 1):
            listen(layer)

        def key_value(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
            attention = twin.get_submodule(heads.attention.format(layer))
            args, kwargs = calls[layer]
            hidden = args[0] if args else next(iter(kwargs.values()))
            x = x.reshape(hidden.shape)

            def swap(argument: Any) -> Any:
                return x if argument is hidden else argument

            args = tuple(swap(a) for a in args)
            kwargs = {name: swap(a) for name, a in kwargs.items()}
            if "past_key_values" in kwargs:  # else the model's own cache would grow once more
                kwargs["past_key_values"] = None
            parameters: dict[str, Tensor] = {}
            if kind == "projected":
                key, value = (new[name] for name in heads.new(layer))
                parameters = heads.replace(attention, key, value)
            with _Catch() as catch:
                functional_call(attention, parameters, args, kwargs)
            (caught,) = catch.caught
            return caught

        return FFNSlots(
            modules=[heads.ffn.format(layer) for layer in range(layers - 1)], key_value=key_value
        )

    return factory
