"""An environment against a spec: what training needs, and whether it is here.

`environment` looks once and returns what it saw as a value; `examine` compares that value with a spec and touches
nothing, so that any machine can be examined on any other. Memory and disk are estimates from the numbers that the
model's state is made of; activations come on top.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from modelspec import layout, schema
from modelspec.environment import Environment
from modelspec.plan import parameters
from modelspec.plan.storage import ITEM_BYTES, checkpoint_bytes

Status = Literal["ok", "warn", "fail"]

# Major compute capabilities that the FP8 kernels are made for, and the first capability with BF16 products.
_FP8: Final = (9, 10)
_BF16_FROM: Final = (8, 0)
# Beyond this share of a device's memory activations hardly fit.
_COMFORTABLE: Final = 0.7
_OLDEST_PYTHON: Final = (3, 11)


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was compared. `code` is the exit code that a failure stands for."""

    subject: str
    status: Status
    message: str
    remedy: str | None = None
    code: Literal[0, 1, 3] = 0

    def as_json(self) -> dict[str, Any]:
        """The line as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "code"}


def examine(spec: schema.ModelSpec, here: Environment) -> tuple[Line, ...]:
    """Every comparison, in the order in which failures are best mended."""
    return (
        *_python(here),
        *_packages(spec, here),
        *_device(spec, here),
        *_compiler(spec, here),
        *_memory(spec, here),
        *_disk(spec, here),
        *_world(spec, here),
        *_data(spec, here),
        *_tokenizer(spec, here),
        *(Line("build", "fail", f"{path}: {message}", help, 1) for path, message, help in here.uncomputable),
        *(Line("train", "warn", f"{path}: {message}", help) for path, message, help in here.untrained),
    )


def exit_code(lines: tuple[Line, ...]) -> int:
    """0 without a failure, 3 where the environment lacks something, 1 where only spec and environment disagree."""
    return max((line.code for line in lines if line.status == "fail"), default=0)


def _python(here: Environment) -> Iterator[Line]:
    version = ".".join(map(str, here.python))
    if here.python < _OLDEST_PYTHON:
        yield Line("python", "fail", f"{version}; 3.11 is the oldest that works", "make a new environment", 3)
    else:
        yield Line("python", "ok", version)


def _packages(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    fine = []
    for name, least in here.least.items():
        version = here.packages.get(name)
        # Triton compiles kernels for GPUs alone.
        spare = name == "triton" and here.device.capability is None
        if version is None and spare:
            yield Line(name, "ok", "not installed, and a CPU needs none")
        elif version is None:
            yield Line(name, "fail", f"not installed; at least {least}", f"pip install '{name}>={least}'", 3)
        elif _numbers(version) < _numbers(least):
            status: Status = "warn" if spare else "fail"
            yield Line(name, status, f"{version}; at least {least}", f"pip install '{name}>={least}'", 3)
        elif name in ("torch", "triton"):
            yield Line(name, "ok", version)
        else:
            fine.append(name)
    if fine:
        yield Line("packages", "ok", f"new enough: {', '.join(fine)}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def _device(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    device, precision = here.device, spec.precision
    if device.error is not None:
        yield Line("device", "fail", f"{device.name}: {device.error}", "name one that is here with --device", 3)
        return
    capability = f", compute capability {'.'.join(map(str, device.capability))}" if device.capability else ""
    yield Line("device", "ok", f"{device.name}, {_size(device.memory)}{capability}")
    if precision.compute == "bfloat16" and device.capability and device.capability < _BF16_FROM:
        yield Line(
            "bfloat16",
            "warn",
            "this GPU computes it slowly; 8.0 is the first that is fast",
            "precision.compute=float32",
        )
    if precision.fp8 is None:
        return
    if device.capability and device.capability[0] in _FP8:
        yield Line("fp8", "ok", "this GPU has FP8 matrix products")
    elif precision.fp8.emulate:
        yield Line("fp8", "warn", "no FP8 here: the same numbers are computed slowly (precision.fp8.emulate)")
    else:
        yield Line(
            "fp8",
            "fail",
            f"{sum(map(schema.in_fp8, spec.tensors()))} weights of linear layers and experts are multiplied in FP8, "
            "which needs compute capability 9 or 10 (Hopper, Blackwell), or CDNA 3 or 4",
            "set precision.fp8=null, or precision.fp8.emulate=true",
            1,
        )


def _compiler(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    if spec.parallelism.compile == "none":
        return
    if here.compiler or here.device.capability:
        yield Line("compiler", "ok", "torch.compile has what it needs")
    else:
        yield Line(
            "compiler",
            "fail",
            "parallelism.compile needs a C++ compiler",
            "install g++, or set parallelism.compile=none",
            3,
        )


def _memory(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    if here.device.error is not None:
        return
    needed, parts = _state_bytes(spec)
    message = f"{_size(needed)} for {parts} (an estimate, activations on top), {_size(here.device.memory)} here"
    if needed > here.device.memory:
        remedy = "a smaller model, optimizer_states: bfloat16, or more ranks (parallelism)"
        yield Line("memory", "fail", message, remedy, 3)
    elif needed > _COMFORTABLE * here.device.memory:
        yield Line("memory", "warn", message, "a smaller microbatch_size, or recompute: [layer]")
    else:
        yield Line("memory", "ok", message)


def _state_bytes(spec: schema.ModelSpec) -> tuple[int, str]:
    """Bytes that one rank keeps from step to step, with layers even over the pipeline, and of what."""
    mesh, zero, precision = layout.mesh(spec.parallelism), spec.parallelism.data.zero, spec.precision
    counts = parameters(spec)
    experts = counts.parts.get("routed_experts", 0)
    dense = counts.total + counts.mtp - experts

    def held(each: int, shards: bool) -> float:
        of_dense = dense / mesh.pipeline / mesh.tensor / (mesh.data * mesh.context if shards else 1)
        of_experts = experts / mesh.pipeline / mesh.expert / (mesh.expert_data if shards else 1)
        return each * (of_dense + of_experts)

    weights = held(ITEM_BYTES[precision.master_weights], zero >= 3)
    if spec.training is None:
        return round(weights), "weights"
    gradients = held(ITEM_BYTES[precision.gradients], zero >= 2)
    moments = held(2 * ITEM_BYTES[precision.optimizer_states], zero >= 1)
    ranks = f" on each of {spec.parallelism.world_size:,} ranks" if spec.parallelism.world_size > 1 else ""
    return round(weights + gradients + moments), f"weights, gradients and optimizer{ranks}"


def _disk(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    size = checkpoint_bytes(spec)
    one, kept = size.weights, 1
    if spec.training is not None:
        one += size.optimizer
        # A new checkpoint is whole before the oldest one goes.
        kept = 1 + (spec.training.checkpoint.keep_last if spec.training.checkpoint else 0)
    message = f"{_size(one)} for a checkpoint" + (f", {_size(kept * one)} for {kept}" if kept > 1 else "")
    message += f"; {_size(here.free)} free at {here.folder}"
    if one > here.free:
        yield Line("disk", "fail", message, "free some, or name another folder with --out", 3)
    elif kept * one > here.free:
        yield Line("disk", "warn", message, "a lower training.checkpoint.keep_last, or another folder with --out")
    else:
        yield Line("disk", "ok", message)


def _world(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    world, each = spec.parallelism.world_size, min(spec.parallelism.world_size, spec.parallelism.gpus_per_node)
    if here.world is not None and not re.fullmatch(r"[1-9][0-9]{0,17}", here.world):
        message = f"WORLD_SIZE={here.world:.40} in the environment is no number of processes"
        yield Line("world", "fail", message, "unset WORLD_SIZE, or let torchrun set it", 3)
    elif here.world is not None and here.world != str(world):
        remedy = f"set parallelism.world_size={here.world}, or start {world}"
        message = f"the launcher started {here.world} processes, parallelism.world_size is {world}"
        yield Line("world", "fail", message, remedy, 1)
    elif here.world is not None:
        yield Line("world", "ok", f"{world} processes, as the launcher started")
    elif here.device.capability and here.device.count < each:
        message = f"{each} ranks on a node, {here.device.count} GPUs here"
        yield Line("world", "fail", message, f"set parallelism.world_size={here.device.count} and fit its degrees", 1)
    elif world > 1:
        yield Line("world", "warn", f"{world:,} processes, and no launcher started this one", "run it under torchrun")
    else:
        yield Line("world", "ok", "one process")


def _data(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    for pattern, number in here.files.items():
        if number:
            yield Line("data", "ok", f"{pattern}: {number} file{'s' * (number > 1)}")
        else:
            yield Line("data", "fail", f"{pattern}: no file", "globs start at the working directory", 1)


def _tokenizer(spec: schema.ModelSpec, here: Environment) -> Iterator[Line]:
    rows = spec.model.vocab_size
    match spec.data.tokenizer if spec.data else None:
        case schema.TokenizerFile(path=path):
            size = here.vocabularies[path]
        case schema.TrainedBPE(vocab_size=size):
            path = "trained on the data"
        case _:
            return
    if isinstance(size, str):
        yield Line("tokenizer", "fail", size, "data.tokenizer.path names a tokenizer.json", 1)
    elif size > rows:
        message = f"{path}: {size:,} tokens, and model.vocab_size is {rows:,}"
        yield Line("tokenizer", "fail", message, f"set model.vocab_size={-(-size // 128) * 128}", 1)
    elif size < rows // 2:
        message = f"{path}: {size:,} tokens; {rows - size:,} rows of the embedding are never used"
        yield Line("tokenizer", "warn", message, f"set model.vocab_size={-(-size // 128) * 128}")
    else:
        yield Line("tokenizer", "ok", f"{path}: {size:,} tokens for {rows:,} rows")


def _size(count: int) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
