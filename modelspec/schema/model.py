"""The architecture: named attention and feed-forward variants, and the runs of layers that pick among them."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from modelspec.schema.attention import Attention
from modelspec.schema.base import (
    AsTuple,
    Count,
    Position,
    Positive,
    Strict,
    Tensors,
    TensorSpec,
    VariantName,
    Width,
    linear,
    under,
)
from modelspec.schema.ffn import FFN
from modelspec.schema.norm import Norm

Repeat = Annotated[int, Field(ge=1, le=100_000)]


class Init(Strict):
    """Initial values: every matrix from a normal distribution; norms change nothing, biases and sinks are 0.

    The decay rates of a recurrence have a distribution of their own.
    """

    std: Positive = Field(description="standard deviation of the normal distribution; no unit", examples=[0.006])


class LayerRun(Strict):
    """A run of equal layers: x += attention(norm(x)), then x += ffn(norm(x))."""

    repeat: Repeat = Field(default=1, description="layers in the run")
    attention: VariantName = Field(description="name of a variant under model.attention")
    ffn: VariantName = Field(description="name of a variant under model.ffn")
    norm: Norm | None = Field(default=None, description="norms of these layers; left out: model.norm")


class LayerPattern(Strict):
    """A list of runs, repeated as a whole."""

    repeat: Repeat = Field(default=1, description="how often the list is repeated")
    pattern: Annotated[tuple[LayerRun, ...], Field(min_length=1), AsTuple] = Field(
        description="runs of layers, in order"
    )


def _layers_tag(value: Any) -> str:
    return "pattern" if isinstance(value, LayerPattern) or (isinstance(value, dict) and "pattern" in value) else "run"


Layers = Annotated[
    Annotated[LayerRun, Tag("run")] | Annotated[LayerPattern, Tag("pattern")],
    Discriminator(_layers_tag),
]


class MTPLayer(Strict):
    """Which variants the block of a multi-token prediction module uses."""

    attention: VariantName = Field(description="name of a variant under model.attention")
    ffn: VariantName = Field(description="name of a variant under model.ffn")


class MTP(Strict):
    """Multi-token prediction (arXiv 2412.19437, section 2.2): modules in sequence predict tokens further ahead."""

    depth: Annotated[int, Field(ge=1, le=64)] = Field(description="modules; module k predicts the token k + 1 ahead")
    layer: MTPLayer | None = Field(default=None, description="its block; left out: the same as the last layer's")


class Model(Strict):
    """A decoder-only language model."""

    vocab_size: Annotated[int, Field(ge=2, le=2**26)] = Field(
        description="rows of the embedding; tokens", examples=[129280]
    )
    hidden_size: Width = Field(description="width of the residual stream; elements", examples=[7168])
    max_position: Position = Field(
        description="longest position that the model is meant for; tokens", examples=[163840]
    )
    tie_embeddings: bool = Field(default=False, description="the head uses the embedding's weight")
    init: Init = Field(description="initial values")
    norm: Norm = Field(description="norms before each half of a layer and before the head")
    attention: dict[VariantName, Attention] = Field(
        min_length=1, description="attention variants by name; a layer picks one"
    )
    ffn: dict[VariantName, FFN] = Field(min_length=1, description="feed-forward variants by name; a layer picks one")
    layers: Annotated[tuple[Layers, ...], Field(min_length=1), AsTuple] = Field(description="runs of layers, in order")
    mtp: MTP | None = Field(default=None, description="multi-token prediction; left out: none")

    @property
    def num_layers(self) -> int:
        """Layers of the main model, by arithmetic: nothing is expanded."""
        return sum(
            entry.repeat * (sum(run.repeat for run in entry.pattern) if isinstance(entry, LayerPattern) else 1)
            for entry in self.layers
        )

    def expanded_layers(self) -> Iterator[LayerRun]:
        """Every layer of the main model in order, as a run of one."""
        for entry in self.layers:
            runs = entry.pattern if isinstance(entry, LayerPattern) else (entry,)
            for _ in range(entry.repeat if isinstance(entry, LayerPattern) else 1):
                for run in runs:
                    yield from [run.model_copy(update={"repeat": 1})] * run.repeat

    def mtp_layer(self) -> LayerRun:
        """The block of each multi-token prediction module."""
        *_, last = self.expanded_layers()
        if self.mtp is None or self.mtp.layer is None:
            return last
        return LayerRun(attention=self.mtp.layer.attention, ffn=self.mtp.layer.ffn)

    def block_tensors(self, layer: LayerRun) -> Tensors:
        """The table of one layer: two norms, attention, feed-forward."""
        norm = (layer.norm or self.norm).tensors(self.hidden_size)
        return (
            under("attention_norm", norm)
            | under("attention", self.attention[layer.attention].tensors(self.hidden_size, layer.norm or self.norm))
            | under("ffn_norm", norm)
            | under("ffn", self.ffn[layer.ffn].tensors(self.hidden_size))
        )

    def main_tensors(self) -> Tensors:
        """The table of the model without multi-token prediction."""
        table: Tensors = {"embed_tokens.weight": TensorSpec((self.vocab_size, self.hidden_size))}
        for index, layer in enumerate(self.expanded_layers()):
            table |= under(f"layers.{index}", self.block_tensors(layer))
        table |= under("norm", self.norm.tensors(self.hidden_size))
        if not self.tie_embeddings:
            table |= under("lm_head", linear(self.vocab_size, self.hidden_size))
        return table

    def mtp_tensors(self) -> Tensors:
        """The table of the multi-token prediction modules, without the embedding and the head that they share."""
        table: Tensors = {}
        norm = self.norm.tensors(self.hidden_size)
        for index in range(self.mtp.depth if self.mtp else 0):
            table |= under(
                f"mtp.{index}",
                under("embedding_norm", norm)
                | under("hidden_norm", norm)
                | under("proj", linear(self.hidden_size, 2 * self.hidden_size))
                | under("block", self.block_tensors(self.mtp_layer()))
                | under("norm", norm),
            )
        return table

    def tensors(self) -> Tensors:
        """Every parameter and persistent buffer of the model, by name."""
        return self.main_tensors() | self.mtp_tensors()


# Bounds the walk over layers: a spec within it is counted in well under a second.
MAX_LAYERS: Count = 10_000
