"""A converted model's state, copies, shapes and modes, in this process and in a second one.

The oracle and the tolerance are test_training's.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import moda_compile
from moda_compile import InputError, MoDAConfig, NotRewrittenError
from tests.models.cases import (
    IDS,
    PROJECTED,
    TIGHT,
    assert_gradients,
    convert,
    deep,
    loss_of,
    pair,
    stack,
)

ROOT = Path(__file__).resolve().parents[2]


# --- state, copies, several models --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "shared", "projected"])
def test_state_dict(mode: Any) -> None:
    plain = deep().state_dict()
    model = convert(deep(), MoDAConfig(ffn_kv=mode))
    state = model.state_dict()
    added = [name for name in state if name not in plain]
    expected = [
        f"blocks.{layer}.ffn.moda_{kind}_weight" for layer in (0, 1) for kind in ("key", "value")
    ]
    assert added == [*(expected if mode == "projected" else []), "moda_config"]
    assert [name for name in state if name in plain] == list(plain)

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = convert(deep(seed=5), MoDAConfig(ffn_kv=mode))
    assert not torch.equal(other(IDS), model(IDS))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(IDS), model(IDS))
    twice = {n: t if n == "moda_config" else 2 * t for n, t in state.items()}
    other.load_state_dict(twice, assign=True)
    model.load_state_dict(twice)
    assert torch.equal(other(IDS), model(IDS))


def test_state_dict_that_does_not_fit() -> None:
    plain = deep().state_dict()
    projected = convert(deep(), PROJECTED)
    before = {n: t.clone() for n, t in projected.state_dict().items()}
    with pytest.raises(InputError, match="plain model's.*moda_key_weight"):
        projected.load_state_dict(plain)
    with pytest.raises(InputError, match="ffn_kv='projected'.*ffn_kv='none'"):
        convert(deep()).load_state_dict(before)
    with pytest.raises(RuntimeError, match="Unexpected key.*moda_config.*moda_key_weight"):
        deep().load_state_dict(before)


@pytest.mark.parametrize("config", [None, PROJECTED], ids=["none", "projected"])
def test_saved_model(config: MoDAConfig | None) -> None:
    model, oracle = pair(config)
    loss_of(model(IDS)).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        twin.zero_grad()
        loss_of(twin(IDS)).backward()
        oracle.zero_grad()
        loss_of(oracle(IDS)).backward()
        assert_gradients(twin, oracle)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(IDS).any()
    torch.testing.assert_close(model(IDS), oracle(IDS), **TIGHT)  # none of it touched the model


def test_deepcopy_trains_on_its_own() -> None:
    model, oracle = pair(PROJECTED)
    loss_of(model(IDS)).backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss_of(twin(IDS)).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(model(IDS), twin(IDS))
    loss_of(model(IDS)).backward()
    loss_of(oracle(IDS)).backward()
    assert_gradients(model, oracle)


def test_two_models_interleaved() -> None:
    """Of one class, with other options and other sizes, forward and backward mixed."""
    pairs = [pair(PROJECTED, "aot_eager"), pair(None, "aot_eager", seed=4, kv_heads=1, layers=2)]
    losses = [loss_of(m(IDS)) for p in pairs for m in p]
    for loss in losses:
        loss.backward()
    for model, oracle in pairs:
        assert_gradients(model, oracle)


def test_one_model_feeds_another() -> None:
    pairs = [pair(None), pair(None, seed=4)]
    for side in (0, 1):
        first, second = pairs[0][side], pairs[1][side]
        loss_of(first(IDS) * second(IDS)).backward()
    for model, oracle in pairs:
        assert_gradients(model, oracle)


# --- shapes and modes without gradients ---------------------------------------------------------


@contextmanager
def compilations() -> Iterator[list[int]]:
    """Graphs handed to the backend."""
    count: list[int] = []
    original = moda_compile.Backend.__call__

    def counted(self: Any, gm: Any, inputs: Any, **options: Any) -> Any:
        count.append(len(inputs))
        return original(self, gm, inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moda_compile.Backend, "__call__", counted)
        yield count


@pytest.mark.parametrize("mask", ["flag", "arange_bool", "tril_bool", "triu_additive", "none"])
def test_ten_lengths(mask: str) -> None:
    """One graph for the first length, one for all others."""
    model, oracle = pair(None, "aot_eager", mask=mask, layers=2)
    lengths = (9, 4, 12, 5, 17, 2, 31, 8, 23, 3)
    long = IDS.repeat(1, 4)
    with compilations() as graphs:
        for length in lengths:
            loss_of(model(long[:, :length])).backward()
            loss_of(oracle(long[:, :length])).backward()
            assert_gradients(model, oracle)
    assert len(graphs) <= 2


def test_lengths_and_batches_with_slots_of_ffns() -> None:
    model, oracle = pair(PROJECTED, "aot_eager", layers=2, rotary="half")
    long = IDS.repeat(4, 4)
    with compilations() as graphs:
        for batch, length in ((2, 9), (3, 4), (8, 17), (5, 30), (4, 4), (7, 2)):
            loss_of(model(long[:batch, :length])).backward()
            loss_of(oracle(long[:batch, :length])).backward()
            assert_gradients(model, oracle)
    # static; then both are dynamic, once more if they happened to be equal: (4, 4)
    assert len(graphs) <= 3


@pytest.mark.parametrize("shape", [(2, 1), (1, 9), (1, 1), (3, 2)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    model, oracle = pair(PROJECTED, "aot_eager", layers=2)
    ids = IDS.repeat(2, 1)[: shape[0], : shape[1]]
    for m in (model, oracle):
        loss_of(m(ids)).backward()
    assert_gradients(model, oracle)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, mode: Callable[[], Any]) -> None:
    model, oracle = pair(PROJECTED, backend)
    with mode():
        torch.testing.assert_close(model(IDS), oracle(IDS), **TIGHT)
    for m in (model, oracle):  # and training goes on behind it
        loss_of(m(IDS)).backward()
    assert_gradients(model, oracle)
    with mode():
        torch.testing.assert_close(model(IDS), oracle(IDS), **TIGHT)


def test_second_derivative_raises() -> None:
    model, _ = pair()
    loss = loss_of(model(IDS))
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()  # type: ignore[union-attr]


# --- a warm second process ----------------------------------------------------------------------

_PROCESS = """
import sys
import torch
import moda_compile.backend
from torch._dynamo.utils import counters
from moda_compile import MoDAConfig, convert
from moda_compile.testing import RandomStack, StackConfig

torch.set_num_threads(1)
if len(sys.argv) > 1:
    moda_compile.backend.source_hash = lambda: sys.argv[1]
torch.manual_seed(0)
model = RandomStack(StackConfig(layers=2, kv_heads=2, groups=2, mask="flag", length=9, batch=2))
ids, = model.config.inputs()
convert(model, MoDAConfig(ffn_kv="projected"), example_inputs=(ids,))
loss = model(ids).square().mean()
loss.backward()
aot = counters["aot_autograd"]
total = sum(p.grad.double().abs().sum() for p in model.parameters())
names = ("hit", "miss", "bypass")
print("RESULT", *(aot[f"autograd_cache_{name}"] for name in names), f"{total.item():.6f}")
"""


def run_process(cache: Path, *args: str) -> tuple[list[int], str]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
    _, hit, miss, bypass, total = line.split()
    return [int(hit), int(miss), int(bypass)], total


@pytest.mark.slow
def test_warm_second_process(tmp_path: Path) -> None:
    """The cache serves it, and a changed library does not get the old one's gradients."""
    cold, total = run_process(tmp_path)
    assert cold == [0, 1, 0]
    warm, again = run_process(tmp_path)
    assert warm == [1, 0, 0]
    assert again == total
    changed, anew = run_process(tmp_path, "another library")
    assert changed == [0, 1, 0]
    assert anew == total


def test_saved_model_in_another_process(tmp_path: Path) -> None:
    """torch.load imports what it needs, and the model is still guarded."""
    model = convert(stack())
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(IDS).detach(), tmp_path / "logits.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import sys, torch\n"
        "load = lambda name: torch.load(f'{sys.argv[1]}/{name}.pt', weights_only=False)\n"
        "model, ids, logits = load('model'), load('ids'), load('logits')\n"
        "torch.testing.assert_close(model(ids), logits, rtol=0, atol=0)\n"
        "torch.compiler.set_stance('force_eager')\n"
        "try:\n    model(ids)\n"
        "except RuntimeError as error:\n    print('RAISED', type(error).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["RAISED", NotRewrittenError.__name__]
