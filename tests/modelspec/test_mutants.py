"""The language under what people do to it: specs of every shape read back, and broken ones are told what is wrong.

`benchmarks/mutants.py` makes and judges the mutants; it takes 20,000 of them where this takes a few hundred.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelspec.diagnostics import Diagnostic, SpecError
from modelspec.document import parse
from modelspec.dump import dump
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.validate import check

BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "mutants.py"))
SCHEMA = ModelSpec.model_json_schema()
# What the language allows in a text: everything printable, and no more.
TEXT = st.characters(exclude_categories=("C", "Zl", "Zp"))


def values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Every value that a node of the schema allows."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return st.deferred(lambda: values(SCHEMA["$defs"][name]))
    for choice in ("oneOf", "anyOf"):
        if choice in node:
            return st.one_of([values(each) for each in node[choice] if each.get("type") != "null"])
    if "const" in node:
        return st.just(node["const"])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    match node["type"]:
        case "object":
            return maps(node)
        case "array":
            return lists(node)
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(node.get("minimum", node.get("ge")), node.get("maximum", node.get("le", 2**63 - 1)))
        case "number":
            low, high = node.get("minimum", 0.0), node.get("maximum", node.get("exclusiveMaximum"))
            above = "exclusiveMinimum" in node
            return st.floats(
                low,
                high,
                exclude_min=above,
                exclude_max="exclusiveMaximum" in node,
                allow_nan=False,
                allow_infinity=False,
            )
        case "string" if "pattern" in node:
            return st.from_regex(node["pattern"].replace("$", r"\Z"), alphabet=TEXT)
        case "string":
            return st.text(TEXT, min_size=node.get("minLength", 0), max_size=min(node.get("maxLength", 20), 20))
    raise AssertionError(node)


def maps(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "properties" in node:
        required = set(node.get("required", ()))
        each = {key: values(child) for key, child in node["properties"].items()}
        return st.fixed_dictionaries(
            {key: strategy for key, strategy in each.items() if key in required},
            optional={key: strategy for key, strategy in each.items() if key not in required},
        )
    ((pattern, child),) = node["patternProperties"].items()
    names = st.from_regex(pattern.replace("$", r"\Z"))
    return st.dictionaries(names, values(child), min_size=1, max_size=3)


def lists(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "prefixItems" in node:
        return st.tuples(*map(values, node["prefixItems"])).map(list)
    least = node.get("minItems", node.get("minLength", 0))
    unique = node.get("uniqueItems", False)
    return st.lists(values(node["items"]), min_size=least, max_size=max(least, 3), unique=unique)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(values(SCHEMA))
def test_any_spec_reads_back_from_its_dump(data: dict[str, Any]) -> None:
    spec = ModelSpec.model_validate(data)
    again, diagnostics = check(resolve(parse(dump(spec), "dumped.yaml")))
    assert again == spec, diagnostics


def test_a_few_hundred_mutants_are_answered_in_place_and_with_the_right_key() -> None:
    verdicts = [BENCHMARK["judge"](mutant) for mutant in BENCHMARK["mutants"](300, seed=1)]
    assert [(each.mutant.text, each.escaped) for each in verdicts if each.escaped] == []
    assert [(each.mutant.text, each.outside) for each in verdicts if each.outside] == []
    typos = [each for each in verdicts if each.right is not None]
    missed = [(each.mutant.meant, each.mutant.typo) for each in typos if not each.right]
    assert len(typos) > 50 and len(missed) <= (1 - BENCHMARK["RIGHT_FROM"]) * len(typos), missed


def test_mutants_are_the_same_for_the_same_seed_and_have_one_fault_of_every_kind() -> None:
    some, again = (list(BENCHMARK["mutants"](60, seed=5)) for _ in range(2))
    assert some == again
    assert {mutant.kind for mutant in some} == set(BENCHMARK["KINDS"])


def found(text: str) -> tuple[Diagnostic, ...]:
    """All that is said of a text."""
    try:
        return check(resolve(parse(text, "spec.yaml")))[1]
    except SpecError as error:
        return error.diagnostics


@pytest.mark.parametrize("typo", ["extend", "extnds", "Extends", "exteds"])
def test_a_misspelt_extends_is_all_that_is_said(typo: str) -> None:
    (only,) = found(f"{typo}: modelspec:deepseek-v3\nname: new\nmodel: {{hidden_size: 64, attention: {{mla: {{}}}}}}\n")
    assert (only.code, str(only.place), only.help) == ("MS201", "spec.yaml:1:1", "did you mean 'extends'?")


def test_a_misspelt_like_is_told_where_variants_may_have_one() -> None:
    text = "extends: modelspec:mixtral-8x7b\nname: new\nmodel: {attention: {other: {lik: gqa, num_heads: 8}}}\n"
    assert [each.help for each in found(text) if each.code == "MS201"] == ["did you mean 'like'?"]


@pytest.mark.parametrize(
    ("version", "help"),
    [
        ("2", "this modelspec reads version 1 of the language; a newer one reads this spec"),
        ("'1'", "this modelspec reads version 1 of the language: write 1"),
        ("1.0", "this modelspec reads version 1 of the language: write 1"),
        ("true", "this modelspec reads version 1 of the language: write 1"),
    ],
)
def test_another_version_of_the_language_is_all_that_is_said(version: str, help: str) -> None:
    (only,) = found(f"spec_version: {version}\nname: new\nmodell: {{}}\n")
    assert (only.code, only.path, only.place.line, only.help) == ("MS205", "spec_version", 1, help)


def test_a_spec_without_a_version_is_told_to_state_it() -> None:
    missing = next(each for each in found("name: new\n") if each.path == "spec_version")
    assert (missing.code, missing.help) == ("MS202", "write spec_version: 1, the version of the language")


def test_a_factor_beyond_all_numbers_reaches_every_position() -> None:
    # Found by a mutant: the product with the trained length is infinite.
    huge = "{attention: {mla: {rope: {scaling: {factor: 1e308}}}}}"
    said = found(f"extends: modelspec:deepseek-v3\nname: new\nmodel: {huge}\n")
    assert [each.code for each in said if each.severity != "info"] == []
