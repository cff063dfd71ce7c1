"""Put the figures of benchmarks/results into the README's tables, and draw their pictures again.

    PYTHONPATH=. python benchmarks/readme.py

The tables stand between two markers, and each row says what its JSON files claim, with the command
that made them. Nothing in them is typed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from results import FOLDER, commands, draw

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
GROUPS = {
    "Whole models": ("model", "memory", "decode"),
    "The op": ("kernel_table", "counters", "ablation", "cpu_attention"),
    "Compilation": ("compile_time",),
    "Correctness": (
        "check_gpu", "check_gather", "check_decode", "check_merge", "check_model", "check_flex",
        "check_varlen", "check_modes", "sanitize", "families",
    ),
}  # fmt: skip


def found(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and contents of each file of results that there is, in the tables' order."""
    for names in GROUPS.values():
        for name in names:
            yield from of_benchmark(folder, name)


def of_benchmark(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and contents of one benchmark's files of results.

    Another machine's results of the same benchmark are in a file of their own behind it, such as
    model_h200.json: ratios of two machines can't stand in one table.
    """
    for file in (folder / f"{name}.json", *sorted(folder.glob(f"{name}_*.json"))):
        if file.exists():
            yield file.stem, json.loads(file.read_text(encoding="utf-8"))


def render(folder: Path) -> str:
    """The machines, and a table for each group of benchmarks, as Markdown."""
    machines: dict[str, Mapping[str, Any]] = {}
    for _, result in found(folder):
        machines.setdefault(short(result["machine"]), result)
    lines = [
        f"- {name}: {described(result).removeprefix(f'{name}, ')}"
        for name, result in machines.items()
    ]
    for group, names in GROUPS.items():
        own = {name: list(of_benchmark(folder, name)) for name in names}
        present = {short(x["machine"]) for results in own.values() for _, x in results}
        columns = [name for name in machines if name in present]
        if columns:
            lines += ["", f"### {group}", "", row("what", *columns, "made by")]
            lines += [row(*["---"] * (len(columns) + 2))]
            for results in own.values():
                lines += rows(results, columns, machines)
    return "\n".join(lines)


def rows(
    results: list[tuple[str, dict[str, Any]]],
    columns: list[str],
    machines: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """A row for each claim of one benchmark, with a column for each machine."""
    figures: dict[str, dict[str, str]] = {}
    for _, result in results:
        for what, figure in result["claims"]:
            figures.setdefault(what, {})[short(result["machine"])] = figure
    made_by = sources(results, machines)
    for what, said in figures.items():
        yield row(what, *(said.get(name, "") for name in columns), made_by)
        made_by = "the same"


def row(*cells: str) -> str:
    """Of a table."""
    return f"| {' | '.join(cells)} |"


def sources(
    results: list[tuple[str, dict[str, Any]]], machines: Mapping[str, Mapping[str, Any]]
) -> str:
    """The commands that made a benchmark's files, with these; and what differs from `machines`."""
    files: dict[str, list[str]] = {}
    for name, result in results:
        machine = short(result["machine"])
        first, *later = commands(result)
        command = f"`python {first}`" + (f" and {len(later)} more" if later else "")
        place = f"benchmarks/results/{name}"
        picture = f", [picture]({place}.png)" if result["picture"] else ""
        other = "" if alike(result, machines[machine]) else f" ({described(result)})"
        files.setdefault(command, []).append(f"{machine} [rows]({place}.json){picture}{other}")
    return "<br>".join(f"{command}: {', '.join(own)}" for command, own in files.items())


def short(machine: str) -> str:
    """A machine's name without its maker's, and without what follows."""
    return machine.removeprefix("NVIDIA ").replace(",", " ").split()[0]


def described(result: Mapping[str, Any]) -> str:
    """The machine that results are from, and the versions there."""
    return ", ".join([result["machine"], *(f"{k} {v}" for k, v in result["versions"].items())])


def alike(result: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two results are from one machine, with the same versions of what both name."""
    ours, theirs = result["versions"], other["versions"]
    same = all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    return same and bool(result["machine"] == other["machine"])


def put_into(readme: str, tables: str) -> str:
    """``readme`` with ``tables`` between the markers.

    Raises:
        ValueError: if it has no such place.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no {BEGIN} .. {END}")
    return f"{before}{begin}\n{tables}\n{end}{after}"


def main() -> None:
    """Draw, and write the README."""
    for name, _ in found(FOLDER):
        draw(FOLDER / f"{name}.json")
    text = README.read_text(encoding="utf-8")
    README.write_text(put_into(text, render(FOLDER)), encoding="utf-8")


if __name__ == "__main__":
    main()
