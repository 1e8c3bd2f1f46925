"""Experts in DeepSeek's words, which GLM took over: a dense prefix, shared experts, a router with or without groups."""

from collections.abc import Callable, Sequence
from typing import Any

from modelspec import schema
from modelspec.hf_config.common import dense, first, has, runs
from modelspec.hf_config.keys import HFError, Keys

SIZES = ("intermediate_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
ROUTER = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_method")


def prefix(keys: Keys, layers: int, otherwise: int) -> list[str]:
    """Each layer's kind: the first so many are dense, `otherwise` where the config says nothing."""
    count = min(keys.integer("first_k_dense_replace", otherwise), layers)
    return ["dense"] * count + ["moe"] * (layers - count)


def read_layers(
    keys: Keys,
    attention: str,
    kinds: Sequence[str],
    *,
    shared: int,
    router: Callable[[Keys], dict[str, Any]],
    mtp: bool,
) -> dict[str, Any]:
    """`ffn`, `layers` and `mtp` of a model. `shared` is how many shared experts the family has of its own accord.

    A config without `num_nextn_predict_layers` has no module of multi-token prediction: none of the files that leave
    the key out hold one.
    """
    depth = keys.integer("num_nextn_predict_layers", 0) if mtp else 0
    # Sizes of a kind that no layer has are not asked for, and do no harm.
    ffn = {}
    if "dense" in kinds:
        ffn["dense"] = dense(keys)
    if "moe" in kinds or depth:
        count = keys.integer("n_shared_experts", shared)
        ffn["moe"] = {
            "type": "moe",
            "num_experts": keys.take("n_routed_experts"),
            "num_experts_per_tok": keys.take("num_experts_per_tok"),
            "intermediate_size": keys.take("moe_intermediate_size"),
            "activation": {"type": "swiglu"},
            "shared_experts": {"num": count} if count else None,
            "router": router(keys),
        }
    keys.ignore(*SIZES, *ROUTER)
    model: dict[str, Any] = {"ffn": ffn, "layers": runs([attention] * len(kinds), kinds)}
    if depth:
        block = {"attention": attention, "ffn": "moe"}
        model["mtp"] = {"depth": depth} | ({} if kinds[-1] == "moe" else {"layer": block})
    return model


def read_sigmoid_router(keys: Keys, groups: tuple[int, int] = (1, 1), scale: float = 1.0) -> dict[str, Any]:
    """The router of DeepSeek-V3; `groups` (how many, how many of them a token uses) and `scale` are a family's own."""
    keys.expect("scoring_func", "sigmoid")
    keys.expect("topk_method", "noaux_tc")
    number, topk = keys.take("n_group", groups[0]), keys.take("topk_group", groups[1])
    return {
        "score": "sigmoid",
        "selection": {
            "type": "topk",
            "bias": True,
            "groups": {"num": number, "topk": topk, "score": "top2_sum"} if number != 1 else None,
        },
        "renormalize": keys.take("norm_topk_prob", True),
        "scale": keys.take("routed_scaling_factor", scale),
    }


def write_layers(model: schema.Model, family: str) -> dict[str, Any]:
    """The keys of layers and experts, without those of the router's kind."""
    ffns = [model.ffn[layer.ffn] for layer in model.expanded_layers()]
    config: dict[str, Any] = {
        "first_k_dense_replace": next((i for i, ffn in enumerate(ffns) if isinstance(ffn, schema.MoE)), len(ffns)),
    }
    if has(model, schema.Dense):
        config["intermediate_size"] = first(model, schema.Dense, family).intermediate_size
    if has(model, schema.MoE):
        moe = first(model, schema.MoE, family)
        config |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "moe_intermediate_size": moe.intermediate_size,
            "n_shared_experts": moe.shared_width // moe.intermediate_size,
            "n_group": moe.router.selection.groups.num if moe.router.selection.groups else 1,
            "topk_group": moe.router.selection.groups.topk if moe.router.selection.groups else 1,
            "norm_topk_prob": moe.router.renormalize,
            "routed_scaling_factor": moe.router.scale,
        }
    return config


def write_mtp(model: schema.Model, family: str) -> dict[str, Any]:
    """How many modules of multi-token prediction there are; their block has experts."""
    if model.mtp and not isinstance(model.ffn[model.mtp_layer().ffn], schema.MoE):
        raise HFError(f"model.mtp.layer.ffn: the Hugging Face family {family} has mixtures of experts only there")
    return {"num_nextn_predict_layers": model.mtp.depth if model.mtp else 0}
