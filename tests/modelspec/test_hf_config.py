"""config.json <-> spec: what carries over, what a config may not ask for, what a spec may not say."""

import json
from collections.abc import Callable
from math import log
from typing import Any

import pytest

from modelspec.hf_config import HFError, config_from_spec, spec_from_config
from modelspec.schema import MLA, ModelSpec, MoE, Rope, Yarn
from modelspec.validate import load

Tiny = Callable[..., ModelSpec]

# The published configuration of DeepSeek-V3, with the keys of its repository on the hub.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.006,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def read(**changes: Any) -> ModelSpec:
    """The spec of V3's config with these keys changed; ... removes one."""
    config = V3 | changes
    return spec_from_config({key: value for key, value in config.items() if value is not ...}, "model")


def mla(spec: ModelSpec) -> MLA:
    """Its attention."""
    attention = spec.model.attention["mla"]
    assert isinstance(attention, MLA)
    return attention


def yarn(spec: ModelSpec) -> Yarn:
    """Its rotary scaling."""
    rope = mla(spec).rope
    assert isinstance(rope, Rope) and isinstance(rope.scaling, Yarn)
    return rope.scaling


def test_the_published_config_is_the_shipped_spec() -> None:
    assert read().model == load("modelspec:deepseek-v3").model


def test_the_shipped_spec_is_the_published_config() -> None:
    config = config_from_spec(load("modelspec:deepseek-v3"), "bfloat16")
    nothing_to_say = {"auto_map", "aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux", "use_cache"}
    nothing_to_say |= {"torch_dtype", "transformers_version", "bos_token_id", "eos_token_id"}
    for key in V3.keys() - nothing_to_say:
        assert config[key] == V3[key], key


def test_only_the_architecture_is_filled() -> None:
    spec = read()
    assert spec.model_fields_set == {"spec_version", "name", "model"}


def test_absent_optional_keys_mean_what_transformers_takes_them_for() -> None:
    spec = read(
        rope_scaling=..., rope_theta=..., q_lora_rank=None, num_nextn_predict_layers=..., tie_word_embeddings=...
    )
    assert mla(spec).rope == Rope(theta=10000.0, layout="interleaved")
    assert mla(spec).q_lora_rank is None
    assert spec.model.mtp is None
    assert not spec.model.tie_embeddings


def test_eps_of_the_latents_stays_when_the_other_norms_have_another() -> None:
    spec = read(rms_norm_eps=1e-5)
    assert (spec.model.norm.eps, mla(spec).latent_norm_eps) == (1e-5, 1e-6)


def test_one_group_is_no_group() -> None:
    ffn = read(n_group=1, topk_group=1).model.ffn["moe"]
    assert isinstance(ffn, MoE)
    assert ffn.router.selection.groups is None


@pytest.mark.parametrize("style", ["rope_scaling-type", "rope_scaling-rope_type", "rope_parameters"])
def test_every_spelling_of_rope_is_read(style: str) -> None:
    scaling = {key: value for key, value in V3["rope_scaling"].items() if key != "type"}
    spellings: dict[str, dict[str, Any]] = {
        "rope_scaling-type": {"rope_scaling": scaling | {"type": "yarn"}},
        "rope_scaling-rope_type": {"rope_scaling": scaling | {"rope_type": "yarn"}},
        "rope_parameters": {
            "rope_parameters": scaling | {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0},
            "rope_scaling": ...,
            "rope_theta": ...,
        },
    }
    assert read(**spellings[style]).model == read().model


def g(m: float, factor: float = 40) -> float:
    """The function of m in YaRN's scales."""
    return 0.1 * m * log(factor) + 1


@pytest.mark.parametrize(
    ("keys", "cos_sin", "softmax"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, g(1) ** 2),
        ({"mscale": 0.5, "mscale_all_dim": 0.25}, g(0.5) / g(0.25), g(0.25) ** 2),
        ({}, g(1), 1.0),
        ({"mscale": 0.5}, g(1), 1.0),
        ({"mscale_all_dim": 0.5}, g(1), g(0.5) ** 2),
        ({"attention_factor": 1.0}, 1.0, 1.0),
        ({"attention_factor": 1.2, "mscale_all_dim": 0.5}, 1.2, g(0.5) ** 2),
        ({"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, g(1) ** 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_two_scales_of_yarn_are_those_of_transformers(keys: Any, cos_sin: float, softmax: float) -> None:
    scaling = {key: value for key, value in V3["rope_scaling"].items() if "mscale" not in key} | keys
    spec = read(rope_scaling=scaling)
    assert g(yarn(spec).mscale) / g(yarn(spec).mscale_all_dim) == pytest.approx(cos_sin, rel=1e-12)
    assert g(yarn(spec).mscale_all_dim) ** 2 == pytest.approx(softmax, rel=1e-12)
    again = spec_from_config(config_from_spec(spec, "float32"), "model")
    assert again.model == spec.model


MEANINGLESS: dict[str, tuple[dict[str, Any], str]] = {
    "another-family": (
        {"model_type": "bert"},
        "model_type 'bert' is not supported; supported: deepseek_v2, .*, qwen3_moe",
    ),
    "no-family": ({"model_type": ...}, "model_type None is not supported"),
    "attention-bias": ({"attention_bias": True}, "attention_bias is True; only False"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "softmax": ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    "greedy": ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    "every-second-layer": ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "grouped-queries": ({"num_key_value_heads": 8}, "num_key_value_heads is 8; only 128"),
    "linear-rope": ({"rope_scaling": {"type": "linear", "factor": 8}}, "'linear' is not supported"),
    "partial-rope": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_scaling": ...},
        "partial_rotary_factor is 0.5",
    ),
    "two-ropes": ({"rope_parameters": {"rope_theta": 1e4}}, "only one may stand"),
    "unknown-rope-key": ({"rope_scaling": V3["rope_scaling"] | {"foo": 1}}, r"rope_scaling\.foo: not known"),
    "rope-not-a-map": ({"rope_scaling": "yarn"}, "must be objects"),
    "quantized": ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method is 'mxfp4'.*Convert the weights"),
    "unknown-key": ({"sliding_window": 128}, "sliding_window: not known"),
    "missing-size": ({"kv_lora_rank": ...}, "kv_lora_rank is missing"),
    "missing-eps": ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    "text-for-a-number": ({"hidden_size": "7168"}, "hidden_size must be a whole number"),
    "absurd-size": ({"vocab_size": 10**15}, r"model\.vocab_size"),
    "absurd-depth": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
    "layers-as-text": ({"num_hidden_layers": "61"}, "num_hidden_layers must be a whole number"),
    "factor-as-text": (
        {"rope_scaling": V3["rope_scaling"] | {"factor": "40"}},
        r"\.factor is '40'; it must be a number",
    ),
    "factor-below-one": (
        {"rope_scaling": V3["rope_scaling"] | {"factor": 0.5}},
        r"\.factor is 0\.5; it must be 1",
    ),
    "groups-do-not-divide": ({"n_group": 7}, r"groups\.num"),
    "more-experts-than-there-are": ({"num_experts_per_tok": 300}, r"num_experts_per_tok"),
}


@pytest.mark.parametrize(("changes", "message"), MEANINGLESS.values(), ids=MEANINGLESS.keys())
def test_a_config_that_asks_for_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HFError, match=message) as caught:
        read(**changes)
    assert caught.value.exit_code == 1


UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "latent-eps": ({"mla": {"latent_norm_eps": 1e-5}}, r"model\.attention\.mla\.latent_norm_eps is 1e-05"),
    "no-rope": ({"mla": {"rope": "none"}}, r"model\.attention\.mla\.rope is 'none'"),
    "softmax-with-mtp": ({"router": {"score": "softmax"}}, r"model\.mtp\.depth is 1: .* deepseek_v2 can only say 0"),
    "softmax-with-bias": (
        {"router": {"score": "softmax", "renormalize": False}, "model": {"mtp": None}},
        r"model\.ffn\.moe\.router\.selection\.bias is True: .* deepseek_v2 can only say False",
    ),
    "no-bias": ({"router": {"selection": {"bias": False}}}, r"model\.ffn\.moe\.router\.selection\.bias is False"),
    "group-score": (
        {"router": {"selection": {"groups": {"score": "max"}}}},
        r"model\.ffn\.moe\.router\.selection\.groups\.score is 'max'",
    ),
    "shared-width": ({"moe": {"shared_experts": {"intermediate_size": 10}}}, r"model\.ffn\.moe\.shared_experts is 10"),
    "dense-after-moe": (
        {"model": {"layers": [{"attention": "mla", "ffn": "moe"}, {"attention": "mla", "ffn": "dense"}], "mtp": None}},
        r"layer 1\): model\.ffn\.dense\.type is 'dense'",
    ),
    "norm-of-a-layer": (
        {
            "model": {
                "layers": [
                    {"attention": "mla", "ffn": "dense"},
                    {"attention": "mla", "ffn": "moe", "norm": {"type": "rmsnorm", "eps": 1e-3}},
                ]
            }
        },
        r"layer 1\): norm\.eps is 0\.001",
    ),
    "dense-mtp": ({"model": {"mtp": {"layer": {"attention": "mla", "ffn": "dense"}}}}, r"model\.mtp\.layer\.ffn"),
    "all-dense-with-mtp": (
        {"model": {"layers": [{"attention": "mla", "ffn": "dense"}]}},
        r"model\.mtp\.layer\.ffn",
    ),
}


@pytest.mark.parametrize(("parts", "message"), UNSAYABLE.values(), ids=UNSAYABLE.keys())
def test_a_spec_that_the_family_cannot_say_is_refused_at_its_field(
    parts: dict[str, Any], message: str, tiny: Tiny
) -> None:
    with pytest.raises(HFError, match=message):
        config_from_spec(tiny(**parts), "float32")


def test_two_attention_variants_are_refused_at_the_first_that_differs(tiny: Tiny) -> None:
    wide = tiny().model.attention["mla"].model_dump(exclude_none=True) | {"num_heads": 5}
    layers = [{"attention": "mla", "ffn": "dense"}, {"attention": "wide", "ffn": "moe"}]
    with pytest.raises(HFError, match=r"layer 1\): model\.attention\.wide\.num_heads is 5"):
        config_from_spec(tiny(model={"attention": {"wide": wide}, "layers": layers}), "float32")


def test_equal_variants_under_other_names_are_one(tiny: Tiny) -> None:
    same = tiny().model.attention["mla"].model_dump(exclude_none=True)
    layers = [{"attention": "mla", "ffn": "dense"}, {"attention": "same", "ffn": "moe"}]
    config = config_from_spec(tiny(model={"attention": {"same": same}, "layers": layers}), "float32")
    assert config["num_hidden_layers"] == 2


def test_shared_experts_are_told_by_their_joint_width(tiny: Tiny) -> None:
    spec = tiny(moe={"shared_experts": {"num": 1, "intermediate_size": 14}})
    assert config_from_spec(spec, "float32")["n_shared_experts"] == 2


def test_a_pattern_of_layers_is_written_as_the_layers_it_stands_for(tiny: Tiny) -> None:
    run = {"attention": "mla", "ffn": "moe"}
    spec = tiny(model={"layers": [{"attention": "mla", "ffn": "dense"}, {"repeat": 2, "pattern": [run, run]}]})
    config = config_from_spec(spec, "float32")
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (5, 1)


def test_sizes_of_kinds_that_no_layer_has_are_neither_written_nor_asked_for(tiny: Tiny) -> None:
    dense = tiny(model={"layers": [{"attention": "mla", "ffn": "dense"}], "mtp": None})
    config = config_from_spec(dense, "float32")
    assert "n_routed_experts" not in config
    assert spec_from_config(config | {"n_routed_experts": 4, "n_group": 3}, "tiny").model.num_layers == 1
    routed = tiny(model={"layers": [{"attention": "mla", "ffn": "moe"}]})
    assert "intermediate_size" not in config_from_spec(routed, "float32")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-nano"])
def test_shipped_specs_survive_the_way_there_and_back(name: str) -> None:
    spec = load(f"modelspec:{name}")
    text = json.dumps(config_from_spec(spec, "float32"))
    assert spec_from_config(json.loads(text), name).model == spec.model
