"""A model as what it is counted by: layers that are alike are counted once and multiplied, however many they are.

Everything in a plan is a sum over these runs, so that its cost does not depend on the depth of the model.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from modelspec.schema import LayerPattern, LayerRun, Model, TensorSpec


class Counted(NamedTuple):
    """A tensor of one layer of a run, or of none, and how often the model has it."""

    name: str
    tensor: TensorSpec
    times: int


def runs(model: Model) -> tuple[LayerRun, ...]:
    """The main model's layers as the spec has them, in order: a run of a pattern stands once, with all its layers."""

    def of(entry: LayerRun | LayerPattern) -> tuple[LayerRun, ...]:
        if isinstance(entry, LayerRun):
            return (entry,)
        return tuple(run.model_copy(update={"repeat": entry.repeat * run.repeat}) for run in entry.pattern)

    return tuple(chain.from_iterable(map(of, model.layers)))


def main_tensors(model: Model) -> Iterator[Counted]:
    """The table of the main model, `layers.N` standing for all layers of run N."""
    each = runs(model)
    once = model.model_copy(update={"layers": tuple(run.model_copy(update={"repeat": 1}) for run in each)})
    for name, tensor in once.main_tensors().items():
        group, _, rest = name.partition(".")
        yield Counted(name, tensor, each[int(rest.partition(".")[0])].repeat if group == "layers" else 1)


def mtp_tensors(model: Model) -> Iterator[Counted]:
    """The table of multi-token prediction, `mtp.0` standing for all of its modules."""
    if model.mtp is None:
        return
    one = model.model_copy(update={"mtp": model.mtp.model_copy(update={"depth": 1})})
    for name, tensor in one.mtp_tensors().items():
        yield Counted(name, tensor, model.mtp.depth)
