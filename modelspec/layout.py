"""Where the parts of a model stand: axes of the device mesh, cuts, pipeline stages, microbatches.

Pure arithmetic over the spec, and the only place that does it: checks, plan and the distributed builder read it here.
Ranks are laid out (pipeline, data, context, tensor) with tensor fastest; experts borrow the last three.
"""

from dataclasses import dataclass

from modelspec import schema
from modelspec.schema.parallelism import PipelineSchedule


@dataclass(frozen=True, slots=True)
class Mesh:
    """Lengths of the axes of the device mesh; `expert_data` ranks hold copies of the same experts."""

    pipeline: int
    data: int
    context: int
    tensor: int
    expert: int
    expert_data: int
    stages_per_rank: int

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pipeline * self.stages_per_rank


def stages_per_rank(pipeline: schema.Pipeline) -> int:
    """Stages that one rank holds under the schedule."""
    match pipeline.schedule:
        case "gpipe" | "1f1b":
            return 1
        case "interleaved_1f1b" | "interleaved_zero_bubble":
            return pipeline.stages_per_rank or 2
        case "zbv" | "dualpipev":
            return 2


def mesh(parallelism: schema.Parallelism) -> Mesh:
    """The mesh of a layout whose degrees divide each other: checked by validate."""
    model_axes = parallelism.pipeline.size * parallelism.tensor * parallelism.context
    data = parallelism.world_size // model_axes
    return Mesh(
        pipeline=parallelism.pipeline.size,
        data=data,
        context=parallelism.context,
        tensor=parallelism.tensor,
        expert=parallelism.expert,
        expert_data=data * parallelism.context * parallelism.tensor // parallelism.expert,
        stages_per_rank=stages_per_rank(parallelism.pipeline) if parallelism.pipeline.size > 1 else 1,
    )


def splits_backward(pipeline: schema.Pipeline) -> bool:
    """Whether gradients of inputs and of weights are computed apart."""
    return pipeline.size > 1 and pipeline.schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")


def stages_of(schedule: PipelineSchedule, ranks: int, stages_per_rank: int) -> tuple[tuple[int, ...], ...]:
    """The stages that each pipeline rank holds, first stage 0, in the order of its forward pass.

    Stages go round the ranks again and again; under zbv and dualpipev they go down the ranks and back up, a V, so that
    the first rank holds the first and the last stage.
    """
    if schedule in ("zbv", "dualpipev") and stages_per_rank == 2:
        return tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    return tuple(tuple(range(rank, ranks * stages_per_rank, ranks)) for rank in range(ranks))


def layers_of_stages(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers on each stage: as even as can be, the surplus on the earliest ones.

    The last stage never has a surplus layer: it holds the norm, the head and multi-token prediction besides.
    """
    each, surplus = divmod(num_layers, stages)
    return tuple(each + (stage < surplus) for stage in range(stages))


def microbatch_size(parallelism: schema.Parallelism, batch_size: int) -> int:
    """Sequences per forward pass of one rank."""
    if parallelism.microbatch_size is not None:
        return parallelism.microbatch_size
    return 1 if parallelism.pipeline.size > 1 else max(batch_size // mesh(parallelism).data, 1)


def microbatches(parallelism: schema.Parallelism, batch_size: int) -> int:
    """Forward passes of one rank per optimizer step."""
    return batch_size // (mesh(parallelism).data * microbatch_size(parallelism, batch_size))


def microbatches_needed(parallelism: schema.Parallelism) -> int:
    """The fewest microbatches with which the pipeline's schedule works."""
    if parallelism.pipeline.size > 1 and parallelism.pipeline.schedule == "dualpipev":
        return mesh(parallelism).stages
    return 1


def filling(world: int, node: int) -> tuple[int, int, int]:
    """For a world that leaves a node of so many devices partly empty: the nearest worlds below and above that fill
    whole nodes, and the largest node that this world fills.
    """
    fitting = max(size for size in range(1, node + 1) if world % size == 0)
    return world // node * node, -(-world // node) * node, fitting


# Parts of a name that say: it stands whole on every tensor rank.
_WHOLE = ("norm.", ".router.", ".shared_gate.", ".experts.", "q_a_proj.", "kv_a_proj.", ".indexer.")
# The projections of keys and values.
_KEYS = (".k_proj.", ".v_proj.")


def tensor_cut(name: str, ranks: int, attention: schema.Attention | None = None) -> int | None:
    """The dim along which so many tensor ranks cut a parameter; None where it stands whole on each of them.

    `name` is that in the model or in a block of it, `attention` the variant that it belongs to, if to any. Heads of
    keys and values stand whole where they are fewer than ranks.
    """
    if any(part in name for part in _WHOLE) or name.endswith(("o_proj.bias", "down_proj.bias")):
        return None
    if name.startswith("mtp.") and name.endswith(".proj.weight"):
        return None
    few = isinstance(attention, schema.GQA) and attention.num_kv_heads < ranks
    if few and any(part in name for part in _KEYS):
        return None
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


def attention_of(name: str, model: schema.Model) -> schema.Attention | None:
    """The variant of the attention that a module or a parameter of the model is, or is in."""
    parts = name.split(".")
    if "attention" not in parts:
        return None
    run = model.mtp_layer() if parts[0] == "mtp" else list(model.expanded_layers())[int(parts[1])]
    return model.attention[run.attention]
