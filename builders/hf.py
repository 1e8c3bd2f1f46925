"""Hugging Face directories: config.json and safetensors, read and written.

`NAMES` says what each tensor of the model is called in the files, and it is the only place that does: reading and
writing both walk the spec's table of tensors through it. Experts are stacked in the model and stand one by one in the
files. Only data is read: JSON and safetensors, never a pickle.
"""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders import generate
from modelspec.builders.build import DTYPES, build
from modelspec.builders.checkpoint import MANIFEST
from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.files import disk, published, require_free
from modelspec.builders.model import Transformer
from modelspec.hf_config import HFError, config_from_spec, read_json, spec_from_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

_LAYER = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.q_proj.weight": ("self_attn.q_proj.weight",),
    "attention.q_a_proj.weight": ("self_attn.q_a_proj.weight",),
    "attention.q_a_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attention.q_b_proj.weight": ("self_attn.q_b_proj.weight",),
    "attention.kv_a_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.kv_a_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attention.kv_b_proj.weight": ("self_attn.kv_b_proj.weight",),
    "attention.o_proj.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.gate_proj.weight": ("mlp.gate_proj.weight",),
    "ffn.up_proj.weight": ("mlp.up_proj.weight",),
    "ffn.down_proj.weight": ("mlp.down_proj.weight",),
    "ffn.router.weight": ("mlp.gate.weight",),
    "ffn.router.selection_bias": ("mlp.gate.e_score_correction_bias",),
    "ffn.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "ffn.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    "ffn.shared_experts.gate_proj.weight": ("mlp.shared_experts.gate_proj.weight",),
    "ffn.shared_experts.up_proj.weight": ("mlp.shared_experts.up_proj.weight",),
    "ffn.shared_experts.down_proj.weight": ("mlp.shared_experts.down_proj.weight",),
}
_MTP = {
    "embedding_norm.weight": ("enorm.weight",),
    "hidden_norm.weight": ("hnorm.weight",),
    "proj.weight": ("eh_proj.weight",),
    "norm.weight": ("shared_head.norm.weight",),
} | {f"block.{name}": parts for name, parts in _LAYER.items()}

# Our name -> names in the files; several are parts of one tensor, row block after row block. Modules of multi-token
# prediction stand in the files as layers after the last one.
NAMES: dict[str, tuple[str, ...]] = (
    {
        "embed_tokens.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    }
    | {
        f"layers.{{layer}}.{name}": tuple(f"model.layers.{{layer}}.{p}" for p in parts)
        for name, parts in _LAYER.items()
    }
    | {f"mtp.{{layer}}.{name}": tuple(f"model.layers.{{layer}}.{p}" for p in parts) for name, parts in _MTP.items()}
)


class Place(NamedTuple):
    """Where a tensor of the files stands in one of the model: `part` of `parts` row blocks, of one expert or of all."""

    tensor: str
    expert: int | None
    part: int
    parts: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the model's tensor that this place is."""
        whole = tensor if self.expert is None else tensor[self.expert]
        return whole if self.parts == 1 else whole.chunk(self.parts)[self.part]

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of that view, given the shape of the model's tensor."""
        rows, *rest = shape if self.expert is None else shape[1:]
        return (rows // self.parts, *rest)


def inventory(model: schema.Model) -> Iterator[tuple[str, Place]]:
    """Every tensor of the files and its place, tensor after tensor of the model."""
    for name, tensor in model.tensors().items():
        layer = re.match(r"(layers|mtp)\.(\d+)\.", name)
        number = int(layer[2]) + (model.num_layers if layer[1] == "mtp" else 0) if layer else None
        parts = NAMES[re.sub(r"^(layers|mtp)\.\d+\.", r"\1.{layer}.", name)]
        for expert in range(tensor.shape[0]) if "{expert}" in parts[0] else [None]:
            for part, template in enumerate(parts):
                yield template.format(layer=number, expert=expert), Place(name, expert, part, len(parts))


def duplicates(model: schema.Model) -> dict[str, str]:
    """Names in the files that repeat another tensor -> the name of that tensor."""
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    result = {"lm_head.weight": head} if model.tie_embeddings else {}
    for index in range(model.mtp.depth if model.mtp else 0):
        layer = f"model.layers.{model.num_layers + index}"
        result |= {
            f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
            f"{layer}.shared_head.head.weight": head,
        }
    return result


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
    spec = spec_from_config(read_json(directory / "config.json"), _name(directory))
    files = _open(directory)
    if spec.model.mtp and not any(name.startswith(f"model.layers.{spec.model.num_layers}.") for name in files):
        warnings.warn(
            f"{directory}: config.json names multi-token prediction, but its weights are not in the files: "
            "the model is built without it",
            stacklevel=2,
        )
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"mtp": None})})
    _require_complete(directory, spec.model, files)
    spec = spec.model_copy(update={"precision": _precision(dtype or _dtype(files["model.embed_tokens.weight"]))})
    model = build(spec, device="meta")
    table = spec.tensors()
    for name, entries in groupby(inventory(spec.model), key=lambda entry: entry[1].tensor):
        _fill(model, name, table[name], [(files[hub], place) for hub, place in entries], device, dtype)
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


def _require_complete(directory: Path, model: schema.Model, files: dict[str, _Stored]) -> None:
    """Raises HFError unless the files hold exactly the tensors of the model, in their shapes."""
    table = model.tensors()
    # Stops after a few: a config may promise far more tensors than could be listed.
    missing = list(islice((name for name, _ in inventory(model) if name not in files), 4))
    if missing:
        raise HFError(f"{directory}: {_some(missing)} missing from the files")
    expected = dict(inventory(model))
    extra = sorted(files.keys() - expected.keys() - duplicates(model).keys())
    if extra:
        raise HFError(f"{files[extra[0]].file}: {_some(extra)} not part of the model that config.json describes")
    for name, place in expected.items():
        shape = place.shape_in(table[place.tensor].shape)
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
    name = _dtype_name(dtype)
    return schema.Precision(
        compute=name, master_weights=name, router="float64" if dtype == torch.float64 else "float32"
    )


def _dtype_name(dtype: torch.dtype) -> schema.Dtype:
    for name in get_args(schema.Dtype):
        if DTYPES[name] == dtype:
            return name
    raise Misuse(f"{dtype} is not supported; supported: {', '.join(DTYPES)}")


def _fill(
    model: nn.Module,
    name: str,
    spec: schema.TensorSpec,
    entries: list[tuple[_Stored, Place]],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Reads one tensor of the model, in one piece or in many."""
    for stored, _ in entries:
        if stored.dtype not in {*_FILE_DTYPES, "F16"}:
            raise HFError(f"{stored.file}: {stored.name} is {stored.dtype}, which is not supported")
    dtype = dtype or _dtype(entries[0][0])
    if spec.kind == "buffer":
        dtype = torch.promote_types(dtype, torch.float32)
    tensor = torch.empty(spec.shape, dtype=dtype, device=device)
    for stored, place in entries:
        place.of(tensor).copy_(stored.read())
    owner, _, leaf = name.rpartition(".")
    if spec.kind == "buffer":
        model.get_submodule(owner).register_buffer(leaf, tensor)
    else:
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))


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
    config = config_from_spec(spec, _dtype_name(tensors["embed_tokens.weight"].dtype))
    views = {name: place.of(tensors[place.tensor]) for name, place in inventory(spec.model)}
    # A tied head is not written: readers take the embedding.
    views |= {copy: views[name] for copy, name in duplicates(spec.model).items() if copy != "lm_head.weight"}
    shards = _shards(views)
    size = sum(map(_bytes, views.values()))
    with disk(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    require_free(directory.parent, size + 2**20)
    with published(directory) as folder:
        names = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            _write_tensors(folder / name, {key: views[key] for key in shard})
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        _write_json(folder / "config.json", config)


def _write_tensors(path: Path, views: dict[str, Tensor]) -> None:
    # Cloned, since a safetensors file may not hold two names for one memory.
    clones = {name: view.detach().cpu().clone(memory_format=torch.contiguous_format) for name, view in views.items()}
    try:
        save_file(clones, path, metadata={"format": "pt"})
    except SafetensorError as error:  # Also how the library reports errors of the disk.
        raise EnvironmentFailed(f"cannot write {path}: {error}") from error


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names in order, cut where the next tensor would exceed the size of a file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _bytes(tensor) > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
