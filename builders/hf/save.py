"""Writing a Hugging Face directory: config.json from the spec, safetensors under the family's names."""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.files import disk, published, require_free
from modelspec.builders.hf.load import dtype_name
from modelspec.builders.hf.names import INDEX, SINGLE, Piece, duplicates, inventory
from modelspec.builders.model import Transformer
from modelspec.hf_config import config_from_spec, family_of

MAX_SHARD_BYTES = 5 * 10**9


def save_pretrained(model: Transformer, directory: str | Path) -> None:
    """Writes a Hugging Face directory, which appears whole or not at all.

    Raises HFError where the family cannot say what the spec says, Misuse where something is in the way, and
    EnvironmentFailed where the disk fails.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise Misuse(f"{directory}: exists already, and is not an empty folder")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    spec = model.spec
    config = config_from_spec(spec, dtype_name(tensors["embed_tokens.weight"].dtype))
    stored = {
        hub: _Stored(tensors[pieces[0].tensor], pieces)
        for hub, group in groupby(inventory(spec.model, family_of(spec.model)), key=lambda piece: piece.hub)
        if (pieces := tuple(group))
    }
    # A tied head is not written: readers take the embedding.
    stored |= {copy: stored[name] for copy, name in duplicates(spec.model).items() if copy != "lm_head.weight"}
    shards = _shards(stored)
    size = sum(each.bytes for each in stored.values())
    with disk(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    require_free(directory.parent, size + 2**20)
    with published(directory) as folder:
        names = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            _write_tensors(folder / name, {key: stored[key].whole() for key in shard})
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        _write_json(folder / "config.json", config)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the files, not yet made: pieces of one of ours."""

    tensor: Tensor
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.of(self.tensor).nbytes for piece in self.pieces)

    def whole(self) -> Tensor:
        """New memory, since a safetensors file may not hold two names for one."""
        shape = self.pieces[0].hub_shape(tuple(self.tensor.shape))
        whole = torch.empty(shape, dtype=self.tensor.dtype)
        for piece in self.pieces:
            piece.hub_view(whole).copy_(piece.of(self.tensor.detach()))
        return whole


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # Also how the library reports errors of the disk.
        raise EnvironmentFailed(f"cannot write {path}: {error}") from error


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def _shards(stored: dict[str, _Stored]) -> list[list[str]]:
    """Names in order, cut where the next tensor would exceed the size of a file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, each in stored.items():
        if shards[-1] and size + each.bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += each.bytes
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
