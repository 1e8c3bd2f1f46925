"""Relations of the layout: degrees that divide each other, the model and the batches.

Each stage of training has its own layout. A finding of a stage stands at the key where the stage states it, else at
the key under `parallelism`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from modelspec import layout
from modelspec.checks.finding import Finding, Path, divisors, legal
from modelspec.schema import BatchConstant, BatchRamp, GatedDeltaNet, ModelSpec, MoE, Parallelism, Stage

Findings = Iterator[Finding]


@dataclass(frozen=True, slots=True)
class Layout:
    """The parallelism of one stage and where its keys are written."""

    parallelism: Parallelism
    index: int | None = None
    stage: Stage | None = None

    def path(self, *keys: str) -> Path:
        """The key in the stage if it is stated there, else under the spec's parallelism."""
        stated: object = self.stage.parallelism if self.stage else None
        for key in keys:
            stated = getattr(stated, key, None)
        if self.index is None or stated is None:
            return ("parallelism", *keys)
        return ("training", "stages", self.index, "parallelism", *keys)

    @property
    def model_ranks(self) -> int:
        return self.parallelism.pipeline.size * self.parallelism.tensor * self.parallelism.context

    @property
    def divides_world(self) -> bool:
        return self.parallelism.world_size % self.model_ranks == 0


def layouts(spec: ModelSpec) -> Iterator[Layout]:
    """The spec's own layout, then one for each stage that changes something."""
    yield Layout(spec.parallelism)
    for index, stage in enumerate(spec.training.stages if spec.training else ()):
        if stage.parallelism is not None:
            yield Layout(stage.parallelism.applied_to(spec.parallelism), index, stage)


def degrees_divide_world(spec: ModelSpec) -> Findings:
    """Pipeline x tensor x context divides the world; the quotient is the data axis."""
    for at in layouts(spec):
        if at.divides_world:
            continue
        p = at.parallelism
        degrees = {"pipeline": p.pipeline.size, "tensor": p.tensor, "context": p.context}
        # The degree to change: one that does not divide the world by itself, else the largest.
        key = max(degrees, key=lambda name: (p.world_size % degrees[name] != 0, degrees[name]))
        others = at.model_ranks // degrees[key]
        yield Finding(
            at.path("pipeline", "size") if key == "pipeline" else at.path(key),
            f"pipeline {p.pipeline.size} x tensor {p.tensor} x context {p.context} = {at.model_ranks} ranks "
            f"do not divide a world of {p.world_size}",
            legal([d for d in divisors(p.world_size) if p.world_size % (d * others) == 0], degrees[key]),
            ((("parallelism", "world_size"), f"world of {p.world_size}"),),
        )


def replicas_divide_data(spec: ModelSpec) -> Findings:
    """Replicas divide the data axis."""
    for at in layouts(spec):
        data, replicate = layout.mesh(at.parallelism).data, at.parallelism.data.replicate
        if at.divides_world and data % replicate:
            yield Finding(
                at.path("data", "replicate"),
                f"{replicate} replicas do not divide a data axis of {data}",
                legal(divisors(data), replicate),
                ((("parallelism", "world_size"), f"data axis = {at.parallelism.world_size} / {at.model_ranks}"),),
            )


def experts_divide_ranks(spec: ModelSpec) -> Findings:
    """Expert parallelism borrows ranks from data x context x tensor, so it divides their product."""
    for at in layouts(spec):
        mesh = layout.mesh(at.parallelism)
        ranks = mesh.data * mesh.context * mesh.tensor
        if at.divides_world and ranks % mesh.expert:
            yield Finding(
                at.path("expert"),
                f"{mesh.expert} expert ranks do not divide data {mesh.data} x context {mesh.context} x "
                f"tensor {mesh.tensor} = {ranks}",
                legal(divisors(ranks), mesh.expert),
                ((("parallelism", "world_size"), f"world of {at.parallelism.world_size}"),),
            )


def experts_divide_evenly(spec: ModelSpec) -> Findings:
    """Each expert rank holds as many experts as the others."""
    for at in layouts(spec):
        ranks = at.parallelism.expert
        for name, ffn in spec.model.ffn.items():
            if isinstance(ffn, MoE) and ffn.num_experts % ranks:
                yield Finding(
                    at.path("expert"),
                    f"{ranks} expert ranks do not divide {ffn.num_experts} experts",
                    legal(divisors(ffn.num_experts), ranks),
                    ((("model", "ffn", name, "num_experts"), f"{ffn.num_experts} experts"),),
                )


def experts_are_there(spec: ModelSpec) -> Findings:
    """Expert parallelism needs experts."""
    if any(isinstance(ffn, MoE) for ffn in spec.model.ffn.values()):
        return
    for at in layouts(spec):
        if at.parallelism.expert > 1:
            yield Finding(at.path("expert"), "no feed-forward variant has experts", "legal values: 1")


def groups_stand_on_nodes(spec: ModelSpec) -> Findings:
    """Group-limited routing saves traffic between nodes only if each group stands on one node."""
    p = spec.parallelism
    nodes = p.expert // p.gpus_per_node
    for name, ffn in spec.model.ffn.items():
        groups = ffn.router.selection.groups if isinstance(ffn, MoE) else None
        if groups is not None and nodes > 1 and groups.num != nodes:
            yield Finding(
                ("model", "ffn", name, "router", "selection", "groups", "num"),
                f"{groups.num} groups of experts over {nodes} nodes: a token's traffic is not limited as groups intend",
                f"{nodes} groups put each on one node",
                ((("parallelism", "expert"), f"{p.expert} expert ranks / {p.gpus_per_node} per node"),),
                severity="warning",
            )


def nodes_are_filled(spec: ModelSpec) -> Findings:
    """Ranks on several nodes fill each of them."""
    world, node = spec.parallelism.world_size, spec.parallelism.gpus_per_node
    if world > node and world % node:
        below, above, fitting = layout.filling(world, node)
        yield Finding(
            ("parallelism", "world_size"),
            f"{world:,} ranks leave a node of {node:,} partly empty: `launch` makes no job of them",
            f"nearest legal values: {below}, {above}; or set parallelism.gpus_per_node={fitting}",
            ((("parallelism", "gpus_per_node"), f"{node} per node"),),
            severity="warning",
        )


def tensor_ranks_share_a_node(spec: ModelSpec) -> Findings:
    """Tensor ranks exchange in every half of a layer, which pays only inside a node."""
    for at in layouts(spec):
        ranks, node = at.parallelism.tensor, at.parallelism.gpus_per_node
        if ranks > 1 and at.parallelism.world_size > node and node % ranks:
            yield Finding(
                at.path("tensor"),
                f"groups of {ranks} tensor ranks span nodes of {node}: every layer's exchange goes over the network",
                f"values that stay inside a node: {', '.join(map(str, divisors(node)))}",
                ((("parallelism", "gpus_per_node"), f"{node} per node"),),
                severity="warning",
            )


def heads_divide_evenly(spec: ModelSpec) -> Findings:
    """Each tensor rank computes as many heads as the others."""
    for at in layouts(spec):
        for name, attention in spec.model.attention.items():
            match attention:
                case GatedDeltaNet(num_qk_heads=heads):
                    key = "num_qk_heads"
                case _:
                    key, heads = "num_heads", attention.num_heads
            if heads % at.parallelism.tensor:
                yield Finding(
                    at.path("tensor"),
                    f"{at.parallelism.tensor} tensor ranks do not divide {heads} heads",
                    legal(divisors(heads), at.parallelism.tensor),
                    ((("model", "attention", name, key), f"{heads} heads"),),
                )


def stages_have_layers(spec: ModelSpec) -> Findings:
    """No pipeline stage is empty."""
    layers = spec.model.num_layers
    for at in layouts(spec):
        pipeline = at.parallelism.pipeline
        each = layout.stages_per_rank(pipeline)
        if pipeline.size > 1 and pipeline.size * each > layers:
            yield Finding(
                at.path("pipeline", "size"),
                f"{pipeline.size} ranks x {each} stages of {pipeline.schedule} = {pipeline.size * each} stages, "
                f"but the model has {layers} layers",
                legal(range(1, layers // each + 1), pipeline.size),
                ((("model", "layers"), f"{layers} layers"),),
            )


def stages_per_rank_fit_schedule(spec: ModelSpec) -> Findings:
    """Only interleaved schedules leave the number of stages on a rank open."""
    for at in layouts(spec):
        pipeline = at.parallelism.pipeline
        if pipeline.stages_per_rank is None or pipeline.schedule.startswith("interleaved"):
            continue
        fixed = layout.stages_per_rank(pipeline)
        if pipeline.stages_per_rank != fixed:
            yield Finding(
                at.path("pipeline", "stages_per_rank"),
                f"{pipeline.schedule} puts {fixed} on each rank, not {pipeline.stages_per_rank}",
                "leave stages_per_rank out, or use an interleaved schedule",
                ((at.path("pipeline", "schedule"), f"schedule {pipeline.schedule}"),),
            )


def sequences_divide(spec: ModelSpec) -> Findings:
    """Context ranks take two equal slices of a sequence each, tensor ranks one equal slice of that."""
    for index, stage in enumerate(spec.training.stages if spec.training else ()):
        at = _stage_layout(spec, index, stage)
        p = at.parallelism
        slices = (2 * p.context if p.context > 1 else 1) * p.tensor
        if stage.sequence_length % slices:
            below = stage.sequence_length // slices * slices
            key = "context" if p.context > 1 else "tensor"
            yield Finding(
                ("training", "stages", index, "sequence_length"),
                f"a sequence of {stage.sequence_length} is not cut evenly into {slices} slices "
                f"(context {p.context}, tensor {p.tensor})",
                legal([value for value in (below, below + slices) if value], stage.sequence_length),
                ((at.path(key), f"{key} {getattr(p, key)}"),),
            )


def batches_divide(spec: ModelSpec) -> Findings:
    """Data axis x microbatch size divides every batch size, and every step of its ramp."""
    for index, stage in enumerate(spec.training.stages if spec.training else ()):
        at = _stage_layout(spec, index, stage)
        if not at.divides_world:
            continue
        data, microbatch = layout.mesh(at.parallelism).data, layout.microbatch_size(at.parallelism, 1)
        unit = data * microbatch
        for path, size in _batch_sizes(index, stage):
            if size % unit:
                below = size // unit * unit
                yield Finding(
                    path,
                    f"{size} sequences are not whole microbatches for every rank: "
                    f"data axis {data} x microbatch {microbatch} = {unit}",
                    legal([value for value in (below, below + unit) if value], size),
                    (
                        (("parallelism", "world_size"), f"world of {at.parallelism.world_size}"),
                        (at.path("microbatch_size"), f"microbatches of {microbatch}"),
                    ),
                )


def microbatches_fill_pipeline(spec: ModelSpec) -> Findings:
    """A pipeline's schedule has the microbatches that it needs; while a batch ramps up, ZBV stands in for DualPipeV."""
    for index, stage in enumerate(spec.training.stages if spec.training else ()):
        at = _stage_layout(spec, index, stage)
        p = at.parallelism
        if not at.divides_world or p.pipeline.size == 1:
            continue
        needed = layout.microbatches_needed(p)
        for path, size, ramps in _phases(index, stage):
            count = layout.microbatches(p, size)
            rounds = max(1, count // p.pipeline.size)
            if count < needed:
                yield Finding(
                    path,
                    f"a batch of {size} is {count} microbatches for each rank, and {p.pipeline.schedule} over "
                    f"{layout.mesh(p).stages} stages needs {needed}" + (": the ramp begins with zbv" if ramps else ""),
                    f"at least {needed * size // count if count else needed} sequences, or another schedule",
                    ((at.path("pipeline", "size"), f"{layout.mesh(p).stages} stages"),),
                    severity="info" if ramps else "error",
                )
            elif p.pipeline.schedule.startswith("interleaved") and count % rounds:
                yield Finding(
                    path,
                    f"{count} microbatches are not cut into {rounds} equal rounds of {p.pipeline.schedule}",
                    legal(
                        [size // count * c for c in range(1, 2 * count) if c % max(1, c // p.pipeline.size) == 0], size
                    ),
                    ((at.path("pipeline", "size"), f"{p.pipeline.size} pipeline ranks"),),
                )


def _stage_layout(spec: ModelSpec, index: int, stage: Stage) -> Layout:
    over = stage.parallelism
    return Layout(over.applied_to(spec.parallelism) if over else spec.parallelism, index, stage)


def _batch_sizes(index: int, stage: Stage) -> Iterator[tuple[Path, int]]:
    """Every number that a batch size is a multiple of, with its path."""
    path: Path = ("training", "stages", index, "batch_size")
    if isinstance(stage.batch_size, int):
        yield path, stage.batch_size
        return
    for number, phase in enumerate(stage.batch_size):
        if isinstance(phase, BatchRamp):
            yield (*path, number, "multiple_of"), phase.multiple_of
        else:
            yield (*path, number, "value"), phase.value


def _phases(index: int, stage: Stage) -> Iterator[tuple[Path, int, bool]]:
    """The smallest batch of each phase, with its path and whether the phase ramps."""
    path: Path = ("training", "stages", index, "batch_size")
    if isinstance(stage.batch_size, int):
        yield path, stage.batch_size, False
        return
    for number, phase in enumerate(stage.batch_size):
        if isinstance(phase, BatchConstant):
            yield (*path, number, "value"), phase.value, False
        else:
            yield (*path, number, "ramp"), min(phase.ramp) // phase.multiple_of * phase.multiple_of, True
