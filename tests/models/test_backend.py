"""`Backend` in a `torch.compile` of the user's own, and models inside DistributedDataParallel.

As in test_never_silent, each outcome is the oracle's output or one error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from moda_compile import Backend, MoDAConfig
from moda_compile.testing import reference
from tests.models.cases import (
    IDS,
    LAYERS,
    Bracketed,
    assert_moda,
    converted,
    dynamo,
    graph_break,
    stack,
)

# --- distributed data parallel ------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    # DDP's graph splitter starts with a bucket of this size (1 MiB), more than these models have.
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)


def test_ddp(process_group: None, expected: Tensor) -> None:
    model = converted()
    parallel = ddp(model)
    logits = parallel(IDS)
    assert_moda(logits, expected)
    logits.square().mean().backward()
    twin = stack()
    reference(twin, IDS).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9, msg=name)  # as assert_moda
    assert_moda(torch.compile(ddp(converted()), backend="eager")(IDS), expected)


def test_ddp_in_a_compile_splits(process_group: None) -> None:
    backend = Backend(compiler="eager")
    with pytest.raises(BackendCompilerFailed, match="one graph per gradient bucket"):
        torch.compile(ddp(stack()), backend=backend)(IDS)
    torch._dynamo.reset()
    backend = Backend(compiler="eager", attentions=LAYERS)
    with pytest.raises(BackendCompilerFailed, match="one graph per gradient bucket"):
        torch.compile(ddp(stack()), backend=backend)(IDS)


@pytest.mark.parametrize("mode", [False, "python_reducer"])
def test_ddp_in_a_compile_unsplit(mode: bool | str, process_group: None, expected: Tensor) -> None:
    with dynamo(optimize_ddp=mode):
        parallel = torch.compile(ddp(stack()), backend=Backend(compiler="eager"))
        assert_moda(parallel(IDS), expected)


# --- torch.compile(model, backend=Backend()), no conversion -------------------------------------


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend=Backend(compiler="eager", **options))


@pytest.mark.parametrize("attentions", [None, LAYERS])
def test_backend(attentions: int | None, expected: Tensor) -> None:
    assert_moda(compiled(stack(), attentions=attentions)(IDS), expected)


@pytest.mark.parametrize("attentions", [LAYERS - 1, LAYERS + 1])
def test_backend_with_another_count(attentions: int) -> None:
    with pytest.raises(BackendCompilerFailed, match=f"converted model's {attentions}"):
        compiled(stack(), attentions=attentions)(IDS)


@pytest.mark.parametrize("attentions", [None, 3])
@pytest.mark.parametrize(("wrap", "layer"), [(graph_break, 1), (torch.compiler.disable, 2)])
def test_backend_cut_between_layers(
    wrap: Callable[..., Any], layer: int, attentions: int | None
) -> None:
    model = stack(layers=3)
    model.blocks[layer].forward = wrap(model.blocks[layer].forward)
    with pytest.raises(BackendCompilerFailed, match="RewriteError.*attention"):
        compiled(model, attentions=attentions)(IDS)


def test_backend_cut_in_the_middle() -> None:
    """Two attentions on either side: only the break itself tells."""
    model = stack(layers=4)
    model.blocks[2].forward = graph_break(model.blocks[2].forward)
    with pytest.raises(BackendCompilerFailed, match="graph break"):
        compiled(model)(IDS)


def test_backend_breaks_around_the_stack(expected: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed, match="graph break"):
        compiled(Bracketed())(IDS)
    torch._dynamo.reset()
    assert_moda(compiled(Bracketed(), attentions=LAYERS)(IDS), 2 * expected)


def test_backend_per_block() -> None:
    model = stack()
    for block in model.blocks:
        block.compile(backend=Backend(compiler="eager"))
    with pytest.raises(BackendCompilerFailed, match="a single attention"):
        model(IDS)


def test_backend_projected() -> None:
    """New parameters can't come out of a backend."""
    with pytest.raises(BackendCompilerFailed, match="moda_compile.convert"):
        compiled(stack(), config=MoDAConfig(ffn_kv="projected"))(IDS)
