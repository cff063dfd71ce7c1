"""How many examples a property draws."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

EXAMPLES = int(os.environ.get("MODA_EXAMPLES", "0"))


def profile(examples: int, *, shrink: bool = True) -> settings:
    """`examples` in CI; there the same ones each time, so that a red run can be trusted."""
    phases = [Phase.explicit, Phase.generate] + [Phase.shrink] * shrink
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        print_blob=True,
        deadline=None,  # compiling takes seconds
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
