"""The language as JSON Schema: both forms, against pydantic and against what people write."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from ruamel.yaml import YAML

from modelspec import json_schema
from modelspec.cli import app
from modelspec.dump import as_data
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"
FILES = sorted([*SPECS.glob("*.yaml"), *(Path(__file__).parents[1] / "specs").glob("*.yaml")])
RESOLVED, AUTHORING = (Draft202012Validator(form()) for form in (json_schema.resolved, json_schema.authoring))

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 1.5, 7, 10**30, "x", "none", "", "mla", "yarn", "topk"),
    *([], {}, ["q"], ["q", "q"], ["gate", "up"], [1, 2], {"type": "mla"}, {"type": "swiglu"}),
)


def written(text: str) -> Any:
    """A YAML text as plain data."""
    return YAML(typ="safe", pure=True).load(text)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in entries for place in [(*path, key), *places(value, (*path, key))]]


@pytest.fixture(scope="module")
def corpus() -> list[Any]:
    """A few specs, resolved, that have every section."""
    names = ("deepseek-v3", "deepseek-v3-nano", "gpt-oss-20b", "glm-4.5", "llama-3.1-8b")
    return [resolve(f"modelspec:{name}").data() for name in names]


@pytest.mark.parametrize("form", [json_schema.resolved, json_schema.authoring])
def test_both_forms_are_valid_schemas(form: Any) -> None:
    Draft202012Validator.check_schema(form())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_spec_fits_both_forms(path: Path) -> None:
    assert list(AUTHORING.iter_errors(written(path.read_text()))) == []
    assert list(RESOLVED.iter_errors(resolve(str(path)).data())) == []
    assert list(RESOLVED.iter_errors(json.loads(json.dumps(as_data(load(path)))))) == []


@settings(max_examples=400)
@given(data=st.data())
def test_jsonschema_and_pydantic_agree_on_mutants(data: st.DataObject, corpus: list[Any]) -> None:
    spec = deepcopy(data.draw(st.sampled_from(corpus)))
    for _ in range(data.draw(st.integers(1, 2))):
        *around, key = data.draw(st.sampled_from(places(spec)))
        inner = spec
        for step in around:
            inner = inner[step]
        match data.draw(st.sampled_from(["change", "change", "delete", "rename", "add"])):
            case "delete":
                del inner[key]
            case "rename" if isinstance(inner, dict):
                inner[f"{key}s"] = inner.pop(key)
            case "add" if isinstance(inner, dict):
                inner[data.draw(st.sampled_from(["extra", "type", "like", "bias", "value"]))] = 1
            case _:
                inner[key] = deepcopy(data.draw(st.sampled_from(VALUES)))
    try:
        ModelSpec.model_validate(spec)
        valid = True
    except ValidationError as error:
        valid = False
        # A rule of pydantic's own that no schema states, such as exactly one of two keys.
        if all(each["type"] == "value_error" for each in error.errors()):
            return
    assert RESOLVED.is_valid(spec) == valid, [error.message for error in RESOLVED.iter_errors(spec)]


@pytest.mark.parametrize(
    "text",
    [
        "extends: modelspec:deepseek-v3\nname: a\n",
        "extends: [a.yaml, b.yaml]\nmodel: {mtp: null, attention: {mla: {num_heads: 4, rope: {scaling: null}}}}\n",
        "model: {ffn: {wide: {like: moe, num_experts: 4, router: {selection: {groups: null}}}}}\n",
        "training: {stages: [{name: a, steps: 3, sequence_length: 8, batch_size: 1, learning_rate: 0.1}]}\n",
        "parallelism: null\nprecision: {fp8: null}\n",
        "model: {attention: {old: null}}\n",
    ],
)
def test_editors_accept_what_another_file_completes(text: str) -> None:
    assert [error.message for error in AUTHORING.iter_errors(written(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        "model: {hidden_sise: 3}\n",
        "model: {hidden_size: wide}\n",
        "model: {attention: {mla: {type: mlaa}}}\n",
        "model: {attention: {mla: {type: mla, head_dim: 3}}}\n",
        "model: {attention: {mla: {num_head: 3}}}\n",
        "model: {layers: [{repeat: 2, attention: mla}]}\n",
        "model: {attention: {Mla: {type: mla}}}\n",
        "extends: 3\n",
        "extends: []\n",
        "training: {stages: [{name: a}]}\n",
        "spec_version: 2\n",
    ],
)
def test_editors_mark_what_no_file_can_mend(text: str) -> None:
    assert not AUTHORING.is_valid(written(text))


def test_every_key_is_explained() -> None:
    def unexplained(node: Any, path: str = "") -> list[str]:
        if not isinstance(node, dict):
            return []
        found = [f"{path}.{key}" for key, child in node.get("properties", {}).items() if "description" not in child]
        return found + [name for key, child in node.items() for name in unexplained(child, f"{path}/{key}")]

    assert unexplained(json_schema.resolved()) == []
    assert unexplained(json_schema.authoring()) == []


def test_units_stand_beside_meanings() -> None:
    properties = json_schema.resolved()["$defs"]["MLA"]["properties"]
    assert properties["kv_lora_rank"]["unit"] == "elements"
    assert properties["q_lora_rank"]["unit"] == "elements"
    assert "unit" not in properties["num_heads"]


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_specs_tell_editors_their_schema(path: Path) -> None:
    modeline = "# yaml-language-server: $schema="
    first = path.read_text().splitlines()[0]
    assert first.startswith(modeline)
    schema = json.loads((SPECS / first.removeprefix(modeline)).read_text())
    assert schema == json_schema.authoring()


def test_the_command_prints_each_form() -> None:
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == json_schema.authoring()
    assert json.loads(CliRunner().invoke(app, ["schema", "--resolved"]).stdout) == json_schema.resolved()
