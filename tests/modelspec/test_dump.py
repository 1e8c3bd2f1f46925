"""A dumped spec reads back to itself, whatever its texts look like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelspec import dump
from modelspec.document import parse
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.validate import check, load

NANO = "modelspec:deepseek-v3-nano"


def read_back(text: str) -> ModelSpec:
    spec, diagnostics = check(resolve(parse(text, "dumped.yaml")))
    assert spec is not None, diagnostics
    return spec


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-nano"])
def test_shipped_specs_read_back(name: str) -> None:
    spec = load(f"modelspec:{name}")
    assert read_back(dump.dump(spec)) == spec


# Control characters and the like are refused by the language.
@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=60))
def test_any_summary_reads_back(summary: str) -> None:
    spec = load(NANO).model_copy(update={"summary": summary})
    assert read_back(dump.dump(spec)).summary == summary


@pytest.mark.parametrize(
    "summary", ["null", "no", "1e3", "0x10", "~", "- a", "a: b", "#c", " d ", ".5", "1_000", "=", "a\nb"]
)
def test_texts_that_look_like_something_else_stay_text(summary: str) -> None:
    spec = load(NANO).model_copy(update={"summary": summary})
    assert read_back(dump.dump(spec)).summary == summary


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_numbers_read_back_exactly(eps: float) -> None:
    spec = load(NANO)
    assert spec.training is not None
    optimizer = spec.training.optimizer.model_copy(update={"eps": eps})
    changed = spec.model_copy(update={"training": spec.training.model_copy(update={"optimizer": optimizer})})
    assert read_back(dump.dump(changed)) == changed
