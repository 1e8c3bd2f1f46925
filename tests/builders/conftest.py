"""transformers' DeepseekV3ForCausalLM as the independent model: its configuration and names are restated here."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

from modelspec.builders import Transformer, build
from modelspec.schema import MLA, Dense, ModelSpec, MoE, Yarn


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> Iterator[None]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield


def configuration(spec: ModelSpec) -> DeepseekV3Config:
    """What transformers must be told to build the model of a spec, key by key."""
    model, mla = spec.model, spec.model.attention["mla"]
    dense, moe = model.ffn["dense"], model.ffn["moe"]
    assert isinstance(dense, Dense) and isinstance(moe, MoE) and isinstance(mla, MLA) and mla.rope != "none"
    groups, rope = moe.router.selection.groups, {"rope_type": "default", "rope_theta": mla.rope.theta}
    if isinstance(yarn := mla.rope.scaling, Yarn):
        rope |= yarn.model_dump(exclude={"type", "original_max_position"}) | {
            "rope_type": "yarn",
            "original_max_position_embeddings": yarn.original_max_position,
        }
    return DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        first_k_dense_replace=sum(run.ffn == "dense" for run in model.expanded_layers()),
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=moe.intermediate_size,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.shared_experts.num if moe.shared_experts else 0,
        num_experts_per_tok=moe.num_experts_per_tok,
        n_group=groups.num if groups else 1,
        topk_group=groups.topk if groups else 1,
        norm_topk_prob=moe.router.renormalize,
        routed_scaling_factor=moe.router.scale,
        num_attention_heads=mla.num_heads,
        num_key_value_heads=mla.num_heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        rope_parameters=rope,
        rope_interleave=mla.rope.layout == "interleaved",
        max_position_embeddings=model.max_position,
        rms_norm_eps=model.norm.eps,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init.std,
        bos_token_id=None,
        eos_token_id=None,
    )


_RENAMED = {
    "model.": "",
    "self_attn.": "attention.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate.e_score_correction_bias": "ffn.router.selection_bias",
    "mlp.gate.weight": "ffn.router.weight",
    "mlp.": "ffn.",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "_layernorm": "_norm",
}


def _renamed(name: str) -> str:
    """transformers' name in memory -> ours."""
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


class Twins(NamedTuple):
    """Our model and transformers', with the same weights."""

    ours: Transformer
    theirs: DeepseekV3ForCausalLM

    @staticmethod
    def our_mtp_name(index: int, name: str) -> str:
        """Our name of a tensor in transformers' module of multi-token prediction."""
        own = {"enorm": "embedding_norm", "hnorm": "hidden_norm", "eh_proj": "proj", "post_norm": "norm"}
        head, rest = name.split(".", 1)
        return f"mtp.{index}.{own[head]}.{rest}" if head in own else f"mtp.{index}.block.{_renamed(rest)}"

    def their_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of transformers' parameters by our names."""
        gradients = {_renamed(name): parameter.grad for name, parameter in self.theirs.named_parameters()}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.fixture
def twins() -> Callable[..., Twins]:
    """twins(spec, bias=(mean, std)): random weights, norms and biases too.

    With `mtp` ours has multi-token prediction, whose random weights transformers' model has no place for.
    """

    def make(spec: ModelSpec, bias: tuple[float, float] = (-0.3, 0.3), *, mtp: bool = False) -> Twins:
        theirs = DeepseekV3ForCausalLM(configuration(spec)).eval()
        # Its grouped products want rows of whole 16 bytes; the loop over experts takes any size.
        theirs.set_experts_implementation("eager")
        without = spec.model_copy(update={"model": spec.model.model_copy(update={"mtp": None})})
        ours = build(spec if mtp else without)
        for name, tensor in [*theirs.state_dict().items(), *ours.state_dict().items()]:
            if "norm" in name:
                tensor.normal_(1.0, 0.2)
            elif "bias" in name:
                tensor.normal_(*bias)
        state = {_renamed(name): tensor for name, tensor in theirs.state_dict().items()}
        if spec.model.tie_embeddings:
            del state["lm_head.weight"]
        ours.load_state_dict(ours.state_dict() | state)
        return Twins(ours, theirs)

    return make


@pytest.fixture(scope="session")
def randomize() -> Callable[[torch.nn.Module], None]:
    """Random values everywhere: norms about 1, selection biases below 0 too, and large enough to matter."""

    @torch.no_grad()
    def fill(model: torch.nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            if "norm" in name and name.endswith("weight"):
                tensor.normal_(1.0, 0.3)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(-0.3, 0.3)
            elif name.endswith(("bias", "sinks")):
                tensor.normal_(0.0, 0.5)
            else:
                tensor.normal_(0.0, 0.3)

    return fill
