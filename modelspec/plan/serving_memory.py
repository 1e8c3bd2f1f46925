"""What serving a model holds in memory, and how many devices that takes.

A device has its share of the experts, its part of all else, and a cache for each of its sequences. Everything is exact
but the margin, which is left to activations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from modelspec.plan.cache import layer_cache
from modelspec.plan.roofline import cache_shares
from modelspec.plan.runs import main_tensors, mtp_tensors, runs
from modelspec.plan.serving_machine import Layout, Precision
from modelspec.plan.storage import bf16_bytes, fp8_bytes
from modelspec.schema import LayerRun, ModelSpec
from modelspec.schema.hardware import Hardware

# Share of a device's memory for activations, buffers of exchanges, and what the allocator wastes.
MARGIN = 0.1
# Over how many devices a matrix may be cut.
TENSOR_DEGREES = (1, 2, 4, 8, 16, 32, 64)
# More nodes than any installation has.
_MAX_NODES = 4096


@dataclass(frozen=True, slots=True)
class ServingMemory:
    """Bytes. Weights and the cache of one sequence are those of the fullest device; `usable` leaves the margin out."""

    device: int
    usable: int
    weights: int
    weights_of_all: int
    cache_per_sequence: int

    @property
    def sequences(self) -> int:
        """Sequences whose cache fits beside the weights; on each replica."""
        return max(self.usable - self.weights, 0) // self.cache_per_sequence


@dataclass(frozen=True, slots=True)
class Demand:
    """What there is to hold; bytes: experts by how many a layer has, all else, and a sequence by tensor degree."""

    experts: Mapping[int, int]
    rest: int
    sequence: Mapping[int, int]

    def on(self, hardware: Hardware, layout: Layout) -> ServingMemory:
        """The memory of the fullest device."""
        shares = sum(size * layout.slots(number) // number for number, size in self.experts.items())
        return ServingMemory(
            device=hardware.memory,
            usable=int(hardware.memory * (1 - MARGIN)),
            weights=-(-self.rest // layout.tensor) + shares,
            weights_of_all=sum(self.experts.values()) + self.rest,
            cache_per_sequence=self.sequence[layout.tensor],
        )


def demand(spec: ModelSpec, precision: Precision, context: int, *, drafts: bool) -> Demand:
    """Weights in a precision, and the BF16 cache of `context` tokens; `drafts` adds multi-token prediction."""
    model = spec.model
    size = fp8_bytes if precision == "fp8" else bf16_bytes
    experts: dict[int, int] = {}
    rest = 0
    for each in chain(main_tensors(model), mtp_tensors(model) if drafts else ()):
        if each.tensor.experts_per_token is None:
            rest += size(each)
        else:
            number = each.tensor.shape[0]
            experts[number] = experts.get(number, 0) + size(each)
    blocks = list(runs(model))
    if drafts and model.mtp is not None:
        blocks.append(model.mtp_layer().model_copy(update={"repeat": model.mtp.depth}))
    return Demand(experts, rest, {degree: _sequence(spec, blocks, context, degree) for degree in TENSOR_DEGREES})


def _sequence(spec: ModelSpec, blocks: list[LayerRun], context: int, tensor: int) -> int:
    precision = spec.precision.model_copy(update={"compute": "bfloat16"})
    spec, total = spec.model_copy(update={"precision": precision}), 0
    for run in blocks:
        variant = spec.model.attention[run.attention]
        layer = layer_cache(spec, variant)
        kept = layer.per_token * context + layer.per_sequence
        total += run.repeat * -(-kept // cache_shares(variant, tensor))
    return total


def layouts(gpus: int) -> Iterator[Layout]:
    """The ways to cut matrices over so many devices: by powers of two."""
    yield from (Layout(gpus, degree) for degree in TENSOR_DEGREES if gpus % degree == 0)


def fewest_gpus(needs: Demand, hardware: Hardware) -> int | None:
    """The fewest devices that hold weights and a sequence: a part of a node, or whole nodes."""
    node = hardware.gpus_per_node
    # With one expert on each device, and a matrix over as many as may be, more devices hold no more.
    most = min(-(-max([TENSOR_DEGREES[-1], *needs.experts]) // node) + 1, _MAX_NODES)
    for gpus in chain(_powers(node), (node * nodes for nodes in range(1, most + 1))):
        if any(needs.on(hardware, layout).sequences for layout in layouts(gpus)):
            return gpus
    return None


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2
