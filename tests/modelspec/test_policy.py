"""Policies: rules as JSON Schema, told at the spec's lines; and policies that could never speak, refused."""

import json
import signal
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from modelspec.diagnostics import Diagnostic, SpecError
from modelspec.dump import as_data
from modelspec.grammar import Grammar
from modelspec.policy import read_policy, violations
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.validate import check, load

SPECS = Path(__file__).parents[2] / "specs"
V3, NANO = str(SPECS / "deepseek-v3.yaml"), str(SPECS / "deepseek-v3-nano.yaml")
GRAMMAR = Grammar(ModelSpec.model_json_schema())

POLICY = """\
properties:
  parallelism:
    properties:
      world_size: {title: at most 512 ranks, description: ask the platform team for more, maximum: 512}
  model:
    properties:
      ffn:
        additionalProperties:
          if: {properties: {type: {const: moe}}}
          then: {$ref: '#/$defs/balanced'}
$defs:
  balanced:
    title: experts are balanced by a bias
    properties:
      router: {properties: {selection: {properties: {bias: {const: true}}}}}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def broken(policy: Path, spec: str, *overrides: str) -> list[Diagnostic]:
    """What a spec breaks of a policy."""
    resolved = resolve(spec, overrides)
    model, _ = check(resolved)
    assert model is not None
    return violations(read_policy(policy), model, resolved)


def refused(path: Path, text: str) -> Diagnostic:
    """The first reason for which a policy is refused."""
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_policy(path)
    assert caught.value.exit_code == 2
    assert str(caught.value)
    return caught.value.diagnostics[0]


def line_of(file: str, text: str) -> int:
    return next(number for number, line in enumerate(Path(file).read_text().splitlines(), 1) if text in line)


def test_a_broken_rule_is_told_by_its_title_at_the_line_of_the_value(policy: Path) -> None:
    (found,) = broken(policy, V3)
    assert (found.code, found.severity, found.path) == ("MS602", "error", "parallelism.world_size")
    assert (found.place.file, found.place.line) == (V3, line_of(V3, "world_size: 2048"))
    assert found.message == "at most 512 ranks (parallelism.world_size is 2048, must be at most 512)"
    assert found.help == "ask the platform team for more"
    (rule,) = found.related
    assert (rule.place.file, rule.place.line, rule.message) == (str(policy), 4, "the rule")


def test_a_value_that_is_set_or_inherited_says_so(policy: Path, tmp_path: Path) -> None:
    (found,) = broken(policy, NANO, "model.hidden_size=256", "parallelism.world_size=1024")
    assert (found.place.file, found.place.line) == ("--set", 2)
    assert found.related[-1].message == "set by --set #2"
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("name: leaf\nextends: modelspec:deepseek-v3\n")
    (found,) = broken(policy, str(leaf))
    assert Path(found.place.file).resolve() == Path(V3).resolve()
    assert found.related[-1].message == f"inherited from {found.place.file}:{found.place.line}"
    assert (found.related[-1].place.file, found.related[-1].place.line) == (str(leaf), 2)


def test_a_rule_behind_a_reference_has_its_own_title_and_place(policy: Path) -> None:
    (found,) = broken(policy, NANO, "model.ffn.moe.router.selection.bias=false")
    assert found.message.startswith("experts are balanced by a bias (model.ffn.moe.router.selection.bias is false")
    assert found.related[0].place.line == 15


def test_a_default_is_judged_and_told_at_the_nearest_key(policy: Path) -> None:
    policy.write_text("properties: {model: {properties: {tie_embeddings: {const: true}}}}")
    (found,) = broken(policy, NANO)
    assert found.place.line == line_of(NANO, "model:")
    assert found.message == "model.tie_embeddings is false, must be true"


@pytest.mark.parametrize(
    ("rule", "path", "told", "line", "written"),
    [
        (
            "properties: {precision: {properties: {compute: false}}}",
            "precision.compute",
            "must not be there",
            "precision:",
            "comp",
        ),
        ("properties: {model: false}", "model", "must not be there", "model:", "model"),
        ("properties: {name: {$ref: '#/$defs/n'}}\n$defs: {n: false}", "name", "must not be there", "name:", "name"),
        (
            "properties: {precision: {additionalProperties: false}}",
            "precision.compute",
            "must not be there",
            "precision:",
            "add",
        ),
        (
            "properties: {model: {properties: {layers: {items: false}}}}",
            "model.layers.0",
            "must not be there",
            "- {attention: mla, ffn: dense}",
            "items",
        ),
        ("if: {required: [model]}\nthen: false", "", "the spec must not be as it is", "extends:", "then"),
        ("dependentSchemas: {model: false}", "", "the spec must not have 'model'", "extends:", "model"),
        (
            "properties: {model: {properties: {ffn: {propertyNames: {pattern: ^my_}}}}}",
            "model.ffn.moe",
            "the key model.ffn.moe is moe, must match",
            "moe: {num_experts",
            "pattern",
        ),
    ],
)
def test_what_must_not_be_there_is_told_at_its_own_line_with_its_own_rule(
    policy: Path, rule: str, path: str, told: str, line: str, written: str
) -> None:
    policy.write_text(rule)
    found = {each.path: each for each in broken(policy, NANO)}
    assert path in found
    assert told in found[path].message
    assert (found[path].place.file, found[path].place.line) == (NANO, line_of(NANO, line))
    rule_at = found[path].related[0].place
    assert policy.read_text().splitlines()[rule_at.line - 1][rule_at.column - 1 :].startswith(written)


@pytest.mark.parametrize(
    ("rule", "override"),
    [
        ("required: [data]", "data=null"),
        ("properties: {name: {pattern: '^team-'}}", "name=mine"),
        ("properties: {name: {enum: [a, b]}}", "name=mine"),
        ("properties: {precision: false}", "precision.compute=float32"),
        ("properties: {model: {properties: {layers: {maxItems: 1}}}}", "model.layers.0.repeat=2"),
        ("not: {required: [model]}", "name=mine"),
        ("anyOf: [{required: [data]}, {properties: {name: {const: x}}}]", "data=null"),
        ("properties: {model: {properties: {vocab_size: {multipleOf: 100}}}}", "model.vocab_size=4096"),
        ("properties: {model: {properties: {hidden_size: {exclusiveMaximum: 64, type: string}}}}", "name=mine"),
    ],
)
def test_what_json_schema_says_is_what_is_told(policy: Path, rule: str, override: str) -> None:
    policy.write_text(rule)
    found = broken(policy, NANO, override)
    model, _ = check(resolve(NANO, [override]))
    assert model is not None
    expected = list(jsonschema.Draft202012Validator(read_policy(policy).schema).iter_errors(as_data(model)))
    assert found and len(found) == len(expected)
    assert {each.path for each in found} == {".".join(map(str, each.absolute_path)) for each in expected}
    assert all(len(each.message) < 300 for each in found)


def test_a_policy_may_be_json_and_of_another_draft(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"name": {"const": "x"}}}
    path.write_text(json.dumps(schema, indent="\t"))
    (found,) = broken(path, NANO)
    assert found.message == "name is deepseek-v3-nano, must be x"


@pytest.mark.parametrize("draft", ["draft-04", "draft-06", "draft-07", "draft/2019-09", "draft/2020-12"])
def test_every_draft_that_is_read_has_its_own_keywords(policy: Path, draft: str) -> None:
    bound = "maximum: 256, exclusiveMaximum: true" if draft == "draft-04" else "exclusiveMaximum: 256"
    identity = "id" if draft == "draft-04" else "$id"
    policy.write_text(
        f"$schema: {'https' if '/' in draft else 'http'}://json-schema.org/{draft}/schema\n"
        f"{identity}: https://example.org/policy\n"
        f"properties: {{model: {{properties: {{hidden_size: {{{bound}}}}}}}}}\n"
        "definitions: {a: {title: a, default: 1, readOnly: true, contentEncoding: base64}}"
    )
    (found,) = broken(policy, NANO)
    assert found.message == "model.hidden_size is 256, must be below 256"
    assert broken(policy, NANO, "model.hidden_size=128") == []


@pytest.mark.parametrize("spec", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_keywords_are_said_to_be_about_is_what_specs_have(spec: Path) -> None:
    # Else a rule that can speak would be refused.
    types = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}

    def compare(value: Any, path: tuple[str | int, ...]) -> None:
        legal = {alternative.get("type") for alternative in GRAMMAR.at(path)}
        assert types[type(value)] in legal | ({"number"} if "integer" in legal else set()), path
        below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for step, item in below:
            compare(item, (*path, step))

    compare(as_data(load(spec)), ())


def test_a_policy_behind_a_link_out_of_its_project_is_neither_followed_nor_quoted(tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "policy.yaml"
    project = tmp_path / "project"
    for folder in (outside.parent, project / ".git"):
        folder.mkdir(parents=True)
    outside.write_text("secret: text")
    (project / "link.yaml").symlink_to(outside)
    (project / "folder").symlink_to(outside.parent)
    for path in (project / "link.yaml", project / "folder" / "policy.yaml"):
        with pytest.raises(SpecError) as caught:
            read_policy(path)
        assert (caught.value.exit_code, [each.code for each in caught.value.diagnostics]) == (2, ["MS103"])
        assert "secret" not in str(caught.value)
        with pytest.raises(SpecError, match="no keyword 'secret'"):
            read_policy(path, allow_outside=True)
    (project / "real.yaml").write_text("{}")
    (project / "inside.yaml").symlink_to("real.yaml")
    assert read_policy(project / "inside.yaml").schema == {}


def test_the_shipped_specs_keep_a_policy_that_asks_for_nothing(policy: Path) -> None:
    policy.write_text("{}")
    assert broken(policy, V3) == []


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("properties: {name: {maxLenght: 3}}", "no keyword 'maxLenght'", 1),
        (
            "properties:\n  model:\n    properties: {hiden_size: {maximum: 3}}",
            "no spec has a key 'hiden_size' in model",
            3,
        ),
        ("allOf:\n- properties: {nmae: {const: a}}", "no spec has a key 'nmae' at the top level", 2),
        ("properties:\n  name: {$ref: 'https://example.org/s.json'}", "nothing outside of its file", 2),
        ("properties:\n  name: {$ref: other.yaml}", "nothing outside of its file", 2),
        ("$schema: https://example.org/mine", "names no draft that is read", 1),
        ("title: a\n$schema: 3", "names no draft that is read", 2),
        ("$schema: [a]", "names no draft that is read", 1),
        ("$schema: {a: b}", "names no draft that is read", 1),
        ("$schema: null", "names no draft that is read", 1),
        ("$schema: 'http://[x'", "names no draft that is read", 1),
        ("$schema: http://json-schema.org/draft-03/schema#", "names no draft that is read", 1),
        (
            "$schema: http://json-schema.org/draft-04/schema#\nproperties:\n  name: {const: a}",
            "draft-04 has no keyword",
            3,
        ),
        ("$schema: http://json-schema.org/draft-04/schema\nproperties:\n  name: {id: 'http://a.b/c'}", "at the top", 3),
        ("$schema: http://json-schema.org/draft-06/schema\nif: {}\nthen: {}", "draft-06 has no keyword 'if'", 2),
        ("$schema: http://json-schema.org/draft-07/schema\nminContains: 2", "has no keyword 'minContains'", 2),
        ("dependencies: {data: [training]}", "2020-12 has no keyword 'dependencies'", 1),
        ("id: 'http://a.b/c'", "2020-12 has no keyword 'id'", 1),
        ("properties:\n  name: {format: email}", "formats are not checked", 2),
        ("properties:\n  name:\n    then: {const: a}", "'then' says nothing without 'if'", 3),
        ("else: {}", "'else' says nothing without 'if'", 1),
        ("if: {required: [data]}", "'if' says nothing without 'then' or 'else'", 1),
        ("properties:\n  model:\n    items: {}", "'items' is about lists, and model is a map", 3),
        ("properties:\n  model:\n    properties:\n      layers: {additionalProperties: false}", "is about maps", 4),
        ("properties:\n  name:\n    maximum: 3", "'maximum' is about numbers, and name is text", 3),
        ("properties:\n  name:\n    required: [a]", "'required' is about maps, and name is text", 3),
        ("allOf:\n- minItems: 3", "'minItems' is about lists, and the spec is a map", 2),
        (
            "properties: {model: {properties: {attention:\n"
            "  {additionalProperties: {properties: {rope: {items: {}}}}}}}}",
            "'items' is about lists, and model.attention.NAME.rope is a map or 'none'",
            2,
        ),
        (
            "$schema: http://json-schema.org/draft-07/schema\nproperties:\n"
            "  name: {$ref: '#/definitions/a', const: b}\ndefinitions: {a: {}}",
            "in draft-07 nothing beside `$ref` is checked",
            3,
        ),
        ("properties:\n  name: {$schema: 'http://json-schema.org/draft-07/schema#'}", "at the top of the policy", 2),
        ("properties:\n  name:\n    maximum: many", "not a JSON Schema: 'many'", 3),
        ("properties:\n  name: {pattern: '('}", "not a JSON Schema: '('", 2),
        ("properties:\n  name: {$id: 'https://example.org/n'}", "$id stands at the top of the policy only", 2),
        ("required:\n- modle", "no spec has a key 'modle' at the top level", 2),
        ("not:\n  required: [hyper]", "no spec has a key 'hyper' at the top level", 2),
        ("if:\n  required: [modle]\nthen: {}", "no spec has a key 'modle'", 2),
        ("properties:\n  model:\n    not: {properties: {mpt: {}}}", "no spec has a key 'mpt' in model", 3),
        ("dependentRequired:\n  trainnig: [data]", "no spec has a key 'trainnig'", 2),
        ("dependentRequired:\n  training:\n  - dta", "no spec has a key 'dta'", 3),
        ("dependentSchemas:\n  trainnig: {}", "no spec has a key 'trainnig'", 2),
        ("dependentSchemas:\n  training:\n    required: [dta]", "no spec has a key 'dta'", 3),
        ("$schema: http://json-schema.org/draft-07/schema#\ndependencies:\n  data: [trainnig]", "'trainnig'", 3),
        ("properties:\n  model:\n    patternProperties: {'^hiden': {}}", "a key that matches '^hiden' in model", 3),
        (
            "patternProperties:\n  '^(precision|training)$':\n    required: [optimzer]",
            "no spec has a key 'optimzer' in precision or training",
            3,
        ),
        ("properties:\n  name: {$ref: '#/$defs/nme'}\n$defs: {name: {const: a}}", "names no schema", 2),
        ("properties:\n  name: {$ref: '#nme'}\n$defs: {name: {$anchor: name, const: a}}", "names no schema", 2),
        ("title: a\nproperties:\n  name: {$ref: '#/title'}", "names no schema", 3),
        ("properties:\n  name: {$ref: '#/properties'}", "names no schema", 2),
        ("", "the policy is empty", 1),
        ("# nothing\n---\n", "the policy is empty", 1),
        ("true", "a policy is a map of keywords", 1),
        ("false", "a policy is a map of keywords", 1),
        ("[]", "a policy is a map of keywords", 1),
        ("{}\n---\n{}", "a second document", 2),
    ],
)
def test_a_policy_that_would_never_speak_is_refused_with_its_place(
    tmp_path: Path, text: str, said: str, line: int
) -> None:
    found = refused(tmp_path / "policy.yaml", text)
    assert said in found.message
    assert found.place.line == line


def test_a_missing_policy_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        read_policy(tmp_path / "none.yaml")
    assert (caught.value.exit_code, caught.value.diagnostics[0].code) == (2, "MS001")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("$ref: '#'", "MS603"),
        # Two to the thirtieth.
        (
            "allOf: [{$ref: '#/$defs/a0'}]\n$defs:\n"
            + "".join(
                f"  a{n}: {{allOf: [{{$ref: '#/$defs/a{n + 1}'}}, {{$ref: '#/$defs/a{n + 1}'}}]}}\n" for n in range(30)
            )
            + "  a30: {type: object}",
            "MS603",
        ),
    ],
    ids=["itself", "too-many"],
)
def test_a_policy_without_an_end_ends(policy: Path, text: str, code: str) -> None:
    policy.write_text(text)
    with pytest.raises(SpecError) as caught:
        broken(policy, NANO)
    assert (caught.value.exit_code, caught.value.diagnostics[0].code) == (2, code)


def test_the_fault_of_a_reference_tells_the_nearest_name(tmp_path: Path) -> None:
    text = "properties:\n  name:\n    $ref: '#/$defs/nme'\n$defs: {name: {const: a}}"
    found = refused(tmp_path / "policy.yaml", text)
    assert (found.place.line, found.place.column, found.path) == (3, 11, "properties.name.$ref")
    assert found.help == "did you mean '#/$defs/name'?"


@pytest.mark.parametrize(
    "rule",
    [
        "properties: {name: {$ref: '#n'}}\n$defs: {n: {$anchor: n, const: x}}",
        "properties: {name: {$dynamicRef: '#n'}}\n$defs: {n: {$dynamicAnchor: n, const: x}}",
        "properties: {name: {$ref: '#/$defs/a~1b%20c'}}\n$defs: {a/b c: {const: x}}",
        "properties: {name: {$ref: '#/allOf/0'}}\nallOf: [{not: {const: deepseek-v3-nano}}]",
        "patternProperties: {^name$: {const: x}}",
        "required: [name]\ndependentSchemas: {name: {properties: {name: {const: x}}}}",
    ],
)
def test_references_and_keys_that_are_there_are_taken(policy: Path, rule: str) -> None:
    policy.write_text(rule)
    (found,) = broken(policy, NANO)
    assert (found.code, found.path) == ("MS602", "name")


@pytest.mark.parametrize(
    "rule",
    [
        "properties: {name: {pattern: '^(\\w+\\w*)+!'}}",
        "properties: {model: {patternProperties: {'^(((\\w+\\w*)+)+)+!': {}}}}",
    ],
    ids=["values", "keys"],
)
def test_a_pattern_that_would_never_end_is_stopped_and_named(
    policy: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelspec.policy.MAX_SECONDS", 0.2)
    policy.write_text(rule)
    with pytest.raises(SpecError) as caught:
        broken(policy, NANO, "name=" + "a" * 60)
    (found,) = caught.value.diagnostics
    assert (caught.value.exit_code, found.code) == (2, "MS603")
    assert "pattern: " in str(found.help) or "patterns" in found.message
    # What was to be heard before is heard again.
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_nothing_is_fetched_not_even_a_known_address(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `$id` moves the base, against which a pointer is resolved.
    policy.write_text(
        "$id: https://example.org/policy\nproperties: {name: {$ref: '#/$defs/n'}}\n$defs: {n: {const: x}}"
    )
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("fetched"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = broken(policy, NANO)
    assert found.message == "name is deepseek-v3-nano, must be x"
