"""Diagnostics as people and programs see them."""

import pickle
import re
from pathlib import Path

import pytest

import modelspec
from modelspec.diagnostics import CODES, Diagnostic, Place, Related, SpecError, render

TEXT = "model:\n  vocab_size: many\n  hidden_size: 64\n"
WRONG_TYPE = Diagnostic(
    code="MS203",
    severity="error",
    place=Place("a.yaml", 2, 15),
    path="model.vocab_size",
    message="model.vocab_size must be an integer, got the text 'many'",
    help="write an integer",
    related=(Related("model.hidden_size", Place("a.yaml", 3, 3), "the other size"),),
)


def test_a_rendered_diagnostic_quotes_the_line_marks_the_word_and_shows_help_and_notes() -> None:
    assert render(WRONG_TYPE, {"a.yaml": TEXT}.get) == (
        "a.yaml:2:15: error[MS203]: model.vocab_size must be an integer, got the text 'many'\n"
        "  2 |   vocab_size: many\n"
        "    |               ^^^^\n"
        "  help: write an integer\n"
        "  note: a.yaml:3:3: the other size\n"
        "  3 |   hidden_size: 64\n"
        "    |   ^^^^^^^^^^^"
    )


def test_without_a_source_text_the_first_line_still_says_everything() -> None:
    bare = Diagnostic("MS001", "error", Place("a.yaml", 1, 1), "", "cannot read a.yaml")
    assert render(bare, lambda file: None) == "a.yaml:1:1: error[MS001]: cannot read a.yaml"


def test_json_has_fixed_keys() -> None:
    assert WRONG_TYPE.as_json() == {
        "code": "MS203",
        "severity": "error",
        "file": "a.yaml",
        "line": 2,
        "column": 15,
        "path": "model.vocab_size",
        "message": "model.vocab_size must be an integer, got the text 'many'",
        "help": "write an integer",
        "related": [
            {"path": "model.hidden_size", "file": "a.yaml", "line": 3, "column": 3, "message": "the other size"}
        ],
    }


def test_text_from_a_spec_cannot_drive_the_terminal() -> None:
    hostile = Diagnostic("MS201", "error", Place("\x1b[2J.yaml", 1, 1), "", "unknown key '\x1b]0;'")
    assert "\x1b" not in render(hostile, {"\x1b[2J.yaml": "\x1b[31m: 1"}.get)


@pytest.mark.parametrize(("before", "indent"), [("ab: ", 4), ("é: ", 3), ("日本: ", 6), ("\tk: ", 4)])
def test_the_caret_stands_below_the_word_whatever_stands_before_it(before: str, indent: int) -> None:
    diagnostic = Diagnostic("MS203", "error", Place("f", 1, len(before) + 1), "", "m")
    assert render(diagnostic, {"f": before + "word"}.get).splitlines()[-1] == "    | " + " " * indent + "^^^^"


def test_a_long_line_is_cut_around_the_place() -> None:
    text = "a" * 5000 + " here " + "b" * 5000
    rendered = render(Diagnostic("MS203", "error", Place("f", 1, 5002), "", "m"), {"f": text}.get).splitlines()
    assert all(len(line) < 140 for line in rendered)
    quoted, marks = rendered[1], rendered[2]
    assert quoted[marks.index("^") :].startswith("here")


def test_an_error_prints_all_its_diagnostics_and_survives_pickling() -> None:
    error = SpecError([WRONG_TYPE, WRONG_TYPE], {"a.yaml": TEXT}, exit_code=2)
    assert str(error).count("error[MS203]") == 2
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.diagnostics, copy.exit_code, str(copy)) == (error.diagnostics, 2, str(error))


def test_the_codes_of_reading_composing_and_shape_are_exactly_those_in_use() -> None:
    package = Path(modelspec.__file__).parent
    used = {
        code
        for file in package.rglob("*.py")
        if file.name != "diagnostics.py"
        for code in re.findall(r'"(MS\d{3})"', file.read_text(encoding="utf-8"))
    }
    assert {code for code in used if code[2] in "01267"} == set(CODES)
