"""plan --search: the front is that of all layouts, reasons are the checks', and what is chosen is a valid spec."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import modelspec
from modelspec.checks import check
from modelspec.cli import app
from modelspec.diagnostics import SpecError
from modelspec.hardware import load
from modelspec.hardware.calibration import calibration
from modelspec.picture.search import chart, page
from modelspec.plan import plan
from modelspec.plan.floors import Floors
from modelspec.plan.footprint import Footprints
from modelspec.plan.layouts import Layout, Legality, applied, space
from modelspec.plan.memory import largest_batch
from modelspec.plan.ranks import Batch, rank_memory
from modelspec.plan.search import Candidate, Search, search
from modelspec.plan.step import Speed, Steps, speed
from modelspec.plan.training import stages_of_training
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import Recompute

H100 = load("h100")
PACE = speed(calibration(), H100)
STAGE = {"name": "only", "steps": 10, "sequence_length": 64, "batch_size": 16, "learning_rate": 1e-3}
TRAINING = {
    "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    "losses": {"mtp": 0.3},
    "router_bias_update_speed": 1e-3,
    "stages": [STAGE],
}
SEVEN = ("specs/qwen2.5-7b.yaml", "--hardware", "h100", "--gpus", "8")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def on(spec: ModelSpec, world: int) -> ModelSpec:
    """The spec on so many devices."""
    return spec.model_copy(update={"parallelism": spec.parallelism.model_copy(update={"world_size": world})})


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def searched(*arguments: str, code: int = 0) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run(*arguments, "--search", "--format", "json", code=code).stdout)
    found: dict[str, Any] = data["search"]
    return found


@pytest.fixture(scope="module")
def seven() -> Search:
    """A model without training on one node."""
    return search(on(modelspec.load("specs/qwen2.5-7b.yaml"), 8), H100, PACE)


def legal(spec: ModelSpec, hardware: Hardware, length: int) -> list[Layout]:
    legality = Legality(spec)
    return [shape for shape in space(spec, hardware, length, {}).shapes if legality.fault(shape) is None]


def judged(spec: ModelSpec, hardware: Hardware, pace: Speed) -> Iterator[tuple[Layout, float, int] | None]:
    """Every layout by the parts of a plan, one by one: seconds of a step and bytes, None where it is illegal."""
    length, batch = STAGE["sequence_length"], STAGE["batch_size"]
    assert isinstance(length, int) and isinstance(batch, int)
    whole = space(spec, hardware, length, {"microbatch_size": 1})
    for shape in whole.shapes:
        for zero in whole.zero:
            for recompute in whole.recompute:
                layout = shape._replace(zero=zero, recompute=recompute)
                there = applied(spec, layout)
                if any(finding.severity == "error" for finding in check(there)):
                    yield None
                    continue
                seconds = Steps(there, length, hardware, pace).step(batch).seconds
                yield layout, seconds, max(rank.total for rank in rank_memory(there, Batch(length, batch), hardware))


def test_no_layout_of_all_beats_one_of_the_front_and_none_that_nothing_beats_is_missing(
    tiny: Callable[..., ModelSpec],
) -> None:
    layers = [{"attention": "mla", "ffn": "dense"}, {"repeat": 3, "attention": "mla", "ffn": "moe"}]
    spec = on(tiny(model={"layers": layers}, mla={"num_heads": 2}, training=TRAINING), 4)
    every = list(judged(spec, H100, PACE))
    fair = [each for each in every if each is not None]
    sizes = sorted(size for _, _, size in fair)
    # A device that the larger half of the layouts does not fit.
    small = H100.model_copy(update={"memory": sizes[len(sizes) // 2]})
    fit = {(seconds, size) for _, seconds, size in fair if size <= small.memory}
    best = {one for one in fit if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in fit)}
    found = search(spec, small, PACE, fixed={"microbatch_size": 1})
    assert {(each.step_seconds, each.memory_bytes) for each in found.front} == best
    assert found.examined == len(every)
    assert found.fitting == sum(size <= small.memory for _, _, size in fair) < len(fair)
    reasons = {each.code: each.count for each in found.rejected}
    assert reasons.pop("memory") == len(fair) - found.fitting
    assert sum(reasons.values()) == every.count(None) > 0


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-next-80b-a3b", "gpt-oss-20b", "llama-3.1-8b"])
def test_memory_in_bulk_is_that_of_the_heaviest_rank_and_a_floor_is_below_the_step(name: str) -> None:
    spec = on(modelspec.load(f"specs/{name}.yaml"), 128)
    first, stage = next(stages_of_training(applied(spec, Layout(1, "1f1b", None, 1, 1, 1, 1))))
    length, chance = stage.sequence_length, random.Random(name)
    footprints, floors = Footprints(first, length, H100), Floors(first, length, H100, PACE)
    policies: tuple[tuple[Recompute, ...], ...] = ((), ("norm", "swiglu"), ("layer",))
    for shape in chance.sample(legal(spec, H100, length), 12):
        _, stage = next(stages_of_training(applied(spec, shape)))
        batch = largest_batch(stage)
        rows = footprints.heaviest(shape, batch, range(4), policies)
        zero, chosen = chance.randrange(4), chance.randrange(3)
        layout = shape._replace(zero=zero, recompute=policies[chosen])
        there = applied(first, layout)
        assert rows[zero][chosen] == max(rank.total for rank in rank_memory(there, Batch(length, batch), H100))
        seconds = Steps(there, length, H100, PACE).step(batch).seconds
        floor = floors.running(layout, batch) + floors.once(layout, batch)
        assert 0.9 * seconds < floor <= seconds


def test_a_rank_without_a_pipeline_and_equal_stages_under_1f1b_take_just_their_floor() -> None:
    spec = on(modelspec.load("specs/llama-3.1-8b.yaml", overrides=["model.vocab_size=2", "model.layers.0.repeat=8"]), 8)
    floors = Floors(spec, 4096, H100, PACE)
    for layout in (Layout(1, "1f1b", None, 8, 1, 1, 1), Layout(4, "1f1b", None, 2, 1, 1, 1)):
        seconds = Steps(applied(spec, layout), 4096, H100, PACE).step(16).seconds
        assert floors.running(layout, 16) + floors.once(layout, 16) == pytest.approx(seconds, rel=5e-3)


def test_no_check_reads_a_policy_so_that_shapes_are_checked_once() -> None:
    spec = on(modelspec.load("specs/deepseek-v3.yaml"), 256)
    legality = Legality(spec)
    for shape in random.Random(1).sample(space(spec, H100, 4096, {}).shapes, 20):
        found = list(check(applied(spec, shape)))
        assert found == list(check(applied(spec, shape._replace(zero=3, recompute=("layer",)))))
        errors = [each for each in found if each.severity == "error"]
        fault = legality.fault(shape)
        assert (fault is None) == (errors == [])
        assert fault is None or fault in [(each.code, replace(each, code="")) for each in errors]


def test_each_layout_of_the_front_is_a_valid_spec_whose_plan_has_the_same_figures(seven: Search) -> None:
    assert len(seven.front) > 10
    for each in seven.front[::3]:
        spec = modelspec.load("specs/qwen2.5-7b.yaml", overrides=each.set)
        found = plan(spec, hardware=H100)
        (stage,) = found.training.stages
        assert stage.step.seconds == each.step_seconds
        assert stage.step.bubble == each.bubble
        assert stage.tokens_per_second_per_gpu == pytest.approx(each.tokens_per_second_per_gpu)
        assert found.memory.ranks[found.memory.heaviest].total == each.memory_bytes
        assert found.memory.verdict == each.verdict


def test_the_example_of_each_reason_is_refused_for_it(seven: Search) -> None:
    assert {each.code for each in seven.rejected} >= {"MS401", "MS407", "MS408", "memory"}
    for each in seven.rejected:
        if each.code == "memory":
            found = plan(modelspec.load("specs/qwen2.5-7b.yaml", overrides=each.example), hardware=H100).memory
            assert found.verdict == "OOM"
            assert each.reason.startswith(f"needs {found.ranks[found.heaviest].total / 1e9:.2f} GB of 84.94 GB")
            continue
        with pytest.raises(SpecError) as caught:
            modelspec.load("specs/qwen2.5-7b.yaml", overrides=each.example)
        assert (each.code, each.reason) in [(told.code, told.message) for told in caught.value.diagnostics]


def test_the_front_comes_in_the_order_of_the_objective_and_the_first_that_fits_is_chosen(seven: Search) -> None:
    def key(each: Candidate) -> tuple[float, float]:
        return -each.tokens_per_second_per_gpu, each.memory_bytes

    assert list(seven.front) == sorted(seven.front, key=key)
    assert seven.chosen == next(each for each in seven.front if each.verdict == "FITS")
    small = search(on(modelspec.load("specs/qwen2.5-7b.yaml"), 8), H100, PACE, objective="memory")
    assert small.front == tuple(reversed(seven.front))
    assert small.chosen == small.front[0]
    cheap = search(on(modelspec.load("specs/qwen2.5-7b.yaml"), 8), H100, PACE, objective="cost", price=3.6)
    assert cheap.chosen is not None and cheap.front[0].layout == seven.front[0].layout
    assert cheap.chosen.usd_per_billion_tokens == pytest.approx(1e6 / cheap.chosen.tokens_per_second_per_gpu)


V3 = ("specs/deepseek-v3.yaml", "--set", "parallelism.tensor=1", "--set", "parallelism.data.zero=1")


def test_the_chosen_layout_fits_in_every_stage_of_training_where_one_of_the_front_does() -> None:
    found = searched(*V3)
    assert all(stage["verdict"] == "FITS" for stage in found["stages"]) and len(found["stages"]) == 3
    faster = found["front"][: found["front"].index(found["chosen"])]
    assert faster and all(each["verdict"] != "FITS" or each["later"] != "FITS" for each in faster)
    assert found["chosen"]["later"] == "FITS"


def test_where_no_layout_of_the_front_fits_in_later_stages_everything_says_so(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    base = tmp_path / "base.yaml"
    base.write_text(
        "extends: modelspec:deepseek-v3\nname: kept\ntraining:\n  stages:\n"
        "    - {name: main, steps: 9, sequence_length: 4096, batch_size: 15360, learning_rate: 1.0e-4}\n"
        "    - {name: context-32k, steps: 9, sequence_length: 32768, batch_size: 1920, learning_rate: 1.0e-5,"
        " parallelism: {context: 8}}\n"
    )
    layout = "{size: 8, schedule: dualpipev}"
    said = (f"pipeline={layout}", "recompute=[]", "context=2")
    sets = (part for text in said for part in ("--set", f"parallelism.{text}"))
    kept = (str(base), *V3[1:], *sets, "--hardware", "h200")
    found = searched(*kept)
    assert found["front"] and {each["later"] for each in found["front"]} == {"OOM"}
    assert found["stages"][0]["verdict"] == found["chosen"]["verdict"] == "FITS"
    overlay = tmp_path / "best.yaml"
    text = run(*kept, "--search", "--allow-outside", "--overlay", str(overlay)).output
    assert "No layout of the front fits in every stage of training." in text
    assert "# It does not fit in stage context-32k" in overlay.read_text()


def test_the_same_search_says_the_same() -> None:
    assert run(*SEVEN, "--search").output == run(*SEVEN, "--search").output


def test_the_overlay_is_a_commented_spec_whose_plan_has_the_figures_that_were_shown(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    base, file = tmp_path / "base.yaml", tmp_path / "found" / "best.yaml"
    file.parent.mkdir()
    base.write_text("extends: modelspec:qwen2.5-7b\nname: mine\nparallelism: {data: {replicate: 2}}\n")
    said = ("--set", "precision.optimizer_states=bfloat16", "--set", "parallelism.tensor=2")
    found = searched(str(base), *SEVEN[1:], *said, "--overlay", str(file))
    text = file.read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    assert "extends: ../base.yaml" in text and "# ranks along the pipeline" in text
    assert run_validate(file).exit_code == 0
    spec = modelspec.load(file)
    assert (spec.parallelism.world_size, spec.parallelism.tensor, spec.parallelism.data.replicate) == (8, 2, 2)
    again, chosen = plan(spec, hardware=H100), found["chosen"]
    assert again.training.stages[0].step.seconds == chosen["step_seconds"]
    assert again.memory.ranks[again.memory.heaviest].total == chosen["memory_bytes"]
    assert "exists" in run(str(base), *SEVEN[1:], "--search", "--overlay", str(file), code=2).output
    assert file.read_text() == text


def run_validate(file: Path) -> Result:
    return CliRunner().invoke(app, ["validate", str(file)])


def test_an_overlay_takes_stages_of_a_rank_away_where_its_schedule_has_none(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    options = ("--set", "parallelism.pipeline={size: 2, schedule: zbv}", "--set", "parallelism.data.zero=3")
    run(*SEVEN, *options, "--search", "--overlay", str(file))
    pipeline = modelspec.load(file).parallelism.pipeline
    assert (pipeline.size, pipeline.schedule, pipeline.stages_per_rank) == (2, "zbv", None)


def test_an_overlay_far_from_its_project_extends_what_ships_or_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    run(*SEVEN, "--search", "--overlay", str(file))
    assert modelspec.load(file).model == modelspec.load("specs/qwen2.5-7b.yaml").model
    other = tmp_path / "other"
    other.mkdir()
    (other / "base.yaml").write_text("extends: modelspec:qwen2.5-7b\nname: mine\n")
    (other / "pyproject.toml").touch()
    (tmp_path / "third").mkdir()
    far = run(str(other / "base.yaml"), *SEVEN[1:], "--search", "--overlay", str(tmp_path / "third" / "x.yaml"), code=2)
    assert "must be in the project of" in far.output


def test_what_set_says_of_the_layout_is_kept() -> None:
    found = searched(*SEVEN, "--set", "parallelism={tensor: 2, recompute: [layer]}", "--set", "parallelism.data.zero=1")
    assert found["front"]
    for each in found["front"]:
        layout = each["layout"]
        assert (layout["tensor"], layout["zero"], layout["recompute"]) == (2, 1, ["layer"])


def test_where_nothing_fits_it_says_what_comes_nearest_and_what_would_do() -> None:
    arguments = ("specs/llama-3.1-70b.yaml", "--hardware", "h100", "--set", "parallelism.context=1")
    text = run(*arguments, "--gpus", "4", "--search", code=1).output
    found = searched(*arguments, "--gpus", "4", code=1)
    nearest = found["nearest"]
    assert found["front"] == [] and found["chosen"] is None
    assert nearest["memory_bytes"] > H100.memory
    assert f"A layout fits with --gpus {nearest['gpus']}." in text
    assert "With --set precision.optimizer_states=bfloat16 it needs" in text
    assert searched(*arguments, "--gpus", str(nearest["gpus"]))["front"]
    assert not searched(*arguments, "--gpus", str(nearest["gpus"] // 2), code=1)["front"]


def test_where_nothing_is_legal_it_says_what_would_be() -> None:
    text = run("specs/deepseek-v3-nano.yaml", "--gpus", "256", "--search", code=1).output
    assert "No layout is legal on so many devices." in text
    assert "MS411: training.stages.0.batch_size: " in text and "; legal values: 256" in text


def test_a_spec_whose_own_layout_is_illegal_is_searched_and_one_that_is_wrong_elsewhere_is_not() -> None:
    fixed = [part for key in ("expert=32", "tensor=1", "context=1") for part in ("--set", f"parallelism.{key}")]
    found = searched("specs/deepseek-v3.yaml", "--gpus", "256", "--hardware", "b200", *fixed, "--top", "2")
    assert found["own"] is None and len(found["front"]) == 2
    wrong = run(
        "specs/deepseek-v3.yaml",
        "--search",
        "--set",
        "model.ffn.moe.num_experts_per_tok=300",
        "--format",
        "json",
        code=1,
    )
    assert "MS308" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top", "3"), "--top goes with --search"),
        (("--overlay", "x.yaml"), "--overlay goes with --search"),
        (("--search", "--modules"), "--search does not go with"),
        (("--search", "--overlay", "nowhere/x.yaml"), "there is no folder nowhere"),
        (("--search", "--set", "model.layers.0.repeat=8", "--overlay", "x.yaml"), "an item of a list"),
        (("--search", "--gpus", "720720"), "fix a degree"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], message: str) -> None:
    assert message in " ".join(run("specs/deepseek-v2-lite.yaml", *arguments, code=2).output.split())


def test_a_first_stage_with_a_layout_of_its_own_hides_what_is_searched() -> None:
    hidden = "training.stages.0.parallelism={tensor: 2}"
    text = run("specs/deepseek-v3-nano.yaml", "--search", "--set", hidden, code=2).output
    assert "removes it" in " ".join(text.split())


def test_cost_without_a_price_is_refused() -> None:
    free = H100.model_copy(update={"price": None})
    with pytest.raises(ValueError, match="give --price"):
        search(modelspec.load("specs/qwen2.5-7b.yaml"), free, PACE, objective="cost")


def test_cost_of_a_spec_without_a_length_is_dollars_for_a_trillion_tokens() -> None:
    cost = (*SEVEN, "--search", "--objective", "cost", "--price", "3.6")
    text = run(*cost).output
    chosen = searched(*cost)["chosen"]
    # At $3.6 an hour a device costs a tenth of a cent a second.
    dollars = 1e12 / chosen["tokens_per_second_per_gpu"] * 0.001
    assert "$ for 1T tokens" in text and f"a trillion tokens cost ${dollars:,.0f};" in text
    assert "GPU hours, $" in run(*cost, "--tokens", "1e12").output


def test_nothing_in_the_picture_lies_beyond_the_front_and_the_page_tells_each_layout_of_it(seven: Search) -> None:
    drawn = chart(seven)
    for rate, size in drawn.dots:
        assert any(speed >= rate * (1 - 1e-6) and needs <= size for speed, needs in drawn.front)
    text = page(seven)
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert len(root.findall(".//tbody/tr")) == len(seven.front)
    assert len(root.findall(".//circle")) == len(drawn.dots) + len(seven.front) + 1
    assert ">chosen</text>" in text and ">the spec's own</text>" not in text


@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.html", b"<!DOCTYPE html>")])
def test_a_search_is_drawn_as_an_image_or_a_page(name: str, start: bytes, tmp_path: Path) -> None:
    fixed = ("--set", "parallelism.microbatch_size=1", "--set", "parallelism.context=1")
    run(*SEVEN, *fixed, "--search", "--plot", str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)
