"""Reading a Hugging Face directory: config.json gives the spec, safetensors its tensors.

Names and shapes are checked against the spec's table before anything is read. Only data is read: JSON and safetensors,
never a pickle.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders import generate
from modelspec.builders.build import DTYPES, build
from modelspec.builders.checkpoint import MANIFEST
from modelspec.builders.errors import Misuse
from modelspec.builders.hf.names import INDEX, SINGLE, Piece, duplicates, hub_shapes, inventory
from modelspec.builders.model import Transformer
from modelspec.hf_config import Family, HFError, read_config, read_json


def is_hugging_face(directory: Path) -> bool:
    """Whether a folder is one of Hugging Face's rather than a run or a checkpoint of ours."""
    ours = (directory / MANIFEST).exists() or (directory / "checkpoints").exists()
    return (directory / "config.json").exists() and not ours


def from_pretrained(
    directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model in a Hugging Face directory, in a run of ours or in one of its checkpoints.

    Without `dtype` every tensor keeps the dtype of the files, and a Hugging Face model computes in the embedding's.
    Selection biases are float32 at least. Raises Misuse, Refused or HFError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise Misuse(f"{directory}: not a folder")
    if not is_hugging_face(directory):
        return generate.load(directory, device=str(device), dtype=dtype).model
    reading = read_config(read_json(directory / "config.json"), _name(directory))
    spec, family = reading.spec, reading.family
    files = _open(directory)
    if spec.model.mtp and not any(name.startswith(f"model.layers.{spec.model.num_layers}.") for name in files):
        warnings.warn(
            f"{directory}: config.json names multi-token prediction, but its weights are not in the files: "
            "the model is built without it",
            stacklevel=2,
        )
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"mtp": None})})
    _require_complete(directory, spec.model, family, files)
    spec = spec.model_copy(update={"precision": _precision(dtype or _dtype(files["model.embed_tokens.weight"]))})
    model = build(spec, device="meta")
    table = spec.tensors()
    for name, pieces in groupby(inventory(spec.model, family), key=lambda piece: piece.tensor):
        stored = [(files[hub], list(each)) for hub, each in groupby(pieces, key=lambda piece: piece.hub)]
        _fill(model, name, table[name], stored, device, dtype)
    for duplicate, original in duplicates(spec.model).items():
        if duplicate in files and not _equal(files[duplicate], files[original]):
            warnings.warn(f"{directory}: {duplicate} differs from {original}, which is used in its place", stacklevel=2)
    return model


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file, not yet read."""

    file: Path
    handle: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        return self.handle.get_tensor(self.name)


def _equal(one: _Stored, other: _Stored) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one.read(), other.read())


def _name(directory: Path) -> str:
    """The folder's name, as far as a spec can have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).lstrip("._-")[:64] or "model"


def _open(directory: Path) -> dict[str, _Stored]:
    """Every tensor in the files of a directory, by name; only their headers are read."""
    if (directory / SINGLE).exists():
        return dict(_headers(directory / SINGLE))
    if not (directory / INDEX).exists():
        pickles = next(directory.glob("*.bin"), None)
        if pickles is not None:
            raise HFError(f"{pickles}: a pickle, which may run code when it is read; convert it to safetensors")
        raise HFError(f"{directory}: neither {SINGLE} nor {INDEX}")
    where = read_json(directory / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise HFError(f"{directory / INDEX}: weight_map must map names of tensors to names of files")
    files: dict[str, _Stored] = {}
    for file in sorted(set(where.values())):
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", file):
            raise HFError(f"{directory / INDEX}: {file!r} is not the name of a safetensors file")
        files |= _headers(directory / file)
    for name, file in where.items():
        if name not in files or files[name].file.name != file:
            raise HFError(f"{directory / file}: {name} is missing, which {INDEX} places there")
    return files


def _headers(file: Path) -> Iterator[tuple[str, _Stored]]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            header = handle.get_slice(name)
            yield name, _Stored(file, handle, name, tuple(header.get_shape()), header.get_dtype())
    except (SafetensorError, OSError) as error:
        raise HFError(f"{file}: not a readable safetensors file: {error}") from None


def _require_complete(directory: Path, model: schema.Model, family: Family, files: dict[str, _Stored]) -> None:
    """Raises HFError unless the files hold exactly the tensors of the model, in their shapes."""
    # Stops after a few: a config may promise far more tensors than could be listed.
    names = (piece.hub for piece in inventory(model, family) if piece.hub not in files)
    missing = list(islice((name for name, _ in groupby(names)), 4))
    if missing:
        raise HFError(f"{directory}: {_some(missing)} missing from the files")
    expected = hub_shapes(model, family)
    extra = sorted(files.keys() - expected.keys() - duplicates(model).keys())
    if extra:
        raise HFError(f"{files[extra[0]].file}: {_some(extra)} not part of the model that config.json describes")
    for name, shape in expected.items():
        if files[name].shape != shape:
            raise HFError(
                f"{files[name].file}: {name} has shape {list(files[name].shape)}, config.json asks for {list(shape)}"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ... are" if len(names) > 3 else " are" if len(names) > 1 else " is")


_FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}


def _dtype(stored: _Stored) -> torch.dtype:
    """The dtype in which a tensor of the files is kept."""
    if stored.dtype not in _FILE_DTYPES:
        raise HFError(f"{stored.file}: {stored.name} is {stored.dtype}; pass a dtype to convert it to")
    return _FILE_DTYPES[stored.dtype]


def _precision(dtype: torch.dtype) -> schema.Precision:
    """Everything in one dtype, the router in FP32 at least."""
    name = dtype_name(dtype)
    return schema.Precision(
        compute=name, master_weights=name, router="float64" if dtype == torch.float64 else "float32"
    )


def dtype_name(dtype: torch.dtype) -> schema.Dtype:
    """What specs and configs call a dtype. Raises Misuse for one that models are not built in."""
    for name in get_args(schema.Dtype):
        if DTYPES[name] == dtype:
            return name
    raise Misuse(f"{dtype} is not supported; supported: {', '.join(DTYPES)}")


def _fill(
    model: nn.Module,
    name: str,
    spec: schema.TensorSpec,
    files: list[tuple[_Stored, list[Piece]]],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Reads one tensor of the model, in one piece or in many."""
    for stored, _ in files:
        if stored.dtype not in {*_FILE_DTYPES, "F16"}:
            raise HFError(f"{stored.file}: {stored.name} is {stored.dtype}, which is not supported")
    dtype = dtype or _dtype(files[0][0])
    if spec.kind == "buffer":
        dtype = torch.promote_types(dtype, torch.float32)
    tensor = torch.empty(spec.shape, dtype=dtype, device=device)
    for stored, pieces in files:
        whole = stored.read()
        for piece in pieces:
            piece.of(tensor).copy_(piece.hub_view(whole))
    owner, _, leaf = name.rpartition(".")
    if spec.kind == "buffer":
        model.get_submodule(owner).register_buffer(leaf, tensor)
    else:
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
