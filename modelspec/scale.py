"""A model to one of another size with the same proportions.

Three numbers are chosen: the width of the residual stream, how often the longest run of layers is repeated, and how
many experts there are. All else follows. What grows with the width (heads, latents, feed-forward networks) keeps its
ratio to it, rounded to what divides well; what makes a mechanism itself (sizes of heads, experts per token, groups,
kinds of layers, vocabulary) stays. Of all choices near the wanted counts, the one whose shape is most like the
source's is taken.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import assert_never

from modelspec import schema

_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SIZE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([kmbt])")
# A count this near to the wanted one is as good as exact: then only the shape matters.
_NEAR = 0.03
LARGEST = 1000 * _UNITS["t"]
# Beyond this the wanted size is missed, and it is said.
CLOSE = 0.05
# Beyond this a model is another size than the wanted one.
FARTHEST = 0.25


class ScaleError(Exception):
    """A size that the source cannot be scaled to."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters without multi-token prediction: in all, and those at work for one token."""

    total: int
    active: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Parameters that a model shall have; `active` None: whatever comes of it."""

    total: int
    active: int | None

    def farness(self, counts: Counts) -> float:
        """The larger of the relative differences of total and active."""
        active = abs(counts.active / self.active - 1) if self.active else 0.0
        return max(abs(counts.total / self.total - 1), active)


def wanted(text: str) -> Wanted:
    """The size that a text like `7b` or `3b-a500m` asks for. Raises ValueError."""
    # Not of letters beyond ASCII, of which one, the sign of Kelvin, becomes a k.
    total, dash, active = (text.lower() if text.isascii() else text).partition("-a")
    sizes = [_SIZE.fullmatch(part) for part in ([total, active] if dash else [total])]
    numbers = [round(float(found[1]) * _UNITS[found[2]]) for found in sizes if found]
    if len(numbers) < len(sizes) or not all(numbers):
        raise ValueError(f"{text!r} is no size; 7b is one, and 3b-a500m with 500M of them active for one token")
    if dash and numbers[1] > numbers[0]:
        raise ValueError(f"{text}: more parameters active than there are")
    if numbers[0] > LARGEST:
        raise ValueError(f"{text}: more than {LARGEST // _UNITS['t']:,}t, which no model has")
    return Wanted(numbers[0], numbers[1] if dash else None)


def count(model: schema.Model) -> Counts:
    """What `plan` counts, by multiplication: each kind of layer is counted once."""
    blocks = [(times, model.block_tensors(run)) for times, run in _runs(model)]
    ends = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    ends += sum(tensor.numel for tensor in model.norm.tensors(model.hidden_size).values())
    return Counts(
        total=ends + sum(times * sum(tensor.numel for tensor in table.values()) for times, table in blocks),
        active=ends + sum(times * sum(tensor.active for tensor in table.values()) for times, table in blocks),
    )


def scale(source: schema.Model, to: Wanted) -> schema.Model:
    """The model with the source's proportions that is nearest to a size. Raises ScaleError where none is near."""
    if to.active is not None and to.active != to.total and not _experts(source):
        raise ScaleError("the source has no experts: all its parameters are active; ask for a total alone, like 3b")
    candidates = list(_candidates(source, to))

    def loss(each: _Candidate) -> tuple[bool, bool, float]:
        return each.far > CLOSE, each.far > FARTHEST, 20 * max(0.0, each.far - _NEAR) + each.unlike

    best = min(candidates, key=loss)
    if best.far > FARTHEST:
        counts = min(candidates, key=lambda each: each.far).counts
        raise ScaleError(
            f"the source does not scale to that size: the nearest has {counts.total:,} parameters, {counts.active:,} "
            f"active for one token; embedding and head alone have {_ends(source, _granule(source.hidden_size)):,} at "
            "the least width"
        )
    return best.model


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model, how far its counts are from the wanted ones, and how unlike the source its shape is."""

    model: schema.Model
    counts: Counts
    far: float
    unlike: float


def _candidates(source: schema.Model, to: Wanted) -> Iterator[_Candidate]:
    """Models of every width, in steps of a few percent, up to one that is too large however it is cut."""
    step = width = _granule(source.hidden_size)
    while True:
        least = 0
        for model in _of_width(source, width, to):
            counts = count(model)
            least = min(least or counts.active, counts.active)
            if model.num_layers <= schema.MAX_LAYERS:
                yield _Candidate(model, counts, to.farness(counts), _unlike(model, source))
        if least > (1 + FARTHEST) * (to.active or to.total):
            return
        width += step * max(1, width // (20 * step))


def _runs(model: schema.Model) -> Iterator[tuple[int, schema.LayerRun]]:
    for entry in model.layers:
        match entry:
            case schema.LayerRun():
                yield entry.repeat, entry
            case schema.LayerPattern():
                yield from ((entry.repeat * run.repeat, run) for run in entry.pattern)


def _experts(model: schema.Model) -> list[schema.MoE]:
    return [ffn for ffn in model.ffn.values() if isinstance(ffn, schema.MoE)]


def _ends(model: schema.Model, width: int) -> int:
    """Parameters of embedding and head."""
    return (1 if model.tie_embeddings else 2) * model.vocab_size * width


def _of_width(source: schema.Model, width: int, to: Wanted) -> Iterator[schema.Model]:
    """Models of a width: of every depth whose shape is not too unlike, with as many experts as the total asks for."""
    longest = max(entry.repeat for entry in source.layers)
    alike = longest * width / source.hidden_size
    for depth in sorted({max(1, round(alike * 2 ** (step / 6))) for step in range(-8, 9)}):
        candidate = _Scaled(source, width, depth)
        if to.active is None or not _experts(source):
            yield candidate.with_experts(1.0)
            continue
        # The total is a straight line over the number of experts.
        few, many = (count(candidate.with_experts(factor)).total for factor in (1.0, 2.0))
        yield candidate.with_experts(max(0.0, 1.0 + (to.total - few) / (many - few)))


def _unlike(model: schema.Model, source: schema.Model) -> float:
    """How far the shape is from the source's: depth to width, and experts."""
    aspect = (model.num_layers / model.hidden_size) / (source.num_layers / source.hidden_size)
    ratios = [aspect]
    ratios += [
        (new.num_experts / old.num_experts) ** 0.3 for new, old in zip(_experts(model), _experts(source), strict=True)
    ]
    return sum(abs(log(ratio)) for ratio in ratios)


def _granule(size: int) -> int:
    """The largest power of two that divides a size, 128 at most."""
    return min(size & -size, 128)


def _sized(size: int, factor: float) -> int:
    """A size times a factor, in multiples of what divides the size."""
    granule = _granule(size)
    return max(1, round(size * factor / granule)) * granule


def _heads(number: int, factor: float) -> int:
    """A number of heads times a factor, so that as many powers of two up to 8 divide it as before."""
    granule = min(number & -number, 8)
    while granule > 1 and number * factor < granule:
        granule //= 2
    return max(1, round(number * factor / granule)) * granule


@dataclass(frozen=True)
class _Scaled:
    """The source at another width, its longest run repeated `depth` times; the experts are still open."""

    source: schema.Model
    width: int
    depth: int

    @property
    def factor(self) -> float:
        return self.width / self.source.hidden_size

    def with_experts(self, factor: float) -> schema.Model:
        """The model with so many times the source's experts."""
        ffn = {name: self._experts(each, factor) for name, each in self._ffn.items()}
        return self._base.model_copy(update={"ffn": ffn})

    @cached_property
    def _base(self) -> schema.Model:
        longest = max(entry.repeat for entry in self.source.layers)
        layers = tuple(
            entry.model_copy(update={"repeat": max(1, round(entry.repeat * self.depth / longest))})
            for entry in self.source.layers
        )
        attention = {name: self._attention(each) for name, each in self.source.attention.items()}
        return self.source.model_copy(update={"hidden_size": self.width, "layers": layers, "attention": attention})

    @cached_property
    def _ffn(self) -> dict[str, schema.FFN]:
        return {name: self._widths(each) for name, each in self.source.ffn.items()}

    def _attention(self, attention: schema.Attention) -> schema.Attention:
        match attention:
            case schema.MLA():
                changes: dict[str, object] = {
                    "num_heads": _heads(attention.num_heads, self.factor),
                    "kv_lora_rank": _sized(attention.kv_lora_rank, self.factor),
                }
                if attention.q_lora_rank is not None:
                    changes["q_lora_rank"] = _sized(attention.q_lora_rank, self.factor)
                if attention.indexer is not None:
                    heads = _heads(attention.indexer.num_heads, self.factor)
                    changes["indexer"] = attention.indexer.model_copy(update={"num_heads": heads})
                return attention.model_copy(update=changes)
            case schema.GQA():
                keys = _heads(attention.num_kv_heads, self.factor)
                queries = keys * max(1, round(attention.num_heads * self.factor / keys))
                return attention.model_copy(update={"num_kv_heads": keys, "num_heads": queries})
            case schema.GatedDeltaNet():
                keys = _heads(attention.num_qk_heads, self.factor)
                values = keys * (attention.num_v_heads // attention.num_qk_heads)
                return attention.model_copy(update={"num_qk_heads": keys, "num_v_heads": values})
            case other:
                assert_never(other)

    def _widths(self, ffn: schema.FFN) -> schema.FFN:
        changes: dict[str, object] = {"intermediate_size": _sized(ffn.intermediate_size, self.factor)}
        if isinstance(ffn, schema.MoE) and ffn.shared_experts and ffn.shared_experts.intermediate_size:
            size = _sized(ffn.shared_experts.intermediate_size, self.factor)
            changes["shared_experts"] = ffn.shared_experts.model_copy(update={"intermediate_size": size})
        return ffn.model_copy(update=changes)

    @staticmethod
    def _experts(ffn: schema.FFN, factor: float) -> schema.FFN:
        if not isinstance(ffn, schema.MoE):
            return ffn
        groups = ffn.router.selection.groups
        granule = groups.num if groups else min(_granule(ffn.num_experts), max(1, ffn.num_experts // 4), 8)
        # A token must find its experts in the groups that it may use, and a group's two best.
        least = ffn.num_experts_per_tok if groups is None else -(-ffn.num_experts_per_tok // groups.topk) * groups.num
        least = max(least, 2 * groups.num if groups else 1)
        number = max(least, round(ffn.num_experts * factor))
        number = max(-(-least // granule), round(number / granule)) * granule
        return ffn.model_copy(update={"num_experts": min(number, 1 << 20)})
