"""The architecture of two specs, written so that equal models look equal.

Names of variants and cuts of layer runs are the author's choice. Here every layer stands for itself, variants that no
layer uses are gone, and a variant of the new model has the name of the old model's variant that it corresponds to: one
with the same content, or of the same name, or, failing both, of its type and in most of the same layers.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from modelspec.schema import Model

KINDS = ("attention", "ffn")

_Layers = list[dict[str, Any]]


def canonical(old: Model, new: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both models as plain maps; `layers` is a list of runs, `mtp` names its block's variants."""
    before, after = _layers(old), _layers(new)
    names = {kind: _correspondence(kind, old, new, before, after) for kind in KINDS}
    return _plain(old, before, {kind: {} for kind in KINDS}), _plain(new, after, names)


def _layers(model: Model) -> _Layers:
    """One entry per layer, and one more for the block of multi-token prediction."""
    runs = [*model.expanded_layers(), *([model.mtp_layer()] if model.mtp else [])]
    return [
        {"attention": run.attention, "ffn": run.ffn, "norm": run.norm.model_dump() if run.norm else None}
        for run in runs
    ]


def _correspondence(kind: str, old: Model, new: Model, before: _Layers, after: _Layers) -> dict[str, str]:
    """Of each variant that the new model uses, the name it has here."""
    olds = {layer[kind]: getattr(old, kind)[layer[kind]] for layer in before}
    news = {layer[kind]: getattr(new, kind)[layer[kind]] for layer in after}
    together = Counter((one[kind], other[kind]) for one, other in zip(before, after, strict=False))
    # The best pairs first; a variant on either side is paired once.
    pairs = sorted(
        ((name, other) for name in olds for other in news if olds[name].type == news[other].type),
        key=lambda pair: (olds[pair[0]] != news[pair[1]], pair[0] != pair[1], -together[pair], pair),
    )
    same_name = [(name, name) for name in olds if name in news]
    result: dict[str, str] = {}
    for name, other in [*pairs, *same_name]:
        is_related = olds[name] == news[other] or name == other or together[name, other]
        if is_related and other not in result and name not in result.values():
            result[other] = name
    for other in news:
        # A new variant must not take the name of another one.
        if other not in result:
            result[other] = f"{other} (new)" if other in olds or other in result.values() else other
    return result


def _plain(model: Model, layers: _Layers, names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    def renamed(kind: str, name: str) -> str:
        return names[kind].get(name, name)

    plain = model.model_dump(exclude={"attention", "ffn", "layers", "mtp"})
    for kind in KINDS:
        used = dict.fromkeys(layer[kind] for layer in layers)
        plain[kind] = {renamed(kind, name): getattr(model, kind)[name].model_dump() for name in used}
    named = [layer | {kind: renamed(kind, layer[kind]) for kind in KINDS} for layer in layers]
    if model.mtp is not None:
        block = named.pop()
        plain["mtp"] = {"depth": model.mtp.depth, "layer": {kind: block[kind] for kind in KINDS}}
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
