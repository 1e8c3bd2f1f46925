"""The language commands: exit codes, one JSON document on stdout, places, and no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelspec.validate import load

ROOT = Path(__file__).parents[2]
V3, NANO = "specs/deepseek-v3.yaml", "specs/deepseek-v3-nano.yaml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelspec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["validate", V3, NANO],
        ["show", V3],
        ["show", V3, "--format", "json"],
        ["plan", V3],
        ["train", "--help"],
    ],
    ids=" ".join,
)
def test_the_language_commands_never_load_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom modelspec.cli import main\n"
        f"sys.argv = {['modelspec', *arguments]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "    sys.exit(end.code or (f'loaded {heavy}' if heavy else 0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_valid_specs_exit_0_and_say_their_size() -> None:
    done = run("validate", V3, NANO)
    assert done.returncode == 0
    size = "671.03B parameters + 11.61B MTP"
    assert f"{V3}: valid: deepseek-v3, {size}, 37.55B active for one token\n" in done.stdout
    assert f"{NANO}: valid: deepseek-v3-nano, 8.17M parameters" in done.stdout
    plain = run("validate", NANO, "--set", "model.mtp=null", "--set", "training.losses.mtp=null")
    assert plain.stdout == f"{NANO}: valid: deepseek-v3-nano, 8.17M parameters, 4.63M active for one token\n"


def test_an_invalid_spec_exits_1_with_place_source_caret_and_help() -> None:
    done = run("validate", NANO, "--set", "model.ffn.moe.num_expert=32")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "--set:1:15: error[MS201]: unknown key 'num_expert' in model.ffn.moe",
        "  1 | model.ffn.moe.num_expert=32",
        "    |               ^^^^^^^^^^",
        "  help: did you mean 'num_experts'?",
        "  note: --set:1:15: set by --set #1",
        "",
        f"{NANO}: 1 error",
    ]


def test_a_missing_file_exits_2_and_is_json_too() -> None:
    done = run("validate", "specs/none.yaml", "--format", "json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["valid"] is False
    (found,) = document["diagnostics"]
    assert (found["code"], found["severity"], found["file"]) == ("MS001", "error", "specs/none.yaml")
    assert done.stderr == ""


def test_validate_json_has_the_fixed_keys() -> None:
    done = run("validate", NANO, "--set", "model.ffn.moe.router.selection.groups.num=3", "--format", "json")
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)["diagnostics"]
    assert list(found) == ["code", "severity", "file", "line", "column", "path", "message", "help", "related"]
    assert (found["file"], found["line"], found["column"]) == ("--set", 1, 43)
    assert found["path"] == "model.ffn.moe.router.selection.groups.num"
    related, origin = found["related"]
    assert list(related) == ["path", "file", "line", "column", "message"]
    assert (related["path"], related["file"]) == ("model.ffn.moe.num_experts", NANO)
    assert origin["message"] == "set by --set #1, which overrides this"


def test_strict_makes_warnings_count() -> None:
    warned = ("validate", NANO, "--set", "model.attention.mla.rope=none")
    assert run(*warned).returncode == 0
    assert run(*warned, "--strict").returncode == 1


def test_one_bad_spec_among_several_fails_the_call_and_the_worst_code_wins() -> None:
    assert run("validate", NANO, "specs/none.yaml").returncode == 2
    assert run("validate").returncode == 2
    assert run("frobnicate").returncode == 2


def test_show_yaml_reads_back_to_the_same_spec(tmp_path: Path) -> None:
    for spec in (V3, NANO):
        copy = tmp_path / "copy.yaml"
        copy.write_text(run("show", spec, "--format", "yaml").stdout)
        assert load(copy) == load(ROOT / spec)


def test_show_says_where_each_value_comes_from() -> None:
    lines = run("show", NANO, "--set", "model.hidden_size=512").stdout.splitlines()
    by_key = {line.split(":")[0].strip(): line for line in lines}
    assert by_key["hidden_size"].endswith("# --set:1")
    assert f"# {NANO}:" in by_key["vocab_size"]
    assert f"# {V3}:" in by_key["kv_lora_rank"] or f"# {NANO}:" in by_key["kv_lora_rank"]
    assert f"# {V3}:" in by_key["theta"]
    assert by_key["tie_embeddings"].endswith("# default")


def test_show_json_holds_the_spec_and_a_place_for_every_value() -> None:
    document = json.loads(run("show", NANO, "--format", "json").stdout)
    assert document["spec"]["model"]["hidden_size"] == 256
    assert document["provenance"]["model.hidden_size"]["file"] == NANO
    assert document["provenance"]["model.attention.mla.rope.theta"]["file"] == V3
    assert document["provenance"]["model.tie_embeddings"] is None


def test_errors_of_show_and_plan_are_json_where_json_was_asked_for() -> None:
    for command in ("show", "plan"):
        done = run(command, NANO, "--set", "model.hidden_size=0", "--format", "json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["valid"] is False


def test_plan_prints_exact_counts() -> None:
    counts = json.loads(run("plan", V3, "--format", "json").stdout)["parameters"]
    assert (counts["total"], counts["active"], counts["mtp"]) == (671_026_419_200, 37_552_297_472, 11_610_068_224)
    text = run("plan", V3).stdout
    assert "671,026,419,200" in text and "37,552,297,472" in text


def test_build_prints_every_module_of_v3_without_memory_for_it() -> None:
    done = run("build", V3)
    assert done.returncode == 0, done.stderr
    assert "layers.3 to 60" in done.stdout
    assert "256 x 4,096 x 7,168" in done.stdout
    assert "682,636,487,424 elements: 671.03B parameters + 11.61B MTP" in done.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m modelspec show {V3} | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_one_of_many_processes_ends_with_its_work_though_a_thread_still_waits() -> None:
    waits = "import threading, time; threading.Thread(target=time.sleep, args=(300,)).start()"
    program = f"{waits}; import sys; sys.argv[1:] = ['validate', {NANO!r}]; from modelspec.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"WORLD_SIZE": "2"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert NANO in done.stdout


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert run("--version").stdout.strip().endswith(version("modelspec"))


@pytest.mark.parametrize("command", ["show", "plan", "build", "validate"])
def test_a_parent_outside_of_the_project_needs_leave(command: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((ROOT / "specs" / "llama-3.1-8b.yaml").read_text())
    project = tmp_path / "project"
    project.mkdir()
    (project / "leaf.yaml").write_text("extends: ../base.yaml\nname: leaf\n")
    (project / "pyproject.toml").touch()
    assert run(command, str(project / "leaf.yaml")).returncode in (1, 2)
    assert run(command, str(project / "leaf.yaml"), "--allow-outside").returncode == 0
