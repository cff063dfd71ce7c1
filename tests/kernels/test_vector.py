"""The vector kernels of the depth part: when they are chosen, and what the compiler makes of them.

Their results are tested in test_interpreter.py, how they are traced in test_tracing.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moda_compile.kernels import (  # noqa: E402
    configs,
    depth_backward_vector,
    depth_forward_vector,
    depth_gather,
    launch,
)
from tests.kernels.compiled import POINTERS, accesses_of, compile_for_h100, resources  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEAD_DIMS = (1, 16, 64, 70, 76, 80, 96, 128, 192, 256)


def test_small_groups_are_multiplied_without_tensor_cores() -> None:
    def chosen(group: int, head_dim: int, dtype: torch.dtype) -> str:
        return configs.products(head_dim=head_dim, group=group, dtype=dtype)

    for head_dim in HEAD_DIMS:
        for dtype in (BF16, FP16, FP32):
            assert all(chosen(group, head_dim, dtype) == "vector" for group in (1, 2, 3, 4))
            assert chosen(16, head_dim, dtype) == "matrix"
        assert chosen(8, head_dim, BF16) == "matrix"
    assert chosen(8, 128, FP32) == "vector"
    assert chosen(8, 256, FP32) == "matrix"


def test_many_slots_of_a_group_of_four_are_read_with_tensor_cores() -> None:
    def chosen(group: int, dtype: torch.dtype) -> str:
        return configs.products(head_dim=64, group=group, dtype=dtype, many=True)

    assert chosen(4, BF16) == "matrix"
    assert chosen(3, BF16) == chosen(4, FP32) == "vector"


def test_no_two_warps_share_a_row() -> None:
    forward = configs.vector_forward_tile
    adding, writing = (partial(configs.vector_backward_tile, accumulate=x) for x in (True, False))
    for choose in (forward, adding, writing):
        for head_dim in HEAD_DIMS:
            for width in (1, 2, 4, 8):
                for group in (1, 4, 8):
                    tile = choose(
                        head_dim=head_dim, group=group, dtype=BF16, width=width, capability=(9, 0)
                    )
                    assert tile.rows & (tile.rows - 1) == 0
                    assert tile.warps <= tile.rows
                    if tile.warps > 1:
                        assert configs.padded(head_dim) <= 32 * width * (1 + (choose is forward))


def test_nothing_is_copied_ahead_where_programs_would_wait_for_it() -> None:
    full: dict[str, Any] = dict(head_dim=64, group=2, dtype=FP16, width=8)
    choices: list[Any] = [
        configs.vector_forward_tile,
        configs.vector_query_tile,
        partial(configs.vector_backward_tile, accumulate=False),
        partial(configs.gather_tile, slots=2),
    ]
    for choose in choices:
        assert copied(choose(**full, capability=(8, 0)))
        assert not copied(choose(**full, capability=(7, 5)))
        assert not copied(choose(**full | {"width": 4}, capability=(8, 0)))
    assert not copied(configs.gather_tile(**full, capability=(8, 0), slots=4))
    adding = configs.vector_backward_tile(**full, capability=(8, 0), accumulate=True)
    assert not copied(adding)


# Without a GPU the compiler still says whether it takes a kernel, and with what resources.

compiled_only = pytest.mark.skipif(launch.EMULATED, reason="the kernels are interpreted")


def constants(head_dim: int, group: int, tile: configs.Tile, table: bool) -> dict[str, Any]:
    return dict(
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=configs.padded(head_dim), ROWS=tile.rows,
        SLOTS=tile.slots, STAGES=tile.stages, COLUMNS=8, COPIES=128, TABLE=table, UNIFORM=True,
    )  # fmt: skip


def options(tile: configs.Tile) -> dict[str, int]:
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {"num_warps": tile.warps} | limit


def copied(tile: configs.Tile) -> bool:
    """What a step reads is copied to shared memory before."""
    return tile.stages > 2


def check_copies(
    made: Any, tile: configs.Tile, reads: int, head_dim: int, dtype: torch.dtype, rest: int
) -> None:
    """16 bytes at a time, in the loop and for each step before it; nothing where it is not copied.

    reads: tiles that a step reads. rest: bytes of shared memory that are used otherwise.
    """
    size = tile.rows * configs.padded(head_dim) * dtype.itemsize
    reads = reads * copied(tile)
    copies = made.asm["ptx"].count("cp.async.cg.shared.global")
    assert copies == tile.stages * reads * size // (16 * 32 * tile.warps)
    kept = (tile.stages - 1) * reads * size
    numbers = (tile.stages - 1) * 512 * copied(tile)  # addresses of the slots, lse, delta
    assert kept <= made.metadata.shared <= kept + numbers + rest


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "table", "registers"),
    [
        (BF16, 64, 1, True, 64),
        (BF16, 64, 3, True, 128),
        (BF16, 64, 4, False, 128),
        (BF16, 76, 1, True, 80),
        (BF16, 80, 2, True, 96),
        (FP16, 128, 2, True, 64),
        (BF16, 256, 4, True, 128),
        (FP32, 64, 2, True, 64),
        (FP32, 64, 8, True, 128),
    ],
    ids=str,
)
def test_forward_compiles_for_an_h100(
    dtype: torch.dtype, head_dim: int, group: int, table: bool, registers: int, tmp_path: Path
) -> None:
    align = 8 if head_dim == 76 else 16
    width = align // dtype.itemsize
    tile = configs.vector_forward_tile(
        head_dim=head_dim, group=group, dtype=dtype, width=width, capability=(9, 0)
    )
    names = ("query", "sequence_out", "out", "key", "value")
    pointers = dict.fromkeys(names, POINTERS[dtype])
    pointers |= dict.fromkeys(("sequence_lse", "lse"), "*fp32")
    pointers["table"] = "*i64" if table else POINTERS[dtype]
    made = compile_for_h100(
        depth_forward_vector.depth_forward_vector_kernel,
        pointers,
        constants(head_dim, group, tile, table) | dict(ALIGN=align, SLOT_ALIGN=align),
        **options(tile),
    )
    # Loads as wide as the rows allow: of q and out for each head, of K and V for each slot.
    access = "ld.global.v4.b32" if align == 16 else "ld.global.v2.b32"
    steps = min(tile.stages, 2)  # the first step's, and in the loop the next one's
    accesses = tile.rows * configs.padded(head_dim) // (32 * tile.warps * width)
    expected = 2 * (group + (0 if copied(tile) else steps * tile.slots)) * accesses
    assert accesses_of(made, access) == expected
    # None of it is read again soon.
    assert made.asm["ptx"].count("ld.global.L1::evict_first") == expected
    check_copies(made, tile, 2 * tile.slots, head_dim, dtype, rest=4 * tile.rows)
    assert "tt.dot" not in made.asm["ttgir"]
    # Only a head's lse changes threads, to be stored.
    assert made.asm["ttgir"].count("ttg.convert_layout") <= group
    used = resources(made, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= registers


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "accumulator", "head_dim", "group", "table", "registers"),
    [
        (BF16, FP32, 64, 1, True, 96),
        (BF16, FP32, 64, 3, True, 128),
        (BF16, BF16, 64, 4, True, 128),
        (BF16, FP32, 76, 1, True, 96),
        (FP16, None, 128, 2, False, 128),
        (BF16, None, 64, 4, True, 168),
        (BF16, FP32, 256, 4, True, 224),
        (FP32, FP32, 64, 8, True, 224),
        (BF16, "delta", 64, 1, True, 64),
        (BF16, "delta", 76, 1, True, 80),
        (BF16, "delta", 80, 1, True, 80),
        (FP16, "delta", 128, 2, True, 80),
        (BF16, "delta", 64, 3, True, 128),
        (BF16, "delta", 64, 4, True, 168),
        (FP16, "delta", 76, 4, True, 128),
    ],
    ids=str,
)
def test_backward_compiles_for_an_h100(
    dtype: torch.dtype,
    accumulator: torch.dtype | str | None,  # "delta": the slots' gradients are left out
    head_dim: int,
    group: int,
    table: bool,
    registers: int,
    tmp_path: Path,
) -> None:
    adding = isinstance(accumulator, torch.dtype)
    grad = accumulator if isinstance(accumulator, torch.dtype) else dtype
    width = min((8 if head_dim == 76 else 16) // dtype.itemsize, 16 // grad.itemsize)
    choose: Any = configs.vector_query_tile
    if accumulator != "delta":
        choose = partial(configs.vector_backward_tile, accumulate=adding)
    tile = choose(head_dim=head_dim, group=group, dtype=dtype, width=width, capability=(9, 0))
    names = ("query", "out", "grad_out", "sequence_grad_query", "grad_query", "key", "value")
    pointers = dict.fromkeys(names, POINTERS[dtype]) | {"lse": "*fp32", "delta_out": "*fp32"}
    pointers |= dict.fromkeys(("grad_key", "grad_value"), POINTERS[grad])
    pointers["table"] = "*i64" if table else POINTERS[dtype]
    aligned = dict.fromkeys(("ALIGN", "SLOT_ALIGN"), width * dtype.itemsize)
    aligned["GRAD_ALIGN"] = width * grad.itemsize
    own = dict(ACCUMULATE=adding, GRADIENTS=accumulator != "delta", grad_stride_dim=1)
    made = compile_for_h100(
        depth_backward_vector.depth_backward_vector_kernel,
        pointers,
        constants(head_dim, group, tile, table) | aligned | own,
        **options(tile),
    )
    assert "tt.dot" not in made.asm["ttgir"]
    # Also beside float32 gradients every element stays in its thread; delta moves to be stored.
    moved = group if accumulator == "delta" else 0
    assert made.asm["ttgir"].count("ttg.convert_layout") == moved
    check_copies(made, tile, 2 * tile.slots, head_dim, dtype, rest=4 * tile.rows if moved else 0)
    used = resources(made, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= registers


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "made_in", "head_dim", "group", "slots", "begun", "going_on", "registers"),
    [
        (BF16, BF16, 64, 1, 2, 0, False, 160),
        (BF16, FP32, 64, 1, 1, 0, False, 80),
        (BF16, BF16, 76, 1, 2, 0, False, 96),
        (BF16, BF16, 80, 1, 2, 0, False, 128),
        (BF16, BF16, 64, 2, 1, 0, False, 128),
        (BF16, BF16, 64, 3, 2, 0, False, 128),
        (FP16, FP16, 128, 2, 2, 0, False, 128),
        (BF16, BF16, 64, 4, 2, 0, False, 168),
        (BF16, BF16, 76, 4, 2, 0, False, 128),
        (FP32, FP32, 64, 2, 2, 0, False, 128),
        (BF16, BF16, 64, 1, 4, 2, False, 128),
        (BF16, BF16, 64, 2, 4, 2, False, 168),
        (FP16, FP16, 76, 3, 4, 2, False, 168),
        (BF16, BF16, 128, 4, 4, 2, False, 168),
        (FP32, FP32, 64, 2, 4, 2, False, 176),
        (BF16, BF16, 64, 1, 2, 0, True, 80),
        (BF16, BF16, 128, 2, 2, 0, True, 128),
    ],
    ids=str,
)
def test_gather_compiles_for_an_h100(
    dtype: torch.dtype,
    made_in: torch.dtype,
    head_dim: int,
    group: int,
    slots: int,
    begun: int,
    going_on: bool,
    registers: int,
    tmp_path: Path,
) -> None:
    width = min((8 if head_dim == 76 else 16) // dtype.itemsize, 16 // made_in.itemsize)
    width = min(width, 4) if begun or going_on else width  # sums of 16 bytes
    tile = configs.gather_tile(
        head_dim=head_dim, group=group, dtype=dtype, width=width, capability=(9, 0), slots=slots
    )
    own = POINTERS[dtype]
    pointers: dict[str, Any] = dict.fromkeys(("query", "grad_out"), own)
    pointers |= dict.fromkeys(("lse", "delta"), "*fp32")
    pointers |= dict.fromkeys(("rows_table", "numbers_table"), "*i64")
    pointers["gradients"] = POINTERS[made_in]
    places = ("first", "second", "third", "fourth")
    sides = [f"{place}_{side}" for place in places for side in ("key", "value")]
    pointers |= dict.fromkeys(sides, own)
    # Only the first slot's own layer has run by then.
    starts = {f"{side}_start": POINTERS[made_in] for side in sides if side.startswith("first")}
    pointers |= starts
    pointers |= {"sums": "*fp32"} if begun else {}
    pointers |= {"partials": "*fp32"} if going_on else {}
    constants = dict(
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=configs.padded(head_dim), ROWS=tile.rows,
        SLOTS=slots, UNFINISHED=begun, READERS=tile.slots, STAGES=tile.stages, COLUMNS=8,
        COPIES=128, ROWS_UNIFORM=True,
        NUMBERS_UNIFORM=True, ALIGN=width * dtype.itemsize, GRAD_ALIGN=width * made_in.itemsize,
        SUM_ALIGN=width * FP32.itemsize,
    )  # fmt: skip
    optional = ("sums", "partials", *(f"{side}_start" for side in sides))
    constants |= {name: None for name in optional if name not in pointers}
    made = compile_for_h100(depth_gather.depth_gather_kernel, pointers, constants, **options(tile))
    assert "tt.dot" not in made.asm["ttgir"]
    assert "ttg.convert_layout" not in made.asm["ttgir"]
    elements = tile.rows * configs.padded(head_dim) // (32 * tile.warps)  # of a tile in a thread
    width = min(width, elements)
    accesses = elements // width
    # K and V of each slot; q and do of a step's readers, before the loop and in it.
    heads = tile.slots * group
    read = {width * dtype.itemsize: 2 * (slots + 2 * heads * (not copied(tile)))}
    check_copies(made, tile, 2 * heads, head_dim, dtype, rest=0)
    # What the first slot's gradients are added to, and what the sums start from.
    for count, size in ((2, made_in.itemsize), (2 * slots * going_on, FP32.itemsize)):
        read[width * size] = read.get(width * size, 0) + count
    for size, access in ((16, "ld.global.v4.b32"), (8, "ld.global.v2.b32")):
        # Numbers of 32 bytes a thread are read in two accesses.
        expected = read.get(size, 0) + (2 * read.get(32, 0) if size == 16 else 0)
        assert accesses_of(made, access) == expected * accesses
    # Four numbers of each of the sums that are left are written at once.
    assert made.asm["ptx"].count("st.global.v4.b32") >= 2 * begun * accesses
    used = resources(made, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= registers
