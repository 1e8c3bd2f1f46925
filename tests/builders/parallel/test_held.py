"""State, activations and bytes that ranks hold and send, beside plan; benchmarks/plan_layouts.py holds many more."""

import pytest

from benchmarks.plan_layouts import FOUR, bound, errors, measured, spec_of

TESTED = (
    "zero 1, 2 replicas",
    "zero 2",
    "dualpipev",
    "expert by node",
    "tensor and data",
    "context and data",
    "pipeline and zero 3",
    "expert and data, layer again",
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """How wrong plan is about each layout, in one launch."""
    return {
        name: errors(spec_of(FOUR[name]), ranks)
        for name, ranks in measured(4, {name: FOUR[name] for name in TESTED}).items()
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TESTED)
def test_ranks_hold_and_send_what_is_planned(found: dict[str, dict[str, float]], name: str) -> None:
    assert {key: error for key, error in found[name].items() if abs(error) > bound(key)} == {}
