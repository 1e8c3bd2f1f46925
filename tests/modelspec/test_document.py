"""Reading YAML: the rules for scalars, places, and everything that is refused."""

import os
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.document import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    Mapping,
    Node,
    Scalar,
    Sequence,
    parse,
    parse_value,
    read,
)


def plain(node: Node) -> object:
    if isinstance(node, Mapping):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    return [plain(item) for item in node.items] if isinstance(node, Sequence) else node.value


def refused(text: str) -> Diagnostic:
    with pytest.raises(SpecError) as caught:
        parse(text, "a.yaml")
    (diagnostic,) = caught.value.diagnostics
    assert caught.value.exit_code == 1
    assert diagnostic.severity == "error"
    return diagnostic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.2e-4", 2.2e-4),
        ("14.8e12", 14.8e12),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-9223372036854775808", -(2**63)),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("nan", "nan"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("=", "="),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    read_back = plain(parse(f"key: {text}\n", "a.yaml").root)
    assert read_back == {"key": value}
    assert isinstance(read_back, dict)
    assert type(read_back["key"]) is type(value)


def test_every_key_and_every_value_knows_its_line_and_column() -> None:
    root = parse("# comment\nmodel:\n  layers: [1, {a: 2}]\n", "a.yaml").root
    model = root.entries["model"]
    assert model.key_place == Place("a.yaml", 2, 1)
    assert isinstance(model.node, Mapping)
    layers = model.node.entries["layers"]
    assert layers.key_place == Place("a.yaml", 3, 3)
    assert isinstance(layers.node, Sequence)
    first, second = layers.node.items
    assert first == Scalar(1, Place("a.yaml", 3, 12), "1")
    assert isinstance(second, Mapping)
    assert second.entries["a"].node.place == Place("a.yaml", 3, 19)


def test_lines_are_counted_alike_for_every_line_ending() -> None:
    for ending in ("\n", "\r\n", "\r"):
        root = parse(f"a: 1{ending}{ending}b: 2{ending}", "a.yaml").root
        assert root.entries["b"].key_place == Place("a.yaml", 3, 1)


def test_an_alias_is_the_node_that_it_names() -> None:
    root = parse("a: &x {k: [1, 2]}\nb: *x\n", "a.yaml").root
    assert root.entries["b"].node is root.entries["a"].node


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("", "MS006", 1, 1),
        ("# only a comment\n", "MS006", 1, 1),
        ("---\n", "MS006", 1, 1),
        ("a: 1\n---\nb: 2\n", "MS007", 2, 1),
        ("- 1\n", "MS008", 1, 1),
        ("7", "MS008", 1, 1),
        ("a: [1, 2\n", "MS005", 2, 1),
        ("a:\n\tb: 1\n", "MS005", 2, 1),
        ("a: b: c\n", "MS005", 1, 5),
        ('a: "\\U00110000"\n', "MS005", 1, 1),
        ("%YAML 1.1\n---\na: no\n", "MS005", 1, 1),
        ("# %YAML 1.1\r\n\r\n%TAG ! !x\r\n%YAML 1.1 # old\r\n---\r\na: no\r\n", "MS005", 4, 1),
        (f"%YAML 1.{'1' * 10_000}\n---\na: 1\n", "MS005", 1, 1),
        ("a: x\0y\n", "MS004", 1, 5),
        ("a: 1\nb: \x1b[31m\n", "MS004", 2, 4),
        ('a: "\\ud800"\n', "MS004", 1, 4),
        ("a: &x [*x]\n", "MS015", 1, 8),
        ("a: *x\n", "MS015", 1, 4),
        ("a: !!python/object/apply:os.system [ls]\n", "MS011", 1, 4),
        ("a: ! 1\n", "MS011", 1, 4),
        ("a: 1\nb: 2\na: 3\n", "MS012", 3, 1),
        ("1: a\n", "MS013", 1, 1),
        ("true: a\n", "MS013", 1, 1),
        (": a\n", "MS013", 1, 1),
        ("? [a, b]\n: c\n", "MS013", 1, 3),
        ("a: &x b\n*x : c\n", "MS013", 2, 1),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "MS014", 2, 5),
        ("a: .nan\n", "MS016", 1, 4),
        ("a: -.inf\n", "MS016", 1, 4),
        ("a: 9223372036854775808\n", "MS016", 1, 4),
        ("a: 1e999\n", "MS016", 1, 4),
        ("a: 1e-999\n", "MS016", 1, 4),
        ("a: " + "1" * 10_000 + "\n", "MS016", 1, 4),
        ("a: 0x" + "f" * 10_000 + "\n", "MS016", 1, 4),
        ("a: " + "[" * 5_000, "MS009", 1, 3 + MAX_DEPTH),
        ("- " * 5_000, "MS009", 1, 1 + 2 * MAX_DEPTH),
        ("a: [" + "1," * MAX_NODES + "1]\n", "MS010", 1, 4 + 2 * MAX_NODES - 3),
        ("a: " + "x" * MAX_BYTES, "MS002", 1, 1),
    ],
)
def test_what_a_spec_may_not_hold_is_one_diagnostic_at_its_place(text: str, code: str, line: int, column: int) -> None:
    diagnostic = refused(text)
    assert (diagnostic.code, diagnostic.place) == (code, Place("a.yaml", line, column)), diagnostic.message


def test_aliases_count_as_what_they_stand_for() -> None:
    bomb = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    bomb += [
        f"{this}: &{this} [{', '.join([f'*{last}'] * 9)}]" for last, this in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert refused("\n".join(bomb)).code == "MS010"
    half = MAX_DEPTH // 2
    assert refused(f"a: &a {'[' * half}{']' * half}\nb: {'[' * half}*a{']' * half}\n").code == "MS009"


def test_a_diagnostic_of_a_nested_value_has_its_path() -> None:
    assert refused("model: {layers: [{repeat: 1}, {repeat: .inf}]}").path == "model.layers.1.repeat"


def test_the_value_of_an_override_is_read_by_the_same_rules() -> None:
    assert plain(parse_value("[{repeat: 2, rate: 1e-4}]", 1)) == [{"repeat": 2, "rate": 1e-4}]
    assert parse_value("      4", 3) == Scalar(4, Place("--set", 3, 7), "4")
    assert plain(parse_value("", 1)) is None
    with pytest.raises(SpecError, match=r"--set:2:1: error\[MS016\]"):
        parse_value(".nan", 2)


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read(file).root.entries["a"].key_place == Place(str(file), 1, 1)


@pytest.mark.parametrize(
    "kind", ["missing", "directory", "pipe", "device", "below a file", "null character", "empty name"]
)
def test_what_cannot_be_read_at_all_ends_with_exit_code_2(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("a: 1")
    os.mkfifo(tmp_path / "pipe")
    path = {
        "missing": str(tmp_path / "none.yaml"),
        "directory": str(tmp_path),
        "pipe": str(tmp_path / "pipe"),
        "device": os.devnull,
        "below a file": str(tmp_path / "file" / "a.yaml"),
        "null character": "a\0.yaml",
        "empty name": "",
    }[kind]
    with pytest.raises(SpecError) as caught:
        read(path)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["MS001"]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("raw", "code", "line", "column"),
    [
        (b"a: 1\nb: caf\xe9\n", "MS003", 2, 7),
        (b"\xff\xfea\0:\0", "MS003", 1, 1),
        (b"#" * 2_000_000, "MS002", 1, 1),
        (b"\x80\x04\x95.", "MS003", 1, 1),
    ],
)
def test_bytes_that_are_no_spec_are_refused(tmp_path: Path, raw: bytes, code: str, line: int, column: int) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(raw)
    with pytest.raises(SpecError) as caught:
        read(file)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.place) == (code, Place(str(file), line, column))


YAML_TEXT = st.text(
    st.sampled_from(list("[]{}:,-?&*!|>'\"%@`#<.=~ \n\t\r\\xuU01aé\ufeff\x85\u2028")), max_size=60
) | st.text(max_size=60)


@given(YAML_TEXT)
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_document_within_bounds_or_a_spec_error(text: str) -> None:
    try:
        document = parse(text, "a.yaml")
    except SpecError as error:
        (diagnostic,) = error.diagnostics
        assert 1 <= diagnostic.place.line <= text.count("\n") + text.count("\r") + 1
        assert str(error)
    else:
        assert isinstance(document.root, Mapping)


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_document_or_a_spec_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(raw)
    try:
        read(file)
    except SpecError as error:
        assert len(error.diagnostics) == 1


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(string.ascii_letters + string.digits + " ._-:", max_size=8)
)


def flow(value: object) -> str:
    """YAML that says this value: JSON but for the spelling of numbers, which Python's repr has right."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {flow(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


@given(
    st.dictionaries(
        st.text(string.ascii_lowercase, min_size=1, max_size=5),
        st.recursive(
            SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner)
        ),
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_plain_data_comes_back_as_it_was_written(value: dict[str, object]) -> None:
    assert plain(parse(flow(value), "a.yaml").root) == value
