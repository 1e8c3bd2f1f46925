"""Llama and its next of kin: Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE. All have grouped-query attention.

They differ in biases, in norms over queries and keys, in which layers see a window, and in experts. Whether projections
have biases is the class's own decision in Qwen2 and Mixtral, and a key elsewhere.
"""

from typing import Any

from modelspec import schema
from modelspec.hf_config.common import (
    dense,
    first,
    has,
    layer_types,
    num_layers,
    read_base,
    read_gqa,
    read_windows,
    require_whole_heads,
    runs,
    window,
    write_base,
    write_gqa,
)
from modelspec.hf_config.keys import Keys

QKVO, QKV, MLP = ("q", "k", "v", "o"), ("q", "k", "v"), ("gate", "up", "down")


def read_llama(keys: Keys) -> dict[str, Any]:
    """Llama: dense, plain attention; older files leave out the heads of keys and values."""
    base, layers = read_base(keys), num_layers(keys)
    bias = QKVO if keys.flag("attention_bias", False) else ()
    gqa = read_gqa(keys, base, num_kv_heads=keys.rest.get("num_attention_heads"), bias=bias)
    ffn = dense(keys, MLP if keys.flag("mlp_bias", False) else ())
    return base | {
        "attention": {"gqa": gqa},
        "ffn": {"dense": ffn},
        "layers": runs(["gqa"] * layers, ["dense"] * layers),
    }


def write_llama(model: schema.Model) -> dict[str, Any]:
    """Llama's config."""
    gqa, ffn = first(model, schema.GQA, "llama"), first(model, schema.Dense, "llama")
    require_whole_heads(model, gqa.num_heads, "llama")
    return (
        write_base(model, "llama", "LlamaForCausalLM")
        | write_gqa(gqa)
        | {
            "intermediate_size": ffn.intermediate_size,
            "attention_bias": bool(gqa.bias),
            "mlp_bias": bool(ffn.bias),
        }
    )


def read_qwen2(keys: Keys) -> dict[str, Any]:
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""
    keys.expect("use_mrope", False)
    base = read_base(keys)
    return _read_windowed(keys, base, read_gqa(keys, base, bias=QKV))


def read_qwen3(keys: Keys) -> dict[str, Any]:
    """Qwen3, dense: norms over the heads of queries and keys, 128 elements per head where nothing is said."""
    base = read_base(keys)
    bias = QKVO if keys.flag("attention_bias", False) else ()
    return _read_windowed(keys, base, read_gqa(keys, base, head_dim=128, bias=bias, qk_norm=True))


def _read_windowed(keys: Keys, base: dict[str, Any], gqa: dict[str, Any]) -> dict[str, Any]:
    layers = num_layers(keys)
    if keys.flag("use_sliding_window", False):
        full = keys.integer("max_window_layers", 28)
        otherwise = ["sliding_attention" if index >= full else "full_attention" for index in range(layers)]
        types = keys.words("layer_types", layers, ("full_attention", "sliding_attention"), otherwise)
    else:
        keys.ignore("max_window_layers")
        types = keys.words("layer_types", layers, ("full_attention",), ["full_attention"] * layers)
    variants, names = read_windows(keys, gqa, types)
    return base | {
        "attention": variants,
        "ffn": {"dense": dense(keys)},
        "layers": runs(names, ["dense"] * layers),
    }


def write_qwen2(model: schema.Model) -> dict[str, Any]:
    """Qwen2's config."""
    return _write_windowed(model, "qwen2", "Qwen2ForCausalLM")


def write_qwen3(model: schema.Model) -> dict[str, Any]:
    """Qwen3's config."""
    bias = bool(first(model, schema.GQA, "qwen3").bias)
    return _write_windowed(model, "qwen3", "Qwen3ForCausalLM") | {"attention_bias": bias}


def _write_windowed(model: schema.Model, family: str, architecture: str) -> dict[str, Any]:
    types = layer_types(model)
    return (
        write_base(model, family, architecture)
        | write_gqa(first(model, schema.GQA, family))
        | {
            "intermediate_size": first(model, schema.Dense, family).intermediate_size,
            "use_sliding_window": "sliding_attention" in types,
            "sliding_window": window(model),
            # What older readers go by; where the layers after the first window are not all alike, `layer_types` is.
            "max_window_layers": types.index("sliding_attention") if "sliding_attention" in types else len(types),
            "layer_types": types,
        }
    )


def read_mixtral(keys: Keys) -> dict[str, Any]:
    """Mixtral: experts in every layer, their weights always renormalised; one window for all layers or none."""
    keys.expect("router_jitter_noise", 0)
    base, layers = read_base(keys), num_layers(keys)
    gqa = read_gqa(keys, base, theta=1e6) | {"sliding_window": keys.take("sliding_window", None)}
    moe = _moe(keys.take("num_local_experts"), keys.take("num_experts_per_tok"), keys.take("intermediate_size"), True)
    return base | {"attention": {"gqa": gqa}, "ffn": {"moe": moe}, "layers": runs(["gqa"] * layers, ["moe"] * layers)}


def _moe(experts: Any, per_tok: Any, width: Any, renormalize: bool) -> dict[str, Any]:
    return {
        "type": "moe",
        "num_experts": experts,
        "num_experts_per_tok": per_tok,
        "intermediate_size": width,
        "activation": {"type": "swiglu"},
        "router": {"score": "softmax", "selection": {"type": "topk"}, "renormalize": renormalize},
    }


def write_mixtral(model: schema.Model) -> dict[str, Any]:
    """Mixtral's config."""
    gqa, moe = first(model, schema.GQA, "mixtral"), first(model, schema.MoE, "mixtral")
    return (
        write_base(model, "mixtral", "MixtralForCausalLM")
        | write_gqa(gqa)
        | {
            "sliding_window": gqa.sliding_window,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "intermediate_size": moe.intermediate_size,
        }
    )


def read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    """Qwen3-MoE: Qwen3's attention; experts in every so many layers, except the layers that are named."""
    base, layers = read_base(keys), num_layers(keys)
    gqa = read_gqa(keys, base, bias=QKVO if keys.flag("attention_bias", False) else (), qk_norm=True)
    if keys.flag("use_sliding_window", False):
        gqa["sliding_window"] = keys.take("sliding_window")
    keys.ignore("sliding_window", "max_window_layers")
    ffn, kinds = read_experts(keys, layers, renormalize=False)
    return base | {"attention": {"gqa": gqa}, "ffn": ffn, "layers": runs(["gqa"] * layers, kinds)}


def read_experts(keys: Keys, layers: int, *, renormalize: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The networks of Qwen's models with experts, and each layer's; `renormalize` is the family's own decision."""
    step, named = keys.integer("decoder_sparse_step", 1, least=1), keys.take("mlp_only_layers", [])
    if not isinstance(named, list) or not all(type(index) is int for index in named):
        raise keys.wrong("mlp_only_layers", "must be a list of whole numbers")
    without = set(named)
    kinds = ["dense" if index in without or (index + 1) % step else "moe" for index in range(layers)]
    ffn = {}
    if "dense" in kinds:
        ffn["dense"] = dense(keys)
    if "moe" in kinds:
        # transformers 5 writes num_local_experts for what the hub calls num_experts.
        experts = keys.take("num_experts", keys.take("num_local_experts", None))
        if experts is None:
            raise keys.wrong("num_experts", "is missing")
        renormalize = keys.flag("norm_topk_prob", renormalize)
        ffn["moe"] = _moe(experts, keys.take("num_experts_per_tok"), keys.take("moe_intermediate_size"), renormalize)
    keys.ignore("intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok")
    keys.ignore("moe_intermediate_size", "norm_topk_prob")
    return ffn, kinds


def write_qwen3_moe(model: schema.Model) -> dict[str, Any]:
    """Qwen3-MoE's config."""
    gqa = first(model, schema.GQA, "qwen3_moe")
    return (
        write_base(model, "qwen3_moe", "Qwen3MoeForCausalLM")
        | write_gqa(gqa)
        | {
            "attention_bias": bool(gqa.bias),
            "use_sliding_window": gqa.sliding_window is not None,
            "sliding_window": gqa.sliding_window,
        }
        | write_experts(model, "qwen3_moe")
    )


def write_experts(model: schema.Model, family: str) -> dict[str, Any]:
    """What Qwen's models with experts say of their networks."""
    moe = first(model, schema.MoE, family)
    kinds = [model.ffn[layer.ffn] for layer in model.expanded_layers()]
    config = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, ffn in enumerate(kinds) if isinstance(ffn, schema.Dense)],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.router.renormalize,
    }
    if has(model, schema.Dense):
        config["intermediate_size"] = first(model, schema.Dense, family).intermediate_size
    return config
