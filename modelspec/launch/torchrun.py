"""torchrun: a script that is started once on every machine; they meet at MASTER_ADDR."""

from modelspec.launch.job import File, Job
from modelspec.launch.shell import preamble, script, torchrun

PORT = 29500
MEETING = (
    ': "${MASTER_ADDR:?set it on every machine to the name of one of them}"',
    f'port="${{MASTER_PORT:-{PORT}}}"',
)


def torchrun_files(job: Job) -> list[File]:
    """torchrun.sh."""
    if job.nodes == 1:
        meeting: tuple[str, ...] = ()
        rendezvous = ["--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1"]
    else:
        meeting = MEETING
        identity = f'--rdzv-id="${{RDZV_ID:-{job.name}}}"'
        rendezvous = [f'--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$port" {identity}']
    lines = (
        "#!/usr/bin/env bash",
        f"# {job.name}: {job.processes} processes on {'this machine' if job.nodes == 1 else f'each of {job.nodes}'}.",
        *preamble(job),
        *meeting,
        "exec " + torchrun(job, rendezvous),
    )
    return [File("torchrun.sh", script(lines), executable=True)]
