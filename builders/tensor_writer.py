"""Safetensors files, written as a stream: every byte is hashed on its way to the disk, and no tensor has to be held.

`Planned` is a tensor to be written: what the header says of it, and where its bytes come from. Reading, hashing and
writing run side by side, so a file is written at the pace of the slowest of the three. That is hashing, which has one
core for a file: a large model is cut into several, and two of them are written at a time.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from modelspec.builders.errors import EnvironmentFailed
from modelspec.builders.tensor_files import CHUNK, FILE_DTYPES, SINGLE, TORCH_DTYPES

MAX_SHARD_BYTES = 2 * 10**9
_SIDE_BY_SIDE = 2
# Buffers that wait to be hashed and written.
_DEPTH = 16
# Bytes after which the system is asked to write out what it holds.
_FLUSH = 16 * 2**20
Bytes = bytes | memoryview
Report = Callable[[int], None]  # Of bytes that were written.
Progress = Callable[[int, int], None]  # Of bytes written so far, and of how many in all.


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written: what the header says of it, and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffers: Callable[[], Iterable[Bytes]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


def unseen(written: int, total: int) -> None:
    """The progress that nobody looks at."""


def counted(progress: Progress, total: int) -> Report:
    """A report that adds up, for several threads."""
    written, one_at_a_time = 0, Lock()

    def report(count: int) -> None:
        nonlocal written
        with one_at_a_time:
            written += count
            progress(written, total)

    return report


def plan(name: str, tensor: Tensor) -> Planned:
    """A tensor in memory as one to be written."""
    return Planned(name, FILE_DTYPES[tensor.dtype], tuple(tensor.shape), lambda: buffers_of(tensor))


def buffers_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, element after element."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(flat), CHUNK):
        yield flat[begin : begin + CHUNK]


def write_file(
    path: Path, tensors: Sequence[Planned], report: Report = lambda count: None, final: Path | None = None
) -> Written:
    """Writes a safetensors file and hashes it on the way; `report` hears of the bytes written.

    Raises EnvironmentFailed where the disk fails; it names `final`, if given, in place of the file.
    """
    head, offsets = laid_out(tensors)
    order = sorted(tensors, key=lambda tensor: offsets[tensor.name])
    try:
        with path.open("wb", buffering=0) as file, _Sink(file) as sink:
            sink.add(head)
            for tensor in order:
                before = sink.bytes
                for buffer in tensor.buffers():
                    sink.add(buffer)
                    report(memoryview(buffer).nbytes)
                assert sink.bytes - before == tensor.bytes, tensor.name
    except OSError as error:
        place = final or path
        size = sum(tensor.bytes for tensor in tensors)
        raise EnvironmentFailed(f"cannot write {place}, {size:,} bytes of tensors: {error.strerror}") from error
    return Written(sink.bytes, sink.sha256)


def laid_out(tensors: Sequence[Planned]) -> tuple[bytes, dict[str, int]]:
    """How a file of tensors begins, and of each tensor the place of its first byte in the file."""
    # Wide elements first: every tensor then begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda tensor: -TORCH_DTYPES[tensor.dtype].itemsize)
    header, offsets, end = {}, {}, 0
    for tensor in order:
        offsets[tensor.name] = end
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


class _Sink:
    """Hashes and writes side by side, while whoever adds reads on."""

    def __init__(self, file: Any) -> None:
        self.bytes = 0
        self._written = self._flushed = 0
        self._file, self._hash = file, hashlib.sha256()
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._waiting: deque[Future[None]] = deque()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add(self, buffer: Bytes) -> None:
        """Takes bytes that nobody changes any more."""
        self.bytes += memoryview(buffer).nbytes
        hashing, writing = self._threads
        self._waiting += (hashing.submit(self._hash.update, buffer), writing.submit(self._write, buffer))
        while len(self._waiting) > 2 * _DEPTH:
            self._waiting.popleft().result()

    def _write(self, buffer: Bytes) -> None:
        rest = memoryview(buffer).cast("B")
        while rest:
            count = self._file.write(rest)
            self._written += count
            rest = rest[count:]
        if self._written - self._flushed >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        """Lets the disk begin at once, where the system can be told; else all of it would wait for the end."""
        if hasattr(os, "posix_fadvise"):
            begin, count = self._flushed, self._written - self._flushed
            os.posix_fadvise(self._file.fileno(), begin, count, os.POSIX_FADV_DONTNEED)
        self._flushed = self._written

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()


def write_files(
    folder: Path, tensors: Iterable[Planned], report: Report = lambda count: None, final: Path | None = None
) -> dict[str, tuple[Written, tuple[str, ...]]]:
    """Writes one file, or several of at most MAX_SHARD_BYTES: name -> what was written, and the names in it.

    A tensor is never cut. Raises EnvironmentFailed.
    """
    files = cut_into_files(tensors)
    names, shards = list(files), list(files.values())
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        written = [
            pool.submit(write_file, folder / name, shard, report, final)
            for name, shard in zip(names, shards, strict=True)
        ]
        try:
            return {
                name: (future.result(), tuple(tensor.name for tensor in shard))
                for name, shard, future in zip(names, shards, written, strict=True)
            }
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cut_into_files(tensors: Iterable[Planned]) -> dict[str, list[Planned]]:
    """Tensors by the name of the file that they are written to: one file, or several of at most MAX_SHARD_BYTES."""
    shards = _shards(tensors)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    return dict(zip(names, shards, strict=True))


def _shards(tensors: Iterable[Planned]) -> list[list[Planned]]:
    """Tensors in order, cut where the next one would exceed the size of a file."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"
