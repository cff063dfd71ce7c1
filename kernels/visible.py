"""Which keys a mask leaves at all: found out once, for all the layers that decode under it.

What a mask hides at the ends of a row, a cache's unused places or a padded prompt's start, is then
not read, and where it hides nothing else no kernel looks at it again. `decode` needs the answer
before it can ask for its first key, in each of its programs: reading a row there kept every SM from
its keys for 3 us in each layer, and over 16384 keys for 29 (an H100, 64 x 4 heads).

A row is looked at in chunks of MASK_CHUNK keys, and a kernel combines those that its keys lie in.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import MASK_CHUNK, launch, mask_chunks, masks

_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit(do_not_specialize=["keys", "heads", "chunks", "stride_batch", "stride_head"])
def visible_keys_kernel(
    mask,
    visible,
    keys,
    heads,
    chunks,
    stride_batch,
    stride_head,
    stride_key,
    BOOL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one chunk's entries of `visible`; shapes as in `run`, strides in elements."""
    NOTHING: tl.constexpr = 2147483647  # no key is visible: behind all of them
    program = tl.program_id(0)
    chunk = program % chunks
    row = program // chunks
    u = chunk * CHUNK + tl.arange(0, CHUNK)
    live = u < keys
    entry = mask + (row // heads).to(tl.int64) * stride_batch
    entry += (row % heads).to(tl.int64) * stride_head + u.to(tl.int64) * stride_key
    if BOOL:
        seen = tl.load(entry, mask=live, other=0).to(tl.int1)
        plain = seen
    else:
        bias = tl.load(entry, mask=live, other=float("-inf"))
        seen = bias != float("-inf")
        plain = bias == 0.0
    entry = visible + row.to(tl.int64) * (3 * chunks) + chunk
    tl.store(entry, tl.min(tl.where(seen, u, NOTHING), 0))
    tl.store(entry + chunks, tl.max(tl.where(seen, u, -1), 0))
    tl.store(entry + 2 * chunks, tl.sum(plain.to(tl.int32), 0))


@triton.jit
def visible_range(row, first, last, chunks, CHUNK: tl.constexpr):
    """(first, last) visible key + 1 of the keys [first, last), and whether there the mask is
    nothing else; row: the 3 x chunks entries of `run` of a row of the mask.

    Of what other keys of the same chunks see the range stays free, and the last answer need not.
    """
    ENTRIES: tl.constexpr = 32
    NOTHING: tl.constexpr = 2147483647  # as `visible_keys_kernel` writes it
    lowest = tl.full([ENTRIES], NOTHING, tl.int32)
    highest = tl.full([ENTRIES], -1, tl.int32)
    free = tl.zeros([ENTRIES], tl.int32)
    end_chunk = tl.cdiv(last, CHUNK)
    for start in range(first // CHUNK, end_chunk, ENTRIES):
        chunk = start + tl.arange(0, ENTRIES)
        live = chunk < end_chunk
        lowest = tl.minimum(lowest, tl.load(row + chunk, mask=live, other=NOTHING))
        highest = tl.maximum(highest, tl.load(row + chunks + chunk, mask=live, other=-1))
        free += tl.load(row + 2 * chunks + chunk, mask=live, other=0)
    lowest_seen, highest_seen = tl.min(lowest, 0), tl.max(highest, 0)
    begin = tl.minimum(tl.maximum(lowest_seen, first), last)  # nothing seen: an empty range
    end = tl.maximum(tl.minimum(highest_seen + 1, last), begin)
    return begin, end, tl.sum(free, 0) == highest_seen + 1 - lowest_seen


def readable(mask: Tensor) -> Tensor:
    """The mask in a dtype that the kernels read (float8 they don't)."""
    return mask if mask.dtype in _DTYPES else mask.to(torch.float32)


def distinct_rows(mask: Tensor, group: Any, queries: Any) -> tuple[Any, Any] | None:
    """(B or 1, Hk or 1): rows of a mask that differ, one for each batch entry and key/value head;
    None where what shares a key/value head does not share a row, or a row is one number.

    Args:
        mask: broadcastable to [B, Hq, Tq, Tk]. group: query heads per key/value head. queries: Tq.
    """
    batches, heads, tokens, keys = masks.compact(mask).shape
    if launch.equals(keys, 1) or not (launch.equals(tokens, 1) or launch.equals(queries, 1)):
        return None
    return (batches, heads) if launch.equals(heads, 1) or launch.equals(group, 1) else None


def run(mask: Tensor, batches: Any, heads: Any) -> Tensor:
    """Look at each row of a mask that there is.

    Args:
        mask: bool or additive, broadcastable to [B, Hq, Tq, Tk], with `distinct_rows`
            (batches, heads).

    Returns:
        int32 [batches, heads, 3 chunks], for the chunks of MASK_CHUNK keys: the first visible key
        of each (2^31 - 1 if there is none), then of each the last one (-1), then how many there are
        that the mask leaves as they are. A number that is added hides a key if it is -inf.
    """
    mask = masks.compact(readable(mask))
    keys = mask.shape[3]
    chunks = mask_chunks(keys)
    # Not [.., 3, chunks]: a compiler would ask whether chunks is 1, and compile for the answer.
    visible = mask.new_empty((batches, heads, 3 * chunks), dtype=torch.int32)
    if any(launch.equals(n, 0) for n in visible.shape):
        return visible
    with launch.on_device(mask):
        launch.launchable(visible_keys_kernel, launch.is_traced(mask))[(batches * heads * chunks,)](
            mask,
            visible,
            keys,
            heads,
            chunks,
            mask.stride(0),
            mask.stride(1),
            mask.stride(3),
            BOOL=mask.dtype == torch.bool,
            CHUNK=MASK_CHUNK,
            num_warps=8,
        )
    return visible
