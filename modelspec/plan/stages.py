"""Which layers stand on which pipeline stage, as runs: a stage of a deep model costs no more than one of a flat one."""

from collections.abc import Iterator

from modelspec.layout import layers_of_stages
from modelspec.schema import LayerPattern, LayerRun, Model


def runs_of_stages(model: Model, stages: int) -> tuple[tuple[LayerRun, ...], ...]:
    """The layers of each stage: runs whose `repeat` is how many layers of theirs the stage has.

    A run of a pattern stands once in a stage, since what a plan sums over layers does not depend on their order.
    """
    start, found = 0, []
    for size in layers_of_stages(model.num_layers, stages):
        found.append(tuple(_between(model, start, start + size)))
        start += size
    return tuple(found)


def _between(model: Model, start: int, end: int) -> Iterator[LayerRun]:
    """Runs of the layers from `start` up to `end`."""
    before = 0
    for entry in model.layers:
        pattern = entry.pattern if isinstance(entry, LayerPattern) else (entry,)
        times = entry.repeat if isinstance(entry, LayerPattern) else 1
        period, offset = sum(run.repeat for run in pattern), 0
        low, high = (min(max(bound - before, 0), times * period) for bound in (start, end))
        for run in pattern:
            layers = _up_to(high, period, offset, run.repeat) - _up_to(low, period, offset, run.repeat)
            if layers:
                yield run.model_copy(update={"repeat": layers})
            offset += run.repeat
        before += times * period


def _up_to(end: int, period: int, offset: int, length: int) -> int:
    """Layers before `end` of a run that stands at `offset` in every period."""
    whole, rest = divmod(end, period)
    return whole * length + min(max(rest - offset, 0), length)
