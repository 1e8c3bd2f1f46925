"""Qwen3-Next: layers of gated DeltaNet between layers of gated attention, zero-centred norms, a gated shared expert.

The released files also hold a module of multi-token prediction, of which their config says nothing.
"""

from typing import Any

from modelspec import schema
from modelspec.hf_config.common import (
    first,
    num_layers,
    partial_rotary_factor,
    read_base,
    read_gqa,
    runs,
    write_base,
    write_gqa,
)
from modelspec.hf_config.keys import Keys
from modelspec.hf_config.llama import QKVO, read_experts, write_experts

VARIANTS = {"linear_attention": "gdn", "full_attention": "gqa"}


def read_qwen3_next(keys: Keys) -> dict[str, Any]:
    """Qwen3-Next: every fourth layer has attention and the others the recurrence where nothing else is said."""
    keys.expect("use_sliding_window", False)
    base, layers = read_base(keys), num_layers(keys)
    base["norm"] |= {"zero_centered": True}
    bias = QKVO if keys.flag("attention_bias", False) else ()
    gqa = read_gqa(keys, base, num_kv_heads=2, head_dim=256, bias=bias, qk_norm=True, partial=0.25)
    gdn = {
        "type": "gated_deltanet",
        "num_qk_heads": keys.take("linear_num_key_heads", 16),
        "num_v_heads": keys.take("linear_num_value_heads", 32),
        "qk_head_dim": keys.take("linear_key_head_dim", 128),
        "v_head_dim": keys.take("linear_value_head_dim", 128),
        "conv_kernel": keys.take("linear_conv_kernel_dim", 4),
    }
    variants = {"gdn": gdn, "gqa": gqa | {"output_gate": True}}
    every = keys.integer("full_attention_interval", 4, least=1)
    otherwise = ["linear_attention" if (index + 1) % every else "full_attention" for index in range(layers)]
    names = [VARIANTS[word] for word in keys.words("layer_types", layers, tuple(VARIANTS), otherwise)]
    ffn, kinds = read_experts(keys, layers, renormalize=True)
    shared = keys.take("shared_expert_intermediate_size", 512)
    if "moe" in ffn:
        own = None if shared == ffn["moe"]["intermediate_size"] else shared
        ffn["moe"]["shared_experts"] = {"num": 1, "intermediate_size": own, "gate": True}
    return base | {
        "attention": {name: variants[name] for name in variants if name in names},
        "ffn": ffn,
        "layers": runs(names, kinds),
    }


def write_qwen3_next(model: schema.Model) -> dict[str, Any]:
    """Qwen3-Next's config."""
    gqa, moe = first(model, schema.GQA, "qwen3_next"), first(model, schema.MoE, "qwen3_next")
    variants = [model.attention[layer.attention] for layer in model.expanded_layers()]
    config = (
        write_base(model, "qwen3_next", "Qwen3NextForCausalLM")
        | write_gqa(gqa)
        | {
            "attention_bias": bool(gqa.bias),
            "partial_rotary_factor": partial_rotary_factor(gqa),
            "layer_types": [
                "linear_attention" if isinstance(variant, schema.GatedDeltaNet) else "full_attention"
                for variant in variants
            ],
        }
        | write_experts(model, "qwen3_next")
        | {"shared_expert_intermediate_size": moe.shared_width}
    )
    gdn = next((variant for variant in variants if isinstance(variant, schema.GatedDeltaNet)), None)
    if gdn is not None:
        config |= {
            "linear_num_key_heads": gdn.num_qk_heads,
            "linear_num_value_heads": gdn.num_v_heads,
            "linear_key_head_dim": gdn.qk_head_dim,
            "linear_value_head_dim": gdn.v_head_dim,
            "linear_conv_kernel_dim": gdn.conv_kernel,
        }
    return config
