"""`modelspec train` on several processes: started, resumed under other layouts, stopped, and deprived of a rank."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SPEC = """spec_version: 1
name: small
extends: modelspec:deepseek-v3-nano
model:
  vocab_size: 300
  hidden_size: 64
  ffn: {dense: {intermediate_size: 64}, moe: {intermediate_size: 32}}
  layers: [{repeat: 1, attention: mla, ffn: dense}, {repeat: 3, attention: mla, ffn: moe}]
training:
  stages: [{name: main, steps: 6, sequence_length: 32, batch_size: 8, learning_rate: 3.0e-3}]
  evaluation: {every_steps: 3, tokens: 1024}
  checkpoint: {every_steps: 3, keep_last: 3}
data:
  sources: [{type: text, files: TEXT}]
  tokenizer: {type: bpe_trained, vocab_size: 300}
"""
PIPELINE_AND_EXPERT = ("parallelism.pipeline={size: 2, schedule: dualpipev}", "parallelism.expert=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small spec over text of its own."""
    path: Path = tmp_path_factory.mktemp("train")
    text = path / "text.txt"
    text.write_text("".join(f"{number} times {number % 7} makes {number * (number % 7)}\n" for number in range(1500)))
    (path / "small.yaml").write_text(SPEC.replace("TEXT", str(text)))
    return path


def train(folder: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Starts `modelspec train small.yaml` with these arguments."""
    settings = {"MODELSPEC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "modelspec", "train", "small.yaml", "--device", "cpu", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | settings | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def done(process: "subprocess.Popen[str]", code: int = 0, timeout: float = 120) -> str:
    """What a run said, once it ended with this code."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, said
    return said


def sets(*overrides: str) -> Iterator[str]:
    for override in overrides:
        yield from ("--set", override)


def rows(run: Path) -> dict[tuple[int, str], float]:
    """Losses and norms of a run by step and name."""
    found: dict[tuple[int, str], float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        found |= {(row["step"], key): row[key] for key in ("loss", "mtp_loss", "grad_norm", "val_loss") if key in row}
    return found


def test_a_run_of_four_ranks_goes_on_on_any_number_under_other_layouts(folder: Path) -> None:
    done(train(folder, "--out", "alone"))
    wanted = rows(folder / "alone")
    four = ("--nproc", "4", *sets(*PIPELINE_AND_EXPERT))
    done(train(folder, "--out", "four", "--steps", "3", *four))
    assert {key for key in wanted if key[0] <= 3} == rows(folder / "four").keys()
    for name, layout in {
        "one": (),
        "two": ("--nproc", "2", *sets("parallelism.data.zero=3")),
        "four again": ("--nproc", "4", *sets("parallelism.context=2", "parallelism.tensor=2")),
    }.items():
        process = subprocess.run(["cp", "-r", folder / "four", folder / name], check=True)
        assert process.returncode == 0
        done(train(folder, "--out", name, "--resume", *layout))
        found = rows(folder / name)
        assert found.keys() == wanted.keys()
        # Adam divides by the root of small numbers: rounding shows in the norm first.
        assert found == pytest.approx(wanted, rel=2e-4)


def test_a_signal_saves_on_all_ranks_and_the_run_goes_on(folder: Path) -> None:
    process = train(folder, "--out", "stopped", "--nproc", "2", *sets("training.stages.0.steps=2000"))
    _wait_for_step(folder / "stopped", 2)
    process.send_signal(signal.SIGTERM)
    said = done(process, 143)
    assert "--resume goes on" in said and "Traceback" not in said
    (saved,) = (folder / "stopped" / "checkpoints").glob("step-*")
    steps = int(saved.name.removeprefix("step-"))
    assert (steps, "loss") in rows(folder / "stopped")
    long = (*sets("training.stages.0.steps=2000"), "--steps", str(steps + 1))
    done(train(folder, "--out", "stopped", "--resume", "--nproc", "2", *long))
    assert (steps + 1, "loss") in rows(folder / "stopped")


def test_a_dead_rank_ends_the_others_with_one_message_that_names_it(folder: Path) -> None:
    process = train(
        folder, "--out", "dead", "--nproc", "3", *sets("training.stages.0.steps=2000", "training.stages.0.batch_size=6")
    )
    _wait_for_step(folder / "dead", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 3
    began = monotonic()
    os.kill(int(children[2]), signal.SIGKILL)
    said = done(process, 3)
    assert monotonic() - began < 30
    assert "rank 2 was killed by SIGKILL" in said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}, "the launcher started 3 processes"),
        ({"WORLD_SIZE": "abc", "RANK": "0"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "ranks count from 0"),
    ],
)
def test_another_world_than_the_launchers_is_misuse(folder: Path, environment: dict[str, str], words: str) -> None:
    said = done(train(folder, "--out", "other", "--world", "2", **environment), 2)
    assert words in said
    assert not (folder / "other").exists()


def test_torchrun_and_accelerate_start_ranks_that_find_their_place(folder: Path) -> None:
    program = ("-m", "modelspec", "train", "small.yaml", "--device", "cpu", "--steps", "1", "--world", "2")
    # MULTI_CPU would run one process, without a word; this kind starts processes, and on CPUs too.
    config = folder / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\ndebug: false\n"
    )
    launchers = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--config_file", str(config)],
    }
    settings = {"MODELSPEC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, launcher in launchers.items():
        command = [sys.executable, "-m", *launcher, *program, "--out", name]
        finished = subprocess.run(
            command, cwd=folder, env=os.environ | settings, text=True, capture_output=True, timeout=120
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("1 steps done") == 1, finished.stdout
        assert (1, "loss") in rows(folder / name)


def _wait_for_step(run: Path, step: int) -> None:
    end = monotonic() + 90
    while monotonic() < end:
        if (run / "metrics.jsonl").exists() and (step, "loss") in rows(run):
            return
        sleep(0.1)
    raise AssertionError(f"{run} did not come to step {step}")
