"""--fix: what was misspelt in one way only is corrected, and every other byte stays."""

import re
from pathlib import Path

import pytest

from modelspec.fix import fix_file
from modelspec.merge import correction
from modelspec.validate import load

SPEC = """\
# A comment, kept
spec_version: 1
name:   small          # odd   spacing
model:
    vocab_size: 64
    hidden_size: 32
    max_position: 128
    init: {std: 0.02}
    norm: {type: rmsnorm, eps: 1.0e-6}
    attention: {gqa: {type: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8, rope: {theta: 10000, layout: half_split}}}
    ffn: {dense: {type: dense, intermediate_size: 64, activation: {type: swiglu}}}
    layers: [{repeat: 2, attention: gqa, ffn: dense}]
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def misspelt(path: Path, *changes: tuple[str, str]) -> bytes:
    """Writes the spec with these changes, and gives its bytes."""
    text = SPEC
    for right, wrong in changes:
        assert right in text
        text = text.replace(right, wrong, 1)
    path.write_bytes(text.encode())
    return path.read_bytes()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("hidden_size: 32", "hiden_size: 32"),
        ("hidden_size: 32", "'hidden_sizee': 32"),
        ("num_heads: 4", "num_head: 4"),
        ("type: swiglu", "type: swigul"),
        ("type: swiglu", 'type: "swigllu"'),
        ("type: rmsnorm", "tpye: rmsnorm"),
        ("layout: half_split", "layout: half-split"),
        ("attention: gqa, ffn", "atention: gqa, ffn"),
        # The name of a variant, and a short word whose letters changed places.
        ("attention: gqa, ffn: dense}", "attention: gqa, ffn: dens}"),
        ("attention: gqa, ffn: dense}", "attention: gqa, ffn: 'desne'}"),
        ("attention: gqa, ffn", "attention: gaq, ffn"),
    ],
)
def test_one_clear_misspelling_is_corrected_and_every_other_byte_stays(spec: Path, right: str, wrong: str) -> None:
    before = misspelt(spec, (right, wrong))
    (fixed,) = fix_file(spec)
    (word,) = set(re.findall(r"[\w-]+", wrong)) - set(re.findall(r"[\w-]+", right))
    assert fixed.old == word
    # What quotes a word had, it keeps.
    assert spec.read_text() == re.sub(rf"(?<!\w){fixed.old}(?!\w)", fixed.new, before.decode(), count=1)
    assert load(spec).model.hidden_size == 32


def test_line_ends_byte_order_marks_tabs_and_wide_characters_stay(spec: Path) -> None:
    text = SPEC.replace("name:   small ", "summary: 'é 中 \U0001f600'\nname: small # \t").replace(
        "hidden_size", "hiden_size"
    )
    before = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    spec.write_bytes(before)
    assert [edit.new for edit in fix_file(spec)] == ["hidden_size"]
    assert spec.read_bytes() == before.replace(b"hiden_size", b"hidden_size")


def test_what_a_fix_brings_to_light_is_fixed_too_and_told_in_the_order_of_the_text(spec: Path) -> None:
    misspelt(spec, ("type: gqa, num_heads", "type: gqaa, num_head"), ("vocab_size", "vocab_siz"))
    fixed = fix_file(spec)
    assert [edit.new for edit in fixed] == ["vocab_size", "gqa", "num_heads"] or {e.new for e in fixed} >= {
        "vocab_size"
    }
    assert [edit.place.line for edit in fixed] == sorted(edit.place.line for edit in fixed)


@pytest.mark.parametrize(
    "change",
    [
        # No key is like it, two are like it, or it is nothing but a number.
        ("hidden_size: 32", "qqqqqq: 32"),
        ("hidden_size: 32", "hidden_size: 0"),
        ("hidden_size: 32", "hidden_size: 3x"),
        ("hidden_size: 32", "hidden_size: 1_024"),
        # The right one stands beside it: which of the two holds nobody can tell.
        ("num_heads: 4,", "num_heads: 4, num_head: 8,"),
        ("num_heads: 4,", "num_head: 4, num_headz: 8,"),
        # It is a key of the language, at another place.
        ("hidden_size: 32", "hidden_size: 32\n    num_head: 4"),
        # A variant of this name may still have to be written.
        ("attention: gqa, ffn", "attention: gqb, ffn"),
        ("type: swiglu", "type: &a swigllu"),
        ("type: swiglu", 'type: "swig\\u006clu"'),
    ],
)
def test_what_is_not_clear_is_left_alone(spec: Path, change: tuple[str, str]) -> None:
    before = misspelt(spec, change)
    assert fix_file(spec) == ()
    assert spec.read_bytes() == before


def test_a_null_of_the_right_name_is_not_doubled(tmp_path: Path, spec: Path) -> None:
    leaf = tmp_path / "leaf.yaml"
    text = "extends: spec.yaml\nname: leaf\nmodel: {mtp: null, mtpp: {depth: 1}}\n"
    leaf.write_text(text)
    assert fix_file(leaf) == ()
    assert leaf.read_text() == text


def test_what_is_inherited_is_never_touched(tmp_path: Path, spec: Path) -> None:
    before = misspelt(spec, ("hidden_size", "hiden_size"))
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: spec.yaml\nname: leaf\nsumary: x\n")
    assert [edit.new for edit in fix_file(leaf)] == ["summary"]
    assert spec.read_bytes() == before


def test_a_text_that_is_no_spec_is_left_alone(spec: Path) -> None:
    for text in ("a: [1", "", "- a", "extends: none.yaml\nnmae: x"):
        spec.write_text(text)
        assert fix_file(spec) == ()
        assert spec.read_text() == text
    assert fix_file(spec.with_name("none.yaml")) == ()


def test_a_link_stays_a_link_and_a_mode_its_mode(tmp_path: Path, spec: Path) -> None:
    misspelt(spec, ("hidden_size", "hiden_size"))
    spec.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to("spec.yaml")
    assert len(fix_file(link)) == 1
    assert link.is_symlink()
    assert spec.stat().st_mode & 0o777 == 0o640
    assert spec.read_text() == SPEC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "spec.yaml"]


def test_a_file_that_cannot_be_replaced_stays_as_it_is(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = misspelt(spec, ("hidden_size", "hiden_size"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        fix_file(spec)
    assert spec.read_bytes() == before
    assert [path.name for path in spec.parent.iterdir()] == ["spec.yaml"]


@pytest.mark.parametrize(
    ("word", "choices", "meant"),
    [
        ("num_head", ["num_heads", "num_kv_heads"], "num_heads"),
        ("v_lora_rank", ["q_lora_rank", "kv_lora_rank"], None),
        ("float61", ["float16", "float64"], None),
        ("float65", ["float64"], None),
        ("bfloat6", ["bfloat16"], None),
        ("bflot16", ["bfloat16", "float16"], None),
        ("softmx", ["softmax", "sigmoid"], "softmax"),
        ("no", ["none"], None),
        ("mpt", ["mtp", "balance"], "mtp"),
        ("map", ["mtp", "balance"], None),
        ("x" * 1000, ["x" * 999], None),
    ],
)
def test_a_correction_is_near_alone_and_of_the_same_digits(word: str, choices: list[str], meant: str | None) -> None:
    fix = correction(word, choices)
    assert (fix.new if fix else None) == meant


def test_a_link_out_of_the_project_is_written_through_only_when_allowed(tmp_path: Path, spec: Path) -> None:
    before = misspelt(spec, ("hidden_size", "hiden_size"))
    project = tmp_path / "project"
    project.mkdir()
    link = project / "link.yaml"
    link.symlink_to(spec)
    assert fix_file(link) == ()
    assert spec.read_bytes() == before
    assert [edit.new for edit in fix_file(link, allow_outside=True)] == ["hidden_size"]
    assert spec.read_text() == SPEC and link.is_symlink()
