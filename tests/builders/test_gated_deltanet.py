"""Gated DeltaNet against transformers' Qwen3NextGatedDeltaNet, and what a layer of it must be besides."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from modelspec import schema
from modelspec.builders import build
from modelspec.builders.attention.gated_deltanet import CausalConv, GatedDeltaNet
from modelspec.builders.hf import from_pretrained, save_pretrained
from modelspec.builders.optim import build_optimizer
from modelspec.kernels.gated_delta import CHUNK
from modelspec.validate import load

TINY = str(Path(__file__).parents[1] / "specs" / "qwen3-next-80b-a3b-tiny.yaml")
HIDDEN, EPS = 24, 1e-5
OUR_NAMES = {
    "in_proj_qkvz.weight": "qkvz_proj.weight",
    "in_proj_ba.weight": "ba_proj.weight",
    "conv1d.weight": "conv.weight",
}
SIZES = {
    "values-with-more-heads": {"num_qk_heads": 2, "num_v_heads": 6, "qk_head_dim": 8, "v_head_dim": 5},
    "as-many-heads-of-both": {"num_qk_heads": 3, "num_v_heads": 3, "qk_head_dim": 4, "v_head_dim": 7},
}


def variant(conv_kernel: int = 4, **sizes: int) -> schema.GatedDeltaNet:
    return schema.GatedDeltaNet(type="gated_deltanet", conv_kernel=conv_kernel, **sizes)


def pair(spec: schema.GatedDeltaNet) -> tuple[GatedDeltaNet, Qwen3NextGatedDeltaNet]:
    """Our module and transformers' with the same random weights, none of them at its initial value."""
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=HIDDEN,
            rms_norm_eps=EPS,
            num_hidden_layers=1,
            linear_num_key_heads=spec.num_qk_heads,
            linear_num_value_heads=spec.num_v_heads,
            linear_key_head_dim=spec.qk_head_dim,
            linear_value_head_dim=spec.v_head_dim,
            linear_conv_kernel_dim=spec.conv_kernel,
        ),
        layer_idx=0,
    )
    ours = GatedDeltaNet(spec, HIDDEN, EPS)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.1, 0.3)
        ours.load_state_dict({OUR_NAMES.get(name, name): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def gradients(output: Tensor, x: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    """Of a fixed random function of the output, by our names; x's gradient under "x"."""
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    names = ["x", *(OUR_NAMES.get(name, name) for name, _ in module.named_parameters())]
    found = torch.autograd.grad((output * cotangent).sum(), [x, *module.parameters()])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("length", [1, 3, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_outputs_and_gradients_are_those_of_transformers(sizes: dict[str, int], length: int) -> None:
    ours, theirs = pair(variant(**sizes))
    x = torch.randn(2, length, HIDDEN, requires_grad=True)
    found, expected = ours(x, None), theirs(x)
    assert (found - expected).abs().amax() < 1e-5 * expected.abs().amax()
    wanted = gradients(expected, x, theirs)
    for name, gradient in gradients(found, x, ours).items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "conv.weight", "norm.weight"])
def test_every_small_parameter_matters(name: str) -> None:
    ours, theirs = pair(variant(**SIZES["values-with-more-heads"]))
    x = torch.randn(1, 9, HIDDEN)
    with torch.no_grad():
        ours.get_parameter(name).add_(0.1)
        assert (ours(x, None) - theirs(x)).abs().amax() > 1e-3


def test_the_convolution_mixes_a_token_with_those_before_it_alone() -> None:
    conv = CausalConv(channels=3, kernel=2)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(1, 5, 3)
    weight = conv.weight[:, 0]
    expected = torch.stack([weight[:, 1] * x[0, t] + (weight[:, 0] * x[0, t - 1] if t else 0.0) for t in range(5)])
    torch.testing.assert_close(conv(x)[0], expected)


def test_no_token_sees_a_later_one() -> None:
    ours, _ = pair(variant(**SIZES["values-with-more-heads"]))
    x = torch.randn(1, CHUNK + 9, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, None)[:, : CHUNK - 3], ours(x[:, : CHUNK - 3], None))


def test_bfloat16_stays_near_float32() -> None:
    ours, _ = pair(variant(**SIZES["values-with-more-heads"]))
    x = torch.randn(2, 40, HIDDEN)
    with torch.no_grad():
        exact, rounded = ours(x, None), ours(x.bfloat16(), None)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_decay_of_weights_spares_rates_biases_and_norms_but_not_the_convolution() -> None:
    model = build(load(TINY))
    spec = schema.AdamW(type="adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    groups = build_optimizer(model, spec, schema.Precision()).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    layer = model.get_submodule("layers.0.attention")
    found = {name for name, p in layer.named_parameters() if id(p) in decayed}
    assert found == {"qkvz_proj.weight", "ba_proj.weight", "conv.weight", "out_proj.weight"}


def test_the_files_own_multi_token_prediction_is_left_out_with_a_warning(tmp_path: Path) -> None:
    model = build(load(TINY))
    save_pretrained(model, tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(file) | {"mtp.fc.weight": torch.zeros(2, 4)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"mtp\.fc\.weight is left out"):
        again = from_pretrained(tmp_path / "hub")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
