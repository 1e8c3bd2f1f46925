"""Checkpoints: the state of a run after a step, in files that anyone can read and that cannot lie.

    checkpoints/step-1000/
      model.safetensors       every parameter and persistent buffer
      optimizer.safetensors   `step`, `exp_avg` and `exp_avg_sq` of each parameter
      spec.yaml, tokenizer.json
      manifest.json           written last: position in the run, size and SHA-256 of each file

A checkpoint appears in one rename, so a kill while saving leaves the one before. Reading trusts nothing: digests are
checked first, names, shapes and dtypes before any value is read, and a bad checkpoint sends the reader to the one
before it. Nothing is unpickled. Values come back bit for bit.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modelspec.builders.errors import EnvironmentFailed, Misuse, Refused
from modelspec.builders.files import discard, disk, published, require_free
from modelspec.builders.optim import AdamW

FORMAT = 1
MODEL, OPTIMIZER, SPEC, TOKENIZER, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "spec.yaml",
    "tokenizer.json",
    "manifest.json",
)
# Room for what stands beside the tensors, and for the names of files.
_BESIDES = 2**20
_FOLDER = re.compile(r"step-(\d+)")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come: optimizer steps, tokens and sequences behind it, and the stage it is in.

    `data` is the corpus's fingerprint: sequences mean something only with the same text.
    """

    step: int = 0
    tokens: int = 0
    sequences: int = 0
    stage: int = 0
    data: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk whose files were whole when it was opened."""

    path: Path
    position: Position
    spec_sha256: str


class Damaged(Misuse):
    """A checkpoint that cannot be used, and why."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tensor once."""
    names: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if names.setdefault(id(tensor), name) == name}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as PARAMETER.KEY; parameters that were never updated have none."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def require_room(folder: Path, model: nn.Module, state_dtype: torch.dtype) -> None:
    """Raises EnvironmentFailed where the disk of `folder` has no room for one checkpoint of a model in training."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    require_free(folder, _bytes(model_tensors(model)) + 2 * parameters * state_dtype.itemsize + _BESIDES)


def save(
    folder: Path,
    position: Position,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    spec: str,
    tokenizer: str,
) -> Checkpoint:
    """Writes `folder`/step-N and returns when it is on disk.

    Raises EnvironmentFailed where there is no room or the disk fails; nothing is left of it then.
    """
    path = folder / f"step-{position.step}"
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    require_free(folder, _bytes(model) + _bytes(optimizer) + _BESIDES)
    with published(path) as fresh:
        _write_tensors(fresh / MODEL, model, path)
        _write_tensors(fresh / OPTIMIZER, optimizer, path)
        (fresh / SPEC).write_text(spec, "utf-8")
        (fresh / TOKENIZER).write_text(tokenizer, "utf-8")
        spec_sha256 = hashlib.sha256(spec.encode()).hexdigest()
        manifest = {
            "format": FORMAT,
            "position": asdict(position),
            "spec_sha256": spec_sha256,
            "tensors": {MODEL: len(model), OPTIMIZER: len(optimizer)},
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(fresh.iterdir())
            },
            "versions": {"modelspec": version("modelspec"), "torch": torch.__version__},
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    return Checkpoint(path, position, spec_sha256)


def latest_valid(
    folder: Path, on_damaged: Callable[[Path, str], None] = lambda path, reason: None
) -> Checkpoint | None:
    """The newest checkpoint of `folder` whose every byte is as it was written; None if there is none.

    `on_damaged` hears of each newer one that was passed over, and why.
    """
    for path in _numbered(folder):
        try:
            return open_checkpoint(path)
        except Damaged as reason:
            on_damaged(path, str(reason))
    return None


def open_checkpoint(path: Path, *, digests: bool = True) -> Checkpoint:
    """The checkpoint in a folder, its files compared with its manifest. Raises Damaged.

    Without `digests` only presence and sizes are compared.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise Damaged(f"format {manifest['format']}; this version reads {FORMAT}")
        for name, entry in manifest["files"].items():
            found = (path / name).stat().st_size
            if found != entry["bytes"]:
                raise Damaged(f"{name} has {found:,} bytes instead of {entry['bytes']:,}")
            if digests and _digest(path / name) != entry["sha256"]:
                raise Damaged(f"{name} does not match its SHA-256")
        position = Position(**manifest["position"])
        *numbers, data = astuple(position)
        if type(data) is not str or any(type(number) is not int or number < 0 for number in numbers):
            raise Damaged(f"{MANIFEST} is not one of ours")
        return Checkpoint(path, position, manifest["spec_sha256"])
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is not one of ours") from error


def load_model(checkpoint: Checkpoint, model: nn.Module, *, convert: bool = False) -> None:
    """Copies the checkpoint's values into a model.

    Raises Refused where names or shapes differ, or dtypes unless `convert` lets them.
    """
    path = checkpoint.path / MODEL
    wanted = model_tensors(model)
    with _opened(path) as file:
        headers = {name: _header(tensor.shape, tensor.dtype) for name, tensor in wanted.items()}
        _require_same(path, _headers(file), headers, shapes_only=convert)
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(file.get_tensor(name))


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: AdamW, *, convert: bool = False) -> None:
    """Gives an optimizer the checkpoint's state; raises as `load_model` does."""
    path = checkpoint.path / OPTIMIZER
    parameters = dict(model.named_parameters())
    with _opened(path) as file:
        found = _headers(file)
        updated = {name: parameter for name, parameter in parameters.items() if f"{name}.step" in found}
        dtypes = {"step": torch.float32, "exp_avg": optimizer.state_dtype, "exp_avg_sq": optimizer.state_dtype}
        headers = {
            f"{name}.{key}": _header(() if key == "step" else parameter.shape, dtype)
            for name, parameter in updated.items()
            for key, dtype in dtypes.items()
        }
        _require_same(path, found, headers, shapes_only=convert)
        for name, parameter in updated.items():
            optimizer.state[parameter] = {
                key: file.get_tensor(f"{name}.{key}").to(parameter.device, dtype) for key, dtype in dtypes.items()
            }


def prune(folder: Path, keep_last: int) -> list[Path]:
    """Deletes what is older than the newest `keep_last` whole checkpoints; gives the deleted."""
    kept = 0
    deleted = []
    for path in _numbered(folder):
        if kept >= keep_last:
            discard(path)
            deleted.append(path)
        else:
            kept += _is_whole(path)
    return deleted


def _numbered(folder: Path) -> list[Path]:
    """Folders named step-N, the largest N first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _is_whole(path: Path) -> bool:
    try:
        open_checkpoint(path, digests=False)
    except Damaged:
        return False
    return True


_Header = tuple[tuple[int, ...], str]


def _header(shape: Iterable[int], dtype: torch.dtype) -> _Header:
    return tuple(shape), _DTYPES[dtype]


def _headers(file: Any) -> dict[str, _Header]:
    """Shape and dtype of each tensor of an open file, no value read."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # The file is no mapping.
    return {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}


def _require_same(
    path: Path, found: Mapping[str, _Header], wanted: Mapping[str, _Header], *, shapes_only: bool
) -> None:
    def differs(name: str) -> bool:
        one, other = found.get(name), wanted.get(name)
        return one is None or other is None or (one[0] != other[0] if shapes_only else one != other)

    wrong = sorted(filter(differs, found.keys() | wanted.keys()))
    if wrong:
        name = wrong[0]
        raise Refused(
            f"{path} does not fit this model: {name} is {_spelled(found.get(name))} in the file and "
            f"{_spelled(wanted.get(name))} in the model ({len(wrong)} of {len(wanted)} tensors differ)"
        )


def _spelled(header: _Header | None) -> str:
    return "absent" if header is None else f"{header[1]}{list(header[0])}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path}: {error}") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], final: Path) -> None:
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # Also how the library reports errors of the disk.
        raise EnvironmentFailed(f"cannot write {final}, {_bytes(tensors):,} bytes of tensors: {error}") from error


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
