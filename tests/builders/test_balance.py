"""Balance of expert load: the loss within a sequence and the bias update, against plain loops over the equations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.builders import LossWeights, build
from modelspec.builders.balance import update_selection_biases
from modelspec.builders.ffn.moe import sequence_balance_loss
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]


def paper_balance(affinities: Tensor, k: int) -> Tensor:
    """Equations 17 to 20 of arXiv 2412.19437 without alpha: affinities [batch, sequence, experts], mean over batch."""
    total = affinities.new_zeros(())
    for sequence in affinities:
        length, experts = sequence.shape
        chosen = [0] * experts
        mean_share = [affinities.new_zeros(())] * experts
        for scores in sequence:
            for expert in sorted(range(experts), key=lambda e: scores[e].item(), reverse=True)[:k]:
                chosen[expert] += 1
            whole = sum(scores)
            mean_share = [share + score / whole / length for share, score in zip(mean_share, scores, strict=True)]
        for count, share in zip(chosen, mean_share, strict=True):
            total = total + experts / (k * length) * count * share
    return total / len(affinities)


@pytest.mark.parametrize(("batch", "length", "experts", "k"), [(1, 1, 4, 1), (3, 7, 10, 4), (2, 5, 6, 6)])
def test_loss_and_gradient_follow_the_equations(batch: int, length: int, experts: int, k: int) -> None:
    affinities = torch.rand(batch, length, experts, requires_grad=True)
    ours, paper = sequence_balance_loss(affinities, k), paper_balance(affinities, k)
    torch.testing.assert_close(ours, paper)
    torch.testing.assert_close(*(torch.autograd.grad(loss, affinities)[0] for loss in (ours, paper)))


def test_even_load_costs_one() -> None:
    torch.testing.assert_close(sequence_balance_loss(torch.eye(4).unsqueeze(0) + 0.25, 1), torch.tensor(1.0))


def test_each_sequence_is_balanced_by_itself() -> None:
    # Two sequences, each on one expert: even over the batch, and as uneven as can be within each.
    affinities = torch.tensor([[[1.0, 0.01]] * 3, [[0.01, 1.0]] * 3])
    assert sequence_balance_loss(affinities, 1) > 1.9


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_model_adds_it_for_every_router_from_affinities_without_bias(depth: int, tiny: Tiny) -> None:
    model = build(tiny(model={"mtp": {"depth": depth} if depth else None}))
    affinities: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("router"):
            module.get_buffer("selection_bias").normal_(0, 3)
            module.register_forward_hook(
                lambda module, inputs, _, name=name: affinities.update({name: inputs[0] @ module.weight.T})
            )
    tokens = torch.randint(0, 61, (3, 6))
    balance = model(tokens, targets=tokens, loss_weights=LossWeights(balance=0.25)).losses.balance
    assert len(affinities) == 2 + depth
    each = [paper_balance(logits.sigmoid().unflatten(0, (3, 6)), 4) for logits in affinities.values()]
    expected = torch.stack(each).sum()
    torch.testing.assert_close(balance, 0.25 * expected)
    gates = [model.get_parameter(f"{name}.weight") for name in affinities]
    for ours, paper in zip(
        torch.autograd.grad(balance, gates, retain_graph=True),
        torch.autograd.grad(0.25 * expected, gates),
        strict=True,
    ):
        torch.testing.assert_close(ours, paper, rtol=1e-4, atol=1e-7)


def test_bias_rises_below_the_mean_falls_above_and_rests_on_it(tiny: Tiny) -> None:
    model = build(tiny())
    loads = {
        "layers.1.ffn.router": [0, 1, 2, 3, 4, 5, 6, 7, 8, 4],
        "layers.2.ffn.router": [7] * 10,
        "mtp.0.block.ffn.router": [100, *[0] * 9],
    }
    before = {name: torch.randn(10) for name in loads}
    for name, values in before.items():
        model.get_buffer(f"{name}.selection_bias").copy_(values)
    update_selection_biases(model, {name: torch.tensor(load) for name, load in loads.items()}, 0.001)
    for name, load in loads.items():
        mean = sum(load) / len(load)
        signs = torch.tensor([(count < mean) - (count > mean) for count in load])
        torch.testing.assert_close(
            model.get_buffer(f"{name}.selection_bias"), before[name] + 0.001 * signs, rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("offset", [0, 1, -1])
def test_counts_beyond_float32_are_compared_exactly(offset: int, tiny: Tiny) -> None:
    model = build(tiny())
    load = torch.full((10,), 2**40)
    load[0] += offset
    update_selection_biases(model, {"layers.1.ffn.router": load}, 0.5)
    first, *others = model.get_buffer("layers.1.ffn.router.selection_bias").tolist()
    assert first == -0.5 * offset
    assert others == [0.5 * offset] * 9


def test_small_steps_are_kept_on_large_biases_of_a_bfloat16_model(tiny: Tiny) -> None:
    model = build(tiny(), dtype=torch.bfloat16)
    bias = model.get_buffer("layers.1.ffn.router.selection_bias")
    bias.fill_(2.0)
    update_selection_biases(model, {"layers.1.ffn.router": torch.tensor([0] * 9 + [10])}, 0.001)
    torch.testing.assert_close(bias, torch.tensor([2.001] * 9 + [1.999]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["speed-zero", "router-without-bias"])
def test_nothing_moves(case: str, tiny: Tiny) -> None:
    parts: dict[str, Any] = {"router": {"selection": {"bias": False}}} if case == "router-without-bias" else {}
    model = build(tiny(**parts))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    speed = 0.0 if case == "speed-zero" else 1.0
    update_selection_biases(model, {"layers.1.ffn.router": torch.arange(10)}, speed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
