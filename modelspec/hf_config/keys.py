"""A config.json as keys that are taken one by one.

Every key is taken exactly once. What nobody takes must be known to say nothing about the function of the network;
anything else that is left at the end is an error, because it may change what the model computes.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from modelspec import schema

MAX_JSON_BYTES = 64 * 2**20
# No config nests deeper than this, and no number in one has more digits.
MAX_JSON_DEPTH = 32
MAX_DIGITS = 100
# No factor of a model comes near; arithmetic with what is larger may overflow.
MAX_NUMBER = 10**9

# Keys that say nothing about the function of the network: files, generation, bookkeeping, other programs' settings,
# losses that training may add.
IGNORED = frozenset(
    {
        *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype"),
        *("transformers_version", "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"),
        *("chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "problem_type", "return_dict", "use_cache"),
        *("aux_loss_alpha", "ep_size", "pretraining_tp", "router_aux_loss_coef", "seq_aux"),
    }
)


class HFError(Exception):
    """A Hugging Face directory, or a spec on its way to one, says what cannot be carried over."""

    exit_code = 1


class Unreadable(HFError):
    """A file that holds no JSON object, so that nothing can be said about what it asks for."""

    exit_code = 2


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file: bounded in size, no NaN, no duplicate keys. Raises Unreadable naming the file."""
    try:
        value = json.loads(
            _read_bytes(path).decode("utf-8-sig"),
            parse_constant=_no_constant,
            parse_int=_integer,
            object_pairs_hook=_no_duplicates,
        )
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path}: not valid JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise Unreadable(f"{path}: not valid JSON: {reason}") from None
    except ValueError as error:
        raise Unreadable(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise _too_deep(path) from None
    if _is_deep(value):
        raise _too_deep(path)
    if not isinstance(value, dict):
        raise Unreadable(f"{path}: not a JSON object")
    return value


def _read_bytes(path: Path) -> bytes:
    # A pipe would be waited for without end.
    if path.exists() and not path.is_file():
        raise OSError(0, "it is not a file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise OSError(0, f"it is larger than {MAX_JSON_BYTES:,} bytes")
    return path.read_bytes()


def _too_deep(path: Path) -> Unreadable:
    return Unreadable(f"{path}: lists and objects are nested more than {MAX_JSON_DEPTH} deep")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [child for each in inner if isinstance(each, list) for child in each]
    return bool(level)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice in one object")
        result[key] = value
    return result


REQUIRED = object()


def said(value: Any) -> str:
    """A value as an error shows it: cut, where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Keys:
    """The keys of a map, taken one by one; null counts as absent. Every method raises HFError naming the key.

    `stated` names every key that stands in the map, null or not: to some classes that makes a difference.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.where = where
        self.stated = frozenset(values)
        self.rest = {key: value for key, value in values.items() if value is not None}
        self.ignored: dict[str, Any] = {}

    def wrong(self, key: str, reason: str) -> HFError:
        """The error of a key."""
        return HFError(f"{self.where}{key} {reason}")

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a key, which must have one if there is no default."""
        value = self.rest.pop(key, default)
        if value is REQUIRED:
            raise self.wrong(key, "is missing")
        return value

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 0, most: int = schema.MAX_LAYERS) -> int:
        """A whole number that something is computed from."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, f"must be a whole number, {least} to {most}")
        return value

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {said(value)}; it must be true or false")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A number from 0 on that something is computed from, or the default as it is."""
        value = self.take(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
            raise self.wrong(key, f"is {said(value)}; it must be a number, 0 to {MAX_NUMBER:,}")
        return value

    def choice(self, key: str, among: Collection[str], default: Any = REQUIRED) -> str:
        """One of a few words."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in among:
            raise self.wrong(key, f"is {said(value)}; only {' or '.join(map(repr, among))} is supported")
        return value

    def words(self, key: str, length: int, among: Collection[str], default: list[str]) -> list[str]:
        """One word per layer."""
        value = self.take(key, default)
        if not isinstance(value, list) or len(value) != length:
            raise self.wrong(key, f"must be a list with one entry for each of the {length} layers")
        for index, word in enumerate(value):
            if not isinstance(word, str) or word not in among:
                raise self.wrong(
                    f"{key}[{index}]", f"is {said(word)}; only {' or '.join(map(repr, among))} is supported"
                )
        return value

    def expect(self, key: str, only: Any) -> None:
        """A key that may only have one value here, which is also what its absence means."""
        value = self.take(key, only)
        if value != only:
            raise self.wrong(key, f"is {said(value)}; only {only!r} is supported")

    def ignore(self, *names: str) -> None:
        """Keys that mean nothing in this config."""
        for key in names:
            if key in self.rest:
                self.ignored[key] = self.rest.pop(key)

    def finish(self) -> None:
        """What is left must be known to mean nothing."""
        unknown = sorted(self.rest.keys() - IGNORED)
        if unknown:
            raise HFError(
                f"{', '.join(self.where + key for key in unknown)}: not known, and may change what the "
                "model computes; remove it from the file if it does not"
            )
        self.ignore(*sorted(self.rest))
