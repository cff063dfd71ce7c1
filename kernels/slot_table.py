"""Where the depth slots lie: one strided tensor, or a device table of one row a slot.

In a model every slot is another layer's own K and V, each with its own address and strides (a slice
of a fused QKV projection, say). Copying them together would cost memory and traffic quadratic in
depth, so the kernels read an int64 table on the device instead. The table is written by a kernel
that gets the addresses as launch arguments: a copy from the host would not survive in a CUDA graph.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import launch, tiles

ROWS = 16
"""Slots written by one launch of `fill_rows_kernel`."""

MOST_LISTED = 32
"""Slots whose addresses a kernel can take as arguments instead of a table; see `listed`."""

_Strides = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The depth slots of one attention call, as the kernels take them.

    key, value: the stacked tensors [S, B, Hk, T, d]; for a table, tensors of the slots' element
        type, never read. table: int64 [S, 8] (see `tiles.TABLE_COLUMNS`); for stacked slots a
        tensor that is never read. key_strides, value_strides: (slot, batch, head, token), in
        elements; of a table only those of UNIFORM tables count. align: bytes that divide every
        row's address. addresses: of `listed` slots, which have no table: all keys', then all
        values'. keep: tensors that must outlive the launch.
    """

    count: int
    kv_heads: int
    key: Tensor
    value: Tensor
    table: Tensor
    key_strides: _Strides
    value_strides: _Strides
    is_table: bool
    is_uniform: bool
    align: int
    traced: bool
    addresses: tuple[int, ...] = ()
    keep: tuple[Tensor, ...] = field(default=(), repr=False)


def stacked(depth_k: Tensor, depth_v: Tensor) -> Slots:
    """Slots that are one strided tensor a side.

    Args:
        depth_k, depth_v: [S, B, Hk, T, d], any strides.
    """
    depth_k, depth_v = launch.unit_rows(depth_k), launch.unit_rows(depth_v)
    return Slots(
        count=depth_k.shape[0],
        kv_heads=depth_k.shape[2],
        key=depth_k,
        value=depth_v,
        table=depth_k,
        key_strides=tuple(depth_k.stride()[:4]),
        value_strides=tuple(depth_v.stride()[:4]),
        is_table=False,
        is_uniform=True,
        align=launch.alignment(depth_k, depth_v),
        traced=launch.is_traced(depth_k),
    )


@triton.jit
def _put_row(table, live, row, key, value, kb, kh, kt, vb, vh, vt, COLUMNS: tl.constexpr):
    entry = table + row * COLUMNS
    tl.store(entry, tl.cast(key, tl.int64), mask=live)
    tl.store(entry + 1, tl.cast(kb, tl.int64), mask=live)
    tl.store(entry + 2, tl.cast(kh, tl.int64), mask=live)
    tl.store(entry + 3, tl.cast(kt, tl.int64), mask=live)
    tl.store(entry + 4, tl.cast(value, tl.int64), mask=live)
    tl.store(entry + 5, tl.cast(vb, tl.int64), mask=live)
    tl.store(entry + 6, tl.cast(vh, tl.int64), mask=live)
    tl.store(entry + 7, tl.cast(vt, tl.int64), mask=live)


_PARAMETERS = ["table", "count", "kb", "kh", "kt", "vb", "vh", "vt"]
_PARAMETERS += [f"{name}{i}" for i in range(ROWS) for name in ("r", "k", "v")]


# Addresses and strides are plain numbers that differ from call to call: specialising the compiled
# kernel on their divisibility would only compile it again and again.
@triton.jit(do_not_specialize=_PARAMETERS)
def fill_rows_kernel(
    table, count, kb, kh, kt, vb, vh, vt,
    r0, k0, v0, r1, k1, v1, r2, k2, v2, r3, k3, v3,
    r4, k4, v4, r5, k5, v5, r6, k6, v6, r7, k7, v7,
    r8, k8, v8, r9, k9, v9, r10, k10, v10, r11, k11, v11,
    r12, k12, v12, r13, k13, v13, r14, k14, v14, r15, k15, v15,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write up to 16 rows of equal strides: for each its number, key and value address."""
    _put_row(table, count > 0, r0, k0, v0, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 1, r1, k1, v1, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 2, r2, k2, v2, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 3, r3, k3, v3, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 4, r4, k4, v4, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 5, r5, k5, v5, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 6, r6, k6, v6, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 7, r7, k7, v7, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 8, r8, k8, v8, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 9, r9, k9, v9, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 10, r10, k10, v10, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 11, r11, k11, v11, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 12, r12, k12, v12, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 13, r13, k13, v13, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 14, r14, k14, v14, kb, kh, kt, vb, vh, vt, COLUMNS)
    _put_row(table, count > 15, r15, k15, v15, kb, kh, kt, vb, vh, vt, COLUMNS)


def table(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> Slots:
    """Slots that are separate tensors: builds their table on the device, in ceil(S / 16) launches
    for each distinct pair of strides (one in most models).

    Args:
        depth_k, depth_v: S >= 1 tensors [B, Hk, T, d] of one shape, dtype and device; any strides.
    """
    keys = [launch.unit_rows(x) for x in depth_k]
    values = [launch.unit_rows(x) for x in depth_v]
    rows = torch.empty((len(keys), tiles.TABLE_COLUMNS), dtype=torch.int64, device=keys[0].device)
    groups: dict[_Strides, list[int]] = {}
    for slot, (key, value) in enumerate(zip(keys, values, strict=True)):
        groups.setdefault(_strides(key) + _strides(value), []).append(slot)
    with launch.on_device(rows):
        for strides, members in groups.items():
            for first in range(0, len(members), ROWS):
                chunk = members[first : first + ROWS]
                arguments: list[int] = []
                for slot in chunk:
                    arguments += (slot, keys[slot].data_ptr(), values[slot].data_ptr())
                # The unused rows repeat the chunk's first: same argument types, masked out.
                arguments += arguments[:3] * (ROWS - len(chunk))
                fill_rows_kernel[(1,)](
                    rows, len(chunk), *strides, *arguments, COLUMNS=tiles.TABLE_COLUMNS, num_warps=1
                )
    strides = next(iter(groups))
    return Slots(
        count=len(keys),
        kv_heads=keys[0].shape[1],
        key=keys[0],
        value=values[0],
        table=rows,
        key_strides=(0, *strides[:3]),
        value_strides=(0, *strides[3:]),
        is_table=True,
        is_uniform=len(groups) == 1,
        align=launch.alignment(*keys, *values),
        traced=False,
        keep=(*keys, *values),
    )


def listed(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> Slots:
    """Slots that are separate tensors, for a kernel that can take their addresses as arguments: no
    table has to be written. More than `MOST_LISTED`, or slots of different strides, get a table.

    Args:
        depth_k, depth_v: as for `table`.
    """
    keys = [launch.unit_rows(x) for x in depth_k]
    values = [launch.unit_rows(x) for x in depth_v]
    strides = {_strides(key) + _strides(value) for key, value in zip(keys, values, strict=True)}
    if len(keys) > MOST_LISTED or len(strides) > 1:
        return table(keys, values)
    (own,) = strides
    addresses = [[x.data_ptr() for x in side] for side in (keys, values)]
    # The rest repeats the first: same argument types, never read.
    padded = [x + x[:1] * (MOST_LISTED - len(x)) for x in addresses]
    return Slots(
        count=len(keys),
        kv_heads=keys[0].shape[1],
        key=keys[0],
        value=values[0],
        table=keys[0],
        key_strides=(0, *own[:3]),
        value_strides=(0, *own[3:]),
        is_table=False,
        is_uniform=True,
        align=launch.alignment(*keys, *values),
        traced=False,
        addresses=(*padded[0], *padded[1]),
        keep=(*keys, *values),
    )


def none(like: Tensor) -> Slots:
    """No slots, for a kernel that takes them all the same. like: [B, Hk, T, d], never read."""
    return Slots(
        count=0,
        kv_heads=like.shape[1],
        key=like,
        value=like,
        table=like,
        key_strides=(0,) * 4,
        value_strides=(0,) * 4,
        is_table=False,
        is_uniform=True,
        align=16,
        traced=launch.is_traced(like),
    )


def _strides(x: Tensor) -> _Strides:
    """(batch, head, token) strides; 0 where the size is 1, so that equal layouts compare equal."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
