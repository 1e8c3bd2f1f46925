"""The table of names: every element of every tensor has one place in the files, and the other way round."""

from itertools import groupby
from math import prod
from pathlib import Path

import pytest
import torch

import modelspec
from modelspec.builders.hf import Piece, duplicates, hub_shapes, inventory
from modelspec.hf_config import HFError, family_of
from modelspec.schema import Model, MoE

SPECS = sorted(path for path in (Path(__file__).parents[1] / "specs").glob("*-tiny.yaml"))


@pytest.fixture(params=SPECS, ids=[path.stem for path in SPECS])
def model(request: pytest.FixtureRequest) -> Model:
    return modelspec.load(request.param).model


def test_pieces_are_each_tensor_s_elements_in_order(model: Model) -> None:
    table = model.tensors()
    groups = [(name, list(each)) for name, each in groupby(inventory(model, family_of(model)), lambda p: p.tensor)]
    assert [name for name, _ in groups] == list(table)
    for name, pieces in groups:
        tensor = torch.arange(table[name].numel).view(table[name].shape)
        views = [piece.of(tensor) for piece in pieces]
        assert [tuple(view.shape) for view in views] == [piece.shape_in(table[name].shape) for piece in pieces]
        assert torch.equal(torch.cat([view.flatten() for view in views]), tensor.flatten())


def test_every_element_of_the_files_is_of_one_piece(model: Model) -> None:
    table, shapes = model.tensors(), hub_shapes(model, family_of(model))
    files = {hub: torch.zeros(shape, dtype=torch.int32) for hub, shape in shapes.items()}
    for piece in inventory(model, family_of(model)):
        view = piece.hub_view(files[piece.hub])
        assert tuple(view.shape) == piece.shape_in(table[piece.tensor].shape)
        view += 1
    assert all((tensor == 1).all() for tensor in files.values())
    assert sum(map(prod, shapes.values())) == sum(tensor.numel for tensor in table.values())
    copies = duplicates(model)
    assert not copies.keys() & shapes.keys()
    assert set(copies.values()) <= shapes.keys()


def test_stacked_experts_stand_transposed_with_gate_and_up_in_turn() -> None:
    experts, hidden, width = 2, 3, 4
    ours = torch.randn(experts, 2 * width, hidden)
    files = torch.empty(experts, hidden, 2 * width)
    for expert in range(experts):
        for part in range(2):
            piece = Piece("gate_up_proj", "gate_up_proj", expert, part, 2, "stacked")
            piece.hub_view(files).copy_(piece.of(ours))
    for expert in range(experts):
        for row in range(width):
            assert torch.equal(files[expert, :, 2 * row], ours[expert, row])
            assert torch.equal(files[expert, :, 2 * row + 1], ours[expert, width + row])


def test_a_tensor_that_the_family_has_no_name_for_is_named() -> None:
    spec = modelspec.load(next(path for path in SPECS if "deepseek-v3-" in path.name))
    moe = spec.model.ffn["moe"]
    assert isinstance(moe, MoE) and moe.shared_experts
    gated = moe.model_copy(update={"shared_experts": moe.shared_experts.model_copy(update={"gate": True})})
    model = spec.model.model_copy(update={"ffn": spec.model.ffn | {"moe": gated}})
    with pytest.raises(HFError, match=r"layers\.1\.ffn\.shared_gate\.weight: the Hugging Face family deepseek_v3"):
        list(inventory(model, "deepseek_v3"))
