"""What this version trains, and what it does not yet: found before anything is read or allocated."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modelspec import schema
from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.fp8 import uncomputable


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A key, spelled as in `--set`, whose value keeps the spec from being trained, and what to do about it."""

    path: str
    message: str
    help: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}\n  help: {self.help}"


def unsupported(spec: schema.ModelSpec) -> list[Unsupported]:
    """All that keeps a valid spec from being trained by this version."""
    return [*_missing(spec), *_data(spec), *_precision(spec), *_layout(spec)]


def require_trainable(spec: schema.ModelSpec) -> None:
    """Raises Refused with everything that `unsupported` finds."""
    if found := unsupported(spec):
        raise Refused(f"{spec.name} cannot be trained as it stands\n" + "\n".join(map(str, found)))


def require_world(spec: schema.ModelSpec) -> None:
    """Raises Misuse where a launcher started another number of processes than the spec's."""
    world = os.environ.get("WORLD_SIZE")
    if world is not None and world != str(spec.parallelism.world_size):
        raise Misuse(
            f"the launcher started {world} processes and parallelism.world_size is {spec.parallelism.world_size}: "
            f"set parallelism.world_size={world}, or start {spec.parallelism.world_size}"
        )


def require_alone(spec: schema.ModelSpec) -> None:
    """Raises Misuse where a spec is for several processes, and this is the only one."""
    if (world := spec.parallelism.world_size) > 1:
        raise Misuse(
            f"parallelism.world_size is {world} and this is one process: start all with --nproc {world} on one "
            "machine, or under torchrun; or set parallelism=null, in each stage too that has it"
        )


def _missing(spec: schema.ModelSpec) -> Iterator[Unsupported]:
    if spec.training is None:
        yield Unsupported("training", "missing: there is no recipe", "add `training`, or extend a spec that has it")
    if spec.data is None or spec.data.sources is None:
        yield Unsupported("data.sources", "missing: there is no text", "set data.sources=[{type: python_stdlib}]")
    if spec.data is None or spec.data.tokenizer is None:
        size = min(max(spec.model.vocab_size, 257), 4096)
        yield Unsupported(
            "data.tokenizer",
            "missing: nothing turns text into tokens",
            f"set data.tokenizer={{type: bpe_trained, vocab_size: {size}}}",
        )


def _data(spec: schema.ModelSpec) -> Iterator[Unsupported]:
    if spec.data is None:
        return
    if spec.data.packing.document_mask:
        yield Unsupported(
            "data.packing.document_mask", "attention inside each document is not trained yet", "set it to false"
        )
    if spec.data.fill_in_middle is not None and spec.data.fill_in_middle.rate > 0:
        yield Unsupported("data.fill_in_middle", "gap filling is not trained yet", "set data.fill_in_middle=null")
    match spec.data.tokenizer:
        case schema.TrainedBPE(vocab_size=size) if size > spec.model.vocab_size:
            yield Unsupported(
                "data.tokenizer.vocab_size",
                f"{size:,} tokens do not fit the {spec.model.vocab_size:,} rows of the model's embedding",
                f"set data.tokenizer.vocab_size={spec.model.vocab_size}",
            )


def _precision(spec: schema.ModelSpec) -> Iterator[Unsupported]:
    precision = spec.precision
    for path, message, help in uncomputable(spec):
        yield Unsupported(path, message, help)
    if precision.gradients != precision.master_weights:
        yield Unsupported(
            "precision.gradients",
            f"gradients are kept in the format of the weights, {precision.master_weights}",
            f"set precision.gradients={precision.master_weights}",
        )


def _layout(spec: schema.ModelSpec) -> Iterator[Unsupported]:
    if spec.parallelism.compile == "layer" and not _has_compiler():
        yield Unsupported(
            "parallelism.compile",
            "torch.compile needs a C++ compiler, and none was found",
            "set parallelism.compile=none",
        )


def _has_compiler() -> bool:
    return torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", "g++"))))
