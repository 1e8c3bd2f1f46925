"""validate for CI: globs, changed specs, policies, corrections, formats, and how each call ends."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from modelspec.cli import app

ROOT = Path(__file__).parents[2]
SPEC = """\
spec_version: 1
name: small
model:
  vocab_size: 64
  hidden_size: 32
  max_position: 128
  init: {std: 0.02}
  norm: {type: rmsnorm, eps: 1.0e-6}
  attention: {gqa: {type: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8, rope: {theta: 10000, layout: half_split}}}
  ffn: {dense: {type: dense, intermediate_size: 64, activation: {type: swiglu}}}
  layers: [{repeat: 2, attention: gqa, ffn: dense}]
"""
Git = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a project with two specs, one of which extends the other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    specs = tmp_path / "specs"
    (specs / "deep").mkdir(parents=True)
    (specs / "base.yaml").write_text(SPEC)
    (specs / "deep" / "leaf.yaml").write_text("name: leaf\nextends: ../base.yaml\n")
    return tmp_path


@pytest.fixture
def git(folder: Path) -> Git:
    def run(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)

    run("init", "--quiet", "--initial-branch=main")
    run("add", ".")
    run("commit", "--quiet", "-m", "one")
    return run


def run(*arguments: str) -> Result:
    """The command with these arguments."""
    return CliRunner().invoke(app, ["validate", *arguments])


def checked(result: Result) -> list[str]:
    """The specs that a text output sums up."""
    return [line.split(":")[0] for line in result.output.splitlines() if re.search(r": (valid|\d+ errors?)\b", line)]


def test_globs_are_written_out_sorted_and_each_once(folder: Path) -> None:
    result = run("specs/**/*.yaml", "specs/base.yaml", "specs/*.yaml")
    assert result.exit_code == 0, result.output
    assert checked(result) == ["specs/base.yaml", "specs/deep/leaf.yaml"]
    (folder / "specs" / "[odd].yaml").write_text(SPEC)
    assert checked(run("specs/[odd].yaml")) == ["specs/[odd].yaml"]


def test_a_glob_that_matches_nothing_is_misuse(folder: Path) -> None:
    result = run("specs/base.yaml", "spec/*.yaml")
    assert result.exit_code == 2
    assert "spec/*.yaml matches no file" in result.output


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "name", ["link.yaml", "*.yaml", "ld/secret.yaml", "ld/*.yaml", "*/*.yaml", "d/up/ld/*.yaml", "far/*.yaml"]
)
def test_no_link_on_the_way_leads_out_of_the_project_unless_allowed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, marked: bool, name: str
) -> None:
    (outside := tmp_path_factory.mktemp("outside") / "secret.yaml").write_text("pasword: hunter2\n")
    # A project of its own at the target does not change where the link stands.
    (outside.parent / "pyproject.toml").touch()
    (linked := folder / "linked" / "d").mkdir(parents=True)
    if not marked:
        (folder / "pyproject.toml").unlink()
    (linked / "up").symlink_to("..")
    (linked.parent / "link.yaml").symlink_to(outside)
    (linked.parent / "ld").symlink_to(outside.parent)
    # One link after another, the first of them inside.
    (linked.parent / "far").symlink_to("ld")
    monkeypatch.chdir(linked.parent)
    for where in (name, str(linked.parent / name)):
        for options in (["--fix"], ["--format", "json"]):
            result = run(where, *options)
            assert result.exit_code == 2 and "MS103" in result.output and "hunter2" not in result.output
    assert outside.read_text() == "pasword: hunter2\n"
    outside.write_text(SPEC.replace("hidden_size", "hiden_size"))
    assert run(name, "--allow-outside", "--fix").exit_code == 0
    assert outside.read_text() == SPEC


def test_links_that_lead_to_a_project_from_above_it_are_followed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home") / "work"
    home.symlink_to(folder)
    assert run(str(home / "specs" / "deep" / "leaf.yaml"), f"{home}/specs/*.yaml").exit_code == 0
    # What is extended is bound by the project that they lead to.
    (folder.parent / "base.yaml").write_text(SPEC)
    (folder / "far.yaml").write_text("name: far\nextends: ../base.yaml\n")
    assert "MS103" in run(str(home / "far.yaml")).output
    (folder.parent / "base.yaml").unlink()


def test_a_linked_folder_inside_the_project_is_read_and_corrected(folder: Path) -> None:
    (folder / "ld").symlink_to("specs/deep")
    leaf = folder / "specs" / "deep" / "leaf.yaml"
    leaf.write_text("naem: leaf\nextends: ../base.yaml\n")
    assert run("ld/*.yaml", "--fix").exit_code == 0
    assert leaf.read_text() == "name: leaf\nextends: ../base.yaml\n"


@pytest.mark.parametrize("command", ["validate", "validate --fix", "show", "plan", "diff specs/base.yaml", "doctor"])
def test_a_spec_that_is_a_link_out_of_the_project_is_not_read(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, command: str
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.yaml"
    outside.write_text("password: hunter2\n")
    (folder / "specs" / "link.yaml").symlink_to(outside)
    result = CliRunner().invoke(app, [*command.split(), "specs/link.yaml"])
    told = result.output + str(result.exception or "")
    assert f"specs/link.yaml:1:1: error[MS103]: specs/link.yaml lies outside of {folder}" in told
    assert "--allow-outside" in told and "hunter2" not in told
    assert outside.read_text() == "password: hunter2\n"
    if command.startswith("validate"):
        assert result.exit_code == 2
        # What it holds is shown when that was asked for.
        assert "hunter2" in CliRunner().invoke(app, [*command.split(), "specs/link.yaml", "--allow-outside"]).output


def test_a_link_that_stays_inside_is_read_and_corrected_where_it_leads(folder: Path) -> None:
    base, link = folder / "specs" / "base.yaml", folder / "link.yaml"
    base.write_text(SPEC.replace("hidden_size", "hiden_size"))
    link.symlink_to("specs/base.yaml")
    assert run("link.yaml").exit_code == 1
    result = run("link.yaml", "--fix")
    assert result.exit_code == 0, result.output
    assert "link.yaml:5:3: fixed" in result.output
    assert base.read_text() == SPEC and link.is_symlink()


def test_the_project_of_a_link_is_that_of_the_folder_where_it_stands(folder: Path) -> None:
    # Its target is in a project of its own, below.
    inner = folder / "inner"
    inner.mkdir()
    (inner / "pyproject.toml").touch()
    (inner / "link.yaml").symlink_to("../specs/base.yaml")
    (folder / "specs" / "link.yaml").symlink_to("../inner/own.yaml")
    (inner / "own.yaml").write_text(SPEC)
    assert run("inner/link.yaml").exit_code == 2
    assert run("specs/link.yaml").exit_code == 0


def test_includes_leave_the_project_only_when_allowed_and_are_files_even_then(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "base.yaml"
    outside.write_text(SPEC)
    leaf = folder / "specs" / "far.yaml"
    leaf.write_text(f"name: far\nextends: {outside}\n")
    result = run("specs/far.yaml")
    assert result.exit_code == 1 and "MS103" in result.output and "--allow-outside" in result.output
    assert run("specs/far.yaml", "--allow-outside").exit_code == 0
    for name in ("https://example.org/base.yaml", "/dev/zero", "/dev/stdin", str(folder)):
        leaf.write_text(f"name: far\nextends: {name}\n")
        result = run("specs/far.yaml", "--allow-outside")
        assert result.exit_code == 1 and re.search("MS10[23]", result.output), result.output


def test_what_is_inherited_or_set_says_where_it_comes_from(folder: Path) -> None:
    (folder / "specs" / "base.yaml").write_text(SPEC.replace("vocab_size: 64", "vocab_size: 0"))
    result = run("specs/deep/leaf.yaml", "--set", "name=x", "--set", "model.hidden_size=0")
    assert result.exit_code == 1
    assert "specs/base.yaml:4:15: error[MS204]" in result.output
    assert "  note: specs/deep/leaf.yaml:2:10: inherited from specs/base.yaml:4\n" in result.output
    assert "--set:2:19: error[MS204]" in result.output
    assert "  note: specs/base.yaml:5:3: set by --set #2, which overrides this\n" in result.output
    found = json.loads(run("specs/deep/leaf.yaml", "--format", "json").stdout)["diagnostics"]
    assert found[0]["related"] == [
        {
            "path": "model.vocab_size",
            "file": "specs/deep/leaf.yaml",
            "line": 2,
            "column": 10,
            "message": "inherited from specs/base.yaml:4",
        }
    ]


def test_a_parent_that_is_no_spec_is_shown_with_what_extends_it(folder: Path) -> None:
    (folder / "specs" / "base.yaml").write_text("spec_version: 1\nmodel: [1\n")
    result = run("specs/deep/leaf.yaml")
    assert result.exit_code == 1
    assert re.search(r"^specs/base.yaml:\d+:\d+: error\[MS005\]", result.output)
    assert re.search(r"  note: specs/deep/leaf.yaml:2:10: inherited from specs/base.yaml:\d+\n", result.output)


def test_only_what_changed_is_checked_by_any_file_that_it_is_read_from(folder: Path, git: Git) -> None:
    everything = ("specs/**/*.yaml", "--changed-since", "main")
    result = run(*everything)
    assert (result.exit_code, result.output) == (0, "no spec changed since main\n")
    git("checkout", "--quiet", "-b", "topic")
    (folder / "specs" / "new.yaml").write_text(SPEC)
    assert checked(run(*everything)) == ["specs/new.yaml"]
    (folder / "specs" / "base.yaml").write_text(SPEC.replace("std: 0.02", "std: 0.03"))
    assert checked(run(*everything)) == ["specs/base.yaml", "specs/deep/leaf.yaml", "specs/new.yaml"]
    git("commit", "--quiet", "-a", "-m", "two")
    assert checked(run(*everything)) == ["specs/base.yaml", "specs/deep/leaf.yaml", "specs/new.yaml"]
    assert checked(run("specs/**/*.yaml", "--changed-since", "HEAD")) == ["specs/new.yaml"]
    # What others did on main meanwhile is no change of this branch.
    git("stash", "--quiet", "--include-untracked")
    git("checkout", "--quiet", "main")
    (folder / "specs" / "deep" / "leaf.yaml").write_text("name: leaf2\nextends: ../base.yaml\n")
    git("commit", "--quiet", "-a", "-m", "three")
    git("checkout", "--quiet", "-b", "other", "main~1")
    assert checked(run(*everything)) == []


def test_a_spec_whose_parent_is_gone_counts_as_changed(folder: Path, git: Git) -> None:
    (folder / "specs" / "base.yaml").unlink()
    result = run("specs/deep/leaf.yaml", "--changed-since", "HEAD")
    assert result.exit_code == 1 and "MS102" in result.output


@pytest.mark.parametrize("command", ["validate specs/base.yaml --changed-since", "diff specs/base.yaml --against"])
def test_an_environment_without_git_is_no_misuse(
    folder: Path, git: Git, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("PATH", str(folder / "specs"))
    result = CliRunner().invoke(app, [*command.split(), "git:main"])
    assert result.exit_code == 3 and "git is not installed" in result.output


@pytest.mark.parametrize("revision", ["none", "--output=x", ""])
def test_a_wrong_revision_is_misuse(folder: Path, git: Git, revision: str) -> None:
    result = run("specs/base.yaml", "--changed-since", revision)
    assert result.exit_code == 2 and "no revision" in result.output


def test_a_changed_policy_makes_every_spec_count(folder: Path, git: Git) -> None:
    (folder / "policy.yaml").write_text("properties: {name: {title: our names, pattern: '^x'}}\n")
    result = run("specs/**/*.yaml", "--changed-since", "HEAD", "--policy", "policy.yaml")
    assert result.exit_code == 1
    assert checked(result) == ["specs/base.yaml", "specs/deep/leaf.yaml"]
    assert 'specs/base.yaml:2:7: error[MS602]: our names (name is small, must match "^x")' in result.output


@pytest.mark.parametrize("output", ["text", "json", "github", "sarif", "junit"])
def test_a_policy_that_cannot_be_used_is_misuse_in_every_format(folder: Path, output: str) -> None:
    (folder / "policy.yaml").write_text("propertys: {}\n")
    result = run("specs/base.yaml", "--policy", "policy.yaml", "--format", output)
    assert result.exit_code == 2
    assert "MS601" in result.output and "policy.yaml" in result.output


@pytest.mark.parametrize("command", ["validate", "validate --fix", "plan", "show", "build", "train"])
def test_a_config_of_hugging_face_is_told_what_takes_it(folder: Path, command: str) -> None:
    text = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "modle": {}}, indent=2)
    (folder / "config.json").write_text(text)
    result = CliRunner().invoke(app, [*command.split(), "config.json"])
    told = result.output + str(result.exception or "")
    assert "config.json:5:3: error[MS017]: this is a config.json of Hugging Face, not a spec" in told
    assert "`modelspec init --from config.json --name NAME`" in told
    assert "`modelspec import DIR`" in told and "`modelspec diff`" in told
    # Nothing else is said of it, and nothing corrected.
    assert told.count("error[") == 1 and (folder / "config.json").read_text() == text


def test_a_policy_that_takes_too_long_is_run_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelspec.policy.MAX_SECONDS", 0.5)
    (folder / "policy.yaml").write_text("properties: {name: {pattern: '^(\\w+\\w*)+!'}}\n")
    for number in range(8):
        (folder / "specs" / f"{number}.yaml").write_text(SPEC.replace("small", "a" * 60))
    started = time.process_time()
    result = run("specs/?.yaml", "--policy", "policy.yaml")
    assert time.process_time() - started < 3
    assert result.exit_code == 2 and result.output.count("MS603") == 8


def test_fix_corrects_says_so_and_reports_what_remains(folder: Path) -> None:
    base = folder / "specs" / "base.yaml"
    base.write_text(SPEC.replace("hidden_size", "hiden_size  ").replace("vocab_size: 64", "vocab_size: 0"))
    result = run("specs/**/*.yaml", "--fix")
    assert result.exit_code == 1
    assert "specs/base.yaml:5:3: fixed: 'hiden_size' is now 'hidden_size'\n" in result.stdout
    assert "hiden_size" not in result.stderr and "model.vocab_size must be" in result.stderr
    assert base.read_text() == SPEC.replace("hidden_size", "hidden_size  ").replace("vocab_size: 64", "vocab_size: 0")


def test_fix_leaves_the_document_on_stdout_alone_and_never_touches_what_is_set(folder: Path) -> None:
    base = folder / "specs" / "base.yaml"
    base.write_text(SPEC.replace("hidden_size", "hiden_size"))
    result = run("specs/base.yaml", "--fix", "--format", "json", "--set", "model.hiden_size=8")
    assert json.loads(result.stdout)["valid"] is False
    # What is set stands above the file's key, and is not the file's fault.
    assert base.read_text() == SPEC.replace("hidden_size", "hiden_size") or base.read_text() == SPEC


def test_every_format_ends_alike_and_gives_one_document(folder: Path) -> None:
    (folder / "specs" / "bad.yaml").write_text(SPEC.replace("hidden_size: 32", "hidden_size: 0"))
    ends = {}
    for output in ("text", "json", "github", "sarif", "junit"):
        result = run("specs/*.yaml", "--format", output)
        ends[output] = result.exit_code
        if output in ("json", "sarif"):
            json.loads(result.stdout)
        if output == "junit":
            assert ElementTree.fromstring(result.stdout).get("failures") == "1"
        if output == "github":
            assert result.stdout.startswith("::error file=specs/bad.yaml,line=5,col=16,title=modelspec MS204::")
    assert set(ends.values()) == {1}


@pytest.mark.parametrize("output", ["json", "sarif", "junit", "github"])
def test_every_document_is_utf8_whatever_a_file_is_called(folder: Path, output: str) -> None:
    name = os.fsdecode(b"specs/odd-\xff.yaml")
    (folder / name).write_text(SPEC.replace("hidden_size: 32", "hidden_size: 0"))
    leaf = folder / "specs" / "leaf.yaml"
    leaf.write_text(f"name: leaf\nextends: {name}\n", errors="surrogateescape")
    result = run(name, "specs/leaf.yaml", "specs/deep/leaf.yaml", "--format", output)
    text = result.stdout_bytes.decode("utf-8")
    assert result.exit_code == 1 and not re.search(r"\\u[dD][89a-fA-F]", text)
    assert "odd-\ufffd.yaml" in text or "odd-%FF.yaml" in text
    if output in ("json", "sarif"):
        json.loads(text)
    if output == "junit":
        ElementTree.fromstring(text)


def test_strict_counts_warnings_in_every_format(folder: Path) -> None:
    warned = ("specs/base.yaml", "--set", "model.attention.gqa.rope=none")
    for output in ("text", "json", "github", "sarif", "junit"):
        assert run(*warned, "--format", output).exit_code == 0
        assert run(*warned, "--format", output, "--strict").exit_code == 1


def _hooks() -> list[dict[str, object]]:
    return list(YAML(typ="safe", pure=True).load((ROOT / ".pre-commit-hooks.yaml").read_text()))


def test_the_pre_commit_hooks_are_commands_that_run(folder: Path) -> None:
    for hook in _hooks():
        assert {"id", "name", "entry", "language", "description"} <= hook.keys()
        program, command, *options = shlex.split(str(hook["entry"]))
        assert (program, command) == ("modelspec", "validate")
        assert run(*options, "specs/base.yaml", "specs/deep/leaf.yaml").exit_code == 0
        assert re.search(str(hook["files"]), "specs/a.yaml") and re.search(str(hook["files"]), "x/specs/deep/a.yml")
        assert not re.search(str(hook["files"]), "mkdocs.yaml")


def test_the_workflow_runs_as_it_stands(folder: Path, git: Git) -> None:
    text = (ROOT / "docs" / "ci" / "modelspec.yml").read_text()
    workflow = YAML(typ="safe", pure=True).load(text)
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read", "security-events": "write"}
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert any(use.startswith("github/codeql-action/upload-sarif@") for use in uses)
    scripts = [step["run"] for step in job["steps"] if "modelspec validate" in step.get("run", "")]
    assert len(scripts) == 2
    # Nothing that a pull request names is written into a script.
    assert not any("${{" in script for script in scripts)
    (folder / "policy.yaml").write_text((ROOT / "docs" / "ci" / "policy.yaml").read_text())
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "BASE": "origin/main"}

    def ends() -> list[int]:
        return [
            subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, check=False).returncode
            for script in scripts
        ]

    assert ends() == [0, 0]
    (folder / "specs" / "base.yaml").write_text(SPEC.replace("hidden_size: 32", "hidden_size: 0"))
    assert ends() == [1, 0]
    (run_,) = json.loads((folder / "modelspec.sarif").read_text())["runs"]
    assert run_["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "specs/base.yaml"


def test_the_policy_of_the_docs_lets_nano_pass_and_stops_a_huge_world() -> None:
    policy, nano = str(ROOT / "docs" / "ci" / "policy.yaml"), str(ROOT / "specs" / "deepseek-v3-nano.yaml")
    assert run(nano, "--policy", policy).exit_code == 0
    for override in ("parallelism.world_size=4096", "model.ffn.moe.router.selection.bias=false"):
        result = run(nano, "--policy", policy, "--set", override)
        assert result.exit_code == 1 and "MS602" in result.output
