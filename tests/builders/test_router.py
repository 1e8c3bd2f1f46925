"""The router against the equations, token by token and expert by expert, and against the known ways to get it wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.builders.ffn.router import Router
from modelspec.schema import ModelSpec, MoE

Tiny = Callable[..., ModelSpec]


def paper_weights(x: Tensor, gate: Tensor, bias: Tensor | None, moe: MoE, wrong: str = "") -> Tensor:
    """Equations 12 to 16 of arXiv 2412.19437: the weight of every expert for every token, 0 where it is not chosen."""
    return torch.stack([_weights_of_token(token, gate, bias, moe, wrong) for token in x])


def _weights_of_token(token: Tensor, gate: Tensor, bias: Tensor | None, moe: MoE, wrong: str) -> Tensor:
    router, groups = moe.router, moe.router.selection.groups
    logits = torch.stack([(row * token).sum() for row in gate])
    affinities = list(logits.sigmoid() if router.score == "sigmoid" else logits.exp() / logits.exp().sum())
    scores = [s.item() + (bias[e].item() if bias is not None else 0.0) for e, s in enumerate(affinities)]
    if groups:
        size = len(scores) // groups.num
        members = [range(g * size, (g + 1) * size) for g in range(groups.num)]
        best = 2 if groups.score == "top2_sum" and wrong != "groups-scored-by-best-expert" else 1
        value = [sum(sorted((scores[e] for e in group), reverse=True)[:best]) for group in members]
        kept = sorted(range(groups.num), key=lambda g: value[g], reverse=True)[: groups.topk]
        outside = 0.0 if wrong == "groups-masked-with-zero" else float("-inf")
        scores = [score if e // size in kept else outside for e, score in enumerate(scores)]
    chosen = sorted(range(len(scores)), key=lambda e: scores[e], reverse=True)[: moe.num_experts_per_tok]
    if wrong == "weights-with-the-bias" and bias is not None:
        affinities = [s + b for s, b in zip(affinities, bias, strict=True)]
    total = sum(affinities[e] for e in chosen) if router.renormalize and wrong != "not-renormalized" else 1.0
    scale = 1.0 if wrong == "not-scaled" else router.scale
    zero = logits.new_zeros(())
    return torch.stack([scale * affinities[e] / total if e in chosen else zero for e in range(len(scores))])


def routed(router: Router, x: Tensor, experts: int) -> Tensor:
    """Our router's answer in the same form."""
    choice = router(x)
    return torch.zeros(len(x), experts, dtype=choice.weights.dtype).scatter(-1, choice.experts, choice.weights)


def make(moe: MoE, dtype: torch.dtype = torch.float64) -> Router:
    """A router with random weights and mostly negative biases."""
    router = Router(moe, 24, dtype).to(dtype)
    with torch.no_grad():
        router.weight.normal_()
        if router.selection_bias is not None:
            router.selection_bias.normal_(-1.0, 0.5)
    return router


V2 = {"score": "softmax", "selection": {"bias": False, "groups": {"score": "max"}}, "renormalize": False, "scale": 16.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"router": V2},
    "v2-lite": {"router": V2 | {"selection": {"bias": False, "groups": None}, "scale": 1.0}},
    "no-groups": {"router": {"selection": {"groups": None}}},
    "bias-without-renormalization": {"router": {"renormalize": False}},
    "two-experts-of-one-group": {"moe": {"num_experts_per_tok": 2}, "router": {"selection": {"groups": {"topk": 1}}}},
    "every-expert": {"moe": {"num_experts_per_tok": 10}, "router": {"selection": {"groups": {"topk": 5}}}},
}


@pytest.mark.parametrize("parts", ROUTERS.values(), ids=ROUTERS.keys())
def test_choice_weights_and_gradients_follow_the_equations(parts: dict[str, Any], tiny: Tiny) -> None:
    moe = tiny(**parts).model.ffn["moe"]
    assert isinstance(moe, MoE)
    router, cotangent = make(moe), torch.randn(40, 10)
    x = torch.randn(40, 24, dtype=torch.float64, requires_grad=True)
    ours = routed(router, x, 10)
    paper = paper_weights(x, router.weight, router.selection_bias, moe)
    assert ((ours > 0) == (paper > 0)).all()
    torch.testing.assert_close(ours, paper)
    for mine, wanted in zip(
        torch.autograd.grad((ours * cotangent).sum(), (x, router.weight)),
        torch.autograd.grad((paper * cotangent).sum(), (x, router.weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize(
    "wrong",
    [
        "groups-masked-with-zero",
        "weights-with-the-bias",
        "not-renormalized",
        "not-scaled",
        "groups-scored-by-best-expert",
    ],
)
def test_known_mistakes_would_be_seen(wrong: str, tiny: Tiny) -> None:
    moe = tiny().model.ffn["moe"]
    assert isinstance(moe, MoE)
    router, x = make(moe), torch.randn(40, 24, dtype=torch.float64)
    mistaken = paper_weights(x, router.weight, router.selection_bias, moe, wrong)
    assert (routed(router, x, 10) - mistaken).abs().amax() > 1e-2


def test_scores_run_in_float32_whatever_the_input(tiny: Tiny) -> None:
    moe = tiny().model.ffn["moe"]
    assert isinstance(moe, MoE)
    router = make(moe, torch.float32)
    choice = router(torch.randn(5, 24).bfloat16())
    assert choice.weights.dtype == choice.affinities.dtype == torch.float32


def test_choice_carries_no_gradient_to_unchosen_experts_without_renormalization(tiny: Tiny) -> None:
    moe = tiny(router={"renormalize": False}).model.ffn["moe"]
    assert isinstance(moe, MoE)
    router = make(moe)
    choice = router(torch.randn(1, 24, dtype=torch.float64))
    choice.weights.sum().backward()
    assert router.weight.grad is not None
    touched = router.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert touched == sorted(choice.experts[0].tolist())
