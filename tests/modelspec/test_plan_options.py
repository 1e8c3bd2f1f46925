"""Options of plan: what means nothing is refused by its name, and no number without end gets in or out."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelspec.amount import figure
from modelspec.cli import app

NANO = str(Path(__file__).parents[2] / "specs" / "deepseek-v3-nano.yaml")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["plan", NANO, *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["--tokens", "--price", "--imbalance", "--acceptance"])
def test_a_number_without_end_is_refused_by_the_name_of_its_option(option: str, number: str) -> None:
    with_serve = ("--serve",) if option == "--acceptance" else ()
    assert f"'{option}'" in run(option, number, *with_serve, code=2).output


def test_a_price_below_nothing_is_no_price_and_one_of_minus_nothing_is_nothing() -> None:
    assert "'--price'" in run("--price", "-1", code=2).output
    said = run("--price", "-0").output
    assert "costs $0 an hour" in said and "$-0" not in said


ONE = ("--sweep", "model.vocab_size=4096,8192")
PIPELINE = ("--set", "parallelism={world_size: 2, pipeline: {size: 2}}")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plan.json", ("--out",)),
        ("x.svg", (*PIPELINE, "--timeline")),
        ("x.html", (*PIPELINE, "--timeline")),
        ("x.html", (*ONE, "--plot")),
        ("x.png", (*ONE, "--plot")),
        ("x.png", ("--search", "--gpus", "1", "--plot")),
    ],
)
def test_a_file_is_replaced_only_if_the_command_wrote_it(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("<html>hand-made</html>\n" * 100)
    said = run(*arguments, str(file), code=2).output
    assert f"'{arguments[-1]}'" in said and "did not write it" in said
    assert file.read_text() == "<html>hand-made</html>\n" * 100
    file.unlink()
    run(*arguments, str(file))
    first = file.read_bytes()
    run(*arguments, str(file))
    assert file.read_bytes() == first != b""


@pytest.mark.parametrize(
    "arguments",
    [("--out", ""), ("--timeline", ""), (*ONE, "--plot", ""), ("--search", "--overlay", ""), ("--calibrated", "")],
)
def test_a_file_without_a_name_is_said_to_be_none(arguments: tuple[str, ...]) -> None:
    said = run(*arguments, code=2).output
    assert arguments[-2] in said and "names no file" in said


def test_an_empty_name_of_a_spec_or_a_device_says_which_it_is() -> None:
    result = CliRunner().invoke(app, ["plan", ""])
    assert result.exit_code == 2 and "SPEC is empty" in result.output
    device = CliRunner().invoke(app, ["plan", NANO, "--hardware", ""])
    assert "the name of the hardware is empty" in str(device.exception)


def test_a_calibrated_file_whose_price_and_power_somebody_set_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: modelspec:hardware/h100\nname: mine\npower: 512\n")
    said = run("--measure", "--calibrated", str(file), code=2).output
    assert "exists" in said and f"--hardware {file}" in said
    assert "power: 512" in file.read_text()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2_788_000.4, "2,788,000"),
        (100.0, "100"),
        (99.96, "100"),
        (55.81, "55.8"),
        (0.0012345, "0.00123"),
        (0.0, "0"),
        (-0.5, "-0.5"),
    ],
)
def test_an_estimate_is_said_in_its_first_digits(value: float, said: str) -> None:
    assert figure(value) == said


def test_a_small_model_served_for_little_or_nothing_costs_what_it_costs() -> None:
    assert "$0.000" not in run("--serve", "--price", "0.001").output
    nothing = run("--serve", "--price", "0", "--list-price", "0.27,1.10").output
    assert "cost $0.000; the vendor's list price that was given is $0.27." in nothing
