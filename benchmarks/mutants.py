"""How well validate takes what people break: mutants of every shipped spec.

    python benchmarks/mutants.py [--mutants 20000] [--seed 0] [--jobs 2] [--out FILE.json]

A mutant is the text of a shipped spec with one fault: a key deleted, written twice, renamed to another key of the
language or misspelt by one letter; a value of another type; two values exchanged. Of each it is asked that validate
ends without an exception, that every diagnostic stands inside a text that was read, and of a misspelt key that the
right one is suggested where it stands. Names that the author chooses, those of variants, are not misspelt.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelspec.diagnostics import Diagnostic, SpecError, render
from modelspec.document import Mapping, Node, Scalar, Sequence, parse, read
from modelspec.dump import flow
from modelspec.grammar import Grammar
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.validate import check

SPECS = Path(__file__).parents[1] / "specs"
FILE = "mutant.yaml"
KINDS = ("delete", "duplicate", "rename", "typo", "typo", "retype", "swap")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1.5, 10**30, 1e308, "", "x", "none", "null", "é", "a b"),
    *([], {}, [[]], [1, 2], ["q"], {"type": "mla"}, {"x": 1}, [{}]),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
RIGHT_FROM = 0.95

Path_ = tuple[str | int, ...]


@dataclass
class Pairs:
    """A map whose keys may stand twice."""

    items: list[tuple[str, Any]]


@dataclass(frozen=True)
class Mutant:
    """A text with one fault; of a typo, `meant` is the key as it was and `typo` as it is."""

    spec: str
    kind: str
    text: str
    meant: str | None = None
    typo: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What validate made of a mutant: the exception that escaped it, a place outside of all texts, a right suggestion.

    `right` is None where nothing was misspelt.
    """

    mutant: Mutant
    escaped: str | None
    outside: str | None
    right: bool | None


def mutants(number: int, seed: int) -> Iterator[Mutant]:
    """So many mutants, evenly over the shipped specs, the same ones for the same seed."""
    chance = random.Random(seed)
    names = sorted(path.stem for path in SPECS.glob("*.yaml"))
    made = 0
    while made < number:
        mutant = _mutant(names[made % len(names)], chance)
        if mutant is not None:
            made += 1
            yield mutant


def judge(mutant: Mutant) -> Verdict:
    """What validate makes of it."""
    sources = {FILE: mutant.text}
    found: tuple[Diagnostic, ...]
    try:
        try:
            resolved = resolve(parse(mutant.text, FILE))
            sources |= resolved.documents
            _, found = check(resolved)
        except SpecError as error:
            sources |= error.sources
            found = error.diagnostics
        for each in found:
            render(each, sources.get)
    except Exception as error:  # What must not happen is what is looked for.
        return Verdict(mutant, f"{type(error).__name__}: {error}", None, None if mutant.typo is None else False)
    outside = next((str(each.place) for each in found if not _is_inside(each, sources)), None)
    return Verdict(mutant, None, outside, None if mutant.typo is None else any(_names(each, mutant) for each in found))


def _is_inside(each: Diagnostic, sources: dict[str, str]) -> bool:
    places = [each.place, *(note.place for note in each.related)]
    for place in places:
        lines = sources.get(place.file, "").splitlines() or [""]
        if not (1 <= place.line <= len(lines) and 1 <= place.column <= len(lines[place.line - 1]) + 1):
            return False
    return True


def _names(each: Diagnostic, mutant: Mutant) -> bool:
    """Whether the misspelt key is named, and the right one suggested."""
    return f"{mutant.typo!r}" in each.message and f"did you mean {mutant.meant!r}" in (each.help or "")


def _mutant(name: str, chance: random.Random) -> Mutant | None:
    root = deepcopy(_tree(name))
    kind = chance.choice(KINDS)
    maps = list(_maps(root, ()))
    way, around = chance.choice([each for each in maps for _ in each[1].items])
    index = chance.randrange(len(around.items))
    key, value = around.items[index]
    meant = typo = None
    match kind:
        case "delete":
            del around.items[index]
        case "duplicate":
            around.items.insert(chance.randrange(len(around.items) + 1), (key, deepcopy(value)))
        case "rename":
            around.items[index] = (chance.choice(_keys()), value)
        case "typo":
            meant, typo = key, _misspelt(key, chance)
            legal = {known for schema in _grammar().at(way) for known in schema.get("properties", {})}
            if way in (("model", "attention"), ("model", "ffn")) or typo in legal or typo in dict(around.items):
                return None
            around.items[index] = (typo, value)
        case "retype":
            around.items[index] = (key, chance.choice(VALUES))
        case "swap":
            _, other = chance.choice(maps)
            if not other.items:
                return None
            at = chance.randrange(len(other.items))
            (here, mine), (there, theirs) = around.items[index], other.items[at]
            around.items[index], other.items[at] = (here, deepcopy(theirs)), (there, deepcopy(mine))
    return Mutant(name, kind, "\n".join(_block(root, "")) + "\n", meant, typo)


def _misspelt(key: str, chance: random.Random) -> str:
    """The key with one letter missing, more, other, or exchanged with its neighbour."""
    at = chance.randrange(len(key))
    match chance.choice(("missing", "more", "other", "exchanged")):
        case "missing":
            changed = key[:at] + key[at + 1 :]
        case "more":
            changed = key[:at] + chance.choice(LETTERS) + key[at:]
        case "other":
            changed = key[:at] + chance.choice(LETTERS) + key[at + 1 :]
        case _:
            changed = key[:at] + key[at : at + 2][::-1] + key[at + 2 :]
    return changed if changed not in ("", key) else f"{key}s"


@cache
def _grammar() -> Grammar:
    return Grammar(ModelSpec.model_json_schema())


@cache
def _keys() -> tuple[str, ...]:
    return tuple(sorted({key for _, schema in _grammar().maps for key in schema["properties"]}))


@cache
def _tree(name: str) -> Pairs:
    """The text of a shipped spec as maps, lists and values; what it extends is named as shipped."""

    def plain(node: Node) -> Any:
        match node:
            case Mapping(entries):
                return Pairs([(key, plain(entry.node)) for key, entry in entries.items()])
            case Sequence(items):
                return [plain(item) for item in items]
            case Scalar(value):
                return value

    tree: Pairs = plain(read(SPECS / f"{name}.yaml").root)
    tree.items = [
        (key, f"modelspec:{value.removesuffix('.yaml')}" if key == "extends" else value) for key, value in tree.items
    ]
    return tree


def _maps(node: Any, way: Path_) -> Iterator[tuple[Path_, Pairs]]:
    """Every map with keys, and the way to it."""
    match node:
        case Pairs(items):
            if items:
                yield way, node
            for key, value in items:
                yield from _maps(value, (*way, key))
        case list():
            for index, item in enumerate(node):
                yield from _maps(item, (*way, index))


def _block(node: Pairs, indent: str) -> Iterator[str]:
    for key, value in node.items:
        if isinstance(value, Pairs) and value.items:
            yield f"{indent}{key}:"
            yield from _block(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value: Any) -> str:
    match value:
        case Pairs(items):
            return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in items) + "}"
        case list():
            return "[" + ", ".join(map(_flow, value)) + "]"
        case _:
            return flow(value)


def _judged(task: tuple[int, int]) -> list[Verdict]:
    number, seed = task
    return [judge(mutant) for mutant in mutants(number, seed)]


def main() -> None:
    """Judges the mutants and exits 1 if one is answered wrongly, or too many typos are not understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--show", type=int, default=20, help="typos not understood to print")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    each = 500
    tasks = [(min(each, args.mutants - start), args.seed + start) for start in range(0, args.mutants, each)]
    with ProcessPoolExecutor(args.jobs) as pool:
        verdicts = [verdict for found in pool.map(_judged, tasks) for verdict in found]
    seconds = time.perf_counter() - started
    typos = [verdict for verdict in verdicts if verdict.right is not None]
    wrong = [verdict for verdict in typos if not verdict.right]
    escaped = [verdict for verdict in verdicts if verdict.escaped]
    outside = [verdict for verdict in verdicts if verdict.outside]
    share = 1 - len(wrong) / len(typos)
    for verdict in [*escaped, *outside][: args.show]:
        print(verdict.mutant.spec, verdict.mutant.kind, verdict.escaped, verdict.outside)
    missed = Counter((verdict.mutant.meant, verdict.mutant.typo) for verdict in wrong)
    print(", ".join(f"{meant} as {typo} ({number})" for (meant, typo), number in missed.most_common(args.show)))
    report = {
        "command": f"python benchmarks/mutants.py --mutants {args.mutants} --seed {args.seed}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "mutants": dict(Counter(verdict.mutant.kind for verdict in verdicts)) | {"all": len(verdicts)},
        "exceptions": len(escaped),
        "places_outside": len(outside),
        "typos": len(typos),
        "right_suggestions": round(share, 4),
        "seconds_per_mutant": round(seconds * args.jobs / len(verdicts), 5),
    }
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(escaped or outside or share < RIGHT_FROM))


if __name__ == "__main__":
    main()
