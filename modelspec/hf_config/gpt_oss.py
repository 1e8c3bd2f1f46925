"""gpt-oss: sinks, windows in every other layer, and experts with biases and a clamped activation.

A token's weights are the softmax over its chosen experts' logits, which is the softmax over all, renormalised.
"""

from types import MappingProxyType
from typing import Any

from modelspec import schema
from modelspec.hf_config.common import (
    WINDOW,
    first,
    layer_types,
    num_layers,
    read_base,
    read_gqa,
    read_windows,
    runs,
    window,
    write_base,
    write_gqa,
)
from modelspec.hf_config.keys import Keys

# What the class takes where a config says nothing of rope.
ROPE = MappingProxyType(
    {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
)


def read_gpt_oss(keys: Keys) -> dict[str, Any]:
    """gpt-oss 20b and 120b."""
    base, layers = read_base(keys), num_layers(keys)
    bias = ("q", "k", "v", "o") if keys.flag("attention_bias", True) else ()
    width = None if "head_dim" in keys.stated else 64
    gqa = read_gqa(keys, base, head_dim=width, bias=bias, theta=150000.0, rope=ROPE) | {"sinks": True}
    alternating = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    variants, names = read_windows(keys, gqa, keys.words("layer_types", layers, tuple(WINDOW), alternating))
    per_tok = keys.take("num_experts_per_tok")
    # Repeats another key, and repeats one of rope.
    keys.expect("experts_per_token", per_tok)
    keys.ignore("initial_context_length")
    moe = {
        "type": "moe",
        "num_experts": keys.take("num_local_experts"),
        "num_experts_per_tok": per_tok,
        "intermediate_size": keys.take("intermediate_size"),
        "activation": {
            "type": "swiglu",
            "alpha": keys.take("swiglu_alpha", 1.702),
            "limit": keys.take("swiglu_limit", 7.0),
            "up_offset": 1.0,
        },
        "bias": ["gate", "up", "down"],
        "router": {"bias": True, "score": "softmax", "selection": {"type": "topk"}, "renormalize": True},
    }
    return base | {"attention": variants, "ffn": {"moe": moe}, "layers": runs(names, ["moe"] * layers)}


def write_gpt_oss(model: schema.Model) -> dict[str, Any]:
    """gpt-oss's config."""
    gqa, moe = first(model, schema.GQA, "gpt_oss"), first(model, schema.MoE, "gpt_oss")
    config = write_base(model, "gpt_oss", "GptOssForCausalLM") | write_gqa(gqa)
    # Without the word, the class would take its own scaling.
    config["rope_scaling"] = config.get("rope_scaling") or {"rope_type": "default"}
    return config | {
        "attention_bias": bool(gqa.bias),
        # The class asks for one even where no layer has it.
        "sliding_window": window(model) or 128,
        "layer_types": layer_types(model),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "intermediate_size": moe.intermediate_size,
        "swiglu_alpha": moe.activation.alpha,
        "swiglu_limit": moe.activation.limit,
    }
