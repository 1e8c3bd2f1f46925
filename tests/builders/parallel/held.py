"""What a rank holds and sends in one step of training, measured: state, what autograd keeps, bytes of collectives.

State is the storages that are there at its fullest: parameters and gradients after every pass and around the sums of
gradients, moments after the update. What autograd keeps is seen by saved-tensor hooks, each storage counted from its
first use to its last. Parts of a model that are computed again have hooks of their own: there all storages count that a
forward pass made and that outlive it. The routers' choice is made even, since plan counts the mean.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelspec.builders.ffn.router import Router
from modelspec.builders.parallel.data import Flat, Together
from modelspec.builders.parallel.learner import DistributedLearner
from modelspec.builders.parallel.mesh import Mesh
from modelspec.builders.parallel.sharded import groups_of
from modelspec.builders.parallel.stage import Stage
from modelspec.schema import ModelSpec
from modelspec.timeline import timeline
from tests.builders.parallel.bytes import Sent
from tests.builders.parallel.parity import batches


@dataclass
class Held:
    """Bytes on one rank at their most, and those that it sends in one step, by "axis collective"."""

    parameters: int = 0
    gradients: int = 0
    moments: int = 0
    counters: int = 0
    activations: int = 0
    sent: dict[str, int] = field(default_factory=dict)


def measure(spec: ModelSpec, batch: int, length: int) -> Held:
    """The second of two steps of a spec's layout, on this rank."""
    assert spec.training is not None
    with mock.patch.object(Router, "choose", even_choice):
        learner = DistributedLearner(spec, spec.training, torch.device("cpu"))
        first, second = batches(spec, batch, length, 2)
        rows, (step, later) = learner.rows(batch), islice(timeline(spec.training), 2)
        found, kept = Held(), Kept()
        for stage in learner.local.stages.values():
            stage.register_forward_hook(lambda *_: _most(found, learner))
        learner.step(step, first[rows.start : rows.stop])
        kept.own = _own(learner)
        learn, reduce, passes, rest = learner._through, learner.local.data.reduce, Sent(), Sent()

        def through(*args: Any) -> Any:
            return _Watched(learn(*args), kept, passes)

        def reduced() -> None:
            _most(found, learner)
            reduce()
            _most(found, learner)

        def backward(stage: PipelineStage, *args: Any, **kwargs: Any) -> None:
            passed(stage, *args, **kwargs)
            _most(found, learner)

        passed = PipelineStage.backward_one_chunk
        made = [Made(stage, kept) for stage in learner.local.stages.values() if spec.parallelism.recompute]
        with ExitStack() as within:
            within.enter_context(mock.patch.object(learner, "_through", through))
            within.enter_context(mock.patch.object(learner.local.data, "reduce", reduced))
            within.enter_context(mock.patch.object(PipelineStage, "backward_one_chunk", backward))
            for mode in (rest, *made):
                within.enter_context(mode)
            learner.step(later, second[rows.start : rows.stop])
        found.activations = kept.most
        found.sent = _by_axis(passes, rest, learner.mesh)
        states = learner.optimizer.state.values()
        found.moments = sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
        found.counters = sum(state["step"].nbytes for state in states)
        return found


def even_choice(router: Router, affinities: Tensor) -> Tensor:
    """Experts of each token, int64 [tokens, k], in turn: as many pairs for each, within as few groups as may be."""
    tokens, experts = affinities.shape
    k, groups = router.num_experts_per_tok, router.spec.selection.groups
    num, used = (1, 1) if groups is None else (groups.num, groups.topk)
    size, each = experts // num, k // used
    token = torch.arange(tokens)
    chosen = []
    for group in range(used):
        place = (token * used + group) % num * size
        chosen += [place + (token * used // num + other * (size // each)) % size for other in range(each)]
    return torch.stack(chosen, dim=-1)


class _Watched:
    """The passes of a step, with what autograd keeps and what they send."""

    def __init__(self, passes: Any, kept: "Kept", sent: Sent) -> None:
        self.passes, self.kept, self.sent = passes, kept, sent

    def learn(self, ids: Tensor) -> None:
        with self.kept.watching(), self.sent:
            self.passes.learn(ids)


class Kept:
    """Bytes that autograd keeps at the moment, and the most of them so far; parameters, `own`, are none of them."""

    def __init__(self) -> None:
        self.own: set[int] = set()
        self.now = self.most = 0
        self._uses: Counter[int] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is entered."""
        with saved_tensors_hooks(self._pack, lambda each: each.tensor if isinstance(each, _Use) else each):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()._cdata
        if storage in self.own:
            return tensor
        return _Use(self, tensor if tensor.is_leaf else tensor.detach())

    def begin(self, key: int, size: int) -> None:
        self._uses[key] += 1
        if self._uses[key] == 1:
            self.now += size
            self.most = max(self.most, self.now)

    def used(self) -> set[int]:
        """Storages that are kept at the moment."""
        return {key for key, uses in self._uses.items() if uses}

    def end(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        if self._uses[key] == 0:
            self.now -= size


class Made(TorchDispatchMode):
    """While it is entered: storages that a stage's forward pass makes and that are there when it ends, as `kept`."""

    def __init__(self, stage: Stage, kept: Kept) -> None:
        super().__init__()
        self.kept = kept
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        stage.register_forward_pre_hook(lambda *_: self._made.clear())
        stage.register_forward_hook(self._ended)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def _ended(self, stage: Any, args: Any, out: Tensor) -> None:
        gc.collect()
        there = {key: size for key, (storage, size) in self._made.items() if not storage.expired()}
        seen = {*self.kept.own, *self.kept.used(), out.untyped_storage()._cdata}
        unseen = sum(size for key, size in there.items() if key not in seen)
        self.kept.most = max(self.kept.most, self.kept.now + unseen)


class _Use:
    """A tensor that an operation keeps, as long as it does."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        self.key, self.size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        kept.begin(self.key, self.size)

    def __del__(self) -> None:
        self.kept.end(self.key, self.size)


def _flats(learner: DistributedLearner) -> Iterator[Flat]:
    data = learner.local.data
    assert isinstance(data, Together)
    yield from (kind for kind in data.kinds if isinstance(kind, Flat))


def _shared(learner: DistributedLearner) -> Iterator[Any]:
    """What FSDP holds of each parameter that it divides."""
    for stage in learner.local.stages.values():
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                for group in groups_of(fully_shard.state(module)):  # type: ignore[attr-defined]
                    yield from group.fsdp_params


def _bytes(tensors: list[Any]) -> int:
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors if each is not None}
    return sum(storage.nbytes() for storage in storages.values())


def _weights(learner: DistributedLearner) -> list[Any]:
    tensors = [each for flat in _flats(learner) for each in (flat.weights, flat.master)]
    for each in _shared(learner):
        tensors += [each._sharded_param_data, *each.all_gather_outputs]
    return [*tensors, *(buffer for buffer, _ in learner.local.buffers.values())]


def _most(found: Held, learner: DistributedLearner) -> None:
    """Parameters and gradients, where there are more of them than before."""
    gradients: list[Any] = [each for flat in _flats(learner) for each in (flat.gradients, flat.summed)]
    for each in _shared(learner):
        whole = each._unsharded_param.grad if hasattr(each, "_unsharded_param") else None
        part = each.sharded_param.grad
        gradients += [whole, each.unsharded_accumulated_grad, None if part is None else part.to_local()]
    found.parameters = max(found.parameters, _bytes(_weights(learner)))
    found.gradients = max(found.gradients, _bytes(gradients))


def _own(learner: DistributedLearner) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _weights(learner)}


def _by_axis(passes: Sent, rest: Sent, mesh: Mesh) -> dict[str, int]:
    """Bytes by axis and collective. Counts of experts and sums of losses, some numbers a step, are left out."""
    found: Counter[str] = Counter()
    # Of axes with the same ranks the first: experts' own are all-to-alls, what else they send is of the data axis.
    axes = {"tensor": mesh.tensor, "context": mesh.context, "data": mesh.data_context, "expert": mesh.expert}
    within = {
        tuple(dist.get_process_group_ranks(axis.group)): name
        for name, axis in reversed(axes.items())
        if axis.group is not None
    }
    ends = mesh.ends.group and tuple(dist.get_process_group_ranks(mesh.ends.group))
    for (name, ranks, _), count in passes.bytes.items():
        axis = "expert" if name == "all-to-all" else "pipeline" if name == "send" else within.get(ranks, "data")
        found[f"{axis} {name}"] += count
    # The outer of two modes sees what the inner one does, too.
    for (name, ranks, dtype), count in (rest.bytes - passes.bytes).items():
        if dtype not in ("int64", "float64"):
            axis = "pipeline" if ranks == ends else "tensor" if within.get(ranks) == "tensor" else "data"
            found[f"{axis} {name}"] += count
    return dict(found)
