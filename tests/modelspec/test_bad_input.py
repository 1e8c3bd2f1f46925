"""Hostile and broken files through the command line: one clear diagnostic, no traceback, little time and memory."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelspec.cli import main
from modelspec.files import write_whole

V3 = (Path(__file__).parents[2] / "specs" / "deepseek-v3.yaml").read_text(encoding="utf-8")
MEMORY = 300 * 2**20


def aliases() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{this}: &{this} [{', '.join([f'*{last}'] * 9)}]" for last, this in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    return "\n".join(lines)


def merge_keys() -> str:
    lines = ["a: &a {x: 1, y: 2}"]
    lines += [
        f"{this}: &{this} {{<<: [{', '.join([f'*{last}'] * 9)}]}}"
        for last, this in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    return "\n".join(lines)


def v3(old: str, new: str) -> str:
    assert V3.count(old) == 1
    return V3.replace(old, new)


# name: (content, code, exit code)
FILES: dict[str, tuple[str | bytes, str, int]] = {
    "bad_utf8": (b"name: caf\xe9\n", "MS003", 1),
    "empty": ("", "MS006", 1),
    "two_documents": (V3 + "\n---\n" + V3, "MS007", 1),
    "two_megabytes": ("# " + "x" * 2_000_000, "MS002", 1),
    "alias_bomb": (aliases(), "MS010", 1),
    "merge_key_bomb": (merge_keys(), "MS014", 1),
    "brackets": ("a: " + "[" * 5_000, "MS009", 1),
    "long_integer": ("a: " + "9" * 10_000, "MS016", 1),
    "vocab_1e15": (v3("vocab_size: 129280", "vocab_size: 1e15"), "MS203", 1),
    "layers_1e9": (v3("repeat: 58", "repeat: 1000000000"), "MS204", 1),
    "plain_nan": (v3("std: 0.006", "std: nan"), "MS203", 1),
    "yaml_nan": (v3("std: 0.006", "std: .nan"), "MS016", 1),
    "circle": ("extends: circle.yaml", "MS104", 1),
    "outside": ("extends: /dev/zero", "MS103", 1),
    "unknown_key": (v3("  vocab_size", "  vocab_sice: 1\n  vocab_size"), "MS201", 1),
    "deep_unknown_key": (v3("selection: {type: topk,", "selection: {type: topk, bias_speed: 1,"), "MS201", 1),
    "wrong_type": (v3("hidden_size: 7168", "hidden_size: wide"), "MS203", 1),
    "not_yaml": (b"PK\x03\x04\x14\x00\x00\x00", "MS004", 1),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (content, _, _) in FILES.items():
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / f"{name}.yaml").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "directory.yaml").mkdir()
    return tmp_path


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def validate(folder: Path, *arguments: str) -> tuple[int, str, str, float]:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "modelspec", "validate", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=limit_memory,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begun


def test_every_broken_file_is_one_diagnostic_within_300_megabytes(folder: Path) -> None:
    unreadable = {"missing.yaml": "MS001", "directory.yaml": "MS001", "pipe.yaml": "MS001"}
    expected = unreadable | {f"{name}.yaml": code for name, (_, code, _) in FILES.items()}
    code, out, err, seconds = validate(folder, "--format", "json", *expected)
    report = json.loads(out)
    assert (code, report["valid"], err) == (2, False, "")
    errors = [diagnostic for diagnostic in report["diagnostics"] if diagnostic["severity"] == "error"]
    assert {diagnostic["file"]: diagnostic["code"] for diagnostic in errors} == expected
    assert len(errors) == len(expected)
    assert all(len(diagnostic["message"]) < 300 for diagnostic in errors)
    # A second each is asked for; all together take about two.
    assert seconds < len(expected)


@pytest.mark.parametrize(("name", "exit_code"), [("missing", 2), ("alias_bomb", 1), ("vocab_1e15", 1)])
def test_as_text_it_is_short_and_no_traceback(folder: Path, name: str, exit_code: int) -> None:
    code, _, err, _ = validate(folder, f"{name}.yaml")
    assert code == exit_code
    assert err.startswith(f"{name}.yaml:")
    assert "Traceback" not in err
    assert len(err) < 1_000


def test_a_bad_override_is_one_diagnostic(folder: Path) -> None:
    (folder / "good.yaml").write_text(V3)
    code, _, err, _ = validate(folder, "good.yaml", "--set", "model.vocab_size=1" + "0" * 5_000)
    assert code == 1
    assert err.startswith("--set:1:18: error[MS016]: the integer 1000")
    assert "Traceback" not in err


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """How the command line ends, and all that it says."""
    monkeypatch.setattr(sys, "argv", ["modelspec", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


LONG = "a" * 300
READS = ["diff good.yaml", "diff", "init --name x --from", "show", "plan", "doctor", "build", "validate --fix"]
WRITES = [
    "show good.yaml -o",
    "diff good.yaml good.yaml -o",
    "init --name x --from good.yaml -o",
    "plan good.yaml --out",
]


@pytest.mark.parametrize(
    "call",
    [
        *(f"{command} {LONG}{suffix}" for command in READS for suffix in ("", ".yaml", ".json", "/x.yaml")),
        *(f"{command} {LONG}{suffix}" for command in WRITES for suffix in ("", "/x")),
        *(f"validate {LONG}.yaml --format {output}" for output in ("github", "sarif", "junit", "json")),
        *(f"build good.yaml -o {LONG}", f"validate good.yaml --policy {LONG}"),
    ],
    ids=lambda call: call.replace(LONG, "LONG"),
)
def test_a_name_that_no_file_can_have_is_misuse_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("extends: modelspec:deepseek-v3-nano\nname: good\n")
    arguments = call.split()
    if arguments[0] == "diff" and len(arguments) == 2:
        arguments.append("good.yaml")
    code, said = called(monkeypatch, capsys, *arguments)
    assert code == 2 and LONG in re.sub(r"\s", "", said)
    assert [each.name for each in tmp_path.iterdir()] == ["good.yaml"]


@pytest.mark.parametrize("name", ["a" * 250 + ".yaml", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 125 + ".yaml"])
def test_the_longest_name_that_a_file_can_have_is_written(tmp_path: Path, name: str) -> None:
    for text in ("one", "two"):
        write_whole(tmp_path / name, text)
        assert (tmp_path / name).read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("call", "exit_code"),
    [
        *(("validate a.yaml", 2), ("validate *.yaml", 2), ("diff a.yaml b.yaml", 2), ("doctor a.yaml", 2)),
        *(("validate modelspec:deepseek-v3 --changed-since HEAD", 3), ("diff a.yaml --against git:HEAD", 3)),
        *(("init --from modelspec:deepseek-v3-nano --name x", 3), ("show modelspec:deepseek-v3-nano -o x", 2)),
        ("validate modelspec:deepseek-v3", 0),
    ],
)
def test_a_working_directory_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str, exit_code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    code, said = called(monkeypatch, capsys, *call.split())
    assert code == exit_code, said
    if code:
        assert re.search("working directory|matches no file|folder that exists", said)
