"""Changes carry the class that decides what a checkpoint of the old spec is still good for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelspec.diff import CLASSES, Change, diff, summarize, tensor_changes
from modelspec.resolve import resolve
from modelspec.schema import Model
from modelspec.validate import check, load

NANO = Path(__file__).parents[2] / "specs" / "deepseek-v3-nano.yaml"


def test_a_spec_does_not_differ_from_itself() -> None:
    assert diff(load(NANO), load(NANO)) == []


@pytest.mark.parametrize(
    ("override", "path", "change_class"),
    [
        ("model.ffn.moe.num_experts=32", "model.ffn.moe.num_experts", "checkpoint-breaking"),
        ("model.ffn.moe.router.scale=1.5", "model.ffn.moe.router.scale", "convergence"),
        ("training.stages.0.learning_rate=0.1", "training.stages.0.learning_rate", "convergence"),
        ("training.seed=7", "training.seed", "convergence"),
        ("precision.compute=bfloat16", "precision.compute", "precision"),
        ("parallelism.microbatch_size=2", "parallelism.microbatch_size", "execution"),
        ("training.stages.0.parallelism={microbatch_size: 2}", "training.stages.0.parallelism", "execution"),
        ("training.checkpoint.keep_last=9", "training.checkpoint.keep_last", "execution"),
        ("summary=other words", "summary", "cosmetic"),
    ],
)
def test_each_change_has_its_class(override: str, path: str, change_class: str) -> None:
    (change,) = diff(load(NANO), load(NANO, [override]))
    assert (change.path, change.change_class) == (path, change_class)


OVERRIDES = (
    "model.mtp=null",
    "training.losses.mtp=null",
    "training.seed=3",
    "model.hidden_size=128",
    "model.tie_embeddings=true",
    "model.layers=[{repeat: 4, attention: mla, ffn: moe}]",
    "model.attention.mla.q_lora_rank=null",
    "model.attention.mla={type: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 32, rope: none}",
    "model.ffn.moe.shared_experts=null",
    "model.ffn.moe.router.selection.bias=false",
    "precision.compute=bfloat16",
    "training.stages.0.steps=10",
    "training.losses.balance=null",
    "data=null",
    "name=other",
)


def _key(change: Change) -> tuple[str, str, str, str]:
    return change.path, str(change.before), str(change.after), change.change_class


@given(st.sets(st.sampled_from(OVERRIDES)), st.sets(st.sampled_from(OVERRIDES)))
def test_reversing_a_diff_swaps_before_and_after(some: set[str], others: set[str]) -> None:
    old, new = (check(resolve(NANO, sorted(overrides)))[0] for overrides in (some, others))
    assert old is not None and new is not None
    there, back = diff(old, new), diff(new, old)
    assert sorted((c.path, str(c.before), str(c.after)) for c in there) == sorted(
        (c.path, str(c.after), str(c.before)) for c in back
    )
    assert bool(there) == (old != new)
    assert diff(old, old) == diff(new, new) == []


@given(st.sets(st.sampled_from(OVERRIDES)))
def test_a_checkpoint_loads_exactly_where_no_change_is_breaking(overrides: set[str]) -> None:
    old, new = load(NANO), check(resolve(NANO, sorted(overrides)))[0]
    assert new is not None
    shapes = [{name: t.shape for name, t in spec.tensors().items()} for spec in (old, new)]
    assert any(c.change_class == "checkpoint-breaking" for c in diff(old, new)) == (shapes[0] != shapes[1])


def test_other_names_and_other_cuts_of_the_same_layers_are_no_change() -> None:
    old = load(NANO)
    renamed = old.model.model_dump()
    renamed["attention"]["latent"] = renamed["attention"].pop("mla")
    renamed["ffn"] = {"thin": renamed["ffn"]["dense"], "wide": renamed["ffn"]["moe"], "unused": renamed["ffn"]["dense"]}
    renamed["layers"] = (
        {"attention": "latent", "ffn": "thin"},
        {"repeat": 3, "pattern": ({"attention": "latent", "ffn": "wide"},)},
    )
    new = old.model_copy(update={"model": Model.model_validate(renamed)})
    assert diff(old, new) == []


def test_a_renamed_variant_that_also_changed_is_compared_with_its_former_self() -> None:
    old = load(NANO)
    renamed = old.model.model_dump()
    renamed["ffn"]["experts"] = renamed["ffn"].pop("moe") | {"num_experts": 32}
    renamed["layers"] = ({"attention": "mla", "ffn": "dense"}, {"repeat": 3, "attention": "mla", "ffn": "experts"})
    new = old.model_copy(update={"model": Model.model_validate(renamed)})
    assert [_key(change) for change in diff(old, new)] == [
        ("model.ffn.moe.num_experts", "16", "32", "checkpoint-breaking")
    ]


def test_only_what_moves_a_tensor_is_breaking() -> None:
    changes = diff(load(NANO), load(NANO, ["model.ffn.moe.num_experts=32", "model.norm.eps=1e-5"]))
    assert {change.path: change.change_class for change in changes} == {
        "model.ffn.moe.num_experts": "checkpoint-breaking",
        "model.norm.eps": "convergence",
    }


def test_tensors_are_new_gone_or_reshaped() -> None:
    old, new = load(NANO).model, load(NANO, ["model.attention.mla.q_lora_rank=null", "model.vocab_size=4100"]).model
    changes = tensor_changes(old, new)
    layers = old.num_layers + 1
    assert len(changes.new) == layers and all(name.endswith("q_proj.weight") for name in changes.new)
    assert len(changes.gone) == 3 * layers
    assert changes.reshaped == ("embed_tokens.weight", "lm_head.weight")
    assert changes.elements == 2 * 4100 * 256 + layers * 4 * (32 + 16) * 256


def test_the_summary_counts_what_the_changes_say() -> None:
    summary = summarize(load(NANO), load(NANO, ["model.vocab_size=4100", "training.seed=1"]))
    assert summary.classes == dict.fromkeys(CLASSES, 0) | {"checkpoint-breaking": 1, "convergence": 1}
    before, after = summary.parameters["total"]
    assert after - before == 2 * 4 * 256
    assert summary.parameters["mtp"][0] == summary.parameters["mtp"][1]
