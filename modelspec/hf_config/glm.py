"""GLM-4.5 (glm4_moe): grouped-query attention of which a part is rotated, and DeepSeek-V3's experts."""

from typing import Any

from modelspec import schema
from modelspec.hf_config.common import (
    first,
    num_layers,
    partial_rotary_factor,
    read_base,
    read_gqa,
    write_base,
    write_gqa,
)
from modelspec.hf_config.experts import prefix, read_layers, read_sigmoid_router, write_layers, write_mtp
from modelspec.hf_config.keys import Keys


def read_glm4_moe(keys: Keys) -> dict[str, Any]:
    """GLM-4.5 and GLM-4.5-Air: half of a head is rotated where nothing is said; the output has no bias."""
    base, layers = read_base(keys), num_layers(keys)
    bias = ("q", "k", "v") if keys.flag("attention_bias", False) else ()
    gqa = read_gqa(keys, base, bias=bias, qk_norm=keys.flag("use_qk_norm", False), partial=0.5)
    kinds = prefix(keys, layers, 1)
    experts = read_layers(keys, "gqa", kinds, shared=1, router=read_sigmoid_router, mtp=True)
    return base | {"attention": {"gqa": gqa}} | experts


def write_glm4_moe(model: schema.Model) -> dict[str, Any]:
    """GLM-4.5's config."""
    gqa = first(model, schema.GQA, "glm4_moe")
    return (
        write_base(model, "glm4_moe", "Glm4MoeForCausalLM")
        | write_gqa(gqa)
        | {
            "attention_bias": bool(gqa.bias),
            "use_qk_norm": gqa.qk_norm is not None,
            "partial_rotary_factor": partial_rotary_factor(gqa),
        }
        | write_layers(model, "glm4_moe")
        | write_mtp(model, "glm4_moe")
    )
