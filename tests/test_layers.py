"""Who may import whom. The table is the architecture; the imports themselves are read, also those in functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("modelspec", "builders", "kernels")
LINKS = {"builders": "../builders", "kernels": "../kernels", "specs": "../specs"}

# Lowest first. A layer may import itself and the layers named beside it.
TEXT, SCHEMA, KERNELS, ARITHMETIC, CHECKS = "text", "schema", "kernels", "arithmetic", "checks"
HARDWARE = "hardware"
ANSWERS, VALIDATE, EXPLAIN, MODEL, BUILDERS, CLI = "answers", "validate", "explain", "model", "builders", "cli"
MAY_IMPORT: dict[str, set[str]] = {
    TEXT: set(),
    SCHEMA: set(),
    KERNELS: set(),
    ARITHMETIC: {SCHEMA},
    CHECKS: {SCHEMA, ARITHMETIC},
    HARDWARE: {TEXT, SCHEMA, CHECKS},
    ANSWERS: {SCHEMA, ARITHMETIC, CHECKS, HARDWARE},
    VALIDATE: {TEXT, SCHEMA, ARITHMETIC, CHECKS},
    EXPLAIN: {TEXT, SCHEMA, CHECKS, ANSWERS},
    MODEL: {SCHEMA, ARITHMETIC, KERNELS},
    BUILDERS: {TEXT, SCHEMA, KERNELS, ARITHMETIC, CHECKS, HARDWARE, ANSWERS, VALIDATE, MODEL},
    CLI: {TEXT, SCHEMA, ARITHMETIC, CHECKS, HARDWARE, ANSWERS, VALIDATE, EXPLAIN, MODEL, BUILDERS},
}

# Which layer a module is in: the longest prefix counts.
LAYERS: dict[str, str] = {
    "modelspec.diagnostics": TEXT,
    "modelspec.document": TEXT,
    "modelspec.files": TEXT,
    "modelspec.merge": TEXT,
    "modelspec.override": TEXT,
    "modelspec.resolve": TEXT,
    "modelspec.grammar": TEXT,
    "modelspec.hints": TEXT,
    "modelspec.shape": TEXT,
    "modelspec.schema": SCHEMA,
    "modelspec.kernels": KERNELS,
    "modelspec.beat": ARITHMETIC,
    "modelspec.layout": ARITHMETIC,
    "modelspec.timeline": ARITHMETIC,
    "modelspec.amount": ARITHMETIC,
    "modelspec.checks": CHECKS,
    "modelspec.hardware": HARDWARE,
    "modelspec.plan": ANSWERS,
    "modelspec.plan.saved": EXPLAIN,
    "modelspec.diff": ANSWERS,
    "modelspec.dump": ANSWERS,
    "modelspec.picture": ANSWERS,
    "modelspec.hf_config": ANSWERS,
    "modelspec.init": ANSWERS,
    "modelspec.scale": ANSWERS,
    "modelspec.json_schema": ANSWERS,
    "modelspec.launch": ANSWERS,
    "modelspec.launch.reach": TEXT,
    "modelspec.explain": EXPLAIN,
    "modelspec.policy": EXPLAIN,
    "modelspec.policy_keys": EXPLAIN,
    "modelspec.fix": VALIDATE,
    "modelspec.report": EXPLAIN,
    "modelspec.validate": VALIDATE,
    **{
        f"modelspec.builders.{part}": MODEL
        for part in (
            *("attention", "balance", "block", "build", "device", "errors", "ffn", "fp8"),
            *("init", "inputs", "layers", "model", "mtp", "rope"),
        )
    },
    "modelspec.builders": BUILDERS,
    "modelspec.doctor": BUILDERS,
    "modelspec.environment": BUILDERS,
    "modelspec.cli": CLI,
    "modelspec.__main__": CLI,
}
# Inside the text layer the order is strict.
TEXT_ORDER = ("diagnostics", "document", "merge", "override", "resolve")


def modules() -> dict[str, Path]:
    """Every module of the three folders by its import name."""
    found = {}
    for folder in FOLDERS:
        prefix = [] if folder == "modelspec" else ["modelspec"]
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder != "modelspec" or not {"builders", "kernels"} & set(parts):
                found[".".join([*prefix, *parts]).removesuffix(".__init__")] = path
    # The front door loads its public names when they are used: it stands above all layers.
    found.pop("modelspec")
    return found


MODULES = modules()


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if at_import_time else ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(module), names=names):
                # `from modelspec import schema` names a module, `from modelspec.schema import MLA` what is in one.
                yield from (f"{module}.{name.name}" if f"{module}.{name.name}" in MODULES else module for name in names)


def layer(module: str) -> str | None:
    """The layer of a module, None for what is not ours."""
    fitting = [prefix for prefix in LAYERS if module == prefix or module.startswith(f"{prefix}.")]
    return LAYERS[max(fitting, key=len)] if fitting else None


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_layers_below_its_own(module: str) -> None:
    own = layer(module)
    assert own is not None, f"{module} stands in no layer: give it one in LAYERS"
    for imported in imports(MODULES[module]):
        theirs = layer(imported)
        if imported == "modelspec" or (imported.startswith("modelspec.") and theirs is None):
            raise AssertionError(f"{module} imports {imported}, which stands in no layer")
        assert theirs in {None, own, *MAY_IMPORT[own]}, f"{module} ({own}) imports {imported} ({theirs})"


def test_the_text_layer_is_ordered() -> None:
    for index, name in enumerate(TEXT_ORDER):
        above = {f"modelspec.{other}" for other in TEXT_ORDER[index + 1 :]}
        assert not above & set(imports(MODULES[f"modelspec.{name}"])), name


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {module: {i for i in imports(path) if i in MODULES} for module, path in MODULES.items()}
    # Packages import their own parts to gather names; a part may not ask its package back.
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) not in (KERNELS, MODEL, BUILDERS, CLI)])
def test_the_language_does_not_import_torch(module: str) -> None:
    heavy = {"torch", "transformers", "safetensors", "numpy"}
    assert not heavy & {imported.split(".")[0] for imported in imports(MODULES[module])}


def is_command(path: Path) -> bool:
    """Whether a file defines a command, and is so imported by `--help`."""
    return any(
        isinstance(node, ast.FunctionDef) and node.name == "command" for node in ast.parse(path.read_text()).body
    )


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if layer(name) == CLI and is_command(path)])
def test_commands_load_the_builders_only_when_they_run(module: str) -> None:
    assert not [i for i in imports(MODULES[module], at_import_time=True) if layer(i) in (MODEL, BUILDERS)]


@pytest.mark.parametrize("name", LINKS)
def test_the_links_give_the_folders_their_import_names(name: str) -> None:
    link = ROOT / "modelspec" / name
    assert link.is_symlink()
    assert link.readlink().as_posix() == LINKS[name]


def test_no_file_names_the_folders_by_their_top_level_names() -> None:
    for module, path in MODULES.items():
        assert not {"builders", "kernels", "specs"} & {i.split(".")[0] for i in imports(path)}, module
