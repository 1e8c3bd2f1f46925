"""The guide to adding a variant is true: its code is in the files, its counts are theirs, it names what it touched."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "add-a-variant.md").read_text()
EXCERPTS = re.findall(r"```\w+ (\S+/\S+)\n(.*?)```", GUIDE, re.DOTALL)
ROWS = re.findall(r"^\| .* \| `(\S+)`(?:, `(\w+)`)? \| (\d+) \|$", GUIDE, re.MULTILINE)


@pytest.mark.parametrize(("path", "excerpt"), EXCERPTS, ids=[path for path, _ in EXCERPTS])
def test_an_excerpt_stands_in_its_file(path: str, excerpt: str) -> None:
    text, at = (ROOT / path).read_text(), 0
    for piece in re.split(r"^\.\.\.\n", excerpt, flags=re.MULTILINE):
        found = text.find(piece, at)
        assert found >= 0, f"{path} does not have these lines any more, in this order:\n{piece}"
        at = found + len(piece)


@pytest.mark.parametrize(("path", "name", "lines"), ROWS, ids=[row[0] for row in ROWS])
def test_lines_are_counted_as_they_are(path: str, name: str, lines: str) -> None:
    text = (ROOT / path).read_text()
    if name:
        (node,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)
        text = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n"
    assert text.count("\n") == int(lines)


def test_the_guide_shows_every_step() -> None:
    assert len(EXCERPTS) == 6
    assert len(ROWS) == 5


def test_every_file_that_knows_of_the_class_is_named() -> None:
    sources = [path for folder in ("modelspec", "builders", "kernels") for path in (ROOT / folder).rglob("*.py")]
    knowing = {str(path.relative_to(ROOT)) for path in sources if "GatedDeltaNet" in path.read_text()}
    # What knows of it must be said, whether or not it should: the guide claims to be whole.
    assert [path for path in sorted(knowing) if f"`{path}`" not in GUIDE and f" {path}\n" not in GUIDE] == []
