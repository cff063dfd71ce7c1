"""Put the figures of benchmarks/results into the README's table, and draw their pictures again.

    PYTHONPATH=. python benchmarks/readme.py

The table stands between two markers, and each row says what its JSON file claims, with the command
that made it. Nothing in it is typed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import FOLDER, draw

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
ORDER = (
    "kernel_table", "counters", "ablation", "model", "memory", "decode", "compile_time",
    "cpu_attention", "sanitize",
)  # fmt: skip


def found(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and contents of each file of results that there is, in the table's order."""
    for name in ORDER:
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
    """The table as Markdown: a row for each claim, with a line in it for each machine."""
    lines = ["| what | figure | command |", "| --- | --- | --- |"]
    for name in ORDER:
        own = list(of_benchmark(folder, name))
        figures: dict[str, list[str]] = {}
        for _, result in own:
            for what, figure in result["claims"]:
                figures.setdefault(what, []).append(f"{short(result['machine'])}: {figure}")
        sources = "<br>".join(source(stem, result) for stem, result in own)
        for number, (what, said) in enumerate(figures.items()):
            made_by = sources if number == 0 else "the same"
            lines.append(f"| {what} | {'<br>'.join(said)} | {made_by} |")
    return "\n".join(lines)


def short(machine: str) -> str:
    """A machine's name without its maker's, and without what follows."""
    return machine.removeprefix("NVIDIA ").replace(",", " ").split()[0]


def source(name: str, result: dict[str, Any]) -> str:
    """The command that made a file of results, where it ran, and the picture."""
    picture = f" ([picture](benchmarks/results/{name}.png))" if result["picture"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return f"`{result['command']}`{picture}; {result['machine']}, {versions}"


def put_into(readme: str, table: str) -> str:
    """``readme`` with ``table`` between the markers.

    Raises:
        ValueError: if it has no such place.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no {BEGIN} .. {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Draw, and write the README."""
    for name, _ in found(FOLDER):
        draw(FOLDER / f"{name}.json")
    text = README.read_text(encoding="utf-8")
    README.write_text(put_into(text, render(FOLDER)), encoding="utf-8")


if __name__ == "__main__":
    main()
