"""launch: what it writes, what it refuses, and values that arrive as they were given, whatever they contain."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from click.testing import CliRunner, Result
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from modelspec.cli import app
from modelspec.launch import Accelerate, Job, Slurm, Target, Torchrun, files, job_of
from modelspec.launch.yaml import document
from modelspec.validate import load

ROOT = Path(__file__).parents[2]
NANO = str(ROOT / "specs/deepseek-v3-nano.yaml")
# What shells and readers of YAML take for something else, and what they do not.
HOSTILE = st.text(
    alphabet="a0 '\"\\$`(){}[]!#&;|<>*?~-=:,.%@\n\t\rnoyeé\x85\u2028\x1b\U0001f600", min_size=1, max_size=24
)


def run(*arguments: object) -> Result:
    """The command with these arguments, in the working directory."""
    return CliRunner().invoke(app, ["launch", NANO, *map(str, arguments)])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("on", "names"),
    [
        ("torchrun", ["spec.yaml", "torchrun.sh"]),
        ("accelerate", ["spec.yaml", "accelerate.yaml", "accelerate.sh"]),
        ("slurm", ["spec.yaml", "train.sbatch"]),
        ("kubernetes", ["spec.yaml", "jobset.yaml"]),
    ],
)
def test_the_files_of_a_job_are_written_and_listed(on: str, names: list[str], elsewhere: Path) -> None:
    image = ["--image", "registry/modelspec:1"] if on == "kubernetes" else []
    done = run("--on", on, "--nproc", 8, "--set", "parallelism.gpus_per_node=4", "--format", "json", *image)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    folder = f"jobs/deepseek-v3-nano-{on}"
    assert told["files"] == [f"{folder}/{name}" for name in names]
    assert (told["on"], told["nodes"], told["processes_per_node"]) == (on, 2, 4)
    assert told["start"].split()[-1] == f"{folder}/{names[-1]}"
    assert sorted(path.name for path in (elsewhere / folder).iterdir()) == sorted(names)
    # The spec is frozen: it says everything itself.
    assert load(elsewhere / folder / "spec.yaml") == load(
        NANO, overrides=["parallelism.world_size=8", "parallelism.gpus_per_node=4"]
    )
    for name in names:
        assert os.access(elsewhere / folder / name, os.X_OK) == name.endswith(".sh")


def test_no_torch_is_loaded(elsewhere: Path) -> None:
    program = (
        f"import sys\nfrom modelspec.cli import main\nsys.argv = ['modelspec', 'launch', {NANO!r}, '--on', 'slurm']\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'accelerate', 'numpy'} & sys.modules.keys()\n"
        "    sys.exit(end.code or (f'loaded {heavy}' if heavy else 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_there_stays_unless_it_may_be_replaced(elsewhere: Path) -> None:
    assert run("--on", "torchrun", "-o", "job").exit_code == 0
    script = elsewhere / "job/torchrun.sh"
    script.write_text("mine\n")
    again = run("--on", "torchrun", "-o", "job", "--nproc", 2)
    assert again.exit_code == 2 and "spec.yaml exists; --overwrite replaces it" in again.stderr
    assert script.read_text() == "mine\n" and load(elsewhere / "job/spec.yaml").parallelism.world_size == 1
    assert run("--on", "torchrun", "-o", "job", "--nproc", 2, "--overwrite").exit_code == 0
    assert "--nproc-per-node=2" in script.read_text() and os.access(script, os.X_OK)
    (elsewhere / "job/accelerate.sh").mkdir()
    assert "is no file" in run("--on", "accelerate", "-o", "job", "--overwrite").stderr
    (elsewhere / "file").touch()
    assert run("--on", "torchrun", "-o", "file/job").exit_code == 2


def test_every_violation_of_the_spec_is_told_and_nothing_is_written(elsewhere: Path) -> None:
    broken = ["--set", "parallelism.expert=3", "--set", "parallelism.tensor=5", "--nproc", 8]
    done = run("--on", "slurm", *broken, "--format", "json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["valid"] and len(found["diagnostics"]) > 1
    assert not (elsewhere / "jobs").exists()


def test_what_train_would_refuse_is_refused_before_it_waits_in_a_queue() -> None:
    done = CliRunner().invoke(app, ["launch", str(ROOT / "specs/deepseek-v3.yaml"), "--on", "slurm"])
    assert done.exit_code == 1
    assert "data.sources: missing" in str(done.exception) and "data.tokenizer: missing" in str(done.exception)


def test_processes_that_fill_no_whole_machine_are_refused_with_what_would() -> None:
    spec = load(NANO, overrides=["parallelism.world_size=6", "parallelism.gpus_per_node=4", *_batch(6)])
    with pytest.raises(Exception, match=r"set parallelism\.world_size=4 or 8, or parallelism\.gpus_per_node=3"):
        job_of(spec, Path("job"))


def _batch(size: int) -> list[str]:
    return [f"training.stages.0.batch_size={size}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "slurm", "--image", "x"], "--image means nothing with --on slurm; it is for kubernetes"),
        (["--on", "kubernetes"], "needs --image"),
        *(
            (["--on", "kubernetes", "--image", image], f"{image!r} is no container image")
            for image in ("bad image", ":tag", "img:", "-x", "UPPER/Img:1", "a//b", "")
        ),
        (["--on", "slurm", "--sbatch", "partition=a", "--sbatch", "partition=b"], "partition is given twice"),
        (["--on", "torchrun", "--env", "A=1", "--env", "A=2"], "A is given twice"),
        (["--on", "kubernetes", "--image", "x", "--out", "runs/a"], "under /runs/"),
        (["--on", "kubernetes", "--image", "x", "--out", "/runs/../etc"], "under /runs/"),
        (["--on", "kubernetes", "--image", "x", "--resource", "memory=much"], "is not like 96 or 900Gi"),
        (["--on", "kubernetes", "--image", "x", "--claim", "My Claim"], "is no name"),
        (["--on", "slurm", "--sbatch", "partitoin=gpu"], "did you mean partition?"),
        (["--on", "slurm", "--sbatch", "nodes=3"], "follows from the spec"),
        (["--on", "slurm", "--sbatch", "time"], "sbatch takes it with a value, as time=VALUE"),
        (["--on", "torchrun", "--before", "module load 'cuda"], "bash does not read it"),
        (["--on", "torchrun", "--before", "cat <<EOF"], "bash does not read it"),
        (["--on", "slurm", "--before", "echo hi \\"], "takes the next line in"),
        (["--on", "kubernetes", "--image", "x", "--resource", "nvidia.com/gpu=3"], "follow from the spec"),
        (["--on", "slurm", "--sbatch", "account=a b"], "spaces, quotes or signs"),
        (["--on", "torchrun", "--env", "1A=2"], "is not like NAME=VALUE"),
        (["--on", "torchrun", "--env", "A=\0"], "is not text"),
        (["--on", "torchrun", "-o", ""], "names a folder"),
        (["--on", "torchrun", "--out", "a\udc80"], "is not text"),
        (["--on", "ssh"], "'ssh' is not one of"),
    ],
    ids=str,
)
def test_misuse_is_told_and_writes_nothing(arguments: list[str], message: str, elsewhere: Path) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert list(elsewhere.iterdir()) == []


RECORDER = """#!/bin/sh
printf '%s\\0' "$@" "A=$A" >> "$RECORD"
"""


def recorded(job: Job, target: Target, folder: Path, **environment: str) -> list[list[str]]:
    """What each call of Python in a job's script was given, with a Python that only writes it down."""
    recorder, record = folder / "python", folder / "record"
    recorder.write_text(RECORDER.replace("$RECORD", shlex.quote(str(record)).strip("'")))
    recorder.chmod(0o755)
    made = files(job, target)[-1]
    (folder / "script").write_text(made.content, newline="")
    for tool in ("srun", "scontrol", "scancel"):
        (folder / tool).write_text(
            '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n[[ $1 == show ]] && echo here || exec "$@"\n'
        )
        (folder / tool).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NODEID": "0"}
    env = {"PATH": path, "PYTHON": str(recorder), **slurm, **environment}
    done = subprocess.run(
        ["bash", "script"], capture_output=True, text=True, cwd=folder, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    calls = record.read_bytes().decode().split("\0")[:-1]
    ends = [index for index, word in enumerate(calls) if word.startswith("A=")]
    return [calls[start + 1 : end + 1] for start, end in zip([-1, *ends[:-1]], ends, strict=True)]


@example(run="$(touch it) `touch it`\n'\"", folder="a 'b' $(touch it)\"", value="'; touch it; '\n$HOME \\")
@given(run=HOSTILE, folder=HOSTILE, value=HOSTILE)
@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_no_value_is_read_by_a_shell(run: str, folder: str, value: str) -> None:
    if folder in (".", ".."):
        return
    spec = load(NANO)
    for target in (Torchrun(), Accelerate(), Slurm()):
        job = job_of(spec, Path(folder), run, device="cpu", environment={"A": value})
        with tempfile.TemporaryDirectory() as temporary:
            calls = recorded(job, target, Path(temporary))
            made = {"script", "python", "record", "srun", "scontrol", "scancel", Path(folder).parts[0]}
            assert {path.name for path in Path(temporary).iterdir()} == made
        given_words = job.train(job.at("spec.yaml"))
        assert calls[-1][-len(given_words) - 1 :] == [*given_words, f"A={value}"]
        if isinstance(target, Slurm):
            assert set(job.doctor(job.at("spec.yaml"))) < set(calls[0])


def test_a_line_of_the_users_own_runs_first_and_ends_the_script_if_it_fails(elsewhere: Path) -> None:
    spec = load(NANO)
    job = job_of(spec, Path("job"), device="cpu", before=("export A=early", "unset -v nothing"))
    assert recorded(job, Torchrun(), elsewhere)[0][-1] == "A=early"
    failing = files(job_of(spec, Path("job"), before=("false", "echo late")), Torchrun())[-1]
    done = subprocess.run(["bash", "-c", failing.content], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""


@given(
    st.recursive(
        st.one_of(
            HOSTILE, st.booleans(), st.integers(), st.sampled_from(["no", "on", "1e3", "0x1", "null", "", "y\n"])
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(HOSTILE, inner, max_size=3)),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_yaml_reads_back_under_both_versions(value: Any) -> None:
    content = {"key": value}
    text = document(content)
    assert yaml.safe_load(text) == content
    assert YAML(typ="safe", pure=True).load(text) == content


def test_text_of_several_lines_stays_readable() -> None:
    text = "a: 1\n\n  b: two # three\n"
    assert document({"data": {"spec.yaml": text}}) == "data:\n  spec.yaml: |\n    a: 1\n\n      b: two # three\n"
    assert yaml.safe_load(document({"data": text})) == {"data": text}


@pytest.mark.parametrize("name", ["torchrun.sh", "accelerate.sh", "train.sbatch"])
def test_the_shell_and_its_linter_find_nothing_wrong(name: str, elsewhere: Path) -> None:
    on = {"torchrun.sh": "torchrun", "accelerate.sh": "accelerate", "train.sbatch": "slurm"}[name]
    for nodes in (1, 2):
        arguments = ["--nproc", 4 * nodes, "--set", "parallelism.gpus_per_node=4", "-o", f"job{nodes}"]
        assert run("--on", on, *arguments).exit_code == 0
        script = elsewhere / f"job{nodes}" / name
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
        linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if linter is None:
            pytest.skip("shellcheck is not installed; bash -n found nothing")
        # Functions that srun calls, and `mkdir` before `exec`, are meant.
        subprocess.run([linter, "-s", "bash", "-e", "SC2329,SC2317", script], check=True, timeout=60)


WORKER = """
import os, sys
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
line = " ".join([*(f"{key}={os.environ[key]}" for key in keys), *sys.argv[1:]])
open(os.environ["RECORD"] + os.environ["RANK"], "w").write(line)
"""


@pytest.mark.parametrize("on", ["torchrun", "accelerate"])
def test_the_scripts_start_every_process_of_one_machine_over_loopback(on: str, elsewhere: Path) -> None:
    package = elsewhere / "path/modelspec"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(WORKER)
    assert run("--on", on, "--nproc", 2, "--device", "cpu", "-o", "a job").exit_code == 0
    if on == "accelerate":
        config = load_config_from_file("a job/accelerate.yaml")
        assert isinstance(config, ClusterConfig)
        assert (config.num_processes, config.num_machines, config.use_cpu) == (2, 1, True)
        assert config.mixed_precision == "no" and not config.fsdp_config and not config.parallelism_config
    env = os.environ | {"PYTHONPATH": str(package.parent), "RECORD": str(elsewhere / "rank"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", f"a job/{on}.sh"], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        told = (elsewhere / f"rank{rank}").read_text()
        world = f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1"
        assert told == f"{world} train a job/spec.yaml --out=runs/deepseek-v3-nano --resume --device=cpu"
    machine = elsewhere / "a job/logs" / os.uname().nodename
    assert len(list(machine.rglob("stderr.log"))) == 2
