"""What a job may be made for: one class for each, and the files that it needs."""

from dataclasses import dataclass, field
from shlex import join
from typing import assert_never

from modelspec.launch.accelerate import accelerate_files
from modelspec.launch.job import File, Job
from modelspec.launch.kubernetes import Kind, Pods, kubernetes_files
from modelspec.launch.slurm import slurm_files
from modelspec.launch.torchrun import torchrun_files


@dataclass(frozen=True, slots=True)
class Torchrun:
    """A script for torchrun."""


@dataclass(frozen=True, slots=True)
class Accelerate:
    """A configuration of accelerate, and a script."""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A batch script with further `options` of sbatch; `full`: it takes all devices of its nodes."""

    options: dict[str, str | None] = field(default_factory=dict)
    full: bool = True


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """A manifest."""

    pods: Pods
    kind: Kind = "jobset"


Target = Torchrun | Accelerate | Slurm | Kubernetes


def files(job: Job, target: Target) -> list[File]:
    """Every file of a job; the spec comes first, and what starts the job last."""
    spec = File("spec.yaml", job.spec)
    match target:
        case Torchrun():
            return [spec, *torchrun_files(job)]
        case Accelerate():
            return [spec, *accelerate_files(job)]
        case Slurm(options=options, full=full):
            return [spec, *slurm_files(job, options, full)]
        case Kubernetes(pods=pods, kind=kind):
            return [spec, *kubernetes_files(job, pods, kind)]
        case _:
            assert_never(target)


def start(job: Job, target: Target) -> str:
    """The command that starts the job, for a shell."""
    match target:
        case Torchrun():
            return join(["bash", job.at("torchrun.sh")])
        case Accelerate():
            return join(["bash", job.at("accelerate.sh")])
        case Slurm():
            return join(["sbatch", job.at("train.sbatch")])
        case Kubernetes(kind=kind):
            return join(["kubectl", "apply", "-f", job.at(f"{kind}.yaml")])
        case _:
            assert_never(target)
