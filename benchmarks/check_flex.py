"""Check converted FlexAttention models on this machine's GPU against a float64 oracle.

    PYTHONPATH=. python benchmarks/check_flex.py [--only TEXT] [--jobs N]

Each model is converted and compiled by Inductor; the oracle is its dense twin in float64, run by
`moda_compile.testing.ReferenceMode`. One row a case: ||x - exact|| / ||exact|| of the output or the
gradient that is worst, beside what is allowed: twice that of the eager twin in the model's own
dtype, and rounding. Exits with 1 if a case fails. A few minutes, mostly compiling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import checking
import torch
from results import Row
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import moda_compile
from moda_compile.testing import ReferenceMode

DEVICE = "cuda"
LAYERS = 4
# The eager twin's error is one draw of a random thing, and the converted model rounds elsewhere:
# twice that, and a few roundings of the dtype on top. float32 products run without TF32 here.
BUDGET = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stack of four layers, which may alternate between two masks."""

    masks: tuple[str, ...] = ("causal",)
    mod: str = ""
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    length: int = 384
    kv_heads: int = 2
    groups: int = 2
    head_dim: int = 64
    scale: float | None = None
    inside: bool = False  # the block mask is built in the model
    dynamic: bool = False  # a second length follows

    def __str__(self) -> str:
        parts = ["/".join(self.masks), self.mod, str(self.dtype).removeprefix("torch.")]
        parts += [f"T{self.length} Hk{self.kv_heads} G{self.groups} d{self.head_dim}"]
        parts += ["built inside" * self.inside, "two lengths" * self.dynamic]
        return " ".join(part for part in parts if part)


CASES = (
    Case(masks=("none",), length=70),  # longer, and depth would be lost among the tokens
    Case(),
    Case(dtype=torch.float16),
    Case(dtype=torch.float32),
    Case(masks=("window",)),
    Case(masks=("document",)),
    Case(masks=("window", "causal")),
    Case(masks=("nothing for some",)),
    Case(mod="slope"),
    Case(mod="softcap"),
    Case(mod="learned", masks=("causal",)),
    Case(masks=("none",), mod="slope", dtype=torch.float32),
    Case(masks=("document",), mod="softcap", dtype=torch.float32),
    Case(kv_heads=4, groups=1),
    Case(kv_heads=1, groups=8),
    Case(head_dim=128, length=256, scale=0.05),
    Case(length=257),
    Case(length=257, masks=("window",), dtype=torch.float32),
    Case(inside=True, masks=("window",)),
    Case(inside=True, dynamic=True),
)

WINDOW = 50
Index = Tensor


def mask_mod(name: str, length: int) -> Callable[..., Tensor] | None:
    """[b, h, i, j] -> whether query i sees key j."""
    document = torch.arange(length, device=DEVICE) * 3 // length

    def causal(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return j <= i

    def window(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return (j <= i) & (i - j < WINDOW)

    def documents(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return (j <= i) & (document[i] == document[j])

    def nothing(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return (j <= i) & (i % 3 > 0)  # every third query sees no key at all

    return {
        "causal": causal,
        "window": window,
        "document": documents,
        "nothing for some": nothing,
        "none": None,
    }[name]


class Attention(nn.Module):
    """Self-attention by FlexAttention, or by its dense spelling."""

    def __init__(self, case: Case, layer: int) -> None:
        super().__init__()
        self.case, self.name = case, case.masks[layer % len(case.masks)]
        heads, width = case.kv_heads * case.groups, case.kv_heads * case.groups * case.head_dim
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, case.kv_heads * case.head_dim) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(heads)) if case.mod == "learned" else None
        self.is_dense = False

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.case.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        length, scale = x.shape[1], self.case.scale or self.case.head_dim**-0.5
        if self.is_dense:
            mask = mask_mod(self.name, length)
            out = dense_attention(q, k, v, mask, self.score_mod(), scale)
        else:
            blocks = self.blocks(length) if self.case.inside else BLOCKS[self.name]
            out = flex_attention(
                q, k, v, score_mod=self.score_mod(), block_mask=blocks, scale=scale,
                enable_gqa=True,
            )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2))

    def blocks(self, length: int) -> Any:
        """The BlockMask for one length."""
        mask = mask_mod(self.name, length)
        return mask and create_block_mask(mask, None, None, length, length, device=DEVICE)

    def score_mod(self) -> Callable[..., Tensor] | None:
        """(score, b, h, i, j) -> score."""
        bias = self.bias

        def slope(score: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
            return score - (i - j) * torch.exp2(-1.0 - h)

        def softcap(score: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
            return 2.0 * torch.tanh(score / 2.0)

        def learned(score: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
            assert bias is not None
            return score * (1.0 + bias[h])

        return {"slope": slope, "softcap": softcap, "learned": learned}.get(self.case.mod)


BLOCKS: dict[str, Any] = {}


def modified(
    mod: Callable[..., Tensor] | None, heads: int, length: int
) -> Callable[[Tensor], Tensor] | None:
    """A score_mod on all scores [B, H, T, T] at once."""
    if mod is None:
        return None
    i = torch.arange(length, device=DEVICE)[:, None]
    j = torch.arange(length, device=DEVICE)
    h = torch.arange(heads, device=DEVICE)[:, None, None]
    return lambda scores: mod(scores, None, h, i, j)


def visible(mask: Callable[..., Tensor] | None, length: int) -> Tensor:
    """[T, T] of a mask_mod."""
    i = torch.arange(length, device=DEVICE)[:, None]
    j = torch.arange(length, device=DEVICE)
    seen = torch.ones(length, length, dtype=torch.bool, device=DEVICE)
    return seen if mask is None else seen & mask(None, None, i, j)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, mod: Any, scale: float) -> Tensor:
    """What FlexAttention computes; a row that sees nothing is 0."""
    heads, length = q.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    change = modified(mod, heads, length)
    scores = scores if change is None else change(scores).to(q.dtype)
    seen = visible(mask, length)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen.any(
        -1, keepdim=True
    )
    return weights.to(v.dtype) @ v


def adapter(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Any, mod: Any,
    scale: float,
) -> Tensor:  # fmt: skip
    """`dense_attention` for the oracle."""
    change = modified(mod, q.shape[1], q.shape[2])
    seen = visible(mask, q.shape[2])
    return attend(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True, score_mod=change)


class Stack(nn.Module):
    """Pre-norm layers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.kv_heads * case.groups * case.head_dim
        self.norm = nn.LayerNorm(width)
        self.attentions = nn.ModuleList(Attention(case, i) for i in range(LAYERS))
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        for attention, ffn in zip(self.attentions, self.ffns, strict=True):
            x = x + attention(self.norm(x))
            x = x + ffn(self.norm(x))
        return x

    def twin(self, dtype: torch.dtype) -> Stack:
        """The same weights, dense."""
        twin = copy.deepcopy(self).to(dtype)
        for attention in twin.attentions:
            assert isinstance(attention, Attention)
            attention.is_dense = True
        return twin


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a fixed random projection of it, in float64."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(x)
    generator = torch.Generator(DEVICE).manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, device=DEVICE).to(out))
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return {name: tensor.double() for name, tensor in found.items() if tensor is not None}


def relative(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """||x - exact|| / ||exact||; a key's bias has no gradient but rounding, and counts by the
    largest of all.
    """
    assert got.keys() == exact.keys()
    largest = max(x.norm().item() for name, x in exact.items() if name != "out")
    return {
        name: (got[name] - x).norm().item() / max(x.norm().item(), 1e-3 * largest)
        for name, x in exact.items()
    }


ALIKE = "; so does the unconverted model"


def check(case: Case) -> str:
    """The row of a case; raises if anything is too far off.

    Inductor 2.11 can't compile a block mask that the model builds for a second length: where that
    is so, the unconverted model has to raise the same.
    """
    try:
        return checking.worst(errors(case))
    except Exception as failure:
        name = type(failure).__name__
        if not case.dynamic or unconverted(case) != name:
            raise
        return f"{name}: {str(failure)[:60]}{ALIKE}"


def errors(case: Case) -> checking.Errors:
    """Of the output and all gradients, for each length."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack(case).to(DEVICE, case.dtype)
    width = case.kv_heads * case.groups * case.head_dim
    lengths = (case.length, case.length - 128) if case.dynamic else (case.length,)
    inputs = [torch.randn(case.batch, n, width, device=DEVICE).to(case.dtype) for n in lengths]
    BLOCKS.clear()
    if not case.inside:
        own = (a for a in model.attentions if isinstance(a, Attention))
        BLOCKS.update((a.name, a.blocks(case.length)) for a in own)
    converted = moda_compile.convert(
        copy.deepcopy(model), example_inputs=(inputs[0],), backend="inductor"
    )
    found = {}
    for x in inputs:
        with ReferenceMode(functions={dense_attention: adapter}):
            exact = results(model.twin(torch.float64), x.double())
        with ReferenceMode(functions={dense_attention: adapter}):
            eager = relative(results(model.twin(case.dtype), x), exact)
        got = results(converted, x)
        with torch.no_grad():  # PyTorch then asks the kernel for no lse: ours has to
            got["without gradients"] = converted(x).double()
        exact["without gradients"], eager["without gradients"] = exact["out"], eager["out"]
        plain = (model.twin(torch.float64)(x.double()) - exact["out"]).norm() / exact["out"].norm()
        assert plain > 0.01, f"the plain model is only {plain:.1e} away"
        for name, error in relative(got, exact).items():
            label = f"{name}, T{x.shape[1]}" if case.dynamic else name
            found[label] = (error, 2 * eager[name] + BUDGET[case.dtype])
    return found


def unconverted(case: Case) -> str:
    """What the plain model raises when it is compiled and called with the same lengths."""
    torch._dynamo.reset()
    width = case.kv_heads * case.groups * case.head_dim
    compiled = torch.compile(Stack(case).to(DEVICE, case.dtype))
    try:
        for n in (case.length, case.length - 128):
            x = torch.randn(case.batch, n, width, device=DEVICE).to(case.dtype)
            compiled(x).sum().backward()
    except Exception as failure:
        return type(failure).__name__
    return ""


def checks() -> list[checking.Check]:
    """All of them."""
    return [(str(case), partial(check, case)) for case in CASES]


def claims(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """As of any checks, and how many are right because the unconverted model fails as well."""
    what = "converted FlexAttention models, forward and all gradients"
    ((_, said),) = checking.claim(what, checks, rows)
    alike = sum(ALIKE in row["said"] for row in rows)
    more = f"; in {alike} of them the unconverted model raises the same error" if alike else ""
    return [(what, said + more)]


if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
