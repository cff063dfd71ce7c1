"""Check whole converted models on this machine's GPU against the float64 oracle, and print a table.

    PYTHONPATH=. python benchmarks/check_model.py [--only NAME ...]

Models are the random stacks of ``moda_compile.testing`` moved to the GPU: float32 and bfloat16,
every ffn_kv, compiled by Inductor. Exits 1 if any comparison fails.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from moda_compile import MoDAConfig
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


def main() -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=STACKS, default=list(STACKS))
    chosen = parser.parse_args().only
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    print(torch.cuda.get_device_name(), torch.__version__)
    failed = 0
    for name, config in ((name, STACKS[name]) for name in chosen):
        for dtype in (torch.float32, torch.bfloat16):
            for ffn_kv in ("none", "projected", "shared"):
                model = RandomStack(config).to("cuda", dtype)
                inputs = tuple(x.cuda() for x in config.inputs())
                start = time.perf_counter()
                try:
                    options = MoDAConfig(ffn_kv=ffn_kv)
                    result = check_conversion(model, inputs, options, backend="inductor")
                    worst = max(c.error / (c.eager_error + c.budget) for c in result)
                    verdict = f"ok    worst error / allowed {worst:.2f}"
                except Exception as error:  # one failure must not hide the others
                    failed += 1
                    verdict = f"FAIL  {type(error).__name__}: {str(error)[:300]}"
                seconds = time.perf_counter() - start
                print(f"{name:12s} {str(dtype)[6:]:9s} {ffn_kv:10s} {seconds:5.1f} s  {verdict}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
