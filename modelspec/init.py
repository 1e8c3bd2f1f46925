"""A new spec from one that exists: its own text, whole, with the meaning of each key behind it.

Nothing is inherited by reference: what the new spec says stands in it, so that it can be edited without knowing its
source. At another size (`modelspec.scale`) the architecture keeps the source's proportions, and what depends on the
number of devices goes; the recipe is kept as it stands, for its author to fit.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from modelspec import schema
from modelspec.dump import Path, lines
from modelspec.scale import count

# The schema as the shipped specs name it, for a file of a project that the package is no part of.
SCHEMA = "../modelspec/spec.schema.json"
WIDTH = 120
_COLUMN = 44
_SENTENCE = re.compile(r"\. (?=[A-Z])")
_TOKENS = re.compile(r"(?<=tokens: )[0-9]+0{6}\b")
# What of a layout means something on one process.
_OF_ONE_PROCESS = ("microbatch_size", "recompute", "compile")


def draft(source: schema.ModelSpec, name: str, model: schema.Model | None = None) -> schema.ModelSpec:
    """The spec of this name that says what the source says; with a model of another size, the source's around that.

    Variants that no layer uses are left out. Raises pydantic's ValidationError for no legal name.
    """
    data = source.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    data = {
        key: data[key] for key in schema.ModelSpec.model_fields if key in data and key not in ("summary", "waivers")
    }
    data["spec_version"], data["name"] = 1, name
    if model is not None:
        data["model"] = model.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        _fit_one_process(data)
    used = source.model if model is None else model
    for key in ("attention", "ffn"):
        picked = {getattr(layer, key) for layer in (*used.expanded_layers(), used.mtp_layer())}
        data["model"][key] = {each: value for each, value in data["model"][key].items() if each in picked}
    return schema.ModelSpec.model_validate(data)


def text(spec: schema.ModelSpec, origin: str, schema_file: str, scaled: bool = False) -> str:
    """The spec as YAML: the modeline that names the schema to editors, where it comes from, a comment behind each key.

    `origin` names the source for the reader, `schema_file` is the path of the authoring schema from beside the file.
    """
    counts = count(spec.model)
    head = [
        f"# yaml-language-server: $schema={schema_file}",
        *(["# `modelspec schema` prints the schema that the first line names."] if schema_file == SCHEMA else []),
        f"# {counts.total:,} parameters, {counts.active:,} active for one token.",
        f"# Made from {origin} by `modelspec init`; `modelspec explain KEY` says more of a key.",
    ]
    if scaled:
        head.append("# The architecture has its source's proportions.")
        if spec.training is not None:
            head.append("# The recipe is the source's as it stands: fit lengths, batches and rates to this size.")
    return "\n".join([*head, *_body(spec)]) + "\n"


def _fit_one_process(data: dict[str, Any]) -> None:
    """Takes out of a spec's data what holds for its own number of devices only."""
    layout = data.pop("parallelism", {})
    if kept := {key: layout[key] for key in _OF_ONE_PROCESS if key in layout}:
        data["parallelism"] = kept
    for stage in data.get("training", {}).get("stages", ()):
        stage.pop("parallelism", None)


def _body(spec: schema.ModelSpec) -> Iterator[str]:
    data = spec.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    for line, comment in lines(data, _meanings(spec)):
        line = _TOKENS.sub(_short, line)
        if line[0] != " " and line.endswith(":"):
            yield ""
        if not comment:
            yield line
        elif len(beside := f"{line:<{_COLUMN}}  # {comment}") <= WIDTH:
            yield beside
        else:
            indent = " " * (len(line) - len(line.lstrip(" ")))
            yield f"{indent}# {comment}"
            yield line


def _short(tokens: re.Match[str]) -> str:
    """A count of tokens as people write it: 14.8e12."""
    exponent = (len(tokens[0]) - 1) // 3 * 3
    return f"{tokens[0][:-exponent]}.{tokens[0][-exponent:].rstrip('0')}".rstrip(".") + f"e{exponent}"


def _meanings(spec: schema.ModelSpec) -> Callable[[Path], str]:
    """What the key of a path means, the first time that its class and name come up."""
    told: set[tuple[str, str]] = set()

    def meaning(path: Path) -> str:
        at: Any = spec
        for step in path[:-1]:
            at = getattr(at, str(step)) if isinstance(at, schema.Strict) else at[step]
        key = path[-1]
        if not isinstance(at, schema.Strict) or not isinstance(key, str) or (type(at).__name__, key) in told:
            return ""
        told.add((type(at).__name__, key))
        return _SENTENCE.split(type(at).model_fields[key].description or "")[0]

    return meaning
