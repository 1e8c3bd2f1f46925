"""Slurm: a batch script that looks at every node, trains on all of them, and queues itself again when time runs out.

Slurm signals the batch shell alone (`--signal=B:TERM`), `grace` seconds before the time limit; the shell passes it to
the steps, in which every process saves and ends, and asks for the job to run again. It asks only while the job counts
as running: a job that is preempted with requeue is queued already, and one that its user cancels must stay so.
srun gets no signal: it would kill its step on SIGTERM. Nor does the first task that ends kill the others, which may
still be writing.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches

from modelspec.launch.job import File, Job
from modelspec.launch.shell import command, continued, preamble, script, torchrun

# Long options of sbatch 26.11 that may stand in a script.
OPTIONS = frozenset(
    re.findall(
        r"\S+",
        """
        account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments
        constraint container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu
        cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export export-file extra
        extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres
        gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label
        mem mem-bind mem-per-cpu mem-per-gpu mem-update mincpus network nice no-kill no-requeue nodefile nodelist
        nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode
        output overcommit oversubscribe parsable partition prefer priority profile propagate qos quiet reboot
        requeue reservation resources resv-ports runtime segment signal sockets-per-node spread-job
        spread-segments stepmgr switches test-only thread-spec threads-per-core time time-min tmp tres-bind
        tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey wrap
        """,
    )
)
# Those that may stand without a value.
ALONE = frozenset(
    re.findall(
        r"\S+",
        """
        consolidate-segments contiguous exclusive get-user-env hold ignore-pbs mem-update nice no-kill oom-kill-step
        overcommit oversubscribe parsable propagate quiet reboot resv-ports spread-job spread-segments stepmgr test-only
        use-min-nodes verbose wait
        """,
    )
)
# What the script relies on, or what follows from the spec.
FIXED = frozenset(("nodes", "ntasks", "ntasks-per-node", "signal", "requeue", "no-requeue", "array", "wrap", "export"))
# Counts of devices, which follow from the spec; some clusters take `gres` instead.
DEVICES = frozenset(("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "ntasks-per-gpu"))


def option(text: str) -> tuple[str, str | None]:
    """`NAME` or `NAME=VALUE`, an option of sbatch. Raises ValueError for another name, for a value that is missing, and
    for one with spaces, quotes, comment signs and the like, which sbatch would read in its own way.
    """
    name, equals, value = text.removeprefix("--").partition("=")
    if name in FIXED | DEVICES:
        raise ValueError(f"{name}: it follows from the spec, and the script relies on it")
    if name not in OPTIONS:
        near = get_close_matches(name, OPTIONS, 1)
        raise ValueError(f"sbatch has no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    if equals and (not value or any(not c.isascii() or not c.isprintable() or c in " \"'\\#" for c in value)):
        raise ValueError(f"{name}: {value!r} has spaces, quotes or signs that sbatch reads in its own way, or is empty")
    if not equals and name not in ALONE:
        raise ValueError(f"{name}: sbatch takes it with a value, as {name}=VALUE")
    return name, value if equals else None


def slurm_files(job: Job, options: dict[str, str | None], full: bool) -> list[File]:
    """train.sbatch. `options` are further ones of sbatch; `full`: the job takes all devices of its nodes."""
    lines = (
        "#!/bin/bash",
        f"# {job.name}: {job.processes} processes on each of {job.nodes} nodes. Submit it where it was made.",
        *_header(job, options, full),
        "",
        *preamble(job, "uo"),
        'mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export python logs head="${nodes[0]}" port=$((20000 + SLURM_JOB_ID % 10000))',
        _step(job),
        "",
        *_check(job),
        "",
        *_training(job),
    )
    return [File("train.sbatch", script(lines))]


def _header(job: Job, options: dict[str, str | None], full: bool) -> Iterator[str]:
    found: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
    }
    if job.device == "cuda" and "gres" not in options:
        found["gpus-per-node"] = str(job.processes)
    if full and "cpus-per-task" not in options:
        # All processors and all memory: a task gets one processor otherwise.
        found |= {"exclusive": None, "mem": "0"}
    found |= {"signal": f"B:TERM@{job.grace}", "requeue": None, "open-mode": "append"}
    for name, value in (found | options).items():
        yield f"#SBATCH --{name}" + ("" if value is None else f"={value}")


def _step(job: Job) -> str:
    """How a program is run once on every node; srun takes no processors over from sbatch."""
    options = f"--nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1"
    return f'step=({options} --cpus-per-task="${{SLURM_CPUS_ON_NODE:-1}}" --kill-on-bad-exit=0 --wait={job.grace})'


def _check(job: Job) -> Iterator[str]:
    """Nothing starts unless every node is fit and reaches the first one."""
    meeting = f'--head="$head:$port" --nodes={job.nodes} --node="$SLURM_NODEID"'
    doctor = continued(('"$python"', command(job.doctor(job.at("spec.yaml"))), meeting), " " * 8)
    yield "check() {"
    yield "    local report"
    driver = "nvidia-smi --list-gpus && " if job.device == "cuda" else ""
    yield f"    report=$({{ {driver}{doctor}; }} 2>&1) && return"
    yield """    printf '%s is not fit:\\n%s\\n' "$(uname -n)" "$report" >&2"""
    yield "    return 3"
    yield "}"
    yield "export -f check"
    yield 'srun "${step[@]}" bash -c check || exit 3'


def _training(job: Job) -> Iterator[str]:
    rendezvous = (
        '--rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        '--rdzv-conf="is_host=$((SLURM_NODEID == 0))"',
    )
    yield "train() {"
    yield '    logs="${logs%/*}/$(uname -n)"'
    yield '    mkdir -p "$logs"'
    yield "    exec " + torchrun(job, rendezvous, " " * 8)
    yield "}"
    yield "export -f train"
    yield from (
        "stopped=",
        "stop() {",
        "    trap '' TERM",
        "    stopped=yes",
        '    echo "stopping: every process saves and ends" >&2',
        '    scancel --signal=TERM "$SLURM_JOB_ID"',
        "}",
        "trap stop TERM",
        'srun "${step[@]}" bash -c train &',
        "step_id=$!",
        'wait "$step_id"',
        "code=$?",
        "if [[ $stopped ]]; then",
        '    wait "$step_id"',
        "    again=$?",
        "    ((again == 127)) || code=$again",
        "fi",
        "if [[ $stopped ]] && ((code != 0)); then",
        '    [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]] && scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    )
