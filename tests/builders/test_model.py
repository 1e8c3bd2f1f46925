"""The model is the one of the paper: transformers' independent implementation gives the same logits and gradients."""

import random
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.builders import LossWeights, build
from modelspec.kernels.op import use
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]


def yarn(**over: Any) -> dict[str, Any]:
    """YaRN whose original length is far exceeded by the 80 tokens of these tests."""
    scaling = {"type": "yarn", "factor": 40, "original_max_position": 16, "beta_fast": 32, "beta_slow": 1}
    return {"scaling": scaling | {"mscale": 1.0, "mscale_all_dim": 1.0} | over}


def experts(num: int, per_token: int, groups: int | None, used: int = 1, **over: Any) -> dict[str, Any]:
    """A router over so many experts; groups None: all compete."""
    limit = None if groups is None else {"num": groups, "topk": used}
    return {"num_experts": num, "num_experts_per_tok": per_token, "router": {"selection": {"groups": limit}}} | over


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "odd-sizes": {},
    "queries-not-compressed": {"mla": {"q_lora_rank": None}},
    "one-head": {"mla": {"num_heads": 1}},
    "one-head-behind-an-odd-part": {"mla": {"num_heads": 1, "qk_nope_head_dim": 5}},
    "values-wider-than-keys": {"mla": {"v_head_dim": 16, "qk_nope_head_dim": 3}},
    "half-split-rope": {"mla": {"rope": {"layout": "half_split"}}},
    "theta": {"mla": {"rope": {"theta": 50.0}}},
    "yarn": {"mla": {"rope": yarn(), "qk_rope_head_dim": 16}},
    "yarn-mscale-of-v2-lite": {"mla": {"rope": yarn(mscale=0.707, mscale_all_dim=0.707), "qk_rope_head_dim": 8}},
    "yarn-unequal-mscales": {"mla": {"rope": yarn(mscale=1.2, mscale_all_dim=0.4), "qk_rope_head_dim": 8}},
    "yarn-without-mscale-all-dim": {"mla": {"rope": yarn(mscale_all_dim=0.0), "qk_rope_head_dim": 8}},
    "yarn-not-truncated": {"mla": {"rope": yarn(truncate=False, original_max_position=40), "qk_rope_head_dim": 16}},
    "yarn-equal-betas": {"mla": {"rope": yarn(beta_fast=1), "qk_rope_head_dim": 8}},
    "yarn-half-split-without-query-latent": {
        "mla": {"rope": yarn() | {"layout": "half_split"}, "qk_rope_head_dim": 8, "q_lora_rank": None}
    },
    "norm-eps": {"model": {"norm": {"eps": 1e-3}}},
    "no-groups": {"moe": experts(9, 2, None)},
    "experts-of-v3-in-small": {"moe": experts(32, 8, 8, 4)},
    "one-expert-per-token": {"moe": experts(6, 1, 3, 1)},
    "every-expert": {"moe": experts(6, 6, None)},
    "three-shared-experts": {"moe": {"shared_experts": {"num": 3}}},
    "no-renormalization": {"router": {"renormalize": False, "scale": 1.0}},
    "tied-embeddings": {"model": {"tie_embeddings": True}},
    "all-layers-routed": {"model": {"layers": [{"repeat": 2, "attention": "mla", "ffn": "moe"}]}},
    "positive-biases": {"bias": (2.0, 0.3)},
    "strong-negative-biases": {"bias": (-2.0, 1.0)},
}


def _random_configuration(seed: int) -> dict[str, Any]:
    pick = random.Random(seed)
    groups, per_group = pick.randint(2, 5), pick.randint(2, 4)
    used = pick.randint(1, groups)
    moe = experts(groups * per_group, pick.randint(1, used * per_group), groups, used)
    moe |= {"intermediate_size": pick.randint(1, 20), "shared_experts": {"num": pick.randint(1, 2)}}
    moe["router"] |= {"renormalize": pick.random() < 0.7, "scale": pick.uniform(0.5, 3.0)}
    scaling = yarn(factor=pick.uniform(1, 50), mscale=pick.uniform(0.1, 2), mscale_all_dim=pick.uniform(0.1, 2))
    rope = {"layout": pick.choice(["interleaved", "half_split"]), "theta": pick.uniform(10.0, 1e6)}
    mla = {
        "num_heads": pick.randint(1, 5),
        "q_lora_rank": pick.choice([None, pick.randint(1, 20)]),
        "kv_lora_rank": pick.randint(1, 20),
        "qk_nope_head_dim": pick.randint(1, 12),
        "qk_rope_head_dim": 2 * pick.randint(1, 8),
        "v_head_dim": pick.randint(1, 12),
        "rope": rope | (scaling if pick.random() < 0.6 else {}),
    }
    model = {"hidden_size": pick.randint(5, 40), "norm": {"eps": 10 ** pick.uniform(-8, -3)}}
    return {"mla": mla, "moe": moe, "model": model, "bias": (pick.uniform(-1, 1), 0.5)}


CONFIGURATIONS |= {f"random-{seed}": _random_configuration(seed) for seed in range(8)}


@pytest.mark.parametrize("form", ["fastest", "reference"])
@pytest.mark.parametrize("parts", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_logits_and_every_gradient_equal_those_of_transformers(
    parts: dict[str, Any], form: Literal["fastest", "reference"], tiny: Tiny, twins: Any
) -> None:
    bias = parts.get("bias", (-0.3, 0.3))
    pair = twins(tiny(**{key: value for key, value in parts.items() if key != "bias"}), bias)
    tokens, targets = torch.randint(0, 61, (2, 2, 80))
    targets[0, 5:9] = -100

    with use(form):
        logits = pair.ours(tokens).logits
        pair.ours(tokens, targets=targets).losses.lm.backward()
    their_logits = pair.theirs(tokens).logits
    F.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()

    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    found = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    assert_same_gradients(found, pair.their_gradients())


def assert_same_gradients(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
    """Every gradient within 1e-4 of the wanted one's norm."""
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        distance, size = (gradient - wanted[name]).norm(), wanted[name].norm()
        # Some gradients are zero but for rounding: a single renormalised expert has the weight 1 whatever its score.
        assert distance <= 1e-4 * size or max(gradient.norm(), size) < 1e-7, f"{name}: {distance} of {size}"


def test_an_ignored_target_adds_nothing_and_the_mean_is_over_the_others(tiny: Tiny) -> None:
    model = build(tiny())
    tokens, targets = torch.randint(0, 61, (2, 1, 12))
    losses = F.cross_entropy(model(tokens).logits[0], targets[0], reduction="none")
    targets[0, 7:] = -100
    torch.testing.assert_close(model(tokens, targets=targets).losses.lm, losses[:7].mean())


def test_without_any_valid_target_the_loss_is_zero_and_finite(tiny: Tiny) -> None:
    model = build(tiny())
    output = model(torch.randint(0, 61, (1, 5)), targets=torch.full((1, 5), -100), loss_weights=LossWeights(mtp=1.0))
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_loss_is_the_weighted_sum_of_its_parts(tiny: Tiny) -> None:
    model = build(tiny())
    tokens, targets = torch.randint(0, 61, (2, 2, 9))
    output = model(tokens, targets=targets, loss_weights=LossWeights(mtp=0.3, balance=0.01))
    parts = output.losses
    assert parts.balance > 0
    torch.testing.assert_close(output.loss, parts.lm + 0.3 * parts.mtp + parts.balance)
    unweighted = model(tokens, targets=targets)
    torch.testing.assert_close(unweighted.loss, parts.lm)
    torch.testing.assert_close(unweighted.losses.mtp, parts.mtp)


def test_logits_come_with_targets_only_if_asked_for(tiny: Tiny) -> None:
    model = build(tiny())
    tokens = torch.randint(0, 61, (1, 4))
    assert model(tokens, targets=tokens).logits is None
    assert model(tokens).loss is None
    asked = model(tokens, targets=tokens, return_logits=True).logits
    torch.testing.assert_close(asked, model(tokens).logits)


def test_a_token_sees_nothing_after_itself(tiny: Tiny) -> None:
    model = build(tiny())
    tokens = torch.randint(0, 61, (1, 70))
    changed = tokens.clone()
    changed[0, 40:] = (changed[0, 40:] + 1) % 61
    before, after = model(tokens).logits[0], model(changed).logits[0]
    torch.testing.assert_close(before[:40], after[:40])
    assert (before[40:] - after[40:]).abs().amax() > 1e-3


def test_expert_counts_are_whole_numbers_of_every_router(tiny: Tiny) -> None:
    model = build(tiny(model={"mtp": {"depth": 2}}))
    tokens = torch.randint(0, 61, (3, 11))
    trained = model(tokens, targets=tokens).expert_counts
    assert list(trained) == [f"{layer}.ffn.router" for layer in ("layers.1", "layers.2", "mtp.0.block", "mtp.1.block")]
    for counts in trained.values():
        assert counts.dtype == torch.int64
        assert counts.sum() == 3 * 11 * 4
    assert list(model(tokens).expert_counts) == ["layers.1.ffn.router", "layers.2.ffn.router"]


def test_float64_model_agrees_with_float32(tiny: Tiny) -> None:
    spec = tiny(mla={"rope": yarn(), "qk_rope_head_dim": 8})
    narrow, wide = build(spec), build(spec, dtype=torch.float64)
    tokens, targets = torch.randint(0, 61, (2, 2, 80))
    assert wide(tokens).logits.dtype == torch.float64
    torch.testing.assert_close(narrow(tokens).logits.double(), wide(tokens).logits, rtol=0, atol=1e-5)
    for model in (narrow, wide):
        model(tokens, targets=targets, loss_weights=LossWeights(mtp=0.3, balance=0.1)).loss.backward()
    wanted = {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}
    assert_same_gradients({name: p.grad for name, p in narrow.named_parameters()}, wanted)


def test_bfloat16_over_float32_weights_is_near_float32(tiny: Tiny) -> None:
    wide = build(tiny())
    mixed = build(tiny(precision={"compute": "bfloat16"}))
    tokens, targets = torch.randint(0, 61, (2, 2, 16))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    logits = mixed(tokens).logits
    assert logits.dtype == torch.float32
    error = (logits - wide(tokens).logits).norm() / logits.norm()
    assert 0 < error < 0.05
    mixed(tokens, targets=targets, loss_weights=LossWeights(mtp=0.3, balance=0.1)).loss.backward()
    assert {p.grad.dtype for p in mixed.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixed.parameters())


def test_tied_head_and_embedding_share_one_weight_and_its_gradient(tiny: Tiny) -> None:
    model = build(tiny(model={"tie_embeddings": True, "mtp": None}))
    assert "lm_head.weight" not in dict(model.named_parameters())
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens, targets=tokens).loss.backward()
    # As a head, the weight has a gradient in rows that the input never named.
    gradient = model.get_parameter("embed_tokens.weight").grad
    assert gradient is not None and gradient[1:].abs().sum() > 0


def test_without_rope_only_the_causal_mask_tells_positions_apart(tiny: Tiny) -> None:
    model = build(tiny(mla={"rope": "none"}))
    tokens = torch.randint(0, 61, (1, 8))
    swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    one_layer = build(tiny(mla={"rope": "none"}, model={"layers": [{"attention": "mla", "ffn": "dense"}], "mtp": None}))
    torch.testing.assert_close(one_layer(tokens).logits[0, 2:], one_layer(swapped).logits[0, 2:])
    rotated = build(tiny(model={"layers": [{"attention": "mla", "ffn": "dense"}], "mtp": None}))
    assert (rotated(tokens).logits[0, 2:] - rotated(swapped).logits[0, 2:]).abs().amax() > 1e-5
    assert model(tokens).logits.isfinite().all()


def test_layers_may_differ_in_attention_and_norm(tiny: Tiny) -> None:
    wide = tiny().model.attention["mla"].model_dump(exclude_none=True) | {"num_heads": 5}
    layers = [
        {"attention": "mla", "ffn": "dense"},
        {"attention": "wide", "ffn": "dense", "norm": {"type": "rmsnorm", "eps": 0.5}},
    ]
    spec = tiny(model={"attention": {"wide": wide}, "layers": layers, "mtp": None})
    model = build(spec)
    assert model.get_parameter("layers.1.attention.o_proj.weight").shape == (24, 25)
    tokens = torch.randint(0, 61, (1, 6))
    layers[1] = {"attention": "wide", "ffn": "dense"}
    same_norms = build(tiny(model={"attention": {"wide": wide}, "layers": layers, "mtp": None}))
    assert (model(tokens).logits - same_norms(tokens).logits).abs().amax() > 1e-3
