"""Teach the library an attention of your own, convert a model that uses it, and check the result.

The model's attention is an operator that the library has never heard of, on [B, T, H, d], with a
sliding window. It takes three things: a row that says what the operator computes, its registration,
and an adapter that tells the same to the float64 oracle, so that outputs and all gradients of the
converted model can be held against something that shares no code with the conversion.

    python examples/custom_pattern.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import moda_compile
from moda_compile import fx
from moda_compile.patterns import Attention, Pattern, Refused, Step
from moda_compile.testing import check_conversion

# --- the attention, as somebody may have written it ----------------------------------------------


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[T, T], True where token t sees token u: the last ``window`` tokens, itself included."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def compute(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Stands in for a kernel; window 0 means all earlier tokens."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = window_mask(q.shape[2], window, q.device) if window else None
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=window == 0, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@torch.library.custom_op("example::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """query [B, T, Hq, d], key and value [B, T, Hk, d] -> [B, T, Hq, d]."""
    return compute(query, key, value, window)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return query.new_empty(query.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        query, key, value = leaves
        out = compute(query, key, value, ctx.window)
    return *torch.autograd.grad(out, leaves, grad), None


attention.register_autograd(_backward, setup_context=_save)


class Layer(nn.Module):
    """Pre-norm, with two query heads to a key head. Every other layer looks at a window."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = width // heads, window
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width // 2)
        self.value = nn.Linear(width, width // 2)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        y = self.norm(x)
        parts = (layer(y).unflatten(-1, (-1, self.head_dim)) for layer in
                 (self.query, self.key, self.value))  # fmt: skip
        x = x + self.out(torch.ops.example.attention(*parts, self.window).flatten(2))
        return x + self.ffn(x)


# --- the row: what the operator computes, in the library's words ----------------------------------


def match(node: Node) -> Attention | None:
    """An Attention if ``node`` is a call of the operator."""
    if not fx.calls_op(node, torch.ops.example.attention):
        return None
    names = ("query", "key", "value", "window")
    *parts, window = (fx.argument(node, i, name) for i, name in enumerate(names))
    if not isinstance(window, int):
        raise Refused("the window is no constant.", "give example::attention a Python int.")
    gm = node.graph.owning_module
    assert gm is not None
    with gm.graph.inserting_before(node):
        # The library works on [B, H, T, d]: views in front of the node, and steps back behind it.
        query, key, value = (fx.insert(gm, "transpose", (x, 1, 2), like=node) for x in parts)
        mask = None
        if window:
            length = fx.insert(gm, "size", (parts[0], 1), like=node)
            dtype = {"dtype": torch.bool}
            ones = fx.insert(gm, "new_ones", (parts[0], (length, length)), dtype, like=node)
            past = fx.insert(gm, "tril", (ones,), like=node)
            mask = fx.insert(gm, "triu", (past, 1 - window), like=node)
    return Attention(
        node=node,
        pattern="example",
        query=query,
        key=key,
        value=value,
        is_causal=window == 0,
        mask=mask,
        scale=None,
        restore=(Step("transpose", (1, 2)),),
    )


ROW = Pattern(
    name="example",
    accepts="example::attention, with and without a window.",
    refuses="A window that is computed.",
    match=match,
)


def adapter(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same for the oracle: one call of the operator, as a call of SDPA."""
    mask = window_mask(q.shape[1], window, q.device) if window else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, attn_mask=mask, is_causal=window == 0, enable_gqa=True)
    return out.transpose(1, 2)


def main() -> None:
    """Convert, report, check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "aot_eager", "eager"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(32, 4, 3 * (i % 2)) for i in range(options.layers)))
    x = torch.randn(2, 9, 32)

    refusals = moda_compile.explain(model, x).refusals
    print(f"Before: {len(refusals)} attentions refused, because {refusals[0].refusal}\n")
    with moda_compile.register_pattern(ROW):
        print(moda_compile.explain(model, x), end="\n\n")
        functions: dict[Callable[..., Any], Any] = {torch.ops.example.attention: adapter}
        checked = check_conversion(model, (x,), backend=options.backend, functions=functions)
        converted = moda_compile.convert(model, example_inputs=(x,), backend=options.backend)
        loss = converted(x).square().mean()
        loss.backward()
    print(f"{len(checked)} of {len(checked)} outputs and gradients agree with the float64 oracle.")
    print(f"Loss {loss.item():.4f}; train it as ever.")


if __name__ == "__main__":
    main()
