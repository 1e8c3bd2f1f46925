"""Pictures of pipelines: every box where the simulation has it, legible for everyone, and committed as they are drawn.

Run as a program, this file draws the committed picture anew.
"""

import re
import sys
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import modelspec
from modelspec.cli import app
from modelspec.hardware import load as load_hardware
from modelspec.hardware.calibration import calibration
from modelspec.picture.pipeline import all_timelines, own_timeline
from modelspec.picture.schedules import schedules_figure, schedules_page
from modelspec.picture.timeline import Timeline, Work, even_work, rows, timeline, told
from modelspec.plan.pipeline import Durations, order, simulate
from modelspec.plan.step import speed
from modelspec.schema.parallelism import PipelineSchedule

ROOT = Path(__file__).parents[2]
V3 = str(ROOT / "specs" / "deepseek-v3.yaml")
PICTURE = ROOT / "docs" / "images" / "schedules.svg"
ALL: tuple[PipelineSchedule, ...] = get_args(PipelineSchedule)
H800 = load_hardware("h800")
PACE = speed(calibration(), H800)


def each(schedule: PipelineSchedule) -> int:
    """Stages on a rank."""
    return 1 if schedule in ("gpipe", "1f1b") else 2


def committed() -> str:
    """The picture of the documents."""
    shown = [timeline(schedule, 4, each(schedule), 8) for schedule in ALL]
    return schedules_figure("Pipeline schedules", shown)


def places(shown: Timeline, span: float) -> dict[str, list[tuple[float, float, float, float]]]:
    """Left, top, width and height of the boxes, by class."""
    root = ElementTree.fromstring(f"<g>{rows(shown, span).shapes.source}</g>")
    found = {}
    for path in root.iter("path"):
        boxes = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-", path.attrib["d"])
        left, top, width, height = 0, 1, 2, 3
        if boxes:
            found[path.attrib["class"]] = [
                (float(box[left]), float(box[top]), float(box[width]), float(box[height])) for box in boxes
            ]
    return found


def numbers(source: str) -> list[int]:
    """The microbatches that are written in boxes."""
    root = ElementTree.fromstring(source)
    return [int(text.text or "") for text in root.iter() if "box-number" in text.attrib.get("class", "")]


@pytest.mark.parametrize("schedule", ALL)
def test_every_piece_of_work_has_its_box(schedule: PipelineSchedule) -> None:
    shown = timeline(schedule, 3, each(schedule), 6)
    drawn = places(shown, shown.total.makespan)
    counted = [action.kind for actions in shown.simulation.order for action in actions]
    whole = counted.count("backward")

    def boxes(kind: str) -> int:
        return sum(len(found) for name, found in drawn.items() if name.startswith(kind))

    assert boxes("forward") == counted.count("forward") == 3 * 6 * each(schedule)
    assert boxes("input") == counted.count("input") + whole == boxes("forward")
    assert boxes("weight") == counted.count("weight") + whole == boxes("forward")


def test_boxes_stand_where_the_simulation_has_them() -> None:
    # Two ranks: 1 forward, then 0 waits for rank 1's forward and backward pass.
    work = Work((Durations(1, 2, 3), Durations(2, 4, 6)))
    drawn = places(timeline("1f1b", 2, 1, 1, work), 18)
    unit = drawn["waits-0"][0][2] / 18
    start = drawn["waits-0"][0][0]
    assert [(round((left - start) / unit, 1), top) for left, top, _, _ in drawn["forward-0"]] == [(0, 0), (1, 26)]
    assert [(round((left - start) / unit, 1), top) for left, top, _, _ in drawn["input-0"]] == [(13, 0), (3, 26)]
    assert [(round((left - start) / unit, 1), top) for left, top, _, _ in drawn["weight-0"]] == [(15, 0), (7, 26)]


def test_overlapping_passes_share_the_height_of_a_row() -> None:
    work = even_work(2, 2)
    drawn = places(timeline("dualpipev", 2, 2, 8, work), 30)
    apart = places(timeline("dualpipev", 2, 2, 8, Work(work.durations, pair=None)), 30)
    assert {height for _, _, _, height in drawn["forward-0"]} == {12, 24}
    assert {height for _, _, _, height in apart["forward-0"]} == {24}


@pytest.mark.parametrize("schedule", ALL)
def test_where_the_middle_is_left_out_begin_end_and_axis_are_those_of_all_microbatches(
    schedule: PipelineSchedule,
) -> None:
    count = 80
    shown = timeline(schedule, 4, each(schedule), count)
    source = schedules_figure("many", [shown])
    assert shown.drawn < count
    seen = numbers(source)
    assert {0, 1, 2, count - 1, count - 2} <= set(seen)
    assert not any(25 < number < count - 30 for number in seen)
    full = simulate(order(schedule, 4, each(schedule), count), shown.work.durations)
    assert shown.total.makespan == pytest.approx(full.makespan)
    assert shown.total.bubble == pytest.approx(full.bubble)
    ticks = [float(found) for found in re.findall(r'class="tick middle fill-soft">([\d.]+)<', source)]
    assert ticks == sorted(ticks)
    assert 0.98 * full.makespan < ticks[-1] <= full.makespan


def test_a_billion_microbatches_are_drawn_as_fast_as_few() -> None:
    shown = timeline("zbv", 4, 2, 10**9)
    assert shown.drawn < 50
    assert "1,000,000,000 microbatches" in told(shown)


def test_more_ranks_than_can_be_seen_are_refused() -> None:
    with pytest.raises(ValueError, match="129 pipeline ranks are more than the 128"):
        timeline("1f1b", 129, 1, 200)


def test_what_a_rank_holds_is_said_in_microbatches_of_all_its_stages() -> None:
    said = [told(timeline(schedule, 16, each(schedule), 120)) for schedule in ("1f1b", "zbv", "dualpipev")]
    assert said == [
        "16 ranks, 120 microbatches, bubble 11.11%, at most 16 in flight on a rank",
        "16 ranks with 2 stages each, 120 microbatches, bubble 2.04%, at most 16 in flight on a rank",
        "16 ranks with 2 stages each, 120 microbatches, bubble 4.00%, at most 16.5 in flight on a rank",
    ]


def test_times_of_a_spec_are_those_of_its_plan() -> None:
    spec = modelspec.load(V3)
    shown = own_timeline(spec, H800, PACE)
    assert (shown.schedule, shown.ranks, shown.microbatches) == ("dualpipev", 16, 120)
    assert shown.work.told is not None and "h800" in shown.work.told
    # Its stages are not equal, and what that costs is told apart from what the schedule does.
    assert shown.even.bubble < shown.total.bubble
    assert f"({shown.even.bubble:.2%} if stages were equal)" in told(shown)
    assert " s</text>" in schedules_figure("v3", [shown])


def test_a_page_shows_every_schedule_that_works_and_says_why_others_do_not() -> None:
    shown, refused = all_timelines(modelspec.load(V3), H800, PACE)
    assert [one.schedule for one in shown] == ["gpipe", "1f1b", "zbv", "dualpipev"]
    assert [name for name, _ in refused] == ["interleaved_1f1b", "interleaved_zero_bubble"]
    page = schedules_page("v3", "a summary", shown, refused)
    assert "interleaved_1f1b does not work here: 120 microbatches are not cut into 7 equal rounds" in page
    for one in shown:
        assert f'id="{one.schedule}"' in page and f"{one.total.bubble:.2%}" in page
    few = modelspec.load(V3, overrides=["model.layers=[{repeat: 20, attention: mla, ffn: moe}]",
                                        "parallelism.pipeline.schedule=1f1b"])  # fmt: skip
    reasons = dict(all_timelines(few, H800, PACE)[1])
    assert reasons["zbv"] == "zbv has 32 stages, more than 20 layers"


def test_pictures_ask_for_nothing_and_keep_text_as_text() -> None:
    shown = [timeline("zbv", 2, 2, 4)]
    name = "<script>alert(1)</script> & \"'"
    for source in (schedules_figure(name, shown), schedules_page(name, name, shown, [("1f1b", name)])):
        root = ElementTree.fromstring(source.removeprefix("<!DOCTYPE html>\n"))
        assert not [found for found in root.iter() if "script" in found.tag]
        assert name in "".join(root.itertext())
        assert "url(" not in source and "@import" not in source and 'src="' not in source


def rules() -> Iterator[dict[str, str]]:
    """Colours of boxes and of the numbers on them, by class: in light, and in dark."""
    for part in re.split(r"@media [^{]*\{\n(?=\.forward)", committed())[-2:]:
        yield dict(re.findall(r"\.((?:on-)?(?:forward|input|weight|waits)-\d) \{ fill: (#\w{6}) \}", part)[:64])


def linear(colour: str) -> list[float]:
    """Channels of a colour as amounts of light."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]


def lab(light: list[float]) -> tuple[float, float, float]:
    """CIELAB of linear sRGB, D65."""
    weights = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    scaled = [sum(a * b for a, b in zip(row, light, strict=True)) / w for row, w in zip(weights, white, strict=True)]
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in scaled)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


# Machado, Oliveira, Fernandes 2009, full severity.
SIGHT = {
    "normal": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.mark.parametrize("sight", SIGHT)
def test_kinds_of_work_differ_for_every_sight(sight: str) -> None:
    def seen(colour: str) -> tuple[float, float, float]:
        light = linear(colour)
        return lab([min(1.0, max(0.0, sum(a * b for a, b in zip(row, light, strict=True)))) for row in SIGHT[sight]])

    for theme in rules():
        assert len(theme) == 64
        for (one, other), shades in product(
            combinations(("forward", "input", "weight", "waits"), 2), product("07", "07")
        ):
            colours = [seen(theme[f"{kind}-{shade}"]) for kind, shade in zip((one, other), shades, strict=True)]
            distance = sum((a - b) ** 2 for a, b in zip(*colours, strict=True)) ** 0.5
            assert distance > 19, (one, other, shades)


def test_numbers_have_the_contrast_that_wcag_asks_for() -> None:
    for theme in rules():
        for name, ground in theme.items():
            if not name.startswith("on-"):
                light, dark = sorted(
                    (0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (ground, theme[f"on-{name}"]))),
                    reverse=True,
                )
                assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_the_committed_picture_is_current() -> None:
    assert PICTURE.read_text() == committed(), f"make it anew: {sys.executable} {Path(__file__).relative_to(ROOT)}"


def test_plan_draws_a_spec(tmp_path: Path) -> None:
    for suffix, lines in (("svg", 1), ("html", 6)):
        file = tmp_path / f"pipeline.{suffix}"
        done = CliRunner().invoke(app, ["plan", V3, "--timeline", str(file)])
        assert done.exit_code == 0, done.output
        assert len(done.output.splitlines()) == lines
        assert "dualpipev: 16 ranks with 2 stages each, 120 microbatches, bubble " in done.output
        ElementTree.fromstring(file.read_text().removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([V3, "--timeline", "x.pdf"], "must end in .svg or .html"),
        ([V3.replace("v3", "v3-nano"), "--timeline", "x.svg"], "parallelism.pipeline.size is 1: there is no pipeline"),
        ([V3, "--timeline", "no/such/folder/x.svg"], "it must be in a folder that exists"),
        ([V3, "--timeline", "x.svg", "--serve"], "--timeline does not go with"),
    ],
)
def test_what_cannot_be_drawn_is_misuse(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", "").split()), done.output
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    PICTURE.write_text(committed())
