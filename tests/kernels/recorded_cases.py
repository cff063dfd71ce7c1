"""Run unfolded graphs, launches from text and all, in Triton's interpreter; print their errors.

A script, as interpreter_cases.py is one: the graphs are traced elsewhere, where kernels are not
interpreted (test_recorded.py), and come as code in a file, the first argument. A graph computes
`layer` below; so does PyTorch on the CPU, in float64 and in the graph's own dtype.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moda_compile import gathered, ops  # noqa: E402, F401  (register the operators)
from moda_compile.kernels import recorded  # noqa: E402
from tests.kernels.script import report  # noqa: E402

OPS = torch.ops.moda_compile
SCALE = 0.125
RESULTS = ("out", "lse", "dq", "delta", "first", "second")


def layer(out: Tensor, lse: Tensor, q: Tensor, grad: Tensor, *depth: Tensor) -> tuple[Tensor, ...]:
    """Slots merged into a sequence part, and backward as if two layers had read the first slot; the
    second's gradient is begun beside that, and gets a reader more.
    """
    keys, values = list(depth[::2]), list(depth[1::2])
    made, joint = OPS.depth_merge(out, lse, q, keys, values, SCALE)
    _, _, dq, delta = OPS.depth_merge_query_backward(
        grad, out, lse, q, keys, values, made, joint, SCALE
    )
    readers = [[x] * 2 for x in (grad, q, joint, delta)]
    whole, sums = OPS.depth_gather(
        *readers, keys[:2], values[:2], [2, 1], SCALE, q.dtype, [keys[0], None], unfinished=1
    )
    readers = [[x] for x in (grad, q, joint, delta)]
    rest, _ = OPS.depth_gather(
        *readers, keys[1:2], values[1:2], [1], SCALE, q.dtype, [None, values[1]], sums
    )
    return made, joint, dq, delta, whole, rest


def interpreted(tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    """`recorded.run` with tensors in the addresses' place."""
    read = recorded._read(text)
    made = [
        torch.empty_strided(x.shape, x.stride, dtype=x.dtype).fill_(
            torch.nan if x.dtype.is_floating_point else -1
        )
        for x in read.made
    ]
    given = [*tensors, *made]
    arguments = [given[x["tensor"]] if isinstance(x, dict) else x for x in read.arguments]
    read.function[(read.grid,)](*arguments)
    return [x for x, own in zip(made, read.made, strict=True) if own.returned]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Errors of a graph and of eager PyTorch, relative to float64."""
    torch.manual_seed(0)
    inputs = []
    for shape, stride, dtype in case.pop("inputs"):
        x = torch.empty_strided(shape, stride, dtype=dtype)
        inputs.append(x.copy_(torch.randn(shape)))
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": torch.inf}
    exec(case.pop("code"), names)
    recorded.run = interpreted
    found = names["forward"](None, *inputs)
    eager = layer(*inputs)
    exact = layer(*(x.double() for x in inputs))
    errors: dict[str, dict[str, float]] = {"error": {}, "eager": {}}
    for name, x, y, z in zip(RESULTS, found, eager, exact, strict=True):
        errors["error"][name] = ((x.double() - z).norm() / z.norm()).item()
        errors["eager"][name] = ((y.double() - z).norm() / z.norm()).item()
    return errors


if __name__ == "__main__":
    report(torch.load(sys.argv[1], weights_only=False), run)
