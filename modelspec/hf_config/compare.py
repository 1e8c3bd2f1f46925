"""What a spec says and a family cannot: the config written for it, read back, and compared part by part.

Layers are compared one by one, so that it does not matter how runs are cut and variants are called.
"""

from typing import Any

from modelspec import schema
from modelspec.hf_config.keys import HFError


def require_equal(spec: schema.Model, said: schema.Model, family: str) -> None:
    """Raises HFError at the first part of a model that did not survive the way into its config and back."""
    for name in ("vocab_size", "hidden_size", "max_position", "tie_embeddings", "init", "norm"):
        _require_same(f"model.{name}", _plain(getattr(spec, name)), _plain(getattr(said, name)), family)
    depth, said_depth = (model.mtp.depth if model.mtp else 0 for model in (spec, said))
    _require_same("model.mtp.depth", depth, said_depth, family)
    mine, theirs = [*spec.expanded_layers()], [*said.expanded_layers()]
    if spec.mtp:
        mine, theirs = [*mine, spec.mtp_layer()], [*theirs, said.mtp_layer()]
    seen: set[tuple[schema.LayerRun, schema.LayerRun]] = set()
    for index, (layer, other) in enumerate(zip(mine, theirs, strict=True)):
        if (layer, other) in seen:
            continue
        seen.add((layer, other))
        place = f"model.layers (layer {index})" if index < spec.num_layers else "model.mtp.layer"
        for path, part, said_part in (
            (f"model.attention.{layer.attention}", spec.attention[layer.attention], said.attention[other.attention]),
            (f"model.ffn.{layer.ffn}", spec.ffn[layer.ffn], said.ffn[other.ffn]),
            ("norm", layer.norm or spec.norm, said.norm),
        ):
            _require_same(f"{place}: {path}", _plain(part), _plain(said_part), family)


def _plain(part: Any) -> Any:
    """A part of a spec as maps, where equal meanings look equal."""
    if not isinstance(part, schema.Strict):
        return part
    plain = part.model_dump()
    match part:
        case schema.MoE():
            plain["shared_experts"] = part.shared_width
            plain["shared_experts.gate"] = part.shared_experts is not None and part.shared_experts.gate
        case schema.GQA():
            plain["rope_head_dim"] = part.rotated
        case _:
            pass
    return plain


def _require_same(path: str, mine: Any, theirs: Any, family: str) -> None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        # `type` first: where kinds differ, their other keys have nothing to do with each other.
        for key in sorted(mine.keys() | theirs.keys(), key=lambda key: (key != "type", key)):
            _require_same(f"{path}.{key}", mine.get(key), theirs.get(key), family)
    elif mine != theirs:
        raise HFError(f"{path} is {mine!r}: the Hugging Face family {family} can only say {theirs!r} there")
