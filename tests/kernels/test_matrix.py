"""The matrix kernels of the depth part, compiled for an H100: what their chosen tiles take.

Their results are tested in test_interpreter.py, which of the two kinds is chosen in test_vector.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moda_compile.kernels import configs, depth_backward, depth_forward, launch  # noqa: E402
from tests.kernels.compiled import POINTERS, compile_for_h100, resources  # noqa: E402

pytestmark = pytest.mark.skipif(launch.EMULATED, reason="the kernels are interpreted")

BF16, FP32 = torch.bfloat16, torch.float32
SHARED = 227 * 1024  # bytes of shared memory that an SM has for programs
REGISTERS = 64 * 1024


def pointers(dtype: torch.dtype, rows: list[str], numbers: list[str]) -> dict[str, str]:
    kind = POINTERS[dtype]
    return {"table": "*i64"} | dict.fromkeys(rows, kind) | dict.fromkeys(numbers, "*fp32")


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "spilled"),
    [
        (64, 8, BF16, (0, 0)),
        (64, 32, BF16, (16, 16)),
        (128, 8, BF16, (0, 80)),
        (128, 32, BF16, (0, 128)),
        (256, 8, BF16, (0, 0)),
        (64, 16, FP32, (0, 0)),
    ],
    ids=str,
)
def test_chosen_tiles(
    head_dim: int, group: int, dtype: torch.dtype, spilled: tuple[int, int], tmp_path: Path
) -> None:
    """spilled: bytes a thread, forward and backward. Two programs or more share an SM, or loads
    would wait for one program's products.
    """
    what: dict[str, Any] = dict(head_dim=head_dim, group=group, dtype=dtype, capability=(9, 0))
    assert configs.products(head_dim=head_dim, group=group, dtype=dtype) == "matrix"
    constants: dict[str, Any] = dict(
        GROUP=group, PADDED_GROUP=configs.padded(group), HEAD_DIM=head_dim,
        PADDED_DIM=configs.padded(head_dim), COLUMNS=8, TABLE=True, UNIFORM=True, ALIGN=16,
        SLOT_ALIGN=16, EMULATED=False,
    )  # fmt: skip
    for kernel, tile, rows, numbers, own, bytes_spilled in (
        (
            depth_forward.depth_forward_kernel,
            configs.forward_tile(**what),
            ["query", "sequence_out", "out", "key", "value"],
            ["sequence_lse", "lse"],
            {},
            spilled[0],
        ),
        (
            depth_backward.depth_backward_kernel,
            configs.backward_tile(**what),
            ["query", "out", "grad_out", "sequence_grad_query", "grad_query", "key", "value",
             "grad_key", "grad_value"],
            ["lse", "delta_out"],
            dict(GRADIENTS=True, ACCUMULATE=False, GRAD_ALIGN=16, grad_stride_dim=1),
            spilled[1],
        ),
    ):  # fmt: skip
        made = compile_for_h100(
            kernel,
            pointers(dtype, rows, numbers),
            constants | own | dict(TOKENS=tile.tokens, SLOTS=tile.slots),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        used = resources(made, tmp_path)
        assert used["STACK"] + used["LOCAL"] <= bytes_spilled
        assert 2 * used["REG"] * 32 * tile.warps <= REGISTERS
        assert 2 * made.metadata.shared <= SHARED
