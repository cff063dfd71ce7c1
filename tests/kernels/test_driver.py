"""Launches by CUDA's driver: the arguments' places in memory, and what is refused.

There is no GPU: the driver is a stand-in that reads what it is given as CUDA's documentation says.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moda_compile.kernels import driver, recorded  # noqa: E402
from tests.kernels.test_recorded import H100, text  # noqa: E402

KINDS, VALUES = ["*bf16", "i32", "*fp32", "fp32", "i64", "*bf16"], [1, -7, 0, 0.125, 1 << 40, 1]
SIZES = [8, 4, 8, 4, 8, 8]
FORMATS = ["Q", "i", "Q", "f", "q", "Q"]
BINARY = driver.Binary(name="kernel", cubin=b"cubin", shared=50 << 10, warps=4, plain=True)


def read(pointers: Any) -> list[Any]:
    """The arguments, as cuLaunchKernel finds them."""
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

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: None) -> int:  # noqa: N802
        words = struct.unpack("7I4xQQI4x", ctypes.string_at(ctypes.addressof(config._obj), 56))
        *shape, stream, attributes, count = words
        assert (attributes, count, extra) == (0, 0, None)
        self.launches.append((function.value, *shape, stream, read(pointers)))
        assert [ctypes.string_at(pointers[len(SIZES) + i], 8) for i in range(2)] == [bytes(8)] * 2
        return self.statuses.pop(0) if self.statuses else 0


def launcher(monkeypatch: pytest.MonkeyPatch, cuda: Any, binary: driver.Binary = BINARY) -> Any:
    monkeypatch.setattr(driver, "_library", lambda: cuda)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda n: 500 + n, raising=False)
    driver._loaded.cache_clear()
    arguments = driver.Arguments(KINDS, VALUES, 2)
    return driver.launcher(binary, arguments, grid=9, device=1)


@pytest.mark.parametrize("trailing", [0, 1, 2])
def test_a_call_writes_the_addresses(monkeypatch: pytest.MonkeyPatch, trailing: int) -> None:
    cuda = Cuda([*SIZES, *[8] * trailing])
    call = launcher(monkeypatch, cuda)
    for first, second in ((1 << 47, 16), (32, 64)):
        call(first, second)
        shape = (77, 9, 1, 1, 128, 1, 1, 50 << 10, 501)
        assert cuda.launches.pop() == (*shape, [second, -7, first, 0.125, 1 << 40, second])
    assert cuda.attributes == [(8, 50 << 10)]  # more than 48 KiB has to be asked for


@pytest.mark.parametrize(
    "sizes", [[*SIZES[:1], 8, *SIZES[2:]], SIZES[:-1], [*SIZES, 4], [*SIZES, 8, 8, 8]], ids=str
)
def test_other_arguments_are_left_to_triton(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    assert launcher(monkeypatch, Cuda(sizes)) is None


@pytest.mark.parametrize(
    "changed", [{"plain": False}, {"cubin": b"else"}, {"name": "another"}], ids=str
)
def test_other_kernels_are_left_to_triton(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    binary = driver.Binary(**{**BINARY.__dict__, **changed})
    assert launcher(monkeypatch, Cuda(SIZES), binary) is None


def test_without_a_driver_triton_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher(monkeypatch, None) is None


def test_of_no_programs_none_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(SIZES)
    monkeypatch.setattr(driver, "_library", lambda: cuda)
    call = driver.launcher(BINARY, driver.Arguments(KINDS, VALUES, 2), grid=0, device=1)
    assert call is not None
    call(8, 8)
    assert cuda.launches == []


def test_a_refused_launch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    call = launcher(monkeypatch, Cuda(SIZES, statuses=[700]))
    with pytest.raises(RuntimeError, match="kernel: CUDA's driver refused the launch, error 700"):
        call(8, 8)


def test_a_new_thread_gets_the_gpu_s_context(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    cuda = Cuda(SIZES, statuses=[201, 0])
    launcher(monkeypatch, cuda)(8, 8)
    assert taken == [1]
    assert len(cuda.launches) == 2


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
