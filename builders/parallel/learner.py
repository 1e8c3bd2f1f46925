"""One rank's part of what learns: the same steps as builders/learner.py takes alone, on a share of every batch.

A rank runs its microbatches, sums gradients with those that have its parameters in common, updates its share and hands
it on. What all must decide alike, the norm of the gradient and whether the step counts, comes out of one sum over all
ranks.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.balance import update_selection_biases
from modelspec.builders.checkpoint import OPTIMIZER, Checkpoint, Position, require_same
from modelspec.builders.events import StepDone
from modelspec.builders.fp8 import policy_of, watched
from modelspec.builders.inputs import whole_window
from modelspec.builders.learner import fp8_shares
from modelspec.builders.model import LossWeights
from modelspec.builders.optim import AdamW, optimizer_of, set_learning_rate, squares
from modelspec.builders.parallel import mesh as meshes
from modelspec.builders.parallel import saving
from modelspec.builders.parallel.context import cut, positions
from modelspec.builders.parallel.data import Part
from modelspec.builders.parallel.local import build_local
from modelspec.builders.parallel.pieces import Piece
from modelspec.builders.parallel.pipeline import OneAfterAnother, Passes, Pipelined
from modelspec.builders.parallel.saving import Contents, Values, contents, read_piece, stored_in
from modelspec.builders.parallel.stage import Tally, packed
from modelspec.builders.parallel.world import World
from modelspec.builders.tensor_files import Stored
from modelspec.builders.weights import Weights, fill
from modelspec.kernels.fp8_health import Health
from modelspec.kernels.linear_cross_entropy import IGNORE
from modelspec.layout import microbatch_size, microbatches
from modelspec.timeline import Step, stage_spec

_LOSSES = ("lm", "mtp", "balance")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DistributedLearner:
    """The stages of this rank and the optimizer of its share, at one stage of training."""

    def __init__(self, spec: schema.ModelSpec, training: schema.Training, device: torch.device, stage: int = 0) -> None:
        self.training, self.device, self.stage = training, device, stage
        self.spec = stage_spec(spec, stage)
        self.mesh = meshes.mesh(self.spec.parallelism)
        self.local = build_local(self.spec, self.mesh, device, training.seed)
        parts = self.local.data.parts()
        self.weights = [nn.Parameter(part.weight) for part in parts]
        self.optimizer: AdamW = optimizer_of(
            [(part.name, len(part.piece.shape), weight) for part, weight in zip(parts, self.weights, strict=True)],
            training.optimizer,
            self.spec.precision,
        )
        self._passes: dict[tuple[int, int, int], Passes] = {}

    def restore(self, checkpoint: Checkpoint, *, convert: bool) -> None:
        """Takes its elements of the checkpoint's values. Raises Refused where these do not fit; `convert` lets dtypes
        differ.
        """
        model, moments = stored_in(checkpoint)
        updated = {name.removesuffix(".step") for name in moments if name.endswith(".step")}
        wanted = contents(self.spec, updated)
        require_same(checkpoint.path, model, wanted.model, shapes_only=convert)
        require_same(checkpoint.path / OPTIMIZER, moments, wanted.optimizer, shapes_only=convert)
        with torch.no_grad():
            for part, weight in zip(self.local.data.parts(), self.weights, strict=True):
                part.weight.copy_(read_piece(model[part.name], part.piece).view_as(part.weight))
                if part.name in updated:
                    self.optimizer.state[weight] = {
                        "step": moments[f"{part.name}.step"].read().to(self.device, torch.float32),
                        **{key: self._moment(moments[f"{part.name}.{key}"], part) for key in _MOMENTS},
                    }
            for name, (buffer, piece) in self.local.buffers.items():
                buffer.copy_(read_piece(model[name], piece).view_as(buffer))
            self.local.data.publish()

    def _moment(self, stored: Stored, part: Part) -> Tensor:
        moment = torch.empty_like(part.weight, dtype=self.optimizer.state_dtype)
        return moment.copy_(read_piece(stored, part.piece).view_as(moment))

    def save(self, folder: Path, position: Position, texts: Mapping[str, str], world: World) -> Checkpoint:
        """Writes `folder`/step-N together with all ranks. Raises EnvironmentFailed on all of them."""
        model, moments = [], []
        for part, weight in zip(self.local.data.parts(), self.weights, strict=True):
            model.append(Values(part.name, part.piece, part.weight, part.owns))
            state = self.optimizer.state.get(weight)
            if not state:
                continue
            for key in _MOMENTS:
                moments.append(Values(f"{part.name}.{key}", part.piece, state[key], part.owns))
            begins = part.piece.first == 0 and not any(part.piece.start)
            moments.append(Values(f"{part.name}.step", Piece.whole(()), state["step"], part.owns and begins))
        for name, (buffer, piece) in self.local.buffers.items():
            model.append(Values(name, piece, buffer, self.mesh.peers.rank == 0))
        whole = self.contents() if self.optimizer.state else contents(self.spec, ())
        return saving.save(folder, position, whole, model, moments, texts, world)

    def contents(self) -> Contents:
        """What a checkpoint holds once a step was taken."""
        parameters = [name for name, tensor in self.spec.tensors().items() if tensor.kind == "parameter"]
        return contents(self.spec, filter(schema.is_learnt, parameters))

    @torch.no_grad()
    def start_from(self, weights: Weights) -> None:
        """Takes its elements of the weights that the model has a place for; FP8 is multiplied out.

        Only rows with elements of this rank are held, those of one tensor at a time.
        """
        places = [(part.name, part.piece, part.weight) for part in self.local.data.parts()]
        places += [(name, piece, buffer) for name, (buffer, piece) in self.local.buffers.items()]
        for name, piece, place in places:
            if name in weights.parts:
                first, mine = piece.among_rows()
                rows = torch.empty(mine.shape, dtype=place.dtype)
                fill(rows, weights.parts[name], first * math.prod(piece.shape[1:]))
                place.copy_(mine.of(rows).view_as(place))
        self.local.data.publish()

    def rows(self, batch_size: int) -> range:
        """The sequences of a batch that this rank computes."""
        each = batch_size // self.mesh.data.size
        return range(self.mesh.data.rank * each, (self.mesh.data.rank + 1) * each)

    def step(self, step: Step, batch: Tensor) -> StepDone:
        """One optimizer step on `batch`, int64 [rows, sequence_length + 1], this rank's rows of the global batch."""
        began = perf_counter()
        count = microbatches(self.spec.parallelism, step.batch_size)
        tally = Tally(LossWeights(mtp=step.mtp_weight, balance=step.balance_weight), 1 / (count * self.mesh.data.size))
        self.local.data.clear()
        ids, health = self._ids(batch), Health(self.device) if self.spec.precision.fp8 is not None else None
        with self._watched(health):
            self._through(ids, tally, count).learn(ids)
        self.local.data.reduce()
        counts = self._counts(tally)
        sums = self._sums(tally, counts, health)
        norm, loss = math.sqrt(sums["squares"]), sums["lm"] + step.mtp_weight * sums["mtp"] + sums["balance"]
        skipped = not (math.isfinite(norm) and math.isfinite(loss))
        if not skipped:
            self._update(step, norm)
            for stage in self.local.stages.values():
                update_selection_biases(stage, counts, step.bias_update_speed)
        seconds = perf_counter() - began
        tokens = step.batch_size * step.sequence_length
        routers = sums["routers"]
        return StepDone(
            step=step.index + 1,
            tokens=step.tokens + tokens,
            loss=loss,
            lm_loss=sums["lm"],
            mtp_loss=sums["mtp"] if self.spec.model.mtp else None,
            balance_loss=sums["balance"] if routers else None,
            grad_norm=norm,
            learning_rate=step.learning_rate,
            expert_load=sums["load"] / routers if routers else None,
            skipped=skipped,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            fp8=None if health is None else fp8_shares(health),
        )

    @contextmanager
    def _watched(self, health: Health | None) -> Iterator[None]:
        """Lets `health`, if any, count what FP8 loses in the stages here."""
        with ExitStack() as stack:
            for stage in self.local.stages.values():
                stack.enter_context(watched(stage, health))
            yield

    @torch.no_grad()
    def evaluate(self, windows: NDArray[np.int64], size: int) -> float:
        """Mean cross-entropy of the next token over windows [windows, length + 1]; nats per token.

        `size` is a batch of training: as many go at a time.
        """
        count = max(microbatches(self.spec.parallelism, size), 1)
        rows = count * microbatch_size(self.spec.parallelism, size)
        tally = Tally(LossWeights(), rows / count / len(windows))
        for stage in self.local.stages.values():
            stage.eval()
        try:
            for part in torch.from_numpy(windows).split(rows * self.mesh.data.size):
                ids = _filled(self._ids(part[self.mesh.data.rank * rows :][:rows]), rows)
                self._through(ids, tally, count).read(ids)
        finally:
            for stage in self.local.stages.values():
                stage.train()
        return self._sums(tally, {})["lm"]

    def _ids(self, batch: Tensor) -> Tensor:
        """Tokens, targets and those further on, of the positions that are here, [rows, kinds, positions]."""
        batch = batch.to(self.device)
        depth = self.spec.model.mtp.depth if self.spec.model.mtp else 0
        window = whole_window(batch[:, :-1], batch[:, 1:], depth)
        return cut(packed(window), 2, self.mesh.context)

    def _through(self, ids: Tensor, tally: Tally, count: int) -> Passes:
        """The passes for batches of this shape, the stages ready to tally them."""
        rows, _, length = ids.shape
        for stage in self.local.stages.values():
            stage.tally = tally
            stage.positions = positions(length * self.mesh.context.size, self.mesh.context).to(self.device)
        key = (count, rows, length)
        if key not in self._passes:
            self._passes[key] = (
                Pipelined(self.local, self.mesh, self.spec.parallelism.pipeline.schedule, count, rows // count, length)
                if self.mesh.pipeline.size > 1
                else OneAfterAnother(self.local, count)
            )
        return self._passes[key]

    def _counts(self, tally: Tally) -> dict[str, Tensor]:
        """Tokens per expert of the routers here, over the global batch."""
        names = sorted(tally.counts)
        if not names or self.mesh.peers.group is None:
            return tally.counts
        flat = torch.cat([tally.counts[name] for name in names])
        dist.all_reduce(flat, group=self.mesh.peers.group)
        sizes = [len(tally.counts[name]) for name in names]
        return dict(zip(names, flat.split(sizes), strict=True))

    def _sums(self, tally: Tally, counts: dict[str, Tensor], health: Health | None = None) -> dict[str, float]:
        """Losses, squares of the gradient and what routers did, each summed over the world in one go; `health` has
        that of all ranks afterwards.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        # Ranks of a tensor group compute the same cross-entropy, those of a pipeline rank have the same counts.
        alike = {"lm": self.mesh.tensor.size, "mtp": self.mesh.tensor.size, "balance": 1}
        values = [tally.losses.get(name, zero) / alike[name] for name in _LOSSES]
        parts = [
            squares(part.gradient) / part.copies
            for part in self.local.data.parts()
            if part.counts and part.gradient is not None
        ]
        values.append(torch.stack(parts).sum() if parts else zero)
        loads = [count.max() / count.double().mean() for count in counts.values()]
        peers = self.mesh.peers.size
        values += [torch.stack(loads).sum() / peers if loads else zero, zero + len(loads) / peers]
        total = torch.stack(values)
        if health is not None:
            total = torch.cat((total, health.counts.flatten()))
        if self.mesh.world.group is not None:
            dist.all_reduce(total, group=self.mesh.world.group)
        if health is not None:
            health.counts = total[len(values) :].to(torch.int64).view_as(health.counts)
        return dict(zip((*_LOSSES, "squares", "load", "routers"), total[: len(values)].tolist(), strict=True))

    def _update(self, step: Step, norm: float) -> None:
        limit = self.training.gradient_clip
        for part, weight in zip(self.local.data.parts(), self.weights, strict=True):
            if limit is not None and norm > limit and part.gradient is not None:
                part.gradient.mul_(limit / norm)
            weight.grad = part.gradient
        set_learning_rate(self.optimizer, step.learning_rate)
        self.optimizer.step()
        self.local.data.publish()
        for stage in self.local.stages.values():
            if (policy := policy_of(stage)) is not None:
                policy.weights_changed()


def _filled(ids: Tensor, rows: int) -> Tensor:
    """Packed ids with so many rows: those that were missing have no targets and add nothing to a loss."""
    missing = ids.new_zeros(rows - len(ids), *ids.shape[1:])
    missing[:, 1::2] = IGNORE
    return torch.cat((ids, missing))
