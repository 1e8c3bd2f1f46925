"""What is said about specs of the wrong shape: one mistake, one diagnostic, with a place, a reason and a remedy."""

import string
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelspec.diagnostics import Diagnostic, Place, SpecError, render
from modelspec.document import Document, Entry, Mapping, Node, Sequence, parse
from modelspec.resolve import Resolved, resolve
from modelspec.schema import ModelSpec
from modelspec.validate import check, load

V3 = Path(__file__).parents[2] / "specs" / "deepseek-v3.yaml"


def errors(resolved: Resolved) -> list[Diagnostic]:
    _, diagnostics = check(resolved)
    return [diagnostic for diagnostic in diagnostics if diagnostic.severity == "error"]


def only_error(*overrides: str) -> Diagnostic:
    """The one error that overriding V3 makes."""
    found = errors(resolve(V3, overrides))
    assert len(found) == 1, [diagnostic.message for diagnostic in found]
    return found[0]


def edited(old: str, new: str) -> Document:
    """V3 with a line changed, under a short name."""
    text = V3.read_text(encoding="utf-8")
    assert text.count(old) == 1
    return parse(text.replace(old, new), "a.yaml")


def line_of(document: Document, text: str) -> int:
    return document.text[: document.text.index(text)].count("\n") + 1


def test_a_valid_spec_loads_with_its_overrides() -> None:
    spec = load(V3, ["model.vocab_size=4096", "model.layers.1.repeat=60", "precision.fp8=null"])
    assert isinstance(spec, ModelSpec)
    assert (spec.model.vocab_size, spec.model.num_layers, spec.precision.fp8) == (4096, 63, None)


def test_one_override_may_stand_alone() -> None:
    assert load(V3, "model.vocab_size=4096").model.vocab_size == 4096


def test_load_raises_all_errors_with_their_sources() -> None:
    with pytest.raises(SpecError) as caught:
        load(V3, ["model.vocab_size=0", "model.hidden_sise=1"])
    assert [diagnostic.place.line for diagnostic in caught.value.diagnostics] == [1, 2]
    assert "  2 | model.hidden_sise=1" in str(caught.value)


def test_an_unknown_key_is_shown_where_it_stands_with_what_was_meant() -> None:
    document = edited("kv_lora_rank: 512", "kv_lora_rnak: 512")
    resolved = resolve(document)
    (diagnostic,) = errors(resolved)
    line = line_of(document, "kv_lora_rnak")
    assert render(diagnostic, resolved.documents.get) == (
        f"a.yaml:{line}:7: error[MS201]: unknown key 'kv_lora_rnak' in model.attention.mla\n"
        f"  {line} |       kv_lora_rnak: 512\n"
        "     |       ^^^^^^^^^^^^\n"
        "  help: did you mean 'kv_lora_rank'?"
    )
    assert diagnostic.path == "model.attention.mla.kv_lora_rnak"


def test_a_misspelt_key_that_overrides_an_inherited_one_gets_its_suggestion(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: modelspec:deepseek-v3\nname: leaf\nmodel: {attention: {mla: {num_head: 64}}}\n")
    (diagnostic,) = errors(resolve(leaf))
    assert diagnostic.help == "did you mean 'num_heads'?"
    assert diagnostic.place == Place(str(leaf), 3, 27)


@pytest.mark.parametrize(
    ("override", "help"),
    [
        ("model.ffn.moe.scale=2.5", "'scale' belongs under model.ffn.moe.router; the keys here are type, "),
        ("model.ffn.moe.groups={num: 8}", "'groups' belongs under model.ffn.moe.router.selection"),
        ("model.theta=10000", "'theta' belongs under model.attention.mla.rope"),
        ("vocab_size=1", "'vocab_size' belongs under model"),
        ("training.learning_rate=0.1", "'learning_rate' belongs under training.stages.N"),
        ("model.ffn.dense.num_experts=4", "'num_experts' is a key of the type 'moe'"),
        ("model.vocab_siz=4", "did you mean 'vocab_size'?"),
        ("model.kv_lora_rnk=4", "did you mean 'kv_lora_rank', which belongs under model.attention.mla?"),
        ("model.layers.0.pattern=[]", "'attention' does not go with 'pattern'"),
        ("precision.like=fp8", "`like` stands in a variant under model.attention or model.ffn"),
        ("training.extends=a.yaml", "`extends` stands at the top level of a file"),
        ("model.ffn.moe.lik=dense", "did you mean 'like'?"),
        ("model.attention.mla.lke=gqa", "did you mean 'like'?"),
        ("model.qqqq=1", "the keys here are vocab_size, hidden_size"),
    ],
)
def test_an_unknown_key_is_told_where_it_belongs(override: str, help: str) -> None:
    found = errors(resolve(V3, [override]))
    assert [diagnostic.code for diagnostic in found if diagnostic.code == "MS201"]
    assert help in (found[0].help or ""), found[0].help


def test_a_misspelt_key_beside_the_right_one_is_not_sent_where_it_is() -> None:
    document = edited("  hidden_size: 7168", "  hidden_size: 7168\n  hiden_size: 7168")
    (found,) = errors(resolve(document))
    assert found.message == "unknown key 'hiden_size' in model"
    assert found.help == "it looks like 'hidden_size', which stands here already"
    assert found.fix is None


@pytest.mark.parametrize("key", ["attention", "ffn"])
def test_a_layer_of_an_unknown_variant_is_one_error_in_fp8_too(key: str) -> None:
    assert only_error(f"model.layers.0.{key}=x", "precision.fp8.weight_block=[64, 64]").code == "MS302"


def test_a_colon_without_a_space_is_explained() -> None:
    (diagnostic,) = errors(resolve(edited("init: {std: 0.006}", "init: {std: 0.006, a:1}")))
    assert (diagnostic.code, diagnostic.help) == ("MS201", "write a space after the colon")


def test_a_null_under_a_misspelt_key_does_not_vanish(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: modelspec:deepseek-v3\nname: leaf\nmodel: {mtpp: null, qqqqq: null}\n")
    first, second = errors(resolve(leaf))
    assert (first.code, first.place, first.help) == ("MS201", Place(str(leaf), 3, 9), "did you mean 'mtp'?")
    assert (second.code, second.path) == ("MS201", "model.qqqqq")


def test_a_null_may_remove_what_is_not_there() -> None:
    assert load(V3, ["model.layers.0.norm=null", "data.sources=null", "training.gradient_clip=null"])
    phase = "training.stages.1.batch_size"
    assert load(
        V3,
        [
            f"{phase}=[{{until_steps: 9, ramp: [1, 2]}}, {{value: 1920}}]",
            f"{phase}.0.ramp=null",
            f"{phase}.0.value=1920",
        ],
    )


def test_a_missing_key_is_reported_at_its_parent_with_its_meaning() -> None:
    document = edited("      kv_lora_rank: 512\n", "")
    resolved = resolve(document)
    (diagnostic,) = errors(resolved)
    line = line_of(document, "mla:\n")
    assert render(diagnostic, resolved.documents.get) == (
        f"a.yaml:{line}:5: error[MS202]: missing key 'kv_lora_rank' in model.attention.mla\n"
        f"  {line} |     mla:\n"
        "     |     ^^^\n"
        "  help: width of the latent shared by keys and values; elements; for example 512"
    )


def test_a_missing_key_says_which_null_removed_it(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text(
        "extends: modelspec:deepseek-v3\nmodel: {ffn: {moe: {router: {selection: {groups: null}}}}}\n"
    )
    (tmp_path / "leaf.yaml").write_text(
        "extends: middle.yaml\nname: leaf\nmodel: {ffn: {moe: {router: {selection: {groups: {num: 12}}}}}}\n"
    )
    found = errors(resolve(tmp_path / "leaf.yaml"))
    assert [diagnostic.path.rpartition(".")[2] for diagnostic in found] == ["topk", "score"]
    for diagnostic in found:
        assert diagnostic.place == Place(str(tmp_path / "leaf.yaml"), 3, 42)
        (note,) = diagnostic.related
        assert note.message == "model.ffn.moe.router.selection.groups was removed here"
        assert note.place == Place(str(tmp_path / "middle.yaml"), 2, 50)


def test_a_missing_key_says_when_a_change_of_type_dropped_it(tmp_path: Path) -> None:
    (tmp_path / "leaf.yaml").write_text(
        "extends: modelspec:deepseek-v3\nname: leaf\nmodel: {ffn: {dense: {type: moe, num_experts: 4}}}\n"
    )
    diagnostic = next(each for each in errors(resolve(tmp_path / "leaf.yaml")) if each.code == "MS202")
    assert diagnostic.related[0].message == "model.ffn.dense is of another type here, so nothing of it is inherited"
    assert diagnostic.related[0].place.file.endswith("deepseek-v3.yaml")


def test_a_missing_name_says_that_names_are_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "leaf.yaml").write_text("extends: modelspec:deepseek-v3\n")
    (diagnostic,) = errors(resolve(tmp_path / "leaf.yaml"))
    assert (diagnostic.code, diagnostic.path, diagnostic.place.line) == ("MS202", "name", 1)
    assert diagnostic.help == "a spec does not inherit the name of the one that it extends"


@pytest.mark.parametrize(
    ("override", "code", "message", "help"),
    [
        ("model.vocab_size=many", "MS203", "must be an integer from 2 to 67108864, got 'many'", None),
        ("model.vocab_size=1e15", "MS203", "got 1e15", "write an integer of at most 67108864"),
        ("model.vocab_size=1.0", "MS203", "got 1.0", "write an integer of at least 2"),
        ("model.vocab_size=4096.5", "MS203", "got 4096.5", "write 4096 or 4097: this is counted in integers"),
        ("training.seed=1e19", "MS203", "got 1e19", "write an integer of at most 9223372036854775807"),
        ("model.vocab_size=1e5", "MS203", "got 1e5", "write 100000: this is counted in integers"),
        ("model.vocab_size=nan", "MS203", "got 'nan'", None),
        ("model.vocab_size=true", "MS203", "got true", None),
        ("model.vocab_size={a: 1}", "MS203", "got a map", None),
        ("model.vocab_size=[1]", "MS203", "got a list", None),
        ("model.vocab_size=1_000", "MS203", "got '1_000'", "write 1000: numbers have no underscores in YAML 1.2"),
        ("model.vocab_size=128k", "MS203", "got '128k'", "write 128000, or 131072 for 128 x 1024"),
        ("model.vocab_size=129,280", "MS203", "got '129,280'", "write 129280"),
        ("model.vocab_size='4096'", "MS203", "got '4096'", "remove the quotes"),
        ("training.stages.0.tokens=14.8T", "MS203", "got '14.8T'", None),
        ("training.stages.0.tokens=14T", "MS203", "got '14T'", "write 14000000000000"),
        ("training.stages.0.tokens=1.5", "MS203", "must be an integer", "write 1 or 2: this is counted in integers"),
        ("training.stages.0.tokens=1e19", "MS204", "got 1e19", "write an integer of at most 1000000000000000000"),
        ("model.tie_embeddings=yes", "MS203", "must be true or false, got 'yes'", "write true"),
        ("model.tie_embeddings=Off", "MS203", "must be true or false, got 'Off'", "write false"),
        ("model.tie_embeddings=0", "MS203", "must be true or false, got 0", "write false"),
        ("summary=5", "MS203", "must be text of at most 1000 characters, got 5", "quote it to make it text: '5'"),
        ("model.layers=5", "MS203", "must be a list, got 5", "write a list: [5]"),
        ("model.layers.0=null", "MS203", "must be a map, got null", None),
        ("model.init=5", "MS203", "must be a map, got 5", None),
        ("model.ffn.moe.activation=swiglu", "MS203", "must be a map, got 'swiglu'", "write {type: swiglu}"),
        ("model.attention.mla.rope=5", "MS203", "must be a map or 'none', got 5", None),
        ("training.stages.0.learning_rate=high", "MS203", "must be a number of at least 0 or a list, got 'high'", None),
        ("data.tokenizer=5", "MS203", "must be a map, got 5", None),
        ("model.vocab_size=0", "MS204", "must be an integer from 2 to 67108864, got 0", None),
        ("model.norm.eps=0.0", "MS204", "must be a number above 0, got 0.0", None),
        ("training.optimizer.betas=[1.0, 0.9]", "MS204", "at least 0 and below 1, got 1.0", None),
        ("training.stages.0.tokens=0", "MS204", "got 0", None),
        (
            "precision.compute=bloat16",
            "MS205",
            "one of 'float64', 'float32', 'bfloat16', got",
            "did you mean 'bfloat16'?",
        ),
        ("model.attention.mla.rope=non", "MS205", "must be a map or 'none', got 'non'", "did you mean 'none'?"),
        (
            "spec_version=2",
            "MS205",
            "must be 1, got 2",
            "this modelspec reads version 1 of the language; a newer one reads this spec",
        ),
        ("model.ffn.moe.type=dens", "MS206", "unknown type 'dens' in model.ffn.moe", "did you mean 'dense'?"),
        ("model.ffn.moe.type=5", "MS206", "unknown type 5", "the types here are dense, moe"),
        ("training.optimizer.type=lion", "MS206", "unknown type 'lion'", "the only type here is 'adamw'"),
        ("name=a b", "MS207", "name must be text of the form", "for example: my-model"),
        ("name=''", "MS207", "name must be text of the form", "for example: my-model"),
        ("data.tokenizer={type: file, path: ''}", "MS207", "path must be text of 1 to 4096 characters, got ''", None),
        (
            "data.sources=[{type: jsonl, files: a, field: ''}]",
            "MS207",
            "field must be text of at least 1 character, got ''",
            None,
        ),
        ("training.optimizer.betas=[0.9]", "MS208", "must have 2 items, has 1", None),
        ("training.optimizer.betas=[0.9, 0.9, 0.9]", "MS208", "must have 2 items, has 3", None),
        ("model.layers=[]", "MS208", "must have at least 1 item, has 0", None),
    ],
)
def test_a_wrong_value_says_what_is_legal_what_was_given_and_how_to_write_it(
    override: str, code: str, message: str, help: str | None
) -> None:
    diagnostic = only_error(override)
    path, _, value = override.partition("=")
    assert diagnostic.code == code
    assert message in diagnostic.message
    assert diagnostic.help == help
    if code not in ("MS206", "MS208") and not value.startswith(("[", "{type")):
        assert (diagnostic.path, diagnostic.place) == (path, Place("--set", 1, len(path) + 2))


def test_no_message_is_pydantics_own() -> None:
    resolved = resolve(parse("a: 1\nmodel: {layers: [{}, 5, {pattern: 5}], ffn: {x: {}}, norm: {type: 1}}", "a.yaml"))
    for diagnostic in errors(resolved):
        for text in ("Input should", "Field required", "pydantic", "Extra inputs", "valid dictionary"):
            assert text not in diagnostic.message + (diagnostic.help or "")


def test_paths_hold_no_tags_of_unions() -> None:
    runs = "model.layers=[{pattern: [{attention: 1, ffn: x}]}, {repeat: x, attention: mla, ffn: moe}]"
    rates = "training.stages.0.learning_rate=[{until_steps: x, value: 1}, {ramp: [x, 1]}, {cosine: 1}]"
    found = errors(resolve(V3, [runs, rates]))
    assert [diagnostic.path for diagnostic in found] == [
        "model.layers.0.pattern.0.attention",
        "model.layers.1.repeat",
        "training.stages.0.learning_rate.0.until_steps",
        "training.stages.0.learning_rate.1.ramp.0",
        "training.stages.0.learning_rate.2.cosine",
    ]


def test_all_mistakes_are_reported_in_one_pass_in_the_order_of_the_text() -> None:
    text = V3.read_text(encoding="utf-8")
    for old, new in {
        "vocab_size: 129280": "vocab_size: x",
        "std: 0.006": "std: -1",
        "score: sigmoid": "score: tanh",
        "seed: 0": "sed: 0",
    }.items():
        text = text.replace(old, new, 1)
    found = errors(resolve(parse(text, "a.yaml")))
    assert [diagnostic.code for diagnostic in found] == ["MS203", "MS204", "MS205", "MS201"]
    assert found == sorted(found, key=lambda diagnostic: diagnostic.place)


def test_a_wrong_type_hides_what_only_follows_from_it() -> None:
    assert only_error("model.ffn.moe.type=mo").code == "MS206"
    assert only_error("model.attention.mla.type=mlaa").code == "MS206"


def test_a_misspelt_key_hides_what_only_follows_from_it() -> None:
    assert only_error("model.layers=[{patern: [{attention: mla, ffn: moe}]}]").help == "did you mean 'pattern'?"
    assert only_error("training.stages.0.batch_size=[{rmap: [1, 2], multiple_of: 1}]").help == "did you mean 'ramp'?"


def test_many_mistakes_are_cut_off_and_counted() -> None:
    text = V3.read_text(encoding="utf-8") + "".join(f"key{number}: 1\n" for number in range(500))
    found = errors(resolve(parse(text, "a.yaml")))
    assert len(found) == 101
    assert [diagnostic.message for diagnostic in found if diagnostic.code == "MS209"] == [
        "400 more errors are not shown"
    ]


def test_a_relation_is_reported_at_the_value_and_names_the_other_one() -> None:
    diagnostic = only_error("model.ffn.moe.router.selection.groups.num=7")
    assert diagnostic.code.startswith("MS3")
    assert diagnostic.place == Place("--set", 1, 43)
    assert any(note.path == "model.ffn.moe.num_experts" for note in diagnostic.related)
    assert all(note.place.file == str(V3) for note in diagnostic.related)


def test_a_relation_to_a_removed_value_points_at_the_null() -> None:
    found = errors(resolve(V3, ["parallelism=null"]))
    assert found
    assert {note.place for diagnostic in found for note in diagnostic.related} == {Place("--set", 1, 1)}


def test_a_relation_to_a_default_points_nowhere() -> None:
    changes = ["name=x", "parallelism.gpus_per_node=2", "parallelism.microbatch_size=3"]
    (diagnostic,) = errors(resolve(V3.with_name("deepseek-v3-nano.yaml"), changes))
    assert diagnostic.code == "MS411" and "data axis 1 x microbatch 3" in diagnostic.message
    assert [(note.path, note.place) for note in diagnostic.related] == [
        ("parallelism.microbatch_size", Place("--set", 3, 29))
    ]


def test_an_inherited_fault_is_milder_than_the_specs_own(tmp_path: Path) -> None:
    unused = "type: dense, intermediate_size: 128, activation: {type: swiglu}"
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text(
        dedent(
            f"""
            extends: modelspec:deepseek-v3
            name: leaf
            model:
              ffn: {{spare: {{{unused}}}}}
              layers: [{{attention: mla, ffn: moe}}]
            """
        )
    )
    _, diagnostics = check(resolve(leaf))
    severities = {diagnostic.path: diagnostic.severity for diagnostic in diagnostics}
    assert severities["model.ffn.spare"] == "warning"
    assert severities["model.ffn.dense"] == "info"


def keys_of(node: Node, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], str]]:
    if isinstance(node, Mapping):
        below = [found for key, entry in node.entries.items() for found in keys_of(entry.node, (*path, key))]
        return [(path, key) for key in node.entries] + below
    if isinstance(node, Sequence):
        return [found for index, item in enumerate(node.items) for found in keys_of(item, (*path, index))]
    return []


def renamed(node: Node, path: tuple[str | int, ...], old: str, new: str) -> Node:
    if isinstance(node, Sequence):
        items = (
            renamed(item, path[1:], old, new) if index == path[0] else item for index, item in enumerate(node.items)
        )
        return Sequence(tuple(items), node.place)
    assert isinstance(node, Mapping)
    if not path:
        return Mapping({new if key == old else key: entry for key, entry in node.entries.items()}, node.place)
    entry = node.entries[str(path[0])]
    below = Entry(entry.key_place, renamed(entry.node, path[1:], old, new))
    return Mapping(node.entries | {str(path[0]): below}, node.place)


V3_DOCUMENT = parse(V3.read_text(encoding="utf-8"), "a.yaml")
V3_KEYS = [
    (path, key) for path, key in keys_of(V3_DOCUMENT.root) if path not in (("model", "attention"), ("model", "ffn"))
]


@given(st.sampled_from(V3_KEYS), st.data())
@settings(max_examples=120, deadline=None)
def test_a_typo_of_one_letter_in_any_key_is_one_error_with_the_right_suggestion(
    place: tuple[tuple[str | int, ...], str], data: st.DataObject
) -> None:
    path, key = place
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    typos = [key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]]
    typo = data.draw(st.sampled_from([typo for typo in typos if typo != key]))
    root = renamed(V3_DOCUMENT.root, path, key, typo)
    assert isinstance(root, Mapping)
    (diagnostic,) = errors(Resolved(root, {"a.yaml": V3_DOCUMENT.text}))
    assert diagnostic.help == f"did you mean {key!r}?"
    assert diagnostic.path == ".".join(map(str, (*path, typo)))


@given(
    st.sampled_from(V3_KEYS), st.sampled_from(["null", "x", "-1", "[]", "{}", "[1, x]", "{type: x}", "1e300", "true"])
)
@settings(max_examples=120, deadline=None)
def test_any_value_anywhere_is_a_spec_or_diagnostics_with_places(
    place: tuple[tuple[str | int, ...], str], value: str
) -> None:
    path, key = place
    resolved = resolve(V3_DOCUMENT, [f"{'.'.join(map(str, (*path, key)))}={value}"])
    _, diagnostics = check(resolved)
    for diagnostic in diagnostics:
        text = resolved.documents[diagnostic.place.file]
        assert diagnostic.place.line <= text.count("\n") + 1
        assert render(diagnostic, resolved.documents.get).count("\n") >= 2


def test_the_public_names_are_lazy_and_loading_imports_no_torch() -> None:
    script = (
        "import sys, modelspec\n"
        "assert not [name for name in sys.modules if name.startswith('modelspec.')]\n"
        f"modelspec.load({str(V3)!r})\n"
        "assert not {'torch', 'rich', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_folder_of_plan_does_not_hide_the_function() -> None:
    import modelspec.diff
    import modelspec.plan

    assert callable(modelspec.plan)
    assert callable(modelspec.diff)
    assert set(modelspec.__all__) <= set(dir(modelspec))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        modelspec.nothing  # noqa: B018
