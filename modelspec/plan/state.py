"""What a rank holds from step to step: weights, their FP8 copies, gradients, master weights, moments. Exact, in bytes.

The optimizer updates master weights. Where `precision.compute` is another format, products read copies in that format;
where it is the same, the weights are their own master. Under ZeRO the ranks of a shard group divide this state: 1 the
master weights and moments, 2 gradients too, 3 weights too, which then are gathered layer by layer. Under a pipeline
gradients stay whole until the end of a step, and weights from a backward pass to the next forward pass.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from modelspec.layout import mesh, tensor_cut
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import Attention, LayerRun, ModelSpec, Tensors, TensorSpec, in_fp8
from modelspec.schema.base import is_learnt, linear, under

# "shared" is what two stages of a rank read, which ZeRO 2 and 3 leave divided as ZeRO 1 does.
Shard = Literal["dense", "experts", "shared"]


class Held(NamedTuple):
    """A tensor that a rank holds: its elements there, how often it does, and over which ranks ZeRO divides it."""

    name: str
    tensor: TensorSpec
    elements: int
    times: int
    shard: Shard


@dataclass(frozen=True, slots=True)
class State:
    """Bytes by what they are for, and the elements of all parameters before ZeRO divides them."""

    parameters: int = 0
    weights: int = 0
    fp8_copies: int = 0
    gradients: int = 0
    master: int = 0
    optimizer: int = 0
    # Of the optimizer: how often it updated each tensor.
    counters: int = 0


def layer_held(spec: ModelSpec, run: LayerRun) -> Iterator[Held]:
    """The layers of a run on one rank."""
    model = spec.model
    yield from _held(spec, model.block_tensors(run), run.repeat, model.attention[run.attention])


def embedding_held(spec: ModelSpec) -> Iterator[Held]:
    """The embedding, cut by rows."""
    yield from _held(spec, under("embed_tokens", linear(spec.model.vocab_size, spec.model.hidden_size)))


def head_held(spec: ModelSpec) -> Iterator[Held]:
    """The final norm and the head, cut by rows; where it is tied, the embedding's weight comes on top."""
    model = spec.model
    yield from _held(spec, under("norm", model.norm.tensors(model.hidden_size)))
    if not model.tie_embeddings:
        yield from _held(spec, under("lm_head", linear(model.vocab_size, model.hidden_size)))


def mtp_held(spec: ModelSpec) -> Iterator[Held]:
    """Multi-token prediction without the embedding and the head that it shares."""
    model = spec.model
    if model.mtp is None:
        return
    one = model.model_copy(update={"mtp": model.mtp.model_copy(update={"depth": 1})})
    yield from _held(spec, one.mtp_tensors(), model.mtp.depth, model.attention[model.mtp_layer().attention])


def rank_held(spec: ModelSpec, runs: Iterable[LayerRun], *, first: bool, last: bool) -> Iterator[Held]:
    """Layers, and what stands beside the first and the last: an embedding that several parts read stands there once."""
    if (shard := embedding_shard(spec, first=first, last=last)) is not None:
        yield from (each._replace(shard=shard) for each in embedding_held(spec))
    for run in runs:
        yield from layer_held(spec, run)
    if last:
        yield from head_held(spec)
        yield from mtp_held(spec)


def embedding_shard(spec: ModelSpec, *, first: bool, last: bool) -> Shard | None:
    """How ZeRO divides the embedding of a rank with the first stage or the last or both; None where none stands."""
    reads_again = last and (spec.model.mtp is not None or spec.model.tie_embeddings)
    if first and reads_again and spec.parallelism.pipeline.size > 1:
        return "shared"
    return "dense" if first or reads_again else None


class Sums(NamedTuple):
    """Counts of tensors that ZeRO divides alike; `fp8` are bytes. Sums of several layers add up."""

    parameters: int = 0
    learned: int = 0
    buffers: int = 0
    copied: int = 0
    fp8: int = 0
    tensors: int = 0

    def plus(self, other: "Sums", times: int = 1) -> "Sums":
        """These and so many times the others."""
        return Sums(*(mine + times * its for mine, its in zip(self, other, strict=True)))


def state(spec: ModelSpec, held: Iterable[Held]) -> State:
    """The state of a rank that holds these tensors."""
    return divided(spec, sums(spec, held))


def sums(spec: ModelSpec, held: Iterable[Held]) -> dict[Shard, Sums]:
    """What a rank holds, counted: all of it that does not depend on how many ranks divide it."""
    found: dict[Shard, Sums] = {"dense": Sums(), "experts": Sums(), "shared": Sums()}
    for each in held:
        found[each.shard] = found[each.shard].plus(_counted(spec, each), each.times)
    return found


def divided(spec: ModelSpec, held: Mapping[Shard, Sums]) -> State:
    """The state of a rank that holds these tensors, under the spec's ZeRO."""
    precision = spec.precision
    compute, master = ITEM_BYTES[precision.compute], ITEM_BYTES[precision.master_weights]
    gradient, moment = ITEM_BYTES[precision.gradients], ITEM_BYTES[precision.optimizer_states]
    apart = precision.compute != precision.master_weights
    found = State()
    for group, shard in shards(spec).items():
        s = held[group]
        # One rank has nobody to divide with.
        zero = min(spec.parallelism.data.zero, 1 if group == "shared" else 3) if shard > 1 else 0
        # FSDP gathers beside its shares, and under a pipeline adds up whole gradients until the end of a step.
        kept = s.parameters if apart or zero >= 2 else 0
        scattered = zero >= 2 and spec.parallelism.pipeline.size == 1
        whole = zero < 3 or not gathers_by_layer(spec)
        # From ZeRO 2 on each rank has a part of every tensor.
        counters = _divided(s.tensors * ITEM_BYTES["float32"], shard if spec.parallelism.data.zero == 1 else 1)
        weights = (s.copied * compute if apart else s.parameters * master) if whole else 0
        found = State(
            parameters=found.parameters + s.parameters,
            weights=found.weights + weights + s.buffers * max(master, ITEM_BYTES["float32"]),
            fp8_copies=found.fp8_copies + (s.fp8 if whole else 0),
            gradients=found.gradients + _divided(s.learned * gradient, shard if scattered else 1),
            master=found.master + _divided(kept * master, shard if zero >= 1 else 1),
            optimizer=found.optimizer + _divided(2 * s.learned * moment, shard if zero >= 1 else 1) + counters,
            counters=found.counters + counters,
        )
    return found


def shards(spec: ModelSpec) -> dict[Shard, int]:
    """Ranks over which ZeRO divides the state of what all ranks of data and context hold, and that of experts."""
    at, replicas = mesh(spec.parallelism), spec.parallelism.data.replicate
    return {
        "dense": max(at.data // replicas, 1) * at.context,
        "experts": max(at.expert_data // replicas, 1),
        "shared": max(at.data // replicas, 1) * at.context,
    }


def gathers_by_layer(spec: ModelSpec) -> bool:
    """Whether weights are there in whole only while their layer computes."""
    return spec.parallelism.data.zero == 3 and spec.parallelism.pipeline.size == 1 and max(shards(spec).values()) > 1


def gathered(spec: ModelSpec, layers: Iterable[Iterable[Held]]) -> int:
    """Weights of the two largest layers, which are there in whole while they compute under ZeRO 3; bytes."""
    if not gathers_by_layer(spec):
        return 0
    item = ITEM_BYTES[spec.precision.compute]
    sizes = [sum(each.elements for each in layer) * item for layer in layers]
    return sum(sorted(sizes)[-2:])


def _counted(spec: ModelSpec, each: Held) -> Sums:
    """One tensor of those that are alike."""
    elements, precision = each.elements, spec.precision
    if each.tensor.kind == "buffer":
        return Sums(buffers=elements)
    learned = is_learnt(each.name)
    return Sums(
        parameters=elements,
        learned=elements if learned else 0,
        copied=elements if precision.compute != precision.master_weights and _is_copied(spec, each) else 0,
        fp8=_fp8(spec, each),
        tensors=int(learned),
    )


def _divided(amount: int, ranks: int) -> int:
    return -(-amount // ranks)


def _is_copied(spec: ModelSpec, each: Held) -> bool:
    """Whether there is a copy in `precision.compute`: of all that is read neither in FP8 alone nor as its master is."""
    fp8 = spec.precision.fp8
    if fp8 is not None and in_fp8(each.name) and {"forward", "dgrad"} <= set(fp8.gemms):
        return False
    if spec.parallelism.data.zero > 0:
        return True
    return "router.weight" not in each.name and (spec.model.tie_embeddings or not each.name.startswith("embed_tokens."))


def _fp8(spec: ModelSpec, each: Held) -> int:
    """Bytes of the FP8 copies of one tensor: one in each orientation that a product reads, with its scales."""
    fp8 = spec.precision.fp8
    if fp8 is None or not in_fp8(each.name):
        return 0
    *stacked, rows, columns = each.tensor.shape
    matrices = stacked[0] if stacked else 1
    blocks = matrices * -(-rows // fp8.weight_block[0]) * -(-columns // fp8.weight_block[1])
    scales = -(-blocks * each.elements // each.tensor.numel) * (1 if fp8.scales == "ue8m0" else 4)
    return len({"forward", "dgrad"} & set(fp8.gemms)) * (each.elements + scales)


def _held(spec: ModelSpec, table: Tensors, times: int = 1, attention: Attention | None = None) -> Iterator[Held]:
    at = mesh(spec.parallelism)
    for name, tensor in table.items():
        if ".experts." in f".{name}":
            yield Held(name, tensor, _divided(tensor.numel, at.expert), times, "experts")
            continue
        ranks = 1 if tensor_cut(name, at.tensor, attention) is None else at.tensor
        yield Held(name, tensor, _divided(tensor.numel, ranks), times, "dense")
