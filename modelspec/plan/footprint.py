"""Memory of many layouts of one spec: what plan/ranks.py counts, from sums that layouts share.

A layer keeps as much on every stage, so bytes of a stage are those of its layers, counted once for each way to cut a
microbatch, plus what only the first and the last one hold. And of ranks whose stages are alike the one with the most
microbatches in flight is the heaviest. So the heaviest rank is found among few, without going through ranks. The total
is the one of `rank_memory` to the byte: a test holds them equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelspec import layout as arithmetic
from modelspec.plan import activations, state
from modelspec.plan.kept import Form, Kernels
from modelspec.plan.kept_attention import rotary_tables
from modelspec.plan.layouts import Layout, applied
from modelspec.plan.ranks import FRAGMENTS, IMBALANCE, exchange_bytes, libraries, most_held
from modelspec.plan.stages import runs_of_stages
from modelspec.plan.state import Shard, State, Sums
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import Recompute

# Layers of one stage: kind and number.
Layers = tuple[tuple[int, int], ...]


class _Content(NamedTuple):
    """What a rank holds: the layers of its stages, and which of these is the first or the last of all."""

    stages: tuple[Layers, ...]
    first: int | None
    last: int | None


@dataclass(frozen=True, slots=True)
class _Cut:
    """Bytes on one rank under one way to cut and recompute a microbatch; tuples are by kind of layer."""

    kept: tuple[int, ...]
    passing: tuple[int, ...]
    exchange: tuple[int, ...]
    rotary: Mapping[str, int]
    first: int
    last: int
    loss_buffers: int


@dataclass(frozen=True, slots=True)
class _Tables:
    """Tensors under one way to cut them; tuples are by kind of layer, and elements those of one rank."""

    layers: tuple[Mapping[Shard, Sums], ...]
    embedding: Mapping[Shard, Sums]
    head: Mapping[Shard, Sums]
    elements: tuple[int, ...]
    largest: tuple[int, ...]
    largest_of_embedding: int
    largest_of_head: int


class Footprints:
    """The heaviest rank of layouts of one spec, which is that of the stage of training that is meant.

    `imbalance` is the load of the busiest expert rank over the mean.
    """

    def __init__(self, spec: ModelSpec, sequence_length: int, hardware: Hardware, imbalance: float = IMBALANCE) -> None:
        model = spec.model
        self.spec, self.length, self.hardware, self.imbalance = spec, sequence_length, hardware, imbalance
        runs = [*runs_of_stages(model, 1)[0], *([] if model.mtp is None else [model.mtp_layer()])]
        # Every kind of layer, that of multi-token prediction included.
        self._kinds = tuple(dict.fromkeys(run.model_copy(update={"repeat": 1}) for run in runs))
        self._mtp = None if model.mtp is None else self._kinds.index(runs[-1].model_copy(update={"repeat": 1}))
        self._cuts: dict[tuple[object, ...], _Cut] = {}
        self._tables: dict[tuple[object, ...], _Tables] = {}
        self._stages: dict[int, tuple[Layers, ...]] = {}
        self._ranks: dict[tuple[object, ...], Mapping[_Content, Sequence[tuple[int, ...]]]] = {}
        self._sums: dict[tuple[object, ...], Mapping[Shard, Sums]] = {}

    def heaviest(
        self, shape: Layout, batch_size: int, zero: Sequence[int], recompute: Sequence[tuple[Recompute, ...]]
    ) -> tuple[tuple[int, ...], ...]:
        """Bytes of the heaviest rank of a legal shape, margin included: a row for each ZeRO stage, in it each policy of
        recomputation.
        """
        at = arithmetic.mesh(applied(self.spec, shape).parallelism)
        count = max(batch_size // (at.data * shape.microbatch_size), 1)
        sharded = [applied(self.spec, shape._replace(zero=stage)) for stage in zero]
        cuts = [self._cut(shape._replace(recompute=items)) for items in recompute]
        heaviest, outside = [[0] * len(cuts) for _ in zero], libraries(self.hardware)
        for content, held in self._contents(shape, at, count).items():
            kept = [self._kept(cut, content, held, shape.tensor) for cut in cuts]
            for row, spec in zip(heaviest, sharded, strict=True):
                tables = self._tables_of(spec)
                rest = _bytes(state.divided(spec, self._content(spec, tables, content)))
                gathered = self._gathered(spec, tables, content, count)
                for index, (held_bytes, passing, loss) in enumerate(kept):
                    used = rest + held_bytes + max(passing + gathered, loss)
                    row[index] = max(row[index], used + round(used * FRAGMENTS) + outside)
        return tuple(map(tuple, heaviest))

    def _contents(self, shape: Layout, at: arithmetic.Mesh, count: int) -> Mapping[_Content, Sequence[tuple[int, ...]]]:
        """For every content that ranks have, what these hold in flight; only what no other one exceeds."""
        key = shape.schedule, at.pipeline, at.stages_per_rank, count
        if key not in self._ranks:
            layers, found = self._layers(at.stages), dict[_Content, set[tuple[int, ...]]]()
            holders = arithmetic.stages_of(shape.schedule, at.pipeline, at.stages_per_rank)
            together = most_held(shape.schedule, at.pipeline, at.stages_per_rank, count)
            for here, held in zip(holders, together, strict=True):
                ends = (here.index(end) if end in here else None for end in (0, at.stages - 1))
                found.setdefault(_Content(tuple(layers[stage] for stage in here), *ends), set()).update(held)
            self._ranks[key] = {content: _largest(held) for content, held in found.items()}
        return self._ranks[key]

    def _layers(self, stages: int) -> tuple[Layers, ...]:
        if stages not in self._stages:
            kinds = {kind: index for index, kind in enumerate(self._kinds)}
            self._stages[stages] = tuple(
                tuple((kinds[run.model_copy(update={"repeat": 1})], run.repeat) for run in stage)
                for stage in runs_of_stages(self.spec.model, stages)
            )
        return self._stages[stages]

    def _kept(self, cut: _Cut, content: _Content, held: Sequence[tuple[int, ...]], tensor: int) -> tuple[int, int, int]:
        """Of a rank: activations in flight and buffers of experts; what a backward pass and what a loss works with."""
        sizes = []
        for index, layers in enumerate(content.stages):
            used = {self._kinds[kind].attention for kind, _ in layers}
            size = sum(cut.kept[kind] * times for kind, times in layers)
            if index == content.first:
                size += cut.first
            if index == content.last:
                size += cut.last
                used |= set() if self._mtp is None else {self._kinds[self._mtp].attention}
            sizes.append(size - (-sum(cut.rotary[name] for name in used) // tensor))
        most = max(sum(times * size for times, size in zip(counts, sizes, strict=True)) for counts in held)
        kinds = self._kinds_of(content)
        exchange, passing = (
            max((by_kind[kind] for kind in kinds), default=0) for by_kind in (cut.exchange, cut.passing)
        )
        return most + exchange, passing, 0 if content.last is None else cut.loss_buffers

    def _kinds_of(self, content: _Content) -> list[int]:
        kinds = [kind for layers in content.stages for kind, _ in layers]
        return kinds if content.last is None or self._mtp is None else [*kinds, self._mtp]

    def _gathered(self, spec: ModelSpec, tables: _Tables, content: _Content, count: int) -> int:
        """What a backward pass needs of weights and gradients: layers that ZeRO 3 gathers, the largest new gradient."""
        layers = largest = 0
        if state.gathers_by_layer(spec):
            sizes = sorted(tables.elements[kind] for kind in self._kinds_of(content) for _ in range(2))
            layers = sum(sizes[-2:]) * ITEM_BYTES[spec.precision.compute]
        if count > 1:
            largest = max((tables.largest[kind] for layers_ in content.stages for kind, _ in layers_), default=0)
            largest = max(largest, tables.largest_of_embedding if _embedding_shard(spec, content) else 0)
            largest = max(largest, tables.largest_of_head if content.last is not None else 0)
        return layers + largest * ITEM_BYTES[spec.precision.gradients]

    def _cut(self, shape: Layout) -> _Cut:
        overlaps = shape.schedule == "dualpipev" and shape.pipeline > 1
        key = shape.microbatch_size, shape.tensor, shape.context, shape.expert > 1, overlaps, shape.recompute
        if key not in self._cuts:
            spec = applied(self.spec, shape)
            kernels: Kernels = "cpu" if self.hardware.kind == "cpu" else "device"
            form = Form(spec, shape.microbatch_size, -(-self.length // shape.context), kernels, self.imbalance)
            again, model = shape.recompute, spec.model

            def on_rank(parts: Mapping[str, int]) -> int:
                # Tensor ranks divide each part by itself; the losses' gradients stand whole on each.
                return sum(size if part == "loss" else -(-size // shape.tensor) for part, size in parts.items())

            last = on_rank(activations.kept_bytes(activations.head_kept(form), again))
            if model.mtp is not None:
                block = on_rank(activations.mtp_bytes(form))
                last += model.mtp.depth * (block + on_rank(activations.kept_bytes(activations.loss_kept(form), ())))
            self._cuts[key] = _Cut(
                kept=tuple(on_rank(activations.layer_bytes(form, run)) for run in self._kinds),
                passing=tuple(
                    activations.again_bytes(form, run)
                    + activations.gathered_keys(form, run)
                    + activations.backward_bytes(form, run)
                    for run in self._kinds
                ),
                exchange=tuple(exchange_bytes(form, run) for run in self._kinds),
                rotary={name: rotary_tables(form, variant) for name, variant in model.attention.items()},
                first=on_rank(activations.kept_bytes(activations.embedding_kept(form), again)),
                last=last,
                loss_buffers=activations.loss_buffers(form),
            )
        return self._cuts[key]

    def _tables_of(self, spec: ModelSpec) -> _Tables:
        parallelism = spec.parallelism
        key = parallelism.tensor, parallelism.expert, parallelism.data.zero > 0
        if key not in self._tables:
            held = [list(state.layer_held(spec, run)) for run in self._kinds]
            embedding, head = list(state.embedding_held(spec)), [*state.head_held(spec), *state.mtp_held(spec)]
            self._tables[key] = _Tables(
                layers=tuple(state.sums(spec, tensors) for tensors in held),
                embedding=state.sums(spec, embedding),
                head=state.sums(spec, head),
                elements=tuple(sum(each.elements for each in tensors) for tensors in held),
                largest=tuple(max(each.elements for each in tensors) for tensors in held),
                largest_of_embedding=max(each.elements for each in embedding),
                largest_of_head=max(each.elements for each in head),
            )
        return self._tables[key]

    def _content(self, spec: ModelSpec, tables: _Tables, content: _Content) -> Mapping[Shard, Sums]:
        parallelism = spec.parallelism
        embedding = _embedding_shard(spec, content)
        key = content, embedding, parallelism.tensor, parallelism.expert, parallelism.data.zero > 0
        if key not in self._sums:
            parts: list[tuple[Mapping[Shard, Sums], int]] = [
                (tables.layers[kind], times) for layers in content.stages for kind, times in layers
            ]
            if embedding is not None:
                parts.append(({embedding: tables.embedding["dense"]}, 1))
            parts += [(tables.head, 1)] if content.last is not None else []
            found: dict[Shard, Sums] = {"dense": Sums(), "experts": Sums(), "shared": Sums()}
            for part, times in parts:
                for shard, counts in part.items():
                    found[shard] = found[shard].plus(counts, times)
            self._sums[key] = found
        return self._sums[key]


def _embedding_shard(spec: ModelSpec, content: _Content) -> Shard | None:
    return state.embedding_shard(spec, first=content.first is not None, last=content.last is not None)


def _bytes(total: State) -> int:
    return total.weights + total.fp8_copies + total.gradients + total.master + total.optimizer


def _largest(held: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Those that no other one exceeds in every stage."""
    return tuple(
        one
        for one in sorted(held)
        if not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in held)
    )
