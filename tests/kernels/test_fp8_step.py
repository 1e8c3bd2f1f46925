"""A training step by the kernels, in Triton's interpreter, is that by the references: GPUs compute what is emulated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.builders import build
from modelspec.kernels.op import use
from modelspec.schema import ModelSpec

FP8: dict[str, Any] = {
    "format": "e4m3", "activation_block": [1, 128], "weight_block": [128, 128], "scales": "float32",
    "gemms": ["forward", "dgrad", "wgrad"], "emulate": True,
}  # fmt: skip
OPTIONS = {"attention_output": "e5m6", "swiglu_input": "e4m3", "dispatch": True}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "with the paper's options"])
def test_loss_and_gradients_agree_to_the_rounding_of_bf16(
    options: dict[str, Any], tiny: Callable[..., ModelSpec]
) -> None:
    layers = [{"attention": "mla", "ffn": "moe"}]
    spec = tiny(model={"layers": layers, "mtp": None}, precision={"compute": "bfloat16", "fp8": FP8 | options})
    batch = torch.randint(0, 61, (3, 15))

    def of(form: Any) -> dict[str, Tensor]:
        model = build(spec)
        with use(form):
            loss = model(batch[:, :-1], targets=batch[:, 1:]).loss
            assert loss is not None
            loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return found | {"loss": loss.detach()}

    ours, theirs = of("triton"), of("reference")
    assert len(ours) == len(list(build(spec).parameters())) + 1
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm() / expected.norm()) < 2**-8, name
