"""A plan on disk knows its spec: what changed since is named, and what is no plan is refused by its place."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelspec.builders.run import marked
from modelspec.diagnostics import Diagnostic, SpecError
from modelspec.hardware import load as load_hardware
from modelspec.hardware.calibration import calibration
from modelspec.plan import plan
from modelspec.plan.planned import Planned, slowdown
from modelspec.plan.saved import plan_text, read_plan
from modelspec.plan.step import speed
from modelspec.resolve import resolve
from modelspec.validate import load

NANO = Path(__file__).parents[2] / "specs" / "deepseek-v3-nano.yaml"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The plan of the smallest spec, as a file."""
    spec = load(NANO)
    path = tmp_path / "plan.json"
    path.write_text(plan_text(spec, plan(spec), {"hardware": None, "tokens": None}))
    return path


def _fault(path: Path) -> Diagnostic:
    with pytest.raises(SpecError) as refused:
        read_plan(path)
    assert refused.value.exit_code == 2
    (found,) = refused.value.diagnostics
    return found


def test_a_plan_carries_its_spec_under_the_hash_by_which_a_run_knows_it(saved: Path) -> None:
    spec, content = load(NANO), json.loads(saved.read_text())
    assert hashlib.sha256(content["spec"].encode()).hexdigest() == content["spec_sha256"]
    assert marked(spec).splitlines()[0] == f"# sha256: {content['spec_sha256']}"
    assert content["plan"] == json.loads(json.dumps(plan(spec).as_json()))
    assert content["arguments"] == {"hardware": None, "tokens": None}
    read = read_plan(saved)
    assert (read.spec, read.drift(spec)) == (spec, [])


def test_every_change_since_is_told_at_its_place(saved: Path) -> None:
    said = ["model.vocab_size=4100", "training.stages.0.learning_rate=0.1", "data.sources.0.weight=2.0"]
    spec, resolved = load(NANO, said), resolve(NANO, said)
    with pytest.raises(SpecError) as refused:
        read_plan(saved).require(spec, resolved)
    assert refused.value.exit_code == 1
    found = {each.path: each for each in refused.value.diagnostics}
    assert found.keys() == {"model.vocab_size", "training.stages.0.learning_rate", "data.sources.0.weight"}
    vocabulary = found["model.vocab_size"]
    assert str(vocabulary.place) == "--set:1:18"
    assert vocabulary.message == (
        "model.vocab_size was 4096 when this was planned, and is 4100 now (checkpoint-breaking)"
    )


def test_another_spelling_of_the_same_spec_is_no_drift(saved: Path) -> None:
    experts = "{attention: mla, ffn: moe}"
    layers = f"model.layers=[{{attention: mla, ffn: dense}}, {experts}, {{repeat: 2, pattern: [{experts}]}}]"
    spec = load(NANO, [layers])
    assert spec != load(NANO)
    read_plan(saved).require(spec, resolve(NANO, [layers]))


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return edit


def _with(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: value})


@pytest.mark.parametrize(
    ("edit", "line", "message"),
    [
        (_without("spec"), 1, "the key 'spec' is missing"),
        (_with("plan_version", 2), 2, "it is of version 2, and this is version 1"),
        (_with("plan_version", "1"), 2, "'plan_version' must be a whole number"),
        (_with("plan_version", True), 2, "'plan_version' must be a whole number"),
        (_with("spec_sha256", "0" * 64), 3, "not the SHA-256 of 'spec': one of the two was edited"),
        (_with("plan", []), 10, "'plan' must be an object"),
        (_without("plan", "memory", "heaviest"), 9, "memory or training lacks what a plan has"),
        (_without("plan", "training", "stages"), 9, "memory or training lacks what a plan has"),
    ],
)
def test_what_is_no_plan_is_refused_by_place(
    saved: Path, edit: Callable[[dict[str, Any]], None], line: int, message: str
) -> None:
    content = json.loads(saved.read_text())
    edit(content)
    saved.write_text(json.dumps(content, indent=2))
    found = _fault(saved)
    assert (found.code, found.message) == ("MS018", message)
    if "plan" not in message.split()[0]:
        assert found.place.line == (line if line < 9 else _line_of(saved, '"plan":'))


def _line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(f"  {text}"))


def test_a_spec_of_no_version_of_the_language_is_refused(saved: Path) -> None:
    content = json.loads(saved.read_text())
    content["spec"] = content["spec"].replace("hidden_size", "hiden_size")
    content["spec_sha256"] = hashlib.sha256(content["spec"].encode()).hexdigest()
    saved.write_text(json.dumps(content, indent=2))
    found = _fault(saved)
    assert (found.place.line, found.message) == (4, "no spec of this version of the language")


@pytest.mark.parametrize(
    ("content", "code", "place"),
    [
        (b"{\n  oops", "MS018", "2:3"),
        (b"[1]", "MS018", "1:1"),
        (b"[" * 100_000, "MS018", "1:1"),
        (b"\xff", "MS003", "1:1"),
        (None, "MS001", "1:1"),
    ],
)
def test_a_file_that_cannot_be_read_has_a_place_too(
    tmp_path: Path, content: bytes | None, code: str, place: str
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    found = _fault(path)
    assert (found.code, str(found.place)) == (code, f"{path}:{place}")


def test_what_a_run_is_held_to_is_what_the_plan_says() -> None:
    result = plan(load(NANO))
    planned = Planned.of(result.as_json())
    heaviest = result.memory.ranks[result.memory.heaviest]
    assert planned.tokens_per_second == (result.training.tokens_per_second_per_gpu,)
    assert planned.memory_on("cpu") == heaviest.total
    assert planned.memory_on("cuda") == heaviest.total - heaviest.margin


def test_a_run_of_several_stages_is_held_to_the_one_that_holds_most() -> None:
    result = plan(load(NANO.with_name("deepseek-v3.yaml")))
    planned = Planned.of(result.as_json())
    assert planned.memory == max(stage.total for stage in result.memory.stages)
    rates = [stage.tokens_per_second_per_gpu * 2048 for stage in result.training.stages]
    assert planned.tokens_per_second == pytest.approx(rates)


@pytest.mark.parametrize("seconds", [0.01, 3.0])
def test_with_its_slowdown_a_plan_takes_the_seconds_that_were_measured(seconds: float) -> None:
    spec, hardware = load(NANO), load_hardware("h800")
    pace = speed(calibration(), hardware)
    factor = slowdown(spec, 256, 8, hardware, pace, seconds)
    calibrated = hardware.model_copy(update={"slowdown": factor, "stack": pace.stack})
    assert plan(spec, hardware=calibrated).training.stages[0].step.seconds == pytest.approx(seconds)
