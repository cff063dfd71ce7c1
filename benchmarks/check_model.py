"""Check whole converted models on this machine's GPU against the float64 oracle, and print a table.

    PYTHONPATH=. python benchmarks/check_model.py [--only TEXT] [--jobs N]

Models are the random stacks of ``moda_compile.testing`` moved to the GPU: float32 and bfloat16,
every ffn_kv, compiled by Inductor. Exits with 1 if any comparison fails.
"""

from __future__ import annotations

import itertools
from functools import partial

import checking
import torch

from moda_compile import MoDAConfig
from moda_compile.config import FFNKV
from moda_compile.testing import RandomStack, StackConfig, check_conversion

STACKS = {
    "gqa-rotary": StackConfig(
        layers=4, kv_heads=2, groups=2, head_dim=64, rotary="half", norm="rms", length=129, batch=2
    ),
    "mha-fused": StackConfig(
        layers=3, kv_heads=4, groups=1, head_dim=32, projection="chunk", bias=True, length=65
    ),
    "odd-dim": StackConfig(layers=3, kv_heads=2, groups=3, head_dim=24, mask="none", length=33),
    "latent": StackConfig(layers=3, kv_heads=4, head_dim=48, value_dim=32, length=65, batch=2),
    "padded": StackConfig(layers=3, head_dim=32, mask="padding_left_causal", length=65, batch=3),
    "learned-bias": StackConfig(layers=3, head_dim=32, mask="bias_causal", length=65, batch=3),
}


def check(name: str, dtype: torch.dtype, ffn_kv: FFNKV) -> str:
    """The row of a model; raises if a comparison fails."""
    config = STACKS[name]
    model = RandomStack(config).to("cuda", dtype)
    inputs = tuple(x.cuda() for x in config.inputs())
    result = check_conversion(model, inputs, MoDAConfig(ffn_kv=ffn_kv), backend="inductor")
    worst = max(c.error / (c.eager_error + c.budget) for c in result)
    return f"worst error / allowed {worst:.2f}"


def checks() -> list[checking.Check]:
    """All of them."""
    ways: tuple[FFNKV, ...] = ("none", "projected", "shared")
    return [
        (f"{name:12s} {str(dtype)[6:]:9s} {way:10s}", partial(check, name, dtype, way))
        for name, dtype, way in itertools.product(STACKS, (torch.float32, torch.bfloat16), ways)
    ]


claims = partial(
    checking.claim,
    "converted models through Inductor, fp32 and bf16, every `ffn_kv`, also padded and with a "
    "learned bias",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
