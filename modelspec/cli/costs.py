"""What a change costs, in lines for people: FLOPs, cache, checkpoints and tensors, each where the two sides differ."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from modelspec.amount import amount, amount_of_bytes, figure, flop_amount

if TYPE_CHECKING:
    from modelspec.diff import Summary, TensorChanges, TensorGroup

# What fits a screen beside the changes; one model against another can have a hundred.
MAX_TENSOR_LINES = 20


def cost_lines(summary: "Summary") -> Iterator[str]:
    """One line for each cost that differs. Training is all that the device computes, by the name that `plan` has."""
    where = f"FLOPs per token of sequences of {summary.sequence_length:,}"
    for key, label in (("forward", "forward pass"), summary.most_inclusive):
        old, new = summary.flops_per_token[key]
        if old != new:
            yield f"{label}, {where}: {flop_amount(round(old))} -> {flop_amount(round(new))} ({new / old - 1:+.2%})"
    kept = (
        ("cache bytes per token", summary.kv_cache_bytes_per_token),
        ("state bytes per sequence", summary.state_bytes_per_sequence),
    )
    for label, (before, after) in kept:
        if before != after:
            yield f"{label}: {before:,} -> {after:,} ({after - before:+,})"
    for form, (was, now) in summary.checkpoint_bytes.items():
        if was != now:
            yield f"checkpoint, {_FORMS[form]}: {_size(was)} -> {_size(now)}{_grown(was, now)}"
    yield from _training(summary)


def _training(summary: "Summary") -> Iterator[str]:
    """What a plan says of both sides."""
    if summary.memory_bytes and summary.memory_bytes[0] != summary.memory_bytes[1]:
        assert summary.memory_stages and summary.memory_verdicts
        old, new = summary.memory_bytes
        was, now = (
            f"{_size(count)} {verdict} in {stage}"
            for count, verdict, stage in zip(
                summary.memory_bytes, summary.memory_verdicts, summary.memory_stages, strict=True
            )
        )
        which = f"memory of the heaviest {summary.hardware} in the stage that needs most"
        yield f"{which}: {was} -> {now}{_grown(old, new)}"
    if summary.gpu_hours and summary.gpu_hours[0] != summary.gpu_hours[1]:
        few, many = summary.gpu_hours
        yield f"training on {summary.hardware}: {figure(few)} -> {figure(many)} GPU hours ({many / few - 1:+.2%})"
    if summary.cost_usd and summary.cost_usd[0] != summary.cost_usd[1]:
        before, after = summary.cost_usd
        yield f"cost of training: ${figure(before)} -> ${figure(after)}"


def tensor_count(tensors: "TensorChanges") -> str:
    """How many tensors change, and what must be initialised anew."""
    if not tensors.groups:
        return "a checkpoint of the old one loads in the new one"
    return (
        f"tensors: {len(tensors.new)} new, {len(tensors.gone)} gone, {len(tensors.reshaped)} reshaped; "
        f"{amount(tensors.elements)} parameters must be initialised anew"
    )


def tensor_lines(tensors: "TensorChanges") -> Iterator[tuple[str, str]]:
    """The name of each tensor that changes, with its sign and with layers folded, and its shape; in the end no name."""
    for group in tensors.groups[:MAX_TENSOR_LINES]:
        shapes = [str(list(shape)) for shape in (group.before, group.after) if shape is not None]
        yield f"{_sign(group)} {group.name}", " -> ".join(shapes)
    if (left := len(tensors.groups) - MAX_TENSOR_LINES) > 0:
        yield "", f"and {left} more (--format json lists all)"


def _sign(group: "TensorGroup") -> str:
    return "+" if group.before is None else "-" if group.after is None else "~"


_FORMS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "hugging_face_bf16": "Hugging Face BF16",
    "hugging_face_fp8": "Hugging Face FP8",
}


def _size(count: int | None) -> str:
    return "none" if count is None else amount_of_bytes(count)


def _grown(was: int | None, now: int | None) -> str:
    return f" ({now / was - 1:+.2%})" if was and now else ""
