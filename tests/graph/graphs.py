"""Graphs as Dynamo hands them to a backend, for tests of the passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from moda_compile import MoDAConfig, fx, pipeline
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
    """What the table says of each node that it says something of."""
    found: list[tuple[str, Attention | Refused]] = []
    for node in list(gm.graph.nodes):
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


def graph_of(
    core: Callable[..., Tensor], kv_heads: int = H, dtype: torch.dtype = torch.float32
) -> GraphModule:
    return trace(Attend(core, kv_heads).to(dtype), torch.randn(B, T, WIDTH, dtype=dtype))


def one(gm: GraphModule) -> Any:
    ((_, found),) = matches(gm)
    return found


def inputs_of(gm: GraphModule) -> list[Any]:
    """Something for every placeholder: normal numbers, triangles for what is not floating."""
    generator = torch.Generator().manual_seed(0)
    made: list[Any] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        x = fx.value(node)
        if not isinstance(x, Tensor):
            made.append(hint(x))
        elif x.is_floating_point():
            shape = [hint(s) for s in x.shape]
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype))
        else:
            made.append(torch.ones([hint(s) for s in x.shape]).tril().to(x.dtype))
    return made


def hint(size: Any) -> int:
    """A symbolic size's value here, without tying the graph to it."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def values_of(gm: GraphModule, nodes: list[Node]) -> list[Tensor]:
    """What the graph computes for ``nodes``, by running it on :func:`inputs_of`."""
    environment: dict[Node, Node] = {}
    graph = torch.fx.Graph()
    graph.graph_copy(gm.graph, environment)
    graph.output([environment[node] for node in nodes])
    return list(GraphModule(gm, graph)(*inputs_of(gm)))


def deviation(gm: GraphModule, found: Attention) -> float:
    """How far the node's own value is from restore(softmax(scale q k^T + mask) v), in float64.

    From nothing but the nodes of the match: the plainest reading of what a match says.
    """
    masked = [] if found.mask is None else [found.mask]
    nodes = [found.node, found.query, found.key, found.value, *masked]
    expected, q, k, v, *mask = values_of(gm, nodes)
    q, k, v = (
        q.double(),
        *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)),
    )
    scores = q @ k.mT * (found.scale if found.scale is not None else q.shape[-1] ** -0.5)
    for bias in mask:
        bool_ = bias.dtype == torch.bool
        scores = scores.masked_fill(~bias, -math.inf) if bool_ else scores + bias
    if found.is_causal:
        triangle = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~triangle, -math.inf)
    out = scores.softmax(-1) @ v
    for step in found.restore:
        if isinstance(step.target, str):
            out = getattr(out, step.target)(*step.args, **step.kwargs)
        else:
            out = step.target(out, *step.args, **step.kwargs)
    assert out.shape == expected.shape
    return float((out - expected).abs().max())
