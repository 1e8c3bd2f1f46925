"""Every axis, and axes together, compute what one process computes: losses, gradients by name, weights, biases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.builders.parallel.layouts import BATCH, EIGHT, FLOAT64, FOUR, LENGTH, small
from tests.builders.parallel.parity import batches, compare, reference
from tests.builders.parallel.ranks import run_ranks

STEPS = 3
LOSSES, GRADIENTS = 1e-6, 1e-5


def hold(layouts: dict[str, tuple[str, ...]], file: Path) -> None:
    """On every rank: each layout against one process; what came of it is written by rank 0."""
    told: dict[str, Any] = {}
    references: dict[tuple[str, ...], Any] = {}
    for name, overrides in layouts.items():
        spec = small(*overrides)
        model = tuple(each for each in overrides if each.startswith("model."))
        if model not in references:
            data = batches(spec, BATCH, LENGTH, STEPS)
            references[model] = data, reference(spec, data)
        try:
            told[name] = compare(spec, *references[model], losses=LOSSES, gradients=GRADIENTS)
        except AssertionError as error:
            told[name] = str(error)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(told))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every layout of four ranks and of eight came to."""
    told: dict[str, Any] = {}
    for world, layouts in ((4, FOUR), (8, EIGHT)):
        file = tmp_path_factory.mktemp("parity") / f"{world}.json"
        run_ranks(hold, world, layouts, file)
        told |= json.loads(file.read_text())
    return told


@pytest.mark.parametrize("name", [*FOUR, *EIGHT])
def test_a_layout_computes_what_one_process_does(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], dict), found[name]
