"""Options of plan: what means nothing is refused by its name, and no number without end gets in or out."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

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
