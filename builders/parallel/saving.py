"""Checkpoints of many ranks: the same files as one process writes, each rank writing its own elements into them.

Rank 0 lays the files out at their full size, so that a full disk is noticed before anything is written. Then every rank
writes the pieces that it updates at their places; of those that several hold, one does. Digests are computed file by
file on different ranks, and the manifest and the rename come last. So a checkpoint knows nothing of the layout that
wrote it, and any layout reads its own pieces out of it. All ranks must see the same file system.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modelspec import schema
from modelspec.builders.checkpoint import (
    OPTIMIZER,
    SPEC,
    Checkpoint,
    Damaged,
    Header,
    Position,
    header_of,
    write_manifest,
)
from modelspec.builders.errors import Misuse
from modelspec.builders.files import disk, published
from modelspec.builders.parallel.pieces import Piece
from modelspec.builders.parallel.world import World
from modelspec.builders.tensor_files import TORCH_DTYPES, Stored, read_header
from modelspec.builders.tensor_writer import Planned, Written, cut_into_files, laid_out


@dataclass(frozen=True, slots=True)
class Values:
    """Elements of a tensor that this rank has; it writes them if it `owns` them."""

    name: str
    piece: Piece
    tensor: Tensor
    owns: bool = True


@dataclass(frozen=True, slots=True)
class Contents:
    """Headers of all tensors of a checkpoint, of the model and of its optimizer, by name."""

    model: Mapping[str, Header]
    optimizer: Mapping[str, Header]


def contents(spec: schema.ModelSpec, updated: Iterable[str]) -> Contents:
    """What a checkpoint of a spec holds, where the optimizer has updated these parameters."""
    precision = spec.precision
    master, moments = precision.master_weights, precision.optimizer_states
    wide = "float64" if master == "float64" else "float32"
    tensors = spec.tensors()
    model = {
        name: header_of(tensor.shape, _DTYPES[wide if tensor.kind == "buffer" else master])
        for name, tensor in tensors.items()
    }
    optimizer = {
        f"{name}.{key}": header_of(shape, dtype)
        for name in sorted(updated)
        for key, shape, dtype in (
            ("step", (), torch.float32),
            ("exp_avg", tensors[name].shape, _DTYPES[moments]),
            ("exp_avg_sq", tensors[name].shape, _DTYPES[moments]),
        )
    }
    return Contents(model, optimizer)


def bytes_of(whole: Contents) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(tensor.bytes for tensor in (*_planned(whole.model), *_planned(whole.optimizer)))


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def save(
    folder: Path,
    position: Position,
    whole: Contents,
    model: Sequence[Values],
    optimizer: Sequence[Values],
    texts: Mapping[str, str],
    world: World,
) -> Checkpoint:
    """Writes `folder`/step-N from the pieces of all ranks, and returns when it is on disk. All ranks call it.

    Raises EnvironmentFailed on every rank where there is no room or a disk fails; nothing is left of it then.
    """
    path = folder / f"step-{position.step}"
    files = cut_into_files(_planned(whole.model)) | {OPTIMIZER: _planned(whole.optimizer)}
    spec_sha256 = hashlib.sha256(texts[SPEC].encode()).hexdigest()
    with ExitStack() as stack:

        def begin() -> str:
            fresh = stack.enter_context(published(path))
            for name, tensors in files.items():
                _reserve(fresh / name, tensors, path)
            return str(fresh)

        def finish() -> str:
            with disk(path):
                for name, text in texts.items():
                    (fresh / name).write_bytes(text.encode())
                    written[name] = Written(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
                counts = {name: len(tensors) for name, tensors in files.items()}
                write_manifest(fresh, position, counts, written, spec_sha256)
            stack.close()
            return ""

        fresh = Path(world.first(begin))
        world.together(lambda: _write(fresh, files, (*model, *optimizer), path))
        written = _digests(fresh, list(files), path, world)
        world.first(finish)
    return Checkpoint(path, position, spec_sha256, tuple(name for name in files if name != OPTIMIZER))


def _planned(headers: Mapping[str, Header]) -> list[Planned]:
    return [Planned(name, dtype, shape, tuple) for name, (shape, dtype) in headers.items()]


def _reserve(file: Path, tensors: Sequence[Planned], final: Path) -> None:
    """A file with the header of tensors and room for all of them."""
    head, _ = laid_out(tensors)
    size = len(head) + sum(tensor.bytes for tensor in tensors)
    with disk(final), file.open("wb") as opened:
        opened.write(head)
        opened.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)


def _write(folder: Path, files: Mapping[str, Sequence[Planned]], values: Iterable[Values], final: Path) -> None:
    """Writes the pieces that this rank owns, and waits until they are on disk."""
    where: dict[str, tuple[str, int, torch.dtype]] = {}
    for name, tensors in files.items():
        _, offsets = laid_out(tensors)
        where |= {tensor.name: (name, offsets[tensor.name], TORCH_DTYPES[tensor.dtype]) for tensor in tensors}
    with disk(final), ExitStack() as stack:
        opened: dict[str, int] = {}
        for each in values:
            if not each.owns:
                continue
            name, offset, dtype = where[each.name]
            if name not in opened:
                opened[name] = os.open(folder / name, os.O_WRONLY)
                stack.callback(os.close, opened[name])
            flat = each.tensor.detach().to("cpu", dtype).flatten()
            content = flat.view(torch.uint8).numpy().data
            for place, begin, count in each.piece.runs():
                item = dtype.itemsize
                _write_all(opened[name], content[begin * item : (begin + count) * item], offset + place * item)
        for descriptor in opened.values():
            os.fsync(descriptor)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def _digests(folder: Path, names: Sequence[str], final: Path, world: World) -> dict[str, Written]:
    """Sizes and digests of files, each file read by one rank."""
    found = torch.zeros(len(names), 40, dtype=torch.int64)

    def read() -> None:
        with disk(final):
            for index, name in enumerate(names):
                if index % world.size == world.rank:
                    with (folder / name).open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").digest()
                    size = (folder / name).stat().st_size
                    found[index] = torch.tensor([*size.to_bytes(8, "little"), *digest])

    world.together(read)
    return {
        name: Written(int.from_bytes(bytes(row[:8]), "little"), bytes(row[8:]).hex())
        for name, row in zip(names, world.total(found).tolist(), strict=True)
    }


def read_piece(stored: Stored, piece: Piece) -> Tensor:
    """A piece of a tensor in a file, flat, on the CPU. Raises Damaged where the file is cut or cannot be read."""
    item = stored.item
    content = bytearray(piece.numel * item)
    view = memoryview(content)
    try:
        with stored.file.open("rb", buffering=0) as file:
            for place, begin, count in piece.runs():
                part = view[begin * item : (begin + count) * item]
                at = stored.begin + place * item
                while part:
                    got = os.preadv(file.fileno(), [part], at)
                    if not got:
                        raise Damaged(f"{stored.file}: ends inside {stored.name}")
                    part, at = part[got:], at + got
    except OSError as error:
        raise Damaged(f"{stored.file}: cannot be read: {error.strerror}") from None
    return torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[: len(content)].view(TORCH_DTYPES[stored.dtype])


def stored_in(checkpoint: Checkpoint) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Tensors of a checkpoint's model and of its optimizer. Raises Damaged."""
    try:
        return checkpoint.tensors(), read_header(checkpoint.path / OPTIMIZER)
    except Misuse as error:
        raise Damaged(str(error)) from error
