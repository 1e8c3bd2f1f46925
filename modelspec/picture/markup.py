"""Elements of HTML and SVG as values: what is text stays text.

`tag` takes children that are text or other elements. Text is escaped where it enters, so that no name or summary of a
spec can become an element, whoever wrote it. What is written is well-formed XML and, in a page, HTML too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

# Characters that XML cannot hold even escaped; a surrogate could not be encoded either.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Elements of HTML that have no end tag.
_VOID = frozenset({"meta", "br", "hr"})


@dataclass(frozen=True, slots=True)
class Markup:
    """Escaped source."""

    source: str


Child = Markup | str | int
Attribute = str | int | float | None


def text(value: str) -> str:
    """Escaped for content and for attributes, with a mark for what XML cannot hold."""
    return escape(_ILLEGAL.sub("\ufffd", value))


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """An element. Of a keyword `_` stands for `-` and is dropped at its end; None leaves an attribute out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(number(value) if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if not children and (name in _VOID or name in ("path", "rect", "line", "circle", "use")):
        return Markup(f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{''.join(_source(child) for child in children)}</{name}>")


def lines(children: Iterable[Child]) -> Markup:
    """Several elements, each in a line of its own."""
    return Markup("\n".join(_source(child) for child in children))


def number(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _source(child: Child) -> str:
    return child.source if isinstance(child, Markup) else text(str(child))
