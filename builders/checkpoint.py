"""Checkpoints: the state of a run after a step, in files that anyone can read and that cannot lie.

    checkpoints/step-1000/
      model.safetensors       every parameter and persistent buffer; large models are cut into files of about 2 GB
      optimizer.safetensors   `step`, `exp_avg` and `exp_avg_sq` of each parameter
      spec.yaml, tokenizer.json
      manifest.json           written last: position in the run, size and SHA-256 of each file

A weights folder, as `import` and `build -o` write it, is a checkpoint at step 0 without the optimizer's file; its
tokenizer may be missing. Matrices may be in FP8 there, each NAME with its scales as NAME_scale_inv.

A checkpoint appears in one rename, so a kill while saving leaves the one before. Reading trusts nothing: digests are
checked first, names, shapes and dtypes before any value is read, and a bad checkpoint sends the reader to the one
before it. Nothing is unpickled. Values come back bit for bit.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.files import discard, disk, published, require_free
from modelspec.builders.optim import AdamW
from modelspec.builders.tensor_files import FILE_DTYPES, SINGLE, Stored, read_files, read_header
from modelspec.builders.tensor_writer import Planned, Progress, Written, counted, plan, unseen, write_file, write_files

FORMAT = 1
OPTIMIZER, SPEC, TOKENIZER, MANIFEST = "optimizer.safetensors", "spec.yaml", "tokenizer.json", "manifest.json"
# Room for what stands beside the tensors, and for the names of files.
_BESIDES = 2**20
_FOLDER = re.compile(r"step-(\d+)")


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
    files: tuple[str, ...] = (SINGLE,)  # Those with the model's tensors.

    def tensors(self) -> dict[str, Stored]:
        """The model's tensors by name, none of them read yet. Raises Damaged."""
        try:
            return read_files(self.path / name for name in self.files)
        except Misuse as error:
            raise Damaged(str(error)) from error


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
    tensors = [plan(name, tensor) for name, tensor in model.items()]
    moments = [plan(name, tensor) for name, tensor in optimizer.items()]
    return _written(path, position, tensors, moments, {SPEC: spec, TOKENIZER: tokenizer})


def save_weights(
    path: Path, tensors: Sequence[Planned], spec: str, texts: Mapping[str, str], progress: Progress = unseen
) -> Checkpoint:
    """Writes a weights folder: `tensors` in their order, the spec and whatever `texts` stand beside it, by file name.

    Raises Misuse where something stands at `path`, EnvironmentFailed as
    `save` does.
    """
    require_new(path)
    return _written(path, Position(), tensors, None, {SPEC: spec, **texts}, progress)


def require_new(path: Path) -> None:
    """Raises Misuse unless there is nothing at `path`, or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise Misuse(f"{path}: exists already, and is not an empty folder")


def _written(
    path: Path,
    position: Position,
    model: Sequence[Planned],
    optimizer: Sequence[Planned] | None,
    texts: Mapping[str, str],
    progress: Progress = unseen,
) -> Checkpoint:
    with disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.bytes for tensor in [*model, *(optimizer or ())])
    require_free(path.parent, needed + sum(map(len, texts.values())) + _BESIDES)
    spec_sha256 = hashlib.sha256(texts[SPEC].encode()).hexdigest()
    report = counted(progress, needed)
    with published(path) as fresh:
        parts = write_files(fresh, model, report, path)
        files = {name: written for name, (written, _) in parts.items()}
        counts = {name: len(names) for name, (_, names) in parts.items()}
        if optimizer is not None:
            files[OPTIMIZER] = write_file(fresh / OPTIMIZER, optimizer, report, path)
            counts[OPTIMIZER] = len(optimizer)
        for name, text in texts.items():
            (fresh / name).write_bytes(text.encode())
            files[name] = Written(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
        write_manifest(fresh, position, counts, files, spec_sha256)
    return Checkpoint(path, position, spec_sha256, tuple(parts))


def write_manifest(
    folder: Path, position: Position, counts: Mapping[str, int], files: Mapping[str, Written], spec_sha256: str
) -> None:
    """Writes what makes a folder a checkpoint: `counts` are tensors by file of tensors, `files` all that is there."""
    manifest = {
        "format": FORMAT,
        "position": asdict(position),
        "spec_sha256": spec_sha256,
        "tensors": dict(counts),
        "files": {name: asdict(files[name]) for name in sorted(files)},
        "versions": {"modelspec": version("modelspec"), "torch": torch.__version__},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


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
        model = tuple(name for name in manifest["tensors"] if name != OPTIMIZER)
        if not model or not manifest["files"].keys() >= {*model, SPEC}:
            raise Damaged(f"{MANIFEST} is not one of ours")
        return Checkpoint(path, position, manifest["spec_sha256"], model)
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
    found, wanted = checkpoint.tensors(), model_tensors(model)
    headers = {name: header_of(tensor.shape, tensor.dtype) for name, tensor in wanted.items()}
    require_same(checkpoint.path, found, headers, shapes_only=convert)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name].read())


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: AdamW, *, convert: bool = False) -> None:
    """Gives an optimizer the checkpoint's state; raises as `load_model` does."""
    path = checkpoint.path / OPTIMIZER
    try:
        found = read_header(path)
    except Misuse as error:
        raise Damaged(str(error)) from error
    parameters = dict(model.named_parameters())
    updated = {name: parameter for name, parameter in parameters.items() if f"{name}.step" in found}
    dtypes = {"step": torch.float32, "exp_avg": optimizer.state_dtype, "exp_avg_sq": optimizer.state_dtype}
    headers = {
        f"{name}.{key}": header_of(() if key == "step" else parameter.shape, dtype)
        for name, parameter in updated.items()
        for key, dtype in dtypes.items()
    }
    require_same(path, found, headers, shapes_only=convert)
    for name, parameter in updated.items():
        optimizer.state[parameter] = {
            key: found[f"{name}.{key}"].read().to(parameter.device, dtype) for key, dtype in dtypes.items()
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


Header = tuple[tuple[int, ...], str]


def header_of(shape: Iterable[int], dtype: torch.dtype) -> Header:
    return tuple(shape), FILE_DTYPES[dtype]


def require_same(path: Path, files: Mapping[str, Stored], wanted: Mapping[str, Header], *, shapes_only: bool) -> None:
    """Raises Refused unless the files hold exactly the wanted tensors, by shape and dtype, or by shape alone."""
    found = {name: (stored.shape, stored.dtype) for name, stored in files.items()}

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


def _spelled(header: Header | None) -> str:
    return "absent" if header is None else f"{header[1]}{list(header[0])}"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
