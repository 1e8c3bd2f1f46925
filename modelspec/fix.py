"""Corrections of what was misspelt, by editing the text: comments, layout, line ends and all else stay byte for byte.

Only a `Fix` that a finding carries is applied: a key or a word that can have been meant in one way, never a number. And
only in the spec's own file: what it extends has other readers. Each edit is made only if the text is still YAML after
it, with no key twice; the file is replaced in one moment.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.document import parse
from modelspec.files import write_whole
from modelspec.resolve import resolve
from modelspec.validate import check

# Correcting a `type` may bring misspelt keys of that type to light.
_ROUNDS = 5
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Fixed:
    """One edit that was made: the place in the text as it was, the path of the key or value, old and new."""

    place: Place
    path: str
    old: str
    new: str


def fix_file(path: str | os.PathLike[str], *, allow_outside: bool = False) -> tuple[Fixed, ...]:
    """Corrects a spec's file in place, and says what was done.

    A spec that cannot be read or merged is left as it is, and so is a shipped one. Of a link the file that it leads to
    is corrected. Raises OSError if the file cannot be replaced.
    """
    file = os.fspath(path)
    try:
        before = text = resolve(file, allow_outside=allow_outside).documents.get(file, "")
        fixed: list[Fixed] = []
        for _ in range(_ROUNDS):
            _, diagnostics = check(resolve(parse(text, file), allow_outside=allow_outside))
            text, edits = corrected(text, [each for each in diagnostics if each.place.file == file])
            if not edits:
                break
            fixed += edits
    except SpecError:
        return ()
    if fixed:
        raw = Path(file).read_bytes().decode("utf-8")
        if raw.removeprefix(_BOM) != before:
            # Somebody has written it since; what they wrote must not be lost.
            return ()
        write_whole(Path(file), raw[: len(raw) - len(before)] + text)
    return tuple(sorted(fixed, key=lambda each: each.place))


def corrected(text: str, diagnostics: list[Diagnostic]) -> tuple[str, list[Fixed]]:
    """The text with the fixes of findings in it, and those that were made."""
    wanted = list(dict.fromkeys(Fixed(d.place, d.path, d.fix.old, d.fix.new) for d in diagnostics if d.fix))
    # Two misspelt keys of one map that would become the same: which of them was meant, nobody can tell.
    targets = Counter((each.path.removesuffix(each.old), each.new) for each in wanted)
    # What an alias repeats is found more than once, maybe with another remedy.
    places = Counter(each.place for each in wanted)
    starts = [0, *accumulate(len(line) for line in _lines(text))]
    done = []
    # From the end, so that what stands before keeps its place.
    for each in sorted(wanted, key=lambda each: each.place, reverse=True):
        sole = targets[each.path.removesuffix(each.old), each.new] == 1 and places[each.place] == 1
        edited = _edited(text, starts, each) if sole else None
        if edited is not None and _is_yaml(edited, each.place.file):
            text = edited
            done.append(each)
    return text, done


def _lines(text: str) -> list[str]:
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _edited(text: str, starts: list[int], fix: Fixed) -> str | None:
    """The text with one word replaced; None where it is written in another way, as with an anchor or an escape."""
    if fix.place.line > len(starts):
        return None
    start = starts[fix.place.line - 1] + fix.place.column - 1
    for quote in ("", '"', "'"):
        written = f"{quote}{fix.old}{quote}"
        if text.startswith(written, start):
            return text[:start] + f"{quote}{fix.new}{quote}" + text[start + len(written) :]
    return None


def _is_yaml(text: str, file: str) -> bool:
    try:
        parse(text, file)
    except SpecError:
        return False
    return True
