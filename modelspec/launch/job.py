"""What every kind of job file is made from: which spec, how many processes on how many machines, what each runs."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from modelspec.dump import dump
from modelspec.layout import filling
from modelspec.schema import ModelSpec

Device = Literal["cuda", "cpu"]


class Unlaunchable(Exception):
    """A valid spec of which no job can be made; the message says each reason and its remedy."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class File:
    """A file of a job: its name in the job's folder, and what it holds."""

    name: str
    content: str
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One training job.

    `spec` is the text of the resolved spec; `folder` holds the job's files and `run` becomes the folder of the run,
    both as they are seen where the job was made. `grace` seconds lie between the wish to stop and the end by force.
    """

    name: str
    spec: str
    folder: Path
    run: str
    nodes: int
    processes: int
    device: Device = "cuda"
    grace: int = 120
    python: str = sys.executable
    before: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes

    def at(self, name: str) -> str:
        """A file of the job, by a path that no program takes for an option."""
        path = str(self.folder / name)
        return f"./{path}" if path.startswith("-") else path

    def train(self, spec: str) -> list[str]:
        """The module that each process runs, and its arguments."""
        return ["-m", "modelspec", "train", spec, f"--out={self.run}", "--resume", f"--device={self.device}"]

    def doctor(self, spec: str) -> list[str]:
        """The module that says whether a machine is fit, and its arguments."""
        return ["-m", "modelspec", "doctor", spec, f"--out={self.run}", f"--device={self.device}"]

    def variables(self) -> dict[str, str]:
        """Environment variables that every process gets, unless it has them already.

        torch 2.11 and later tear a process down after an asynchronous NCCL error, keep the last 2,000 collectives and
        write them on a timeout, all by default: only where they are written is said here. torchrun kills what does not
        end after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (2.12 and later; 30 before): too few to write a checkpoint.
        """
        found = {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(self.grace - 20, 1))}
        if self.device == "cuda":
            found["NCCL_DEBUG"] = "WARN"
        return {name: value for name, value in found.items() if name not in self.environment}


def job_of(
    spec: ModelSpec,
    folder: Path,
    run: str | None = None,
    *,
    device: Device = "cuda",
    grace: int = 120,
    before: tuple[str, ...] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Job:
    """The job of a valid spec: ceil(world / gpus_per_node) machines with equally many processes.

    Raises Unlaunchable where `train` would refuse the spec for what it lacks, and where a machine would be filled in
    part.
    """
    if reasons := [*_lacking(spec), *_uneven(spec)]:
        raise Unlaunchable(f"no job can be made of {spec.name}\n" + "\n".join(reasons))
    world = spec.parallelism.world_size
    processes = min(world, spec.parallelism.gpus_per_node)
    return Job(
        name=spec.name,
        spec=dump(spec),
        folder=folder,
        run=f"runs/{spec.name}" if run is None else run,
        nodes=-(-world // processes),
        processes=processes,
        device=device,
        grace=grace,
        before=before,
        environment=environment,
    )


def _lacking(spec: ModelSpec) -> Iterator[str]:
    if spec.training is None:
        yield _reason("training", "missing: there is no recipe", "add `training`, or extend a spec that has it")
    if spec.data is None or spec.data.sources is None:
        yield _reason("data.sources", "missing: there is no text", "set data.sources=[{type: python_stdlib}]")
    if spec.data is None or spec.data.tokenizer is None:
        yield _reason(
            "data.tokenizer", "missing: nothing turns text into tokens", "set data.tokenizer={type: file, path: FILE}"
        )


def _uneven(spec: ModelSpec) -> Iterator[str]:
    world, node = spec.parallelism.world_size, spec.parallelism.gpus_per_node
    if world > node and world % node:
        below, above, fitting = filling(world, node)
        yield _reason(
            "parallelism.world_size",
            f"{world:,} processes leave a node of {node:,} partly empty",
            f"set parallelism.world_size={below} or {above}, or parallelism.gpus_per_node={fitting}",
        )


def _reason(path: str, message: str, help: str) -> str:
    return f"{path}: {message}\n  help: {help}"
