"""Safetensors files, read strictly: a header that accounts for every byte, tensors that are read where they lie.

A file is 8 bytes that say how long the header is, the header (JSON: name -> dtype, shape, offsets), then the bytes of
all tensors. `Stored` is a tensor in a file that was not read yet. Parts of it are tensors too, so a stack of experts
can be written from many tensors, or read as many, without being held.
"""

import json
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelspec.builders.errors import Misuse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FILE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CHUNK = 2**20  # Small enough to stay in a cache between reading, hashing and writing.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, not read yet: `begin` is its first byte there."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.item

    def part(self, index: int, shape: tuple[int, ...]) -> "Stored":
        """Of consecutive parts of one shape, the one with this index."""
        return Stored(self.file, self.name, self.dtype, shape, self.begin + index * prod(shape) * self.item)

    def rows(self, first: int, count: int) -> "Stored":
        """`count` consecutive rows, or fewer where they end."""
        total, *rest = self.shape
        shape = (min(count, total - first), *rest)
        return Stored(self.file, self.name, self.dtype, shape, self.begin + first * prod(rest) * self.item)

    def buffers(self) -> Iterator[memoryview]:
        """Its bytes in order, a few MiB at a time. Raises Misuse where the file is cut or cannot be read."""
        left = self.bytes
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.begin)
                while left:
                    buffer = np.empty(min(left, CHUNK), np.uint8).data
                    self._fill(file, buffer)
                    left -= len(buffer)
                    yield buffer
        except OSError as error:
            raise Misuse(f"{self.file}: cannot be read: {error.strerror}") from None

    def _fill(self, file: Any, buffer: memoryview) -> None:
        filled = 0
        while filled < len(buffer):
            count = file.readinto(buffer[filled:])
            if not count:
                raise Misuse(f"{self.file}: ends inside {self.name}")
            filled += count

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        flat = np.empty(self.bytes, np.uint8)
        at = 0
        for buffer in self.buffers():
            flat[at : at + len(buffer)] = buffer
            at += len(buffer)
        return torch.from_numpy(flat).view(TORCH_DTYPES[self.dtype]).view(self.shape)

    def mapped(self) -> Tensor:
        """The tensor over the file itself: only what is looked at is read. It must not be written to."""
        try:
            with self.file.open("rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise Misuse(f"{self.file}: cannot be read: {error}") from None
        flat = torch.frombuffer(whole, dtype=torch.uint8, count=self.bytes, offset=self.begin)
        if self.begin % self.item:
            flat = flat.clone()
        return flat.view(TORCH_DTYPES[self.dtype]).view(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name; no value is read.

    Raises Misuse, naming file and tensor, unless header and size account for every byte.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise Misuse(f"{path}: not a readable safetensors file: {size:,} bytes do not hold its header")
            head = file.read(length)
    except OSError as error:
        raise Misuse(f"{path}: not a readable safetensors file: {error.strerror}") from None
    try:
        header = json.loads(head, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        header.pop("__metadata__", None)
        entries = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, RecursionError) as error:
        raise Misuse(f"{path}: not a readable safetensors file: {error}") from None
    end, before = 8 + length, "the header"
    for stored in sorted(entries, key=lambda stored: (stored.begin, stored.bytes)):
        if stored.begin != end:
            how = "overlaps" if stored.begin < end else "leaves a gap behind"
            raise Misuse(f"{path}: not a readable safetensors file: {stored.name} {how} {before}")
        end, before = end + stored.bytes, stored.name
    if end != size:
        how = "truncated" if end > size else "overlong"
        raise Misuse(f"{path}: {how}: its header accounts for {end:,} bytes, it has {size:,} ({before} is the last)")
    return {stored.name: stored for stored in entries}


def _entry(path: Path, name: str, entry: Any, data: int) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: dtype, shape and data_offsets are needed, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is not known; known: {', '.join(TORCH_DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: shape and data_offsets must be lists of whole numbers")
    stored = Stored(path, name, dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != stored.bytes:
        raise ValueError(
            f"{name}: its offsets span {offsets[1] - offsets[0]:,} bytes, {dtype} {shape} takes {stored.bytes:,}"
        )
    return stored


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**60 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return result


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")


def read_files(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of several files. Raises Misuse, also where two files have a tensor of one name."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise Misuse(f"{file}: {name} stands in {found[name].file.name} too")
            found[name] = stored
    return found


def read_directory(directory: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the files that the index beside it names.

    Raises Misuse, also where the index and the files disagree, and for pickles, which are never read.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        if (pickle := next(iter(sorted(directory.glob("*.bin"))), None)) is not None:
            raise Misuse(f"{pickle}: a pickle, which may run code when it is read; convert it to safetensors")
        raise Misuse(f"{directory}: neither {SINGLE} nor {INDEX}")
    where = _weight_map(index)
    found = read_files(directory / file for file in sorted(set(where.values())))
    for name, file in where.items():
        if name not in found or found[name].file.name != file:
            raise Misuse(f"{directory / file}: {name} is missing, which {INDEX} places there")
    for name, stored in found.items():
        if name not in where:
            raise Misuse(f"{stored.file}: {name} is not in {INDEX}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except OSError as error:
        raise Misuse(f"{index}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Misuse(f"{index}: not valid JSON: {error}") from None
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise Misuse(f"{index}: weight_map must map names of tensors to names of files")
    for name, file in where.items():
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", file):
            raise Misuse(f"{index}: {name}: {file!r} is not the name of a safetensors file beside it")
        if not (index.parent / file).exists():
            raise Misuse(f"{index.parent / file}: missing; {INDEX} places {name} there")
    return where
