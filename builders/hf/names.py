"""What each tensor of a model is called in the files of a Hugging Face family, and where it stands there.

`inventory` is the only place that knows: reading and writing both walk the spec's table of tensors through it. Stacked
experts are many tensors in the files, one per expert and projection, or in one family a single tensor with its dims in
another order. Modules of multi-token prediction stand in the files as layers after the last one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modelspec import schema
from modelspec.hf_config import Family, HFError

# plain: a piece is a tensor of the files. stacked: it is one expert's slice of a tensor [experts, in, out] or
# [experts, out] that holds them all, whose parts alternate along out.
HubLayout = Literal["plain", "stacked"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one of our tensors, and the tensor of the files that has it.

    Ours: `part` of `parts` row blocks, of one expert or of all. In the files: `hub`, in its `hub_layout`.
    """

    hub: str
    tensor: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    hub_layout: HubLayout = "plain"

    @property
    def is_plain(self) -> bool:
        """Whether the tensor of the files is the piece, element for element in the same order."""
        return self.hub_layout == "plain"

    def of(self, tensor: Tensor) -> Tensor:
        """The piece as a view of our tensor."""
        whole = tensor if self.expert is None else tensor[self.expert]
        return whole if self.parts == 1 else whole.chunk(self.parts)[self.part]

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The piece's shape, given that of our tensor."""
        rows, *rest = shape if self.expert is None else shape[1:]
        return (rows // self.parts, *rest)

    def hub_view(self, hub_tensor: Tensor) -> Tensor:
        """The piece as a view of the files' tensor, rows first as in ours."""
        if self.is_plain:
            return hub_tensor
        return hub_tensor[self.expert][..., self.part :: self.parts].movedim(-1, 0)

    def hub_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the files' whole tensor, given that of ours."""
        if self.is_plain:
            return self.shape_in(shape)
        experts, rows, *rest = shape
        return (experts, *rest, rows)


@dataclass(frozen=True, slots=True)
class _Names:
    """A layer's names in the files: of modules and lone tensors, and of stacked experts, a template for each part."""

    modules: dict[str, str]
    experts: dict[str, tuple[str, ...]]
    layout: HubLayout = "plain"


_MODEL = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.sinks": "self_attn.sinks",
    "attention.q_a_proj": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.q_b_proj": "self_attn.q_b_proj",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b_proj": "self_attn.kv_b_proj",
    "attention.indexer.q_proj": "self_attn.indexer.wq_b",
    "attention.indexer.k_proj": "self_attn.indexer.wk",
    "attention.indexer.k_norm": "self_attn.indexer.k_norm",
    "attention.indexer.weights_proj": "self_attn.indexer.weights_proj",
    "attention.qkvz_proj": "linear_attn.in_proj_qkvz",
    "attention.ba_proj": "linear_attn.in_proj_ba",
    "attention.conv": "linear_attn.conv1d",
    "attention.dt_bias": "linear_attn.dt_bias",
    "attention.A_log": "linear_attn.A_log",
    "attention.norm": "linear_attn.norm",
    "attention.out_proj": "linear_attn.out_proj",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
    "ffn.router": "mlp.gate",
    "ffn.router.selection_bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.gate_proj": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.up_proj": "mlp.shared_experts.up_proj",
    "ffn.shared_experts.down_proj": "mlp.shared_experts.down_proj",
}
_QWEN3_NEXT = {
    "ffn.shared_experts.gate_proj": "mlp.shared_expert.gate_proj",
    "ffn.shared_experts.up_proj": "mlp.shared_expert.up_proj",
    "ffn.shared_experts.down_proj": "mlp.shared_expert.down_proj",
    "ffn.shared_gate": "mlp.shared_expert_gate",
}
_MTP = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "proj": "eh_proj",
    "norm": "shared_head.norm",
}
_EXPERTS = {
    "ffn.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "ffn.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
}
_MIXTRAL_EXPERTS = {
    "ffn.experts.gate_up_proj": (
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
    ),
    "ffn.experts.down_proj": ("block_sparse_moe.experts.{expert}.w2.weight",),
}
_GPT_OSS_EXPERTS = {
    "ffn.experts.gate_up_proj": ("mlp.experts.gate_up_proj",) * 2,
    "ffn.experts.gate_up_bias": ("mlp.experts.gate_up_proj_bias",) * 2,
    "ffn.experts.down_proj": ("mlp.experts.down_proj",),
    "ffn.experts.down_bias": ("mlp.experts.down_proj_bias",),
}


def _names(family: Family) -> _Names:
    match family:
        case "mixtral":
            return _Names(_LAYER | {"ffn.router": "block_sparse_moe.gate"}, _MIXTRAL_EXPERTS)
        case "gpt_oss":
            return _Names(_LAYER | {"ffn.router": "mlp.router"}, _GPT_OSS_EXPERTS, "stacked")
        case "qwen3_next":
            return _Names(_LAYER | _QWEN3_NEXT, _EXPERTS)
        case _:
            return _Names(_LAYER, _EXPERTS)


def inventory(model: schema.Model, family: Family) -> Iterator[Piece]:
    """Every piece of the model, in the order of its table of tensors; a tensor's own are in the order of its elements.

    Raises HFError for a tensor that the family has no name for.
    """
    names = _names(family)
    for name, tensor in model.tensors().items():
        prefix, rest = _layer(name, model.num_layers)
        if rest not in names.experts:
            hub = _hub_name(rest, names.modules | _MTP if prefix else _MODEL)
            if hub is None:
                raise HFError(f"{name}: the Hugging Face family {family} has no name for this tensor")
            yield Piece(prefix + hub, name)
            continue
        templates = names.experts[rest]
        for expert in range(tensor.shape[0]):
            for part, template in enumerate(templates):
                hub = prefix + template.format(expert=expert)
                yield Piece(hub, name, expert, part, len(templates), names.layout)


def _layer(name: str, num_layers: int) -> tuple[str, str]:
    """The layer of the files that a tensor of ours belongs to, and its name there: nothing before those of none."""
    match = re.fullmatch(r"(layers|mtp)\.(\d+)\.(?:block\.)?(.+)", name)
    if match is None:
        return "", name
    number = int(match[2]) + (num_layers if match[1] == "mtp" else 0)
    return f"model.layers.{number}.", match[3]


def _hub_name(name: str, modules: dict[str, str]) -> str | None:
    """The name in the files of a tensor that stands alone or belongs to a module; None where neither has one."""
    owner, _, leaf = name.rpartition(".")
    return modules.get(name) or (f"{modules[owner]}.{leaf}" if owner in modules else None)


def is_left_out(name: str, family: Family) -> bool:
    """Whether a tensor of the files is one that no spec describes.

    Qwen3-Next's files hold a module of multi-token prediction beside the layers, of which its config says nothing.
    """
    return family == "qwen3_next" and name.startswith("mtp.")


def hub_shapes(model: schema.Model, family: Family) -> dict[str, tuple[int, ...]]:
    """Name in the files -> shape, of every tensor there but the duplicates."""
    table = model.tensors()
    return {piece.hub: piece.hub_shape(table[piece.tensor].shape) for piece in inventory(model, family)}


def duplicates(model: schema.Model) -> dict[str, str]:
    """Names in the files that repeat another tensor -> the name of that tensor."""
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    result = {"lm_head.weight": head} if model.tie_embeddings else {}
    for index in range(model.mtp.depth if model.mtp else 0):
        layer = f"model.layers.{model.num_layers + index}"
        result |= {
            f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
            f"{layer}.shared_head.head.weight": head,
        }
    return result
