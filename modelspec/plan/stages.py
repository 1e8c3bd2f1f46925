"""Which layers stand on which pipeline stage, as runs: a stage of a deep model costs no more than one of a flat one."""

from collections.abc import Iterator, Mapping

from modelspec.layout import layers_of_stages, mesh, stages_of, tensor_cut
from modelspec.schema import Attention, LayerPattern, LayerRun, Model, ModelSpec, TensorSpec
from modelspec.schema.base import under


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


def rank_parameters(spec: ModelSpec) -> tuple[tuple[float, float], ...]:
    """Parameters of each pipeline rank before the data axis cuts them: all but experts, and experts."""
    axes, model = mesh(spec.parallelism), spec.model
    stages = [_parameters(spec, stage) for stage in runs_of_stages(model, axes.stages)]
    edge = model.vocab_size * model.hidden_size / axes.tensor
    stages[0] = (stages[0][0] + edge, stages[0][1])
    last_dense = edge if len(stages) > 1 or not model.tie_embeddings else 0.0
    norm, _ = _split(spec, under("norm", model.norm.tensors(model.hidden_size)))
    mtp_dense, mtp_experts = _split(spec, model.mtp_tensors(), model.attention[model.mtp_layer().attention])
    stages[-1] = (stages[-1][0] + last_dense + norm + mtp_dense, stages[-1][1] + mtp_experts)
    held = stages_of(spec.parallelism.pipeline.schedule, axes.pipeline, axes.stages_per_rank)
    return tuple((sum(stages[stage][0] for stage in rank), sum(stages[stage][1] for stage in rank)) for rank in held)


def _parameters(spec: ModelSpec, stage: tuple[LayerRun, ...]) -> tuple[float, float]:
    dense = experts = 0.0
    for run in stage:
        each = _split(spec, spec.model.block_tensors(run), spec.model.attention[run.attention])
        dense, experts = dense + run.repeat * each[0], experts + run.repeat * each[1]
    return dense, experts


def _split(spec: ModelSpec, table: Mapping[str, TensorSpec], attention: Attention | None = None) -> tuple[float, float]:
    """Parameters of a table on one rank: all but experts, which the expert axis cuts, and these."""
    ranks, dense, experts = spec.parallelism.tensor, 0.0, 0.0
    for name, each in table.items():
        if each.experts_per_token is not None:
            experts += each.numel / spec.parallelism.expert
        elif each.kind == "parameter":
            dense += each.numel / (1 if tensor_cut(name, ranks, attention) is None else ranks)
    return dense, experts
