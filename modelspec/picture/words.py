"""How pictures say shapes, layers and copies."""

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
