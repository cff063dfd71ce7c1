"""A loop with a KV cache of one's own around a converted GPT: one graph for all new tokens.

    python examples/kv_cache.py                   # mode="reduce-overhead" on a GPU
    python examples/kv_cache.py --quick           # seconds on a CPU

Nothing is done about depth: a new token's slots are made and read in the very call that computes
it. The static cache is written in place, so each call has the same shapes and, on a GPU, replays
one CUDA graph whose memory, the slots' too, is allocated when it is recorded. The script counts
what shows that: graphs compiled, CUDA graphs replayed, allocations; and it compares every step's
logits with one pass over all tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import moda_compile
from gpt import GPT, GPTConfig

WARM_UP = 4  # steps: compile, record, first replays


@dataclass(kw_only=True)
class Counts:
    """What happened behind the warm-up.

    Attributes:
        compiled: graphs, which should be none.
        skipped: graphs that Inductor would not record as CUDA graphs, over the whole run.
        replayed: CUDA graphs, by step; on a CPU zeros.
        allocated: blocks of GPU memory, by step.
    """

    compiled: int
    skipped: int
    replayed: list[int]
    allocated: list[int]


@contextmanager
def counting_replays() -> Iterator[list[int]]:
    """A list whose one number grows with each CUDA graph that is replayed meanwhile."""
    count, original = [0], torch.cuda.CUDAGraph.replay

    def replay(graph: Any) -> None:
        count[0] += 1
        original(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", replay):
        yield count


def allocations() -> int:
    """Blocks of GPU memory that the allocator has handed out so far."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


@torch.no_grad()
def decode(model: GPT, prompt: Tensor, new: int) -> tuple[Tensor, Tensor, list[float], Counts]:
    """Greedy: all tokens [B, T + new], the logits [B, new, V] that chose them, seconds a step."""
    batch, length = prompt.shape
    caches = model.caches(batch, length + new)
    for held in caches:
        for tensor in held:
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs may write into it
    counters.clear()
    logits = model(prompt, torch.arange(length, device=prompt.device), caches)[:, -1].clone()
    position = torch.tensor([length], device=prompt.device)
    found, chosen = [prompt], [logits]
    counts = Counts(compiled=0, skipped=0, replayed=[], allocated=[])
    seconds, settled = [], 0
    for step in tqdm(range(new - 1), desc="new tokens"):
        if step == WARM_UP:
            settled = counters["stats"]["unique_graphs"]
        token = logits.argmax(-1, keepdim=True)
        before, start = allocations(), time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        with counting_replays() as replayed:
            made = model(token, position, caches)
        if prompt.is_cuda:
            torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            counts.replayed.append(replayed[0])
            counts.allocated.append(allocations() - before)
        logits = made[:, -1].clone()  # the next replay writes there anew
        position += 1
        found.append(token)
        chosen.append(logits)
    found.append(logits.argmax(-1, keepdim=True))
    counts.compiled = counters["stats"]["unique_graphs"] - settled
    counts.skipped = counters["inductor"]["cudagraph_skips"]
    return torch.cat(found, 1), torch.stack(chosen, 1), seconds, counts


def main(argv: list[str] | None = None) -> tuple[float, Counts]:
    """Runs the example; returns the largest difference of any logit, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--new", type=int, default=256, help="tokens to generate")
    add("--prompt", type=int, default=64, help="tokens of the (random) prompt")
    add("--batch", type=int, default=4)
    add("--layers", type=int, default=12)
    add("--ffn-kv", choices=("none", "projected", "shared"), default="none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="few and small layers, not compiled by Inductor")
    args = parser.parse_args(argv)
    sizes: dict[str, int] = {"width": 768, "num_heads": 12, "num_kv_heads": 4, "ffn_width": 2048}
    if args.quick:
        sizes = {"width": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 64}
        args.layers, args.new, args.prompt = 3, 12, 5

    torch.manual_seed(0)
    config = GPTConfig(vocab_size=256, num_layers=args.layers, **sizes)
    with torch.no_grad():
        model = GPT(config).to(args.device).eval()
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)  # logits worth comparing
    prompt = torch.randint(256, (args.batch, args.prompt), device=args.device)
    moda_compile.convert(
        model,
        moda_compile.MoDAConfig(ffn_kv=args.ffn_kv),
        example_inputs=(prompt,),
        backend="eager" if args.quick else "inductor",
        mode="reduce-overhead" if args.device == "cuda" and not args.quick else None,
    )
    tokens, logits, seconds, counts = decode(model, prompt, args.new)
    with torch.no_grad():
        whole = model(tokens[:, :-1])[:, args.prompt - 1 :]
    difference = float((whole - logits).abs().max())
    rate = args.batch / statistics.median(seconds)
    print(f"{args.new} new tokens behind {args.prompt}, batch {args.batch}, on {args.device}")
    print(f"  {rate:.0f} tokens/s; logits of any step and of one pass differ by {difference:.1e}")
    print(f"  behind {WARM_UP} steps of warm-up: {counts.compiled} graphs compiled")
    print(
        f"  CUDA graphs replayed a step: {sorted(set(counts.replayed))}, skipped {counts.skipped}"
    )
    print(f"  blocks of GPU memory allocated a step: {sorted(set(counts.allocated))}")
    return difference, counts


if __name__ == "__main__":
    main()
