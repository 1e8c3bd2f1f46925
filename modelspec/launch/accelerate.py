"""accelerate: its configuration file, and a script that starts it on every machine.

`accelerate launch --cpu --num_processes 2` runs one process, and so does a configuration of type MULTI_CPU without
mpirun: neither is an error. MULTI_GPU starts the processes by torchrun, with `use_cpu` those of a CPU too.
"""

from typing import Any

from modelspec.launch.job import File, Job
from modelspec.launch.shell import command, continued, preamble, script
from modelspec.launch.torchrun import PORT
from modelspec.launch.yaml import document


def accelerate_files(job: Job) -> list[File]:
    """accelerate.yaml and accelerate.sh."""
    return [File("accelerate.yaml", _configuration(job)), File("accelerate.sh", _script(job), executable=True)]


def _configuration(job: Job) -> str:
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if job.world == 1 else "MULTI_GPU",
        "use_cpu": job.device == "cpu",
        "num_machines": job.nodes,
        "num_processes": job.world,
        "machine_rank": 0,
        "rdzv_backend": "static" if job.nodes == 1 else "c10d",
        # Numbers are the spec's affair: `precision`.
        "mixed_precision": "no",
        "debug": False,
    }
    return document(content)


def _script(job: Job) -> str:
    if job.nodes == 1:
        needed: tuple[str, ...] = ()
        meeting = "--main_process_ip=127.0.0.1 --main_process_port=0"
    else:
        needed = (
            ': "${MASTER_ADDR:?set it on every machine to the name of the first}"',
            ': "${NODE_RANK:?set it to the number of this machine, from 0}"',
        )
        port = f'--main_process_port="${{MASTER_PORT:-{PORT}}}"'
        meeting = f'--machine_rank="$NODE_RANK" --main_process_ip="$MASTER_ADDR" {port}'
    launch = continued(
        (
            '"$python" -m accelerate.commands.launch',
            command([f"--config_file={job.at('accelerate.yaml')}"]),
            meeting,
            '--log_dir="$logs" --tee=3',
            command(job.train(job.at("spec.yaml"))),
        )
    )
    lines = (
        "#!/usr/bin/env bash",
        f"# {job.name}: {job.processes} processes on {'this machine' if job.nodes == 1 else f'each of {job.nodes}'}.",
        *preamble(job),
        *needed,
        "exec " + launch,
    )
    return script(lines)
