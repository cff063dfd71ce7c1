"""Builds the wheel, installs it elsewhere, and looks at what a user gets."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("moda_compile", "kernels", "patterns")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of a command that sees neither the checkout nor, unless asked, anything on a path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: builds leave things behind."""
    target = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "-w", out, checkout, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed in it."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def declared() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]


def test_package_list_is_what_is_on_disk():
    on_disk = set()
    for folder in SOURCES:
        prefix = () if folder == "moda_compile" else ("moda_compile",)
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join((*prefix, *init.parent.relative_to(ROOT).parts)))
    assert sorted(on_disk) == sorted(declared()["packages"])
    orphans = [
        path
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    ]
    assert not orphans, "modules in folders without __init__.py would not be in the wheel"


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        listed = archive.read(entry_points).decode()
    expected = {"moda_compile/py.typed", "moda_compile/kernels/launcher.c"}
    for folder in SOURCES:
        prefix = "" if folder == "moda_compile" else "moda_compile/"
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(prefix + path.relative_to(ROOT).as_posix())
    assert names == expected
    assert "[torch_dynamo_backends]" in listed
    assert "moda_compile = moda_compile.backend:moda_compile" in listed


def test_install_adds_one_top_level_package(installed):
    """In particular no `kernels`, a PyPI package that transformers imports."""
    top = {p.name for p in installed.iterdir() if p.suffix != ".dist-info"} - {"__pycache__", "bin"}
    assert top == {"moda_compile"}


def test_installed_package_imports_elsewhere(installed, tmp_path):
    for name in declared()["packages"]:
        if name.endswith(".testing"):
            pytest.importorskip("hypothesis")  # the extra `testing`
        code = f"import {name} as m; print(m.__file__)"
        where = run(sys.executable, "-c", code, cwd=tmp_path, path=installed)
        assert Path(where).is_relative_to(installed)


@pytest.mark.parametrize("first", ["import torch", "import moda_compile"])
def test_backend_is_found_by_name(installed, tmp_path, first):
    """With and without our import: registering twice would be an error in PyTorch."""
    code = f"""{first}
import torch
from torch._dynamo.backends.registry import lookup_backend
assert "moda_compile" in torch._dynamo.list_backends(exclude_tags=None)
print(lookup_backend("moda_compile").__module__)
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=installed) == "moda_compile.backend"


@pytest.mark.parametrize("name", ["kernels", "patterns"])
def test_checkout_imports(name):
    """From the repository's root, with ./moda_compile found first."""
    where = run(
        sys.executable, "-c", f"import moda_compile.{name} as m; print(m.__file__)", cwd=ROOT
    )
    assert Path(where) == ROOT / name / "__init__.py"


@pytest.mark.parametrize(("name", "inside"), [("kernels", "choose"), ("patterns", "PATTERNS")])
def test_checkout_refuses_another_name(name, inside):
    """Else one module would exist twice."""
    code = f"""
try:
    from {name} import {inside}
except ImportError as error:
    print(error)
"""
    assert f"moda_compile.{name}" in run(sys.executable, "-c", code, cwd=ROOT)


def test_checkout_leaves_transformers_alone():
    """It looks for the PyPI package `kernels` by importing it: from here, that is our folder."""
    pytest.importorskip("transformers")
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "LlamaForCausalLM"


def test_editable_install(checkout, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    )
    # PyTorch, setuptools and the rest come from this environment.
    ours = {sysconfig.get_path("purelib"), *site.getsitepackages()}
    (Path(purelib) / "outer.pth").write_text("\n".join(sorted(ours)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", checkout, cwd=tmp_path)
    for name, folder in (("moda_compile", "moda_compile"), ("moda_compile.kernels", "kernels")):
        where = run(python, "-c", f"import {name} as m; print(m.__file__)", cwd=tmp_path)
        assert Path(where) == checkout / folder / "__init__.py"
    code = "import torch; print('moda_compile' in torch._dynamo.list_backends(exclude_tags=None))"
    assert run(python, "-c", code, cwd=tmp_path) == "True"
