"""What a check reports: a value, without a place. `validate` finds the place from the path."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One relation that does not hold. `path` is the dependent value, `related` the values that it depends on."""

    path: Path
    message: str
    help: str | None = None
    related: tuple[tuple[Path, str], ...] = ()
    severity: Literal["error", "warning", "info"] = "error"
    # Set when the same thing is milder in a value that the spec inherits.
    inherited_severity: Literal["error", "warning", "info"] | None = None
    code: str = ""
    # The names of which the value must be one.
    choices: tuple[str, ...] = ()


def divisors(number: int, most: int | None = None) -> list[int]:
    """All divisors up to `most`, in order. Numbers in specs are small enough to try each up to the root."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return [d for d in sorted({*small, *(number // d for d in small)}) if most is None or d <= most]


def legal(values: Iterable[int], wanted: int, shown: int = 6) -> str:
    """The legal values nearest to the wanted one, in order, as a sentence."""
    every = sorted(set(values))
    near = sorted(sorted(every, key=lambda value: abs(value - wanted))[:shown])
    if not near:
        return "no value is legal here"
    return ("legal values: " if len(near) == len(every) else "nearest legal values: ") + ", ".join(map(str, near))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A suggestion for a misspelt name, and what there is."""
    known = sorted(words)
    close = get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(known)}"
