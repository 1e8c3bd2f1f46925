"""`modelspec train` on several processes: started, resumed under other layouts, stopped, and deprived of a rank."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from tests.builders.parallel.started import done, rows, sets, settings, small_folder, train, wait_for_step

PIPELINE_AND_EXPERT = ("parallelism.pipeline={size: 2, schedule: dualpipev}", "parallelism.expert=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small spec over text of its own."""
    return small_folder(tmp_path_factory.mktemp("train"))


def test_a_run_of_four_ranks_goes_on_on_any_number_under_other_layouts(folder: Path) -> None:
    done(train(folder, "--out", "alone"))
    wanted = rows(folder / "alone")
    four = ("--nproc", "4", *sets(*PIPELINE_AND_EXPERT))
    done(train(folder, "--out", "four", "--steps", "3", *four))
    assert {key for key in wanted if key[0] <= 3} == rows(folder / "four").keys()
    for name, layout in {
        "one": (),
        "two": ("--nproc", "2", *sets("parallelism.data.zero=2")),
        "eight": ("--nproc", "8", *sets("parallelism.context=2", "parallelism.tensor=2", "parallelism.data.zero=3")),
    }.items():
        process = subprocess.run(["cp", "-r", folder / "four", folder / name], check=True)
        assert process.returncode == 0
        done(train(folder, "--out", name, "--resume", *layout))
        found = rows(folder / name)
        assert found.keys() == wanted.keys()
        # Adam divides by the root of small numbers: rounding shows in the norm first.
        assert found == pytest.approx(wanted, rel=2e-4)


def test_ranks_begin_with_their_parts_of_weights_that_stand_in_files(folder: Path) -> None:
    build = ["build", "small.yaml", "-o", "weights", "--seed", "5"]
    subprocess.run([sys.executable, "-m", "modelspec", *build], cwd=folder, env=settings(folder), check=True)
    begin = ("--steps", "2", "--init-from", "weights")
    done(train(folder, "--out", "begun", *begin))
    layout = sets("parallelism.expert=2", "parallelism.tensor=2", "parallelism.data.zero=2")
    done(train(folder, "--out", "cut", *begin, "--nproc", "2", *layout))
    found, wanted = rows(folder / "cut"), rows(folder / "begun")
    assert found == pytest.approx(wanted, rel=1e-5)
    done(train(folder, "--out", "drawn", "--steps", "1"))
    assert rows(folder / "drawn")[1, "loss"] != pytest.approx(wanted[1, "loss"], rel=1e-4)


def test_a_dry_run_takes_one_step_of_all_ranks_and_leaves_nothing(folder: Path) -> None:
    said = done(train(folder, "--out", "dry", "--dry-run", "--nproc", "2", *sets("parallelism.expert=2")))
    assert re.search(r"one step of 256 tokens: \d+\.\d\d s, at most \d\.\d\d GiB of memory on each of 2 ranks", said)
    assert said.count("one step of") == 1 and not (folder / "dry").exists()


def test_a_signal_saves_on_all_ranks_and_the_run_goes_on(folder: Path) -> None:
    process = train(folder, "--out", "stopped", "--nproc", "2", *sets("training.stages.0.steps=2000"))
    wait_for_step(folder / "stopped", 2)
    process.send_signal(signal.SIGTERM)
    said = done(process, 143)
    assert "--resume goes on" in said and "Traceback" not in said
    # On a quick machine one was written on the way.
    saved = (folder / "stopped" / "checkpoints").glob("step-*")
    steps = max(int(path.name.removeprefix("step-")) for path in saved)
    assert (steps, "loss") in rows(folder / "stopped")
    long = (*sets("training.stages.0.steps=2000"), "--steps", str(steps + 1))
    done(train(folder, "--out", "stopped", "--resume", "--nproc", "2", *long))
    assert (steps + 1, "loss") in rows(folder / "stopped")


def test_a_dead_rank_ends_the_others_with_one_message_that_names_it(folder: Path) -> None:
    process = train(
        folder, "--out", "dead", "--nproc", "3", *sets("training.stages.0.steps=2000", "training.stages.0.batch_size=6")
    )
    wait_for_step(folder / "dead", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 3
    began = monotonic()
    os.kill(int(children[2]), signal.SIGKILL)
    said = done(process, 3)
    assert monotonic() - began < 30
    assert "rank 2 was killed by SIGKILL in " in said and "builders/parallel/" in said
    assert said.count("error:") == 1 and "--resume" in said
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
    for name, launcher in launchers.items():
        command = [sys.executable, "-m", *launcher, *program, "--out", name]
        finished = subprocess.run(
            command, cwd=folder, env=settings(folder), text=True, capture_output=True, timeout=120
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("1 steps done") == 1, finished.stdout
        assert (1, "loss") in rows(folder / name)
