"""The batch script: its options as sbatch reads them, and its runs, with Slurm's commands played on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelspec.cli import app
from modelspec.launch.slurm import OPTIONS, option

SPEC = """
spec_version: 1
name: tiny
model:
  vocab_size: 280
  hidden_size: 16
  max_position: 64
  init: {std: 0.05}
  norm: {type: rmsnorm, eps: 1.0e-6}
  attention:
    gqa: {type: gqa, num_heads: 2, num_kv_heads: 1, head_dim: 8, rope: {theta: 10000, layout: half_split}}
  ffn: {dense: {type: dense, intermediate_size: 16, activation: {type: swiglu}}}
  layers: [{attention: gqa, ffn: dense}]
training:
  optimizer: {type: adamw, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}
  stages: [{name: main, steps: 4, sequence_length: 16, batch_size: 4, learning_rate: 1.0e-2}]
  checkpoint: {every_steps: 2, keep_last: 2}
data:
  sources: [{type: text, files: text.txt}]
  tokenizer: {type: bpe_trained, vocab_size: 280}
"""

# One process group for each node; all get the signal that scancel is asked to send.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
    [[ $1 == --nodes=* ]] && nodes=${1#*=}
    echo "$1" >> srun-options
    shift
done
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID=$node setsid "$@" &
    echo $! >> groups
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
rm -f groups
exit "$code"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' localhost elsewhere ;;
    "show job") echo "JobId=$3 JobState=$(cat state) Reason=None" ;;
    requeue*) echo "$2" > requeued ;;
esac
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM ]] || exit 1
for group in $(cat groups); do kill -TERM -- "-$group"; done
"""
# Trains in the place of modelspec: until SIGTERM, then it saves.
WORKER = """
import os, signal, sys, time
rank = os.environ["RANK"]
def save(*_):
    open("saved" + rank, "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open("started" + rank, "w").write(" ".join([os.environ["WORLD_SIZE"], *sys.argv[1:]]))
time.sleep(60)
"""
# Python as the script calls it: `doctor` is told what to answer, or runs; training is done by WORKER, or runs.
PYTHON = """#!/bin/bash
if [[ $* == *" doctor "* ]]; then
    [[ $SLURM_NODEID == "$SICK" ]] && echo "FAIL disk" && exit 3
    [[ $DOCTOR == skip ]] && exit 0
elif [[ $WORKER ]]; then
    export PYTHONPATH=$WORKER
fi
exec REAL "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec, some text and Slurm's commands, and this process in it."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "python": PYTHON}.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text.replace("REAL", sys.executable))
        tool.chmod(0o755)
    (tmp_path / "worker/modelspec").mkdir(parents=True)
    (tmp_path / "worker/modelspec/__init__.py").touch()
    (tmp_path / "worker/modelspec/__main__.py").write_text(WORKER)
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "tiny.yaml").write_text(SPEC)
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n % 7} makes {n * (n % 7)}\n" for n in range(600)))
    return tmp_path


def launch(*arguments: str) -> Path:
    """The batch script of the tiny spec."""
    done = CliRunner().invoke(app, ["launch", "tiny.yaml", "--on", "slurm", "--device", "cpu", "-o", "job", *arguments])
    assert done.exit_code == 0, done.output
    return Path("job/train.sbatch")


@contextmanager
def submitted(cluster: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The batch shell of a job; nothing that it started outlives the block."""
    env = os.environ | {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(cluster / "bin/python"),
        "OMP_NUM_THREADS": "1",
        "MODELSPEC_CACHE": str(cluster / "cache"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost,elsewhere",
        **environment,
    }
    shell = subprocess.Popen(
        ["bash", "job/train.sbatch"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield shell
    finally:
        if shell.poll() is None:
            for group in (cluster / "groups").read_text().split() if (cluster / "groups").exists() else ():
                os.killpg(int(group), signal.SIGKILL)
            shell.kill()
        shell.communicate()


def ended(shell: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = shell.communicate(timeout=180)
    return shell.returncode, output


def parsed(script: Path) -> dict[str, str | None]:
    """The options of a script as sbatch finds them: lines with its sign before the first command."""
    found: dict[str, str | None] = {}
    for line in script.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            assert match[1] not in found, f"{match[1]} stands twice"
            found[match[1]] = match[2]
        else:
            assert not line.startswith("#SBATCH"), line
    return found


def test_the_header_asks_for_the_world_of_the_spec_in_words_that_sbatch_knows(cluster: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            *("launch", "tiny.yaml", "--on", "slurm", "--nproc", "4", "--set", "parallelism.gpus_per_node=2"),
            *("--sbatch", "partition=gpu", "--sbatch", "--time=2-00:00:00", "--sbatch", "reboot", "--grace", "300"),
        ],
    )
    assert done.exit_code == 0, done.output
    found = parsed(Path("jobs/tiny-slurm/train.sbatch"))
    assert found == {
        "job-name": "tiny",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "2",
        "exclusive": None,
        "mem": "0",
        "signal": "B:TERM@300",
        "requeue": None,
        "open-mode": "append",
        "partition": "gpu",
        "time": "2-00:00:00",
        "reboot": None,
    }
    assert set(found) <= OPTIONS


def test_part_of_a_node_takes_no_whole_one_and_gres_replaces_the_count_of_gpus(cluster: Path) -> None:
    arguments = ["--nproc", "2", "--sbatch", "gres=gpu:h100:2", "--sbatch", "cpus-per-task=16", "-o", "part"]
    done = CliRunner().invoke(app, ["launch", "tiny.yaml", "--on", "slurm", *arguments])
    assert done.exit_code == 0, done.output
    found = parsed(Path("part/train.sbatch"))
    assert (found["gres"], found["cpus-per-task"]) == ("gpu:h100:2", "16")
    assert not {"exclusive", "mem", "gpus-per-node"} & set(found)


@pytest.mark.parametrize(
    "text", ["comment=a b", "comment='x'", 'comment="x"', "comment=#x", "comment=a\nb", "mem=", "N"]
)
def test_an_option_that_sbatch_would_read_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        option(text)


def test_a_job_out_of_time_saves_on_every_node_and_queues_itself_again(cluster: Path) -> None:
    launch("--nproc", "2", "--set", "parallelism.gpus_per_node=1")
    with submitted(cluster, WORKER=str(cluster / "worker")) as shell:
        _wait_for(cluster / "started0", cluster / "started1", shell)
        shell.send_signal(signal.SIGTERM)
        code, output = ended(shell)
    assert code != 0 and "stopping: every process saves and ends" in output
    assert (cluster / "saved0").exists() and (cluster / "saved1").exists()
    assert (cluster / "requeued").read_text().strip() == str(os.getpid())
    assert (cluster / "started0").read_text() == "2 train job/spec.yaml --out=runs/tiny --resume --device=cpu"
    options = (cluster / "srun-options").read_text().split()
    assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=0", "--wait=120"} <= set(options)


def test_a_job_that_its_user_cancelled_stays_so(cluster: Path) -> None:
    launch("--nproc", "1")
    with submitted(cluster, WORKER=str(cluster / "worker"), DOCTOR="skip") as shell:
        _wait_for(cluster / "started0", cluster / "started0", shell)
        (cluster / "state").write_text("CANCELLED")
        shell.send_signal(signal.SIGTERM)
        code, output = ended(shell)
    assert code != 0, output
    assert (cluster / "saved0").exists() and not (cluster / "requeued").exists()


def test_nothing_starts_where_a_node_is_not_fit(cluster: Path) -> None:
    launch("--nproc", "2", "--set", "parallelism.gpus_per_node=1")
    with submitted(cluster, WORKER=str(cluster / "worker"), DOCTOR="skip", SICK="1") as shell:
        code, output = ended(shell)
    assert code == 3
    assert "is not fit:\nFAIL disk\n" in output and output.count("is not fit") == 1
    assert not (cluster / "started0").exists()


def test_the_script_trains_over_two_nodes(cluster: Path) -> None:
    launch("--nproc", "2", "--set", "parallelism.gpus_per_node=1")
    with submitted(cluster, DOCTOR="skip") as shell:
        code, output = ended(shell)
    assert code == 0, output
    assert output.count("4 steps done") == 1
    rows = [json.loads(line) for line in (cluster / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert (cluster / "runs/tiny/checkpoints/step-4").is_dir()


def _wait_for(first: Path, second: Path, shell: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if first.exists() and second.exists():
            return
        assert shell.poll() is None, shell.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("the processes did not start within a minute")
