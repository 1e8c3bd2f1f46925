"""What each command prints, word for word, as committed under transcripts/.

    python tests/modelspec/test_transcripts.py

writes the transcripts anew. Read the difference before committing it: it is what users will see.
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest

from modelspec import environment
from modelspec.cli import COMMANDS, main
from modelspec.environment import Device, Environment

FOLDER = Path(__file__).parent / "transcripts"
ROOT = Path(__file__).parents[2]

SESSIONS = {
    "validate": (
        "validate small.yaml wider.yaml",
        "validate broken.yaml",
        "validate unrelated.yaml",
        "validate small.yaml --set model.ffn.moe.num_expert=8",
        "validate small.yaml --set spec_version=2",
        "validate missing.yaml",
    ),
    "show": ("show wider.yaml", "show broken.yaml --set model.layers=[]"),
    "plan": ("plan wider.yaml", "plan wider.yaml --modules"),
    "diff": ("diff small.yaml wider.yaml", "diff small.yaml small.yaml", "diff small.yaml wider.yaml --breaking"),
    "explain": (
        "explain model.attention.any.num_kv_heads",
        "explain 'model.ffn.*.router.scale'",
        "explain MS304",
        "explain MS999",
        "explain model.ffn.moe.rooter",
    ),
    "schema": ("schema | head -n 20", "schema --resolved | head -n 8"),
    "init": (
        "init --from small.yaml --name grown --params 4m-a800k",
        "cat grown.yaml",
        "init --from small.yaml --name grown",
        "init --from small.yaml --name tiny --params 1k",
        "init --from small.yaml --name tiny --params big",
        "init --from deepseek-v4 --name tiny",
    ),
    "doctor": ("doctor wider.yaml", "doctor wider.yaml --set parallelism.world_size=4"),
    "launch": (
        "launch trained.yaml --on slurm --nproc 16 --sbatch partition=gpu",
        "launch trained.yaml --on slurm --nproc 16",
        "launch trained.yaml --on torchrun --nproc 12",
        "launch small.yaml --on torchrun",
        "launch trained.yaml --on kubernetes --nproc 16",
        "launch trained.yaml --on kubernetes --nproc 16 --image registry/modelspec:1",
        "launch trained.yaml --on accelerate --nproc 2 --set parallelism.tensor=3",
    ),
    "build": ("build small.yaml",),
}
# A machine that no test runs on.
MACHINE = Environment(
    python=(3, 12),
    packages={"torch": "2.13.0", "triton": "3.7.1", "click": "8.2.1"},
    least={"torch": "2.11", "triton": "3.6", "click": "8.1"},
    device=Device("NVIDIA L4", 2, 24 * 2**30, (8, 9)),
    compiler=True,
    folder="runs/wider",
    free=10**6,
)


def transcript(name: str) -> str:
    """The commands of a session, each with what it prints and, where it is not 0, its exit code."""
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        for file in (FOLDER / "files").iterdir():
            shutil.copy(file, temporary)
        return "\n".join(f"$ {_shown(command)}\n{_printed(command)}" for command in SESSIONS[name])


def _shown(command: str) -> str:
    return command if command.startswith("cat ") else f"modelspec {command}"


def _printed(command: str) -> str:
    command, _, lines = command.partition(" | head -n ")
    program, *arguments = shlex.split(command)
    if program == "cat":
        return _steady(Path(*arguments).read_text())
    printed, code = StringIO(), 0
    with (
        patch.object(sys, "argv", ["modelspec", program, *arguments]),
        patch.object(environment, "environment", lambda *_: MACHINE),
        patch.dict(os.environ, {"COLUMNS": "100"}),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    text = _steady(printed.getvalue())
    if lines:
        text = "".join(text.splitlines(keepends=True)[: int(lines)])
    return text + (f"[exit {code}]\n" if code else "")


def _steady(text: str) -> str:
    """The text without what differs from run to run, and without spaces at the ends of lines."""
    text = re.sub(r"in [0-9.]+ s\b", "in 0.00 s", text.replace(str(ROOT), "ROOT"))
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", SESSIONS)
def test_a_command_prints_what_its_transcript_has(name: str) -> None:
    assert transcript(name) == (FOLDER / f"{name}.txt").read_text()


def test_every_command_that_runs_no_model_has_a_transcript() -> None:
    models = {"train", "generate", "import", "export"}
    assert set(SESSIONS) == set(COMMANDS) - models
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(SESSIONS)


if __name__ == "__main__":
    for session in SESSIONS:
        (FOLDER / f"{session}.txt").write_text(transcript(session))
