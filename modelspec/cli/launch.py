"""launch: the job files that start `train` on the world of a spec."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import click
from click.core import ParameterSource

from modelspec.cli.options import allow_outside, output_format, overrides, read

if TYPE_CHECKING:
    from modelspec.launch import File, Job, Target
    from modelspec.schema import ModelSpec

V = TypeVar("V")

# Options that mean something for some targets only.
_FOR = {
    "before": ("torchrun", "accelerate", "slurm"),
    "sbatch": ("slurm",),
    "kind": ("kubernetes",),
    "image": ("kubernetes",),
    "claim": ("kubernetes",),
    "resources": ("kubernetes",),
    "restarts": ("kubernetes",),
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A registry's host, parts of a path, a tag, a digest.
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d+)?/)?{_PATH}(?:/{_PATH})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_RESOURCE = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9][A-Za-z0-9._-]*")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@click.command(name="launch")
@click.argument("spec")
@click.option(
    "--on",
    required=True,
    type=click.Choice(["torchrun", "accelerate", "slurm", "kubernetes"]),
    help="What starts the processes.",
)
@click.option("-o", "folder", metavar="DIR", help="Folder to write into. [default: jobs/NAME-ON]")
@click.option("--out", "run", metavar="RUN", help="Folder of the run. [default: runs/NAME; /runs/NAME in Kubernetes]")
@overrides
@allow_outside
@click.option("--nproc", "--world", "--gpus", "world", type=click.IntRange(min=1), help="Set parallelism.world_size.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="Kind of device.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Environment variable of all processes.")
@click.option(
    "--before", multiple=True, metavar="COMMAND", help="Line of shell that runs first, like 'module load cuda'."
)
@click.option(
    "--grace", type=click.IntRange(min=30), default=120, show_default=True, help="Seconds to save in before a kill."
)
@click.option("--sbatch", multiple=True, metavar="NAME[=VALUE]", help="Option of sbatch, like partition=gpu.")
@click.option(
    "--kind", type=click.Choice(["jobset", "pytorchjob"]), default="jobset", show_default=True, help="Kind of manifest."
)
@click.option("--image", help="Container image with modelspec in it; Kubernetes needs one.")
@click.option("--claim", default="runs", show_default=True, help="PersistentVolumeClaim that is mounted at /runs.")
@click.option(
    "--resource",
    "resources",
    multiple=True,
    metavar="NAME=QUANTITY",
    help="What each pod gets beside GPUs: memory=900Gi, cpu=96, rdma/ib=8.",
)
@click.option(
    "--restarts", type=click.IntRange(min=0), default=3, show_default=True, help="Restarts after failures of the job."
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@output_format("text", "json")
@click.pass_context
def command(
    context: click.Context,
    spec: str,
    on: str,
    folder: str | None,
    run: str | None,
    overrides: tuple[str, ...],
    allow_outside: bool,
    world: int | None,
    device: Literal["cuda", "cpu"],
    variables: tuple[str, ...],
    before: tuple[str, ...],
    grace: int,
    sbatch: tuple[str, ...],
    kind: Literal["jobset", "pytorchjob"],
    image: str | None,
    claim: str,
    resources: tuple[str, ...],
    restarts: int,
    overwrite: bool,
    output: str,
) -> None:
    """Write what starts `train SPEC` on all machines: scripts or a manifest, and the spec, resolved and frozen.

    parallelism.world_size and gpus_per_node say how many machines there are. Every start resumes: a job that was
    preempted, or ran out of time, goes on from its last checkpoint. Run the scripts in the folder where they were made.
    """
    from modelspec.launch import job_of, start

    _require_fitting(context, on)
    for option, text in (("-o", folder), ("--out", run)):
        if text is not None:
            _require_writable(option, text)
    environment = _distinct("--env", (_pair("--env", text, _VARIABLE) for text in variables))
    for text in before:
        _require_shell("--before", text)
    shorthand = () if world is None else (f"parallelism.world_size={world}",)
    model, _ = read(spec, (*overrides, *shorthand), as_json=output == "json", allow_outside=allow_outside)
    target = _target(model, on, sbatch, kind, image, claim, resources, restarts)
    job = job_of(
        model,
        Path(f"jobs/{model.name}-{on}" if folder is None else folder),
        _in_claim(model.name, run) if on == "kubernetes" else run,
        device=device,
        grace=grace,
        before=before,
        environment=environment,
    )
    written = _written(job, target, overwrite)
    begin = start(job, target)
    if output == "json":
        described = {"on": on, "nodes": job.nodes, "processes_per_node": job.processes, "files": written}
        click.echo(json.dumps({**described, "start": begin}, indent=2))
        return
    for file in written:
        click.echo(file)
    machines = "1 machine" if job.nodes == 1 else f"each of {job.nodes:,} machines"
    count = "1 process" if job.processes == 1 else f"{job.processes:,} processes"
    everywhere = on in ("torchrun", "accelerate") and job.nodes > 1
    click.echo(f"{count} on {machines}; start {'on every machine' if everywhere else 'it'} by: {begin}")


def _require_fitting(context: click.Context, on: str) -> None:
    for name, targets in _FOR.items():
        if on not in targets and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(each.opts[-1] for each in context.command.params if each.name == name)
            raise click.UsageError(f"{option} means nothing with --on {on}; it is for {', '.join(targets)}")


def _require_text(option: str, text: str) -> None:
    """Bytes that are no text, and NUL, stand in no file that a shell or Kubernetes reads."""
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
        raise click.BadParameter(f"{text!a} is not text", param_hint=option)


def _require_shell(option: str, text: str) -> None:
    """What bash cannot read, or reads on beyond, would spoil the job once it has waited in a queue; machines without
    bash cannot tell all of it.
    """
    _require_text(option, text)
    if text.endswith("\\"):
        raise click.BadParameter(f"{text!r} ends with a backslash, which takes the next line in", param_hint=option)
    if (bash := shutil.which("bash")) is None:
        return
    read = subprocess.run([bash, "-n"], input=text, text=True, capture_output=True, check=False)
    # A document that is not ended is a warning alone.
    if read.returncode or read.stderr:
        said = read.stderr.strip().splitlines()[0].removeprefix(f"{bash}: ")
        raise click.BadParameter(f"{text!r}: bash does not read it: {said}", param_hint=option)


def _require_writable(option: str, text: str) -> None:
    _require_text(option, text)
    if not text:
        raise click.BadParameter("it is empty; it names a folder", param_hint=option)


def _pair(option: str, text: str, name: re.Pattern[str]) -> tuple[str, str]:
    _require_text(option, text)
    key, equals, value = text.partition("=")
    if not equals or not name.fullmatch(key):
        raise click.BadParameter(f"{text!r} is not like NAME=VALUE", param_hint=option)
    return key, value


def _distinct(option: str, pairs: Iterable[tuple[str, V]]) -> dict[str, V]:
    found: dict[str, V] = {}
    for name, value in pairs:
        if name in found:
            raise click.BadParameter(f"{name} is given twice", param_hint=option)
        found[name] = value
    return found


def _in_claim(name: str, run: str | None) -> str:
    from modelspec.launch.kubernetes import MOUNT

    if run is None:
        return f"{MOUNT}/{name}"
    if not os.path.normpath(run).startswith(f"{MOUNT}/"):
        raise click.BadParameter(f"{run}: in Kubernetes a run lies on the claim, under {MOUNT}/", param_hint="--out")
    return run


def _target(
    model: "ModelSpec",
    on: str,
    sbatch: tuple[str, ...],
    kind: Literal["jobset", "pytorchjob"],
    image: str | None,
    claim: str,
    resources: tuple[str, ...],
    restarts: int,
) -> "Target":
    from modelspec.launch import Accelerate, Kubernetes, Pods, Slurm, Torchrun
    from modelspec.launch.slurm import option

    match on:
        case "torchrun":
            return Torchrun()
        case "accelerate":
            return Accelerate()
        case "slurm":
            try:
                options = _distinct("--sbatch", map(option, sbatch))
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--sbatch") from None
            return Slurm(options, full=model.parallelism.world_size >= model.parallelism.gpus_per_node)
    if image is None:
        raise click.UsageError("--on kubernetes needs --image, a container image with modelspec in it")
    if not _IMAGE.fullmatch(image):
        raise click.BadParameter(f"{image!r} is no container image, like registry/name:tag", param_hint="--image")
    if not _OBJECT.fullmatch(claim):
        raise click.BadParameter(f"{claim!r} is no name of a PersistentVolumeClaim", param_hint="--claim")
    asked = _distinct("--resource", (_pair("--resource", text, _RESOURCE) for text in resources))
    for name, quantity in asked.items():
        if name == "nvidia.com/gpu":
            raise click.BadParameter(f"{name}: GPUs of a pod follow from the spec", param_hint="--resource")
        if not _QUANTITY.fullmatch(quantity):
            raise click.BadParameter(f"{name}: {quantity!r} is not like 96 or 900Gi", param_hint="--resource")
    return Kubernetes(Pods(image, claim, restarts, asked), kind)


def _written(job: "Job", target: "Target", overwrite: bool) -> list[str]:
    """Writes the job's files, the one that starts it last, and says which."""
    from modelspec.cli.options import write
    from modelspec.launch import files

    made: Mapping[Path, File] = {job.folder / file.name: file for file in files(job, target)}
    for path in made:
        if os.path.lexists(path) and not (overwrite and os.path.isfile(path)):
            remedy = "is no file" if overwrite or not os.path.isfile(path) else "exists; --overwrite replaces it"
            raise click.UsageError(f"{path} {remedy}")
    _make_folder(job.folder)
    for path, file in made.items():
        write(file.content, path)
        if file.executable:
            path.chmod(0o755)
    return [str(path) for path in made]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise click.UsageError(f"-o {folder}: {error.filename} is no folder") from error
    except FileNotFoundError as error:
        # Of a place that holds no folders of its users', like /proc.
        raise click.UsageError(f"-o {folder}: {error.filename} cannot be made there") from error
