"""What a benchmark found: printed as a table, kept as JSON with the command that made it, drawn.

`publish` does all three. benchmarks/readme.py makes the README's table of figures from the JSON.

    PYTHONPATH=. python benchmarks/results.py OLD.json NEW.json --by layers B ffn_kv

puts the rows of a run that was of some of a benchmark's rows in their places in the first file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moda_compile.report import table

FOLDER = Path(__file__).resolve().parent / "results"
PREFIX = "PYTHONPATH=. python "  # of every command
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """How rows are drawn: `ys` over `x`, one line for each value of `split` (a column), or for each
    y. floor: a column that is drawn as a dashed line of each.
    """

    x: str
    ys: tuple[str, ...]
    split: str | None = None
    floor: str | None = None
    log_x: bool = False
    unit: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder of the JSON and the picture"
    )


def publish(
    name: str,
    title: str,
    rows: Sequence[Row],
    *,
    claims: Sequence[tuple[str, str]],
    picture: Picture | None = None,
    setting: str = "",
    folder: Path = FOLDER,
    printed: bool = False,
) -> None:
    """Print rows as a table; write `name`.json, and, where matplotlib is, `name`.png.

    Args:
        name: of the files.
        title: one line.
        rows: with the same keys, which are the columns; numbers as numbers.
        claims: (what, figure) rows of the README's table.
        picture: how to draw the rows.
        setting: what else one must know of the run.
        folder: where the files go.
        printed: the rows have been already, as they came.

    Raises:
        SystemExit: if there is no row, such as where time was up before the first.
    """
    if not rows:
        raise SystemExit(f"{name}: no row was measured, so nothing is written")
    found = {
        "title": title,
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        "setting": setting,
        "rows": [dict(row) for row in rows],
        "claims": [list(claim) for claim in claims],
        "picture": None if picture is None else asdict(picture),
    }
    if not printed:
        print(render(found))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(file)


def render(found: Mapping[str, Any]) -> str:
    """Title, machine and table as text."""
    installed = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    lines = [found["title"], f"{found['machine']}; {installed}", f"$ {found['command']}"]
    lines += [found["setting"]] if found["setting"] else []
    columns = list(found["rows"][0])
    shown = [columns, *([text(row[x]) for x in columns] for row in found["rows"])]
    return "\n".join([*lines, "", *table(shown)])


def text(value: Any) -> str:
    """A number with three figures, or more in front of the point; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def command() -> str:
    """The command line of this process, from the root of the repository; without --out."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return f"{PREFIX}{shlex.join(words)}"


def machine() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}, {platform.machine()}"


def versions() -> dict[str, str]:
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__}
    if torch.cuda.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found


def draw(file: Path) -> None:
    """`file`'s picture beside it, where it has one and matplotlib is installed."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["picture"] is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    picture = Picture(**found["picture"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = found["rows"]
    groups = dict.fromkeys(row[picture.split] for row in rows) if picture.split else [None]
    for group in groups:
        own = [row for row in rows if picture.split is None or row[picture.split] == group]
        for y in picture.ys:
            label = y if group is None else str(group) if len(picture.ys) == 1 else f"{group}, {y}"
            drawn = [(row[picture.x], row[y]) for row in own if row[y] is not None]
            (line,) = axes.plot(*zip(*drawn, strict=True), marker="o", label=label)
            if picture.floor is not None:
                least = [(row[picture.x], row[picture.floor]) for row in own if row[picture.floor]]
                if least:
                    axes.plot(
                        *zip(*least, strict=True), linestyle="--", color=line.get_color(), alpha=0.6
                    )
    if picture.log_x:
        axes.set_xscale("log", base=2)
    axes.set_xlabel(picture.x)
    axes.set_ylabel(picture.unit or picture.ys[0])
    axes.set_title(found["title"], fontsize=10)
    axes.text(
        1.0, -0.16, found["machine"], transform=axes.transAxes, ha="right", fontsize=7, color="gray"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file.with_suffix(".png"), dpi=110)


def commands(found: Mapping[str, Any]) -> list[str]:
    """Those that made a file's rows, one after another, without PREFIX."""
    return re.split("; (?:later )?(?=benchmarks/)", found["command"].removeprefix(PREFIX))


def merge(old: Path, new: Path, by: Sequence[str], *, add: bool = False) -> None:
    """Replace rows of ``old`` by the ones of ``new`` that are the same in the columns ``by``.

    Args:
        add: append rows of ``new`` that have no place: a run that was cut short is gone on with.

    Raises:
        ValueError: if the two are of different machines or versions, or a row has no place.
    """
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in (old, new))
    for key in ("title", "machine", "versions"):
        if first[key] != second[key]:
            raise ValueError(f"{key}: {first[key]!r} in {old}, {second[key]!r} in {new}")
    places = {tuple(row[x] for x in by): i for i, row in enumerate(first["rows"])}
    for row in second["rows"]:
        own = tuple(row[x] for x in by)
        if own in places:
            first["rows"][places[own]] = row
        elif add:
            first["rows"].append(row)
        else:
            raise ValueError(f"{old} has no row with {dict(zip(by, own, strict=True))}")
    sys.path.insert(0, str(Path(__file__).parent))
    script = Path(commands(first)[0].split()[0])
    claims = importlib.import_module(script.stem).claims(first["rows"])
    first["claims"] = [list(claim) for claim in claims]
    again = commands(second)
    # Of a command that was run before, the rows have been replaced, or it has gone on.
    before = [x for x in commands(first) if x not in again]
    first["command"] = f"{PREFIX}{'; later '.join([*before, *again])}"
    old.write_text(json.dumps(first, indent=1) + "\n", encoding="utf-8")
    draw(old)


def main() -> None:
    """Merge two files."""
    parser = argparse.ArgumentParser(description="Put rows of one file of results into another.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--by", nargs="+", required=True, help="columns that name a row")
    parser.add_argument("--add", action="store_true", help="append rows that have no place")
    arguments = parser.parse_args()
    merge(arguments.old, arguments.new, arguments.by, add=arguments.add)


if __name__ == "__main__":
    main()
