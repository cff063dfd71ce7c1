"""The decode kernels: in Triton's interpreter, traced with fake tensors, and compiled for an H100.

One process runs all interpreted cases (decode_cases.py): the interpreter must be chosen before
Triton is imported.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

pytest.importorskip("triton")

from moda_compile import kernels  # noqa: E402
from moda_compile.kernels import (  # noqa: E402
    configs,
    decode,
    decode_configs,
    launch,
    slot_table,
    visible,
)
from tests.kernels.compiled import POINTERS, compile_for_h100  # noqa: E402

SCRIPT = Path(__file__).with_name("decode_cases.py")
EPS = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
CAPABILITIES = ((0, 0), (7, 5), (8, 6), (9, 0))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
compiled_only = pytest.mark.skipif(launch.EMULATED, reason="the kernels are interpreted")


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_case_ran(lines: list[dict[str, Any]]) -> None:
    failures = [(x["case"], x["traceback"]) for x in lines if "traceback" in x]
    assert failures == []
    assert len(lines) == 203


def test_errors_stay_within_eager_plus_rounding(lines: list[dict[str, Any]]) -> None:
    wrong = []
    for line in lines:
        case, result = line["case"], line["result"]
        for name, error in result.get("error", {}).items():
            limit = 8 * EPS["fp32"]  # lse: float32 throughout, from whatever inputs
            if "lse" not in name:
                # Once more than eager: p is rounded to 16 bits for the product.
                limit += result["eager"] + (EPS[case["dtype"]] if case["dtype"] != "fp32" else 0)
            if not error <= limit:  # NaN is not <= anything
                wrong.append((name, error, limit, case))
    assert wrong == []


@pytest.mark.parametrize("check", ["twice", "nan", "apart", "unread", "seen"])
def test_holds(lines: list[dict[str, Any]], check: str) -> None:
    """The same bits twice; NaN where the definition has it; what is hidden is never read."""
    checked = [x for x in lines if x["case"]["check"] == check]
    assert checked
    assert [x["case"] for x in checked if not x["result"]["holds"]] == []


def test_layout_and_dtypes(lines: list[dict[str, Any]]) -> None:
    names = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
    for line in lines:
        assert line["result"]["token_major"]
        assert line["result"]["dtypes"] == [names[line["case"]["dtype"]], "torch.float32"]


def tile_of(
    head_dim: int,
    rows: int,
    dtype: torch.dtype,
    *,
    pairs: int = 8,
    keys: int = 2048,
    capability: tuple[int, int] = (9, 0),
) -> decode_configs.DecodeTile:
    """Of a GPU with 132 SMs."""
    return decode_configs.decode_tile(
        head_dim=head_dim,
        rows=rows,
        keys=keys,
        pairs=pairs,
        dtype=dtype,
        capability=capability,
        multiprocessors=132,
    )


def test_splits_cover_every_key_once_and_fill_the_gpu() -> None:
    for pairs in (1, 3, 8, 24, 192, 1024):
        for keys in (0, 1, 63, 64, 65, 2048, 16384, 10**6):
            tile = tile_of(64, 4, BF16, pairs=pairs, keys=keys)
            count = decode_configs.decode_splits(pairs=pairs, tile=tile, multiprocessors=132)
            parts = decode_configs.equal_splits(count=count, keys=keys, tile_keys=tile.keys)
            assert parts.count >= 1
            assert parts.keys % tile.keys == 0
            assert parts.count * parts.keys >= keys
            assert (parts.count - 1) * parts.keys < max(keys, 1)  # none is empty
            assert parts.count == 1 or pairs * parts.count <= tile.programs * 132
            if keys >= 16384 and pairs <= tile.programs * 132:
                assert pairs * parts.count >= 250


def test_tiles_fit_a_tensor_core_and_the_shared_memory() -> None:
    for head_dim in (1, 16, 24, 64, 80, 128, 192, 256):
        for rows in (1, 3, 16, 17, 48, 128, 512):
            for dtype in (BF16, FP16, FP32):
                for pairs, capability in itertools.product((1, 256), CAPABILITIES):
                    tile = tile_of(head_dim, rows, dtype, pairs=pairs, capability=capability)
                    assert tile.rows >= 16
                    assert tile.keys >= 16
                    width = configs.padded(head_dim) * dtype.itemsize
                    assert (2 * tile.keys * tile.stages + tile.rows) * width <= 114 * 1024


# What is traced is what Inductor sees.

B, HQ, HK, D, S = 2, 6, 2, 64, 3


def trace(
    queries: int, slots: int, *, symbolic: bool, masked: torch.dtype | None = None
) -> tuple[GraphModule, list[Tensor]]:
    """The graph, with 40 keys, and its (fake) results."""
    shape_env = ShapeEnv()
    keys: Any = 40
    if symbolic:
        symbol = shape_env.create_symbol(keys, ConstantSource("keys"), DimDynamic.DYNAMIC)
        keys = shape_env.create_symintnode(symbol, hint=keys)
    with FakeTensorMode(shape_env=shape_env):
        q = torch.empty(B, queries, HQ, D, device="cuda", dtype=BF16).transpose(1, 2)
        k, v = (torch.empty(B, HK, keys, D, device="cuda", dtype=BF16) for _ in range(2))
        depth = [torch.empty(slots, B, HK, queries, D, device="cuda", dtype=BF16)] * 2
        masks = []
        if masked is not None:
            masks = [torch.empty(B, 1, queries, keys, device="cuda", dtype=masked)]

        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            stacked = slot_table.stacked(rest[0], rest[1]) if slots else None
            mask = rest[2] if len(rest) > 2 else None
            return decode.run(q, k, v, stacked, is_causal=mask is None, scale=0.125, mask=mask)

        inputs = (q, k, v, *depth, *masks)
        graph = make_fx(call)(*inputs)
        assert not shape_env.guards  # any number of keys replays it
        return graph, list(call(*inputs))


@compiled_only
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("slots", [0, S])
@pytest.mark.parametrize("masked", [None, torch.bool, FP32], ids=str)
def test_traces_with_fake_cuda_tensors(
    queries: int, slots: int, masked: torch.dtype | None, symbolic: bool
) -> None:
    graph, (out, lse) = trace(queries, slots, symbolic=symbolic, masked=masked)
    nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    # A mask that all rows share is looked at first.
    assert len(nodes) == (3 if masked is not None and queries == 1 else 2)
    first, second = (node.kwargs for node in nodes[-2:])
    assert (out.shape, out.dtype) == ((B, HQ, queries, D), BF16)
    assert out.transpose(1, 2).is_contiguous()
    assert (lse.shape, lse.dtype) == ((B, HQ, queries), FP32)
    assert isinstance(first["kwargs"]["keys"], Node) == symbolic
    assert isinstance(first["grid"][0][0], Node) == symbolic
    assert isinstance(second["kwargs"]["parts"], Node) == symbolic
    assert second["grid"][0][0] == B * HQ * queries


# Without a GPU the compiler still says whether it takes a kernel, and with what resources.


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "head_dim", "rows", "masked", "shared", "causal"),
    [
        (BF16, 64, 3, torch.bool, True, False),
        (BF16, 80, 1, None, True, True),
        (FP16, 128, 40, FP32, False, False),
        (BF16, 256, 128, None, True, True),
        (FP32, 64, 8, torch.float64, False, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("slots", ["listed", "table", "stacked"])
def test_split_kernel_compiles_for_an_h100(
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    masked: Any,
    shared: bool,
    causal: bool,
    slots: str,
) -> None:
    # Slots of three kinds over heads of three numbers: with 256, they alone fill the GPU.
    pairs = {"listed": 256, "table": 8, "stacked": 24}[slots]
    whole = slots == "listed"
    tile = tile_of(head_dim, rows, dtype, pairs=pairs)
    own = POINTERS[dtype]
    pointers = dict(query=own, key=own, value=own, mask=POINTERS.get(masked, own))
    pointers["ranges"] = "*i32"
    pointers |= dict(slot_key=own, slot_value=own, partial="*fp32", out=own, lse="*fp32")
    pointers["table"] = "*i64" if slots == "table" else own
    pointers |= dict.fromkeys(decode._ADDRESSES, "i64" if slots == "listed" else "i32")
    constants: dict[str, Any] = dict(
        GROUP=rows, HEAD_DIM=head_dim, PADDED_DIM=configs.padded(head_dim), WIDTH=head_dim,
        ROWS=tile.rows, KEYS=tile.keys, CAUSAL=causal, SHARED_MASK=shared, EMULATED=False,
        MASK_CHUNK=kernels.MASK_CHUNK,
        MASK=0 if masked is None else 1 if masked == torch.bool else 2,
        WHOLE=whole, DEPENDENT=slots != "table", OUT_ALIGN=16,
        SLOTS=decode_configs.decode_slots(head_dim=head_dim, dtype=dtype),
        COLUMNS=8, TABLE=slots == "table", LISTED=slots == "listed", UNIFORM=True, SLOT_ALIGN=16,
        ALIGN=16, KEY_ALIGN=16, VALUE_ALIGN=16,
    )  # fmt: skip
    made = compile_for_h100(
        decode.decode_split_kernel, pointers, constants, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    assert made.metadata.shared <= 114 * 1024  # two programs an SM
    layouts = dict(
        re.findall(r"(#\w+) = #ttg.blocked<\{sizePerThread = (\[.*?\])", made.asm["ttgir"])
    )
    rows = f"{constants['SLOTS']}x{constants['PADDED_DIM']}"
    of_slots = re.findall(rf"tt\.load .*: tensor<{rows}x!tt\.ptr<\w+>, (#\w+)>", made.asm["ttgir"])
    # Keys and values, in front of the loop and in it, 16 bytes at a time.
    assert len(of_slots) >= 4  # the queries' tile may be of the same size
    assert {layouts[x] for x in of_slots} == {f"[1, {16 // dtype.itemsize}]"}
    # The first keys are asked for in front of the wait for other kernels, if there is one.
    head, _, rest = made.asm["ptx"].partition("griddepcontrol.wait")
    assert ("prefetch.global.L2" in head) == bool(rest) == constants["DEPENDENT"]
    if dtype != FP32:  # K and V run ahead, also where a mask says which of their rows are read
        assert made.asm["ttgir"].count("ttg.async_copy_global_to_local") >= 4


@compiled_only
@pytest.mark.parametrize("dtype", [torch.bool, BF16], ids=str)
def test_visible_keys_kernel_compiles_for_an_h100(dtype: torch.dtype) -> None:
    pointers = dict(mask=POINTERS[dtype], visible="*i32")
    constants = dict(BOOL=dtype == torch.bool, CHUNK=kernels.MASK_CHUNK, stride_key=1)
    compile_for_h100(visible.visible_keys_kernel, pointers, constants, num_warps=8)


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "head_dim", "parts"), [(BF16, 64, 5), (FP16, 256, 200), (FP32, 80, 33)], ids=str
)
def test_merge_kernel_compiles_for_an_h100(dtype: torch.dtype, head_dim: int, parts: int) -> None:
    tile = decode_configs.merge_tile(head_dim=head_dim, parts=parts)
    assert tile.parts >= min(parts, 16)
    pointers = dict(out=POINTERS[dtype], partial="*fp32", lse="*fp32")
    constants: dict[str, Any] = dict(
        GROUP=3, HEAD_DIM=head_dim, PADDED_DIM=configs.padded(head_dim), WIDTH=head_dim,
        PARTS=tile.parts, DEPENDENT=parts > 5, ALIGN=16,
    )  # fmt: skip
    made = compile_for_h100(decode.decode_merge_kernel, pointers, constants, num_warps=tile.warps)
    assert made.metadata.shared <= 16 * 1024
