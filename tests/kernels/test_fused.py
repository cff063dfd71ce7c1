"""The fused kernels: their tiles, and what the compiler makes of them.

Their results are tested in test_interpreter.py, when they are chosen in test_choose.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moda_compile.kernels import configs, fused_backward, fused_forward, launch  # noqa: E402
from tests.kernels.compiled import POINTERS, compile_for_h100  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEAD_DIMS = (1, 16, 64, 70, 76, 80, 96, 128, 192, 256)
compiled_only = pytest.mark.skipif(launch.EMULATED, reason="the kernels are interpreted")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_product_has_enough_rows(dtype: torch.dtype) -> None:
    for head_dim in HEAD_DIMS:
        for group in (1, 2, 3, 7, 8, 20, 32, 100):
            tile = configs.fused_tile(
                head_dim=head_dim, group=group, dtype=dtype, capability=(9, 0)
            )
            assert tile.tokens * configs.power_of_two(group) >= 16
            assert tile.tokens & (tile.tokens - 1) == 0
            assert tile.keys >= 16


def test_power_of_two() -> None:
    assert [configs.power_of_two(n) for n in (1, 2, 3, 4, 5, 32, 33)] == [1, 2, 4, 4, 8, 32, 64]


def compile_kernel(kernel: Any, dtype: torch.dtype, head_dim: int, group: int, **own: Any) -> Any:
    tile = configs.fused_tile(head_dim=head_dim, group=group, dtype=dtype, capability=(9, 0))
    constants = dict(
        GROUP=group, PADDED_GROUP=configs.power_of_two(group), HEAD_DIM=head_dim,
        PADDED_DIM=configs.padded(head_dim), TOKENS=tile.tokens, KEYS=tile.keys,
        ALIGN=8 if head_dim == 76 else 16, EMULATED=False, COLUMNS=8, TABLE=True, UNIFORM=True,
    ) | own  # fmt: skip
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    pointers: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name.endswith("_strides"):
            counts = {"mask_strides": 4, "gradient_strides": 5}
            count = 4 if name.startswith("slot") else counts.get(name, 3)
            pointers[name] = ("i32",) * count
        elif name in ("lse", "delta", "delta_out") or name.startswith("grad_slot"):
            pointers[name] = "*fp32"
        elif name == "table":
            pointers[name] = "*i64"
        elif name == "mask":
            pointers[name] = "*i1" if own["MASKED"] else POINTERS[dtype]
        elif name not in ("queries", "keys", "slots", "kv_heads", "scale") and name.islower():
            pointers[name] = POINTERS[dtype]
    return compile_for_h100(
        kernel, pointers, constants, num_warps=tile.warps, num_stages=tile.stages
    )


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "masked"),
    [(BF16, 64, 1, False), (FP16, 76, 3, True), (BF16, 256, 8, False), (FP32, 64, 2, True)],
    ids=str,
)
def test_compile_for_an_h100(dtype: torch.dtype, head_dim: int, group: int, masked: bool) -> None:
    flags = dict(CAUSAL=not masked, MASKED=masked)
    kernels = (
        (fused_forward.fused_forward_kernel, {}),
        (fused_backward.fused_query_kernel, dict(GRADIENTS=True, ACCUMULATE=True)),
        (fused_backward.fused_query_kernel, dict(GRADIENTS=False, ACCUMULATE=False)),
        (fused_backward.fused_key_kernel, {}),
    )
    for kernel, own in kernels:
        made = compile_kernel(kernel, dtype, head_dim, group, **flags, **own)
        assert made.metadata.shared <= 99 * 1024  # what the smallest GPUs since 8.0 have
        assert "tt.dot" in made.asm["ttir"]
