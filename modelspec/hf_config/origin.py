"""Which keys of a config.json a value of the spec comes from.

The reading itself is asked: where a value changes with a key, it comes from that key. So there is no table of names
beside the families that would have to agree with them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from modelspec.hf_config.keys import HFError, Keys

Steps = tuple[str | int, ...]
_ABSENT = object()


class _Lenient(Keys):
    """Keys of which none is bound to another: one may change while what repeats it stays."""

    def expect(self, key: str, only: Any) -> None:
        self.take(key, only)


def origins(config: Mapping[str, Any], read: Callable[[Keys], Any], path: Steps) -> list[str]:
    """The keys that the value at a path of what `read` makes of a config comes from; none where it is a default."""
    before = _at(read(_Lenient(config)), path)
    return [key for key, others in _changed(config) if _differs(before, others, read, path)]


def _differs(before: Any, others: list[dict[str, Any]], read: Callable[[Keys], Any], path: Steps) -> bool:
    """Whether the first of the other configs that can be read at all has another value there."""
    for config in others:
        try:
            after = _at(read(_Lenient(config)), path)
        except HFError:
            continue
        # Where the place itself is gone, the key says what the model is made of and not this value.
        return after is not _ABSENT and bool(after != before)
    return False


def _changed(config: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each key with a value, one inside another after a dot, and configs that differ in it alone."""
    for key, value in config.items():
        if isinstance(value, dict):
            for inner, others in _changed(value):
                yield f"{key}.{inner}", [{**config, key: other} for other in others]
        elif value is not None:
            yield key, [{**config, key: other} for other in _others(value)]


def _others(value: Any) -> list[Any]:
    """Other values: of the same kind, and one of another kind, which a key that is only passed on may have."""
    match value:
        case bool():
            return [not value, [value]]
        case int():
            return [value + 1, value - 1, [value]]
        case float():
            return [value / 2, [value]]
        case _:
            return [[value]]


def _at(made: Any, path: Steps) -> Any:
    try:
        for step in path:
            made = made[step]
    except (KeyError, IndexError, TypeError):
        return _ABSENT
    return made


def without_tags(made: Any, loc: Iterable[str | int]) -> Steps:
    """Pydantic's place of an error without the tags of unions that stand in it."""
    steps: list[str | int] = []
    for step in loc:
        below = _at(made, (step,))
        if below is not _ABSENT:
            steps.append(step)
            made = below
    return tuple(steps)
