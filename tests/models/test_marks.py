"""What a conversion attaches to modules: how little of it Dynamo looks at in every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moda_compile import MoDAConfig
from tests.models.cases import IDS, PROJECTED, convert, deep

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
