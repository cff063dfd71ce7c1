"""Graphs as Dynamo hands them to a backend, for tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from moda_compile import MoDAConfig, pipeline
from moda_compile.patterns import PATTERNS, Attention, Refused
from moda_compile.plan import Plan
from moda_compile.testing import RandomStack, StackConfig

B, T, H, D = 2, 5, 4, 8
WIDTH = H * D


def capture(model: nn.Module, *inputs: Any, **compile_options: Any) -> tuple[GraphModule, Any]:
    """The one graph of ``model(*inputs)`` and its inputs."""
    torch._dynamo.reset()
    found: list[Any] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        found.append((gm, example_inputs))
        return gm.forward

    torch.compile(model, backend=keep, **{"dynamic": False} | compile_options)(*inputs)
    assert len(found) == 1
    return found[0]


def rewritten(config: StackConfig, **options: Any) -> tuple[GraphModule, Plan, Any]:
    """A random stack's graph after the rewrite, the plan, and the graph's inputs."""
    stack = RandomStack(config)
    gm, inputs = capture(stack, *config.inputs())
    plan = pipeline.transform(gm, MoDAConfig(**options), strict=True)
    return gm, plan, inputs


def nodes_of(gm: GraphModule, op: Any) -> list[Node]:
    """Calls of one registered operator, in order."""
    return [n for n in gm.graph.nodes if n.target in (op, op.default)]


def text(gm: GraphModule) -> list[str]:
    """Every node as written, names included."""
    return [n.format_node() or "output" for n in gm.graph.nodes]


def trace(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> GraphModule:
    """The graph that Dynamo makes of a function or module."""
    torch._dynamo.reset()
    found: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, dynamic=dynamic)(*inputs)
    assert len(found) == 1
    return found[0]


def matches(gm: GraphModule) -> list[tuple[str, Attention | Refused]]:
    found: list[tuple[str, Attention | Refused]] = []
    for node in gm.graph.nodes:
        for pattern in PATTERNS:
            try:
                attention = pattern.match(node)
            except Refused as refused:
                found.append((pattern.name, refused))
                break
            if attention is not None:
                found.append((pattern.name, attention))
                break
    return found


class Attend(nn.Module):
    """One self-attention whose core is ``core(q, k, v)`` on [B, H, T, d]."""

    def __init__(self, core: Callable[..., Tensor], kv_heads: int = H) -> None:
        super().__init__()
        self.core = core
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * D), nn.Linear(WIDTH, kv_heads * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, D)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.core(q, k, v)


def graph_of(core: Callable[..., Tensor], kv_heads: int = H) -> GraphModule:
    return trace(Attend(core, kv_heads), torch.randn(B, T, WIDTH))


def one(gm: GraphModule) -> Any:
    ((_, found),) = matches(gm)
    return found
