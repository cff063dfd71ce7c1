"""Launches by CUDA's driver: the arguments' places in memory, and what is refused.

There is no GPU: the driver is a stand-in that reads what it is given as CUDA's documentation says.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moda_compile.kernels import driver, recorded  # noqa: E402
from tests.kernels.test_recorded import H100, text  # noqa: E402

KINDS, VALUES = ["*bf16", "i32", "*fp32", "fp32", "i64", "*bf16"], [1, -7, 0, 0.125, 1 << 40, 1]
SIZES = [8, 4, 8, 4, 8, 8]
FORMATS = ["Q", "i", "Q", "f", "q", "Q"]
BINARY = driver.Binary(name="kernel", cubin=b"cubin", shared=50 << 10, warps=4, plain=True)
FORM: driver.Form = (2, 3), (4, 1), torch.float32
POINTER = ctypes.c_void_p
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, POINTER, POINTER, ctypes.POINTER(POINTER), POINTER)


def read(pointers: Any) -> list[Any]:
    """The arguments, as cuLaunchKernelEx finds them."""
    return [
        struct.unpack(kind, ctypes.string_at(pointers[i], size))[0]
        for i, (kind, size) in enumerate(zip(FORMATS, SIZES, strict=True))
    ]


class Cuda:
    """A driver that has one kernel, with parameters of these sizes."""

    def __init__(self, sizes: Sequence[int], statuses: Sequence[int] = ()) -> None:
        self.sizes, self.statuses = sizes, list(statuses)
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[int, int]] = []
        self.cuLaunchKernelEx = LAUNCH(self.launch)

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:  # noqa: N802
        return int(image != b"cubin")

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        function._obj.value = 77
        return int(name != b"kernel")

    def cuFuncSetAttribute(self, function: Any, which: Any, value: Any) -> int:  # noqa: N802
        self.attributes.append((which.value, value.value))
        return 0

    def cuFuncGetParamInfo(self, function: int, i: int, offset: Any, size: Any) -> int:  # noqa: N802
        if i >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[i]
        return 0

    def launch(self, config: int, function: int, pointers: Any, extra: None) -> int:
        *shape, stream, attributes, count = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        trailing = [ctypes.string_at(pointers[len(SIZES) + i], 8) for i in range(2)]
        self.launches.append(
            (function, *shape, stream, read(pointers), attributes, count, extra, trailing)
        )
        return self.statuses.pop(0) if self.statuses else 0


LAST = (0, 0, None, [bytes(8)] * 2)  # no attributes, nothing extra, null for what Triton appends


@pytest.fixture
def launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Callable[[Sequence[Tensor]], list[Tensor]] | None]:
    """Of one given tensor and, as a result or not, one that it makes."""

    def make(
        cuda: Any, binary: driver.Binary = BINARY, grid: int = 9, returned: bool = True
    ) -> Any:
        monkeypatch.setattr(driver, "_library", lambda: cuda)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda n: 500 + n, raising=False)
        driver._loaded.cache_clear()
        arguments = driver.Arguments(KINDS, VALUES, 2)
        made = [(FORM, returned)]
        empty = torch._C._dynamo.guards._empty_strided_cpu
        return driver.launcher(binary, arguments, grid=grid, device=1, made=made, empty=empty)

    return make


@pytest.mark.parametrize("trailing", [0, 1, 2])
def test_a_call_makes_its_tensors_and_writes_the_addresses(launcher: Any, trailing: int) -> None:
    cuda = Cuda([*SIZES, *[8] * trailing])
    call = launcher(cuda)
    for given in (torch.empty(3), torch.empty(8)[3:]):
        (made,) = call([given])
        assert (tuple(made.shape), made.stride(), made.dtype) == FORM
        first, second = given.data_ptr(), made.data_ptr()
        shape = (77, 9, 1, 1, 128, 1, 1, 50 << 10, 501)
        arguments = [second, -7, first, 0.125, 1 << 40, second]
        assert cuda.launches.pop() == (*shape, arguments, *LAST)
    assert cuda.attributes == [(8, 50 << 10)]  # more than 48 KiB has to be asked for


def test_what_is_no_result_is_made_for_the_launch_alone(launcher: Any) -> None:
    cuda = Cuda(SIZES)
    assert launcher(cuda, returned=False)((torch.empty(3),)) == []
    (*_, arguments, _, _, _, _) = cuda.launches.pop()
    assert arguments[0] == arguments[5] != 0


def test_nothing_is_held_after_a_call(launcher: Any) -> None:
    call, given = launcher(Cuda(SIZES)), torch.empty(3)
    before = sys.getrefcount(given)
    (made,) = call([given])
    assert sys.getrefcount(given) == before
    assert sys.getrefcount(made) == 2
    gone = weakref.ref(made)
    del made
    assert gone() is None


@pytest.mark.parametrize("given", [[], [torch.empty(1)] * 2], ids=len)
def test_other_tensors_than_were_recorded_raise(launcher: Any, given: list[Tensor]) -> None:
    cuda = Cuda(SIZES)
    with pytest.raises(ValueError, match=f"kernel: {len(given)} tensors are given, 1 were"):
        launcher(cuda)(given)
    assert cuda.launches == []


def test_what_is_no_tensor_raises(launcher: Any) -> None:
    cuda = Cuda(SIZES)
    for given, error in ([None], AttributeError), (None, TypeError):
        with pytest.raises(error):
            launcher(cuda)(given)
    assert cuda.launches == []


def test_threads_do_not_share_what_is_written_to(launcher: Any) -> None:
    """A launch lets other threads run, as this one's does in the middle of it."""
    cuda, given = Cuda(SIZES), [torch.empty(3) for _ in range(4)]
    gate = threading.Barrier(len(given))
    seen: list[Any] = []

    def launch(config: int, function: int, pointers: Any, extra: None) -> int:
        gate.wait(30)
        seen.append(read(pointers)[2])
        return 0

    cuda.cuLaunchKernelEx = LAUNCH(launch)
    call = launcher(cuda)
    with ThreadPoolExecutor(len(given)) as pool:
        list(pool.map(lambda x: call([x]), given))
    assert sorted(seen) == sorted(x.data_ptr() for x in given)


@pytest.mark.parametrize(
    "sizes", [[*SIZES[:1], 8, *SIZES[2:]], SIZES[:-1], [*SIZES, 4], [*SIZES, 8, 8, 8]], ids=str
)
def test_other_arguments_are_left_to_triton(launcher: Any, sizes: list[int]) -> None:
    assert launcher(Cuda(sizes)) is None


@pytest.mark.parametrize(
    "changed", [{"plain": False}, {"cubin": b"else"}, {"name": "another"}], ids=str
)
def test_other_kernels_are_left_to_triton(launcher: Any, changed: dict[str, Any]) -> None:
    binary = driver.Binary(**{**BINARY.__dict__, **changed})
    assert launcher(Cuda(SIZES), binary) is None


def test_without_a_driver_triton_launches(launcher: Any) -> None:
    assert launcher(None) is None


def test_without_a_compiler_triton_launches(
    launcher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver.launcher_module.cache_clear()
    try:
        assert launcher(Cuda(SIZES)) is None
    finally:
        driver.launcher_module.cache_clear()


def test_of_no_programs_none_is_launched(launcher: Any) -> None:
    cuda = Cuda(SIZES)
    (made,) = launcher(cuda, grid=0)([torch.empty(3)])
    assert made.shape == (2, 3)
    assert cuda.launches == []


def test_a_refused_launch_raises(launcher: Any) -> None:
    call = launcher(Cuda(SIZES, statuses=[700]))
    with pytest.raises(RuntimeError, match="kernel: CUDA's driver refused the launch, error 700"):
        call([torch.empty(3)])


def test_a_new_thread_gets_the_gpu_s_context(
    launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    cuda = Cuda(SIZES, statuses=[201, 0])
    launcher(cuda)([torch.empty(3)])
    assert taken == [1]
    assert len(cuda.launches) == 2


@pytest.mark.parametrize("places", [(0, 9), (-1,)], ids=str)
def test_the_module_refuses_places_outside_of_the_cells(places: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="place"):
        driver.launcher_module().launcher(
            1, 2, 3, 4, 5, bytes(16), places, 1, "kernel", 0, (), (), None, None, None
        )


def test_a_compiled_kernel_has_these_arguments_and_two_more() -> None:
    """Of a real one, by the text that it was assembled from."""
    kernel = recorded._read(text())
    signature, _, _ = recorded._specialised(kernel)
    kinds = [kind for kind in signature.values() if kind != "constexpr"]
    made = recorded._compile(kernel, H100, str(recorded._folder(0)))
    entry = made.asm["ptx"].split(".entry")[1].split(")")[0]
    widths = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]
    sizes = driver.Arguments(kinds, [0] * len(kinds), 1).sizes
    assert widths[: len(sizes)] == sizes
    assert widths[len(sizes) :] in ([], [8], [8, 8])
    binary = driver.Binary.of(made)
    assert binary.plain
    assert binary.cubin[:4] == b"\x7fELF"
    assert (binary.name, binary.warps) == ("depth_forward_vector_kernel", 4)


def test_what_needs_scratch_is_not_plain() -> None:
    metadata = dict(name="kernel", shared=0, num_warps=4, num_ctas=1, global_scratch_size=0)
    made = SimpleNamespace(metadata=SimpleNamespace(**metadata), asm={})
    assert driver.Binary.of(made).plain
    for asked in (dict(global_scratch_size=8), dict(num_ctas=2), dict(launch_pdl=True)):
        made.metadata = SimpleNamespace(**{**metadata, **asked})
        assert not driver.Binary.of(made).plain
