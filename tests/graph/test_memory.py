"""Memory is linear in depth: counted on the training graph that Inductor gets, not timed.

Kernels of the generated code are replaced by nothing (compiling C++ for 8 layers takes minutes),
and so they are generated without vectors, which is quicker: what is allocated, saved and passed on
is the wrapper code's doing and stays as it is. Our own operators do run.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import moda_compile
from moda_compile import kernels
from moda_compile.config import MoDAConfig
from moda_compile.kernels import cpu
from moda_compile.testing import RandomStack, StackConfig

BATCH, LENGTH, KV_HEADS, HEAD_DIM = 2, 64, 4, 16
FLOAT = 4
UNIT = BATCH * KV_HEADS * LENGTH * HEAD_DIM * FLOAT  # bytes of one layer's K


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One training step. Bytes are of tensors; names are those of the generated code."""

    forward: str
    backward: str
    saved: int
    peak: int
    accumulators: list[int]


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def nothing(*_args: Any, **_kwargs: Any) -> Callable[..., None]:
        return lambda *_: None

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", nothing)
    torch.set_num_threads(1)
    with torch._inductor.config.patch({"force_disable_caches": True, "cpp.simdlen": 1}):
        yield
        torch._dynamo.reset()


@functools.cache
def count(layers: int, ffn_kv: Any | None, gathering: bool = False, ahead: bool = False) -> Counted:
    """Count one step; ``ffn_kv=None`` is the unconverted model under stock Inductor.

    gathering: as on a GPU, where no accumulator is kept; see `passes.gather`. ahead: and as in a
    stack so deep that slots are begun before their layers have all run.
    """
    torch._dynamo.reset()
    config = StackConfig(
        layers=layers, kv_heads=KV_HEADS, groups=1, head_dim=HEAD_DIM, norm="rms", rotary="half",
        ffn="swiglu", batch=BATCH, length=LENGTH,
    )  # fmt: skip
    model, inputs = RandomStack(config), config.inputs()
    if ffn_kv is None:
        call: Callable[..., Any] = torch.compile(model, fullgraph=True)
    else:
        call = moda_compile.convert(model, MoDAConfig(ffn_kv=ffn_kv), inputs)
    accumulators: list[int] = []
    saved: dict[int, int] = {}
    original = cpu.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        if args[8] is not None:
            accumulators.append(args[8].data_ptr())
        return original(*args, **kwargs)

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = call(*inputs)
        output.sum().backward()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "backward", backward)
        if gathering:
            patch.setattr(kernels, "gathers", lambda **_: True)
            patch.setattr(kernels, "gathers_ahead", lambda **_: ahead)
        _, codes = run_and_get_code(step)
        assert len(codes) == 2  # one graph: its forward and its backward
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs)}
        accumulators.clear(), saved.clear()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    kept = sum(size for address, size in saved.items() if address not in own)
    return Counted(
        forward=codes[0], backward=codes[1], saved=kept, peak=peak, accumulators=accumulators
    )


def allocations(code: str) -> list[int]:
    """Bytes of every buffer that generated code allocates."""
    shapes = re.findall(r"empty_strided_\w+\(\(([\d, ]*)\)", code)
    return [FLOAT * prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]


def slots(layers: int, ffn_kv: str) -> int:
    return (layers - 1) * (1 if ffn_kv == "none" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ffn_kv", "gathering", "ahead"),
    [
        ("none", False, False),
        ("projected", False, False),
        ("none", True, False),
        ("none", True, True),
    ],
)
def test_linear_in_depth(ffn_kv: str, gathering: bool, ahead: bool) -> None:
    deep = ffn_kv == "none" and not gathering
    # Sums of two slots are begun from 5 layers on, and never more of them are kept.
    depths = (3, 5, 8) if deep else (5, 6, 7) if ahead else (3, 4, 5)
    counted = {layers: count(layers, ffn_kv, gathering, ahead) for layers in depths}
    for layers, c in counted.items():
        number = slots(layers, ffn_kv)
        print(
            f"{ffn_kv} L={layers}: saved {c.saved / UNIT / layers:.2f}, peak "
            f"{c.peak / UNIT / layers:.2f} units of one layer's K a layer"
        )
        accumulator = number * 2 * UNIT
        # Nothing of a depth buffer's size but the one accumulator, and that in backward only.
        # (Ordinary activations here are at most the FFN's, 3 units; slots of 3 layers are 4.)
        large = [n for n in allocations(c.forward) if n > 3 * UNIT]
        assert large == []
        large = [n for n in allocations(c.backward) if n > 3 * UNIT]
        if gathering:
            assert large == c.accumulators == []
            assert c.backward.count("depth_gather.default(") == layers // 2
            assert c.backward.count("depth_attention_query_backward.default(") == layers - 1
            continue
        assert large == [accumulator]
        # Every attention that reads slots has added to it, in place: one address.
        assert len(c.accumulators) == layers - 1
        assert len(set(c.accumulators)) == 1
        calls = re.findall(r"depth_attention_backward\.default\((.*)\)", c.backward)
        assert len(calls) == layers
    # Bytes saved for backward grow by the same amount with every layer.
    ends = sorted(counted)
    rates = [
        (counted[b].saved - counted[a].saved) / (b - a)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    assert rates == [rates[0]] * len(rates), [r / UNIT for r in rates]
    # So does the peak, which the partitioner and the allocator make a little uneven: 5%.
    growth = [
        (counted[b].peak - counted[a].peak) / (b - a) for a, b in zip(ends, ends[1:], strict=False)
    ]
    assert max(growth) <= 1.05 * min(growth), [g / UNIT for g in growth]


@pytest.mark.slow
def test_only_the_accumulator_is_extra() -> None:
    layers = 3
    plain = count(layers, None)
    converted = count(layers, "none")
    projected = count(layers, "projected")
    for c in (plain, converted, projected):
        print(f"saved {c.saved / UNIT:.2f} peak {c.peak / UNIT:.2f} units of one layer's K")
    accumulator = 2 * slots(layers, "none") * UNIT
    assert converted.saved <= plain.saved
    # Beside the accumulator, the CPU kernel's own temporaries, such as one slot's gradient.
    temporaries = 2 * UNIT
    assert converted.peak <= plain.peak + accumulator + temporaries
    ffn_slots = 2 * (layers - 1) * UNIT
    assert projected.saved <= plain.saved + ffn_slots
    assert projected.peak <= plain.peak + ffn_slots + 2 * accumulator + temporaries
