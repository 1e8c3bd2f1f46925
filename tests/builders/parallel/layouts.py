"""A small model with all of V3's mechanisms, and the layouts that it is held against one process in."""

from pathlib import Path

from modelspec.schema import ModelSpec
from modelspec.validate import load

SPECS = Path(__file__).parents[3] / "specs"
BATCH, LENGTH = 8, 32
SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.layers=[{repeat: 1, attention: mla, ffn: dense}, {repeat: 7, attention: mla, ffn: moe}]",
    "model.ffn.moe.intermediate_size=48",
    "data.tokenizer.vocab_size=512",
    f"training.stages.0.batch_size={BATCH}",
    f"training.stages.0.sequence_length={LENGTH}",
)
# Fewer experts than ranks that divide them.
FEW = (
    "model.ffn.moe.num_experts=2",
    "model.ffn.moe.num_experts_per_tok=1",
    "model.ffn.moe.router.selection.groups=null",
)
# Neither experts nor their rows come out even on four ranks.
UNEVEN = (
    "model.ffn.moe.num_experts=6",
    "model.ffn.moe.intermediate_size=47",
    "model.ffn.moe.router.selection.groups=null",
)
# Fewer heads of keys and values than ranks that cut them.
KEYS = (
    "model.attention=null",
    "model.attention={mla: {type: gqa, num_heads: 8, num_kv_heads: 2, head_dim: 16, bias: [q, v, o], rope: none}}",
)
FLOAT64 = tuple(
    f"precision.{key}=float64" for key in ("compute", "master_weights", "gradients", "optimizer_states", "router")
)


def small(*overrides: str) -> ModelSpec:
    """The small model with a layout, and whatever else is overridden."""
    return load(SPECS / "deepseek-v3-nano.yaml", [*SMALL, *overrides])


def layout(world: int, **degrees: str | int) -> tuple[str, ...]:
    """A layout as overrides: `pipeline` is a schedule, of `stages` ranks; the others are keys of `parallelism`."""
    keys = {"zero": "data.zero", "replicate": "data.replicate", "microbatch": "microbatch_size"}
    given = [f"parallelism.world_size={world}"]
    if "pipeline" in degrees:
        size = degrees.get("stages", world)
        given.append(f"parallelism.pipeline={{size: {size}, schedule: {degrees['pipeline']}}}")
    given += [f"parallelism.{keys.get(k, k)}={v}" for k, v in degrees.items() if k not in ("pipeline", "stages")]
    return tuple(given)


# Four ranks, one axis each time, and axes together.
FOUR = {
    "data": layout(4),
    "data, 2 microbatches": layout(4, microbatch=1),
    "zero 1": layout(4, zero=1),
    "zero 1, 2 replicas": layout(4, zero=1, replicate=2, microbatch=1),
    "zero 2": layout(4, zero=2, microbatch=1),
    "zero 3": layout(4, zero=3, microbatch=1),
    "zero 3, 2 replicas": layout(4, zero=3, replicate=2),
    "gpipe": layout(4, pipeline="gpipe"),
    "1f1b": layout(4, pipeline="1f1b"),
    "1f1b, fewer microbatches than stages": layout(4, pipeline="1f1b", microbatch=4),
    "interleaved 1f1b": layout(4, pipeline="interleaved_1f1b"),
    "interleaved zero bubble": layout(4, pipeline="interleaved_zero_bubble"),
    "zbv": layout(4, pipeline="zbv"),
    "dualpipev": layout(4, pipeline="dualpipev"),
    "pipeline and zero 1": layout(4, pipeline="zbv", stages=2, zero=1),
    "pipeline and zero 3": layout(4, pipeline="1f1b", stages=2, zero=3),
    "zbv and zero 3": layout(4, pipeline="zbv", stages=2, zero=3),
    "interleaved zero bubble and zero 2": layout(4, pipeline="interleaved_zero_bubble", stages=2, zero=2),
    "dualpipev, expert and zero 3": layout(4, pipeline="dualpipev", stages=2, expert=2, zero=3, microbatch=1),
    "expert": layout(4, expert=4),
    "expert and zero 1": layout(4, expert=2, zero=1, microbatch=1),
    "expert and zero 3": layout(4, expert=2, zero=3, microbatch=1),
    "pipeline and zero 3, experts on one rank each": layout(4, pipeline="1f1b", stages=2, expert=2, zero=3),
    "zero 2, experts on one rank each": layout(4, expert=4, zero=2, microbatch=1),
    "zero 3, more ranks than experts": (*layout(4, expert=2, zero=3), *FEW),
    "zero 3, experts and their rows uneven": (*layout(4, zero=3), *UNEVEN),
    "expert by node": layout(4, expert=4, gpus_per_node=2),
    "pipeline and expert": layout(4, pipeline="1f1b", stages=2, expert=2),
    "dualpipev and expert": layout(4, pipeline="dualpipev", stages=2, expert=2, microbatch=1),
    "tensor": layout(4, tensor=4),
    "tensor, more ranks than heads of keys": (*layout(4, tensor=4, zero=1), *KEYS),
    "tensor and expert": layout(4, tensor=2, expert=4, microbatch=2),
    "tensor and zero 3": layout(4, tensor=2, zero=3),
    "context": layout(4, context=4),
    "context and expert": layout(4, context=2, expert=4),
    "context and tensor": layout(4, context=2, tensor=2),
    "pipeline and context": layout(4, pipeline="zbv", stages=2, context=2, microbatch=2),
    "dualpipev and expert, computed again": (
        *layout(4, pipeline="dualpipev", stages=2, expert=2, microbatch=1),
        "parallelism.recompute=[norm, mla_up_projection, swiglu]",
    ),
    "context and expert, layers computed again": (
        *layout(4, context=2, expert=4, zero=1),
        "parallelism.recompute=[layer]",
    ),
    "pipeline and context, computed again": (
        *layout(4, pipeline="dualpipev", stages=2, context=2, microbatch=2),
        "parallelism.recompute=[norm, mla_up_projection, swiglu]",
    ),
    "tensor and zero 3, computed again": (
        *layout(4, tensor=2, zero=3, microbatch=2),
        "parallelism.recompute=[norm, mla_up_projection, swiglu]",
    ),
    "pipeline and tensor": layout(4, pipeline="1f1b", stages=2, tensor=2, zero=1),
}
EIGHT = {
    "four axes": layout(8, pipeline="1f1b", stages=2, tensor=2, expert=4, zero=1, microbatch=1),
}
