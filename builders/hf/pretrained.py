"""Models and Hugging Face directories: `from_pretrained` and `save_pretrained`.

Both walk the table of names. A directory is read through its inventory, checked before a value is read; a model is
written from memory, tensor by tensor of the files.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from modelspec.builders import weights
from modelspec.builders.checkpoint import require_new
from modelspec.builders.device import require_device
from modelspec.builders.hf.convert import open_weights, write_hub
from modelspec.builders.hf.names import Piece, duplicates, inventory
from modelspec.builders.model import Transformer
from modelspec.builders.tensor_files import FILE_DTYPES
from modelspec.builders.tensor_writer import Planned, buffers_of
from modelspec.hf_config import config_from_spec, family_of


def from_pretrained(
    directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model in a Hugging Face directory, in a run of ours, or in one of its checkpoints or a weights folder.

    Without `dtype` every tensor keeps the dtype of the files, and a Hugging Face model computes in the embedding's.
    Selection biases are float32 at least; weights in FP8 need a `dtype` to be multiplied out to. Warns of what is not
    as config.json says. Raises Misuse, Refused, HFError or EnvironmentFailed.
    """
    device = require_device(device)
    found = open_weights(Path(directory))
    for notice in found.notices:
        warnings.warn(notice, stacklevel=2)
    if dtype is not None:
        precision = weights.precision(dtype)
        found = replace(found, spec=found.spec.model_copy(update={"precision": precision}))
    return weights.load(found, device=device, dtype=dtype)


def save_pretrained(model: Transformer, directory: str | Path) -> None:
    """Writes a Hugging Face directory, which appears whole or not at all.

    Raises HFError where the family cannot say what the spec says, Misuse where something is in the way, and
    EnvironmentFailed where the disk fails.
    """
    directory = Path(directory)
    require_new(directory)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    config = config_from_spec(model.spec, weights.precision(tensors["embed_tokens.weight"].dtype).compute)
    write_hub(directory, list(_planned(model, tensors)), config)


def _planned(model: Transformer, tensors: dict[str, Tensor]) -> Iterator[Planned]:
    """Every tensor of the files, the duplicates last. A tied head is not written: readers take the embedding."""
    spec = model.spec.model
    for hub, pieces in groupby(inventory(spec, family_of(spec)), key=lambda piece: piece.hub):
        yield _of(hub, tuple(pieces), tensors)
    originals = {piece.hub: piece for piece in inventory(spec, family_of(spec)) if piece.expert is None}
    for copy, name in duplicates(spec).items():
        if copy != "lm_head.weight":
            yield _of(copy, (originals[name],), tensors)


def _of(hub: str, pieces: tuple[Piece, ...], tensors: dict[str, Tensor]) -> Planned:
    tensor = tensors[pieces[0].tensor]
    shape = pieces[0].hub_shape(tuple(tensor.shape))
    return Planned(hub, FILE_DTYPES[tensor.dtype], shape, lambda: buffers_of(_whole(pieces, tensor, shape)))


def _whole(pieces: Iterable[Piece], tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of the files, put together from pieces of ours."""
    whole = torch.empty(shape, dtype=tensor.dtype)
    for piece in pieces:
        piece.hub_view(whole).copy_(piece.of(tensor.detach()))
    return whole
