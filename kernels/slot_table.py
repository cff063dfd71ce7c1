"""Where the depth slots lie: one strided tensor, or a device table of one row a slot.

In a model every slot is another layer's own K and V, each with its own address and strides (a slice
of a fused QKV projection, say). Copying them together would cost memory and traffic quadratic in
depth, so the kernels read an int64 table on the device instead. The table is written by a kernel
that gets the addresses as launch arguments: a copy from the host would not survive in a CUDA graph.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import launch, tiles

ROWS = 32
"""Slots written by one launch of `fill_rows_kernel`, or whose addresses a kernel can take as
arguments of its own instead of a table; see `listed`."""

NAMED = tiles.TABLE_ROWS
"""The most slots that a kernel can be given themselves, as arguments; see `named`."""

# For each number of rows a kernel is compiled, and each of its programs writes them all; see
# `tiles.write_table`, which takes groups of eight.
_NAMED_STEP = 8

_Strides = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The depth slots of one attention call, as the kernels take them.

    key, value: the stacked tensors [S, B, Hk, T, d]; for a table, tensors of the slots' element
        type, never read. table: int64 [S, 8] (see `tiles.TABLE_COLUMNS`); for stacked slots a
        tensor that is never read. key_strides, value_strides: (slot, batch, head, token), in
        elements; of a table only those of UNIFORM tables count. align: bytes that divide every
        row's address. addresses: of `listed` slots, which have no table: all keys', then all
        values'. named: of `named` slots, whose table the kernel itself writes: each slot's key and
        value in turn. keep: tensors that must outlive the launch.
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
    named: tuple[Tensor, ...] = field(default=(), repr=False)
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
def listed_number(
    place,
    a0, a1, a2, a3, a4, a5, a6, a7,
    a8, a9, a10, a11, a12, a13, a14, a15,
    a16, a17, a18, a19, a20, a21, a22, a23,
    a24, a25, a26, a27, a28, a29, a30, a31,
):  # fmt: skip
    """a0, a1, .. a31 (int64): the one at each of the places 0 .. 31."""
    low = _of_eight(place, a0, a1, a2, a3, a4, a5, a6, a7)
    second = _of_eight(place - 8, a8, a9, a10, a11, a12, a13, a14, a15)
    third = _of_eight(place - 16, a16, a17, a18, a19, a20, a21, a22, a23)
    high = _of_eight(place - 24, a24, a25, a26, a27, a28, a29, a30, a31)
    return tl.where(place < 16, tl.where(place < 8, low, second), tl.where(place < 24, third, high))


@triton.jit
def _of_eight(place, a0, a1, a2, a3, a4, a5, a6, a7):
    address = tl.where(place == 1, tl.cast(a1, tl.int64), tl.cast(a0, tl.int64))
    address = tl.where(place == 2, tl.cast(a2, tl.int64), address)
    address = tl.where(place == 3, tl.cast(a3, tl.int64), address)
    address = tl.where(place == 4, tl.cast(a4, tl.int64), address)
    address = tl.where(place == 5, tl.cast(a5, tl.int64), address)
    address = tl.where(place == 6, tl.cast(a6, tl.int64), address)
    return tl.where(place == 7, tl.cast(a7, tl.int64), address)


_PARAMETERS = ["table", "count", "kb", "kh", "kt", "vb", "vh", "vt"]
_PARAMETERS += [f"{name}{i}" for name in ("r", "k", "v") for i in range(ROWS)]


# Addresses and strides are plain numbers that differ from call to call: specialising the compiled
# kernel on their divisibility would only compile it again and again.
@triton.jit(do_not_specialize=_PARAMETERS)
def fill_rows_kernel(
    table, count, kb, kh, kt, vb, vh, vt,
    r0, r1, r2, r3, r4, r5, r6, r7,
    r8, r9, r10, r11, r12, r13, r14, r15,
    r16, r17, r18, r19, r20, r21, r22, r23,
    r24, r25, r26, r27, r28, r29, r30, r31,
    k0, k1, k2, k3, k4, k5, k6, k7,
    k8, k9, k10, k11, k12, k13, k14, k15,
    k16, k17, k18, k19, k20, k21, k22, k23,
    k24, k25, k26, k27, k28, k29, k30, k31,
    v0, v1, v2, v3, v4, v5, v6, v7,
    v8, v9, v10, v11, v12, v13, v14, v15,
    v16, v17, v18, v19, v20, v21, v22, v23,
    v24, v25, v26, v27, v28, v29, v30, v31,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write up to 32 rows of equal strides: for each its number, key and value address."""
    place = tl.arange(0, 32)
    row = listed_number(
        place,
        r0, r1, r2, r3, r4, r5, r6, r7,
        r8, r9, r10, r11, r12, r13, r14, r15,
        r16, r17, r18, r19, r20, r21, r22, r23,
        r24, r25, r26, r27, r28, r29, r30, r31,
    )  # fmt: skip
    key = listed_number(
        place,
        k0, k1, k2, k3, k4, k5, k6, k7,
        k8, k9, k10, k11, k12, k13, k14, k15,
        k16, k17, k18, k19, k20, k21, k22, k23,
        k24, k25, k26, k27, k28, k29, k30, k31,
    )  # fmt: skip
    value = listed_number(
        place,
        v0, v1, v2, v3, v4, v5, v6, v7,
        v8, v9, v10, v11, v12, v13, v14, v15,
        v16, v17, v18, v19, v20, v21, v22, v23,
        v24, v25, v26, v27, v28, v29, v30, v31,
    )  # fmt: skip
    live = place < count
    entry = table + row * COLUMNS
    tl.store(entry, key, mask=live)
    tl.store(entry + 1, tl.cast(kb, tl.int64), mask=live)
    tl.store(entry + 2, tl.cast(kh, tl.int64), mask=live)
    tl.store(entry + 3, tl.cast(kt, tl.int64), mask=live)
    tl.store(entry + 4, value, mask=live)
    tl.store(entry + 5, tl.cast(vb, tl.int64), mask=live)
    tl.store(entry + 6, tl.cast(vh, tl.int64), mask=live)
    tl.store(entry + 7, tl.cast(vt, tl.int64), mask=live)


@dataclass(frozen=True, kw_only=True)
class _Separate:
    """Slots that are separate tensors, read once: what the host does here it does for every slot of
    every layer in every step, and a step of few tokens is not much longer.

    keys, values: with rows of stride 1. addresses: of each slot, its key's and value's. groups:
    numbers of the slots of equal strides (batch, head, token), of keys and then of values.
    """

    keys: list[Tensor]
    values: list[Tensor]
    addresses: list[tuple[int, int]]
    groups: dict[_Strides, list[int]]
    align: int


def _separate(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> _Separate:
    sizes = depth_k[0].shape[:3]
    head_dim = depth_k[0].shape[3] if depth_k[0].dim() == 4 else 1
    keys, values = list(depth_k), list(depth_v)
    addresses: list[tuple[int, int]] = []
    found: dict[tuple[_Strides, _Strides], list[int]] = {}
    bits = 0  # set in some address
    for slot, (key, value) in enumerate(zip(keys, values, strict=True)):
        strides = key.stride(), value.stride()
        if head_dim > 1 and (strides[0][-1] != 1 or strides[1][-1] != 1):
            keys[slot], values[slot] = key, value = launch.unit_rows(key), launch.unit_rows(value)
            strides = key.stride(), value.stride()
        address = key.data_ptr(), value.data_ptr()
        bits |= address[0] | address[1]
        addresses.append(address)
        found.setdefault(strides, []).append(slot)
    groups: dict[_Strides, list[int]] = {}
    for (of_key, of_value), members in found.items():
        groups.setdefault(_strides(sizes, of_key) + _strides(sizes, of_value), []).extend(members)
    steps = [stride * keys[0].element_size() for strides in groups for stride in strides]
    return _Separate(
        keys=keys,
        values=values,
        addresses=addresses,
        groups=groups,
        # Of a power of two: the lowest bit that is set in any address decides.
        align=math.gcd(launch.WIDEST_ACCESS, bits, *steps),
    )


def table(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> Slots:
    """Slots that are separate tensors: builds their table on the device, in ceil(S / 32) launches
    for each distinct pair of strides (one in most models).

    Args:
        depth_k, depth_v: S >= 1 tensors [B, Hk, T, d] of one shape, dtype and device; any strides.
            Or [B, Hk, T], of one number a row.
    """
    return _table(_separate(depth_k, depth_v))


def _table(slots: _Separate) -> Slots:
    first_key = slots.keys[0]
    rows = torch.empty(
        (len(slots.keys), tiles.TABLE_COLUMNS), dtype=torch.int64, device=first_key.device
    )
    with launch.on_device(rows):
        for strides, members in slots.groups.items():
            for first in range(0, len(members), ROWS):
                chunk = members[first : first + ROWS]
                # The unused rows repeat the chunk's first: same argument types, masked out.
                padded = chunk + chunk[:1] * (ROWS - len(chunk))
                keys, values = zip(*[slots.addresses[slot] for slot in padded], strict=True)
                launch.launchable(fill_rows_kernel)[(1,)](
                    rows,
                    len(chunk),
                    *strides,
                    *padded,
                    *keys,
                    *values,
                    COLUMNS=tiles.TABLE_COLUMNS,
                    num_warps=1,
                )
    return _slots(slots, table=rows, is_table=True)


def listed(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> Slots:
    """Slots that are separate tensors, for a kernel that can take their addresses as arguments: no
    table has to be written. More than `ROWS`, or slots of different strides, get a table.

    Args:
        depth_k, depth_v: as for `table`.
    """
    slots = _separate(depth_k, depth_v)
    if len(slots.keys) > ROWS or len(slots.groups) > 1:
        return _table(slots)
    # The rest repeats the first: same argument types, never read.
    padded = slots.addresses + slots.addresses[:1] * (ROWS - len(slots.keys))
    keys, values = zip(*padded, strict=True)
    return _slots(slots, table=slots.keys[0], is_table=False, addresses=keys + values)


def named(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> Slots:
    """Slots that are separate tensors, for a launch that is traced: their addresses are not known.

    The kernel gets the slots themselves, so that a compiler knows for how long to keep them, and
    writes their addresses in the table before it reads it (`tiles.write_table`).

    Args:
        depth_k, depth_v: 1 to `NAMED` tensors as for `table`, the keys of equal strides and the
            values of equal strides, rows of stride 1.
    """
    key, value = depth_k[0], depth_v[0]
    # The rest repeats the first slot.
    missing = -len(depth_k) % _NAMED_STEP
    pairs = [*zip(depth_k, depth_v, strict=True), *[(key, value)] * missing]
    return Slots(
        count=len(depth_k),
        kv_heads=key.shape[1],
        key=key,
        value=value,
        table=key.new_empty((tiles.TABLE_COPIES, NAMED, tiles.TABLE_COLUMNS), dtype=torch.int64),
        key_strides=(0, *key.stride()[:3]),
        value_strides=(0, *value.stride()[:3]),
        is_table=True,
        is_uniform=True,
        align=launch.alignment(*depth_k, *depth_v),
        traced=launch.is_traced(key),
        named=tuple(x for pair in pairs for x in pair),
    )


def separate(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> Slots:
    """Slots that are separate tensors, as the launch needs them: :func:`named` if it is traced,
    otherwise in a :func:`table`.
    """
    make = named if launch.is_traced(depth_k[0]) else table
    return make(depth_k, depth_v)


def nameable(depth_k: Sequence[Tensor], depth_v: Sequence[Tensor]) -> bool:
    """Whether :func:`named` takes these."""
    sides = (depth_k, depth_v)
    if not 0 < len(depth_k) == len(depth_v) <= NAMED:
        return False
    equal = all(x.stride() == side[0].stride() for side in sides for x in side)
    return equal and all(x.dim() < 4 or x.shape[3] == 1 or x.stride(3) == 1 for x, *_ in sides)


def names(slots: Slots, letter: str) -> dict[str, Tensor | None]:
    """The slots as arguments n0, n1, .. of a kernel (`letter` "n"); in a traced launch the other
    names, too, which must be told to be None.
    """
    if not slots.named and not slots.traced:
        return {}
    given = [*slots.named, *[None] * (2 * NAMED - len(slots.named))]
    return {f"{letter}{i}": x for i, x in enumerate(given)}


def _slots(
    slots: _Separate, *, table: Tensor, is_table: bool, addresses: tuple[int, ...] = ()
) -> Slots:
    strides = next(iter(slots.groups))
    return Slots(
        count=len(slots.keys),
        kv_heads=slots.keys[0].shape[1],
        key=slots.keys[0],
        value=slots.values[0],
        table=table,
        key_strides=(0, *strides[:3]),
        value_strides=(0, *strides[3:]),
        is_table=is_table,
        is_uniform=len(slots.groups) == 1,
        align=slots.align,
        traced=False,
        addresses=addresses,
        keep=(*slots.keys, *slots.values),
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


def _strides(sizes: Sequence[int], strides: _Strides) -> _Strides:
    """(batch, head, token) strides; 0 where the size is 1, so that equal layouts compare equal."""
    return tuple(s if n > 1 else 0 for n, s in zip(sizes, strides, strict=False))
