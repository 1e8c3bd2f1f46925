"""Pictures: that they show every tensor and nothing else, stay well-formed whatever a spec says, and can be read."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import modelspec
from modelspec.cli import app
from modelspec.picture import comparison, draw, figure, page
from modelspec.picture.anatomy import Experts, Run, Section, anatomy, fold
from modelspec.picture.palette import DARK, LIGHT, TEXT, Theme
from modelspec.plan import parameters
from modelspec.schema import ModelSpec

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script> & \" ' --> ]]> &amp; {{x}} \x00\x0b\ud800 \u202e"


@cache
def load(name: str) -> ModelSpec:
    """A shipped spec."""
    return modelspec.load(str(ROOT / "specs" / f"{name}.yaml"))


@pytest.fixture(scope="module", params=SPECS, ids=lambda path: path.stem)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    """Each shipped spec in turn."""
    return load(request.param.stem)


def elements(source: str) -> ElementTree.Element:
    """The document, read as XML; a page of ours is both."""
    return ElementTree.fromstring(source.removeprefix("<!DOCTYPE html>\n"))


def table_rows(root: ElementTree.Element, label: str) -> Iterator[list[str]]:
    """The cells of the rows in the bodies of tables whose label starts so."""
    for table in root.iter("table"):
        if table.attrib["aria-label"].startswith(label):
            for row in table.iterfind("tbody/tr"):
                yield ["".join(cell.itertext()) for cell in row]


class Balanced(HTMLParser):
    """Reads HTML by its own rules and keeps what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.targets += [value for key, value in attrs if key == "href" and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_tensor_is_in_the_page_and_the_counts_add_up(spec: ModelSpec) -> None:
    rows = list(table_rows(elements(page(spec)), "Tensors of"))
    counted = 0
    for name, shape, numel, copies in rows:
        size = 1
        for dim in shape.replace(",", "").split(" × "):
            size *= int(dim)
        assert size == int(numel.replace(",", "")), name
        counted += size * int(copies.replace(",", ""))
    counts = parameters(spec)
    assert counted == counts.total + counts.mtp
    assert sum(int(copies.replace(",", "")) for *_, copies in rows) == len(spec.tensors())


def test_active_parameters_of_the_parts_are_those_of_the_plan(spec: ModelSpec) -> None:
    parts = anatomy(spec).parts
    assert sum(part.active for key, part in parts.items() if key != "mtp") == parameters(spec).active


def test_the_figure_names_every_tensor_of_every_part(spec: ModelSpec) -> None:
    said = {"".join(text.itertext()) for text in elements(figure(spec)).iter(f"{SVG}text")}
    for part in anatomy(spec).parts.values():
        for row in part.rows:
            if not row.name.startswith("block."):
                assert f"{row.tensor.numel:,}" in said, row.name
                assert any(row.name in text for text in said), row.name


def test_sections_are_the_layers_in_order(spec: ModelSpec) -> None:
    model = anatomy(spec)
    drawn = [
        (run.attention.removeprefix("attention."), run.ffn.removeprefix("ffn."))
        for run in model.runs()
        for _ in range(run.layers)
    ]
    assert drawn == [(layer.attention, layer.ffn) for layer in spec.model.expanded_layers()]


@pytest.mark.parametrize(("name", "said"), [("gpt-oss-20b", (12, 2)), ("qwen3-next-80b-a3b", (12, 2))])
def test_repeating_runs_become_one_section(name: str, said: tuple[int, int]) -> None:
    (section,) = anatomy(load(name)).sections
    assert (section.repeat, len(section.runs)) == said


def test_a_pattern_is_found_behind_a_prefix_and_before_a_rest() -> None:
    a, b, c = (Run(1, f"attention.{name}", "ffn.f", 1) for name in "abc")
    assert fold([c, a, b, a, b, a, b, c]) == (Section(1, (c,)), Section(3, (a, b)), Section(1, (c,)))
    assert fold([a, b, c]) == tuple(Section(1, (run,)) for run in (a, b, c))


def test_how_an_author_cut_the_layers_changes_no_picture() -> None:
    spec = load("deepseek-v3-nano")
    layers = tuple(spec.model.expanded_layers())
    cut = spec.model_copy(update={"model": spec.model.model_copy(update={"layers": layers})})
    assert (page(cut), figure(cut)) == (page(spec), figure(spec))


@pytest.mark.parametrize(
    "experts",
    [Experts(256, 8, 8, 4, 1), Experts(160, 6, 8, 3, 2), Experts(512, 10, 1, 1, 1), Experts(8, 2, 1, 1, 0)],
    ids=str,
)
def test_the_example_of_experts_is_a_choice_that_the_router_could_make(experts: Experts) -> None:
    chosen = draw.example(experts)
    assert len(set(chosen)) == len(chosen) == experts.used
    assert all(0 <= expert < experts.total for expert in chosen)
    group = experts.total // experts.groups
    assert len({expert // group for expert in chosen}) <= experts.used_groups


def pictures(spec: ModelSpec) -> dict[str, str]:
    """Every kind of picture of a spec."""
    return {"page": page(spec), "figure": figure(spec), "comparison": comparison(load("deepseek-v3"), spec)}


@pytest.fixture(scope="module")
def drawn(spec: ModelSpec) -> dict[str, str]:
    """Every kind of picture of each shipped spec in turn."""
    return pictures(spec)


def test_pictures_are_well_formed_and_ask_for_nothing(drawn: dict[str, str]) -> None:
    for source in drawn.values():
        root = elements(source)
        assert not list(root.iter("script")) and not list(root.iter(f"{SVG}script"))
        assert set(re.findall(r"\w+://[^\"' <]*", source)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"@import|url\(|\ssrc=|\son\w+=", source)


def test_pages_are_balanced_html_with_headings_in_order_and_links_that_lead_somewhere(drawn: dict[str, str]) -> None:
    for name in ("page", "comparison"):
        parser = Balanced()
        parser.feed(drawn[name].replace('<meta charset="utf-8"/>', ""))
        assert not parser.open
        assert parser.headings[0] == 1 and parser.headings.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(parser.headings))
        assert len(set(parser.ids)) == len(parser.ids)
        assert {target.removeprefix("#") for target in parser.targets} <= set(parser.ids)


def test_every_drawing_says_in_words_what_it_shows(drawn: dict[str, str]) -> None:
    for source in drawn.values():
        root = elements(source)
        for svg in (each for each in root.iter() if each.tag in ("svg", f"{SVG}svg")):
            if svg.get("aria-hidden") != "true":
                assert svg.get("role") == "img"
                title = svg.find("title") if svg.find("title") is not None else svg.find(f"{SVG}title")
                assert title is not None and title.text


def test_what_a_spec_says_stays_text() -> None:
    # Not through a file: YAML refuses some of these characters earlier, and a picture must not rely on it.
    spec = load("deepseek-v3-nano").model_copy(update={"name": HOSTILE, "summary": HOSTILE})
    for source in pictures(spec).values():
        root = elements(source)
        source.encode()
        assert not [each for each in root.iter() if "script" in each.tag]
        assert "<script>alert(1)</script> & \" ' --> ]]> &amp; {{x}} \ufffd\ufffd\ufffd" in "".join(root.itertext())


def test_equal_specs_give_equal_pictures_in_every_process() -> None:
    program = (
        "import modelspec, hashlib; from modelspec.picture import *; "
        "a, b = (modelspec.load(f'specs/{n}.yaml') for n in ('deepseek-v3', 'gpt-oss-20b')); "
        "print(hashlib.sha256((page(a) + figure(b) + comparison(a, b)).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_the_committed_figure_is_current() -> None:
    file = "docs/images/deepseek-v3.svg"
    command = f"modelspec show specs/deepseek-v3.yaml --format svg -o {file}"
    assert (ROOT / file).read_text() == figure(load("deepseek-v3")), f"make it anew: {command}"


def test_a_comparison_tells_new_gone_and_reshaped_tensors_by_sign_and_word() -> None:
    root = elements(comparison(load("deepseek-v2"), load("deepseek-v3")))
    marks = {cells[1]: cells[0] for cells in table_rows(root, "Tensors of moe")}
    assert marks["router.selection_bias"] == "+ new"
    assert marks["experts.down_proj"] == "~ reshaped"
    (reversed_mark,) = {
        cells[0]
        for cells in table_rows(elements(comparison(load("deepseek-v3"), load("deepseek-v2"))), "Tensors of moe")
        if cells[1] == "router.selection_bias"
    }
    assert reversed_mark == "- gone"


def test_a_comparison_lists_every_change_with_its_class() -> None:
    old, new = load("deepseek-v3"), load("deepseek-v3.2")
    root = elements(comparison(old, new))
    for name in {change.change_class for change in modelspec.diff(old, new)}:
        listed = [cells[1] for cells in table_rows(root, f"Changes of class {name}")]
        assert listed == [change.path for change in modelspec.diff(old, new) if change.change_class == name]


def test_a_spec_and_itself_under_other_names_have_nothing_to_show() -> None:
    spec = load("gpt-oss-20b")
    renamed = modelspec.load(str(ROOT / "specs" / "gpt-oss-20b.yaml"), overrides=["name=gpt-oss-20b"])
    root = elements(comparison(spec, renamed))
    assert "no change" in "".join(root.itertext())
    assert not list(root.iter("article"))


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme: Theme) -> None:
    for colour in TEXT:
        for ground in ("paper", "card", *([f"{colour}-ground"] if f"{colour}-ground" in theme else [])):
            one, other = sorted((luminance(theme[colour]), luminance(theme[ground])), reverse=True)
            assert (one + 0.05) / (other + 0.05) >= 4.5, (colour, ground)


@pytest.mark.parametrize("form", ["html", "svg"])
def test_show_prints_a_picture_or_writes_it(form: str, tmp_path: Path) -> None:
    spec = str(ROOT / "specs" / "deepseek-v3-nano.yaml")
    printed = CliRunner().invoke(app, ["show", spec, "--format", form])
    written = CliRunner().invoke(app, ["show", spec, "--format", form, "-o", str(tmp_path / "picture")])
    assert (printed.exit_code, written.exit_code, written.output) == (0, 0, "")
    assert (tmp_path / "picture").read_text() == printed.output
    assert [path.name for path in tmp_path.iterdir()] == ["picture"]


def test_diff_draws_both_models_and_still_answers_by_its_exit_code(tmp_path: Path) -> None:
    specs = [str(ROOT / "specs" / f"deepseek-{name}.yaml") for name in ("v2", "v3")]
    file = tmp_path / "diff.html"
    result = CliRunner().invoke(app, ["diff", *specs, "--format", "html", "--breaking", "-o", str(file)])
    assert result.exit_code == 1
    assert "<h1>deepseek-v2 → deepseek-v3</h1>" in file.read_text()


@pytest.mark.parametrize("target", ["missing/picture.svg", "folder", "/dev/null"])
def test_a_place_that_cannot_hold_the_picture_is_misuse(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    spec = str(ROOT / "specs" / "deepseek-v3-nano.yaml")
    result = CliRunner().invoke(app, ["show", spec, "--format", "svg", "-o", str(tmp_path / target)])
    assert result.exit_code == 2
    assert "-o" in result.output


def test_pictures_need_no_torch() -> None:
    program = "import sys, modelspec.picture; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_experts_that_validate_would_refuse_are_still_drawn() -> None:
    for experts in (Experts(4, 2, 8, 2, 0), Experts(10, 12, 3, 5, 99), Experts(1, 1, 1, 1, 1)):
        assert draw.experts(experts, "experts-0") is not None


def test_very_many_experts_are_told_in_words() -> None:
    assert draw.experts(Experts(draw.MOST_EXPERTS + 1, 8, 1, 1, 0), "experts-0") is None


def test_a_model_without_a_summary_has_a_picture() -> None:
    spec = load("deepseek-v3-nano").model_copy(update={"summary": None})
    assert anatomy(spec).summary == ""
    for source in pictures(spec).values():
        elements(source)
