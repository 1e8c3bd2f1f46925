"""Every command that the documents show does what they say, run in the order in which they stand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelspec import __all__
from modelspec.builders.requirements import unsupported
from modelspec.cli import COMMANDS
from modelspec.resolve import resolve
from modelspec.validate import check

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/language.md",
    "docs/model.md",
    "docs/training.md",
    "docs/distributed.md",
    "docs/launch.md",
    "docs/fp8.md",
    "docs/checkpoints.md",
    "docs/plan.md",
    "docs/plan-layouts-accuracy.md",
    "docs/plan-search.md",
    "docs/schedules.md",
    "docs/plan-time.md",
    "docs/hardware-files.md",
    "docs/hardware.md",
    "docs/serving-costs.md",
    "docs/diff.md",
    "docs/ci.md",
    "docs/add-a-variant.md",
    "CONTRIBUTING.md",
]
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)

# Shown as they are for people; here a run of three steps shows the same.
SHORTER = {
    "modelspec train specs/deepseek-v3-nano.yaml --out runs/first": ["--steps", "3"],
    "modelspec train specs/deepseek-v3-nano.yaml --out runs/first --steps 20": ["--steps", "3"],
    "modelspec train specs/deepseek-v3-nano.yaml --nproc 2 --set parallelism.expert=2 --out runs/two": [
        *("--steps", "1", "--set", "training.evaluation=null")
    ],
    "modelspec train specs/deepseek-v3-nano.yaml --init-from runs/imported --out runs/second --steps 20": [
        *("--steps", "3")
    ],
}
# Run by CI itself: this test is part of the second, and the first is the trainer's main job.
BY_CI = {"make train", "make test", "make check", "make install"}


def blocks(page: str) -> list[tuple[str, str]]:
    """The commands of a page with the output that is shown after each."""
    found = []
    for block in CONSOLE.findall((ROOT / page).read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip()))
    return found


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone, where runs may be written."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("specs", "docs"):
        # No link: a spec must lie in the folder of its project.
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(page: str, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    subprocess.run(["rm", "-rf", "runs"], cwd=workplace, check=True)
    for command, output in blocks(page):
        if command in BY_CI:
            assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        arguments = shlex.split(command) + SHORTER.get(command, [])
        done = subprocess.run(
            arguments, capture_output=True, text=True, cwd=workplace, env=environment, timeout=240, check=False
        )
        expected = 1 if "error[" in output else 0
        assert done.returncode == expected, f"{command}\n{done.stdout}{done.stderr}"
        for line in output.splitlines():
            assert line in done.stdout + done.stderr, f"{command} does not print: {line}"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/model.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    (code,) = PYTHON.findall((ROOT / page).read_text())
    shutil.copytree(ROOT / "specs", tmp_path / "specs")
    before = "import torch\ntokens = torch.randint(0, 4096, (2, 16))\ntargets = tokens.roll(-1, dims=1)\n"
    done = subprocess.run(
        [sys.executable, "-c", before + code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_spec_of_the_readme_is_valid_without_a_remark_and_trains_anywhere(tmp_path: Path) -> None:
    (spec,) = YAML.findall((ROOT / "README.md").read_text())
    path = tmp_path / "my-model.yaml"
    path.write_text(spec)
    model, diagnostics = check(resolve(path))
    assert model is not None and diagnostics == ()
    assert unsupported(model) == []


def test_what_data_flows_into_is_a_command_or_said_to_be_a_function() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (stages,) = re.findall(r"ModelSpec --> (.*)\n", page)
    for name in re.split(r", | --> ", stages):
        assert name in COMMANDS or (f"`modelspec.{name}(old, new)` is a function only" in page and name in __all__)


def test_nothing_names_this_projects_workplace() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in tracked.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ""}:
            text = path.read_text("utf-8", errors="ignore")
            assert not re.search(r"shared/(reference|DESIGN|spec-drafts)|/wor[k]/|/roo[t]/", text), name
