"""DeepSeek-V2, V3 and V3.2: latent attention and fine-grained experts.

V2 chooses experts by softmax, without a bias; V3, and Kimi K2 after it, by sigmoid with a bias; V3.2 is V3 with a
lightning indexer in every layer.
"""

from typing import Any

from modelspec import schema
from modelspec.hf_config.common import (
    MAX_WIDTH,
    first,
    has,
    num_layers,
    read_base,
    require_whole_heads,
    write_base,
)
from modelspec.hf_config.experts import (
    prefix,
    read_layers,
    read_sigmoid_router,
    write_layers,
    write_mtp,
)
from modelspec.hf_config.keys import Keys
from modelspec.hf_config.rope import Layout, read_rope, rope_keys, write_rope

# The classes leave the norms of the latents, and of the indexer's keys, at their own default, whatever rms_norm_eps is.
EPS = 1e-6


def _read_mla(keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    heads = keys.integer("num_attention_heads", least=1, most=MAX_WIDTH)
    keys.expect("num_key_value_heads", heads)
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    keys.expect("moe_layer_freq", 1)
    # Follow from other keys.
    keys.ignore("head_dim", "qk_head_dim")
    if "q_lora_rank" not in keys.stated:
        raise keys.wrong("q_lora_rank", "is missing; null says that queries are not compressed")
    layout: Layout = "interleaved" if keys.flag("rope_interleave", True) else "half_split"
    return {
        "type": "mla",
        "num_heads": heads,
        "q_lora_rank": keys.take("q_lora_rank", None),
        "kv_lora_rank": keys.take("kv_lora_rank"),
        "qk_nope_head_dim": keys.take("qk_nope_head_dim"),
        "qk_rope_head_dim": keys.take("qk_rope_head_dim"),
        "v_head_dim": keys.take("v_head_dim"),
        "latent_norm_eps": EPS,
        "rope": read_rope(rope_keys(keys), base["max_position"], theta=1e4, layout=layout, latent=True),
    }


def _write_mla(mla: schema.MLA) -> dict[str, Any]:
    config = {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "attention_bias": False,
        "moe_layer_freq": 1,
    }
    if mla.rope != "none":
        config |= write_rope(mla.rope, latent=True)
    return config


def read_v2(keys: Keys) -> dict[str, Any]:
    """DeepSeek-V2 and V2-Lite."""
    keys.expect("rope_interleave", True)
    base, layers = read_base(keys), num_layers(keys)
    mla, kinds = _read_mla(keys, base), prefix(keys, layers, 0)
    experts = read_layers(keys, "mla", kinds, shared=2, router=_read_softmax_router, mtp=False)
    return base | {"attention": {"mla": mla}} | experts


def _read_softmax_router(keys: Keys) -> dict[str, Any]:
    keys.expect("scoring_func", "softmax")
    # The class ignores this key, DeepSeek's own code renormalises and leaves the scale out.
    keys.expect("norm_topk_prob", False)
    groups = None
    if keys.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "group_limited_greedy":
        groups = {"num": keys.take("n_group"), "topk": keys.take("topk_group"), "score": "max"}
    return {
        "score": "softmax",
        "selection": {"type": "topk", "groups": groups if groups and groups["num"] != 1 else None},
        "renormalize": False,
        "scale": keys.take("routed_scaling_factor", 1.0),
    }


def write_v2(model: schema.Model) -> dict[str, Any]:
    """V2's config."""
    mla = first(model, schema.MLA, "deepseek_v2")
    require_whole_heads(model, mla.num_heads, "deepseek_v2")
    config = write_base(model, "deepseek_v2", "DeepseekV2ForCausalLM") | _write_mla(mla)
    config |= write_layers(model, "deepseek_v2")
    if has(model, schema.MoE):
        groups = first(model, schema.MoE, "deepseek_v2").router.selection.groups
        config |= {
            "scoring_func": "softmax",
            "topk_method": "group_limited_greedy" if groups else "greedy",
            "norm_topk_prob": False,
        }
    return config


def _read_v3_router(keys: Keys) -> dict[str, Any]:
    return read_sigmoid_router(keys, groups=(8, 4), scale=2.5)


def read_v3(keys: Keys) -> dict[str, Any]:
    """DeepSeek-V3, R1, V3.1 and Kimi K2."""
    base, layers = read_base(keys), num_layers(keys)
    mla, kinds = _read_mla(keys, base), prefix(keys, layers, 3)
    experts = read_layers(keys, "mla", kinds, shared=1, router=_read_v3_router, mtp=True)
    return base | {"attention": {"mla": mla}} | experts


def write_v3(model: schema.Model) -> dict[str, Any]:
    """V3's config."""
    mla = first(model, schema.MLA, "deepseek_v3")
    config = _write_v3(model, mla, "deepseek_v3", "DeepseekV3ForCausalLM")
    if mla.rope != "none":
        config["rope_interleave"] = mla.rope.layout == "interleaved"
    return config


def _write_v3(model: schema.Model, mla: schema.MLA, family: str, architecture: str) -> dict[str, Any]:
    config = write_base(model, family, architecture) | _write_mla(mla) | write_layers(model, family)
    if has(model, schema.MoE):
        config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    return config | write_mtp(model, family)


def read_v32(keys: Keys) -> dict[str, Any]:
    """DeepSeek-V3.2: the indexer rotates half-split whatever attention does."""
    keys.expect("rope_interleave", True)
    base, layers = read_base(keys), num_layers(keys)
    mla = _read_mla(keys, base)
    mla["indexer"] = {
        "type": "lightning",
        "num_heads": keys.take("index_n_heads", 64),
        "head_dim": keys.take("index_head_dim", 128),
        "rope_head_dim": mla["qk_rope_head_dim"],
        "rope_layout": "half_split",
        "norm_eps": EPS,
        "topk": keys.take("index_topk", 2048),
    }
    sparse = ("indexed_attention", "deepseek_sparse_attention")
    keys.words("layer_types", layers, sparse, ["indexed_attention"] * layers)
    otherwise = ["sparse" if kind == "moe" else kind for kind in prefix(keys, layers, 3)]
    words = keys.words("mlp_layer_types", layers, ("dense", "sparse"), otherwise)
    kinds = ["moe" if word == "sparse" else word for word in words]
    experts = read_layers(keys, "mla", kinds, shared=1, router=_read_v3_router, mtp=True)
    return base | {"attention": {"mla": mla}} | experts


def write_v32(model: schema.Model) -> dict[str, Any]:
    """V3.2's config."""
    mla = first(model, schema.MLA, "deepseek_v32")
    config = _write_v3(model, mla, "deepseek_v32", "DeepseekV32ForCausalLM")
    if mla.indexer is not None:
        config |= {
            "index_n_heads": mla.indexer.num_heads,
            "index_head_dim": mla.indexer.head_dim,
            "index_topk": mla.indexer.topk,
        }
    ffns = [model.ffn[layer.ffn] for layer in model.expanded_layers()]
    kinds = ["sparse" if isinstance(ffn, schema.MoE) else "dense" for ffn in ffns]
    # Not every reader knows this key, and a dense prefix is said without it.
    if kinds != sorted(kinds):
        config["mlp_layer_types"] = kinds
    return config
