"""Changes carry the class that decides what a checkpoint of the old spec is still good for."""

from pathlib import Path

import pytest

from modelspec.diff import diff
from modelspec.validate import load

NANO = Path(__file__).parents[2] / "specs" / "deepseek-v3-nano.yaml"


def test_a_spec_does_not_differ_from_itself() -> None:
    assert diff(load(NANO), load(NANO)) == []


@pytest.mark.parametrize(
    ("override", "path", "change_class"),
    [
        ("model.ffn.moe.num_experts=32", "model.ffn.moe.num_experts", "checkpoint-breaking"),
        ("model.ffn.moe.router.scale=1.5", "model.ffn.moe.router.scale", "convergence"),
        ("training.stages.0.learning_rate=0.1", "training.stages.0.learning_rate", "convergence"),
        ("training.seed=7", "training.seed", "convergence"),
        ("precision.compute=bfloat16", "precision.compute", "precision"),
        ("parallelism.microbatch_size=2", "parallelism.microbatch_size", "execution"),
        ("training.stages.0.parallelism={microbatch_size: 2}", "training.stages.0.parallelism", "execution"),
        ("training.checkpoint.keep_last=9", "training.checkpoint.keep_last", "execution"),
        ("summary=other words", "summary", "cosmetic"),
    ],
)
def test_each_change_has_its_class(override: str, path: str, change_class: str) -> None:
    (change,) = diff(load(NANO), load(NANO, [override]))
    assert (change.path, change.change_class) == (path, change_class)


def test_reversing_a_diff_swaps_before_and_after() -> None:
    old, new = load(NANO), load(NANO, ["model.mtp=null", "training.losses.mtp=null", "training.seed=3"])
    there, back = diff(old, new), diff(new, old)
    assert sorted((c.path, str(c.before), str(c.after)) for c in there) == sorted(
        (c.path, str(c.after), str(c.before)) for c in back
    )
