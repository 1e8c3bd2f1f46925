"""Number formats: of the computation, of what is stored, and of FP8 matrix products."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from modelspec.schema.base import UNIQUE, AsTuple, Count, Distinct, Dtype, Strict

Block = Annotated[tuple[Count, Count], AsTuple]


def in_fp8(name: str) -> bool:
    """Whether a tensor is the weight of a product that `precision.fp8` runs in FP8, by its name in a model or a block.

    These are linear layers and experts: the projections of attention, of feed-forward networks and of multi-token
    prediction; not embedding, head, router, the gate of shared experts and the indexer.
    """
    inside = (".attention." in f".{name}" and ".indexer." not in name) or ".ffn." in f".{name}"
    projection = inside and name.endswith(("_proj.weight", ".experts.gate_up_proj", ".experts.down_proj"))
    return projection or (name.startswith("mtp.") and name.endswith(".proj.weight"))


def fp8_weights(names: Iterable[str]) -> str:
    """The weights among these tensors whose products run in FP8, kinds with their counts, as one phrase."""
    kinds = Counter(_kind(name) for name in names if in_fp8(name))
    return f"{kinds.total()} weights ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"


def _kind(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return f"experts.{parts[-1]}" if "experts" in parts else parts[-1]


class FP8(Strict):
    """Block-scaled FP8 for the matrix products of linear layers and experts (arXiv 2412.19437, section 3.3).

    Embedding, head, router, norms and the core of attention stay out of it.
    """

    format: Literal["e4m3"] = Field(description="format of every operand")
    activation_block: Block = Field(description="tokens x channels that share a scale in activations; elements")
    weight_block: Block = Field(description="outputs x inputs that share a scale in weights; elements")
    scales: Literal["float32", "ue8m0"] = Field(description="format of the scales; ue8m0 keeps powers of two")
    gemms: Annotated[tuple[Literal["forward", "dgrad", "wgrad"], ...], Field(min_length=1), AsTuple, Distinct] = Field(
        description="which products run in FP8: the output, the input's gradient, the weight's gradient",
        json_schema_extra=UNIQUE,
    )
    emulate: bool = Field(default=False, description="compute the same numbers where the device has no FP8, slowly")
    attention_output: Literal["e5m6"] | None = Field(
        default=None,
        description="format that keeps the input of attention's output projection; left out: the common one",
    )
    swiglu_input: Literal["e4m3"] | None = Field(
        default=None, description="format that keeps the activation's input for the backward pass; left out: compute"
    )
    dispatch: bool = Field(default=False, description="send tokens to their experts in FP8")


class Precision(Strict):
    """Number formats by role. The default of each is float32."""

    compute: Dtype = Field(default="float32", description="activations and matrix products")
    master_weights: Dtype = Field(default="float32", description="the weights that the optimizer updates")
    gradients: Dtype = Field(default="float32", description="gradients, accumulated over microbatches")
    optimizer_states: Dtype = Field(default="float32", description="moments of the optimizer")
    router: Dtype = Field(default="float32", description="logits and affinities of the router")
    fp8: FP8 | None = Field(default=None, description="FP8 matrix products; left out: none")
