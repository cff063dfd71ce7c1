"""Rules about the source itself: which module may import which, and what a public name owes."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import moda_compile

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom: a module imports modules of lower rows only. Names are dotted paths without
# `moda_compile.`; a package stands for all its modules.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("testing",),
    ("__init__",),
    ("checkpoint",),
    ("convert",),
    ("attention", "backend", "capture", "summary"),
    ("pipeline",),
    ("passes", "verify"),
    ("plan",),
    ("patterns", "kernels"),
    ("report", "stacked", "markers", "cost", "gathered", "launches", "visible"),
    ("ops", "varlen"),
    ("config", "fx", "garbage", "registration", "traced"),
    ("errors",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
# Modules of these may import others of the same package; passes may not.
OPEN_INSIDE = {"patterns", "kernels", "testing"}
# Calls into kernels happen when an op runs, so these import them inside a function: importing
# moda_compile doesn't load Triton.
LAZY_UP = {(name, "kernels") for name in ("launches", "ops", "varlen", "visible")}
LAZY_ONLY = "kernels"  # nobody above imports it at module level
FILE_LIMIT = 500


@dataclass(frozen=True)
class Import:
    """One import statement's target, as a dotted path without ``moda_compile.``."""

    importer: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def sources() -> dict[str, Path]:
    """Dotted path without ``moda_compile.`` -> file, for every module of the library."""
    found = {}
    for folder, prefix in (
        ("moda_compile", ()),
        ("kernels", ("kernels",)),
        ("patterns", ("patterns",)),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = prefix + path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__" and len(parts) > 1:
                parts = parts[:-1]
            found[".".join(parts)] = path
    return found


MODULES = sources()


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules of the library that one statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        # `from moda_compile.passes import detect` may name a module or something inside one.
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        if name.split(".")[0] != "moda_compile":
            continue
        inner = name.removeprefix("moda_compile").removeprefix(".")
        if inner not in MODULES:
            inner = inner.rpartition(".")[0]
        yield inner if inner in MODULES else "__init__"


def imports(name: str) -> list[Import]:
    """Every import of the library's own modules in module ``name``."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    return [
        Import(name, target, node.lineno, id(node) in inside)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for target in targets(node)
    ]


def layer(name: str) -> str:
    return name.split(".")[0]


ALL_IMPORTS = [found for name in MODULES for found in imports(name)]


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} == set(RANK)


def test_imports_point_down():
    wrong = []
    for found in ALL_IMPORTS:
        above, below = layer(found.importer), layer(found.target)
        down = RANK[below] > RANK[above]
        inside = above == below and above in OPEN_INSIDE
        lazy_up = found.lazy and (above, below) in LAZY_UP
        if not (down or inside or lazy_up):
            wrong.append(str(found))
    assert not wrong


def test_kernels_are_imported_inside_functions_only():
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if layer(found.target) == LAZY_ONLY
        and layer(found.importer) not in (LAZY_ONLY, "testing")
        and not found.lazy
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "target"),
    [("patterns", "kernels"), ("kernels", "patterns"), ("passes", "passes")],
)
def test_never_imports(importer, target):
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if layer(found.importer) == importer
        and layer(found.target) == target
        and found.target != found.importer
    ]
    assert not wrong


def test_no_relative_imports():
    """``kernels`` and ``patterns`` live elsewhere in a checkout; absolute names work in both."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong


def test_import_loads_no_kernel():
    """Nor anything else of ours that imports Triton. (Dynamo itself imports Triton, if it's there,
    and a library for torch.compile loads Dynamo.)
    """
    code = "import sys, moda_compile\n"
    code += "print([m for m in sys.modules if m.startswith(('moda_compile.kernels', "
    code += "'moda_compile.stacked'))])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300, capture_output=True
    )
    assert done.stdout.decode().strip() == "[]"


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for folder in ("moda_compile", "kernels", "patterns", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_file(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LIMIT
    # Nothing outside the repository: neither the folder beside it nor anybody's work tree.
    outside = ("[.][.]/shared", "/" + "work/")
    assert not re.search("|".join(outside), text)


def functions_of(thing: object) -> Iterator[tuple[str, object]]:
    """A public function, or a class's public methods and constructor."""
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if inspect.isfunction(member) and not name.startswith("_"):
                yield f"{thing.__name__}.{name}", member
    elif inspect.isfunction(thing):
        yield thing.__name__, thing


@pytest.mark.parametrize("name", sorted(moda_compile.__all__))
def test_public_name(name):
    thing = getattr(moda_compile, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing)
        assert thing.__doc__, f"{name} only inherits its docstring"
    for title, function in functions_of(thing):
        assert inspect.getdoc(function), f"{title} has no docstring"
        signature = inspect.signature(function)
        bare = [
            p.name
            for p in signature.parameters.values()
            if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, f"{title}: no annotation on {bare}"
        assert signature.return_annotation is not signature.empty, f"{title}: return type"


@pytest.mark.parametrize("name", sorted(moda_compile.__all__))
def test_public_name_is_tested(name):
    word = re.compile(rf"\b{re.escape(name)}\b")
    files = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__).resolve()]
    assert any(word.search(path.read_text(encoding="utf-8")) for path in files)
