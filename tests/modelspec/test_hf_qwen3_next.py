"""Qwen3-Next's config.json <-> spec."""

import json
from pathlib import Path
from typing import Any

import pytest

from modelspec.hf_config import HFError, config_from_spec, family_of, spec_from_config
from modelspec.validate import load

NAME = "qwen3-next-80b-a3b"
PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "published.json").read_text())[NAME]


def test_the_published_config_is_the_shipped_spec() -> None:
    assert spec_from_config(PUBLISHED, NAME).model == load(f"modelspec:{NAME}").model


def test_the_shipped_spec_says_every_published_key() -> None:
    config = config_from_spec(load(f"modelspec:{NAME}"), "bfloat16")
    # The width of dense networks, of which it has none.
    for key in PUBLISHED.keys() - {"intermediate_size"}:
        assert config[key] == PUBLISHED[key], key


def test_a_short_config_means_what_transformers_takes_it_for() -> None:
    spoken = {key: value for key, value in PUBLISHED.items() if not key.startswith("linear_")}
    spoken = {key: value for key, value in spoken.items() if key not in ("partial_rotary_factor", "norm_topk_prob")}
    assert spec_from_config(spoken, NAME).model == load(f"modelspec:{NAME}").model


@pytest.mark.parametrize(
    "said",
    [
        {"full_attention_interval": 2},
        {"layer_types": ["linear_attention", "full_attention"] * 2},
    ],
    ids=["interval", "list"],
)
def test_which_layers_have_attention_may_be_said_in_two_ways(said: dict[str, Any]) -> None:
    model = spec_from_config(PUBLISHED | {"num_hidden_layers": 4} | said, NAME).model
    assert [layer.attention for layer in model.expanded_layers()] == ["gdn", "gqa"] * 2


def test_a_model_that_begins_with_gated_attention_is_of_the_family_too() -> None:
    spec = load(f"modelspec:{NAME}", ["model.layers=[{attention: gqa, ffn: moe}, {attention: gdn, ffn: moe}]"])
    assert family_of(spec.model) == "qwen3_next"
    assert config_from_spec(spec, "bfloat16")["layer_types"] == ["full_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("model.norm.zero_centered=false", "model.norm.zero_centered"),
        ("model.ffn.moe.shared_experts.gate=false", "shared_experts.gate"),
        ("model.attention.gqa.output_gate=false", "output_gate"),
        ("model.ffn.moe.router.scale=2.0", "router.scale"),
        ("model.layers=[{attention: gdn, ffn: moe}]", "no layer has a GQA"),
    ],
)
def test_what_the_family_cannot_say_is_named(override: str, place: str) -> None:
    spec = load(f"modelspec:{NAME}", [override])
    with pytest.raises(HFError, match=place.replace(".", r"\.")):
        config_from_spec(spec, "bfloat16")


def test_windows_are_not_silently_dropped() -> None:
    with pytest.raises(HFError, match="use_sliding_window"):
        spec_from_config(PUBLISHED | {"use_sliding_window": True}, NAME)
