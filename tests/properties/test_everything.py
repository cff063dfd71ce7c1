"""Masks, cores, mixers, pairs of stacks, checkpoints, lengths: everything at once, each rarely.

The kinds that were drawn are what `python -m moda_compile.testing.soak` counts.
"""

from __future__ import annotations

import pytest
from hypothesis import given

from moda_compile.testing import Case, cases
from moda_compile.testing.strategy import CASE_FEATURES
from tests.properties.profile import profile


@pytest.mark.slow
@profile(25)
@given(case=cases(features=[name for name in CASE_FEATURES if name != "near_miss"]))
def test_everything_at_once(case: Case) -> None:
    case.check()
