"""What commands read from git: specs that changed since a revision, and a spec as it was at one."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelspec.cli import app

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
WIDER = SPEC.replace("intermediate_size: 64", "intermediate_size: 96")
CONFIG = {
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 128},
}
Commit = Callable[..., None]


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *who, "-c", "protocol.file.allow=always", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def made(folder: Path, **files: str) -> Path:
    """A repository with these files under specs/, in one commit on main."""
    (folder / "specs").mkdir(parents=True)
    for name, text in files.items():
        (folder / "specs" / f"{name}.yaml").write_text(text)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "one")
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a repository with one spec."""
    folder = made(tmp_path / "here", base=SPEC)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def commit(repository: Path) -> Commit:
    """Commits all that is there."""

    def run(*options: str) -> None:
        git(repository, "add", "--force", ".")
        git(repository, "commit", "--quiet", "-m", "more", *options)

    return run


def run(*arguments: str) -> Result:
    """A command with these arguments."""
    return CliRunner().invoke(app, arguments)


def changed(*specs: str) -> list[str]:
    """The specs that `validate --changed-since HEAD` looks at."""
    result = run("validate", *specs, "--changed-since", "HEAD", "--allow-outside")
    assert result.exit_code == 0, result.output
    return [line.split(":")[0] for line in result.output.splitlines() if ": valid" in line]


def told(result: Result) -> str:
    """All that a command says."""
    return result.output + str(result.exception or "")


def test_specs_that_git_does_not_look_at_count_as_changed(repository: Path, tmp_path: Path, commit: Commit) -> None:
    made(tmp_path / "other", far=SPEC)
    made(repository / "nested", inner=SPEC)
    git(repository, "submodule", "--quiet", "add", str(tmp_path / "other"), "module")
    (repository / ".gitignore").write_text("nested\nlocal.yaml\n")
    (repository / "out.yaml").symlink_to(tmp_path / "other" / "specs" / "far.yaml")
    (repository / "same.yaml").symlink_to("specs/base.yaml")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "more")
    (repository / "local.yaml").write_text(SPEC)
    assert changed("specs/base.yaml", "same.yaml") == []
    for name in (
        *("module/specs/far.yaml", "nested/specs/inner.yaml", "local.yaml", "out.yaml"),
        str(tmp_path / "other" / "specs" / "far.yaml"),
    ):
        assert changed("specs/base.yaml", name) == [name]
    for flag in ("--assume-unchanged", "--skip-worktree"):
        git(repository, "update-index", flag, "specs/base.yaml")
        assert changed("specs/base.yaml") == ["specs/base.yaml"]
        git(repository, "update-index", flag.replace("--", "--no-"), "specs/base.yaml")


def test_a_link_on_the_way_that_leads_elsewhere_is_a_change(repository: Path, commit: Commit) -> None:
    for name in ("one", "two"):
        (repository / name).mkdir()
        (repository / name / "s.yaml").write_text(SPEC)
    (repository / "now").symlink_to("one")
    (repository / "alias").symlink_to("now")
    commit()
    assert changed("now/s.yaml", "alias/s.yaml") == []
    (repository / "now").unlink()
    (repository / "now").symlink_to("two")
    assert changed("now/s.yaml", "alias/s.yaml", "two/s.yaml") == ["now/s.yaml", "alias/s.yaml"]


def test_what_ships_is_no_change_and_a_repository_may_be_reached_over_a_link(
    repository: Path, tmp_path: Path, commit: Commit
) -> None:
    (repository / "leaf.yaml").write_text("extends: modelspec:deepseek-v3-nano\nname: leaf\n")
    commit()
    (tmp_path / "home").symlink_to(repository)
    assert changed("leaf.yaml", "modelspec:deepseek-v3", f"{tmp_path}/home/specs/base.yaml") == []


COMMANDS = ["validate specs/base.yaml --changed-since main", "diff specs/base.yaml --against git:main"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_repository_that_git_does_not_trust_is_the_environments_failure(
    repository: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    result = run(*command.split())
    assert result.exit_code == 3
    assert "fatal: detected dubious ownership in repository" in result.output
    assert f"git config --global --add safe.directory {repository}" in result.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("mode", "text"), [(0o644, "#!/bin/sh\n"), (0o755, "no program")])
def test_a_git_that_cannot_be_executed_is_the_environments_failure(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, mode: int, text: str
) -> None:
    (program := tmp_path / "bin" / "git").parent.mkdir()
    program.write_text(text)
    program.chmod(mode)
    monkeypatch.setenv("PATH", str(program.parent))
    result = run(*command.split())
    assert result.exit_code == 3 and "git cannot be run" in result.output


def test_links_of_a_revision_that_lead_out_are_left_out_and_others_followed(
    repository: Path, tmp_path: Path, commit: Commit
) -> None:
    (secret := tmp_path / "secret.yaml").write_text("pasword: hunter2\n")
    (repository / "absolute.yaml").symlink_to(secret)
    (repository / "out.yaml").symlink_to("../secret.yaml")
    (repository / "loop.yaml").symlink_to("loop.yaml")
    (repository / "was.yaml").symlink_to("specs/base.yaml")
    (repository / "deep").mkdir()
    (repository / "deep" / "ld").symlink_to("../specs")
    (repository / "leaf.yaml").write_text("name: leaf\nextends: deep/ld/../specs/base.yaml\n")
    commit()
    (repository / "specs" / "base.yaml").write_text(WIDER)
    (repository / "was.yaml").unlink()
    (repository / "was.yaml").write_text(WIDER)
    for name in ("specs/base.yaml", "was.yaml", "leaf.yaml"):
        assert "intermediate_size  64 -> 96" in told(run("diff", name, "--against", "git:HEAD")), name
    for name in ("absolute.yaml", "out.yaml", "loop.yaml"):
        (repository / name).unlink()
        (repository / name).write_text(SPEC)
        result = run("diff", name, "--against", "git:HEAD")
        assert result.exit_code == 2 and f"{name}: does not exist at HEAD" in result.output
        assert "hunter2" not in told(result)


@pytest.mark.parametrize("name", ["spec.YAML", "spec", "spec.txt", "odd [x]*.yaml", os.fsdecode(b"odd-\xff.yaml")])
def test_a_file_at_a_revision_may_have_any_name(
    repository: Path, monkeypatch: pytest.MonkeyPatch, commit: Commit, name: str
) -> None:
    (repository / "base").write_text(SPEC)
    (repository / name).write_text("name: leaf\nextends: [base]\n")
    (repository / ".gitattributes").write_text("* export-ignore\n")
    commit()
    (repository / "base").write_text(WIDER)
    monkeypatch.setenv("GIT_LITERAL_PATHSPECS", "1")
    result = run("diff", name, "--against", "git:HEAD")
    assert result.exit_code == 0, told(result)
    assert "intermediate_size  64 -> 96" in result.output


def test_a_config_and_folders_down_to_the_root_are_read_at_a_revision(
    repository: Path, monkeypatch: pytest.MonkeyPatch, commit: Commit
) -> None:
    (repository / "config.json").write_text(json.dumps(CONFIG))
    (repository / "run").mkdir()
    (repository / "run" / "spec.yaml").write_text(SPEC)
    commit()
    (repository / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 96}))
    (repository / "run" / "spec.yaml").write_text(WIDER)
    for name in ("config.json", ".", "run", str(repository)):
        result = run("diff", name, "--against", "git:HEAD")
        assert result.exit_code == 0, told(result)
        assert "intermediate_size  64 -> 96" in result.output
    (repository / "config.json").rename("specs/config.json")
    result = run("diff", "specs", "--against", "git:HEAD", "--format", "json")
    (found,) = json.loads(result.stdout)["diagnostics"]
    assert found["file"] == "specs at HEAD" and "neither spec.yaml nor config.json" in found["message"]


def test_faults_of_the_old_side_are_told_in_terms_of_the_repository(repository: Path, commit: Commit) -> None:
    base, leaf = repository / "specs" / "base.yaml", repository / "specs" / "leaf.yaml"
    base.write_text(SPEC.replace("hidden_size", "hiden_size"))
    leaf.write_text("name: leaf\nextends: base.yaml\n")
    (repository / "config.json").write_text('{"model_type": "none"}')
    (repository / "far.yaml").write_text("name: far\nextends: ../far.yaml\n")
    commit()
    base.write_text(SPEC)
    (repository / "config.json").write_text(json.dumps(CONFIG))
    (repository / "far.yaml").write_text(SPEC)
    text = told(run("diff", "specs/leaf.yaml", "--against", "git:HEAD"))
    assert "specs/base.yaml at HEAD:5:3: error[MS201]" in text and "  5 |   hiden_size: 32" in text
    assert "note: specs/leaf.yaml at HEAD:2:10: inherited from specs/base.yaml:5" in text
    for name, code in (("specs/leaf.yaml", "MS201"), ("config.json", "MS017"), ("far.yaml", "MS103")):
        result = run("diff", name, "--against", "git:HEAD", "--format", "json")
        (found,) = json.loads(result.stdout)["diagnostics"]
        assert found["code"] == code and found["file"].endswith(" at HEAD")
        assert "/tmp" not in result.stdout.replace(str(repository), "")
    (repository / "new.yaml").write_text(SPEC)
    (found,) = json.loads(run("diff", "new.yaml", "--against", "git:HEAD", "--format", "json").stdout)["diagnostics"]
    assert (found["file"], found["message"]) == ("new.yaml", "new.yaml: does not exist at HEAD")
