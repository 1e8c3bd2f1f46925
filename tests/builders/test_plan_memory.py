"""Memory as planned beside what torch holds in one step; benchmarks/plan_memory.py measures many more models."""

import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"))
CHOSEN = [
    case
    for case in BENCHMARK["CASES"]
    if Path(case.spec).stem in ("glm-4.5-tiny", "gpt-oss-20b-tiny", "qwen3-next-80b-a3b-tiny")
]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{Path(case.spec).stem}-{len(case.overrides)}")
def test_a_step_holds_what_is_planned(case: Any) -> None:
    said, found = BENCHMARK["predicted"](case), BENCHMARK["measured"](case)
    assert said.parameters == found.parameters
    assert said.gradients == found.gradients
    assert said.optimizer == found.optimizer
    assert said.activations == pytest.approx(found.activations, rel=0.02)
    assert found.unseen == 0
