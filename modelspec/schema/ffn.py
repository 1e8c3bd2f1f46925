"""The feed-forward half of a layer: one dense network, or many experts of which a router picks a few per token."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from modelspec.schema.base import (
    UNIQUE,
    AsSet,
    AsTuple,
    Count,
    NonNegative,
    Positive,
    Strict,
    Tensors,
    TensorSpec,
    Width,
    linear,
    under,
)


class SwiGLU(Strict):
    """down(g * sigmoid(alpha * g) * (up + up_offset)) with g = gate(x) and up = up(x) (arXiv 2002.05202).

    With a limit, g is cut above it, and up on both sides.
    """

    type: Literal["swiglu"] = Field(description="gated linear unit with the SiLU gate")
    alpha: Positive = Field(default=1.0, description="steepness of the gate's sigmoid; no unit", examples=[1.702])
    limit: Positive | None = Field(
        default=None, description="largest gate, and largest up of either sign; no unit. Left out: none", examples=[7.0]
    )
    up_offset: NonNegative = Field(default=0.0, description="added to up; no unit", examples=[1.0])


Activation = SwiGLU
Biases = Annotated[tuple[Literal["gate", "up", "down"], ...], AsTuple, AsSet]


def _swiglu_tensors(hidden_size: int, intermediate_size: int, bias: Biases = ()) -> Tensors:
    return (
        under("gate_proj", linear(intermediate_size, hidden_size, "gate" in bias))
        | under("up_proj", linear(intermediate_size, hidden_size, "up" in bias))
        | under("down_proj", linear(hidden_size, intermediate_size, "down" in bias))
    )


class Dense(Strict):
    """One feed-forward network that every token passes through."""

    type: Literal["dense"] = Field(description="one network for all tokens")
    intermediate_size: Width = Field(description="width between the projections; elements", examples=[18432])
    activation: Activation = Field(description="the non-linearity")
    bias: Biases = Field(default=(), description="projections with a bias", json_schema_extra=UNIQUE)

    def tensors(self, hidden_size: int) -> Tensors:
        """Gate, up and down projections."""
        return _swiglu_tensors(hidden_size, self.intermediate_size, self.bias)


class ExpertGroups(Strict):
    """Routing limited to the best groups of experts, so that a token's experts stand on few nodes.

    Groups are contiguous ranges of expert indices.
    """

    num: Count = Field(description="groups that the experts are cut into; divides num_experts", examples=[8])
    topk: Count = Field(description="groups that one token may use", examples=[4])
    score: Literal["top2_sum", "max"] = Field(
        description="score of a group: the sum of its two best experts' scores, or its best expert's"
    )


class TopK(Strict):
    """The experts with the highest scores."""

    type: Literal["topk"] = Field(description="the highest scores win")
    bias: bool = Field(
        default=False,
        description="add a bias per expert to the scores, for the choice only; moved after each step towards even load",
    )
    groups: ExpertGroups | None = Field(
        default=None, description="limit to the best groups; left out: all experts compete"
    )


Selection = TopK


class Router(Strict):
    """Which experts a token uses, and with what weights (arXiv 2412.19437, equations 12 to 16)."""

    score: Literal["softmax", "sigmoid"] = Field(description="from logits to affinities; over all experts for softmax")
    selection: Selection = Field(description="how the experts of a token are chosen")
    bias: bool = Field(default=False, description="add a learned bias per expert to the logits")
    renormalize: bool = Field(description="divide the weights of the chosen experts by their sum")
    scale: Positive = Field(
        default=1.0, description="factor on the weights, after renormalisation; no unit", examples=[2.5]
    )

    def tensors(self, hidden_size: int, num_experts: int) -> Tensors:
        """The gate, and the selection bias: an FP32 buffer, counted with the parameters of the model."""
        table = linear(num_experts, hidden_size, self.bias)
        if self.selection.bias:
            table["selection_bias"] = TensorSpec((num_experts,), kind="buffer", dtype="float32", initial="zeros")
        return table


class SharedExperts(Strict):
    """Experts that every token uses, computed as one network of their joint width."""

    num: Count = Field(description="shared experts", examples=[1])
    intermediate_size: Width | None = Field(
        default=None, description="width of one shared expert; elements. Left out: that of a routed expert"
    )
    gate: bool = Field(
        default=False, description="their output times the sigmoid of one learned product with the input"
    )


class MoE(Strict):
    """Mixture of fine-grained experts with shared ones (DeepSeekMoE, arXiv 2401.06066). No token is dropped."""

    type: Literal["moe"] = Field(description="mixture of experts")
    num_experts: Count = Field(description="routed experts", examples=[256])
    num_experts_per_tok: Count = Field(description="routed experts that one token uses", examples=[8])
    intermediate_size: Width = Field(description="width of one routed expert; elements", examples=[2048])
    activation: Activation = Field(description="the non-linearity inside an expert")
    bias: Biases = Field(
        default=(),
        description="projections with a bias, in every expert; gate and up go together",
        json_schema_extra=UNIQUE,
    )
    shared_experts: SharedExperts | None = Field(default=None, description="experts for all tokens; left out: none")
    router: Router = Field(description="choice and weights of the experts")

    @property
    def shared_width(self) -> int:
        """Joint width of the shared experts, 0 without any."""
        if self.shared_experts is None:
            return 0
        return self.shared_experts.num * (self.shared_experts.intermediate_size or self.intermediate_size)

    def tensors(self, hidden_size: int) -> Tensors:
        """The router, the routed experts stacked (gate rows, then up rows), the shared network."""
        experts, width, used = self.num_experts, self.intermediate_size, self.num_experts_per_tok
        table = under("router", self.router.tensors(hidden_size, experts))
        table["experts.gate_up_proj"] = TensorSpec((experts, 2 * width, hidden_size), experts_per_token=used)
        table["experts.down_proj"] = TensorSpec((experts, hidden_size, width), experts_per_token=used)
        if "gate" in self.bias:
            table["experts.gate_up_bias"] = TensorSpec((experts, 2 * width), experts_per_token=used, initial="zeros")
        if "down" in self.bias:
            table["experts.down_bias"] = TensorSpec((experts, hidden_size), experts_per_token=used, initial="zeros")
        if self.shared_experts is not None:
            table |= under("shared_experts", _swiglu_tensors(hidden_size, self.shared_width, self.bias))
            if self.shared_experts.gate:
                table |= under("shared_gate", linear(1, hidden_size))
        return table


FFN = Annotated[Dense | MoE, Discriminator("type")]
