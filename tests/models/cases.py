"""Models and their oracles, for the tests of whole conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_compile
from moda_compile import MoDAConfig, RewriteError
from moda_compile.testing import RandomStack, StackConfig, reference

LAYERS = 2
DEFAULTS: dict[str, Any] = dict(
    layers=LAYERS, kv_heads=2, groups=2, head_dim=8, mask="flag", length=9, batch=2, dtype="float64"
)
TIGHT = dict(rtol=0.0, atol=1e-9)
PROJECTED = MoDAConfig(ffn_kv="projected")


def stack(**options: Any) -> RandomStack:
    return RandomStack(StackConfig(**{**DEFAULTS, **options}))


def deep(**options: Any) -> RandomStack:
    """With a layer in the middle, too."""
    return stack(**{"layers": 3, **options})


IDS = stack().config.inputs()[0]


# --- never the plain model ----------------------------------------------------------------------


def converted(**options: Any) -> RandomStack:
    options = {"example_inputs": (IDS,), "backend": "eager", **options}
    return moda_compile.convert(stack(), **options)


def assert_moda(got: Tensor, expected: Tensor) -> None:
    # float64 and outputs of order 1: 1e-10 leaves room for a few thousand roundings.
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-10)


def dynamo(**options: Any) -> AbstractContextManager[None]:
    return torch._dynamo.config.patch(**options)


def graph_break(forward: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args)

    return broken


class Bracketed(nn.Module):
    """Graph breaks in front of and behind the stack, as logging in a forward makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = stack()

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids + 0
        torch._dynamo.graph_break()
        logits = self.stack(ids)
        torch._dynamo.graph_break()
        return logits * 2


# --- training -----------------------------------------------------------------------------------


def convert(model: nn.Module, config: MoDAConfig | None = None, backend: Any = "eager") -> Any:
    return moda_compile.convert(model, config, example_inputs=(IDS,), backend=backend)


class Oracle(nn.Module):
    """The model with MoDA in it, from a copy; "projected" takes the converted model's weights."""

    def __init__(self, model: RandomStack, converted: nn.Module | None = None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        new = dict(converted.named_parameters()) if converted is not None else {}
        self.new = nn.ParameterDict(
            {n.replace(".", "/"): p.detach().clone() for n, p in new.items() if "moda_" in n}
        )

    def forward(self, ids: Tensor) -> Tensor:
        slots = None
        if self.new:
            weights = {name.replace("/", "."): p for name, p in self.new.items()}
            slots = self.model.ffn_slots("projected", weights)
        return reference(self.model, ids, ffn_slots=slots)

    def gradients(self) -> dict[str, Tensor | None]:
        own = {name: p.grad for name, p in self.model.named_parameters()}
        return own | {name.replace("/", "."): p.grad for name, p in self.new.items()}

    def state(self) -> dict[str, Tensor]:
        new = {name.replace("/", "."): p.detach() for name, p in self.new.items()}
        return {**self.model.state_dict(), **new}


def pair(config: MoDAConfig | None = None, backend: Any = "eager", **options: Any) -> Any:
    """A converted model and its oracle."""
    model = deep(**options)
    converted = convert(copy.deepcopy(model), config, backend)
    return converted, Oracle(model, converted)


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


def assert_gradients(model: nn.Module, oracle: Oracle, **tolerance: Any) -> None:
    expected = oracle.gradients()
    assert {n for n, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}",
                **(tolerance or TIGHT),
            )  # fmt: skip


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- refusals -----------------------------------------------------------------------------------

WIDTH, HEADS, LENGTH = 32, 4, 9
Core = Callable[..., Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


class Attention(nn.Module):
    """Self-attention whose core is any function of q, k, v [B, H, T, d]."""

    def __init__(self, core: Core, heads: int = HEADS, kv_heads: int = HEADS, d: int = 8) -> None:
        super().__init__()
        self.core, self.heads, self.kv_heads, self.d = core, heads, kv_heads, d
        self.q = nn.Linear(WIDTH, heads * d)
        self.k = nn.Linear(WIDTH, kv_heads * d)
        self.v = nn.Linear(WIDTH, kv_heads * d)
        self.o = nn.Linear(heads * d, WIDTH)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        source = context[0] if context else x
        q = self.q(x).unflatten(-1, (self.heads, self.d)).transpose(1, 2)
        k = self.k(source).unflatten(-1, (self.kv_heads, self.d)).transpose(1, 2)
        v = self.v(source).unflatten(-1, (self.kv_heads, self.d)).transpose(1, 2)
        return self.o(self.core(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, ffns: int = 1) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(WIDTH)
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
            for _ in range(ffns)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        for ffn in self.ffns:
            x = x + ffn(self.norm(x))
        return x


class Stack(nn.Module):
    """Causal layers with the odd one in the middle, so a partial match is what is refused."""

    def __init__(self, *odd: nn.Module, ffns: int = 1) -> None:
        super().__init__()
        first, last = (Layer(Attention(causal), ffns) for _ in range(2))
        self.layers = nn.ModuleList([first, *(Layer(a, ffns) for a in odd), last])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


def traces(model: nn.Module) -> dict[str, Any]:
    """All that a failed conversion could leave behind."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hooks = [v for k, v in vars(module).items() if k.endswith("_hooks") and v is not None]
        found[path] = (sorted(vars(module)), [list(h) for h in hooks], sorted(module._parameters))
    return found


def refusal(
    model: nn.Module,
    args: tuple[Any, ...] = (X,),
    *,
    block: str,
    reason: str,
    config: MoDAConfig | None = None,
    line: bool = True,
    file: str = __file__,
) -> RewriteError:
    """Require the one error, with all its parts, and that the model is as it was.

    ``file`` is where the refused call is written: here, where it is the one in `sdpa`.
    """
    values = {name: t.clone() for name, t in model.state_dict().items()}
    before, training = traces(model), model.training
    with pytest.raises(RewriteError, match=reason) as caught:
        moda_compile.convert(model, config, example_inputs=args, backend="eager")
    error = caught.value
    assert error.block == block
    if line:  # file and line of the user's call
        assert error.source is not None
        path, _, number = error.source.rpartition(":")
        assert path == file and int(number) > 0
        assert error.source in str(error)
    assert len(error.fix) > 10 and error.fix in str(error)  # says something
    assert type(model).forward is getattr(model.forward, "__func__", None)
    assert traces(model) == before and model.training == training
    assert list(values) == list(model.state_dict())
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    return error
