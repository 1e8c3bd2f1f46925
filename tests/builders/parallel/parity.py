"""One process and many: the same losses, gradients and weights, whatever the layout.

`reference` takes steps of plain gradient descent with the whole model in one process and keeps what came of them;
`compare` takes them on the ranks of a layout and holds every element there against it. Descent is plain so that a
gradient of the wrong scale cannot hide, as it would in AdamW.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelspec.builders import build
from modelspec.builders.balance import update_selection_biases
from modelspec.builders.model import LossWeights
from modelspec.builders.parallel.learner import DistributedLearner
from modelspec.builders.parallel.stage import Tally
from modelspec.kernels.op import Form, use
from modelspec.layout import microbatches
from modelspec.schema import ModelSpec

RATE, SPEED, WEIGHTS = 0.1, 0.01, LossWeights(mtp=0.3, balance=0.05)


@dataclass(frozen=True)
class Taken:
    """What one step came to: weights and buffers before it, losses by name, the gradient's norm, gradients and, after
    it, weights and buffers.
    """

    before: dict[str, Tensor]
    losses: dict[str, float]
    norm: float
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def batches(spec: ModelSpec, size: int, length: int, steps: int) -> list[Tensor]:
    """Random windows, [size, length + 1]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, spec.model.vocab_size, (size, length + 1), generator=generator) for _ in range(steps)]


def reference(spec: ModelSpec, data: list[Tensor], start: dict[str, Tensor] | None = None) -> list[Taken]:
    """The steps in one process, in one microbatch."""
    model = build(spec.model_copy(update={"parallelism": type(spec.parallelism)()}), seed=0)
    if start:
        model.load_state_dict(start, strict=False)
    taken = []
    for batch in data:
        before = _state(model)
        model.zero_grad()
        out = model(batch[:, :-1], batch[:, 1:], loss_weights=WEIGHTS)
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=RATE)
        update_selection_biases(model, out.expert_counts, SPEED)
        named = {"lm": out.losses.lm, "mtp": out.losses.mtp, "balance": out.losses.balance}
        losses = {name: float(loss.detach()) for name, loss in named.items() if loss is not None}
        taken.append(Taken(before, losses, float(norm), gradients, _state(model)))
    return taken


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def compare(
    spec: ModelSpec,
    data: list[Tensor],
    wanted: list[Taken],
    *,
    losses: float,
    gradients: float,
    form: Form = "fastest",
    start: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Takes the steps on this rank of the spec's layout; the largest relative differences found, over all ranks.

    Raises AssertionError where one is larger than it may be, or elements are missing.
    """
    assert spec.training is not None
    with use(form):
        learner = DistributedLearner(spec, spec.training, torch.device("cpu"))
        if start is not None:
            _begin(learner, start)
        different = [name for name, truth, value in _places(learner, wanted[0].before) if not torch.equal(value, truth)]
        assert not different, f"{', '.join(different)} do not begin with the same bits"
        worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weight": 0.0}
        for batch, step in zip(data, wanted, strict=True):
            found, norm = _descend(learner, batch)
            for name, value in step.losses.items():
                worst["loss"] = max(worst["loss"], abs(found[name] - value) / max(abs(value), 1e-12))
            worst["norm"] = max(worst["norm"], abs(norm - step.norm) / step.norm)
            worst["gradient"] = max(worst["gradient"], _gradients_differ(learner, step))
            _update(learner)
            worst["weight"] = max(worst["weight"], _state_differs(learner, step))
    bounds = {"loss": losses, "norm": losses * 10, "gradient": gradients, "weight": gradients}
    told = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    assert all(worst[name] <= bound for name, bound in bounds.items()), told
    return worst


def _begin(learner: DistributedLearner, start: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for part in learner.local.data.parts():
            if part.name in start:
                part.weight.copy_(part.piece.of(start[part.name]).view_as(part.weight))
        for name, (buffer, piece) in learner.local.buffers.items():
            if name in start:
                buffer.copy_(piece.of(start[name]))
        learner.local.data.publish()


def _descend(learner: DistributedLearner, batch: Tensor) -> tuple[dict[str, float], float]:
    count = microbatches(learner.spec.parallelism, len(batch))
    rows = learner.rows(len(batch))
    tally = Tally(WEIGHTS, 1 / (count * learner.mesh.data.size))
    learner.local.data.clear()
    ids = learner._ids(batch[rows.start : rows.stop])
    learner._through(ids, tally, count).learn(ids)
    learner.local.data.reduce()
    counts = learner._counts(tally)
    sums = learner._sums(tally, counts)
    for stage in learner.local.stages.values():
        update_selection_biases(stage, counts, SPEED)
    return sums, sums["squares"] ** 0.5


def _update(learner: DistributedLearner) -> None:
    with torch.no_grad():
        for part in learner.local.data.parts():
            if part.gradient is not None:
                part.weight.sub_(part.gradient, alpha=RATE)
        learner.local.data.publish()


def _gradients_differ(learner: DistributedLearner, wanted: Taken) -> float:
    """The largest relative norm of a difference, over all parameters of the whole model; all elements must be there."""
    found: dict[str, tuple[float, float]] = {}
    for part in learner.local.data.parts():
        if part.gradient is None:
            continue
        truth = part.piece.of(wanted.gradients[part.name]).flatten()
        difference = float((part.gradient.flatten().double() - truth.double()).square().sum())
        elements = part.piece.numel / part.copies if part.counts else 0.0
        before = found.get(part.name, (0.0, 0.0))
        found[part.name] = before[0] + difference, before[1] + elements
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    worst = 0.0
    for name, gradient in wanted.gradients.items():
        here = [each[name] for each in everywhere if name in each]
        elements = sum(each[1] for each in here)
        assert abs(elements - gradient.numel()) < 1e-6, f"{name}: {elements} of {gradient.numel()} elements"
        norm = float(gradient.double().norm())
        worst = max(worst, sum(each[0] for each in here) ** 0.5 / max(norm, 1e-12))
    return worst


def _state_differs(learner: DistributedLearner, wanted: Taken) -> float:
    """The largest relative norm of a difference between what is here and the same elements of the whole model."""
    worst = 0.0
    for _, truth, value in _places(learner, wanted.state):
        difference = (value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-6)
        worst = max(worst, float(difference))
    total = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return float(total)


def _places(learner: DistributedLearner, whole: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of all that is here: its name, the same elements of the whole model, and itself."""
    places = [(part.name, part.piece, part.weight.detach()) for part in learner.local.data.parts()]
    places += [(name, piece, buffer) for name, (buffer, piece) in learner.local.buffers.items()]
    for name, piece, value in places:
        yield name, piece.of(whole[name]).flatten(), value.flatten()
