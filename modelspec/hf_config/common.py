"""What families say in the same words: sizes, grouped-query attention, which layer is of which kind."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import inf, nextafter
from typing import Any, TypeVar

from modelspec import schema
from modelspec.hf_config.keys import REQUIRED, HFError, Keys, said
from modelspec.hf_config.rope import NOTHING, read_rope, rope_keys, write_rope

MAX_WIDTH = 2**22
# A longer list of runs is no pattern that a person would write, and searching for it takes time.
MAX_PERIOD = 32

Part = TypeVar("Part", bound=schema.Strict)


def read_base(keys: Keys) -> dict[str, Any]:
    """A `model:` map with what every family says: sizes, norm, initial values."""
    keys.expect("hidden_act", "silu")
    keys.expect("attention_dropout", 0)
    return {
        "vocab_size": keys.take("vocab_size"),
        "hidden_size": keys.integer("hidden_size", least=1, most=MAX_WIDTH),
        "max_position": keys.take("max_position_embeddings"),
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "init": {"std": keys.take("initializer_range", 0.02)},
        "norm": {"type": "rmsnorm", "eps": keys.take("rms_norm_eps")},
    }


def write_base(model: schema.Model, family: str, architecture: str) -> dict[str, Any]:
    """The same as keys, and what the class is called in transformers."""
    return {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": model.norm.eps,
        "initializer_range": model.init.std,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        # A spec knows no token ids, and a class's defaults would end generation at an arbitrary token.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def num_layers(keys: Keys) -> int:
    """Layers of the main model."""
    return keys.integer("num_hidden_layers", least=1)


def read_gqa(
    keys: Keys,
    base: Mapping[str, Any],
    *,
    num_kv_heads: Any = REQUIRED,
    head_dim: int | None = None,
    bias: Iterable[str] = (),
    qk_norm: bool = False,
    theta: float = 1e4,
    partial: float | None = None,
    rope: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    """A grouped-query attention variant.

    `num_kv_heads`, `head_dim` (None: the hidden size divided by the heads), `theta`, `partial` (the rotated share of a
    head; None: all of it, whatever a config says) and `rope` are what the family takes where its config says nothing.
    """
    heads = keys.integer("num_attention_heads", least=1, most=MAX_WIDTH)
    width = keys.integer("head_dim", head_dim or base["hidden_size"] // heads, least=1, most=MAX_WIDTH)
    spoken = rope_keys(keys, rope)
    share = spoken.number("partial_rotary_factor", partial or 1.0)
    if partial is None and share != 1:
        raise spoken.wrong(
            "partial_rotary_factor", f"is {said(share)}; the family turns whole heads, so it can only be 1.0"
        )
    if not 0 < share <= 1:
        raise spoken.wrong("partial_rotary_factor", f"is {said(share)}; it must be above 0 and at most 1")
    rotated = int(width * share)
    return {
        "type": "gqa",
        "num_heads": heads,
        "num_kv_heads": keys.take("num_key_value_heads", num_kv_heads),
        "head_dim": width,
        "rope_head_dim": None if rotated == width else rotated,
        "bias": list(bias),
        "qk_norm": "per_head" if qk_norm else None,
        "rope": read_rope(spoken, base["max_position"], theta=theta, layout="half_split"),
    }


def write_gqa(gqa: schema.GQA) -> dict[str, Any]:
    """The keys of a grouped-query attention variant that every family has."""
    config = {
        "num_attention_heads": gqa.num_heads,
        "num_key_value_heads": gqa.num_kv_heads,
        "head_dim": gqa.head_dim,
    }
    if gqa.rope != "none":
        config |= write_rope(gqa.rope)
    return config


def partial_rotary_factor(gqa: schema.GQA) -> float:
    """The share of a head that is rotated: the one that readers, who cut it off to a whole number, read rightly."""
    share = gqa.rotated / gqa.head_dim
    return share if int(gqa.head_dim * share) == gqa.rotated else nextafter(share, inf)


def dense(keys: Keys, bias: Iterable[str] = ()) -> dict[str, Any]:
    """A dense network."""
    return {
        "type": "dense",
        "intermediate_size": keys.take("intermediate_size"),
        "activation": {"type": "swiglu"},
        "bias": list(bias),
    }


def first(model: schema.Model, kind: type[Part], family: str) -> Part:
    """The first layer's variant of a kind: where a family says one thing of all layers, it speaks for all.

    Raises HFError where no layer, nor the block of multi-token prediction, has that kind.
    """
    layers = [*model.expanded_layers(), *([model.mtp_layer()] if model.mtp else [])]
    for layer in layers:
        for part in (model.attention[layer.attention], model.ffn[layer.ffn]):
            if isinstance(part, kind):
                return part
    raise HFError(f"model.layers: no layer has a {kind.__name__}, and the Hugging Face family {family} needs one")


def has(model: schema.Model, kind: type[schema.Strict]) -> bool:
    """Whether a layer, or the block of multi-token prediction, has a feed-forward network of this kind."""
    layers = [*model.expanded_layers(), *([model.mtp_layer()] if model.mtp else [])]
    return any(isinstance(model.ffn[layer.ffn], kind) for layer in layers)


def require_whole_heads(model: schema.Model, num_heads: int, family: str) -> None:
    """Raises HFError where the family's class would refuse a hidden size that the heads do not divide."""
    if model.hidden_size % num_heads:
        raise HFError(
            f"model.hidden_size is {model.hidden_size}: the Hugging Face family {family} can only say multiples of "
            f"its {num_heads} heads there"
        )


WINDOW = {"full_attention": "full", "sliding_attention": "sliding"}


def read_windows(keys: Keys, gqa: dict[str, Any], types: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The attention variants of layers of which some see a window, and each layer's variant."""
    if "sliding_attention" not in types:
        keys.ignore("sliding_window")
        return {"gqa": gqa}, ["gqa"] * len(types)
    variants = {"full": gqa, "sliding": gqa | {"sliding_window": keys.take("sliding_window")}}
    names = [WINDOW[word] for word in types]
    return {name: variants[name] for name in variants if name in names}, names


def layer_types(model: schema.Model) -> list[str]:
    """Which layers see a window and which see all."""
    return [
        "sliding_attention" if getattr(model.attention[layer.attention], "sliding_window", None) else "full_attention"
        for layer in model.expanded_layers()
    ]


def window(model: schema.Model) -> int | None:
    """The first window that a layer has."""
    variants = [model.attention[layer.attention] for layer in model.expanded_layers()]
    return next((gqa.sliding_window for gqa in variants if isinstance(gqa, schema.GQA) and gqa.sliding_window), None)


def runs(attention: Sequence[str], ffn: Sequence[str]) -> list[dict[str, Any]]:
    """`model.layers` of layers given one by one: runs of equal ones, and patterns where a list of runs repeats."""
    layers = list(zip(attention, ffn, strict=True))
    result: list[dict[str, Any]] = []
    start = 0
    while start < len(layers):
        period, times = _repetition(layers, start)
        equal = _equal_runs(layers[start : start + period])
        if period == 1:
            result.append({"repeat": times} | equal[0] if times > 1 else equal[0])
        else:
            result.append({"repeat": times, "pattern": equal})
        start += period * times
    return result


def _repetition(layers: Sequence[tuple[str, str]], start: int) -> tuple[int, int]:
    """The period and count of the repetition from `start` on that covers most layers, of the shortest period."""
    best = (1, 1)
    for period in range(1, min(MAX_PERIOD, len(layers) - start) + 1):
        block, times = layers[start : start + period], 1
        while layers[start + period * times : start + period * (times + 1)] == block:
            times += 1
        if (period == 1 or times > 1) and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _equal_runs(layers: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for (attention, ffn), group in groupby(layers):
        count = len(list(group))
        run = {"attention": attention, "ffn": ffn}
        result.append({"repeat": count} | run if count > 1 else run)
    return result
