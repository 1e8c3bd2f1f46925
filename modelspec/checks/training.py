"""Relations of the recipe: lengths, schedules, and what only makes sense together with the model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from modelspec.checks.finding import Finding, Path, legal
from modelspec.schema import BatchConstant, BatchSchedule, ModelSpec, MoE, Schedule, Stage, TrainedBPE
from modelspec.schema.schedule import BatchPhase, Phase

Findings = Iterator[Finding]


@dataclass(frozen=True, slots=True)
class _Length:
    """How long a stage or run is, as bounds where the unit has to be converted."""

    tokens: tuple[float, float]
    steps: tuple[float, float]

    def __add__(self, other: "_Length") -> "_Length":
        return _Length(
            (self.tokens[0] + other.tokens[0], self.tokens[1] + other.tokens[1]),
            (self.steps[0] + other.steps[0], self.steps[1] + other.steps[1]),
        )


def _stages(spec: ModelSpec) -> Iterator[tuple[Path, Stage]]:
    for index, stage in enumerate(spec.training.stages if spec.training else ()):
        yield ("training", "stages", index), stage


def _length(stage: Stage) -> _Length:
    if isinstance(stage.batch_size, int):
        sizes = [stage.batch_size]
    else:
        sizes = [n for p in stage.batch_size for n in ([p.value] if isinstance(p, BatchConstant) else p.ramp)]
    least, most = min(sizes) * stage.sequence_length, max(sizes) * stage.sequence_length
    if stage.tokens is not None:
        # A stage ends with the first step that reaches its tokens, so it may pass them by less than a step.
        return _Length((stage.tokens, stage.tokens + most), (stage.tokens // most, -(-stage.tokens // least)))
    steps = stage.steps or 0
    return _Length((steps * least, steps * most), (steps, steps))


def _schedules(spec: ModelSpec) -> Iterator[tuple[Path, Schedule | BatchSchedule, _Length]]:
    """Every schedule with its path and the length that its marks count in."""
    if spec.training is None:
        return
    run = _Length((0, 0), (0, 0))
    for path, stage in _stages(spec):
        length = _length(stage)
        run += length
        yield (*path, "batch_size"), stage.batch_size, length
        yield (*path, "learning_rate"), stage.learning_rate, length
    losses = spec.training.losses
    if losses.mtp is not None:
        yield ("training", "losses", "mtp"), losses.mtp, run
    if losses.balance is not None and losses.balance.sequence is not None:
        yield ("training", "losses", "balance", "sequence"), losses.balance.sequence, run
    if spec.training.router_bias_update_speed is not None:
        yield ("training", "router_bias_update_speed"), spec.training.router_bias_update_speed, run


def stages_have_one_length(spec: ModelSpec) -> Findings:
    """A stage has exactly one of tokens and steps."""
    for path, stage in _stages(spec):
        if stage.tokens is None and stage.steps is None:
            yield Finding(path, f"the stage '{stage.name}' has no length", "give it tokens or steps")
        elif stage.tokens is not None and stage.steps is not None:
            yield Finding(
                (*path, "steps"),
                f"the stage '{stage.name}' has both tokens and steps",
                "keep one",
                (((*path, "tokens"), "the other length"),),
            )


def stage_names_differ(spec: ModelSpec) -> Findings:
    """Stages are told apart by name."""
    names = Counter(stage.name for _, stage in _stages(spec))
    for path, stage in _stages(spec):
        if names[stage.name] > 1:
            yield Finding(
                (*path, "name"), f"{names[stage.name]} stages are named '{stage.name}'", "name each differently"
            )


def _mark(phase: Phase | BatchPhase) -> tuple[str, int] | None:
    if phase.until_tokens is not None:
        return "until_tokens", phase.until_tokens
    return ("until_steps", phase.until_steps) if phase.until_steps is not None else None


def phases_have_ends(spec: ModelSpec) -> Findings:
    """Every phase but the last ends at one mark, marks grow, and a ramp or cosine has an end."""
    for path, schedule, _ in _schedules(spec):
        if not isinstance(schedule, tuple):
            continue
        last: dict[str, int] = {}
        for number, phase in enumerate(schedule):
            at, mark = (*path, number), _mark(phase)
            if phase.until_tokens is not None and phase.until_steps is not None:
                yield Finding((*at, "until_steps"), "the phase ends at two marks", "keep until_tokens or until_steps")
            elif mark is None and number < len(schedule) - 1:
                yield Finding(at, "a phase before the last has no end", "give it until_tokens or until_steps")
            elif mark is None and not hasattr(phase, "value"):
                yield Finding(at, "a ramp or cosine without an end has no slope", "give it until_tokens or until_steps")
            elif mark is not None and mark[1] <= last.get(mark[0], 0):
                yield Finding(
                    (*at, mark[0]),
                    f"the phase ends at {mark[1]:,}, where the one before it has already ended",
                    "marks count from the start of the stage or run and grow from phase to phase; they are not lengths",
                )
            if mark is not None:
                last[mark[0]] = mark[1]


def schedules_reach_the_end(spec: ModelSpec) -> Findings:
    """A schedule whose last phase is bounded covers the whole stage or run."""
    for path, schedule, length in _schedules(spec):
        mark = _mark(schedule[-1]) if isinstance(schedule, tuple) else None
        if mark is None:
            continue
        least = length.tokens[0] if mark[0] == "until_tokens" else length.steps[0]
        if mark[1] < least:
            assert isinstance(schedule, tuple)
            yield Finding(
                (*path, len(schedule) - 1, mark[0]),
                f"the schedule ends at {mark[1]:,} of {int(least):,} {mark[0].removeprefix('until_')}",
                f"at least {int(least):,}, or leave the mark of the last phase out",
            )


def phases_begin_in_time(spec: ModelSpec) -> Findings:
    """A phase that would begin after the end of its stage or run never happens."""
    for path, schedule, length in _schedules(spec):
        if not isinstance(schedule, tuple):
            continue
        for number, phase in enumerate(schedule[:-1]):
            mark = _mark(phase)
            if mark is None:
                continue
            most = length.tokens[1] if mark[0] == "until_tokens" else length.steps[1]
            if most < inf and mark[1] >= most > 0:
                unit = mark[0].removeprefix("until_")
                yield Finding(
                    (*path, number, mark[0]),
                    f"the next phase begins at {mark[1]:,} {unit}, when all {int(most):,} are over",
                    "shorten this phase, or drop the ones after it",
                    severity="warning",
                )
                break


def sequences_fit_positions(spec: ModelSpec) -> Findings:
    """No stage trains beyond the positions that the model is meant for."""
    for path, stage in _stages(spec):
        if stage.sequence_length > spec.model.max_position:
            yield Finding(
                (*path, "sequence_length"),
                f"sequences of {stage.sequence_length:,} tokens exceed {spec.model.max_position:,} positions",
                f"at most {spec.model.max_position:,}",
                ((("model", "max_position"), f"max_position {spec.model.max_position:,}"),),
            )


def scaling_is_needed(spec: ModelSpec) -> Findings:
    """Rotary scaling serves sequences longer than the original length; shorter ones only lose by it."""
    for path, stage in _stages(spec):
        for name, attention in spec.model.attention.items():
            scaling = None if attention.rope == "none" else attention.rope.scaling
            if stage.rope_scaling is not None:
                scaling = None if stage.rope_scaling == "none" else stage.rope_scaling
            if scaling is not None and stage.sequence_length <= scaling.original_max_position:
                yield Finding(
                    (*path, "sequence_length"),
                    f"the stage trains with {scaling.type} on {stage.sequence_length:,} tokens, no more than the "
                    f"original {scaling.original_max_position:,}",
                    "rope_scaling: none",
                    ((("model", "attention", name, "rope", "scaling"), f"{scaling.type} is set here"),),
                    severity="warning",
                )


def mtp_and_its_weight_go_together(spec: ModelSpec) -> Findings:
    """A model with multi-token prediction is trained with a weight for it, and one without has none."""
    if spec.training is None:
        return
    weight = spec.training.losses.mtp
    if spec.model.mtp is None and weight is not None:
        yield Finding(
            ("training", "losses", "mtp"),
            "the model has no multi-token prediction to weigh",
            "remove it (`mtp: null`), or give the model `mtp: {depth: 1}`",
            ((("model",), "no `mtp` here"),),
        )
    elif spec.model.mtp is not None and weight is None:
        yield Finding(
            ("training", "losses"),
            "the model has multi-token prediction, but its loss has no weight",
            "give training.losses.mtp, or remove model.mtp",
            ((("model", "mtp"), "multi-token prediction"),),
        )


def _has_selection_bias(spec: ModelSpec) -> bool:
    return any(isinstance(ffn, MoE) and ffn.router.selection.bias for ffn in spec.model.ffn.values())


def bias_speed_has_a_bias(spec: ModelSpec) -> Findings:
    """Only a router with a selection bias can have it moved."""
    if spec.training and spec.training.router_bias_update_speed is not None and not _has_selection_bias(spec):
        yield Finding(
            ("training", "router_bias_update_speed"),
            "no router has a selection bias to move",
            "remove it, or set router.selection.bias: true",
            ((("model", "ffn"), "feed-forward variants"),),
        )


def bias_has_a_speed(spec: ModelSpec) -> Findings:
    """A selection bias that never moves balances nothing."""
    if spec.training is None or spec.training.router_bias_update_speed is not None:
        return
    for name, ffn in spec.model.ffn.items():
        if isinstance(ffn, MoE) and ffn.router.selection.bias:
            yield Finding(
                ("model", "ffn", name, "router", "selection", "bias"),
                "the selection bias is never moved, so it balances nothing",
                "give training.router_bias_update_speed",
                severity="warning",
            )


def balance_loss_has_experts(spec: ModelSpec) -> Findings:
    """A balance loss needs experts."""
    if spec.training is None or spec.training.losses.balance is None:
        return
    if not any(isinstance(ffn, MoE) for ffn in spec.model.ffn.values()):
        yield Finding(
            ("training", "losses", "balance"), "no layer has experts to balance", "remove it (`balance: null`)"
        )


def tokenizer_fits_embedding(spec: ModelSpec) -> Findings:
    """Every token of the tokenizer has a row of the embedding."""
    tokenizer = spec.data.tokenizer if spec.data else None
    if isinstance(tokenizer, TrainedBPE) and tokenizer.vocab_size > spec.model.vocab_size:
        yield Finding(
            ("data", "tokenizer", "vocab_size"),
            f"a tokenizer of {tokenizer.vocab_size:,} tokens exceeds the model's {spec.model.vocab_size:,}",
            legal([spec.model.vocab_size], tokenizer.vocab_size),
            ((("model", "vocab_size"), f"vocab_size {spec.model.vocab_size:,}"),),
        )
