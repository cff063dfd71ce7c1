"""Oracles, random transformer stacks, and one check that holds a conversion to its promises.

`cases`, `stacks` and `pairs` need Hypothesis, which comes with the extra `moda-compile[testing]`,
and so does `python -m moda_compile.testing.soak`, which runs thousands of cases.
"""

from moda_compile.testing.cases import Case
from moda_compile.testing.check import Budget, Comparison, FFNSlotsFactory, check_conversion
from moda_compile.testing.cores import ByHand
from moda_compile.testing.reference import (
    FFNSlots,
    Reader,
    ReferenceMode,
    moda_attention_reference,
    reference,
)
from moda_compile.testing.stack_config import PairConfig, StackConfig, Variant
from moda_compile.testing.stacks import RandomPair, RandomStack
from moda_compile.testing.strategy import cases, pairs, stacks

__all__ = [
    "Budget",
    "ByHand",
    "Case",
    "Comparison",
    "FFNSlots",
    "FFNSlotsFactory",
    "PairConfig",
    "RandomPair",
    "RandomStack",
    "Reader",
    "ReferenceMode",
    "StackConfig",
    "Variant",
    "cases",
    "check_conversion",
    "moda_attention_reference",
    "pairs",
    "reference",
    "stacks",
]
