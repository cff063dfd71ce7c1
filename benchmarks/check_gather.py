"""Check the gathering of slots' gradients on this machine's GPU.

    PYTHONPATH=. python benchmarks/check_gather.py [--only TEXT] [--jobs N]

Several layers read the same slots. dq, dk, dv of each without the slots' gradients, and these
gathered from all layers, at once or begun with the first of them, against float64; then models
through Inductor, gathered against accumulated, also with slots begun ahead. Each row: error /
allowed, as in check_gpu.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import checking
import torch
import torch._inductor.config
from check_gpu import BF16, BUDGET, DEVICE, FP16, FP32, FP64, oracle, relative, tensor
from torch import Tensor

import moda_compile
from moda_compile import MoDAConfig, kernels
from moda_compile.kernels import split
from moda_compile.testing import RandomStack, StackConfig

NAMES = ("dq", "dk", "dv", "dK", "dV")
LAYOUTS = ("token_major", "slice", "head_major", "odd_offset", "dim_major")


@dataclass(frozen=True, kw_only=True)
class Case:
    """readers: for each slot, how many of the layers read it. made: dtype of its gradient.

    begun: so many slots, the first ones, get their gradients in two calls.
    """

    dtype: torch.dtype = BF16
    made: torch.dtype = BF16
    readers: tuple[int, ...] = (5, 4)
    b: int = 2
    t: int = 257
    hk: int = 3
    g: int = 1
    d: int = 64
    layout: str = "token_major"
    begun: int = 0

    def __str__(self) -> str:
        kinds = "/".join(str(x).removeprefix("torch.") for x in (self.dtype, self.made))
        shape = f"B{self.b} T{self.t} Hk{self.hk} G{self.g} d{self.d} readers {self.readers}"
        begun = f" begun {self.begun}" if self.begun else ""
        return f"{kinds} {shape}{begun} {self.layout}"


def cases() -> Iterator[Case]:
    base = Case()
    for dtype, made in ((BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32), (FP64, FP64)):
        yield replace(base, dtype=dtype, made=made)
    for g, d in itertools.product((1, 2, 3, 4), (16, 64, 70, 76, 80, 96, 128, 256)):
        yield replace(base, g=g, d=d)
    for readers in ((1,), (17,), (16, 15), (1, 0), (24, 23), (4, 4, 3, 2)):
        yield replace(base, readers=readers)
    for layout in (*LAYOUTS[1:], "mixed"):
        yield replace(base, layout=layout, g=2)
        yield replace(base, layout=layout, d=76, dtype=FP16, made=FP32)
    for t, b in ((1, 1), (1, 64), (2, 3), (2048, 1)):
        yield replace(base, t=t, b=b)
    ahead = replace(base, readers=(8, 7, 6, 5), begun=2)
    for g, d in itertools.product((1, 2, 3, 4), (16, 64, 76, 80, 128, 256)):
        yield replace(ahead, g=g, d=d)
    for dtype, made in ((FP16, FP16), (BF16, FP32), (FP32, FP32)):
        yield replace(ahead, dtype=dtype, made=made, layout="mixed", g=2)
    for counts, begun in (((3, 2), 1), ((19, 18, 17), 2), ((17, 17, 16, 16), 2)):
        yield replace(ahead, readers=counts, begun=begun)
    yield replace(ahead, g=8)
    yield replace(base, g=8)  # by PyTorch
    yield replace(base, d=320)


def check(case: Case) -> str:
    """The row of a case; raises if anything is too far off."""
    torch.manual_seed(0)
    hq, scale = case.hk * case.g, case.d**-0.5
    layouts = itertools.cycle(LAYOUTS if case.layout == "mixed" else (case.layout,))

    def draw(heads: int) -> Tensor:
        return tensor((case.b, heads, case.t, case.d), next(layouts), case.dtype)

    keys, values = ([draw(case.hk) for _ in case.readers] for _ in range(2))
    layers = [tuple(draw(n) for n in (hq, hq, case.hk, case.hk)) for _ in range(max(case.readers))]
    options: dict[str, Any] = dict(is_causal=True, scale=scale)
    saved, made = [], []
    for number, (grad, q, k, v) in enumerate(layers):
        seen = sum(number < count for count in case.readers)
        own = (q, k, v, keys[:seen], values[:seen])
        out, lse = split.forward(*own, **options)
        made.append(split.query_backward(grad, *own, out, lse, **options))
        saved.append((grad, q, lse, made[-1][4]))
    per_reader = [*map(list, zip(*saved, strict=True))]
    gradients = gathered(case, per_reader, keys, values, scale)
    again = gathered(case, per_reader, keys, values, scale)
    if not torch.equal(gradients, again):
        raise AssertionError("two runs differ")

    def reference(compute: torch.dtype) -> list[Tensor]:
        slots = torch.stack([torch.stack(keys), torch.stack(values)]).to(compute)
        total, last = torch.zeros_like(slots, dtype=FP64), []
        for number, (grad, *own) in enumerate(layers):
            seen = sum(number < count for count in case.readers)
            leaves = [x.to(compute).requires_grad_() for x in (*own, *slots[:, :seen])]
            exact, _ = oracle(*leaves, causal=True, scale=scale)
            grads = torch.autograd.grad(exact, leaves, grad.to(compute))
            total[:, :seen] += torch.stack(grads[3:])
            last = list(grads[:3])
        return [*last, *total]

    exact, eager = reference(FP64), reference(case.dtype)
    errors = {}
    got = (*made[-1][:3], gradients[:, 0], gradients[:, 1])
    for name, x, y, z in zip(NAMES, got, exact, eager, strict=True):
        rounded = case.made if name in ("dK", "dV") else case.dtype
        budget = max(BUDGET[case.dtype], BUDGET[rounded])
        errors[name] = relative(x, y), relative(z, y) + budget
    return checking.verdict(errors)


def gathered(
    case: Case, readers: list[Any], keys: list[Tensor], values: list[Tensor], scale: float
) -> Tensor:
    """All slots' gradients: in one call, or in a second the slots that were begun in the first."""
    options: dict[str, Any] = dict(scale=scale, dtype=case.made)
    count, begun = case.readers, case.begun
    if not begun:
        whole: tuple[Any, ...] = (*readers, keys, values, count)
        return split.gather(*whole, **options)[0]
    ran = count[begun]
    turned = [side[begun:] + side[:begun] for side in (keys, values)]
    counts = [*count[begun:], *[ran] * begun]
    early: tuple[Any, ...] = (*(x[:ran] for x in readers), *turned, counts)
    made, sums = split.gather(*early, unfinished=begun, **options)
    missing = [x - ran for x in count[:begun]]
    late: tuple[Any, ...] = (*(x[ran:] for x in readers), keys[:begun], values[:begun], missing)
    gone_on, _ = split.gather(*late, partials=sums, **options)
    return torch.cat([gone_on, made])


def check_model(
    ffn_kv: Any, groups: int, head_dim: int, dtype: torch.dtype, ahead: bool = False
) -> str:
    """Gradients of a model gathered and accumulated, and what each takes of memory.

    ahead: as a deeper stack, every other gather begins the next one's slots.
    """
    config = StackConfig(
        layers=7, kv_heads=4, groups=groups, head_dim=head_dim, norm="rms", rotary="half",
        ffn="swiglu", batch=2, length=515,
    )  # fmt: skip
    found, peaks, calls = [], [], []
    for gathering in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = RandomStack(config).to(DEVICE, dtype)
        inputs = tuple(x.to(DEVICE) for x in config.inputs())
        torch.manual_seed(1)
        moda_compile.convert(model, MoDAConfig(ffn_kv=ffn_kv), inputs)
        chosen = kernels.gathers if gathering else lambda **_: False
        with (
            torch._inductor.config.patch(force_disable_caches=True),  # nothing from the other way
            mock.patch.object(kernels, "gathers", chosen),
            mock.patch.object(kernels, "gathers_ahead", lambda **_: ahead),
            mock.patch.object(split, "gather", side_effect=split.gather) as gather,
        ):
            for _ in range(2):
                model.zero_grad()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                model(*inputs).float().square().mean().backward()
        calls.append(gather.call_count)
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    if calls[0] or not calls[1]:
        raise AssertionError(f"gathered {calls} times")
    worst = max(relative(x, y.double()) for x, y in zip(found[1], found[0], strict=True))
    limit = 2.0**-5 if dtype == BF16 else 2.0**-14  # of two roundings each, through seven layers
    note = f"{worst:.0e}/{limit:.0e}, a step's peak {peaks[1]:.1f} MiB, accumulated {peaks[0]:.1f}"
    if not worst <= limit:
        raise AssertionError(note)
    return note


def checks() -> list[checking.Check]:
    """All of them."""
    found: list[checking.Check] = [(str(x), partial(check, x)) for x in cases()]
    for ffn_kv, (groups, head_dim, dtype) in itertools.product(
        ("none", "projected"), ((1, 64, FP32), (2, 64, BF16), (1, 76, BF16))
    ):
        kind = str(dtype).removeprefix("torch.")
        name = f"model {ffn_kv} {kind} G{groups} d{head_dim}"
        own = (ffn_kv, groups, head_dim, dtype)
        found.append((name, partial(check_model, *own)))
        found.append((f"{name} ahead", partial(check_model, *own, ahead=True)))
    return found


claims = partial(
    checking.claim,
    "gathered gradients of slots: kernels against float64, models against accumulated ones",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
