"""Launches as text: what a call fills in, and what a kernel is compiled for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

triton = pytest.importorskip("triton")

from moda_compile import kernels  # noqa: E402
from moda_compile.kernels import depth_forward_vector, launch, recorded, tiles  # noqa: E402
from moda_compile.kernels.recorded import At, Made  # noqa: E402
from moda_compile.passes import unfold  # noqa: E402
from tests.kernels import recorded_ahead, recorded_cases  # noqa: E402

pytestmark = pytest.mark.skipif(launch.EMULATED, reason="the kernels are interpreted")

KERNEL = depth_forward_vector.depth_forward_vector_kernel
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
H100 = triton.backends.compiler.GPUTarget("cuda", 90, 32)
TENSORS = {"query": 0, "sequence_out": 1, "sequence_lse": 2, "key": 3, "value": 4}
OWN = {"out": 5, "lse": 6, "table": 7}
NUMBERS = {"slots": 2, "tokens": 12, "kv_heads": 3, "scale": 0.25}
CONSTANTS: dict[str, Any] = dict(
    GROUP=1, HEAD_DIM=16, PADDED_DIM=16, ROWS=8, SLOTS=2, STAGES=2, COLUMNS=8, COPIES=128,
    TABLE=True, UNIFORM=True, ALIGN=16, SLOT_ALIGN=16,
)  # fmt: skip


def text(**changed: Any) -> str:
    """A launch with two slots, of which key and value are the first; the second is `query`'s."""
    strides = {x.name: 48 for x in KERNEL.params if "stride" in x.name}
    strides |= {"sequence_lse_stride_token": 1, "lse_stride_token": 1}
    tensors = {name: At(number) for name, number in (TENSORS | OWN).items()}
    slots = {"n0": At(3), "n1": At(4), "n2": At(0), "n3": At(0)}
    slots |= {f"n{i}": At(3 + i % 2) for i in range(4, 16)}
    return recorded.record(
        KERNEL,
        grid=9,
        arguments={**strides, **tensors, **slots, **NUMBERS, **CONSTANTS, **changed},
        given=[BF16, BF16, FP32, BF16, BF16],
        made=[
            Made(shape=(1, 3, 4, 16), stride=(192, 16, 48, 1), dtype=BF16, returned=True),
            Made(shape=(1, 3, 4), stride=(12, 4, 1), dtype=FP32, returned=True),
            Made(shape=(2, 48, 8), stride=(384, 8, 1), dtype=INT64, returned=False),
        ],
        options={"num_warps": 4, "num_stages": 3},
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of each launch, instead of a launch."""
    seen: list[tuple[Any, ...]] = []
    compiled: list[Any] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *arguments: seen.append((grid, *arguments))

    def compile_(read: Any, target: Any, folder: str) -> Any:
        compiled.append(read)
        return Compiled()

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: H100))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(recorded, "_compile", compile_)
    monkeypatch.setattr(recorded, "_prepared", defaultdict(dict))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield seen
    assert len(compiled) == 1


def inputs() -> list[torch.Tensor]:
    rows = [torch.randn(1, 4, 3, 16, dtype=BF16).transpose(1, 2) for _ in range(4)]
    return [*rows[:2], torch.randn(1, 3, 4), *rows[2:]]


def test_a_call_fills_in_addresses(launched: list[tuple[Any, ...]]) -> None:
    for _ in range(2):
        given = inputs()
        out, lse = recorded.run(given, text())
        grid, *arguments = launched.pop()
        assert grid == (9, 1, 1)
        found = dict(zip(KERNEL.arg_names, arguments, strict=True))
        assert all(found[x] == given[number].data_ptr() for x, number in TENSORS.items())
        assert (found["out"], found["lse"]) == (out.data_ptr(), lse.data_ptr())
        assert [found[f"n{i}"] for i in range(4)] == [given[i].data_ptr() for i in (3, 4, 0, 0)]
        assert found["n16"] is None
        assert {x: found[x] for x in {**NUMBERS, **CONSTANTS}} == {**NUMBERS, **CONSTANTS}
        forms = [(tuple(x.shape), x.stride(), x.dtype) for x in (out, lse)]
        assert forms == recorded.results(text())


def test_signature_is_by_triton_s_rules() -> None:
    def found(**changed: Any) -> tuple[dict[str, str], dict[str, Any], set[str]]:
        read = recorded._read(text(**changed))
        signature, constants, attributes = recorded._specialised(read)
        return signature, constants, {KERNEL.arg_names[place] for place in attributes}

    signature, constants, divisible = found()
    assert (signature["query"], signature["lse"], signature["table"]) == ("*bf16", "*fp32", "*i64")
    assert (signature["scale"], signature["tokens"]) == ("fp32", "i32")
    assert constants["lse_stride_token"] == 1  # compiled in
    assert constants["n16"] is None
    assert {"query", "n0", "key_stride_head"} <= divisible
    assert not {"tokens", "kv_heads", "scale", "slots"} & divisible
    assert found(slots=1) == found(slots=16) == found(slots=2)
    assert "tokens" in found(tokens=32)[2]
    assert found(key_stride_batch=1 << 31)[0]["key_stride_batch"] == "i64"


@pytest.mark.parametrize(
    ("changed", "same"),
    [({"slots": 9}, True), ({"tokens": 13}, True), ({"tokens": 16}, False), ({"GROUP": 2}, False)],
    ids=str,
)
def test_what_compiles_anew(changed: dict[str, Any], same: bool) -> None:
    keys = [recorded._read(x).source_key for x in (text(), text(**changed))]
    assert (keys[0] == keys[1]) == same


def test_what_is_left_out_has_its_default() -> None:
    read = recorded._read(text())
    assert read.arguments[KERNEL.arg_names.index("n95")] is None
    assert read.options == {"num_warps": 4, "num_stages": 3}


def test_compiles_for_an_h100(tmp_path: Path) -> None:
    made = recorded._compile(recorded._read(text()), H100, str(tmp_path))
    assert made.metadata.name == KERNEL.__name__
    assert made.metadata.num_warps == 4
    assert "cubin" in made.asm


def test_another_process_leaves_it_in_triton_s_cache(tmp_path: Path) -> None:
    """Which imports no more than it needs for that, and has no GPU."""
    (folder := tmp_path / "cache").mkdir()
    program = (
        "import sys; from moda_compile.kernels import recorded; "
        "recorded._compile_elsewhere(sys.argv[1], ('cuda', 90, 32), sys.argv[2])"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", program, text(), str(folder)],
        check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    kept = list(folder.rglob("*.cubin"))
    assert [x.stem for x in kept] == [KERNEL.__name__]
    assert len(list(folder.rglob("moda_compile_launcher*"))) == 1
    before = kept[0].stat().st_mtime_ns
    recorded._compile(recorded._read(text()), H100, str(folder))
    assert [x.stat().st_mtime_ns for x in folder.rglob("*.cubin")] == [before]


@pytest.fixture
def other_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The version of an assembler that PyTorch brings, and has Triton use in its processes."""
    from torch._inductor.runtime import compile_tasks
    from triton.backends.nvidia.compiler import get_ptxas_version

    path, variable = tmp_path / "ptxas", "TRITON_PTXAS_PATH"
    path.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.3, V12.3.45\n")
    path.chmod(0o755)
    monkeypatch.setenv(variable, "")  # to be put back
    monkeypatch.delenv(variable)
    bring = functools.partial(os.environ.__setitem__, variable, str(path))
    monkeypatch.setattr(compile_tasks, "_set_triton_ptxas_path", bring)
    caches = (recorded._set_assembler, get_ptxas_version)
    for cached in caches:
        cached.cache_clear()
    yield "V12.3.45"
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("asked_before", [False, True])
def test_kept_under_the_version_of_the_assembler_of_inductor_s_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_assembler: str, asked_before: bool
) -> None:
    """Also where Inductor has had Triton ask its own, for a key of a graph."""
    seen: list[str] = []

    def compile(*_: Any, target: Any, **__: Any) -> None:
        seen.append(triton.compiler.make_backend(target).hash())

    if asked_before:
        assert other_assembler not in triton.compiler.make_backend(H100).hash()
    monkeypatch.setattr(triton, "compile", compile)
    recorded._compile(recorded._read(text()), H100, str(tmp_path))
    assert len(seen) == 1
    assert other_assembler in seen[0]


def test_no_function_reads_constants_of_its_module() -> None:
    """Triton's key of a kernel has those of the functions it calls only where these have been asked
    for theirs before (`DependenciesFinder._update_hash`): another process would not find it.
    """
    functions: list[Any] = []
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        found = vars(importlib.import_module(module.name)).values()
        functions += [x for x in found if isinstance(x, triton.JITFunction)]
    assert len({x.cache_key for x in functions}) >= 40
    assert [(x.__module__, x.__name__) for x in functions if x.used_global_vals] == []


def test_a_table_has_a_row_for_each_two_addresses() -> None:
    addresses = [name for name in tiles.write_table.arg_names if name.startswith("n")]
    assert len(addresses) == 2 * tiles.TABLE_ROWS
    assert f"ROWS: tl.constexpr = {tiles.TABLE_ROWS} " in tiles.write_table.src


def test_a_launch_waits_for_what_is_compiled_elsewhere(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(lambda: time.sleep(0.3))
        monkeypatch.setattr(recorded, "_ahead", {(recorded._read(text()).source_key, 0): waited})
        recorded.run(inputs(), text())
        assert waited.done()
    assert len(launched) == 1


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_failure_elsewhere_leaves_the_kernel_to_this_process(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    failed: Future[Any] = Future()
    if cancelled:
        failed.cancel()
        failed.set_running_or_notify_cancel()
    else:
        failed.set_exception(MemoryError())
    monkeypatch.setattr(recorded, "_ahead", {(recorded._read(text()).source_key, 0): failed})
    recorded.run(inputs(), text())
    assert len(launched) == 1


def test_a_launch_does_not_wait_for_ever(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the next one, for what no longer answers."""
    ahead: dict[Any, Any] = {(recorded._read(text()).source_key, 0): Future()}
    monkeypatch.setattr(recorded, "_ahead", ahead)
    monkeypatch.setattr(recorded, "_PATIENCE", 0.1)
    recorded.run(inputs(), text())
    assert len(launched) == 1
    assert recorded._ahead == {}


@pytest.mark.slow
def test_inductor_s_processes_compile_ahead(tmp_path: Path) -> None:
    """PyTorch's own pool of them, told that there is a GPU, in a process of its own."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, recorded_ahead.__file__, text(), text(tokens=32), text(slots=9)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["2"]  # the third is the first's kernel
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_nothing_is_compiled_ahead_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = dict(recorded._ahead)
    recorded.compile_ahead(text(), 0)
    assert recorded._ahead == before


# What a graph computes with its launches, in Triton's interpreter: see recorded_cases.py.

SHAPES = [  # dtype, group, head_dim, slots
    (BF16, 1, 64, 2),
    (BF16, 2, 64, 17),
    (torch.float16, 1, 80, 3),
    (FP32, 3, 16, 9),
    (BF16, 4, 76, 2),
]


def traced(dtype: torch.dtype, group: int, head_dim: int, slots: int) -> dict[str, Any]:
    """An unfolded graph of `recorded_cases.layer`, as code for a CPU."""
    tokens, kv_heads = 7, 3

    def rows(heads: int) -> torch.Tensor:
        x = torch.empty(2, tokens, heads, head_dim, device="cuda", dtype=dtype)
        return x.transpose(1, 2)

    with FakeTensorMode():
        heads = group * kv_heads
        lse = torch.empty(2, heads, tokens, device="cuda")
        depth = [rows(kv_heads) for _ in range(2 * slots)]
        inputs = [rows(heads), lse, rows(heads), rows(heads), *depth]
        gm = make_fx(recorded_cases.layer)(*inputs)
        unfold.run(gm.graph)
    left = {str(n.target) for n in gm.graph.nodes if "moda_compile" in str(n.target)}
    assert left == {"moda_compile.launch.default"}
    gm.recompile()
    return {
        "shape": [str(dtype), group, head_dim, slots],
        "code": gm.code.replace("device(type='cuda', index=0)", "device('cpu')"),
        "inputs": [(tuple(x.shape), x.stride(), x.dtype) for x in inputs],
    }


def test_graphs_compute_what_their_operators_do(tmp_path: Path) -> None:
    file = tmp_path / "cases.pt"
    torch.save([traced(*shape) for shape in SHAPES], file)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, recorded_cases.__file__, str(file)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["traceback"] for x in lines if "traceback" in x] == []
    assert [x["case"]["shape"] for x in lines] == [[str(d), *rest] for d, *rest in SHAPES]
    for line, (dtype, *_) in zip(lines, SHAPES, strict=True):
        # Results are rounded (out, of which delta is made, too); the interpreter truncates.
        rounding = {BF16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 2.0**-20)
        for name in recorded_cases.RESULTS:
            error, eager = (line["result"][kind][name] for kind in ("error", "eager"))
            limit = eager + (2.0**-20 if name == "lse" else rounding)
            assert error <= limit, (name, line)
