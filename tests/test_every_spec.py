"""The hinge: for every shipped spec, the tensors that the schema states are the tensors that the builder makes."""

from pathlib import Path

import pytest
import torch

from modelspec.builders import build
from modelspec.schema import ModelSpec
from modelspec.schema.base import Tensors
from modelspec.validate import load

SPECS = sorted(path.stem for path in (Path(__file__).parents[1] / "specs").glob("*.yaml"))


@pytest.fixture(scope="module", params=SPECS)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    """A shipped spec."""
    return load(f"modelspec:{request.param}")


def test_the_table_of_tensors_is_the_model_at_full_size(spec: ModelSpec) -> None:
    model = build(spec, device="meta")
    parameters = {name: ("parameter", tuple(p.shape)) for name, p in model.named_parameters()}
    persistent = model.state_dict().keys() - parameters.keys()
    buffers = {name: ("buffer", tuple(model.get_buffer(name).shape)) for name in persistent}
    table = spec.tensors()
    assert {name: (tensor.kind, tensor.shape) for name, tensor in table.items()} == parameters | buffers
    for name, tensor in table.items():
        if tensor.dtype is not None:
            assert str(model.state_dict()[name].dtype) == f"torch.{tensor.dtype}", name


def test_no_two_names_are_one_tensor(spec: ModelSpec) -> None:
    model = build(spec, device="meta")
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert len({id(tensor) for _, tensor in named}) == len(named)


def total(tensors: Tensors) -> int:
    """Elements of a table."""
    return sum(tensor.numel for tensor in tensors.values())


def test_v3_has_the_published_counts() -> None:
    model = load("modelspec:deepseek-v3").model
    main, mtp = model.main_tensors(), model.mtp_tensors()
    assert total(main) == 671_026_419_200
    assert sum(tensor.active for tensor in main.values()) == 37_552_297_472
    assert total(mtp) == 11_610_068_224
    biases = {name: tensor for name, tensor in main.items() if tensor.kind == "buffer"}
    assert total(biases) == 14_848
    assert all(name.endswith("selection_bias") and tensor.dtype == "float32" for name, tensor in biases.items())


def test_nano_has_every_mechanism_of_v3() -> None:
    def kinds(spec: ModelSpec) -> set[str]:
        return {name.split(".", 2)[-1] for name in spec.tensors() if name.startswith(("layers.", "mtp."))}

    nano, v3 = load("modelspec:deepseek-v3-nano"), load("modelspec:deepseek-v3")
    assert kinds(nano) == kinds(v3)
    assert nano.model.num_layers >= 4
    assert total(nano.tensors()) < 20e6


def test_nano_computes() -> None:
    spec = load("modelspec:deepseek-v3-nano")
    model = build(spec)
    tokens = torch.randint(0, spec.model.vocab_size, (1, 16))
    output = model(tokens, targets=tokens)
    assert output.loss.isfinite()
    assert output.logits is None
