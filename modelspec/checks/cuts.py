"""What the axes of a layout cut, and what they cannot: widths, kinds of attention."""

from collections.abc import Iterator

from modelspec.checks.finding import Finding, Path, divisors, legal
from modelspec.checks.parallel import Findings, layouts
from modelspec.schema import GQA, Dense, GatedDeltaNet, ModelSpec, MoE


def tensor_divides_widths(spec: ModelSpec) -> Findings:
    """Each tensor rank has as much of the vocabulary, of key-value heads and of dense widths as the others."""
    for at in layouts(spec):
        ranks = at.parallelism.tensor
        for path, what, size, fitting in _widths(spec):
            if ranks not in fitting:
                yield Finding(
                    at.path("tensor"),
                    f"{ranks} tensor ranks do not divide {what} of {size:,}",
                    legal(fitting, ranks),
                    ((path, f"{size:,}"),),
                )


def _widths(spec: ModelSpec) -> Iterator[tuple[Path, str, int, list[int]]]:
    """Where each is written, what it is, its size, and the numbers of ranks that it can be cut over."""
    model = spec.model
    yield ("model", "vocab_size"), "a vocabulary", model.vocab_size, divisors(model.vocab_size)
    for name, attention in model.attention.items():
        if isinstance(attention, GQA):
            heads = attention.num_kv_heads
            # Where they are fewer than ranks, several ranks read the same one.
            fitting = [d for d in divisors(attention.num_heads) if heads % d == 0 or d % heads == 0]
            yield ("model", "attention", name, "num_kv_heads"), "key-value heads, a number", heads, fitting
    for name, ffn in model.ffn.items():
        match ffn:
            case Dense():
                width = ffn.intermediate_size
                yield ("model", "ffn", name, "intermediate_size"), "a width", width, divisors(width)
            case MoE() if ffn.shared_experts is not None:
                width = ffn.shared_width
                yield ("model", "ffn", name, "shared_experts"), "shared experts of a width", width, divisors(width)


def attention_can_be_cut(spec: ModelSpec) -> Findings:
    """A recurrence needs the whole sequence and all its heads; a norm over all heads needs these."""
    for at in layouts(spec):
        for axis in ("tensor", "context"):
            ranks = getattr(at.parallelism, axis)
            for name, attention in spec.model.attention.items():
                path: Path = ("model", "attention", name)
                if ranks > 1 and isinstance(attention, GatedDeltaNet):
                    yield Finding(
                        at.path(axis),
                        f"{axis} {ranks}: {attention.type} is not cut over ranks, whose state follows the sequence",
                        "legal values: 1; the data, expert and pipeline axes take such layers",
                        ((path, attention.type),),
                    )
                if ranks > 1 and axis == "tensor" and isinstance(attention, GQA) and attention.qk_norm == "full":
                    yield Finding(
                        at.path(axis),
                        f"tensor {ranks}: a norm over all heads together is not cut over ranks",
                        "legal values: 1",
                        (((*path, "qk_norm"), "full"),),
                    )
