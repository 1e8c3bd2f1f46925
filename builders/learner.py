"""What learns: a model and its optimizer, at one stage of training, one optimizer step at a time."""

import math
from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelspec import schema
from modelspec.builders.balance import update_selection_biases
from modelspec.builders.build import build
from modelspec.builders.checkpoint import Checkpoint, load_model, load_optimizer
from modelspec.builders.events import FP8Shares, StepDone
from modelspec.builders.fp8 import policy_of, watched
from modelspec.builders.model import Losses, LossWeights, Output, Transformer
from modelspec.builders.optim import AdamW, build_optimizer, clip_gradients, set_learning_rate
from modelspec.builders.recompute import recompute
from modelspec.kernels.fp8_health import Health
from modelspec.layout import microbatch_size
from modelspec.timeline import Step, stage_spec


class Learner:
    """The model of a stage and the optimizer that updates it."""

    def __init__(self, spec: schema.ModelSpec, training: schema.Training, device: torch.device, stage: int = 0) -> None:
        self.spec, self.training, self.device, self.stage = spec, training, device, stage
        self.model, self.optimizer = self._built(stage)

    def restore(self, checkpoint: Checkpoint, *, convert: bool) -> None:
        """Takes the checkpoint's values. Raises Refused where they do not fit; `convert` lets dtypes differ."""
        load_model(checkpoint, self.model, convert=convert)
        load_optimizer(checkpoint, self.model, self.optimizer, convert=convert)

    def enter(self, stage: int) -> None:
        """Goes over to another stage: another rotary scaling perhaps, the same parameters and moments."""
        if stage == self.stage:
            return
        old_model, old_optimizer, self.stage = self.model, self.optimizer, stage
        self.model, self.optimizer = self._built(stage)
        self.model.load_state_dict(old_model.state_dict())
        for old, new in zip(old_model.parameters(), self.model.parameters(), strict=True):
            if old in old_optimizer.state:
                self.optimizer.state[new] = old_optimizer.state[old]

    def step(self, step: Step, batch: Tensor) -> StepDone:
        """One optimizer step on `batch`, int64 [batch_size, sequence_length + 1]: each token's target follows it."""
        began = perf_counter()
        health = Health(self.device) if policy_of(self.model) else None
        losses, counts = self._accumulate(step, batch, health)
        norm = clip_gradients(self.model, self.training.gradient_clip)
        skipped = not (math.isfinite(norm) and math.isfinite(losses["loss"]))
        if not skipped:
            set_learning_rate(self.optimizer, step.learning_rate)
            self.optimizer.step()
            update_selection_biases(self.model, counts, step.bias_update_speed)
        self.optimizer.zero_grad()
        seconds = perf_counter() - began
        tokens = step.batch_size * step.sequence_length
        return StepDone(
            step=step.index + 1,
            tokens=step.tokens + tokens,
            loss=losses["loss"],
            lm_loss=losses["lm"],
            mtp_loss=losses.get("mtp"),
            balance_loss=losses.get("balance"),
            grad_norm=norm,
            learning_rate=step.learning_rate,
            expert_load=_load(counts),
            skipped=skipped,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            fp8=None if health is None else fp8_shares(health),
        )

    @torch.no_grad()
    def evaluate(self, windows: NDArray[np.int64], size: int, check: Callable[[], None]) -> float:
        """Mean cross-entropy of the next token over windows [windows, length + 1], `size` at a time; nats per token.

        What `check`, called before each forward pass, raises ends it.
        """
        total = 0.0
        self.model.eval()
        try:
            for part in torch.from_numpy(windows).split(size):
                check()
                _, losses = self._forward(part, LossWeights())
                total += float(losses.lm) * len(part)
        finally:
            self.model.train()
        return total / len(windows)

    def _built(self, stage: int) -> tuple[Transformer, AdamW]:
        spec = stage_spec(self.spec, stage)
        model = build(spec, device=self.device, seed=self.training.seed)
        recompute(model, spec.parallelism.recompute)
        if spec.parallelism.compile == "layer":
            for layer in model.layers.children():
                layer.compile()
        if (policy := policy_of(model)) is not None:
            policy.versions_tell = True
        return model, build_optimizer(model, self.training.optimizer, spec.precision)

    def _accumulate(
        self, step: Step, batch: Tensor, health: Health | None = None
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Leaves the gradients of the batch's mean loss; gives its losses, and tokens per expert by router.

        Every microbatch counts by its share of the batch: all targets are valid, so the sum is the mean over all.
        `health` counts what FP8 loses in the first.
        """
        weights = LossWeights(mtp=step.mtp_weight, balance=step.balance_weight)
        size = microbatch_size(self.model.spec.parallelism, step.batch_size)
        losses: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for index, part in enumerate(batch.split(size)):
            share = len(part) / len(batch)
            with watched(self.model, health if index == 0 else None):
                output, parts = self._forward(part, weights)
                assert output.loss is not None
                (output.loss * share).backward()
            for name, loss in (("loss", output.loss), ("lm", parts.lm), ("mtp", parts.mtp), ("balance", parts.balance)):
                if loss is not None:
                    losses[name] = losses.get(name, torch.zeros_like(loss)) + loss.detach() * share
            for name, count in output.expert_counts.items():
                counts[name] = counts[name] + count if name in counts else count
        # One copy from the device, not one per loss.
        values = torch.stack(list(losses.values())).tolist()
        return dict(zip(losses, values, strict=True)), counts

    def _forward(self, windows: Tensor, weights: LossWeights) -> tuple[Output, Losses]:
        windows = windows.to(self.device)
        output = self.model(windows[:, :-1], windows[:, 1:], loss_weights=weights)
        assert output.losses is not None
        return output, output.losses


def _load(counts: Mapping[str, Tensor]) -> float | None:
    """The busiest expert's tokens over the mean, averaged over routers."""
    if not counts:
        return None
    return float(torch.stack([count.max() / count.float().mean() for count in counts.values()]).mean())


def fp8_shares(health: Health) -> FP8Shares | None:
    """What FP8 lost, of each kind of tensor; None where nothing was counted, as in compiled layers."""
    if not health.has_counted("activation", "gradient"):
        return None
    saturation, underflow = health.saturation(), health.underflow()
    return FP8Shares(
        fp8_activation_saturation=saturation["activation"],
        fp8_activation_underflow=underflow["activation"],
        fp8_weight_saturation=saturation["weight"],
        fp8_weight_underflow=underflow["weight"],
        fp8_gradient_saturation=saturation["gradient"],
        fp8_gradient_underflow=underflow["gradient"],
    )
