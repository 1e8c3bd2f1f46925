"""A dumped spec reads back to itself, whatever its texts look like."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelspec import dump
from modelspec.document import parse
from modelspec.resolve import plain, resolve
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


# The characters that YAML calls printable are those that the language allows.
PRINTABLE = st.one_of(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E),
    st.characters(min_codepoint=0xA0, max_codepoint=0xD7FF),
    st.characters(min_codepoint=0xE000, max_codepoint=0xFFFD),
    st.characters(min_codepoint=0x10000),
    st.sampled_from("\t\n\r\x85\u2028\u2029\ufeff"),
)


@given(st.text(PRINTABLE, max_size=60))
@example("\x85")
@example("a \u2028 b\u2029\n")
@example("\ufeff")
def test_any_summary_reads_back(summary: str) -> None:
    spec = load(NANO).model_copy(update={"summary": summary})
    assert read_back(dump.dump(spec)).summary == summary


def test_every_letter_that_the_language_allows_reads_back() -> None:
    allowed = [0x9, 0xA, 0xD, *range(0x20, 0x7F), 0x85, *range(0xA0, 0xD800), *range(0xE000, 0xFFFE)]
    letters = "".join(map(chr, [*allowed, 0x10000, 0x1F600, 0x10FFFF]))
    assert plain(parse(f"text: {dump.flow(letters)}\n", "dumped.yaml").root) == {"text": letters}


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
