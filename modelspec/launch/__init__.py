"""Job files: what starts `modelspec train` on the world that a spec asks for. No torch.

The spec is frozen into the job's folder, resolved, so that a job that waits in a queue, or starts again after it was
preempted, trains what it was made for. Every start says `--resume`: the first finds no checkpoint and begins at step 0.
"""

from modelspec.launch.job import File, Job, Unlaunchable, job_of
from modelspec.launch.kubernetes import Pods
from modelspec.launch.targets import Accelerate, Kubernetes, Slurm, Target, Torchrun, files, start

__all__ = [
    "Accelerate",
    "File",
    "Job",
    "Kubernetes",
    "Pods",
    "Slurm",
    "Target",
    "Torchrun",
    "Unlaunchable",
    "files",
    "job_of",
    "start",
]
