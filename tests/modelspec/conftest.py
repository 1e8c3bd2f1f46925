"""Tiny configurations of every Hugging Face family, completed by its own class in transformers."""

import json
from collections.abc import Callable
from typing import Any

import pytest

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 3e-5,
}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 7}
PREFIX = EXPERTS | {"n_routed_experts": 12, "first_k_dense_replace": 2}
GROUPS = {"n_group": 4, "topk_group": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": SIZES | LATENT | PREFIX,
    "deepseek_v3": SIZES | LATENT | PREFIX | GROUPS,
    "deepseek_v32": SIZES | LATENT | PREFIX | GROUPS | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 16},
    "glm4_moe": SIZES | PREFIX,
    "gpt_oss": SIZES | {"num_local_experts": 6},
    "llama": SIZES,
    # Without head_dim its class fails under yarn.
    "mixtral": SIZES | {"num_local_experts": 6, "head_dim": 4},
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": SIZES | EXPERTS | {"num_experts": 12},
    "qwen3_next": SIZES | EXPERTS | LINEAR | {"num_experts": 12, "shared_expert_intermediate_size": 9, "head_dim": 16},
}


@pytest.fixture(scope="session")
def hf_config() -> Callable[..., dict[str, Any]]:
    """hf_config(family, **keys): the config.json that transformers writes of a tiny model with these keys."""
    # The language's other tests run without it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def make(family: str, **keys: Any) -> dict[str, Any]:
        # Copied, since a class keeps and changes what it is given.
        config = CONFIG_MAPPING[family](**json.loads(json.dumps(TINY[family] | keys)))
        written = json.loads(config.to_json_string())
        assert isinstance(written, dict)
        return written

    return make
