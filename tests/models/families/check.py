"""Hold one case of one family to what is promised of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import moda_compile
from moda_compile import MoDAConfig, RewriteError
from moda_compile.backend import Compiler
from moda_compile.testing import Comparison, check_conversion
from tests.models.families.refused import RefusedFamily
from tests.models.families.row import Case, Family, Padding, build, shown
from tests.models.families.slots import slots_factory


def check(
    family: Family,
    case: Case,
    *,
    backend: Compiler = "eager",
    inputs: Callable[[Padding], dict[str, Any]] | None = None,
) -> list[Comparison]:
    """Convert and compare outputs and all gradients; see `check_conversion`, whose budget it is.

    The oracle runs `family.oracle` with the same weights, whatever implementation `case` says.
    `explain` has tests of its own.
    """
    oracle = family.oracle or family.implementations[0]
    return check_conversion(
        build(family, case),
        (inputs or family.inputs)(case.padding),
        MoDAConfig(ffn_kv=case.ffn_kv),
        backend=backend,
        ffn_slots=slots_factory(family.heads, case.ffn_kv) if family.heads is not None else None,
        oracle=build(family, case, implementation=oracle),
        stacks=family.stacks,
        outputs=shown(case.padding),
        explain=False,
    )


def hold(family: Family, case: Case) -> None:
    """`check`, and that new parameters are the promised ones."""
    # Tracing is what takes the time here; AOTAutograd sees the fullest of the graphs.
    fullest = case.training and case.ffn_kv == "projected"
    compared = check(family, case, backend="aot_eager" if fullest else "eager")
    new: set[str] = set()
    if case.ffn_kv == "projected":
        assert family.heads is not None
        layers = family.heads.layers(build(family, case))
        new = {name for layer in range(layers - 1) for name in family.heads.new(layer)}
    gradients = {c.name.removeprefix("gradient of ") for c in compared}
    assert {name for name in gradients if ".moda_" in name} == new


def refusal(
    model: nn.Module, inputs: Mapping[str, Any], config: MoDAConfig | None = None
) -> RewriteError:
    """What `convert` says; the model has to be as it was."""
    torch._dynamo.reset()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        moda_compile.convert(model, config, example_inputs=dict(inputs), backend="eager")
    except RewriteError as error:
        after = model.state_dict()
        assert "forward" not in vars(model)
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        return error
    raise AssertionError(f"got a converted {type(model).__name__}, expected a RewriteError")


def small(family: RefusedFamily) -> nn.Module:
    """A model of a family that is refused, in evaluation."""
    torch.manual_seed(0)
    return family.make(family.implementation, False).eval()
