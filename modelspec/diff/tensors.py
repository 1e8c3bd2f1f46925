"""What a change of architecture does to a checkpoint: which tensors stay, change their shape, come and go."""

from dataclasses import dataclass

from modelspec.schema import Model, Tensors


@dataclass(frozen=True, slots=True)
class TensorChanges:
    """Names of tensors by what becomes of them, in the order of the tables.

    `elements` counts what a model that starts from the old one's checkpoint must initialise anew: the new tensors and
    the reshaped ones.
    """

    new: tuple[str, ...]
    gone: tuple[str, ...]
    reshaped: tuple[str, ...]
    elements: int


def tensor_changes(old: Model, new: Model) -> TensorChanges:
    """The difference between the tables of two models."""
    before, after = old.tensors(), new.tensors()
    added = tuple(name for name in after if name not in before)
    reshaped = tuple(name for name in after if name in before and _stored(before, name) != _stored(after, name))
    return TensorChanges(
        new=added,
        gone=tuple(name for name in before if name not in after),
        reshaped=reshaped,
        elements=sum(after[name].numel for name in (*added, *reshaped)),
    )


def fits(old: Model, new: Model) -> bool:
    """Whether a checkpoint of one model loads in the other."""
    before, after = old.tensors(), new.tensors()
    return before.keys() == after.keys() and all(_stored(before, name) == _stored(after, name) for name in before)


def _stored(table: Tensors, name: str) -> tuple[object, ...]:
    """What a checkpoint must agree with; how many experts a token uses is not stored."""
    tensor = table[name]
    return tensor.shape, tensor.kind, tensor.dtype
