"""plan --sweep: every point is the plan of that spec, what is illegal spoils nothing, and pictures show the numbers."""

import json
import re
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import modelspec
from modelspec.cli import app
from modelspec.picture.sweep import labelled, page, panels, places, style
from modelspec.plan.sweep import MAX_POINTS, Axis, Column, Data, Sweep, axis, sweep

V3, TINY, DENSE = "specs/deepseek-v3.yaml", "tests/specs/deepseek-v3-tiny.yaml", "specs/llama-3.1-8b.yaml"
EXPERTS = "model.ffn.moe.num_experts"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def swept(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run(*arguments, "--format", "json").stdout)
    return data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1,2, 3", Axis("a.b", ("1", "2", "3"))),
        (" a = x", Axis("a", ("x",))),
        ("a=[1, 2],[3]", Axis("a", ("[1, 2]", "[3]"))),
        ("a={b: [1, {c: 2, d: 3}], e: 4},null", Axis("a", ("{b: [1, {c: 2, d: 3}], e: 4}", "null"))),
        ("""a='x, y',"z, '",it's""", Axis("a", ("'x, y'", '''"z, '"''', "it's"))),
        ("a='it''s, so',{b: 'c, d'}", Axis("a", ("'it''s, so'", "{b: 'c, d'}"))),
        ("a=b=1,c=2", Axis("a", ("b=1", "c=2"))),
        ("a=2,1, 2,1", Axis("a", ("2", "1"))),
    ],
)
def test_values_are_parted_at_commas_outside_of_brackets_and_quotes(text: str, expected: Axis) -> None:
    assert axis(text) == expected


@pytest.mark.parametrize("text", ["", "a", "=1", "a=", "a=1,,2", "a=1,"])
def test_an_axis_has_a_key_and_no_empty_value(text: str) -> None:
    with pytest.raises(ValueError, match="KEY=VALUE,VALUE"):
        axis(text)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (("1", "2.5", "1e3", "-.5"), (1, 2.5, 1000, -0.5)),
        (("1", "null"), None),
        (("1_000",), None),
        (("nan",), None),
        (("1e999",), None),
    ],
)
def test_what_is_a_number_in_a_spec_is_one_on_an_axis(
    values: tuple[str, ...], numbers: tuple[float, ...] | None
) -> None:
    assert Axis("a", values).numbers == numbers


def test_each_point_is_the_plan_of_that_spec() -> None:
    values = {EXPERTS: [16, 32], "model.hidden_size": [64, 96]}
    arguments = [part for key, some in values.items() for part in ("--sweep", f"{key}={','.join(map(str, some))}")]
    data = swept(TINY, *arguments, "--sequence", "8", "--set", "model.vocab_size=4096")
    assert [point["values"] for point in data["points"]] == [
        {EXPERTS: experts, "model.hidden_size": size} for experts in (16, 32) for size in (64, 96)
    ]
    for point in data["points"]:
        overrides = ["model.vocab_size=4096", *(f"{key}={value}" for key, value in point["values"].items())]
        alone = modelspec.plan(modelspec.load(TINY, overrides), sequence_length=8).as_json()
        assert point["plan"] == json.loads(json.dumps({key: alone[key] for key in point["plan"]}))
        assert point["plan"]["parameters"] and point["plan"]["checkpoint_bytes"]


def test_the_table_has_the_published_sizes_among_others() -> None:
    lines = run(V3, "--sweep", f"{EXPERTS}=256").stdout.splitlines()
    (row,) = (line for line in lines if line.split()[:1] == ["256"])
    assert re.split(r"\s{2,}", row.strip())[:6] == ["256", "671.03B", "37.55B", "267.40 GFLOP", "70.27 KB", "2.73 TB"]


def test_an_illegal_point_is_told_with_its_first_diagnostic_and_the_others_stand() -> None:
    out = run(TINY, "--sweep", f"{EXPERTS}=8,9,16").stdout
    assert [line.split()[0] for line in out.splitlines() if re.match(r" *\d+ ", line)] == ["8", "16", "1"]
    assert "1 of 3 points is illegal" in out
    assert "error[MS304]: 4 groups do not divide 9 experts, at model.ffn.moe.router.selection.groups.num" in out
    assert f"at {EXPERTS}=9" in out and "legal values: 3, 9" in out
    diagnostic = swept(TINY, "--sweep", f"{EXPERTS}=8,9,16")["points"][1]["diagnostic"]
    assert diagnostic["code"] == "MS304" and diagnostic["help"]


def test_points_of_one_fault_are_told_together_and_none_legal_is_a_no(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    out = run(
        V3, "--sweep", f"model.hidden_sise={','.join(map(str, range(1, 13)))}", "--plot", str(plot), code=1
    ).stdout
    assert out.count("MS201") == 1 and "did you mean 'hidden_size'?" in out and "and 7 more" in out
    assert not plot.exists()


def test_a_value_that_no_yaml_is_only_its_own_point() -> None:
    data = swept(TINY, "--sweep", f"{EXPERTS}=8,]")
    assert "plan" in data["points"][0]
    assert data["points"][1]["diagnostic"]["code"] == "MS005"
    assert data["points"][1]["values"] == {EXPERTS: "]"}


def test_a_plan_that_refuses_a_point_says_why() -> None:
    out = run(V3, "--sweep", "model.max_position=4096,163840", "--sequence", "8192").stdout
    assert "error[MS506]" in out or "a sequence of 8,192 tokens" in out
    assert "163840" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "model"], "KEY=VALUE,VALUE"),
        (["--sweep", "name=a", "--sweep", "name=b"], "stands twice"),
        (["--sweep", f"name={','.join(map(str, range(1001)))}"], f"at most {MAX_POINTS:,}"),
        (["--sweep", "name=a,b", "--plot", "x.gif"], ".png or .html"),
        (["--plot", "x.png"], "goes with --sweep"),
        (["--sweep", "name=a", "--modules"], "--modules"),
        (["--sweep", "name=a,b", "--plot", "nowhere/x.html"], "must be in a folder that exists"),
    ],
)
def test_misuse_is_told(arguments: list[str], said: str) -> None:
    assert said in run(DENSE, *arguments, code=2).output


def test_what_is_wrong_whatever_the_point_is_told_once(tmp_path: Path) -> None:
    assert json.loads(run("no.yaml", "--sweep", "a=1,2", "--format", "json", code=2).stdout)["valid"] is False


def test_lists_are_values_like_any_other() -> None:
    out = run(DENSE, "--sweep", "parallelism.recompute=[],[norm],[layer, norm]").stdout
    assert all(f"\n{value} " in out for value in ("[]", "[norm]", "[layer, norm]"))


def test_gpus_are_the_world_of_every_point() -> None:
    points = swept(DENSE, "--sweep", "parallelism.pipeline.size=1,4", "--gpus", "6")["points"]
    assert "plan" in points[0]
    assert points[1]["diagnostic"]["code"] == "MS401" and "a world of 6" in points[1]["diagnostic"]["message"]


def test_fifty_points_take_seconds() -> None:
    start = time.perf_counter()
    values = ",".join(map(str, range(4096, 4096 + 50)))
    run(DENSE, "--sweep", f"model.vocab_size={values}")
    assert time.perf_counter() - start < 10


# Costs that are chosen, to know what is drawn.
DATA: dict[tuple[str, ...], Data | None] = {
    ("1", "a"): {"parameters": {"total": 100, "active": 70}, "memory": {"ranks": [{"total": 3}, {"total": 5}]}},
    ("2", "a"): {"parameters": {"total": 200, "active": 70}, "memory": {"ranks": [{"total": 4}]}},
    ("16", "a"): None,
    ("1", "b"): {"parameters": {"total": 400, "active": 70}, "memory": {"ranks": []}},
    ("2", "b"): {"parameters": {"total": 800, "active": 70}},
    ("16", "b"): {"parameters": {"total": 1600, "active": 70}},
}


def drawn() -> Sweep:
    def cost(overrides: tuple[str, ...]) -> tuple[Data | None, Data | None]:
        plan = DATA[tuple(override.partition("=")[2] for override in overrides)]
        return plan, None if plan else {"code": "MS999", "message": "it <cannot> be", "help": "do & not"}

    return sweep("tiny", [Axis("x.size", ("1", "2", "16")), Axis("x.kind", ("a", "b"))], cost)


def test_columns_are_those_that_a_plan_has_and_a_star_is_the_largest() -> None:
    assert [column.path for column in drawn().columns] == [
        "parameters.total",
        "parameters.active",
        "memory.ranks.*.total",
    ]
    heaviest = Column("memory.ranks.*.total", "", "bytes")
    assert [heaviest.read(plan) for plan in DATA.values() if plan] == [5, 4, None, None, None]
    assert Column("a", "", "number").read({"a": True}) is None
    told = Column("memory.ranks.*.total", "", "bytes", "memory.verdict")
    assert told.cell({"memory": {"ranks": [{"total": 5}], "verdict": "OOM"}}) == "5 bytes OOM"
    assert told.cell({"memory": {"verdict": "OOM"}}) == ""
    step = Column("stages.1.seconds", "", "number")
    assert step.read({"stages": [{"seconds": 2.0}, {"seconds": 3.0}]}) == 3.0
    assert step.read({"stages": []}) is None and step.read({"stages": None}) is None


@pytest.mark.parametrize(
    ("unit", "number", "said"),
    [
        ("number", 671_026_419_200, "671.03B"),
        ("bytes", 688_574_839_360, "688.57 GB"),
        ("FLOP", 250_449_887_232, "250.45 GFLOP"),
        ("number", 19.87, "19.87"),
        ("number", 1543.2, "1,543"),
        ("number", 55.6, "55.60"),
        ("number", 2_664_000.0, "2.66M"),
        ("USD", 5_576_000, "$5.58M"),
        ("USD", 0.27, "$0.27"),
    ],
)
def test_a_cost_is_said_in_its_unit(unit: Any, number: float, said: str) -> None:
    assert Column("", "", unit).said(number) == said


def test_what_is_the_same_everywhere_is_told_once(tmp_path: Path) -> None:
    assert [(column.label, said) for column, said in drawn().same()] == [("active for one token", "70")]
    out = run(TINY, "--sweep", f"{EXPERTS}=8,16").stdout
    assert "Everywhere the same: cache per token 192 bytes." in out
    assert out.count("192 bytes") == 1


def test_a_chart_has_a_line_for_each_other_value_along_the_first_axis() -> None:
    total, memory = panels(drawn())
    # What is the same everywhere is not drawn.
    assert (total.column.path, memory.column.path) == ("parameters.total", "memory.ranks.*.total")
    # 1, 2 and 16 span a magnitude: 2 stands a quarter of the way.
    assert places(drawn()) == {"1": 0, "2": 0.25, "16": 1}
    assert [(line.label, line.points) for line in total.lines] == [
        ("x.kind a", ((0, 100), (0.25, 200))),
        ("x.kind b", ((0, 400), (0.25, 800), (1, 1600))),
    ]
    assert total.illegal == (1,)
    assert total.low == 0 and total.height(1600) < 1 < total.height(1600 * 1.1)
    assert all(total.low <= mark <= total.high for mark in total.marks) and len(total.marks) >= 3


def test_labels_do_not_overlap_and_legal_values_go_first() -> None:
    crowded = ("1000", "2000", "2010", "2020", "3000")
    some = sweep("x", [Axis("a", crowded)], lambda o: ({"parameters": {"total": 1}}, None))
    assert [label for label, _ in labelled(some)] == ["1000", "2000", "3000"]
    words = sweep("x", [Axis("a", ("short", "a-very-long-word"))], lambda o: ({}, None))
    assert [label for label, _ in labelled(words)] == ["short", "a-very-long…"]
    near = ("64", "100", "101", "512")
    illegal = sweep("x", [Axis("a", near)], lambda o: (None if o[0] == "a=100" else {"parameters": {}}, {}))
    assert [label for label, _ in labelled(illegal)] == ["64", "101", "512"]


def test_costs_close_together_are_drawn_apart_and_the_title_says_so() -> None:
    costs = {"1": 1000, "2": 1010}
    close = sweep("x", [Axis("a", ("1", "2"))], lambda o: ({"parameters": {"total": costs[o[0][2:]]}}, None))
    (panel,) = panels(close)
    assert panel.low > 900 and panel.title == "parameters (not from 0)"
    assert panel.height(1010) - panel.height(1000) > 0.5


@pytest.mark.parametrize(
    ("path", "costs"),
    [
        ("parameters.total", (2_744_000, 2_752_000)),
        ("parameters.total", (671_026_419_200, 671_026_419_300)),
        ("kv_cache_bytes_per_token", (70_272, 70_281)),
        ("flops_per_token.training_with_recompute", (267_400_000_000, 267_410_000_000)),
        ("training.cost_usd", (5_576_000, 5_576_900)),
        ("training.days", (0.12345, 0.12346)),
    ],
)
def test_marks_that_would_look_the_same_get_more_digits(path: str, costs: tuple[float, float]) -> None:
    def cost(override: tuple[str, ...]) -> tuple[Data | None, Data | None]:
        value: Any = costs[int(override[0][-1])]
        for step in reversed(path.split(".")):
            value = {step: value}
        return value, None

    (panel,) = panels(sweep("x", [Axis("a", ("0", "1"))], cost))
    named = panel.named()
    assert len({said for _, said in named}) == len(named) > 2
    assert [mark for mark, _ in named] == list(panel.marks)
    # Each says its mark, not one beside it.
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
    for mark, said in named:
        digits, unit = re.fullmatch(r"\$?([0-9.,]+) ?([KMBG]?).*", said).groups()  # type: ignore[union-attr]
        near = float(digits.replace(",", "")) * factor.get(unit, 1)
        assert abs(near - mark) < (panel.marks[1] - panel.marks[0]) / 2


def test_memory_is_drawn_against_that_of_the_device_where_this_is_near() -> None:
    def cost(total: int, device: int) -> Data:
        return {"memory": {"ranks": [{"total": total}], "device_bytes": device, "verdict": "FITS"}}

    def memory(device: int) -> Sweep:
        return sweep("x", [Axis("a", ("1", "2"))], lambda o: (cost(int(o[0][-1]) * 10**9, device), None))

    (near,), (far,) = panels(memory(3 * 10**9)), panels(memory(80 * 10**9))
    assert near.rule == 3e9 <= near.high and near.title == "memory of the heaviest rank (of 3.00 GB)"
    assert far.rule is None and far.high < 4e9 and far.title == "memory of the heaviest rank (of 80.00 GB)"
    assert "3.00 GB there are" in page(memory(3 * 10**9)) and "there are" not in page(memory(80 * 10**9))


def test_costs_that_are_all_equal_are_drawn_from_zero() -> None:
    (panel,) = panels(sweep("x", [Axis("a", ("1", "2"))], lambda o: ({"parameters": {"total": 7}}, None)))
    assert panel.low == 0 < panel.height(7) < 1


def test_words_have_no_order_to_join_by_a_line() -> None:
    (panel,) = panels(sweep("x", [Axis("a", ("b", "c"))], lambda o: ({"parameters": {"total": len(o[0])}}, None)))
    assert not panel.joined
    assert panels(drawn())[0].joined


def test_twenty_lines_are_told_apart() -> None:
    assert len({style(index) for index in range(20)}) == 20
    assert len({(colour, mark) for colour, _, mark in map(style, range(20))}) == 20


def test_the_page_is_one_file_that_asks_for_nothing_and_says_every_number(tmp_path: Path) -> None:
    text = page(drawn())
    assert not re.search(r"<script|\ssrc=|url\(|@import|<link", text)
    assert "it &lt;cannot&gt; be" in text and "do &amp; not" in text
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    titles = [each.text for each in root.iter("title")]
    assert "x.kind b: 1,600" in titles and "x.kind a: 200" in titles
    cells = [each.text for each in root.iter("td")]
    assert "1,600" in cells and cells.count("70") == 5


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_the_plot_is_written_where_it_was_asked_for(tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"plot.{suffix}"
    run(TINY, "--sweep", f"{EXPERTS}=8,9,16", "--plot", str(plot))
    begin = plot.read_bytes()[:8]
    assert begin == (b"\x89PNG\r\n\x1a\n" if suffix == "png" else b"<!DOCTYP")
    assert list(tmp_path.iterdir()) == [plot]
