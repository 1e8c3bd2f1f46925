"""Every axis, and axes together, compute what one process computes: losses, gradients by name, weights, biases.

`make parity` holds many more layouts; these are the ones that a change must not break unseen.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from modelspec.builders.learner import Learner
from modelspec.builders.parallel import pipeline
from modelspec.builders.parallel.learner import DistributedLearner
from modelspec.timeline import timeline
from modelspec.validate import load
from tests.builders.parallel.layouts import BATCH, EIGHT, FLOAT64, FOUR, LENGTH, SPECS, layout, small
from tests.builders.parallel.mutants import MUTANTS, replaced
from tests.builders.parallel.parity import Taken, batches, compare, reference
from tests.builders.parallel.ranks import run_ranks

# One launch proves many layouts, which takes minutes where other tests run beside it.
pytestmark = pytest.mark.timeout(600)

STEPS = 3
# In FP32 with the fastest forms; in float64 with the references.
LOSSES, GRADIENTS, EXACT = 1e-6, 1e-5, 1e-10
SHARP = ("interleaved zero bubble", "context and tensor")
# As in releases of torch that cannot split a backward pass.
WHOLE = "zbv, whole backward passes"
TESTED = (
    "data, 2 microbatches",
    "zero 1, 2 replicas",
    "zero 3, 2 replicas",
    "1f1b, fewer microbatches than stages",
    "interleaved zero bubble",
    "zbv and zero 3",
    "dualpipev",
    "pipeline and zero 3",
    "zero 2, experts on one rank each",
    "expert and zero 3",
    "zero 3, more ranks than experts",
    "zero 3, experts and their rows uneven",
    "expert by node",
    "tensor, more ranks than heads of keys",
    "tensor and expert",
    "context and expert",
    "pipeline and context, computed again",
    "dualpipev and expert, computed again",
    "context and expert, layers computed again",
)


def shallow(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """With as few layers as tell: only stages of a pipeline need more."""
    if any("pipeline" in each for each in overrides):
        return overrides
    return (*overrides, "model.layers=[{repeat: 1, attention: mla, ffn: dense}, {repeat: 2, attention: mla, ffn: moe}]")


class Truth:
    """What one process computes, once for each model."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, ...], tuple[Any, list[Taken]]] = {}

    def of(self, overrides: tuple[str, ...]) -> tuple[Any, list[Taken]]:
        model = tuple(each for each in overrides if not each.startswith("parallelism."))
        if model not in self.known:
            spec = small(*model)
            data = batches(spec, BATCH, LENGTH, STEPS)
            self.known[model] = data, reference(spec, data)
        return self.known[model]


def hold_layouts(layouts: dict[str, tuple[str, ...]], file: Path) -> None:
    """On every rank: each layout against one process; what came of it is written by rank 0."""
    told = held(layouts, Truth())
    if dist.get_rank() == 0:
        file.write_text(json.dumps(told))


def hold_all(layouts: dict[str, tuple[str, ...]], file: Path) -> None:
    """The same, the mutants, and what FP8 loses."""
    truth = Truth()
    with mock.patch.object(pipeline, "_SPLITS", False):
        whole = {WHOLE: held({"zbv": FOUR["zbv"]}, truth)["zbv"]}
    told = held(layouts, truth) | whole | broken(truth) | {"fp8": lost()}
    if dist.get_rank() == 0:
        file.write_text(json.dumps(told))


def held(layouts: dict[str, tuple[str, ...]], truth: Truth) -> dict[str, Any]:
    """Of each layout the largest differences, or what was too large."""
    told: dict[str, Any] = {}
    for name, overrides in layouts.items():
        exact = any("float64" in each for each in overrides)
        bounds = (EXACT, EXACT) if exact else (LOSSES, GRADIENTS)
        try:
            told[name] = compare(
                small(*overrides),
                *truth.of(overrides),
                losses=bounds[0],
                gradients=bounds[1],
                form="reference" if exact else "fastest",
            )
        except AssertionError as error:
            told[name] = str(error)
    return told


def broken(truth: Truth) -> dict[str, Any]:
    """What comes of each mutant in one step."""
    told: dict[str, Any] = {}
    for name, (overrides, owner, method, how, _) in MUTANTS.items():
        try:
            with replaced(owner, method, how):
                data, wanted = truth.of(overrides)
                told[name] = compare(small(*overrides), data[:1], wanted[:1], losses=LOSSES, gradients=GRADIENTS)
        except AssertionError as error:
            told[name] = str(error)
    return told


def lost() -> list[dict[str, float]]:
    """What FP8 loses in a step: on rank 0 that of one process, and that of four over all axes."""
    shares = []
    alone, together = (), layout(4, pipeline="dualpipev", stages=2, expert=2, zero=1)
    for overrides in (alone, together) if dist.get_rank() == 0 else (together,):
        sizes = (f"training.stages.0.batch_size={BATCH}", f"training.stages.0.sequence_length={LENGTH}")
        spec = load(SPECS / "deepseek-v3-nano-fp8.yaml", [*sizes, *overrides])
        assert spec.training is not None
        step, (batch,) = next(iter(timeline(spec.training))), batches(spec, BATCH, LENGTH, 1)
        learner = (DistributedLearner if overrides else Learner)(spec, spec.training, torch.device("cpu"))
        rows = learner.rows(BATCH) if isinstance(learner, DistributedLearner) else range(BATCH)
        found = learner.step(step, batch[rows.start : rows.stop]).fp8
        assert found is not None
        shares.append(asdict(found))
    return shares


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every layout of four ranks and of eight came to, and every mutant."""
    told: dict[str, Any] = {}
    sharp = {f"{name}, float64": (*FOUR[name], *FLOAT64) for name in SHARP}
    tested = {name: shallow(FOUR[name]) for name in TESTED}
    for world, work, layouts in ((4, hold_all, tested | sharp), (8, hold_layouts, EIGHT)):
        file = tmp_path_factory.mktemp("parity") / f"{world}.json"
        run_ranks(work, world, layouts, file, timeout=500)
        told |= json.loads(file.read_text())
    return told


@pytest.mark.parametrize("name", [*TESTED, WHOLE, *(f"{name}, float64" for name in SHARP), *EIGHT])
def test_a_layout_computes_what_one_process_does(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], dict), found[name]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], str), "parity held although a rule is broken"
    differs = {part.split()[0]: float(part.split()[1]) for part in found[name].split(", ")}
    assert differs[MUTANTS[name][-1]] > 1e-3


def test_what_fp8_loses_is_counted_over_all_ranks(found: dict[str, Any]) -> None:
    alone, together = found["fp8"]
    # One process looks at the first rows of each tensor, ranks at their own.
    assert together == pytest.approx(alone, rel=0.25, abs=1e-5)
    assert together["fp8_activation_saturation"] > 1 / 128
