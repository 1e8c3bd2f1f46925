"""The schema: strict values, tables of tensors, and a description on everything that a person may write."""

from collections.abc import Callable, Iterator
from math import prod
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from modelspec import schema
from modelspec.schema import MLA, Dense, ModelSpec, MoE
from modelspec.schema.base import TensorSpec

Tiny = Callable[..., ModelSpec]


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType, tuple, list, dict):
        for argument in get_args(annotation):
            yield from _classes_in(argument)


def _reachable(start: type[BaseModel]) -> list[type[BaseModel]]:
    found = [start]
    for cls in found:
        for field in cls.model_fields.values():
            found += [other for other in _classes_in(field.annotation) if other not in found]
    return found


CLASSES = _reachable(ModelSpec)
FIELDS = {f"{cls.__name__}.{name}": field for cls in CLASSES for name, field in cls.model_fields.items()}


def test_the_walk_reaches_every_part_of_the_language() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert {"MLA", "MoE", "Yarn", "AdamW", "Stage", "BatchRamp", "FP8", "Pipeline", "JSONLines", "Packing"} <= names


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_description(name: str) -> None:
    description = FIELDS[name].description
    assert description and description == description.strip()
    assert description.endswith("...") or not description.endswith(".")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_strict_frozen_and_says_what_it_is(cls: type[BaseModel]) -> None:
    assert cls.__doc__ and cls.__doc__ != schema.Strict.__doc__
    config = cls.model_config
    assert (config.get("extra"), config.get("strict"), config.get("frozen")) == ("forbid", True, True)


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if not field.is_required()])
def test_no_field_tells_null_from_absent(name: str) -> None:
    """A default is null, or a value that null could not be."""
    field = FIELDS[name]
    accepts_null = type(None) in get_args(field.annotation)
    assert not accepts_null or field.get_default() is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-key": ({"model": {"hiden_size": 3}}, "hiden_size"),
    "unknown-key-deep": ({"router": {"selection": {"groups": {"number": 3}}}}, "number"),
    "text-for-a-number": ({"model": {"hidden_size": "24"}}, "hidden_size"),
    "number-for-text": ({"name": 3}, "name"),
    "truth-for-a-number": ({"model": {"hidden_size": True}}, "hidden_size"),
    "number-for-truth": ({"model": {"tie_embeddings": 1}}, "tie_embeddings"),
    "fraction-for-a-count": ({"mla": {"num_heads": 3.0}}, "num_heads"),
    "nan": ({"model": {"norm": {"eps": float("nan")}}}, "eps"),
    "infinity": ({"mla": {"rope": {"theta": float("inf")}}}, "theta"),
    "zero-eps": ({"model": {"norm": {"eps": 0.0}}}, "eps"),
    "negative": ({"moe": {"num_experts": -1}}, "num_experts"),
    "absurd": ({"model": {"vocab_size": 10**15}}, "vocab_size"),
    "another-layout": ({"mla": {"rope": {"layout": "neox"}}}, "layout"),
    "another-word-than-none": ({"mla": {"rope": "off"}}, "rope"),
    "no-layers": ({"model": {"layers": []}}, "layers"),
    "bad-name": ({"name": "a/b"}, "name"),
    "another-version": ({"spec_version": 2}, "spec_version"),
}


@pytest.mark.parametrize(("parts", "field"), WRONG.values(), ids=WRONG.keys())
def test_wrong_values_are_refused_at_their_field(parts: dict[str, Any], field: str, tiny: Tiny) -> None:
    with pytest.raises(ValidationError) as caught:
        tiny(**parts)
    assert any(field in map(str, error["loc"]) for error in caught.value.errors())


def test_values_are_frozen_and_equal_by_content(tiny: Tiny) -> None:
    spec = tiny()
    with pytest.raises(ValidationError, match="frozen"):
        spec.model.__setattr__("hidden_size", 3)
    assert spec == tiny()
    assert spec != tiny(model={"hidden_size": 32})


def numbers(tensors: dict[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_table_of_latent_attention(tiny: Tiny) -> None:
    attention = tiny().model.attention["mla"]
    assert numbers(attention.tensors(24, tiny().model.norm)) == {
        "q_a_proj.weight": (10, 24),
        "q_a_norm.weight": (10,),
        "q_b_proj.weight": (3 * (6 + 4), 10),
        "kv_a_proj.weight": (8 + 4, 24),
        "kv_a_norm.weight": (8,),
        "kv_b_proj.weight": (3 * (6 + 5), 8),
        "o_proj.weight": (24, 3 * 5),
    }


def test_table_of_latent_attention_without_query_latent(tiny: Tiny) -> None:
    table = tiny(mla={"q_lora_rank": None}).model.attention["mla"].tensors(24, tiny().model.norm)
    assert {name: shape for name, shape in numbers(table).items() if name.startswith("q")} == {
        "q_proj.weight": (30, 24)
    }


def test_table_of_a_dense_network(tiny: Tiny) -> None:
    table = numbers(tiny().model.ffn["dense"].tensors(24))
    assert table == {"gate_proj.weight": (20, 24), "up_proj.weight": (20, 24), "down_proj.weight": (24, 20)}


def test_table_of_a_mixture(tiny: Tiny) -> None:
    table = tiny(moe={"shared_experts": {"num": 2}}).model.ffn["moe"].tensors(24)
    assert numbers(table) == {
        "router.weight": (10, 24),
        "router.selection_bias": (10,),
        "experts.gate_up_proj": (10, 14, 24),
        "experts.down_proj": (10, 24, 7),
        "shared_experts.gate_proj.weight": (14, 24),
        "shared_experts.up_proj.weight": (14, 24),
        "shared_experts.down_proj.weight": (24, 14),
    }
    assert table["router.selection_bias"] == TensorSpec((10,), kind="buffer", dtype="float32", initial="zeros")
    assert [name for name, tensor in table.items() if tensor.experts_per_token] == [
        "experts.gate_up_proj",
        "experts.down_proj",
    ]


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        ({"moe": {"shared_experts": None}}, "shared_experts"),
        ({"router": {"selection": {"bias": False}}}, "selection_bias"),
        ({"model": {"tie_embeddings": True}}, "lm_head"),
        ({"model": {"mtp": None}}, "mtp"),
    ],
    ids=["shared-experts", "bias", "head", "mtp"],
)
def test_what_is_left_out_has_no_tensors(parts: dict[str, Any], absent: str, tiny: Tiny) -> None:
    assert any(absent in name for name in tiny().tensors())
    assert not any(absent in name for name in tiny(**parts).tensors())


def test_shared_experts_may_have_their_own_width(tiny: Tiny) -> None:
    moe = tiny(moe={"shared_experts": {"num": 3, "intermediate_size": 5}}).model.ffn["moe"]
    assert isinstance(moe, MoE)
    assert moe.shared_width == 15


def test_one_token_uses_its_experts_and_all_else() -> None:
    assert TensorSpec((10, 14, 24), experts_per_token=4).active == 4 * 14 * 24
    assert TensorSpec((7, 3)).active == TensorSpec((7, 3)).numel == 21


def test_runs_and_patterns_are_expanded_in_order(tiny: Tiny) -> None:
    a, b = {"attention": "mla", "ffn": "dense"}, {"attention": "mla", "ffn": "moe"}
    model = tiny(model={"layers": [a, {"repeat": 2, "pattern": [a | {"repeat": 2}, b]}, b | {"repeat": 3}]}).model
    expected = ["dense", *["dense", "dense", "moe"] * 2, *["moe"] * 3]
    assert [layer.ffn for layer in model.expanded_layers()] == expected
    assert model.num_layers == len(expected)
    assert all(layer.repeat == 1 for layer in model.expanded_layers())


def test_a_module_of_multi_token_prediction_is_a_block_two_norms_a_projection_and_a_norm(tiny: Tiny) -> None:
    model = tiny(model={"mtp": {"depth": 2}}).model
    *_, last = model.expanded_layers()
    block = sum(tensor.numel for tensor in model.block_tensors(last).values())
    assert sum(tensor.numel for tensor in model.mtp_tensors().values()) == 2 * (block + 2 * 24 * 24 + 3 * 24)
    dense = tiny(model={"mtp": {"layer": {"attention": "mla", "ffn": "dense"}}}).model
    assert "mtp.0.block.ffn.gate_proj.weight" in dense.mtp_tensors()


def test_table_is_the_sum_of_its_parts(tiny: Tiny) -> None:
    model = tiny().model
    dense, moe, mla = model.ffn["dense"], model.ffn["moe"], model.attention["mla"]
    assert isinstance(dense, Dense) and isinstance(moe, MoE) and isinstance(mla, MLA)

    def count(tensors: dict[str, TensorSpec]) -> int:
        return sum(prod(tensor.shape) for tensor in tensors.values())

    layers = 3 * (count(mla.tensors(24, model.norm)) + 2 * 24) + count(dense.tensors(24)) + 2 * count(moe.tensors(24))
    assert count(model.main_tensors()) == 2 * 61 * 24 + 24 + layers
    assert model.tensors() == model.main_tensors() | model.mtp_tensors()
