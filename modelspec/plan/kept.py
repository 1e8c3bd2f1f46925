"""What operations keep of one microbatch from the forward pass until the backward pass: the words of the memory model.

A product keeps its input, a norm its input and one number per row, a gated activation both of its factors. How much
that is depends on the kernels. `cpu` is what the builders run today: on FP32 and FP64 the fast forms of kernels/, which
keep just that, and on BF16 plain autograd, which keeps every intermediate result. `device` are kernels of a GPU: they
keep what the fast forms do, attention keeps its output and the softmax's normaliser instead of the probabilities, and
the input of a product in FP8 is kept in FP8 with its scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import ModelSpec, MoE, Norm
from modelspec.schema.parallelism import Recompute

Kernels = Literal["cpu", "device"]
INDEX = 8
# E5M6 has 12 bits.
_E5M6 = (3, 2)


class Kept(NamedTuple):
    """Bytes that one microbatch keeps for a part of the model, and which item of `recompute` computes them again."""

    part: str
    bytes: int
    again: Recompute | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """One microbatch, `sequences` x `length` tokens, under the kernels and number formats of a spec.

    `imbalance` is the load of the busiest expert rank over the mean.
    """

    spec: ModelSpec
    sequences: int
    length: int
    kernels: Kernels = "cpu"
    imbalance: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of the microbatch."""
        return self.sequences * self.length

    @property
    def item(self) -> int:
        """Bytes of an element in `precision.compute`."""
        return ITEM_BYTES[self.spec.precision.compute]

    @property
    def wide(self) -> int:
        """Bytes of an element in at least FP32."""
        return max(self.item, ITEM_BYTES["float32"])

    @property
    def fused(self) -> bool:
        """Whether kernels keep their inputs alone."""
        return self.kernels == "device" or self.spec.precision.compute != "bfloat16"

    @property
    def fp8_inputs(self) -> bool:
        """Whether the input of a product is kept in FP8: where the weight's gradient is computed from that."""
        fp8 = self.spec.precision.fp8
        return self.kernels == "device" and fp8 is not None and "wgrad" in fp8.gemms

    def expert_rows(self, moe: MoE) -> int:
        """Pairs of a token and one of its experts that a rank computes."""
        pairs = self.tokens * moe.num_experts_per_tok
        return round(pairs * self.imbalance) if self.spec.parallelism.expert > 1 else pairs

    @property
    def keys(self) -> int:
        """Tokens whose keys a rank has: of whole sequences, where context ranks have parts of them."""
        return self.tokens * self.spec.parallelism.context

    def on_all(self, kept: Kept) -> Kept:
        """What every tensor rank keeps in whole. Bytes here are those of a tensor group, which its ranks divide."""
        return kept._replace(bytes=kept.bytes * self.spec.parallelism.tensor)

    def gathered_input(self, part: str, width: int) -> Kept:
        """The normed input of a product; tensor ranks each keep that of all, which is not gathered again."""
        return self.on_all(self.product_input(part, width, "norm" if self.spec.parallelism.tensor == 1 else None))

    def values(self, part: str, width: int, again: Recompute | None = None) -> Kept:
        """A tensor of `width` elements for each token, in `precision.compute`."""
        return Kept(part, self.tokens * width * self.item, again)

    def numbers(self, part: str, width: int, again: Recompute | None = None) -> Kept:
        """A tensor of `width` elements for each token, in at least FP32."""
        return Kept(part, self.tokens * width * self.wide, again)

    def product_input(self, part: str, width: int, again: Recompute | None = None, *, rows: int | None = None) -> Kept:
        """The input of a product with a weight: `rows` of `width` elements, one for each token unless stated."""
        count = self.tokens if rows is None else rows
        return Kept(part, count * (self.fp8_row(width) if self.fp8_inputs else width * self.item), again)

    def gated_input(self, part: str, width: int, rows: int) -> Kept:
        """The input of a gated activation: gate and up together are `width` elements of every row."""
        fp8 = self.spec.precision.fp8
        narrow = self.kernels == "device" and fp8 is not None and fp8.swiglu_input is not None
        return Kept(part, rows * (self.fp8_row(width) if narrow else width * self.item))

    def attention_output(self, part: str, width: int) -> Iterator[Kept]:
        """What attention's own backward pass and the projection after it share, of `width` elements for each token."""
        fp8 = self.spec.precision.fp8
        if self.kernels == "cpu":
            yield self.values(part, width)
        elif fp8 is not None and fp8.attention_output is not None:
            bits = width * _E5M6[0] // _E5M6[1] + self._scales(width)
            yield Kept(part, self.tokens * bits)
        else:
            yield self.values(part, width)

    def norm(self, part: str, norm: Norm | None, width: int, *, vectors: int = 1, kept: int = 0) -> Iterator[Kept]:
        """A norm over each of `vectors` vectors of a token, all of `width` elements; `norm` None is a plain one.

        Its input may be a view of a wider tensor, of which then all `kept` elements stay. What it gives is not in here.
        """
        if self.fused:
            scale = self.wide if self.kernels == "device" else self.item
            yield self.values(part, vectors * max(width, kept))
            yield Kept(part, self.tokens * vectors * scale, "norm")
        else:
            if "norm" in self.spec.parallelism.recompute:
                yield self.values(part, vectors * max(width, kept))
            yield self.numbers(part, vectors * width, "norm")
            yield self.numbers(part, vectors, "norm")
            yield self.values(part, vectors * width, "norm")
        if norm is not None and norm.zero_centered:
            # 1 + weight is a tensor of its own.
            yield Kept(part, width * self.item, "norm")

    def fp8_row(self, width: int) -> int:
        """Bytes of a row in FP8 with its scales."""
        return width + self._scales(width)

    def _scales(self, width: int) -> int:
        fp8 = self.spec.precision.fp8
        assert fp8 is not None
        each = 1 if fp8.scales == "ue8m0" else ITEM_BYTES["float32"]
        return -(-width // fp8.activation_block[1]) * each
