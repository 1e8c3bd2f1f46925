"""How a model begins: with initial values, written as a weights folder, or with the weights of another.

Both go tensor by tensor: neither holds a model that is not there already.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from modelspec import schema
from modelspec.builders import tokenizer as bpe
from modelspec.builders.build import DTYPES
from modelspec.builders.checkpoint import Checkpoint, model_tensors, save_weights
from modelspec.builders.errors import Refused
from modelspec.builders.init import initial_values
from modelspec.builders.run import marked
from modelspec.builders.tensor_files import FILE_DTYPES
from modelspec.builders.tensor_writer import Bytes, Planned, Progress, buffers_of, unseen
from modelspec.builders.weights import Weights, fill
from modelspec.diff import diff


def save_initial(
    spec: schema.ModelSpec, path: Path, texts: Mapping[str, str], *, seed: int = 0, progress: Progress = unseen
) -> Checkpoint:
    """Writes what `build` would begin with as a weights folder, in `precision.master_weights`.

    `texts` are files that stand beside the weights, by name. Raises as `checkpoint.save_weights` does.
    """
    master = DTYPES[spec.precision.master_weights]

    def planned(name: str, tensor: schema.TensorSpec) -> Planned:
        dtype = torch.promote_types(master, torch.float32) if tensor.kind == "buffer" else master

        def values() -> Iterator[Bytes]:
            for value in initial_values(name, tensor, spec.model.init.std, seed):
                yield from buffers_of(value.to(dtype))

        return Planned(name, FILE_DTYPES[dtype], tensor.shape, values)

    tensors = [planned(name, tensor) for name, tensor in spec.tensors().items()]
    return save_weights(path, tensors, marked(spec), texts, progress)


def require_fit(weights: Weights, spec: schema.ModelSpec) -> tuple[str, ...]:
    """What a user should know of starting a spec from these weights.

    Raises Refused, naming the tensor, unless every tensor of the main model is there in its shape.
    """
    mine, theirs = spec.tensors(), weights.spec.tensors()
    shared = spec.model.main_tensors().keys() | weights.spec.model.main_tensors().keys()
    for name in mine | theirs:
        if name in mine and name in theirs and mine[name].shape == theirs[name].shape:
            continue
        if name in shared or (name in mine and name in theirs):
            raise Refused(
                f"{weights.place} does not fit {spec.name}: {name} is {_shape(theirs, name)} there and "
                f"{_shape(mine, name)} in the spec\n  help: {_remedy(name, mine, theirs)}"
            )
    notices = []
    fresh, unused = len(mine.keys() - theirs.keys()), len(theirs.keys() - mine.keys())
    if fresh:
        notices.append(
            f"{weights.place} lacks {fresh} tensors of multi-token prediction: these begin with initial values"
        )
    if unused:
        notices.append(f"{unused} tensors of multi-token prediction in {weights.place} are not used: the spec has none")
    for change in diff(weights.spec, spec):
        if change.path.startswith("model.") and not change.path.startswith(("model.mtp", "model.init")):
            notices.append(f"{change.path} was {change.before} in {weights.place} and is {change.after} now")
    return tuple(notices)


def _shape(table: schema.Tensors, name: str) -> str:
    return str(list(table[name].shape)) if name in table else "absent"


def _remedy(name: str, mine: schema.Tensors, theirs: schema.Tensors) -> str:
    if name == "embed_tokens.weight" and name in theirs and mine[name].shape[1:] == theirs[name].shape[1:]:
        return f"set model.vocab_size={theirs[name].shape[0]}"
    return "take `model` from the spec.yaml that stands beside the weights"


def require_tokenizer(weights: Weights, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a user should know of the text's tokenizer. Raises Refused unless it is that of the weights."""
    if weights.tokenizer is None:
        return (f"{weights.place} has no tokenizer.json: nothing says that its tokens are those of data.tokenizer",)
    if bpe.read(weights.tokenizer).get_vocab(with_added_tokens=True) != tokenizer.get_vocab(with_added_tokens=True):
        raise Refused(
            f"data.tokenizer has other tokens than {weights.tokenizer}, which the weights were trained with\n"
            f"  help: set data.tokenizer={{type: file, path: {weights.tokenizer}}}"
        )
    return ()


def start_from(model: nn.Module, weights: Weights) -> None:
    """Copies the weights that the model has a place for into it, in its own dtypes; FP8 is multiplied out."""
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            if name in weights.parts:
                fill(tensor, weights.parts[name])
