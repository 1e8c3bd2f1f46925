"""What is refused on the way from config.json to a spec and back: a key, a part of a spec, a way to store weights."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelspec.hf_config import (
    Family,
    HFError,
    Quantization,
    config_from_spec,
    read_config,
    spec_from_config,
)
from modelspec.schema import ModelSpec

Config = Callable[..., dict[str, Any]]
FAMILIES: tuple[Family, ...] = get_args(Family)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SLIDING = {"use_sliding_window": True, "sliding_window": 16}


REFUSED: list[tuple[Family, dict[str, Any], str]] = [
    *((family, {"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0 ") for family in FAMILIES),
    *((family, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'") for family in FAMILIES),
    *((family, {"logit_scale": 2.0}, "logit_scale: not known") for family in FAMILIES),
    *((family, {"vocab_size": None}, "vocab_size") for family in FAMILIES),
    *((family, {"hidden_size": "24"}, "hidden_size must be a whole number") for family in FAMILIES),
    *((family, {"num_attention_heads": 0}, "num_attention_heads must be a whole number, 1") for family in FAMILIES),
    *((family, {"rms_norm_eps": None}, "rms_norm_eps") for family in FAMILIES),
    *((family, {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported") for family in FAMILIES),
    ("deepseek_v2", {"attention_bias": True}, "attention_bias is True; only False"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True; only False"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True; only False"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; only 'softmax'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; only 'greedy' or 'group_limited_greedy'"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is missing"),
    ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank|query latent"),
    (
        "deepseek_v32",
        {"mlp_layer_types": ["sparse"]},
        "mlp_layer_types must be a list .* each of the 5 layers",
    ),
    ("deepseek_v32", {"layer_types": ["full_attention"] * 5}, r"layer_types\[0\] is 'full_attention'"),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor is 2.0"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window is missing"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 5}, r"layer_types\[0\] is 'chunked_attention'"),
    ("gpt_oss", {"experts_per_token": 3}, "experts_per_token is 3; only 4"),
    ("llama", {"sliding_window": 16}, "sliding_window: not known"),
    ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
    ("llama", {"head_dim": 7.5}, "head_dim must be a whole number"),
    ("llama", {"head_dim": 7}, "head_dim"),
    (
        "llama",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5; the family turns whole",
    ),
    (
        "qwen2",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5; the family turns whole",
    ),
    (
        "gpt_oss",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5; the family turns whole",
    ),
    ("llama", {"rope_parameters": {"partial_rotary_factor": "a"}}, "partial_rotary_factor is 'a'; it must be a number"),
    ("llama", {"rope_parameters": YARN | {"mscale": 10**400}}, "mscale is 1000.*; it must be a number, 0 to"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": -1.0}}, "attention_factor is -1.0; it must be a number"),
    ("llama", {"rope_parameters": YARN | {"factor": 1.0, "attention_factor": 2.0}}, "with a factor of 1 only 1.0"),
    ("deepseek_v3", {"rope_scaling": YARN}, "only one may stand"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; only 0 "),
    ("mixtral", {"attention_bias": True}, "attention_bias: not known"),
    ("qwen2", {"use_mrope": True}, "use_mrope is True; only False"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 5}, r"layer_types\[0\] is 'sliding_attention'; only 'full"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": 3}, "layer_types must be a list"),
    ("qwen2", {"num_key_value_heads": 4}, "num_kv_heads"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of whole numbers"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number, 1 to"),
    ("qwen3_moe", {"num_local_experts": None, "num_experts": None}, "num_experts is missing"),
]


@pytest.mark.parametrize(("family", "keys", "message"), REFUSED, ids=lambda value: None)
def test_a_key_that_we_cannot_follow_is_refused_by_its_name(
    family: Family, keys: dict[str, Any], message: str, hf_config: Config
) -> None:
    with pytest.raises(HFError, match=message):
        read_config(hf_config(family) | keys, "tiny")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200)
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_no_value_of_any_key_ends_in_another_error(data: st.DataObject, family: Family, hf_config: Config) -> None:
    config = hf_config(family, rope_parameters=YARN) | {"quantization_config": dict(FP8)}
    inside = data.draw(st.sampled_from(["", "rope_parameters", "quantization_config"]))
    target = config[inside] if inside else config
    known = [*target, "attention_factor", "mscale", "head_dim"]
    target[data.draw(st.sampled_from(known) | st.text(max_size=9))] = data.draw(JUNK)
    try:
        spec = spec_from_config(config, "tiny")
    except HFError as error:
        assert str(error).startswith("config.json")
    else:
        assert spec_from_config(config_from_spec(spec, "float32"), "tiny") == spec


GQA, ROPE, MOE = ("attention", "gqa"), ("attention", "gqa", "rope"), ("ffn", "moe")
# Family, keys of its config, where the spec is changed then, to what, and what is said of it.
UNSAYABLE: list[tuple[Family, dict[str, Any], tuple[str, ...], dict[str, Any], str]] = [
    ("llama", {}, GQA, {"sliding_window": 16}, r"attention\.gqa\.sliding_window is 16: .* llama can only say None"),
    ("llama", {}, GQA, {"bias": ["q"]}, r"gqa\.bias is \('q',\): .* llama can only say \('k', 'o', 'q', 'v'\)"),
    ("llama", {}, GQA, {"rope_head_dim": 2}, r"gqa\.rope_head_dim is 2: .* can only say 4"),
    ("llama", {}, ROPE, {"layout": "interleaved"}, r"rope\.layout is 'interleaved'"),
    (
        "llama",
        {"rope_parameters": YARN},
        (*ROPE, "scaling"),
        {"mscale_all_dim": 1.0},
        r"mscale_all_dim is 1\.0",
    ),
    ("llama", {"head_dim": 4}, (), {"hidden_size": 25}, r"model\.hidden_size is 25: .* multiples of its 6 heads"),
    ("llama", {}, (), {"mtp": {"depth": 1}}, r"model\.mtp\.depth is 1: .* llama can only say 0"),
    ("llama", {}, ("norm",), {"zero_centered": True}, r"model\.norm\.zero_centered is True"),
    ("llama", {}, ("ffn", "dense", "activation"), {"limit": 7.0}, r"model\.ffn\.dense\.activation\.limit is 7\.0"),
    (
        "qwen2",
        SLIDING | {"max_window_layers": 3},
        ("attention", "sliding"),
        {"bias": []},
        r"\(layer 3\): model\.attention\.sliding\.bias is \(\)",
    ),
    ("qwen3", {}, GQA, {"qk_norm": "full"}, r"gqa\.qk_norm is 'full': .* qwen3 can only say 'per_head'"),
    (
        "mixtral",
        {},
        (*MOE, "router"),
        {"renormalize": False},
        r"renormalize is False: .* mixtral can only say True",
    ),
    ("qwen3_moe", {}, MOE, {"shared_experts": {"num": 1}}, r"model\.ffn\.moe\.shared_experts is 7: .* can only say 0"),
    ("glm4_moe", {}, (*MOE, "router", "selection"), {"bias": False}, r"selection\.bias is False: .* can only say True"),
    ("glm4_moe", {}, (*MOE, "shared_experts"), {"gate": True}, r"shared_experts\.gate is True: .* can only say False"),
    ("gpt_oss", {}, (*MOE, "activation"), {"up_offset": 0.0}, r"up_offset is 0\.0: .* gpt_oss can only say 1\.0"),
    ("gpt_oss", {}, ("attention", "full"), {"sliding_window": 9}, r"full\.sliding_window is 9: .* can only say 128"),
    ("deepseek_v2", {}, (), {"mtp": {"depth": 1}}, r"model\.mtp\.depth is 1: .* deepseek_v2 can only say 0"),
    ("deepseek_v2", {}, ("attention", "mla", "rope"), {"layout": "half_split"}, r"'half_split': .* say 'interleaved'"),
    (
        "deepseek_v32",
        {},
        ("attention", "mla", "indexer"),
        {"rope_layout": "interleaved"},
        r"indexer\.rope_layout is 'interleaved': .* deepseek_v32 can only say 'half_split'",
    ),
]


@pytest.mark.parametrize(("family", "keys", "path", "values", "message"), UNSAYABLE, ids=lambda value: None)
def test_what_a_family_cannot_say_is_named(
    family: Family, keys: dict[str, Any], path: tuple[str, ...], values: dict[str, Any], message: str, hf_config: Config
) -> None:
    plain = spec_from_config(hf_config(family, **keys), "tiny").model_dump(exclude_none=True)
    place = plain["model"]
    for key in path:
        place = place[key]
    place.update(values)
    with pytest.raises(HFError, match=message):
        config_from_spec(ModelSpec.model_validate(plain), "float32")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "glm4_moe"])
def test_multi_token_prediction_can_be_left_out(family: Family, hf_config: Config) -> None:
    spec = spec_from_config(hf_config(family, num_nextn_predict_layers=2), "tiny")
    assert config_from_spec(spec, "float32")["num_nextn_predict_layers"] == 2
    without = config_from_spec(spec, "float32", with_mtp=False)
    assert without["num_nextn_predict_layers"] == 0
    assert spec_from_config(without, "tiny").model == spec.model.model_copy(update={"mtp": None})


@pytest.mark.parametrize(
    ("keys", "quantization"),
    [
        ({}, Quantization()),
        ({"scale_fmt": "ue8m0", "weight_block_size": [64, 32]}, Quantization((64, 32), "ue8m0")),
        ({"modules_to_not_convert": ["lm_head"]}, Quantization(modules_to_not_convert=("lm_head",))),
    ],
    ids=lambda value: None,
)
def test_block_scaled_fp8_is_read_and_written(
    keys: dict[str, Any], quantization: Quantization, hf_config: Config
) -> None:
    config = hf_config("deepseek_v3") | {"quantization_config": FP8 | keys}
    reading = read_config(config, "tiny")
    assert reading.quantization == quantization
    assert spec_from_config(config, "tiny") == spec_from_config(hf_config("deepseek_v3"), "tiny")
    written = config_from_spec(reading.spec, "bfloat16", quantization)
    assert written["quantization_config"] == FP8 | keys
    assert "quantization_config" not in config_from_spec(reading.spec, "bfloat16")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'; only fp8 .* Convert the weights to bfloat16 first"),
        ({}, "quant_method is missing"),
        ([], "quantization_config must be an object"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; only 'e4m3'"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme is 'static'"),
        (FP8 | {"weight_block_size": None}, "weight_block_size is missing"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        (FP8 | {"weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        (FP8 | {"scale_fmt": "e8"}, "scale_fmt is 'e8'"),
        (FP8 | {"rotation": True}, r"quantization_config\.rotation: not known"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "must be a list of names"),
    ],
    ids=lambda value: None,
)
def test_any_other_quantisation_is_refused_with_a_way_out(quantization: Any, message: str, hf_config: Config) -> None:
    config = hf_config("deepseek_v3") | {"quantization_config": quantization}
    with pytest.raises(HFError, match=message):
        read_config(config, "tiny")
