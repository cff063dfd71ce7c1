"""Where a training step's time goes on this machine's GPU: its kernels, and how long it is idle.

    PYTHONPATH=. python benchmarks/step_profile.py [--shape 24] [--batch 8] [--top 25]

The plain stacks of model.py, as they are and converted, compiled: the median time of a step from
its first launch to its last kernel, the sum of its kernels' times, and the longest of these. What
a step takes more than its kernels is the host's time that the GPU could not hide.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import model
import timing
import torch
from results import add_arguments, publish
from torch.autograd import DeviceType
from tqdm import tqdm


def kernels(step: Callable[[], None], steps: int = 3) -> dict[str, tuple[float, float]]:
    """(ms, calls) a step, of each kernel, longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith("## "):
            found.setdefault(event.name, []).append(event.self_device_time_total / 1e3)
    sums = {name: (sum(times) / steps, len(times) / steps) for name, times in found.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def main() -> None:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="24", choices=list(model.SHAPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--top", type=int, default=25, help="kernels to show of each model")
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("step_profile: no CUDA device.")
    shape = replace(model.SHAPES[arguments.shape], batch=arguments.batch)
    rows: list[dict[str, Any]] = []
    for variant, options in tqdm(model.VARIANTS.items(), desc="models"):
        torch._dynamo.reset()
        step = model.step_of(shape, options)
        for _ in range(4):
            step()
        taken = statistics.median(timing.once(step) for _ in range(9))
        found = kernels(step)
        busy = sum(ms for ms, _ in found.values())
        own: list[tuple[str, float, float | None]]
        own = [("a step", taken, None), ("all kernels", busy, None)]
        own += [(name, *times) for name, times in list(found.items())[: arguments.top]]
        rows += [{"ffn_kv": variant, "kernel": n[:90], "ms": ms, "calls": c} for n, ms, c in own]
        torch.cuda.empty_cache()
    publish(
        f"step_profile_{arguments.shape}_{arguments.batch}",
        f"Kernels of a training step: {shape}, B={shape.batch}, T={shape.tokens}",
        rows,
        claims=[],
        setting="bf16, forward + backward of the blocks, compiled",
        folder=arguments.out,
    )


if __name__ == "__main__":
    main()
