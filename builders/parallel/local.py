"""What one rank holds of a model: its stages, built small, with the collectives of their axes in place.

The order is always the same: the stages on the meta device, from a spec whose heads, widths and experts are this rank's
share; FP8 layers; what each axis puts at its seam; recompute and compile; storage, divided by ZeRO; values. Nothing is
ever there in whole, and a value does not depend on the layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modelspec import layout, schema
from modelspec.builders.attention.gqa import GQA
from modelspec.builders.attention.mla import MLA
from modelspec.builders.build import DTYPES
from modelspec.builders.ffn.moe import Experts, MoE
from modelspec.builders.fp8 import policy_of, to_fp8
from modelspec.builders.init import initial_values
from modelspec.builders.parallel.context import CutSequence
from modelspec.builders.parallel.data import DataParallel, Kind, Member, Together, flat
from modelspec.builders.parallel.expert import exchange
from modelspec.builders.parallel.mesh import ALONE, Mesh
from modelspec.builders.parallel.pieces import Piece
from modelspec.builders.parallel.sharded import Sharded, shard_stage
from modelspec.builders.parallel.stage import Stage, held_of
from modelspec.builders.parallel.tensor import cut_dim, local_spec, tensor_parallel
from modelspec.builders.recompute import recompute


@dataclass(frozen=True, slots=True)
class Local:
    """Stages of this rank in the order of its forward pass; what it updates; its buffers by name, with their places."""

    stages: dict[int, Stage]
    data: DataParallel
    buffers: dict[str, tuple[Tensor, Piece]]


def build_local(spec: schema.ModelSpec, mesh: Mesh, device: torch.device, seed: int) -> Local:
    """The part of a spec's model that stands on this rank, initialised. All ranks call it together."""
    local = lay_out(spec, mesh, device)
    _initialize(local, spec, seed)
    return local


def lay_out(spec: schema.ModelSpec, mesh: Mesh, device: torch.device) -> Local:
    """The part of a spec's model that stands on this rank, its values not there yet; nothing is sent."""
    precision = spec.precision
    small = local_spec(spec, mesh.tensor.size)
    lengths, pipeline = mesh.lengths, spec.parallelism.pipeline
    held = list(held_of(layout.layers_of_stages(spec.model.num_layers, lengths.stages)))
    mine = layout.stages_of(pipeline.schedule, lengths.pipeline, lengths.stages_per_rank)[mesh.pipeline.rank]
    with torch.device("meta"):
        stages = {
            index: Stage(small, held[index], mesh, DTYPES[precision.compute], DTYPES[precision.router])
            for index in mine
        }
        for stage in stages.values():
            _few_experts(stage, spec, mesh.expert.size)
    _share_embedding(stages)
    for stage in stages.values():
        if precision.fp8 is not None:
            to_fp8(stage, precision.fp8)
            if (policy := policy_of(stage)) is not None:
                policy.versions_tell = True
        _parallelize(stage, spec, mesh)
        recompute(stage, spec.parallelism.recompute)
        if spec.parallelism.compile == "layer":
            for layer in stage.layers.children():
                layer.compile()
    data = _data_parallel(stages, spec, mesh, device)
    return Local(stages, data, _buffers(stages, spec, device))


def _few_experts(stage: Stage, spec: schema.ModelSpec, ranks: int) -> None:
    """One rank's experts in the place of all: routers, which choose among all of them, know no fewer."""
    for module in list(stage.modules()):
        if isinstance(module, MoE) and ranks > 1:
            few = module.spec.model_copy(update={"num_experts": module.spec.num_experts // ranks})
            module.experts = Experts(few, spec.model.hidden_size)


def _share_embedding(stages: dict[int, Stage]) -> None:
    """One embedding where the first and the last stage stand on the same rank."""
    owners = [stage for stage in stages.values() if hasattr(stage, "embed_tokens")]
    for stage in owners[1:]:
        stage.embed_tokens = owners[0].embed_tokens


def _parallelize(stage: Stage, spec: schema.ModelSpec, mesh: Mesh) -> None:
    """Puts what each axis needs at its seam."""
    for module in stage.modules():
        if isinstance(module, MoE) and mesh.expert.size > 1:
            module.dispatch = exchange(mesh, spec.precision.fp8)
        if isinstance(module, MLA | GQA) and mesh.context.size > 1:
            module.sequence = CutSequence(mesh.context)
    if mesh.tensor.size > 1:
        tensor_parallel(stage, spec, mesh.tensor)


def _tables(stages: dict[int, Stage]) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter of the stages once: its name, and the module and leaf where it is."""
    seen = set()
    for stage in stages.values():
        for path, module in stage.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{leaf}" if path else leaf, module, leaf


def box(name: str, tensor: schema.TensorSpec, spec: schema.ModelSpec, mesh: Mesh) -> Piece:
    """The box of a tensor that stands on this rank before ZeRO divides it."""
    piece = Piece.whole(tensor.shape)
    if tensor.experts_per_token is not None:
        return piece.part(0, mesh.expert.rank, mesh.expert.size)
    dim = cut_dim(name, spec)
    return piece if dim is None else piece.part(dim, mesh.tensor.rank, mesh.tensor.size)


def _data_parallel(stages: dict[int, Stage], spec: schema.ModelSpec, mesh: Mesh, device: torch.device) -> DataParallel:
    tensors, precision, zero = spec.tensors(), spec.precision, spec.parallelism.data.zero
    master, compute = DTYPES[precision.master_weights], DTYPES[precision.compute]
    copied = _stands_twice(spec, mesh)
    boxes: dict[str, Piece] = {}
    kinds: dict[str, Kind] = {}
    for name, _, _ in _tables(stages):
        boxes[name] = box(name, tensors[name], spec, mesh)
        dtype = compute if _is_narrow(name, boxes[name]) else master
        kinds[name] = _kind(tensors[name], cut_dim(name, spec) is None, name in copied, dtype, spec, mesh)
    sharded = []
    if zero >= 2 and mesh.dense.shard.size > 1:
        # A backward pass in two halves needs the weights of the forward pass itself.
        reshard = zero == 3 and not layout.splits_backward(spec.parallelism.pipeline)
        for stage in stages.values():
            shard_stage(stage, mesh, reshard, master, compute, device, apart=_shared(stages))
            sharded.append(Sharded(stage, kinds, boxes, zero, pipelined=mesh.pipeline.size > 1))
    members = [
        (Member(name, module, leaf, boxes[name]), kinds[name])
        for name, module, leaf in _tables(stages)
        if not isinstance(module.get_parameter(leaf), DTensor)
    ]
    flats = list(flat(members, master, device))
    for stage in stages.values():
        stage._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    return Together([*flats, *sharded])


def _shared(stages: dict[int, Stage]) -> frozenset[nn.Parameter]:
    """The embedding where two stages of this rank read it."""
    owners = [stage.embed_tokens.get_parameter("weight") for stage in stages.values() if hasattr(stage, "embed_tokens")]
    return frozenset(owners if len(owners) > 1 else ())


def _is_narrow(name: str, piece: Piece) -> bool:
    """Whether products read a parameter in the compute dtype and nothing else does."""
    return len(piece.shape) >= 2 and not any(part in name for part in (".router.", ".indexer.", "bias", "conv"))


def _stands_twice(spec: schema.ModelSpec, mesh: Mesh) -> frozenset[str]:
    """Parameters of the first pipeline rank that the last one reads too."""
    shared = spec.model.mtp is not None or spec.model.tie_embeddings
    first, last = (
        layout.stages_of(spec.parallelism.pipeline.schedule, mesh.lengths.pipeline, mesh.lengths.stages_per_rank)[0],
        mesh.lengths.stages - 1,
    )
    return frozenset({"embed_tokens.weight"} if shared and last not in first else ())


def _kind(
    tensor: schema.TensorSpec, whole: bool, copied: bool, dtype: torch.dtype, spec: schema.ModelSpec, mesh: Mesh
) -> Kind:
    """How a parameter's gradient is summed and its update divided."""
    zero = spec.parallelism.data.zero
    is_expert = tensor.experts_per_token is not None
    common = mesh.expert_data if is_expert else mesh.data_context
    shard, replica = (mesh.experts if is_expert else mesh.dense) if zero > 0 else (ALONE, common)
    over_tensor = mesh.tensor if whole and not is_expert else ALONE
    sums = tuple(axis for axis in (over_tensor, mesh.ends if copied else ALONE) if axis.size > 1)
    counts = not copied or mesh.pipeline.rank == 0
    owns = counts and replica.rank == 0 and over_tensor.rank == 0
    return Kind(shard, replica, sums, dtype, replica.size * over_tensor.size, counts, owns)


def _buffers(stages: dict[int, Stage], spec: schema.ModelSpec, device: torch.device) -> dict[str, tuple[Tensor, Piece]]:
    """Storage for persistent buffers, all of which stand whole wherever they stand."""
    tensors, found = spec.tensors(), {}
    dtype = torch.float64 if spec.precision.master_weights == "float64" else torch.float32
    for stage in stages.values():
        for path, module in stage.named_modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                module.register_buffer(leaf, torch.empty_like(buffer, dtype=dtype, device=device))
                name = f"{path}.{leaf}"
                found[name] = (module.get_buffer(leaf), Piece.whole(tensors[name].shape))
    return found


@torch.no_grad()
def _initialize(local: Local, spec: schema.ModelSpec, seed: int) -> None:
    """Fills what this rank updates with its elements of the initial values, and lets the others have them."""
    tensors, std = spec.tensors(), spec.model.init.std
    places = [(part.name, part.piece, part.weight) for part in local.data.parts()]
    places += [(name, piece, buffer) for name, (buffer, piece) in local.buffers.items()]
    for name, piece, place in places:
        place.copy_(_initial(name, tensors[name], piece, std, seed))
    local.data.publish()


def _initial(name: str, tensor: schema.TensorSpec, piece: Piece, std: float, seed: int) -> Tensor:
    """A piece of what a tensor begins with; of stacked experts only those in the box are drawn."""
    if not piece.numel:
        return torch.empty(piece.size if piece.last is None else (0,))
    if tensor.experts_per_token is None:
        (value,) = initial_values(name, tensor, std, seed)
        return piece.of(value)
    experts = range(piece.start[0], piece.start[0] + piece.size[0])
    one = Piece(piece.shape[1:], piece.start[1:], piece.size[1:])
    values = torch.stack([one.of(value) for value in initial_values(name, tensor, std, seed, experts)])
    return values if piece.last is None else values.flatten()[piece.first : piece.last]
