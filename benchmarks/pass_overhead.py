"""What the graph passes cost at compile time, by number of layers, and print a table.

    PYTHONPATH=. python benchmarks/pass_overhead.py [--layers 25 50 100] [--compilers aot_eager]

Compiles a Llama-like stack of tiny widths on the CPU: causal mask built as a tensor, grouped-query
heads repeated by expand and reshape, rotary embedding, gated FFN, RMS norms written by hand. Prints
the time in each pass, nodes before and behind, time per node, and the passes' share of a whole
compile, forward and backward, with every cache off. Layer l reads l slots, so a rewritten graph has
O(layers^2) arguments, whoever builds it; "edges" counts them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.fx import GraphModule  # noqa: E402

from moda_compile import MoDAConfig, pipeline, verify  # noqa: E402
from moda_compile.backend import Backend  # noqa: E402
from moda_compile.plan import Plan  # noqa: E402

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, BATCH, LENGTH = 32, 4, 2, 8, 64, 2, 16


class Norm(nn.Module):
    """RMS norm over the last dimension, spelled out as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, d], each pair (i, i + d/2) turned by its token's angle."""
    one, two = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    return x * cos.unsqueeze(1) + torch.cat((-two, one), dim=-1) * sin.unsqueeze(1)


def repeated(x: Tensor) -> Tensor:
    """[B, Hk, T, d] -> [B, Hq, T, d]."""
    batch, heads, length, width = x.shape
    groups = HEADS // KV_HEADS
    x = x[:, :, None, :, :].expand(batch, heads, groups, length, width)
    return x.reshape(batch, heads * groups, length, width)


class Block(nn.Module):
    """Attention and a gated FFN, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, WIDTH, bias=False)
        self.first, self.second = Norm(), Norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        normed = self.first(x)
        q, k, v = (
            layer(normed).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)
        x = x + self.o(attended.transpose(1, 2).reshape(*x.shape[:2], -1).contiguous())
        normed = self.second(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Stack(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        position = torch.arange(ids.shape[1], device=ids.device)
        angle = position[None, :, None].float() / 10 ** torch.arange(0, HEAD_DIM, 2)
        table = torch.cat((angle, angle), dim=-1)
        cos, sin = table.cos().to(x.dtype), table.sin().to(x.dtype)
        mask = position.new_ones((), dtype=torch.bool) & (position[None, :] <= position[:, None])
        mask = mask[None, None].expand(ids.shape[0], 1, -1, -1)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.head(self.norm(x))


def ids() -> Tensor:
    """Token ids [B, T]."""
    return torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCABULARY


def graph_of(layers: int) -> GraphModule:
    """The graph that Dynamo makes of the stack."""
    found: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Stack(layers), backend=keep, dynamic=False)(ids())
    return found[0]


def timed_passes(gm: GraphModule, config: MoDAConfig) -> tuple[dict[str, float], Plan]:
    """Rewrite ``gm``; seconds in each pass."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, run: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            start = time.perf_counter()
            result = run(*args)
            seconds[name] += time.perf_counter() - start
            return result

        return wrapped

    kept = pipeline.ANALYSE, pipeline.TRANSFORM, verify.check
    name = "{0.__module__}".format
    try:
        pipeline.ANALYSE = tuple(timed(name(r).split(".")[-1], r) for r in kept[0])
        pipeline.TRANSFORM = tuple(timed(name(r).split(".")[-1], r) for r in kept[1])
        verify.check = timed("verify", kept[2])
        plan = pipeline.transform(gm, config, strict=True)
    finally:
        pipeline.ANALYSE, pipeline.TRANSFORM, verify.check = kept
    return dict(seconds), plan


def whole_compile(layers: int, compiler: Any, config: MoDAConfig) -> tuple[float, float]:
    """Seconds of one compile, forward and backward, and those of it spent in the passes."""
    torch._dynamo.reset()
    model, inside = Stack(layers), 0.0
    transform = pipeline.transform

    def timed(*args: Any, **kwargs: Any) -> Plan:
        nonlocal inside
        start = time.perf_counter()
        plan = transform(*args, **kwargs)
        inside += time.perf_counter() - start
        return plan

    pipeline.transform = timed
    try:
        backend = Backend(config, compiler=compiler, attentions=layers)
        start = time.perf_counter()
        torch.compile(model, backend=backend, dynamic=False)(ids()).square().mean().backward()
        return time.perf_counter() - start, inside
    finally:
        pipeline.transform = transform


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--ffn-kv", nargs="+", default=["none", "shared"])
    parser.add_argument(
        "--compilers",
        nargs="*",
        default=["aot_eager", "inductor"],
        help="for the share of a compile",
    )
    parser.add_argument("--compile-layers", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("torch", torch.__version__, "on CPU, one thread")
    for ffn_kv in options.ffn_kv:
        config = MoDAConfig(ffn_kv=ffn_kv)
        timed_passes(graph_of(2), config)  # imports, and operators met for the first time
        for layers in options.layers:
            gm = graph_of(layers)
            nodes = len(gm.graph.nodes)
            seconds, plan = timed_passes(gm, config)
            total = sum(seconds.values())
            edges = sum(plan.reads)
            parts = "  ".join(f"{name} {1e3 * s:.0f}" for name, s in seconds.items())
            print(
                f"{ffn_kv:10s} {layers:4d} layers  {nodes:6d} nodes -> {len(gm.graph.nodes):6d}  "
                f"{edges:6d} edges  {total:5.2f} s {1e9 * total / nodes:7.0f} ns/node  ms: {parts}",
                flush=True,
            )
        for compiler in options.compilers:
            whole, inside = whole_compile(options.compile_layers, compiler, config)
            print(
                f"{ffn_kv:10s} {options.compile_layers:4d} layers  {compiler:10s} whole compile "
                f"{whole:7.1f} s, passes {inside:5.2f} s: {100 * inside / whole:.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
