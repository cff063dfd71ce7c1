"""Oracles, random transformer stacks, and one check that holds a conversion to its promises.

`stacks` needs Hypothesis, which comes with the extra `moda-compile[testing]`.
"""

from moda_compile.testing.check import Budget, Comparison, FFNSlotsFactory, check_conversion
from moda_compile.testing.reference import (
    FFNSlots,
    ReferenceMode,
    moda_attention_reference,
    reference,
)
from moda_compile.testing.stacks import RandomStack, StackConfig, stacks

__all__ = [
    "Budget",
    "Comparison",
    "FFNSlots",
    "FFNSlotsFactory",
    "RandomStack",
    "ReferenceMode",
    "StackConfig",
    "check_conversion",
    "moda_attention_reference",
    "reference",
    "stacks",
]
