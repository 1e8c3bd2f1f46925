"""Changes carry the class that decides what a checkpoint of the old spec is still good for."""

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelspec.diff import CLASSES, Change, diff, summarize, tensor_changes
from modelspec.diff.canonical import KINDS
from modelspec.hardware import load as load_hardware
from modelspec.plan import plan
from modelspec.resolve import resolve
from modelspec.schema import LayerRun, Model, ModelSpec, Tensors
from modelspec.validate import check, load

ROOT = Path(__file__).parents[2]
NANO = ROOT / "specs" / "deepseek-v3-nano.yaml"
# The shipped specs, each as small as it can be.
TINY = sorted((ROOT / "tests" / "specs").glob("*.yaml"))


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
    assert sorted(map(_key, there)) == sorted((c.path, str(c.after), str(c.before), c.change_class) for c in back)
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


def test_the_summary_has_what_the_plans_of_both_sides_say() -> None:
    old, new = load(NANO), load(NANO, ["model.ffn.moe.num_experts=32", "training.stages.0.batch_size=16"])
    for device in ("h800", "mi300x"):
        hardware = load_hardware(device)
        summary, back = (summarize(*sides, hardware) for sides in ((old, new), (new, old)))
        plans = [plan(side, hardware=hardware) for side in (old, new)]
        assert summary.hardware == device
        assert summary.memory_bytes == tuple(each.memory.ranks[each.memory.heaviest].total for each in plans)
        assert summary.gpu_hours == tuple(each.training.gpu_hours for each in plans)
        assert summary.memory_bytes and summary.memory_bytes[0] < summary.memory_bytes[1]
        assert summary.gpu_hours and 1.5 < summary.gpu_hours[1] / summary.gpu_hours[0] < 3
        for name in ("memory_bytes", "gpu_hours", "cost_usd"):
            there = getattr(summary, name)
            assert getattr(back, name) == (there and there[::-1])
    assert summarize(old, new) == summarize(old, new, load_hardware("h800"))
    unpriced = load_hardware("h800").model_copy(update={"price": None})
    assert summarize(old, new, unpriced).cost_usd is None
    assert summarize(old, new, unpriced).gpu_hours == summarize(old, new).gpu_hours


def test_memory_is_that_of_the_stage_that_needs_most_and_training_flops_have_the_name_of_what_they_count() -> None:
    v3 = NANO.with_name("deepseek-v3.yaml")
    kept = ["parallelism.recompute=[]", "training.stages.2.parallelism.recompute=[]"]
    old, new = load(v3, kept), load(v3, [*kept, "training.stages.2.parallelism.context=16"])
    summary, planned = summarize(old, new), plan(new)
    assert summary.memory_bytes and summary.memory_stages and summary.memory_verdicts
    most = max(planned.memory.stages, key=lambda stage: stage.total)
    assert (most.name, most.verdict) == ("context-128k", "OOM") and planned.memory.stages[0].name == "pretrain"
    found = summary.memory_bytes[1], summary.memory_stages[1], summary.memory_verdicts[1]
    assert found == (most.total, most.name, most.verdict)
    assert summary.most_inclusive == ("training_with_mtp", "training with multi-token prediction")
    recomputed = summarize(old, load(v3))
    assert recomputed.most_inclusive == ("training_with_recompute", "training with what is recomputed")
    plain = load(v3, ["model.mtp=null", "training.losses.mtp=null", "parallelism.recompute=[]"])
    assert summarize(plain, plain).most_inclusive == ("training", "training")


@pytest.mark.parametrize("override", ["training=null", "parallelism={world_size: 4, expert: 3}"])
def test_a_side_of_which_no_plan_can_be_made_fails_no_diff(override: str) -> None:
    old, new = load(NANO), check(resolve(NANO, [override]))[0]
    assert new is not None and diff(old, new)
    for sides in ((old, new), (new, old)):
        summary = summarize(*sides)
        assert (summary.memory_bytes, summary.gpu_hours, summary.cost_usd) == (None, None, None)
        assert summary.parameters["total"][0] == summary.parameters["total"][1]


def _with(spec: ModelSpec, **changed: Any) -> ModelSpec:
    """The spec with other keys of the model."""
    return spec.model_copy(update={"model": Model.model_validate(spec.model.model_dump() | changed)})


def _doubled(spec: ModelSpec) -> ModelSpec:
    """The same model, in which neighbouring layers have their variants under two names."""
    plain = spec.model.model_dump()
    variants = {kind: plain[kind] | {f"{name}2": each for name, each in plain[kind].items()} for kind in KINDS}
    layers = [
        {"attention": f"{run.attention}{'2' * (index % 2)}", "ffn": f"{run.ffn}{'2' * (index % 3 == 1)}"}
        for index, run in enumerate(spec.model.expanded_layers())
    ]
    return _with(spec, **variants, layers=layers)


def test_two_names_for_one_content_are_no_change() -> None:
    one = load(NANO)
    two = _doubled(one)
    assert {run.ffn for run in two.model.expanded_layers()} == {"dense", "moe", "moe2"}
    assert diff(one, two) == diff(two, one) == diff(two, two) == []


def test_two_names_for_one_content_hide_no_other_change() -> None:
    one, wide = load(NANO), load(NANO, ["model.ffn.moe.num_experts=32"])
    for old, new in ((_doubled(one), wide), (one, _doubled(wide))):
        assert [_key(change) for change in diff(old, new)] == [
            ("model.ffn.moe.num_experts", "16", "32", "checkpoint-breaking")
        ]
    assert len(diff(_doubled(one), _doubled(wide))) == 1


def test_a_content_that_two_names_had_and_one_keeps_is_told() -> None:
    one = load(NANO)
    moe = one.model.model_dump()["ffn"]["moe"]
    layers = [{"repeat": 2, "attention": "mla", "ffn": name} for name in ("moe", "other")]
    same = _with(one, ffn={"moe": moe, "other": moe}, layers=layers)
    split = _with(one, ffn={"moe": moe, "other": moe | {"num_experts": 32}}, layers=layers)
    paths = [change.path for change in diff(same, split)]
    assert paths == ["model.ffn.other", "model.mtp.layer.ffn", "model.layers"]
    assert {change.path for change in diff(split, same)} == set(paths)


def test_a_variant_that_must_not_take_anothers_name_has_a_legal_one() -> None:
    old = load(NANO)
    plain = old.model.model_dump()
    swapped = plain["ffn"] | {"keep": plain["ffn"]["moe"], "moe": plain["ffn"]["moe"] | {"num_experts": 8}}
    layers = [{"attention": "mla", "ffn": name} for name in ("dense", "keep", "keep", "moe")]
    changes = diff(old, _with(old, ffn=swapped, layers=layers))
    assert [change.path for change in changes] == ["model.ffn.moe_new", "model.mtp.layer.ffn", "model.layers"]


def test_norms_that_a_run_says_again_are_no_change_and_those_of_an_mtp_block_are() -> None:
    old = load(NANO)
    norm = old.model.norm.model_dump()
    last = {"attention": "mla", "ffn": "moe"}
    first = [{"attention": "mla", "ffn": "dense"}, last | {"repeat": 2}]
    assert diff(old, _with(old, layers=[*first, last | {"norm": norm}])) == []
    own = last | {"norm": norm | {"eps": 1e-3}}
    implied, said = (_with(old, layers=[*first, own], mtp={"depth": 1, "layer": each}) for each in (None, last))
    assert [change.path for change in diff(implied, said)] == ["model.mtp.layer"]


def test_changes_between_shipped_specs_have_the_same_classes_in_both_directions() -> None:
    specs = [load(path) for path in TINY]
    assert len(specs) > 20
    for old, new in combinations(specs, 2):
        there, back = diff(old, new), diff(new, old)
        assert Counter(c.change_class for c in there) == Counter(c.change_class for c in back), (old.name, new.name)
        classes = {change.path: change.change_class for change in back}
        for change in there:
            assert classes.get(change.path, change.change_class) == change.change_class, (old.name, new.name)


def test_a_variant_that_brings_or_takes_tensors_breaks_both_ways() -> None:
    llama, mixtral = (load(ROOT / "tests" / "specs" / f"{name}-tiny.yaml") for name in ("llama-3.1-8b", "mixtral-8x7b"))
    for old, new in ((llama, mixtral), (mixtral, llama)):
        classes = {change.path: change.change_class for change in diff(old, new)}
        for path in ("model.ffn.dense", "model.ffn.moe", "model.layers"):
            assert classes[path] == "checkpoint-breaking"


def test_a_variant_with_the_tensors_of_the_one_that_it_replaces_does_not_break_beside_one_that_does() -> None:
    spec = load(ROOT / "tests" / "specs" / "llama-3.1-8b-tiny.yaml")
    plain = spec.model.model_dump()
    near = plain["attention"]["gqa"] | {"sliding_window": 4}
    layers = [{"attention": name, "ffn": "dense"} for name in ("gqa", "near")]
    old = _with(spec, layers=[{"repeat": 2, "attention": "gqa", "ffn": "dense"}])
    new = _with(spec, attention=plain["attention"] | {"near": near}, layers=layers, vocab_size=plain["vocab_size"] + 1)
    for changes in (diff(old, new), diff(new, old)):
        assert {change.path: change.change_class for change in changes} == {
            "model.vocab_size": "checkpoint-breaking",
            "model.attention.near": "convergence",
            "model.layers": "convergence",
        }


def test_tensors_are_named_in_groups_that_hold_each_once() -> None:
    for old, new in combinations(map(load, TINY[::3]), 2):
        changes = tensor_changes(old.model, new.model)
        tables = old.model.tensors(), new.model.tensors()
        kinds: dict[str, list[str]] = {"new": [], "gone": [], "reshaped": []}
        for group in changes.groups:
            names = _unfolded(group.name)
            assert len(names) == group.count
            for shape, table in zip((group.before, group.after), tables, strict=True):
                assert {table[name].shape if name in table else None for name in names} == {shape}
            kinds["new" if group.before is None else "gone" if group.after is None else "reshaped"] += names
        for kind, names in kinds.items():
            assert sorted(names) == sorted(getattr(changes, kind))


def _unfolded(name: str) -> list[str]:
    """Every name that a group's name stands for."""
    start, brace, rest = name.partition("{")
    if not brace:
        return [name]
    ranges, _, end = rest.partition("}")
    bounds = [part.partition("-") for part in ranges.split(",")]
    return [f"{start}{n}{end}" for low, _, high in bounds for n in range(int(low), int(high or low) + 1)]


def test_layers_fold_into_ranges() -> None:
    old = load(NANO)
    layers = [{"attention": "mla", "ffn": name} for name in ("moe", "moe", "dense", "moe")]
    gone = [group for group in tensor_changes(_with(old, layers=layers).model, old.model).groups if group.after is None]
    assert "layers.0.ffn.router.weight" in {group.name for group in gone}
    none = _with(old, layers=[{"repeat": 4, "attention": "mla", "ffn": "dense"}], mtp=None)
    bare = _with(old, layers=layers, mtp=None)
    new = {group.name: group for group in tensor_changes(none.model, bare.model).groups if group.before is None}
    assert new["layers.{0-1,3}.ffn.router.weight"].count == 3


def test_a_model_with_a_variant_for_each_layer_is_compared_in_time_that_grows_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number, made = 300, Counter[str]()
    block_tensors = Model.block_tensors

    def counted(self: Model, layer: LayerRun) -> Tensors:
        made["blocks"] += 1
        return block_tensors(self, layer)

    def wide(start: int) -> ModelSpec:
        plain = load(NANO).model_dump(mode="json", exclude_none=True)
        dense = plain["model"]["ffn"]["dense"]
        plain["model"]["ffn"] = {f"ffn{i}": dense | {"intermediate_size": start + i} for i in range(number)}
        plain["model"]["layers"] = [{"attention": "mla", "ffn": f"ffn{i}"} for i in range(number)]
        return ModelSpec.model_validate({key: plain[key] for key in ("spec_version", "name", "model")})

    old, new = wide(64), wide(1000)
    monkeypatch.setattr(Model, "block_tensors", counted)
    found = diff(old, new)
    assert len(found) == number and {change.change_class for change in found} == {"checkpoint-breaking"}
    assert made["blocks"] < 20 * number
