"""The architecture of two specs, written so that equal models look equal.

Names of variants and cuts of layer runs are the author's choice. Here every layer stands for itself, variants that no
layer uses are gone, and those of equal content are one. A variant of the new model has the name of the old model's
variant that it corresponds to: one with the same content, or of the same name, or, failing both, of its type and in
most of the same layers.
"""

from collections import Counter
from collections.abc import Container, Mapping
from itertools import count
from typing import Any

from modelspec.schema import Model

KINDS = ("attention", "ffn")

# Of each kind, and of each variant of it that a layer uses, the name in canonical form.
Names = dict[str, dict[str, str]]
_Layers = list[dict[str, Any]]


def canonical(old: Model, new: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both models as plain maps; `layers` is a list of runs, `mtp` names its block's variants."""
    ours, theirs = canonical_names(old, new)
    return _plain(old, ours), _plain(new, theirs)


def canonical_names(old: Model, new: Model) -> tuple[Names, Names]:
    """What the variants of both models are called in canonical form."""
    before, after = _layers(old), _layers(new)
    ours = {kind: _merged(kind, old, before, new) for kind in KINDS}
    theirs = {kind: _merged(kind, new, after, old) for kind in KINDS}
    for kind in KINDS:
        olds = [ours[kind][layer[kind]] for layer in before]
        news = [theirs[kind][layer[kind]] for layer in after]
        found = _correspondence(getattr(old, kind), getattr(new, kind), olds, news)
        theirs[kind] = {name: found[same] for name, same in theirs[kind].items()}
    return ours, theirs


def _layers(model: Model) -> _Layers:
    """One entry per layer, and one more for the block of multi-token prediction."""
    runs = [*model.expanded_layers(), *([model.mtp_layer()] if model.mtp else [])]
    return [
        {
            "attention": run.attention,
            "ffn": run.ffn,
            "norm": run.norm.model_dump() if run.norm and run.norm != model.norm else None,
        }
        for run in runs
    ]


def _merged(kind: str, model: Model, layers: _Layers, other: Model) -> dict[str, str]:
    """Of each variant in use, the first one of the same content; rather one whose name the other model has too."""
    variants, names = getattr(model, kind), dict.fromkeys(layer[kind] for layer in layers)
    first: dict[Any, str] = {}
    for name in sorted(names, key=lambda name: name not in getattr(other, kind)):
        first.setdefault(variants[name], name)
    return {name: first[variants[name]] for name in names}


def _correspondence(
    before: Mapping[str, Any], after: Mapping[str, Any], olds: list[str], news: list[str]
) -> dict[str, str]:
    """Of each variant in use in the new model, the name that it has here; `olds` and `news` have one per layer."""
    together = Counter(zip(olds, news, strict=False))
    ours, theirs = dict.fromkeys(olds), dict.fromkeys(news)
    equal = {before[name]: name for name in ours}
    same_content = [(equal[after[other]], other) for other in theirs if after[other] in equal]
    same_name = [(name, name) for name in ours if name in theirs]
    related = {*same_content, *same_name, *together}
    # The best pairs first; a variant on either side is paired once.
    pairs = sorted(
        ((name, other) for name, other in related if before[name].type == after[other].type),
        key=lambda pair: (before[pair[0]] != after[pair[1]], pair[0] != pair[1], -together[pair], pair),
    )
    result: dict[str, str] = {}
    paired: set[str] = set()
    for name, other in [*pairs, *same_name]:
        if other not in result and name not in paired:
            result[other] = name
            paired.add(name)
    taken = {*ours, *paired}
    for other in theirs:
        # A new variant must not take the name of another one.
        if other not in result:
            result[other] = _free(other, taken)
            taken.add(result[other])
    return result


def _free(name: str, taken: Container[str]) -> str:
    """The name, or one like it that is legal too and not taken."""
    others = (f"{name[:48]}_new{number if number > 1 else ''}" for number in count(1))
    return name if name not in taken else next(other for other in others if other not in taken)


def _plain(model: Model, names: Names) -> dict[str, Any]:
    layers = _layers(model)
    plain = model.model_dump(exclude={"attention", "ffn", "layers", "mtp"})
    for kind in KINDS:
        used = dict.fromkeys(layer[kind] for layer in layers)
        plain[kind] = {names[kind][name]: getattr(model, kind)[name].model_dump() for name in used}
    named = [layer | {kind: names[kind][layer[kind]] for kind in KINDS} for layer in layers]
    if model.mtp is not None:
        block = named.pop()
        # Norms of its own it has from the last layer, and only where nothing is said of its variants.
        said = None if block["norm"] else {kind: block[kind] for kind in KINDS}
        plain["mtp"] = {"depth": model.mtp.depth, "layer": said}
    plain["layers"] = _runs(named)
    return plain


def _runs(layers: _Layers) -> tuple[dict[str, Any], ...]:
    """Neighbouring equal layers as one run."""
    runs: list[dict[str, Any]] = []
    for layer in layers:
        said = {key: value for key, value in layer.items() if value is not None}
        if runs and {key: value for key, value in runs[-1].items() if key != "repeat"} == said:
            runs[-1]["repeat"] += 1
        else:
            runs.append({"repeat": 1} | said)
    return tuple(runs)
