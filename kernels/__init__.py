"""Kernels behind the attention operator, and the choice between them.

`cpu` serves CPUs, `split` GPUs; both offer `forward` and `backward`. Importing this package does
not import Triton: only `split` and what it uses do.
"""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass

import torch

if __name__ != "moda_compile.kernels":
    # `kernels` is another project's name on PyPI, and transformers looks for it by importing it,
    # from a checkout's root this folder. So the import itself gives a stand-in, of a version too
    # old for anybody to want, and taking anything from it raises.
    class _Elsewhere(types.ModuleType):
        __version__ = "0"

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(
                f"import this package as moda_compile.kernels, not as {self.__name__!r}."
            )

    sys.modules[__name__] = _Elsewhere(__name__)

__all__ = [
    "Lowering",
    "available_sequence_kernels",
    "choose",
    "choose_merge",
    "gathers",
    "gathers_ahead",
    "row_elements",
]

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_CUDNN_MAX_HEAD_DIM = 128  # on every GPU it serves
_MAX_HEAD_DIM = 256  # of the depth kernels and of flash attention
_MAX_GATHER_GROUP = 4
_FASTER_THAN_FOUR_SLOTS = 4e12  # bytes per second; see `gathers_ahead`
ROW_ELEMENTS = 8
"""What the head dims of the platform's attentions are multiples of."""

MAX_DECODE_QUERIES = 16
"""The most query tokens that `decode` serves. There every 64 rows (tokens times the heads of one
key head) walk the keys anew, and attention kernels for many queries do better."""

MASK_CHUNK = 4096
"""Keys of a row of a mask that are looked at together; see `visible`."""


def mask_chunks(keys: int) -> int:
    """How many chunks a row of a mask of `keys` keys, which may be symbolic, is looked at in."""
    return -(-keys // MASK_CHUNK)


GATHERED_SLOTS = 2
"""Slots whose gradients one launch completes: when a layer's backward has run, its own slot's are
complete, and so are those of the slot before it. It may begin as many again; see `gathers_ahead`.
"""


@dataclass(frozen=True)
class Lowering:
    """How one attention call is computed, and why.

    name: "split" (the platform's attention, then a Triton kernel for the depth slots), "fused" (one
        Triton kernel for both), "decode" (Triton kernels for few queries over many keys), "plain"
        (PyTorch operations only) or "cpu". sequence: what computes the sequence part: "cudnn",
        "flash", "efficient" or "math" on GPUs; "triton" of "fused" and "decode"; "given" where the
        graph itself does. reason: one sentence for the report.
    """

    name: str
    sequence: str
    reason: str


def available_sequence_kernels() -> frozenset[str]:
    """The fused attentions that this build of torch has and that its user has not disabled.

    Reads the same switches as `torch.nn.functional.scaled_dot_product_attention`
    (`torch.nn.attention.sdpa_kernel` sets them). Empty without a GPU.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return frozenset()
    names = set()
    cudnn = torch.backends.cudnn
    if cudnn.is_available() and cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled():
        # 9.0: any sequence length. Its backward is not deterministic, so SDPA drops it as well
        # when determinism is asked for.
        strict = torch.are_deterministic_algorithms_enabled()
        strict = strict and not torch.is_deterministic_algorithms_warn_only_enabled()
        if (cudnn.version() or 0) >= 90000 and not strict:
            names.add("cudnn")
    if torch.backends.cuda.is_flash_attention_available():
        if torch.backends.cuda.flash_sdp_enabled():
            names.add("flash")
    if torch.backends.cuda.mem_efficient_sdp_enabled():
        names.add("efficient")
    return frozenset(names)


def choose(
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None = None,
    queries: int | None = None,
    capability: tuple[int, int] | None = None,
    available: frozenset[str] | None = None,
    masked: bool = False,
    additive: bool = False,
    mask_gradient: bool = False,
    traced: bool = False,
) -> Lowering:
    """The lowering for these inputs, keyed by what they are and by compute capability.

    Args:
        device_type: of the inputs, e.g. "cuda".
        dtype: of q, k, v.
        head_dim: d.
        tokens: Tk, if known.
        queries: Tq, if known, of a forward pass; a backward pass leaves it out. A symbolic one
            counts as unknown: it would be bound to one side of `MAX_DECODE_QUERIES`.
        capability: (major, minor) compute capability; by default the current device's.
        available: by default `available_sequence_kernels()`.
        masked: the sequence has a mask, and not the causal one.
        additive: that mask is numbers to add. mask_gradient: and requires a gradient.
        traced: the launches are being recorded for Inductor, as those of the fused kernels, which
            take tuples of strides, can't be.
    """
    if device_type != "cuda":
        extra = ", the mask's gradient by T x T scores" if masked and mask_gradient else ""
        text = f"device {device_type!r}: PyTorch's flash attention, slots by PyTorch{extra}."
        return Lowering("cpu", "flash", text)
    if capability is None:
        has_gpu = torch.cuda.is_available()
        capability = torch.cuda.get_device_capability() if has_gpu else (0, 0)
    if available is None:
        available = available_sequence_kernels()
    single = tokens is not None and bool(tokens == 1)
    few = False
    if type(queries) is int and tokens is not None:
        few = queries <= MAX_DECODE_QUERIES and bool(tokens > queries)
    fusable = not (additive or mask_gradient or traced)
    return _choose(dtype, int(head_dim), few, single, capability, available, masked, fusable)


def choose_merge(*, device_type: str, dtype: torch.dtype, head_dim: int) -> Lowering:
    """The lowering of the depth part alone, of an attention that tells its log-sum-exp."""
    if device_type != "cuda":
        return Lowering("cpu", "given", f"device {device_type!r}: slots by PyTorch.")
    obstacle = _depth_obstacle(dtype, int(head_dim))
    if obstacle is not None:
        return Lowering("plain", "given", obstacle)
    return Lowering("split", "given", "the attention's own out and lse, then the depth kernel.")


def gathers(*, device_type: str, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether a backward pass that is one graph gathers slots' gradients, or adds them up.

    For each pair of a layer and a slot, adding up reads and writes the gradient: 8 passes over a
    slot's K in float32. Gathering reads q and do instead, 2 group passes, for GATHERED_SLOTS at
    once; but dq then takes K and V once more than adding up does. On a CPU the arithmetic counts,
    and adding up has less.

    Args:
        device_type: of the inputs. dtype: of q, k, v. head_dim: d. group: query heads per key head.
    """
    from moda_compile.kernels import configs

    served = device_type == "cuda" and _depth_obstacle(dtype, head_dim) is None
    few = group <= _MAX_GATHER_GROUP
    products = configs.products(head_dim=head_dim, group=group, dtype=dtype)
    return served and few and products == "vector"


def gathers_ahead(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    readers: int,
    slots: int,
) -> bool:
    """Whether a launch that gathers slots begins the next ones' gradients, too.

    The next launch then starts from these sums and doesn't read q and do of the readers so far once
    more. For each element of a row, in bytes of elements of `dtype` (size) and of the sums (wide):

        saved: 2 size group readers;  cost: 2 (2 wide + size) slots

    as sums of keys and of values are written and read, and K and V read in both launches. Four
    slots also take more registers and instructions for each byte, which bind: 2.1 TB/s on an H100,
    2.2 on an H200 (group 2, d=64, bf16). Two slots move what the memory does. On an H100 that is
    2.7 (benchmarks/results/counters.json), which eats up what is saved unless that is about three
    times the cost. On an H200 it is 4.0, and two launches take 912 and 1266 us where one that
    begins two slots and the next take 1057 and 1400 (24 and 34 readers;
    benchmarks/results/tiles_h200.txt). At a group of 1 there are fewer bytes for each slot, and it
    takes six times the cost: with 34 readers, 3.4 times, both launches took 11% longer than two
    without. At d=80, of whose registers three eighths are padding, it is 1.6 of 2.2, and nothing
    is left.

    Args:
        device: of the inputs. dtype: of q, k, v. head_dim: d. group: query heads per key head.
        readers: that both launches would read. slots: to begin.
    """
    from moda_compile.kernels import configs, launch

    if launch.memory_bandwidth(device) >= _FASTER_THAN_FOUR_SLOTS:
        return False
    wide = torch.promote_types(dtype, torch.float32).itemsize
    saved = 2 * dtype.itemsize * group * readers
    cost = 2 * (2 * wide + dtype.itemsize) * slots
    least = 3 if group > 1 else 6
    return configs.padded(head_dim) == head_dim and saved >= least * cost


def row_elements(lowering: Lowering, head_dim: int) -> int | None:
    """head_dim to which a compiler pads q, k and v for this lowering, token-major in memory; None
    where it leaves them as they are.

    The platform's attentions take rows of a multiple of ROW_ELEMENTS elements and, backward, heads
    inside tokens. What comes otherwise they copy, in every call; where q, k and v are made, writing
    them so costs next to nothing, and zero columns change no result. The slots' rows, of whole 16
    bytes then, are read with the widest loads.

    Args:
        lowering: as chosen. head_dim: d of the model.
    """
    if lowering.name != "split" or lowering.sequence not in ("cudnn", "flash", "efficient"):
        return None
    return -(-head_dim // ROW_ELEMENTS) * ROW_ELEMENTS


@functools.lru_cache(maxsize=256)
def _choose(
    dtype: torch.dtype,
    head_dim: int,
    few_queries: bool,
    single_token: bool,
    capability: tuple[int, int],
    available: frozenset[str],
    masked: bool,
    fusable: bool,
) -> Lowering:
    unserved = _depth_obstacle(dtype, head_dim)
    if unserved is not None:
        return Lowering("plain", "math", unserved)
    # Measured on 9.0 (benchmarks/results/decode_h100.txt), slots and all: 0.5x to 1.0x the time of
    # flash attention without them, and a mask costs flash attention its place.
    if few_queries and (dtype != torch.bfloat16 or capability >= (8, 0)):
        text = "few queries over many keys: Triton kernels split the keys and join the slots."
        return Lowering("decode", "triton", text)
    refused: list[str] = []
    # On capability 9.0 and newer cuDNN's kernels are the ones written for the hardware (measured
    # on 9.0, forward + backward: 0.6x the time of flash attention); before, flash attention is.
    order = ("cudnn", "flash") if capability >= (9, 0) else ("flash", "cudnn")
    for name in (*order, "efficient"):
        obstacle = _obstacle(name, dtype, head_dim, single_token, capability, available, masked)
        if obstacle is None:
            tried = f"; not {'; not '.join(refused)}" if refused else ""
            text = f"{name} attention, capability {capability[0]}.{capability[1]}{tried}."
            return Lowering("split", name, text)
        refused.append(f"{name}: {obstacle}")
    none = f"no attention of the platform: {'; '.join(refused)}"
    if fusable and (dtype != torch.bfloat16 or capability >= (8, 0)):
        return Lowering("fused", "triton", f"{none}; one Triton kernel for sequence and slots.")
    return Lowering("split", "math", f"{none}.")


def _depth_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels can't serve, or None."""
    if dtype not in (*_LOW_PRECISION, torch.float32):
        return f"{dtype}: no fused kernel computes in it."
    if head_dim > _MAX_HEAD_DIM:
        return f"head_dim {head_dim} exceeds {_MAX_HEAD_DIM}."
    return None


def _obstacle(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    single_token: bool,
    capability: tuple[int, int],
    available: frozenset[str],
    masked: bool,
) -> str | None:
    """Why the fused attention `name` can't serve, or None. (Odd head dims can: they get padded.)"""
    if name not in available:
        return "not available or disabled"
    if masked and name != "efficient":
        return "takes no mask"
    if name == "efficient":
        if dtype == torch.bfloat16 and capability < (8, 0):
            return "bfloat16 needs capability 8.0"
        return None
    if dtype not in _LOW_PRECISION:
        return f"{dtype} is not a 16-bit type"
    if capability < (8, 0):
        return "needs capability 8.0"
    if name == "cudnn":
        if head_dim > _CUDNN_MAX_HEAD_DIM:
            return f"head_dim {head_dim} exceeds {_CUDNN_MAX_HEAD_DIM}"
        if single_token:
            return "a key sequence of one token"
    # Its backward doesn't fit in the shared memory of these capabilities.
    if name == "flash" and head_dim > 192 and capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return f"head_dim {head_dim} exceeds 192"
    return None
