"""The operator that looks at a mask, as a graph has it; see `passes.visible`."""

from __future__ import annotations

import torch
from torch import Tensor

from moda_compile import registration
from moda_compile.errors import InputError


@registration.operator("visible_keys")
def visible_keys(mask: Tensor, batches: int, heads: int) -> Tensor:
    """int32 [batches, heads, 3 chunks]: which keys a mask on a GPU leaves; see `visible.run`.

    Args:
        mask: broadcastable to [B, Hq, Tq, Tk]. batches, heads: of its rows that differ, B or 1 and
            the key/value heads or 1.
    """
    if mask.device.type != "cuda":
        raise InputError(f"visible_keys: the mask is on {mask.device}, expected it on a GPU.")
    from moda_compile.kernels import visible

    return visible.run(mask, batches, heads)


@registration.fake("visible_keys")
def _(mask, batches, heads):  # type: ignore[no-untyped-def]
    from moda_compile.kernels import mask_chunks

    entries = 3 * mask_chunks(mask.shape[-1])
    return mask.new_empty((batches, heads, entries), dtype=torch.int32)
