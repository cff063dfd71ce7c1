"""Decoding and prefill speed of a model with a KV cache, as it is and converted, on this machine.

    PYTHONPATH=. python benchmarks/decode.py [--models smollm2] [--batches 1,8] [--contexts 2048]
                                             [--what decode,prefill,op] [--jobs 8] [--quick]

bfloat16, both sides compiled by Inductor with mode="reduce-overhead". A row is the ratio of two
medians, of the unconverted model's step time to the converted one's, whose steps were timed in
turns. "decode" is one step for each batch entry with a cache full to the context; "prefill" a
first call with that many tokens into an empty cache. "op" compares the decode kernels alone with
PyTorch's attention over the same keys without depth. Exits with 1 if a row is below its floor or
could not be run. --jobs: rows compiled at a time, each in a process of its own; only one of them is
timed at a time. --quick: tiny sizes, also on a CPU; no floors.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timing
import torch
import triton
from results import Picture, add_arguments, publish
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.report import table

FLOORS = {"decode": 0.95, "prefill": 0.90}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """hidden D, heads Hq, kv_heads Hk, intermediate: of the feed-forward network."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int = 64


MODELS = {
    "llama24": Shape(
        layers=24, hidden=1024, heads=16, kv_heads=4, intermediate=2816, vocabulary=32000
    ),
    "smollm2": Shape(
        layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536, vocabulary=49152
    ),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, width = shape, shape.head_dim
        self.query = nn.Linear(shape.hidden, shape.heads * width, bias=False)
        self.key = nn.Linear(shape.hidden, shape.kv_heads * width, bias=False)
        self.value = nn.Linear(shape.hidden, shape.kv_heads * width, bias=False)
        self.out = nn.Linear(shape.heads * width, shape.hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        position: Tensor,
        cache: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """x [B, T, D]; position [T]; cache: keys and values [B, Hk, Tmax, d], written in place;
        mask [1, 1, T, Tmax] over the cache, or None: x is the first call, and sees itself.
        """
        b, t, _ = x.shape

        def heads(projection: nn.Linear) -> Tensor:
            y: Tensor = projection(x)
            return y.view(b, t, -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = rotated(heads(self.query), rotation), heads(self.key), heads(self.value)
        k = rotated(k, rotation)
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, *cache, attn_mask=mask, enable_gqa=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, t, -1))
        return out


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, T, d]; rotation: cosines and sines [T, d]."""
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat((-second, first), -1) * rotation[1]


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before_attention = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attention = Attention(shape)
        self.before_ffn = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        x = x + self.attention(self.before_attention(x), *others)
        y = self.before_ffn(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Llama(nn.Module):
    """A decoder in the manner of Llama, with a static cache."""

    rotation: Tensor

    def __init__(self, shape: Shape, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        frequency = 1e4 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(context), frequency).repeat(1, 2)
        self.register_buffer("rotation", torch.stack((angle.cos(), angle.sin())))

    def forward(self, ids: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] of the last token. ids [B, T]; position [T], of all entries.

        One token attends to the cache up to its position; several are a prompt's, from 0 on.
        """
        x = self.embedding(ids)
        cosine, sine = self.rotation[0][position], self.rotation[1][position]
        mask = None
        if ids.shape[1] == 1:
            slot = torch.arange(cache[0][0].shape[2], device=ids.device)
            mask = (slot <= position[:, None])[None, None]
        for block, own in zip(self.blocks, cache, strict=True):
            x = block(x, (cosine, sine), position, own, mask)
        return F.linear(self.norm(x[:, -1]), self.embedding.weight)


def make_cache(shape: Shape, batch: int, context: int) -> Cache:
    """Buffers [B, Hk, Tmax, d], at addresses that CUDA graphs may rely on."""
    size = (batch, shape.kv_heads, context, shape.head_dim)
    cache = [
        (
            torch.randn(size, device=DEVICE, dtype=DTYPE),
            torch.randn(size, device=DEVICE, dtype=DTYPE),
        )
        for _ in range(shape.layers)
    ]
    for x in cache:
        for y in x:
            torch._dynamo.mark_static_address(y)
    return cache


def seconds(step: Callable[[], Any], calls: int) -> float:
    """Of one step, the mean of a few: all of them are enqueued before the host waits."""
    timing.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        torch.compiler.cudagraph_mark_step_begin()
        step()
    timing.synchronize()
    return (time.perf_counter() - start) / calls


def medians(steps: list[Callable[[], Any]], budget: float) -> list[float]:
    """Median seconds of each step, timed in turns for about `budget` seconds altogether."""
    for step in steps:  # compiling, recording, and the first replays
        seconds(step, 5)
    once = [seconds(step, 3) for step in steps]
    calls = max(1, min(50, int(0.05 / max(once))))
    rounds = max(5, min(60, int(budget / (calls * sum(once)))))
    samples: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for own, step in zip(samples, steps, strict=True):
            own.append(seconds(step, calls))
    return [statistics.median(own) for own in samples]


@torch.no_grad()
def compare(
    shape: Shape, what: str, batch: int, context: int, config: MoDAConfig, budget: float
) -> tuple[float, float, float, int]:
    """Median milliseconds of the unconverted and of the converted model; seconds of compiling;
    how many graphs Inductor did not turn into CUDA graphs.
    """
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # of the row before
    torch.manual_seed(0)
    plain = Llama(shape, context).to(DEVICE, DTYPE).eval()
    tokens = 1 if what == "decode" else context
    ids = torch.randint(0, shape.vocabulary, (batch, tokens), device=DEVICE)
    position = torch.arange(context - tokens, context, device=DEVICE)
    cache = make_cache(shape, batch, context)  # one for both: they write the same places
    start = time.perf_counter()
    converted: Any = moda_compile.convert(
        copy.deepcopy(plain), config, (ids, position, cache), mode="reduce-overhead", dynamic=False
    )
    compiled: Any = torch.compile(plain, mode="reduce-overhead", dynamic=False)
    steps = [lambda: compiled(ids, position, cache), lambda: converted(ids, position, cache)]
    for step in steps:
        seconds(step, 1)
    compiling = time.perf_counter() - start
    with timing.turn:
        first, second = medians(steps, budget)
    return first * 1e3, second * 1e3, compiling, counters["inductor"]["cudagraph_skips"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    name: str
    shape: Shape
    what: str
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Of one call."""
        return self.batch * (1 if self.what == "decode" else self.context)


def measure(row: Row, config: MoDAConfig, budget: float, floors: bool) -> dict[str, Any]:
    """A line of the table."""
    floor = FLOORS[row.what]
    found: dict[str, Any] = {
        "model": row.name, "what": row.what, "batch": row.batch, "context": row.context,
        "plain tokens/s": None, "converted tokens/s": None, "ratio": None, "floor": floor,
        "plain ms": None, "converted ms": None, "compile s": None, "not captured": None,
        "verdict": "FAILED",
    }  # fmt: skip
    try:
        result = compare(row.shape, row.what, row.batch, row.context, config, budget)
    except Exception as error:  # one failure must not hide the others
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return found | {"verdict": f"FAILED: {reason}"}
    first, second, compiling, skipped = result
    ratio = first / second
    return found | {
        "plain tokens/s": int(row.tokens / first * 1e3),
        "converted tokens/s": int(row.tokens / second * 1e3),
        "ratio": ratio, "plain ms": first, "converted ms": second, "compile s": compiling,
        "not captured": skipped, "verdict": "ok" if ratio >= floor or not floors else "BELOW",
    }  # fmt: skip


def claims(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The README's rows: of each model and kind of call, the ratios by batch x context."""
    found = []
    for name, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
        own = [row for row in rows if (row["model"], row["what"]) == (name, what)]
        ratios = (
            f"{row['batch']} x {row['context']}: "
            + ("-" if row["ratio"] is None else f"{row['ratio']:.3f}")
            for row in own
        )
        shape = MODELS[name]
        heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}"
        text = f"{what}, {name} ({shape.layers} layers, D={shape.hidden}, {heads})"
        text += f": tokens/s of plain by batch x context (at least {FLOORS[what]})"
        found.append((text, ", ".join(ratios)))
    return found


def model_rows(
    shapes: dict[str, Shape], arguments: argparse.Namespace, config: MoDAConfig
) -> Iterator[dict[str, Any]]:
    """A line of the table for every model, batch and context."""
    rows = [
        Row(name=name, shape=shape, what=what, batch=batch, context=context)
        for (name, shape), what, batch, context in itertools.product(
            shapes.items(), ("decode", "prefill"), arguments.batches, arguments.contexts
        )
    ]
    rows = [
        row for row in rows if row.what in arguments.what and row.tokens <= arguments.prefill_tokens
    ]
    work = [(row, config, arguments.seconds, not arguments.quick) for row in rows]
    yield from timing.each(measure, work, arguments.jobs)


@contextlib.contextmanager
def only(*names: str) -> Iterator[None]:
    """These attentions of PyTorch's alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, name) for name in names]):
        yield


def op_rows(shapes: dict[str, Shape], arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Microseconds on the GPU (in CUDA graphs) of attention alone; TB/s of the keys and values."""
    from moda_compile.kernels import decode, slot_table

    def microseconds(call: Callable[[], Any]) -> float:
        try:
            return (
                float(triton.testing.do_bench_cudagraph(call, rep=50, return_mode="median")) * 1e3
            )
        except RuntimeError:  # this attention does not serve these inputs
            return float("nan")

    for name, shape in shapes.items():
        for batch in arguments.batches:
            for context in arguments.contexts:
                options: dict[str, Any] = dict(device=DEVICE, dtype=DTYPE)
                q = torch.randn(batch, 1, shape.heads, shape.head_dim, **options).transpose(1, 2)
                ((k, v),) = make_cache(replace(shape, layers=1), batch, context)
                slots_shape = (2, shape.layers - 1, batch, shape.kv_heads, 1, shape.head_dim)
                depth = torch.randn(slots_shape, **options)
                filled = slot_table.listed(list(depth[0]), list(depth[1]))
                mask = (torch.arange(context, device=DEVICE) < context)[None, None, None]
                half = (torch.arange(context, device=DEVICE) < context // 2)[None, None, None]
                group = shape.heads // shape.kv_heads
                own: dict[str, Any] = dict(is_causal=False, scale=shape.head_dim**-0.5)

                def plain(
                    q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor | None = None
                ) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

                def efficient(
                    q: Tensor = q, k: Tensor = k, v: Tensor = v, g: int = group, m: Tensor = mask
                ) -> Tensor:
                    # It takes no grouped queries: Inductor repeats the keys for it.
                    keys, values = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
                    return F.scaled_dot_product_attention(q, keys, values, m)

                with only("FLASH_ATTENTION"):
                    flash = microseconds(plain)
                with only("EFFICIENT_ATTENTION"):
                    masked = microseconds(efficient)

                def timed(
                    slots: Any,
                    mask: Tensor | None,
                    q: Any = q,
                    k: Any = k,
                    v: Any = v,
                    o: Any = own,
                ) -> float:
                    return microseconds(lambda: decode.run(q, k, v, slots, mask=mask, **o))

                alone = timed(None, None)
                rest = [timed(filled, None), timed(filled, mask), timed(filled, half)]
                size = 2 * k.numel() * k.element_size()
                times = [f"{x:.1f}" for x in (flash, masked, alone, *rest)]
                rate = f"{size / alone * 1e-6:.2f}"
                yield (name, str(batch), str(context), *times, rate, f"{flash / rest[0]:.2f}")


def parse() -> argparse.Namespace:
    """The options; lists are separated by commas."""

    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64])
    parser.add_argument("--contexts", type=numbers, default=[2048, 16384])
    parser.add_argument("--what", default="op,decode,prefill")
    parser.add_argument("--ffn-kv", default="none", choices=["none", "projected", "shared"])
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing, a row")
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        default=2**17,
        help="rows with more tokens a call are left out",
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows compiled at a time")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no floors, also on a CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    arguments.models = arguments.models.split(",")
    arguments.what = arguments.what.split(",")
    if arguments.quick:
        arguments.batches, arguments.contexts, arguments.seconds = [1, 2], [48], 0.2
    return arguments


def main() -> None:
    """Print the tables."""
    arguments = parse()
    if DEVICE == "cpu" and not arguments.quick:
        sys.exit("decode: no CUDA device (--quick runs tiny sizes on a CPU).")
    shapes = {name: MODELS[name] for name in arguments.models}
    if arguments.quick:
        shapes = {
            name: replace(x, layers=3, hidden=64, intermediate=96, vocabulary=128, head_dim=16)
            for name, x in shapes.items()
        }
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; {DTYPE}")
    for name, shape in shapes.items():
        print(f"{name}: {shape}")
    if "op" in arguments.what and DEVICE == "cuda":
        op_table: list[tuple[str, ...]] = [
            (
                "model", "batch", "context", "flash us", "efficient+mask us", "decode us",
                "+slots us", "+slots+mask us", "half masked us", "decode TB/s", "flash/(+slots)",
            )
        ]  # fmt: skip
        op_table += op_rows(shapes, arguments)
        print("\n".join(table(op_table)), flush=True)
    rows: list[dict[str, Any]] = []
    config = MoDAConfig(ffn_kv=arguments.ffn_kv)
    for row in model_rows(shapes, arguments, config):
        print(row, flush=True)  # as they come: a run may be cut short
        rows.append(row)
    held = [row["verdict"] == "ok" for row in rows]
    if rows:
        publish(
            "decode",
            "Decoding and prefill of converted models over plain",
            rows,
            claims=claims(rows),
            picture=Picture(
                x="context", ys=("ratio",), split="batch", log_x=True, unit="tokens/s of plain"
            ) if len({(row["model"], row["what"]) for row in rows}) == 1 else None,
            setting=f"{DTYPE}, mode reduce-overhead, ffn_kv={arguments.ffn_kv!r}; in turns",
            folder=arguments.out,
        )  # fmt: skip
        print(f"{held.count(True)} of {len(held)} rows hold")
    sys.exit(held.count(False) > 0)


if __name__ == "__main__":
    main()
