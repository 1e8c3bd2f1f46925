"""Rotary embedding in config.json: `rope_theta` and `rope_scaling` on the hub, `rope_parameters` in transformers 5.

In a config YaRN gives two things: a factor on cos and sin, and one on the softmax scale. The former stands there as
it is (`attention_factor`), or as two m that are both above 0, or else is g(1), with g(m) = 0.1 m ln(factor) + 1. The
latter is g(mscale_all_dim)^2 in latent attention and 1 in any other. A spec has one definition for every kind of
attention (`schema.Yarn`), so an m may have to be computed.
"""

from collections.abc import Mapping
from math import isclose, log
from types import MappingProxyType
from typing import Any, Literal

from modelspec import schema
from modelspec.hf_config.keys import HFError, Keys, said

Layout = Literal["interleaved", "half_split"]
NOTHING: Mapping[str, Any] = MappingProxyType({})


def rope_keys(keys: Keys, otherwise: Mapping[str, Any] = NOTHING) -> Keys:
    """What a config says of rope, in one map whichever way it is spelt; `otherwise` is what saying nothing means."""
    if not {"rope_scaling", "rope_parameters"} & keys.rest.keys():
        scaling, parameters = {}, dict(otherwise)
    else:
        scaling, parameters = keys.take("rope_scaling", {}), keys.take("rope_parameters", {})
    if not isinstance(scaling, dict) or not isinstance(parameters, dict):
        raise HFError("rope_scaling and rope_parameters must be objects")
    if scaling and parameters:
        raise HFError("rope_scaling and rope_parameters say the same thing; only one may stand")
    outside = {key: keys.take(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    return Keys(outside | parameters | scaling, "rope_parameters." if parameters else "rope_scaling.")


def read_rope(rope: Keys, max_position: Any, *, theta: float, layout: Layout, latent: bool = False) -> dict[str, Any]:
    """The `rope` of an attention variant. `theta` is the family's own, `latent` true for latent attention."""
    old, new = rope.take("type", "default"), rope.take("rope_type", None)
    result: dict[str, Any] = {"theta": rope.take("rope_theta", theta), "layout": layout}
    rope.expect("partial_rotary_factor", 1.0)
    match new or old:
        case "default":
            pass
        case "yarn":
            result["scaling"] = _read_yarn(rope, max_position, latent)
        case "llama3":
            result["scaling"] = {
                "type": "llama3",
                "factor": rope.take("factor"),
                "original_max_position": rope.take("original_max_position_embeddings", max_position),
                "low_freq_factor": rope.take("low_freq_factor"),
                "high_freq_factor": rope.take("high_freq_factor"),
            }
        case other:
            raise rope.wrong("rope_type", f"{said(other)} is not supported; supported: default, llama3, yarn")
    rope.finish()
    return result


def _read_yarn(rope: Keys, max_position: Any, latent: bool) -> dict[str, Any]:
    factor = rope.number("factor")
    if factor < 1:
        raise rope.wrong("factor", f"is {said(factor)}; it must be 1 or more")
    mscale, all_dim = rope.number("mscale", None), rope.number("mscale_all_dim", 0.0)
    cos_sin = rope.number("attention_factor", None)
    if cos_sin is None:
        cos_sin = _g(factor, mscale) / _g(factor, all_dim) if mscale and all_dim else _g(factor, 1.0)
    softmax = all_dim if latent else 0.0
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position": rope.take("original_max_position_embeddings", max_position),
        "beta_fast": rope.take("beta_fast", 32.0),
        "beta_slow": rope.take("beta_slow", 1.0),
        "mscale": _solve_mscale(rope, factor, cos_sin, softmax, (mscale, 1.0)),
        "mscale_all_dim": softmax,
        "truncate": rope.flag("truncate", True),
    }


def _g(factor: float, m: float) -> float:
    return 0.1 * m * log(factor) + 1.0


def _solve_mscale(rope: Keys, factor: float, cos_sin: float, all_dim: float, likely: tuple[Any, ...]) -> float:
    """The m with g(m) / g(all_dim) = cos_sin: a likely one if it is one, so that numbers stay as they were written."""
    for m in likely:
        if m is not None and isclose(cos_sin, _g(factor, m) / _g(factor, all_dim), rel_tol=1e-12):
            return float(m)
    if factor == 1:
        raise rope.wrong("attention_factor", f"is {said(cos_sin)}; with a factor of 1 only 1.0 is supported")
    return (cos_sin * _g(factor, all_dim) - 1.0) / (0.1 * log(factor))


def write_rope(rope: schema.Rope, *, latent: bool = False) -> dict[str, Any]:
    """The keys of a rope, as the hub spells them."""
    match rope.scaling:
        case None:
            scaling = None
        case schema.Yarn() as yarn:
            scaling = _write_yarn(yarn, latent)
        case schema.Llama3() as llama3:
            scaling = {
                "rope_type": "llama3",
                "factor": llama3.factor,
                "original_max_position_embeddings": llama3.original_max_position,
                "low_freq_factor": llama3.low_freq_factor,
                "high_freq_factor": llama3.high_freq_factor,
            }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _write_yarn(yarn: schema.Yarn, latent: bool) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    all_dim = yarn.mscale_all_dim if latent else 0.0
    if (yarn.mscale, all_dim) != (1.0, 0.0):
        scaling |= {"mscale": yarn.mscale, "mscale_all_dim": all_dim}
        if not (yarn.mscale and all_dim):
            # Readers take an m of 0 for one that is absent.
            scaling["attention_factor"] = _g(yarn.factor, yarn.mscale) / _g(yarn.factor, all_dim)
    if not yarn.truncate:
        scaling["truncate"] = False
    return scaling
