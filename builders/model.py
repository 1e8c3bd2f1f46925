"""The model: embedding, layers, final norm, head; and multi-token prediction beside it while training.

Single-device code. It knows nothing of ranks, files or schedules: what changes during training comes in as arguments
(`loss_weights`), and what others need to know of a step comes out as values (`expert_counts`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelspec import schema
from modelspec.builders.attention import rotary_of
from modelspec.builders.block import Block
from modelspec.builders.ffn.moe import Routing, sequence_balance_loss
from modelspec.builders.inputs import Window, require_inputs, whole_window
from modelspec.builders.layers import Linear, build_norm
from modelspec.builders.mtp import MTPModule
from modelspec.builders.rope import Rotary
from modelspec.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Factors of the losses beside the main one."""

    mtp: float = 0.0
    balance: float = 0.0


@dataclass(frozen=True, slots=True)
class Losses:
    """Parts of the loss, each a scalar: `lm` and `mtp` are unweighted means, `balance` has its factor."""

    lm: Tensor
    mtp: Tensor | None = None
    balance: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What a forward pass gives: logits [batch, sequence, vocab] in at least FP32, or losses, or both."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    losses: Losses | None = None
    # Tokens per expert of each router, int64 [experts], by the router's name.
    expert_counts: dict[str, Tensor] = field(default_factory=dict)


class Decoder(nn.Module):
    """The parts of a language model as its spec describes it, and what each computes."""

    layers: nn.ModuleList | nn.ModuleDict

    def __init__(self, spec: schema.ModelSpec, compute_dtype: torch.dtype, router_dtype: torch.dtype) -> None:
        super().__init__()
        model = spec.model
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        runs = list(model.expanded_layers())
        self.variants = [run.attention for run in runs]
        self.layers = nn.ModuleList(Block(model, run, router_dtype) for run in runs)
        self.norm = build_norm(model.norm, model.hidden_size)
        if not model.tie_embeddings:
            self.lm_head = Linear(model.hidden_size, model.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(model, router_dtype) for _ in range(model.mtp.depth if model.mtp else 0))
        self.mtp_variant = model.mtp_layer().attention

    def head_weight(self) -> Tensor:
        """The weight of the output head, [vocab, hidden]: the embedding's where they are tied."""
        return self.embed_tokens.weight if self.spec.model.tie_embeddings else self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [batch, sequence] -> what the first layer takes, [batch, sequence, hidden] in the compute dtype."""
        return F.embedding(tokens, self.embed_tokens.weight).to(self.compute_dtype)

    def run_layers(self, x: Tensor, rotaries: Mapping[str, Rotary | None], routings: dict[str, Routing]) -> Tensor:
        """x [batch, sequence, hidden] through all layers; what their routers did joins `routings` by their names."""
        for index, layer in self.layers.named_children():
            x, routing = layer(x, rotaries[self.variants[int(index)]])
            if routing is not None:
                routings[f"layers.{index}.ffn.router"] = routing
        return x

    def cross_entropy(self, x: Tensor, targets: Tensor, ahead: int = 0) -> Tensor:
        """Mean cross-entropy over valid targets, of which a window's last `ahead` are none; 0 where there are none."""
        total = linear_cross_entropy(x.flatten(0, 1), self.head_weight().to(x.dtype), targets.flatten())
        return total / (targets != IGNORE).sum().clamp(min=1)

    def multi_token_loss(
        self, hidden: Tensor, window: Window, rotaries: Mapping[str, Rotary | None], routings: dict[str, Routing]
    ) -> Tensor:
        """Mean over depths; each module's routing joins `routings`."""
        losses = []
        for index, (module, (tokens, targets)) in enumerate(zip(self.mtp, window.ahead, strict=True)):
            hidden, routing = module(hidden, self.embed(tokens), rotaries[self.mtp_variant])
            if routing is not None:
                routings[f"mtp.{index}.block.ffn.router"] = routing
            losses.append(self.cross_entropy(hidden, targets, index + 1))
        return torch.stack(losses).mean()

    def balance_loss(self, weight: float, routings: list[Routing]) -> Tensor:
        """Summed over layers, with its factor; not computed where that is 0."""
        if weight == 0.0:
            return routings[0].affinities.new_zeros(())
        each = [sequence_balance_loss(routing.by_sequence(), routing.k) for routing in routings]
        return weight * torch.stack(each).sum()

    def rotaries(self, positions: Tensor) -> dict[str, Rotary | None]:
        """Rotary tables by attention variant for positions [sequence], each made once per forward pass."""
        variants = self.spec.model.attention
        used = {*self.variants, self.mtp_variant}
        return {name: rotary_of(variants[name], positions, self.compute_dtype) for name in used}


class Transformer(Decoder):
    """A decoder-only language model as its spec describes it."""

    def __init__(self, spec: schema.ModelSpec, compute_dtype: torch.dtype, router_dtype: torch.dtype) -> None:
        super().__init__(spec, compute_dtype, router_dtype)
        self.default_loss_weights = LossWeights()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        loss_weights: LossWeights | None = None,
        return_logits: bool = False,
    ) -> Output:
        """tokens and targets [batch, sequence] int64; targets[b, t] follows tokens[b, t], -100 is ignored.

        Without targets only logits are computed. With them, logits are None unless `return_logits`.
        Raises ValueError for tokens or targets of another kind, longer than the model's positions, or, on the CPU
        and not compiled, outside of the vocabulary.
        """
        require_inputs(tokens, targets, self.spec.model)
        window = whole_window(tokens, targets, len(self.mtp))
        rotaries = self.rotaries(window.positions)
        routings: dict[str, Routing] = {}
        x = self.norm(self.run_layers(self.embed(window.tokens), rotaries, routings))
        logits = self._logits(x) if targets is None or return_logits else None
        if window.targets is None:
            return Output(logits=logits, expert_counts={name: routing.counts for name, routing in routings.items()})

        weights = loss_weights or self.default_loss_weights
        lm = self.cross_entropy(x, window.targets)
        mtp = self.multi_token_loss(x, window, rotaries, routings) if self.mtp else None
        loss = lm if mtp is None else lm + weights.mtp * mtp
        balance = None
        if routings:
            balance = self.balance_loss(weights.balance, list(routings.values()))
            loss = loss + balance
        counts = {name: routing.counts for name, routing in routings.items()}
        return Output(logits, loss, Losses(lm, mtp, balance), counts)

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.head_weight().to(x.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
