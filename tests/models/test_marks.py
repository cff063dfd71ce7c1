"""What a conversion attaches to modules: how little of it Dynamo looks at in every call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moda_compile
from moda_compile import MoDAConfig
from tests.models.cases import IDS, PROJECTED, TIGHT, convert, deep

guards = pytest.importorskip("torch._dynamo.guards")


@pytest.mark.skipif(
    not hasattr(guards, "guard_manager_testing_hook_fn"), reason="this PyTorch has no such hook"
)
@pytest.mark.parametrize("config", [MoDAConfig(), PROJECTED], ids=lambda c: c.ffn_kv)
def test_dynamo_passes_over_marked_modules(
    config: MoDAConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While their attributes stay: so it does with plain modules, where it is told to."""
    found: dict[str, bool] = {}

    def look(guarded: Any, _locals: Any, _builder: Any) -> None:
        nodes = [guarded.root]
        while nodes:
            node = nodes.pop()
            if issubclass(node.get_type_of_guarded_value(), nn.Module):
                found[node.get_source()] = node.is_tag_safe()
            nodes += node.get_child_managers()
            if hasattr(node, "get_key_value_managers"):
                nodes += [value for _, value in node.get_key_value_managers().values() if value]

    model = convert(deep(), config)
    monkeypatch.setattr(guards, "guard_manager_testing_hook_fn", look)
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        model(IDS)
    for kind in ("attention", "ffn"):
        safe = [safe for source, safe in found.items() if source.endswith(f"['{kind}']")]
        assert safe == [True] * 3


@pytest.mark.parametrize("mode", ["none", "projected"])
def test_a_module_of_several_names_is_marked_once(mode: Any) -> None:
    config = MoDAConfig(ffn_kv=mode)
    tied, untied = deep(), deep()
    untied.blocks = nn.ModuleList(copy.deepcopy(tied.blocks[0]) for _ in range(3))
    tied.blocks = nn.ModuleList([tied.blocks[0]] * 3)
    names = set(vars(tied.blocks[0].attention))
    convert(tied, config)
    convert(untied, config)
    for layer in range(2 if mode == "projected" else 0):
        own, other = tied.blocks[0].ffn, untied.blocks[layer].ffn
        other.moda_key_weight.data = own.moda_key_weight.data
        other.moda_value_weight.data = own.moda_value_weight.data
    torch.testing.assert_close(tied(IDS), untied(IDS), **TIGHT)
    assert [len(m._forward_hooks) for m in tied.modules() if m._forward_hooks] == [1] * (
        2 if mode == "projected" else 1
    )
    moda_compile.revert(tied)
    assert not any(m._forward_hooks for m in tied.modules())
    assert set(vars(tied.blocks[0].attention)) == names
