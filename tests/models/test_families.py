"""Encoders, other libraries and rarer families: see test_family_language.py. And what all share."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import moda_compile  # noqa: E402
from moda_compile import MoDAConfig  # noqa: E402
from moda_compile.testing import Comparison  # noqa: E402
from tests.models.families.check import check, hold, refusal  # noqa: E402
from tests.models.families.decoders import DECODERS, GPT2_SIZES  # noqa: E402
from tests.models.families.row import Case, Family, build, language, parameters  # noqa: E402
from tests.models.families.table import FAMILIES  # noqa: E402

OTHERS = [family for family in FAMILIES.values() if family not in DECODERS]


@pytest.mark.parametrize(("family", "case"), parameters(OTHERS))
def test_family(family: Family, case: Case) -> None:
    """Outputs and all gradients equal the oracle's; new parameters are the promised ones."""
    hold(family, case)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.shapes])
def test_explain(name: str) -> None:
    """Slots in order, the last layer writes none, and no slot holds repeated heads."""
    family = FAMILIES[name]
    assert family.shapes is not None
    case = Case(implementation=family.implementations[-1], training=True)
    report = moda_compile.explain(build(family, case), **family.inputs("none"))
    assert not report.refusals
    found = [(a.heads, a.kv_heads, a.head_dim, a.causal) for a in report.attentions]
    assert found == list(family.shapes)
    last = len(found) - 1
    assert [a.reads for a in report.attentions] == [tuple(range(i)) for i in range(last + 1)]
    assert [a.writes for a in report.attentions] == [*((i,) for i in range(last)), ()]
    assert all(a.source and a.source.rpartition(":")[2].isdigit() for a in report.attentions)
    assert len({a.block for a in report.attentions}) == last + 1


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.no_ffn_slots])
def test_ffn_slots_are_refused(name: str) -> None:
    """Where a family's FFNs can't write slots: never with fewer slots than asked for."""
    family = FAMILIES[name]
    case = Case(implementation=family.implementations[0], training=True)
    error = refusal(build(family, case), family.inputs("none"), MoDAConfig(ffn_kv="shared"))
    assert family.no_ffn_slots in error.reason
    assert "ffn_kv='none'" in error.fix


def test_default_dropout_is_refused_in_training() -> None:
    """And says so by name; in evaluation the families above have their default dropout."""
    config = transformers.GPT2Config(**GPT2_SIZES)
    assert config.attn_pdrop == 0.1
    model = transformers.GPT2LMHeadModel(config).train()
    error = refusal(model, language("none"))
    assert "attention dropout (dropout_p=0.1)" in error.reason
    assert error.block == "transformer.h.0.attn"


def test_a_cache_that_is_new_computes_the_same() -> None:
    """The first call of transformers' models with a fresh cache is an ordinary forward pass."""
    family = FAMILIES["llama"]
    case = Case(implementation="sdpa", training=False, ffn_kv="shared")

    def with_cache(padding: Any) -> dict[str, Any]:
        return family.inputs(padding) | {"use_cache": True}

    check(family, case, inputs=with_cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("llama", Case(implementation="sdpa", training=True, ffn_kv="projected")),
        ("bert", Case(implementation="eager", training=True, padding="padded")),
    ],
)
def test_through_inductor(name: str, case: Case) -> None:
    """The real compiler: a causal stack with FFN slots, and a padded one written by hand."""
    compared: list[Comparison] = check(FAMILIES[name], case, backend="inductor")
    assert compared
