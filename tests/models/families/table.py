"""All families, and the README's table of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.models.families.beyond import BEYOND
from tests.models.families.decoders import DECODERS
from tests.models.families.encoders import ENCODERS
from tests.models.families.libraries import LIBRARIES
from tests.models.families.refused import REFUSED, RefusedFamily
from tests.models.families.row import Case, Family, cases
from tests.models.families.torch_nn import TORCH_NN

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (*DECODERS, *ENCODERS, *LIBRARIES, *TORCH_NN, *BEYOND)
}
NOT_CONVERTED: Mapping[str, RefusedFamily] = {family.name: family for family in REFUSED}
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "families.json"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"


def version(library: str) -> str:
    """Of the installed distribution, without a build's own suffix (`+cpu`)."""
    return metadata.version(library).partition("+")[0]


def load() -> dict[str, Any]:
    """The results that the table shows: ``families`` and ``refused`` by name, ``torch``."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def render(results: Mapping[str, Any]) -> str:
    """The table and the list of refusals, as Markdown."""
    head = ("family", "library", "attention written as", "padded", "FFN slots", "checks passed")
    rows = [head, tuple("---" for _ in head)]
    for family in FAMILIES.values():
        found = results["families"].get(family.name)
        if found is None:
            continue
        passed = sum(case["passed"] for case in found["cases"].values())
        rows.append(
            (
                family.title,
                f"{family.library} {found['version']}",
                ", ".join(family.implementations),
                "yes" if family.padded else "",
                _slots(family),
                f"{passed} of {len(found['cases'])}",
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Refused, and what `explain()` says:", ""]
    lines += ["| family | library | reason | way out |", "| --- | --- | --- | --- |"]
    for refused in NOT_CONVERTED.values():
        found = results["refused"].get(refused.name)
        if found is not None:
            library = f"{refused.library} {found['version']}"
            lines.append(f"| {refused.title} | {library} | {found['reason']} | {found['fix']} |")
    return "\n".join(lines)


def _slots(family: Family) -> str:
    if family.heads is None:
        return ""
    return "refused" if family.no_ffn_slots else "projected, shared"


def put_into(readme: str, table: str) -> str:
    """``readme`` with ``table`` between the markers; unchanged where it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return readme
    return f"{before}{begin}\n{table}\n{end}{after}"


__all__ = ["FAMILIES", "NOT_CONVERTED", "Case", "Family", "cases", "load", "put_into", "render"]
