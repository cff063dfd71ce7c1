"""Check Inductor's modes on this machine's GPU: right over several steps, and CUDA graphs used.

    PYTHONPATH=. python benchmarks/check_modes.py [--only TEXT] [--jobs N]

A converted decoder trains for a few steps, with other tokens and weights in each. Each step's
output and gradients are compared with the float64 oracle's, by the rule of
``moda_compile.testing.check_conversion``, and each pass is to replay one CUDA
graph once the first steps have recorded it. Exits 1 if any check fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import checking
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.testing import Budget, RandomStack, StackConfig, reference

STACK = StackConfig(
    layers=4, kv_heads=2, groups=2, head_dim=64, rotary="half", norm="rms", ffn="swiglu",
    length=129, batch=2,
)  # fmt: skip
STEPS, WARM_UP = 6, 3  # a first run, a recording, and one more where that takes two


def check(mode: str, dtype: torch.dtype, config: MoDAConfig) -> str:
    """The row of a case; raises if anything is too far off, or runs without a CUDA graph."""
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    counters.clear()
    torch.manual_seed(0)
    (tokens,) = (x.cuda() for x in STACK.inputs())
    plain = RandomStack(STACK).to("cuda", dtype)
    model = moda_compile.convert(copy.deepcopy(plain), config, (tokens,), mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    errors, replays = {}, []
    for step in range(STEPS):
        tokens = tokens.roll(1, 1)  # and copied: its address is another each time
        torch.compiler.cudagraph_mark_step_begin()
        with counting_replays() as replayed:
            output = run(model, model, tokens)
        replays.append(replayed[0])
        eps, rule = torch.finfo(dtype).eps, Budget()
        exact = oracle(plain, model, config, tokens, torch.float64)
        shaken = oracle(plain, model, config, tokens, torch.float64, noise=eps)
        low = oracle(plain, model, config, tokens, dtype)
        steepest = max(float(x.abs().max()) for name, x in exact.items() if name != "logits")
        for name, true in exact.items():
            error, eager, moved = (
                float((x[name].double() - true).abs().max()) for x in (output, low, shaken)
            )
            rounding = rule.rtol * float(true.abs().max()) + rule.atol * steepest
            allowed = eager + rule.condition * moved + eps * rounding
            errors[f"{name}, step {step}"] = (error, allowed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    skips = counters["inductor"]["cudagraph_skips"]
    used = f"skips {skips}, replays {replays}"
    if skips or any(n != 2 for n in replays[WARM_UP:]):
        raise AssertionError(f"not one CUDA graph a pass: {used}")
    return f"{checking.worst(errors)}, {used}"


def run(model: nn.Module, call: Callable[[Tensor], Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Logits, and every parameter's gradient under its name, as copies."""
    logits = call(tokens)
    logits.double().square().mean().backward()
    found = {"logits": logits.detach().clone()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def oracle(
    plain: RandomStack,
    model: nn.Module,
    config: MoDAConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    noise: float = 0.0,
) -> dict[str, Tensor]:
    """The same by the eager oracle in ``dtype``, with the converted model's present weights.

    ``noise`` is how much each weight is rounded once more, relative to itself.
    """
    twin = copy.deepcopy(plain).to(dtype)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().to(dtype)
        weight = weight * (1 + noise * (torch.rand_like(weight) - 0.5)) if noise else weight
        weights[name] = weight.requires_grad_()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[name])
    new = {name: weight for name, weight in weights.items() if "moda_" in name}
    slots = twin.ffn_slots(config.ffn_kv, new) if config.ffn_kv != "none" else None
    found = run(twin, lambda ids: reference(twin, ids, ffn_slots=slots), tokens)
    return found | {n: w.grad for n, w in new.items() if w.grad is not None}


@contextmanager
def counting_replays() -> Iterator[list[int]]:
    """A list whose one number grows with each CUDA graph replayed meanwhile."""
    count, original = [0], torch.cuda.CUDAGraph.replay

    def replay(graph: Any) -> None:
        count[0] += 1
        original(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", replay):
        yield count


def checks() -> list[checking.Check]:
    """All of them."""
    configs = [MoDAConfig(), MoDAConfig(ffn_kv="projected")]
    both = [(d, config) for d in (torch.float32, torch.bfloat16) for config in configs]
    cases = [("reduce-overhead", *case) for case in both]
    cases += [("max-autotune", *case) for case in both[2:]]  # of float32, half an hour of tuning
    return [
        (f"{mode:16s} {str(dtype)[6:]:9s} {config.ffn_kv:10s}", partial(check, mode, dtype, config))
        for mode, dtype, config in cases
    ]


claims = partial(
    checking.claim,
    '`mode="reduce-overhead"` and `"max-autotune"`: right in every step, CUDA graphs replayed, '
    "none skipped",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
