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


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "spilled"),
    [
        (64, 8, BF16, (0, 0, 0, 104)),
        (64, 16, BF16, (0, 0, 0, 16)),
        (64, 32, BF16, (8, 32, 32, 56)),
        (128, 8, BF16, (0, 32, 8, 168)),
        (128, 16, BF16, (0, 0, 32, 200)),
        (128, 32, BF16, (56, 80, 352, 184)),
        (256, 8, BF16, (0, 176, 448, 0)),
        (64, 16, FP32, (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_chosen_tiles(
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    spilled: tuple[int, int, int, int],
    table: bool,
    tmp_path: Path,
) -> None:
    """spilled: bytes a thread, forward, backward without the slots' gradients, with them, adding
    to them in float32.

    Two programs or more share an SM, or loads would wait for one program's products.
    """
    what: dict[str, Any] = dict(head_dim=head_dim, group=group, dtype=dtype, capability=(9, 0))
    assert configs.products(head_dim=head_dim, group=group, dtype=dtype) == "matrix"
    constants: dict[str, Any] = dict(
        GROUP=group, HEADS=configs.product_heads(group), HEAD_DIM=head_dim,
        PADDED_DIM=configs.padded(head_dim), COLUMNS=8, TABLE=table, UNIFORM=True, ALIGN=16,
        SLOT_ALIGN=16, ASK=True, EMULATED=False,
    )  # fmt: skip
    forward_rows = ["query", "sequence_out", "out", "key", "value"]
    backward_rows = ["query", "out", "grad_out", "sequence_grad_query", "grad_query", "key",
                     "value", "grad_key", "grad_value"]  # fmt: skip
    forward = depth_forward.depth_forward_kernel, forward_rows, ["sequence_lse", "lse"]
    backward = depth_backward.depth_backward_kernel, backward_rows, ["lse", "delta_out"]
    adding_rows, adding_numbers = backward_rows[:-2], [*backward[2], *backward_rows[-2:]]
    adding = depth_backward.depth_backward_kernel, adding_rows, adding_numbers
    gradients = dict(
        PADDED_GROUP=configs.padded(group), GRADIENTS=True, ACCUMULATE=False, GRAD_ALIGN=16,
        grad_stride_dim=1,
    )  # fmt: skip
    for (kernel, rows, numbers), tile, own, most in zip(
        (forward, backward, backward, adding),
        (
            configs.forward_tile(**what, table=table),
            configs.query_tile(**what, table=table),
            configs.backward_tile(**what, accumulate=False),
            configs.backward_tile(**what, accumulate=True),
        ),
        ({}, gradients | dict(GRADIENTS=False), gradients, gradients | dict(ACCUMULATE=True)),
        spilled,
        strict=True,
    ):
        made = compile_for_h100(
            kernel,
            pointers(dtype, rows, numbers),
            constants | own | dict(ROWS=tile.rows, SLOTS=tile.slots),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
        used = resources(made, tmp_path)
        assert used["STACK"] + used["LOCAL"] <= most
        assert 2 * used["REG"] * 32 * tile.warps <= REGISTERS
        assert 2 * made.metadata.shared <= SHARED


def test_columns_of_heads_are_what_tensor_cores_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert [configs.product_heads(group) for group in (1, 5, 8, 9, 32)] == [8, 8, 8, 16, 32]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [configs.product_heads(group) for group in (1, 8, 17)] == [16, 16, 32]
