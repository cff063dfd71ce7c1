"""What a launch keeps of Triton's own bookkeeping, and what makes it ask Triton again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moda_compile.kernels import launch

NAMES = ["x", "count", "size", "strides", "scale", "WIDTH", "ROWS"]


class Kernel:
    """As a Triton kernel is launched; `count` is not specialised on."""

    def __init__(self) -> None:
        self.arg_names = NAMES
        self.params = [SimpleNamespace(do_not_specialize=name == "count") for name in NAMES]
        self.compiled = 0
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled += 1
            order = [constants[name] for name in NAMES[len(arguments) :]]
            self.launched.append((*grid, *arguments, *order))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert grid[1:] == (1, 1)
        return lambda *arguments: self.kernel.launched.append((grid[0], *arguments))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    current = {"number": 0}
    driver = SimpleNamespace(get_current_device=lambda: current["number"])
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launch, "_compiled", {})
    yield current


def call(kernel: Any, x: Tensor, **changed: Any) -> None:
    made: dict[str, Any] = dict(
        count=3, size=8, strides=(64, 1), scale=0.5, WIDTH=16, ROWS=4, num_warps=2, grid=5
    )
    made |= changed
    own = launch._Remembered(kernel)
    positional = [made[name] for name in ("count", "size", "strides", "scale")]
    constants = {name: made[name] for name in ("ROWS", "WIDTH", "num_warps")}  # in any order
    own[(made["grid"],)](x, *positional, **constants)


@pytest.mark.usefixtures("device")
def test_same_kind_is_compiled_once() -> None:
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(8)
    call(kernel, x)
    call(kernel, y, count=4, scale=0.25, grid=7)
    assert kernel.compiled == 1
    first, second = kernel.launched
    assert first[0] == 5 and first[1] is x and first[2:] == (3, 8, (64, 1), 0.5, 16, 4)
    assert second[0] == 7 and second[1] is y and second[2:] == (4, 8, (64, 1), 0.25, 16, 4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "changed",
    [
        {"count": 1 << 40},
        {"count": 1 << 63},
        {"size": 16},
        {"strides": (64, 2)},
        {"WIDTH": 32},
        {"num_warps": 4},
    ],
    ids=str,
)
def test_another_kind_is_compiled(changed: dict[str, Any]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    call(kernel, x)
    call(kernel, x, **changed)
    call(kernel, x, **changed)
    assert kernel.compiled == 2


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("other", [torch.zeros(8).half(), torch.zeros(9)[1:]], ids=["dtype", "odd"])
def test_another_tensor_is_compiled(other: Tensor) -> None:
    kernel = Kernel()
    call(kernel, torch.zeros(8))
    call(kernel, other)
    assert kernel.compiled == 2


def test_another_device_is_compiled(device: dict[str, int]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    call(kernel, x)
    device["number"] = 1
    call(kernel, x)
    assert kernel.compiled == 2


@pytest.mark.usefixtures("device")
def test_a_limit_of_registers_is_an_option_of_the_launch() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    given: list[dict[str, Any]] = []
    run = kernel[(1,)]

    def recorded(*arguments: Any, **constants: Any) -> Any:
        given.append(constants)
        return run(*arguments, **constants)

    kernel.__class__ = type("Recorded", (Kernel,), {"__getitem__": lambda self, grid: recorded})
    for limit in ({"maxnreg": 128}, {"maxnreg": 128}, {"maxnreg": 64}, {}):
        launch._Remembered(kernel, **limit)[(1,)](x, 3, 8, (64, 1), 0.5, WIDTH=16, ROWS=4)
    assert [made.get("maxnreg") for made in given] == [128, 64, None]


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_the_limit_is_for_cuda_s_compiler(hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    own = launch.launchable(kernel_of_triton, registers=128)
    assert own.options == ({"maxnreg": 128} if hip is None else {})
    assert launch.launchable(kernel_of_triton).options == {}
    traced = launch.launchable(kernel_of_triton, True, 128).kernel
    assert traced is (kernel_of_triton if hip else launch._limited(kernel_of_triton, 128))
    assert hip or [x.maxnreg for x in traced.configs] == [128]
    assert launch.launchable(kernel_of_triton, True).kernel is kernel_of_triton


@triton.jit
def kernel_of_triton(x) -> None:  # type: ignore[no-untyped-def]
    pass


def test_memory_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = SimpleNamespace(memory_clock_rate=3201000, memory_bus_width=6144)
    unknown = SimpleNamespace(memory_clock_rate=0, memory_bus_width=6144)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.memory_bandwidth(cuda) == launch.memory_bandwidth(cpu) == 3.35e12
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for properties, expected in ((h200, 4.917e12), (unknown, 3.35e12)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, x=properties: x)
        assert launch.memory_bandwidth(cuda) == pytest.approx(expected, rel=1e-3)
        assert launch.memory_bandwidth(cpu) == 3.35e12


@pytest.mark.usefixtures("device")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_COMPILED", 4)
    kernel, x = Kernel(), torch.zeros(8)
    for size in range(20):
        call(kernel, x, size=size)
        assert len(launch._compiled) <= 4


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((2, 3, 4, 8), None, 0, 16),
        ((2, 3, 4, 8), None, 1, 2),
        ((2, 3, 4, 6), None, 0, 4),
        ((1, 1, 1, 5), (3, 7, 9, 1), 0, 16),
        ((2, 1, 1, 5), (4, 7, 9, 1), 0, 8),
        ((2, 3, 4, 5), (0, 40, 8, 1), 4, 8),
    ],
)
def test_alignment(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, offset: int, expected: int
) -> None:
    base = torch.zeros(1000, dtype=torch.bfloat16)
    base = base[(-base.data_ptr() % 16) // 2 :][offset:]
    x = base[: torch.Size(shape).numel()].view(shape) if strides is None else None
    x = base.as_strided(shape, strides, base.storage_offset()) if x is None and strides else x
    assert x is not None
    assert launch.alignment(x) == expected
    assert launch.alignment(torch.zeros(4, 16), x) == expected


def test_what_is_token_major_adds_nothing_to_a_graph() -> None:
    dense = torch.randn(2, 5, 3, 4).transpose(1, 2)
    graph = make_fx(launch.token_major, tracing_mode="fake")(dense).graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.transpose.int)
    other = make_fx(launch.token_major, tracing_mode="fake")(torch.randn(2, 3, 5, 4)).graph
    assert len(other.find_nodes(op="call_function", target=torch.ops.aten.transpose.int)) == 2


def test_token_major_of_lengths_that_data_decide() -> None:
    shape_env = ShapeEnv()
    tokens, kept = shape_env.create_unbacked_symint(), shape_env.create_unbacked_symint()
    with FakeTensorMode(shape_env=shape_env):
        # Whether the first tokens of a longer row of them are all of it can't be said.
        x = torch.empty(2, kept, 3, 4).as_strided((2, 3, tokens, 4), (kept * 12, 4, 12, 1))
        got = launch.token_major(x)
    assert got.shape == x.shape
    assert got.stride()[1:] == (4, 12, 1)
    assert not shape_env.guards


def test_token_major_is_a_view_where_it_can_be() -> None:
    dense = torch.randn(2, 5, 3, 4).transpose(1, 2)
    assert launch.token_major(dense) is dense
    other = torch.randn(2, 3, 5, 4)
    got = launch.token_major(other)
    assert torch.equal(got, other)
    assert got.transpose(1, 2).is_contiguous()
    single = torch.randn(1, 1, 5, 4)  # of one head both orders are one
    assert launch.token_major(single).data_ptr() == single.data_ptr()
