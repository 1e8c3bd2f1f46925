"""Multi-token prediction against the report's equations 21 to 25, on transformers' own layers.

The model rolls tokens and masks the tail. Here each depth is computed on the positions that it has, and no others.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from modelspec.builders import LossWeights
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]


def modules_of(pair: Any, depth: int) -> list[Any]:
    """transformers' modules with the weights of ours."""
    config = pair.theirs.config
    modules = []
    for index in range(depth):
        module = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, config.num_hidden_layers).eval()
        module.load_state_dict(
            {name: pair.ours.state_dict()[pair.our_mtp_name(index, name)] for name in module.state_dict()}
        )
        modules.append(module)
    return modules


def paper_loss(pair: Any, modules: list[Any], tokens: Tensor, targets: Tensor, wrong: str = "") -> Tensor:
    """The mean over depths of the mean cross-entropy, with the trunk and the head of transformers' model."""
    trunk = pair.theirs.model
    hidden = trunk(tokens).last_hidden_state if wrong != "before-final-norm" else before_norm(trunk, tokens)
    losses = []
    for depth, module in enumerate(modules, start=1):
        length = tokens.shape[1] - depth
        hidden = hidden[:, :length]
        ahead = trunk.embed_tokens(tokens[:, depth:] if wrong != "one-token-early" else tokens[:, depth - 1 : -1])
        parts = [module.enorm(ahead), module.hnorm(hidden)]
        joined = module.eh_proj(torch.cat(parts[::-1] if wrong == "hidden-first" else parts, dim=-1))
        positions = trunk.rotary_emb(joined, torch.arange(length)[None])
        mask = torch.full((length, length), float("-inf")).triu(1).expand(len(tokens), 1, -1, -1)
        hidden = module.post_norm(module.mtp_block(joined, position_embeddings=positions, attention_mask=mask))
        logits = pair.theirs.lm_head(hidden)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets[:, depth:].flatten()))
    return torch.stack(losses).mean()


def before_norm(trunk: nn.Module, tokens: Tensor) -> Tensor:
    """The last layer's output without the final norm."""
    caught: list[Tensor] = []
    handle = trunk.get_submodule("norm").register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    trunk(tokens)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
@pytest.mark.parametrize("depth", [1, 2])
def test_loss_and_every_gradient_follow_the_equations(depth: int, layout: str, tiny: Tiny, twins: Any) -> None:
    spec = tiny(model={"mtp": {"depth": depth}}, mla={"rope": {"layout": layout}})
    pair = twins(spec, mtp=True)
    modules = modules_of(pair, depth)
    tokens, targets = torch.randint(0, 61, (2, 2, 20))
    targets[1, 3:6] = -100

    weights = LossWeights(mtp=0.3)
    output = pair.ours(tokens, targets=targets, loss_weights=weights)
    mtp = paper_loss(pair, modules, tokens, targets)
    lm = F.cross_entropy(pair.theirs(tokens).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.losses.mtp, mtp)
    torch.testing.assert_close(output.loss, lm + 0.3 * mtp)

    output.loss.backward()
    (lm + 0.3 * mtp).backward()
    wanted = pair.their_gradients()
    for index, module in enumerate(modules):
        wanted |= {pair.our_mtp_name(index, name): p.grad for name, p in module.named_parameters()}
    found = {name: p.grad for name, p in pair.ours.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("wrong", ["hidden-first", "before-final-norm", "one-token-early"])
def test_known_mistakes_would_be_seen(wrong: str, tiny: Tiny, twins: Any) -> None:
    pair = twins(tiny(), mtp=True)
    tokens, targets = torch.randint(0, 61, (2, 2, 20))
    ours = pair.ours(tokens, targets=targets).losses.mtp
    mistaken = paper_loss(pair, modules_of(pair, 1), tokens, targets, wrong)
    assert (ours - mistaken).abs() > 1e-4


@pytest.mark.parametrize("length", [1, 2, 3])
def test_windows_shorter_than_the_depth_predict_nothing_there(length: int, tiny: Tiny, twins: Any) -> None:
    pair = twins(tiny(model={"mtp": {"depth": 2}}), mtp=True)
    tokens, targets = torch.randint(0, 61, (2, 1, length))
    loss = pair.ours(tokens, targets=targets).losses.mtp
    assert loss.isfinite()
    assert (loss == 0) == (length == 1)


def test_last_targets_of_a_window_do_not_wrap_to_its_start(tiny: Tiny, twins: Any) -> None:
    pair = twins(tiny(), mtp=True)
    tokens, targets = torch.randint(0, 61, (2, 1, 10))
    changed = targets.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 61
    first, second = (pair.ours(tokens, targets=t).losses.mtp for t in (targets, changed))
    assert torch.equal(first, second)
