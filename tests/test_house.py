"""Promises about the repository itself: links, extras, generated pages, and nothing that executes data."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# rglob does not follow links, so the real folders are named.
SOURCES = sorted(path for folder in ("modelspec", "builders", "kernels") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", ["builders", "kernels", "specs"])
def test_the_packages_nest_by_links(name: str) -> None:
    link = ROOT / "modelspec" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_all_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"hf", "data", "serve", "eval", "track", "dev"} <= project["optional-dependencies"].keys()


def test_ci_pins_torch_and_one_triton() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert pins["torch"] == "2.13.0"
    assert "triton" in pins
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dev["dependencies"] + dev["optional-dependencies"]["dev"]
    names = {name.split(";")[0].split(">")[0].strip().lower() for name in wanted}
    assert {name.replace("-", "_") for name in names} <= {name.lower().replace("-", "_") for name in pins}


@pytest.mark.parametrize(
    "page",
    ["docs/spec-keys.md", "docs/diagnostics.md", "modelspec/spec.schema.json", "modelspec/resolved.schema.json"],
)
def test_generated_pages_are_current(page: str) -> None:
    program = f"import runpy; print(runpy.run_path('docs/generate.py')['PAGES'][{page!r}](), end='')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == (ROOT / page).read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_executes_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "__import__"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load")}


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if "cli" in path.parts:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printing = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert printing == [], f"{path.relative_to(ROOT)} prints at {printing}"
