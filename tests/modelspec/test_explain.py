"""What `explain` says: read off the schema, the checks and the shipped specs."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from modelspec.checks import CHECKS
from modelspec.checks.reads import reads
from modelspec.cli import app
from modelspec.explain import explain_code, explain_key, nearest_keys
from modelspec.grammar import Grammar
from modelspec.schema import ModelSpec
from modelspec.validate import load

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))


def run(*arguments: str) -> Result:
    """The command with these arguments."""
    return CliRunner().invoke(app, ["explain", *arguments])


def test_a_key_is_explained_with_unit_default_and_who_sets_it() -> None:
    (key,) = explain_key("model.ffn.moe.router.scale")
    assert (key.path, key.owner) == ("model.ffn.NAME.router.scale", "Router")
    assert key.meaning.startswith("factor on the weights")
    assert (key.unit, key.default, key.legal) == ("no unit", "1.0", "a number above 0")
    assert key.specs["deepseek-v3"] == ("2.5",)
    assert "mixtral-8x7b" not in key.specs


def test_one_path_means_a_key_of_each_type() -> None:
    keys = explain_key("model.attention.any_name.num_heads")
    assert [key.owner for key in keys] == ["MLA", "GQA"]
    mla, gqa = keys
    assert "deepseek-v3" in mla.specs and "deepseek-v3" not in gqa.specs
    assert "llama-3.1-8b" in gqa.specs and "llama-3.1-8b" not in mla.specs


def test_a_star_stands_for_any_key_and_a_number_for_an_index() -> None:
    assert {key.path for key in explain_key("model.init.*")} == {"model.init.std"}
    assert [key.path for key in explain_key("training.stages.3.name")] == ["training.stages.N.name"]
    assert len(explain_key("precision.*")) == len(ModelSpec.model_fields["precision"].annotation.model_fields)  # type: ignore[union-attr]


def test_keys_that_only_files_have_are_explained_with_grammar_example_and_who_writes_them() -> None:
    (extends,) = explain_key("extends")
    assert (extends.path, extends.legal, extends.default) == ("extends", "text, or a list of texts", "absent")
    assert "null removes" in extends.meaning and "modelspec:deepseek-v3" in extends.examples
    assert extends.specs["deepseek-r1"] == ("deepseek-v3.yaml",) and "deepseek-v3" not in extends.specs
    assert {code.code for code in extends.checks} == {"MS101", "MS102", "MS103", "MS104", "MS105"}
    attention, ffn = explain_key("like")
    assert (attention.path, ffn.path) == ("model.attention.NAME.like", "model.ffn.NAME.like")
    assert attention.specs == {"gpt-oss-120b": ("full",)}
    assert explain_key("model.ffn.wide.like") == [ffn]
    assert {code.code for code in ffn.checks} == {"MS121", "MS122", "MS123"}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("extends", "extends: {}\nname: mine\n"),
        ("model.ffn.wide.like", "extends: modelspec:deepseek-v3\nname: mine\nmodel: {{ffn: {{wide: {}}}}}\n"),
    ],
)
def test_examples_of_keys_that_only_files_have_are_read(key: str, text: str, tmp_path: Path) -> None:
    (explained,) = explain_key(key)
    file = tmp_path / "mine.yaml"
    file.write_text(text.format(explained.examples[0]))
    assert load(file).name == "mine"


@pytest.mark.parametrize("path", ["model.layers.*", "model.layers.0", "model.layers.N"])
def test_an_item_of_a_list_is_explained_as_each_map_that_it_may_be(path: str) -> None:
    run_of_layers, pattern = explain_key(path)
    assert (run_of_layers.path, run_of_layers.owner, pattern.owner) == ("model.layers.N", "LayerRun", "LayerPattern")
    assert run_of_layers.legal == "a map with attention, ffn; it may have repeat, norm"
    assert run_of_layers.specs["llama-3.1-8b"] == ("{repeat: 32, attention: gqa, ffn: dense}",)
    assert "llama-3.1-8b" not in pattern.specs and "gpt-oss-20b" in pattern.specs


def test_a_named_variant_is_explained_by_each_type_that_it_may_have() -> None:
    assert [key.owner for key in explain_key("model.ffn.any_name")] == ["Dense", "MoE"]


def test_maps_without_a_type_are_told_apart_by_their_keys() -> None:
    of_run, of_pattern = explain_key("model.layers.*.repeat")
    assert of_run.specs["llama-3.1-8b"] == ("32",) and "gpt-oss-20b" not in of_run.specs
    assert of_pattern.specs["gpt-oss-20b"] == ("12",) and "llama-3.1-8b" not in of_pattern.specs


def test_every_key_of_the_language_has_an_explanation() -> None:
    paths = {(len(steps), steps) for steps, _ in Grammar(ModelSpec.model_json_schema()).maps}
    for _, steps in sorted(paths, key=str):
        keys = explain_key(".".join([*map(str, steps), "*"]))
        assert keys and all(key.meaning and key.legal for key in keys), steps


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("model.ffn.moe.router.selection.groups.num", "MS304"),
        ("model.attention.gqa.num_kv_heads", "MS316"),
        ("parallelism.tensor", "MS407"),
        ("training.losses.mtp", "MS508"),
        ("model.vocab_size", "MS512"),
    ],
)
def test_checks_that_read_a_key_are_named(path: str, code: str) -> None:
    (key,) = explain_key(path)
    assert code in [check.code for check in key.checks]


def test_keys_that_no_check_reads_name_none() -> None:
    assert explain_key("model.init.std")[0].checks == ()


def test_watching_changes_no_finding() -> None:
    spec = load(SPECS[0])
    before = [list(function(spec)) for function in CHECKS.values()]
    assert reads(spec)["MS302"] >= {("LayerRun", "attention"), ("Model", "ffn")}
    assert [list(function(spec)) for function in CHECKS.values()] == before


def test_a_wrong_path_suggests_where_its_last_key_belongs() -> None:
    assert nearest_keys("model.router.scale") == ["model.ffn.NAME.router.scale"]
    assert "model.vocab_size" in nearest_keys("model.vocab_sise")


def test_codes_are_explained_in_either_case() -> None:
    code = explain_code("ms304")
    assert code is not None and (code.code, code.meaning) == ("MS304", "Groups of experts are of equal size.")
    assert explain_code("MS999") is None


def test_text_names_values_and_their_specs() -> None:
    result = run("model.ffn.moe.router.scale")
    assert result.exit_code == 0
    assert "  default   1.0\n" in result.output
    assert "            2.827: kimi-k2\n" in result.output


def test_json_holds_the_same() -> None:
    (key,) = json.loads(run("model.vocab_size", "--format", "json").stdout)["keys"]
    assert key["specs"]["deepseek-v3"] == ["129280"]
    assert json.loads(run("MS304", "--format", "json").stdout)["code"] == "MS304"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("ms999", {"code": "MS999", "meaning": None}),
        ("nope", {"keys": [], "nearest": []}),
        ("router.scale", {"keys": [], "nearest": ["model.ffn.NAME.router.scale"]}),
    ],
)
def test_json_of_what_does_not_exist_says_so_and_exits_1(what: str, told: dict[str, Any]) -> None:
    result = run(what, "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == told
    assert "error:" in result.stderr


@pytest.mark.parametrize(
    "what",
    [
        "MS999",
        "model.nothing",
        "nothing",
        "",
        "model..scale",
        "model.ffn.moe.router.scales",
        "MS３04",
        "model.layers.３",
    ],
)
def test_what_does_not_exist_is_a_message_and_exit_1(what: str) -> None:
    result = run(what)
    assert result.exit_code == 1
    assert "error:" in result.output
