"""Every family of Hugging Face: its own class of transformers says what a config means, config -> spec -> config."""

import json
from collections.abc import Callable
from math import log
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from modelspec.hf_config import Family, HFError, config_from_spec, family_of, read_config, spec_from_config
from modelspec.hf_config.common import runs
from modelspec.schema import GQA, MLA, GatedDeltaNet, LayerPattern, ModelSpec, MoE, Rope, Yarn

Keys = dict[str, Any]
Config = Callable[..., Keys]
FAMILIES: tuple[Family, ...] = get_args(Family)
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 16}
ODD: list[tuple[Family, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True, "initializer_range": 0.1}) for family in FAMILIES),
    *((family, {"rope_parameters": YARN | {"rope_theta": 500.0}}) for family in FAMILIES),
    *((family, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}) for family in FAMILIES),
    *((family, {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False}}) for family in FAMILIES),
    *((family, {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}) for family in FAMILIES),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0} | GROUPS),
    ("deepseek_v2", {"q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "num_nextn_predict_layers": 0}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 0.5}),
    ("deepseek_v3", {"first_k_dense_replace": 9, "num_nextn_predict_layers": 2}),
    ("deepseek_v32", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "head_dim": 12, "first_k_dense_replace": 0}),
    ("glm4_moe", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}, "head_dim": 16}),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.0}} | GROUPS),
    ("gpt_oss", {"attention_bias": False, "swiglu_limit": 5.0, "swiglu_alpha": 1.0, "num_hidden_layers": 6}),
    ("gpt_oss", {"layer_types": ["full_attention"] * 5, "head_dim": 8, "rope_parameters": {"rope_type": "default"}}),
    ("llama", {"attention_bias": True, "head_dim": 10, "num_key_value_heads": None}),
    ("llama", {"mlp_bias": True}),
    ("mixtral", {"head_dim": 10, "sliding_window": 16}),
    ("mixtral", {"head_dim": None, "num_experts_per_tok": 1}),
    ("qwen2", SLIDING | {"max_window_layers": 3}),
    (
        "qwen2",
        SLIDING | {"layer_types": ["sliding_attention", *["full_attention"] * 4]},
    ),
    ("qwen3", SLIDING | {"max_window_layers": 0, "attention_bias": True, "head_dim": 10}),
    ("qwen3_moe", SLIDING | {"attention_bias": True, "head_dim": 10, "norm_topk_prob": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 6}),
    ("qwen3_moe", {"mlp_only_layers": [0, 3]}),
]


def odd_ids(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(value) or "defaults"
    return value if isinstance(value, str) and value in FAMILIES else None


@pytest.mark.parametrize(("family", "keys"), ODD, ids=odd_ids)
def test_a_config_survives_the_way_into_a_spec_and_back(
    family: Family, keys: dict[str, Any], hf_config: Config
) -> None:
    reading = read_config(hf_config(family, **keys), "tiny")
    assert reading.family == family == family_of(reading.spec.model)
    config = config_from_spec(reading.spec, "float32")
    assert config["model_type"] == family
    again = read_config(json.loads(json.dumps(config)), "tiny")
    assert again.spec == reading.spec
    assert config_from_spec(again.spec, "float32") == config


def meta(config: Any) -> torch.nn.Module:
    """The model that transformers makes of a config, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def weights(model: torch.nn.Module) -> int:
    """Elements of what a checkpoint holds."""
    return sum(tensor.numel() for name, tensor in model.state_dict(keep_vars=True).items())


@pytest.mark.parametrize(("family", "keys"), ODD, ids=odd_ids)
def test_layers_and_sizes_are_those_that_transformers_builds(
    family: Family, keys: dict[str, Any], hf_config: Config
) -> None:
    file = hf_config(family, **keys)
    spec, config = spec_from_config(file, "tiny").model, AutoConfig.for_model(**file)
    model = meta(config)
    # A tied head is listed twice in a state.
    twice = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    assert sum(tensor.numel for tensor in spec.main_tensors().values()) == weights(model) - twice
    for index, layer in enumerate(spec.expanded_layers()):
        built: Any = model.model.layers[index]  # type: ignore[union-attr, index]
        ours = spec.attention[layer.attention]
        # Mixtral's attention asks the config at each step.
        attention = config if family == "mixtral" else getattr(built, "self_attn", None)
        window = getattr(attention, "sliding_window", None)
        assert getattr(ours, "sliding_window", None) == window
        assert isinstance(spec.ffn[layer.ffn], MoE) == any("experts" in name for name, _ in built.named_modules())


@pytest.mark.parametrize(("family", "keys"), ODD, ids=odd_ids)
def test_what_is_written_is_the_same_to_transformers(family: Family, keys: dict[str, Any], hf_config: Config) -> None:
    file = hf_config(family, **keys)
    written = config_from_spec(spec_from_config(file, "tiny"), "float32")
    config, again = AutoConfig.for_model(**file), AutoConfig.for_model(**json.loads(json.dumps(written)))
    one, other = meta(config), meta(again)
    assert {name: tensor.shape for name, tensor in one.state_dict().items()} == {
        name: tensor.shape for name, tensor in other.state_dict().items()
    }
    for (name, left), (_, right) in zip(one.named_modules(), other.named_modules(), strict=True):
        for attribute in ATTRIBUTES:
            # Absent groups are one group.
            none = 1 if "group" in attribute else None
            ours, said = getattr(right, attribute, none) or none, getattr(left, attribute, none) or none
            assert ours == (pytest.approx(said, rel=1e-12) if isinstance(said, float) else said), (name, attribute)
    assert torch.equal(frequencies(again), frequencies(config))


# What modules of transformers compute with beside their weights.
ATTRIBUTES = (
    *("scaling", "attention_scaling", "softmax_scale", "sliding_window", "variance_epsilon", "eps", "alpha", "limit"),
    *("top_k", "routed_scaling_factor", "norm_topk_prob", "topk_method", "num_group", "topk_group", "index_topk"),
)


def frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """Of rope: they are computed, so the model needs memory."""
    frequencies = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    assert isinstance(frequencies, torch.Tensor)
    return frequencies


def g(m: float, factor: float = 4.0) -> float:
    """The function of m in YaRN's scales."""
    return 0.1 * m * log(factor) + 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 0.3}, {"attention_factor": 1.2}],
    ids=odd_ids,
)
def test_scales_of_yarn_are_those_of_transformers(family: Family, scaling: dict[str, float], hf_config: Config) -> None:
    file = hf_config(family, rope_parameters=YARN | scaling)
    model: Any = meta(AutoConfig.for_model(**file))
    spec = spec_from_config(file, "tiny").model
    part, built = next(
        (part, built.self_attn)
        for layer, built in zip(spec.expanded_layers(), model.model.layers, strict=True)
        if not isinstance(part := spec.attention[layer.attention], GatedDeltaNet)
    )
    assert isinstance(part.rope, Rope) and isinstance(part.rope.scaling, Yarn)
    m, all_dim = part.rope.scaling.mscale, part.rope.scaling.mscale_all_dim
    assert g(m) / g(all_dim) == pytest.approx(model.model.rotary_emb.attention_scaling, rel=1e-12)
    width = part.qk_nope_head_dim + part.qk_rope_head_dim if isinstance(part, MLA) else part.head_dim
    assert width**-0.5 * g(all_dim) ** 2 == pytest.approx(built.scaling, rel=1e-12)


@settings(max_examples=60)
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_any_mixture_of_keys_survives_the_way_there_and_back(
    data: st.DataObject, family: Family, hf_config: Config
) -> None:
    keys: dict[str, Any] = {}
    for other, more in ODD:
        if other == family and data.draw(st.booleans()):
            keys |= more
    keys["num_hidden_layers"] = data.draw(st.integers(6, 12)) if "layer_types" not in str(keys) else 5
    if family in ("deepseek_v2", "llama"):
        keys["hidden_size"] = 12 * data.draw(st.integers(1, 9))
    spec = spec_from_config(hf_config(family, **keys), "tiny")
    assert spec_from_config(config_from_spec(spec, "float32"), "tiny") == spec


@given(
    layers=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("dm")), min_size=1, max_size=40),
    times=st.integers(1, 4),
)
def test_runs_stand_for_the_layers_that_they_are_made_of(layers: list[tuple[str, str]], times: int) -> None:
    layers = layers * times
    found: list[tuple[str, str]] = []
    for entry in runs([a for a, _ in layers], [f for _, f in layers]):
        inner = entry.get("pattern", [entry | {"repeat": 1}])
        block = [(run["attention"], run["ffn"]) for run in inner for _ in range(run.get("repeat", 1))]
        found += block * entry.get("repeat", 1)
    assert found == layers


def test_alternating_layers_are_one_pattern(hf_config: Config) -> None:
    model = spec_from_config(hf_config("gpt_oss", num_hidden_layers=36), "tiny").model
    assert len(model.layers) == 1
    pattern = model.layers[0]
    assert isinstance(pattern, LayerPattern) and pattern.repeat == 18
    assert [run.attention for run in pattern.pattern] == ["sliding", "full"]
    assert runs(["a"] * 61, ["d"] * 3 + ["m"] * 58) == [
        {"repeat": 3, "attention": "a", "ffn": "d"},
        {"repeat": 58, "attention": "a", "ffn": "m"},
    ]


LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_a_config_of_the_hub_is_written_as_it_stands_there() -> None:
    written = config_from_spec(spec_from_config(LLAMA_31, "llama"), "bfloat16")
    say_nothing = {"bos_token_id", "eos_token_id", "pretraining_tp", "torch_dtype", "transformers_version", "use_cache"}
    for key in LLAMA_31.keys() - say_nothing:
        assert written[key] == LLAMA_31[key], key
    assert set(read_config(LLAMA_31, "llama").ignored) == say_nothing | {"architectures"}


def test_kimi_k2_is_deepseek_v3_by_another_name(hf_config: Config) -> None:
    config = hf_config("deepseek_v3", n_group=1, topk_group=1) | {"model_type": "kimi_k2"}
    reading = read_config(config, "kimi")
    assert reading.family == "deepseek_v3"
    assert reading.spec.model == spec_from_config(config | {"model_type": "deepseek_v3"}, "kimi").model


def outcome(config: dict[str, Any]) -> ModelSpec | str:
    """The spec of a config, or what is wrong with it."""
    try:
        return spec_from_config(config, "tiny")
    except HFError as error:
        # Which keys stand in the config is no difference in what is wrong.
        return str(error).rpartition("no valid spec")[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_is_missing_or_means_what_the_class_takes_it_for(family: Family, hf_config: Config) -> None:
    config = hf_config(family)
    # What a file without this one means is decided by its tensors: no file that leaves it out has the module.
    exempt = {"model_type", "num_nextn_predict_layers"}
    if family.startswith("deepseek"):
        # Latent attention has as many heads of keys as of queries, whatever the class has by default.
        exempt.add("num_key_value_heads")
    for key in config.keys() - exempt:
        shorter = {other: value for other, value in config.items() if other != key}
        ours = outcome(shorter)
        if not isinstance(ours, str) or "is missing" not in ours:
            assert ours == outcome(json.loads(AutoConfig.for_model(**shorter).to_json_string())), key


def test_gpt_oss_without_scaling_says_so(hf_config: Config) -> None:
    """Its class would take YaRN where nothing is said."""
    spec = spec_from_config(hf_config("gpt_oss", rope_parameters={"rope_type": "default"}), "tiny")
    gqa = spec.model.attention["full"]
    assert isinstance(gqa, GQA) and gqa.rope == Rope(theta=150000.0, layout="half_split")
    again = AutoConfig.for_model(**json.loads(json.dumps(config_from_spec(spec, "float32"))))
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 150000.0}


def test_latent_norms_keep_their_own_eps(hf_config: Config) -> None:
    for family in FAMILIES:
        for attention in spec_from_config(hf_config(family), "tiny").model.attention.values():
            if isinstance(attention, MLA):
                assert attention.latent_norm_eps == 1e-6
                assert attention.indexer is None or attention.indexer.norm_eps == 1e-6
