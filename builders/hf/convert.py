"""Hugging Face directories as weights, and weights as Hugging Face directories, piece by piece.

Reading proves an inventory before a value is read: every tensor of the files is used once, has the shape that
config.json asks for and a dtype that it allows. Writing walks the same inventory the other way.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import torch

from modelspec import schema
from modelspec.builders.checkpoint import MANIFEST, TOKENIZER, require_new
from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.files import disk, published, require_free
from modelspec.builders.generate import find_weights
from modelspec.builders.hf.names import Piece, duplicates, hub_shapes, inventory, is_left_out
from modelspec.builders.tensor_files import FILE_DTYPES, INDEX, TORCH_DTYPES, Stored, read_directory
from modelspec.builders.tensor_writer import Bytes, Planned, Progress, buffers_of, counted, unseen, write_files
from modelspec.builders.weights import FP8, SCALES, Part, Weights, precision
from modelspec.hf_config import (
    Family,
    HFError,
    Quantization,
    Reading,
    config_from_spec,
    family_of,
    read_config,
    read_json,
)
from modelspec.kernels.block_scale import Block, scales_shape

_BLOCK: Block = (128, 128)
Target = torch.dtype | Literal["fp8"] | None


def is_hugging_face(directory: Path) -> bool:
    """Whether a folder is one of Hugging Face's rather than a run or a checkpoint of ours."""
    ours = (directory / MANIFEST).exists() or (directory / "checkpoints").exists()
    return (directory / "config.json").exists() and not ours


def open_hub(directory: Path) -> tuple[Weights, Reading]:
    """The weights in a Hugging Face directory, and what its config.json says.

    Raises Misuse or Unreadable for files that cannot be read, HFError where files and config contradict each other.
    """
    config = directory / "config.json"
    reading = read_config(read_json(config), _name(directory), str(config))
    files, left = _described(directory, read_directory(directory), reading.family)
    spec, notices = _with_mtp_if_there(directory, reading.spec, files)
    model = spec.model
    _require_complete(directory, model, reading, files)
    block = reading.quantization.weight_block_size if reading.quantization else _BLOCK
    table = model.tensors()
    parts = {
        name: tuple(_part(piece, table[name].shape, files, block) for piece in group)
        for name, group in groupby(inventory(model, reading.family), key=lambda piece: piece.tensor)
    }
    notices += left + _different(directory, model, files)
    spec = spec.model_copy(update={"precision": _precision(reading.quantization, parts["embed_tokens.weight"][0])})
    tokenizer = directory / TOKENIZER
    return Weights(directory, spec, parts, tokenizer if tokenizer.exists() else None, notices), reading


def open_weights(directory: Path, step: int | None = None) -> Weights:
    """The weights in a run, a checkpoint, a weights folder or a Hugging Face directory. Raises as their readers do."""
    if not directory.is_dir():
        raise Misuse(f"{directory}: not a folder")
    return open_hub(directory)[0] if is_hugging_face(directory) else find_weights(directory, step)[0]


def _name(directory: Path) -> str:
    """The folder's name, as far as a spec can have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).lstrip("._-")[:64] or "model"


def _described(
    directory: Path, files: Mapping[str, Stored], family: Family
) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
    """The files without what no spec describes, and a notice of that."""
    left = sorted(name for name in files if is_left_out(name, family))
    if not left:
        return files, ()
    notice = f"{directory}: {_some(left)} left out: no spec describes this module of the family {family}"
    return {name: files[name] for name in files.keys() - set(left)}, (notice,)


def _with_mtp_if_there(
    directory: Path, spec: schema.ModelSpec, files: Mapping[str, Stored]
) -> tuple[schema.ModelSpec, tuple[str, ...]]:
    first = f"model.layers.{spec.model.num_layers}."
    if spec.model.mtp is None or any(name.startswith(first) for name in files):
        return spec, ()
    notice = (
        f"{directory}: config.json names multi-token prediction, but its weights are not in the files: "
        "the model is built without it"
    )
    return spec.model_copy(update={"model": spec.model.model_copy(update={"mtp": None})}), (notice,)


def _require_complete(directory: Path, model: schema.Model, reading: Reading, files: Mapping[str, Stored]) -> None:
    """Raises HFError unless the files hold exactly the tensors of the model, in their shapes, and FP8 with scales."""
    # Stops after a few: a config may promise far more tensors than could be listed.
    names = (piece.hub for piece in inventory(model, reading.family))
    missing = list(islice((name for name, _ in groupby(names) if name not in files), 4))
    if missing:
        raise HFError(f"{directory}: {_some(missing)} missing from the files")
    expected = hub_shapes(model, reading.family)
    scaled = {name for name in files if name + SCALES in files}
    extra = sorted(files.keys() - expected.keys() - duplicates(model).keys() - {name + SCALES for name in scaled})
    if extra:
        raise HFError(f"{files[extra[0]].file}: {_some(extra)} not part of the model that config.json describes")
    for name, shape in expected.items():
        stored = files[name]
        if stored.shape != shape:
            raise HFError(f"{stored.file}: {name} has shape {list(stored.shape)}, config.json asks for {list(shape)}")
        if stored.dtype == FP8 or name in scaled:
            _require_scaled(stored, files.get(name + SCALES), reading.quantization)
    if reading.quantization is not None and not scaled:
        raise HFError(f"{directory}: config.json has quantization_config, but no tensor of the files is in FP8")


def _require_scaled(stored: Stored, scales: Stored | None, quantization: Quantization | None) -> None:
    place = f"{stored.file}: {stored.name}"
    if quantization is None:
        raise HFError(f"{place} is {stored.dtype} with scales per block, but config.json has no quantization_config")
    if stored.dtype != FP8 or len(stored.shape) != 2:
        raise HFError(f"{place} is {stored.dtype}{list(stored.shape)} and has scales; only {FP8} matrices have them")
    if scales is None:
        raise HFError(f"{place} is {FP8}, but {stored.name + SCALES} is missing from the files")
    wanted = scales_shape(stored.shape, quantization.weight_block_size)
    if (scales.dtype, scales.shape) != ("F32", wanted):
        raise HFError(
            f"{scales.file}: {scales.name} is {scales.dtype}{list(scales.shape)}; one F32 for each block of "
            f"{list(stored.shape)} is F32{list(wanted)}"
        )


def _part(piece: Piece, shape: tuple[int, ...], files: Mapping[str, Stored], block: Block) -> Part:
    stored, scales = files[piece.hub], files.get(piece.hub + SCALES)
    return Part(stored, piece.shape_in(shape), None if piece.is_plain else piece.hub_view, scales, block)


def _different(directory: Path, model: schema.Model, files: Mapping[str, Stored]) -> tuple[str, ...]:
    return tuple(
        f"{directory}: {copy} differs from {name}, which is used in its place"
        for copy, name in duplicates(model).items()
        if copy in files and not _equal(files[copy], files[name])
    )


def _equal(one: Stored, other: Stored) -> bool:
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and all(a == b for a, b in zip(one.buffers(), other.buffers(), strict=True))


def _precision(quantization: Quantization | None, embedding: Part) -> schema.Precision:
    """Everything in the dtype of the embedding; F16, which no spec can say, counts as float32."""
    dtype = TORCH_DTYPES[embedding.dtype]
    fp8 = None
    if quantization is not None:
        fp8 = schema.FP8(
            format="e4m3",
            activation_block=(1, quantization.weight_block_size[1]),
            weight_block=quantization.weight_block_size,
            scales="ue8m0" if quantization.scale_fmt == "ue8m0" else "float32",
            gemms=("forward",),
        )
    return precision(torch.float32 if dtype == torch.float16 else dtype, fp8)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ... are" if len(names) > 3 else " are" if len(names) > 1 else " is")


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def hub_table(model: schema.Model, *, dtype: str = "BF16", block: Block | None = None) -> dict[str, Header]:
    """Every tensor of a Hugging Face directory of this model, duplicates included, without any weights.

    With `block` the projections are in FP8 with their scales. Raises HFError where no family has the model.
    """
    table = model.tensors()
    result: dict[str, Header] = {}
    for piece in inventory(model, family_of(model)):
        kind, shape = table[piece.tensor].kind, piece.hub_shape(table[piece.tensor].shape)
        if block is not None and in_fp8(piece):
            result[piece.hub] = Header(FP8, shape)
            result[piece.hub + SCALES] = Header("F32", scales_shape(shape, block))
        else:
            result[piece.hub] = Header("F32" if kind == "buffer" and dtype != "F64" else dtype, shape)
    return result | {copy: result[name] for copy, name in _written_twice(model).items()}


def in_fp8(piece: Piece) -> bool:
    """Whether FP8 checkpoints keep a tensor in FP8: projections of attention, feed-forward networks and experts."""
    inner = ".attention." in piece.tensor or ".ffn." in piece.tensor
    matrix = piece.tensor.endswith(("_proj.weight", ".experts.gate_up_proj", ".experts.down_proj"))
    return inner and matrix and piece.is_plain and not piece.tensor.endswith(".weights_proj.weight")


def _written_twice(model: schema.Model) -> dict[str, str]:
    """The duplicates, but a tied head is not written: readers take the embedding."""
    return {copy: name for copy, name in duplicates(model).items() if copy != "lm_head.weight"}


def export(
    weights: Weights,
    directory: Path,
    *,
    target: Target = None,
    with_mtp: bool = True,
    progress: Progress = unseen,
) -> None:
    """Writes a Hugging Face directory, which appears whole or not at all.

    `target` None keeps the dtypes of the files, FP8 included; "fp8" scales the projections by blocks of 128 x 128.
    Raises HFError naming the part of the spec that the family cannot say, Misuse where something is in the way,
    EnvironmentFailed where the disk fails.
    """
    require_new(directory)
    if target == "fp8" and weights.is_fp8:
        target = None
    model = weights.spec.model if with_mtp else weights.spec.model.model_copy(update={"mtp": None})
    spec = weights.spec.model_copy(update={"model": model})
    tensors = list(_exported(weights, model, target))
    kept = next(tensor.dtype for tensor in tensors if tensor.name == "model.embed_tokens.weight")
    name = precision(TORCH_DTYPES[kept]).compute
    config = config_from_spec(spec, name, _quantization(spec, tensors, target))
    write_hub(directory, tensors, config, weights.tokenizer, progress)


def write_hub(
    directory: Path,
    tensors: Sequence[Planned],
    config: Mapping[str, Any],
    tokenizer: Path | None = None,
    progress: Progress = unseen,
) -> None:
    """Writes the files of a Hugging Face directory, which appears whole or not at all. Raises EnvironmentFailed."""
    size = sum(tensor.bytes for tensor in tensors)
    with disk(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    require_free(directory.parent, size + 2**20)
    with published(directory) as fresh:
        files = write_files(fresh, tensors, counted(progress, size), directory)
        if len(files) > 1:
            where = {name: file for file, (_, names) in files.items() for name in names}
            _write_json(fresh / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        _write_json(fresh / "config.json", config)
        if tokenizer is not None:
            (fresh / TOKENIZER).write_bytes(tokenizer.read_bytes())


def _quantization(spec: schema.ModelSpec, tensors: Sequence[Planned], target: Target) -> Quantization | None:
    names = {tensor.name for tensor in tensors}
    if not any(name.endswith(SCALES) for name in names):
        return None
    fp8 = spec.precision.fp8 if target is None else None
    plain = sorted(
        piece.hub.removesuffix(".weight")
        for piece in inventory(spec.model, family_of(spec.model))
        if in_fp8(piece) and piece.hub + SCALES not in names
    )
    block = fp8.weight_block if fp8 else _BLOCK
    return Quantization(block, "ue8m0" if fp8 and fp8.scales == "ue8m0" else "float", tuple(plain))


def _exported(weights: Weights, model: schema.Model, target: Target) -> Iterator[Planned]:
    """Every tensor of the files, the duplicates last."""
    table = model.tensors()
    written: dict[str, Planned] = {}
    dtype = torch.bfloat16 if target == "fp8" else target
    for hub, group in groupby(inventory(model, family_of(model)), key=lambda piece: piece.hub):
        pieces = tuple(group)
        name = pieces[0].tensor
        kept = weights.kept_in(name, table[name], dtype)
        parts = tuple(_piece_of(weights.parts[name], piece, table[name].shape) for piece in pieces)
        shape = pieces[0].hub_shape(table[name].shape)
        if not pieces[0].is_plain:
            written[hub] = Planned(hub, FILE_DTYPES[kept], shape, partial(_stacked, pieces, parts, shape, kept))
            yield written[hub]
        elif target == "fp8" and in_fp8(pieces[0]):
            yield from _quantized(hub, parts[0])
        else:
            written[hub] = Planned(hub, FILE_DTYPES[kept], shape, partial(parts[0].bytes, kept))
            yield written[hub]
            if FILE_DTYPES[kept] == FP8 and (scales := parts[0].scales) is not None:
                yield Planned(hub + SCALES, "F32", scales.shape, scales.buffers)
    for copy, name in _written_twice(model).items():
        yield replace(written[name], name=copy)


def _piece_of(parts: tuple[Part, ...], piece: Piece, shape: tuple[int, ...]) -> Part:
    """The part that is this piece, of a tensor that is kept whole or in pieces."""
    count = (1 if piece.expert is None else shape[0]) * piece.parts
    index = (piece.expert or 0) * piece.parts + piece.part
    if len(parts) == count:
        return parts[index]
    whole, *more = parts
    if more or whole.view is not None or whole.scales is not None:
        raise Refused(f"{whole.place} is cut in another way than the family's files cut it")
    small = piece.shape_in(shape)
    return Part(whole.stored.part(index, small), small)


def _stacked(
    pieces: Sequence[Piece], parts: Sequence[Part], shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Bytes]:
    """A tensor that holds many pieces in another order than ours: it is put together in memory."""
    whole = torch.empty(shape, dtype=dtype)
    for piece, part in zip(pieces, parts, strict=True):
        view = piece.hub_view(whole)
        view.copy_(torch.cat(list(part.values(dtype))).view(view.shape))
    yield from buffers_of(whole)


def _quantized(hub: str, part: Part) -> Iterator[Planned]:
    """A matrix in FP8 and its scales. It is read once for each: neither is held."""

    def taken(index: int) -> Iterator[Bytes]:
        for pair in part.quantized():
            yield from buffers_of(pair[index])

    rows, columns = part.shape
    yield Planned(hub, FP8, (rows, columns), lambda: taken(0))
    yield Planned(hub + SCALES, "F32", scales_shape((rows, columns), _BLOCK), lambda: taken(1))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
