"""What a user can turn to make a training step smaller: changes of layout and number formats, each as texts for --set.

Only what validate accepts is proposed: every change is checked as a spec is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from modelspec import layout
from modelspec.checks import check
from modelspec.plan.flops import flops
from modelspec.schema import FP8, MLA, ModelSpec, MoE
from modelspec.schema.base import Strict
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import Recompute

_RECOMPUTE_COST = {
    "norm": "a little: norms are computed twice, which reads memory and multiplies nothing",
    "swiglu": "a little: gated activations are computed twice, which reads memory and multiplies nothing",
    "mla_up_projection": "queries, keys and values are projected twice",
    "layer": "every layer's forward pass runs twice",
}
_ZERO_COST = {
    1: "none on one node: weights are gathered once a step, as gradients were summed",
    2: "gradients are reduced in every microbatch, not once a step",
    3: "weights are gathered in every forward and backward pass",
}
_DEGREE_COST = {
    "expert": "rows travel between more ranks",
    "pipeline.size": "a longer bubble, and fewer ranks along the data axis",
    "context": "keys and values travel between ranks in every layer, and fewer ranks along the data axis",
    "tensor": "four collectives in every layer, and fewer ranks along the data axis",
}
# The blocks of arXiv 2412.19437, as a flow value and as data.
_FP8 = FP8(
    format="e4m3",
    activation_block=(1, 128),
    weight_block=(128, 128),
    scales="float32",
    gemms=("forward", "dgrad", "wgrad"),
)
_FP8_TEXT = (
    "{format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32, "
    "gemms: [forward, dgrad, wgrad]}"
)


@dataclass(frozen=True, slots=True)
class Change:
    """A spec with another layout or format; `flops` is the share by which a step computes more."""

    set: tuple[str, ...]
    spec: ModelSpec
    flops: float
    cost: str


def changes(spec: ModelSpec, hardware: Hardware, sequence_length: int, batch_size: int) -> Iterator[Change]:
    """Every single change that validate accepts, for steps of `batch_size` sequences of `sequence_length` tokens."""
    before = float(flops(spec, sequence_length).training_with_recompute)
    for change in (*_recompute(spec), *_sharding(spec), *_degrees(spec, batch_size), *_formats(spec, hardware)):
        if any(finding.severity == "error" for finding in check(change.spec)):
            continue
        after = float(flops(change.spec, sequence_length).training_with_recompute)
        yield Change(change.set, change.spec, max(after / before - 1, 0.0), change.cost)


def _recompute(spec: ModelSpec) -> Iterator[Change]:
    now = spec.parallelism.recompute
    if "layer" in now:
        return
    has_latents = any(isinstance(variant, MLA) for variant in spec.model.attention.values())
    for item in get_args(Recompute):
        if item in now or (item == "mla_up_projection" and not has_latents):
            continue
        then = ("layer",) if item == "layer" else tuple(each for each in get_args(Recompute) if each in (*now, item))
        text = f"parallelism.recompute=[{', '.join(then)}]"
        yield Change((text,), _with(spec, "parallelism.recompute", then), 0.0, _RECOMPUTE_COST[item])


def _sharding(spec: ModelSpec) -> Iterator[Change]:
    """ZeRO on the ranks that there are; on a node, where there is one process."""
    for zero in range(spec.parallelism.data.zero + 1, 4):
        yield _changed(spec, {"parallelism.data.zero": zero}, _ZERO_COST[zero])
    if spec.parallelism.world_size == 1:
        node = spec.parallelism.gpus_per_node
        yield _changed(
            spec, {"parallelism.world_size": node, "parallelism.data.zero": 3}, f"{node} devices; {_ZERO_COST[3]}"
        )


def _degrees(spec: ModelSpec, batch_size: int) -> Iterator[Change]:
    parallelism = spec.parallelism
    for key, cost in _DEGREE_COST.items():
        if key == "expert" and not any(isinstance(ffn, MoE) for ffn in spec.model.ffn.values()):
            continue
        now = parallelism.pipeline.size if key == "pipeline.size" else getattr(parallelism, key)
        yield _changed(spec, {f"parallelism.{key}": 2 * now}, cost)
    size = layout.microbatch_size(parallelism, batch_size)
    if size > 1:
        yield _changed(spec, {"parallelism.microbatch_size": size // 2}, "smaller products, which run at a lower rate")


def _formats(spec: ModelSpec, hardware: Hardware) -> Iterator[Change]:
    precision = spec.precision
    if precision.optimizer_states != "bfloat16":
        yield _changed(spec, {"precision.optimizer_states": "bfloat16"}, "no time; moments are rounded to 8 bits")
    if precision.compute != "bfloat16":
        yield _changed(spec, {"precision.compute": "bfloat16"}, "none: products run faster, and are rounded to 8 bits")
    elif precision.fp8 is None and hardware.peak_flops.fp8 is not None:
        cost = "none: products run faster, and are rounded to 4 bits"
        yield Change((f"precision.fp8={_FP8_TEXT}",), _with(spec, "precision.fp8", _FP8), 0.0, cost)
    elif precision.fp8 is not None:
        for key, value in (("attention_output", "e5m6"), ("swiglu_input", "e4m3")):
            if getattr(precision.fp8, key) is None:
                yield _changed(spec, {f"precision.fp8.{key}": value}, "one more conversion in every layer")


def _changed(spec: ModelSpec, values: dict[str, Any], cost: str) -> Change:
    changed = spec
    for path, value in values.items():
        changed = _with(changed, path, value)
    return Change(tuple(f"{path}={value}" for path, value in values.items()), changed, 0.0, cost)


def _with(spec: ModelSpec, path: str, value: object) -> ModelSpec:
    """The spec with another value at a path."""

    def within(node: Strict, keys: list[str]) -> Strict:
        key, *rest = keys
        return node.model_copy(update={key: within(getattr(node, key), rest) if rest else value})

    changed = within(spec, path.split("."))
    assert isinstance(changed, ModelSpec)
    return changed
