"""Launches that a graph keeps as text: all of a launch but its tensors is known when it is traced.

Each layer of a model launches two or three kernels a step, with tens of tensors each. A launch by
PyTorch's or Triton's own ways looks at every argument anew, asks the driver about every pointer,
and takes the host 40 to 80 us, where a step of few tokens takes the GPU less. Here a launch is text
(`record`): the kernel, its grid, its numbers, where tensors go among them, and which tensors it
makes. What can be read from that is read once for each text; a call (`run`) fills in addresses.

The text names the kernel and holds no address, so a graph that has it may come from a cache.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moda_compile.kernels import driver, launch
from moda_compile.kernels.driver import Binary

_OWN = "moda_compile.kernels."
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
}  # fmt: skip
_PATIENCE = 60.0  # seconds that another process may take longer than all else has
_DIVISIBLE = [["tt.divisibility", launch.WIDEST_ACCESS]]
# What Inductor's code makes its own tensors with, on the current device.
_fast_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor that a launch makes and writes; returned: or only uses itself."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    returned: bool

    @property
    def form(self) -> driver.Form:
        return self.shape, self.stride, self.dtype


@dataclass(frozen=True)
class At:
    """Stands for a tensor among a kernel's arguments: the given ones are counted first, then those
    that the launch makes.
    """

    number: int


def record(
    kernel: Any,
    *,
    grid: int,
    arguments: Mapping[str, Any],
    given: Sequence[torch.dtype],
    made: Sequence[Made],
    options: Mapping[str, int],
) -> str:
    """A launch as text.

    Args:
        kernel: a Triton function of this package.
        grid: programs.
        arguments: by name, tensors as `At`; one that is left out has its default.
        given: dtypes of the tensors that `run` will be given.
        made: the tensors that it will make.
        options: num_warps, num_stages, maxnreg: those that are set.
    """
    values = [arguments[x.name] if x.name in arguments else x.default for x in kernel.params]
    return json.dumps(
        {
            "kernel": f"{kernel.__module__.removeprefix(_OWN)}.{kernel.__name__}",
            "grid": grid,
            "arguments": [{"tensor": x.number} if isinstance(x, At) else x for x in values],
            "dtypes": [_name(dtype) for dtype in (*given, *(x.dtype for x in made))],
            "made": [[x.shape, x.stride, x.returned] for x in made],
            "options": dict(options),
        }
    )


def results(text: str) -> list[driver.Form]:
    """(shape, strides, dtype) of what :func:`run` returns."""
    return [x.form for x in _read(text).made if x.returned]


def run(tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    """Launch: make the tensors that are its own, and return those that are its results.

    Args:
        tensors: as `record`'s given, all on one GPU, each beginning where it did in the trace.
        text: of :func:`record`.
    """
    device = tensors[0].get_device()
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return run_here(tensors, text)
    return run_here(tensors, text)


def run_here(tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    """:func:`run`, of tensors on the current GPU, as in all code that Inductor writes."""
    device = tensors[0].get_device()
    prepared = _prepared[device].get(text)
    if prepared is None:
        prepared = _prepared[device][text] = _prepare(text, tensors[0].device)
    return prepared(tensors)


def start_processes() -> None:
    """Have Inductor start its processes, which takes them seconds, before there is work for them.

    Inductor asks whether they are there when it has the first kernel, and does without until then.
    """
    try:
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.use_process_pool()
    except Exception:  # PyTorch's own business: see `compile_ahead`
        return


def compile_ahead(text: str, device: int) -> None:
    """Have one of Inductor's idle processes compile the kernel, where it has them and there is a
    GPU: until the launch, most of a model is yet to be compiled.

    Args:
        text: of :func:`record`. device: number of the GPU.
    """
    if not torch.cuda.is_available():
        return
    _waiting.setdefault((_read(text).source_key, device), text)
    try:
        from torch._inductor.async_compile import AsyncCompile

        if not AsyncCompile.use_process_pool():
            return  # still starting: with the next one
        for key in list(_waiting):
            text = _waiting.pop(key)
            if key not in _ahead:
                what = (text, _target(key[1]), _folder(key[1]))
                _ahead[key] = AsyncCompile.process_pool().submit(_compile_elsewhere, *what)
    except Exception:  # PyTorch's own business: the kernel is then compiled in its first launch
        return


_Key = tuple[str, int]  # what a compiled kernel depends on; number of the GPU
_Prepared = Callable[[Sequence[Tensor]], list[Tensor]]  # `run`, of one text on one GPU
_prepared: defaultdict[int, dict[str, _Prepared]] = defaultdict(dict)  # by GPU's number and text
_waiting: dict[_Key, str] = {}  # what is to be compiled elsewhere, and
_ahead: dict[_Key, Future[Any]] = {}  # what is being compiled elsewhere
_binaries: dict[_Key, Binary] = {}


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """A text, read."""

    kernel: str
    grid: int
    arguments: list[Any]
    dtypes: list[torch.dtype]
    made: list[Made]
    options: dict[str, int]

    @property
    def function(self) -> Any:
        """The Triton function."""
        module, _, name = self.kernel.rpartition(".")
        return getattr(importlib.import_module(_OWN + module), name)

    @property
    def source_key(self) -> str:
        """All that the compiled kernel depends on."""
        signature, constants, attributes = _specialised(self)
        return json.dumps([self.kernel, signature, constants, attributes, self.options])


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> _Launch:
    found = json.loads(text)
    dtypes = [getattr(torch, name) for name in found["dtypes"]]
    own = dtypes[len(dtypes) - len(found["made"]) :]
    return _Launch(
        kernel=found["kernel"],
        grid=found["grid"],
        arguments=found["arguments"],
        dtypes=dtypes,
        made=[
            Made(shape=tuple(shape), stride=tuple(stride), dtype=dtype, returned=returned)
            for (shape, stride, returned), dtype in zip(found["made"], own, strict=True)
        ],
        options=found["options"],
    )


def _prepare(text: str, device: torch.device) -> _Prepared:
    read, number = _read(text), device.index or 0
    empty = _fast_empty if device.type == "cuda" and _fast_empty else _empty_on(device)
    return _by_driver(read, number, empty) or _by_triton(read, number, empty)


def _by_driver(read: _Launch, device: int, empty: Callable[..., Tensor]) -> _Prepared | None:
    found = _elsewhere((read.source_key, device))  # the kernel, where it is compiled already
    if not torch.cuda.is_available():
        return None
    key = read.source_key, device
    if key not in _binaries:
        _binaries[key] = found or Binary.of(
            _compile(read, GPUTarget(*_target(device)), _folder(device))
        )
    signature, _, _ = _specialised(read)
    kinds, values = [], []
    for kind, x in zip(signature.values(), read.arguments, strict=True):
        if kind != "constexpr":
            kinds.append(kind)
            values.append(x["tensor"] if isinstance(x, dict) else x)
    with _kept_in(_folder(device)):
        return driver.launcher(
            _binaries[key],
            driver.Arguments(kinds, values, len(read.dtypes)),
            grid=read.grid,
            device=device,
            made=[(x.form, x.returned) for x in read.made],
            empty=empty,
        )


def _elsewhere(key: _Key) -> Binary | None:
    """What another process has compiled; None if it has not, in all the time that it may take."""
    future = _ahead.get(key)
    if future is None:
        return None
    if wait([future], _PATIENCE).not_done:
        _ahead.clear()
        return None
    try:
        found: Binary = future.result()
    except Exception:  # if that has failed, so will this process, with its own message
        return None
    return found


def _by_triton(read: _Launch, device: int, empty: Callable[..., Tensor]) -> _Prepared:
    """Where CUDA's driver can't be called, and on other GPUs."""
    compiled = _compile(read, GPUTarget(*_target(device)), _folder(device))
    constants = [x for x in read.arguments if not isinstance(x, dict)]
    numbered = itertools.count(len(read.dtypes))
    order = [x["tensor"] if isinstance(x, dict) else next(numbered) for x in read.arguments]
    arranged, launched = operator.itemgetter(*order), compiled[(read.grid, 1, 1)]

    def call(tensors: Sequence[Tensor]) -> list[Tensor]:
        made = [empty(*x.form) for x in read.made]
        launched(*arranged([*(x.data_ptr() for x in (*tensors, *made)), *constants]))
        return [x for x, own in zip(made, read.made, strict=True) if own.returned]

    return call


def _empty_on(device: torch.device) -> Callable[..., Tensor]:
    return lambda shape, stride, dtype: torch.empty_strided(
        shape, stride, dtype=dtype, device=device
    )


def _target(device: int) -> tuple[str, Any, int]:
    """Of a GPU, as Triton names it, and the threads of its warps."""
    if torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return "cuda", 10 * major + minor, 32
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch, target.warp_size


def _folder(device: int) -> str:
    """Where Inductor has Triton keep kernels for a device: in every process the same. Triton's own
    choice is another, until Inductor changes it on its way.
    """
    try:
        from torch._inductor.runtime.runtime_utils import triton_cache_dir
    except ImportError:
        return str(triton.knobs.cache.dir)
    return str(triton_cache_dir(device))


def _compile(read: _Launch, target: GPUTarget, folder: str) -> Any:
    """The compiled kernel; folder: of Triton's cache."""
    function = read.function
    signature, constants, attributes = _specialised(read)
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): x for name, x in constants.items()},
        attrs={(place,): _DIVISIBLE for place in attributes},
    )
    _set_assembler()
    with _kept_in(folder):
        return triton.compile(source, target=target, options=read.options)


@functools.cache
def _set_assembler() -> None:
    """Have Triton use PyTorch's assembler, where there is one, as Inductor does in its processes:
    the version is part of the key of what they leave in Triton's cache.

    Triton asks an assembler for its version once. Inductor has it ask before this, for keys of its
    own, so that it would be that of another one.
    """
    with contextlib.suppress(ImportError, AttributeError):  # PyTorch's and Triton's own business
        from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
        from triton.backends.nvidia.compiler import get_ptxas_version

        _set_triton_ptxas_path()
        get_ptxas_version.cache_clear()


@contextlib.contextmanager
def _kept_in(folder: str) -> Iterator[None]:
    """What Triton compiles meanwhile, it keeps there."""
    cache = triton.knobs.cache
    with cache.scope():
        cache.dir = folder
        yield


def _compile_elsewhere(text: str, target: tuple[Any, ...], folder: str) -> Binary:
    """In another process, without its GPU; what it compiles stays in Triton's cache, too, and so
    does what launches it.
    """
    with _kept_in(folder):
        driver.launcher_module()
    return Binary.of(_compile(_read(text), GPUTarget(*target), folder))


def _specialised(read: _Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Types of the kernel's arguments, values of those that are constants, and the places of those
    that are multiples of 16: by Triton's own rules, which compile a 1 into the kernel.

    Tensors begin on 16-byte boundaries, as traced ones are taken to (see `launch.alignment`).
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: list[int] = []
    for place, (parameter, x) in enumerate(zip(read.function.params, read.arguments, strict=True)):
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (free and type(x) is int and x == 1):
            kind, constants[parameter.name] = "constexpr", x
        elif isinstance(x, dict):
            kind = _POINTERS[read.dtypes[x["tensor"]]]
            attributes.append(place)
        elif type(x) is int:
            kind = "i32" if -(1 << 31) <= x < 1 << 31 else "i64"
            if free and x % launch.WIDEST_ACCESS == 0:
                attributes.append(place)
        else:
            kind = "fp32"
        signature[parameter.name] = kind
    return signature, constants, attributes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
