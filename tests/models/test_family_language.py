"""Language models of transformers, unmodified: small random weights against the float64 oracle."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.models.families.check import hold  # noqa: E402
from tests.models.families.decoders import DECODERS  # noqa: E402
from tests.models.families.row import Case, Family, parameters  # noqa: E402


@pytest.mark.parametrize(("family", "case"), parameters(DECODERS))
def test_family(family: Family, case: Case) -> None:
    """Outputs and all gradients equal the oracle's; new parameters are the promised ones."""
    hold(family, case)
