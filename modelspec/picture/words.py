"""How pictures say shapes, layers and changes."""

from typing import Any

from modelspec.dump import flow
from modelspec.picture.anatomy import Anatomy, Part, Run


def shape(dims: tuple[int, ...]) -> str:
    """A tensor's shape: 1,536 × 7,168."""
    return " × ".join(f"{size:,}" for size in dims)


def which_layers(first: int, count: int) -> str:
    """Layers by their indices."""
    return f"layer {first}" if count == 1 else f"layers {first}–{first + count - 1}"


def run(model: Anatomy, this: Run) -> str:
    """What the layers of a run are made of."""
    return f"{model.parts[this.attention].name} + {model.parts[this.ffn].name}"


def strip(model: Anatomy) -> str:
    """The strip of layers in words."""
    return ", then ".join(
        (f"{section.repeat} times (" if section.repeat > 1 else "")
        + ", ".join(f"{each.layers} × {run(model, each)}" for each in section.runs)
        + (")" if section.repeat > 1 else "")
        for section in model.sections
    )


def per_copy(part: Part) -> str:
    """How many copies the model has of a part."""
    unit = "module" if part.key == "mtp" else "layer"
    return f"{part.copies} {unit}{'s' if part.copies > 1 else ''}"


def value(said: Any) -> str:
    """A value as a spec would say it, layers as runs."""
    if isinstance(said, tuple) and said and all(isinstance(item, dict) and "repeat" in item for item in said):
        return ", ".join(f"{each['repeat']} × {each['attention']}/{each['ffn']}" for each in said)
    return "nothing" if said is None else flow(_stated(said))


def _stated(said: Any) -> Any:
    """A value without what is left out."""
    if isinstance(said, dict):
        return {key: _stated(item) for key, item in said.items() if item is not None}
    return [_stated(item) for item in said] if isinstance(said, list | tuple) else said
