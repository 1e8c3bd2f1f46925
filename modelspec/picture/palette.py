"""The colours of pictures, in light and dark, and the rules that give them to shapes.

A colour has a role, never a meaning of its own: whatever it tells is also told by a word, a sign or a length. Text has
a contrast of at least 4.5 to 1 on every ground that it stands on, in both themes. Rules hold plain values, because
programs that turn SVG into print know no variables; those keep the light ones, the first.
"""

from collections.abc import Iterable

from modelspec.picture.anatomy import Family, Part

Theme = dict[str, str]

LIGHT: Theme = {
    "paper": "#ffffff",
    "card": "#f6f7f9",
    "line": "#d3d8e0",
    "ink": "#1a1f28",
    "soft": "#545e6e",
    "link": "#1d5aa8",
    "new": "#1a6b35",
    "new-ground": "#e5f4e9",
    "gone": "#a8281c",
    "gone-ground": "#fdebe8",
    "changed": "#7a4d00",
    "changed-ground": "#fdf2d8",
    "attention-0": "#3b6fb6",
    "attention-1": "#a3c4ea",
    "attention-2": "#6b5cb0",
    "attention-3": "#c6bce8",
    "dense-0": "#cf8f35",
    "dense-1": "#eed5a8",
    "experts-0": "#2d8f79",
    "experts-1": "#9fd3c5",
    "rest-0": "#8790a0",
    "rest-1": "#c3c9d3",
    "idle": "#dbe5e3",
}
DARK: Theme = {
    "paper": "#12161d",
    "card": "#1a202a",
    "line": "#39414f",
    "ink": "#e8ebf1",
    "soft": "#a6b0c0",
    "link": "#8fbaf5",
    "new": "#86dba1",
    "new-ground": "#14301f",
    "gone": "#f7a79d",
    "gone-ground": "#3c1b18",
    "changed": "#ebcb7c",
    "changed-ground": "#362a0f",
    "attention-0": "#6a9ce0",
    "attention-1": "#35578a",
    "attention-2": "#a092e0",
    "attention-3": "#54488f",
    "dense-0": "#d9a355",
    "dense-1": "#72572c",
    "experts-0": "#4fb79e",
    "experts-1": "#27604f",
    "rest-0": "#7f8a9c",
    "rest-1": "#4c5564",
    "idle": "#2b3a3a",
}
TEXT = ("ink", "soft", "link", "new", "gone", "changed")
_SHADES = {"attention": 4, "dense": 2, "experts": 2, "rest": 2}

SANS = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif'
MONO = 'ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'


def shades(parts: Iterable[Part]) -> dict[str, str]:
    """A class of colour for each part, by key: neighbours of one family differ."""
    seen: dict[Family, int] = {}
    found = {}
    for part in parts:
        index = seen.get(part.family, 0)
        seen[part.family] = index + 1
        found[part.key] = f"{part.family}-{index % _SHADES[part.family]}"
    return found


def shapes() -> str:
    """Rules for what is drawn, in both themes: `.fill-ROLE`, `.stroke-ROLE`."""
    return f"{_shapes(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_shapes(DARK)}\n}}"


def variables() -> str:
    """The roles as variables of a page, in both themes."""
    return f":root {{{_variables(LIGHT)}}}\n@media (prefers-color-scheme: dark) {{ :root {{{_variables(DARK)}}} }}"


def _shapes(theme: Theme) -> str:
    fills = (f".fill-{role} {{ fill: {colour} }}" for role, colour in theme.items() if not role.endswith("-ground"))
    strokes = (f".stroke-{role} {{ stroke: {theme[role]}; fill: none }}" for role in ("line", "soft"))
    return "\n".join((*fills, *strokes))


def _variables(theme: Theme) -> str:
    return " ".join(f"--{role}: {colour};" for role, colour in theme.items())
