"""The file config.json itself: what is unreadable, and how errors name the file, its keys and the places of a spec."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelspec.hf_config import HFError, Unreadable, config_from_spec, read_json, spec_from_config
from modelspec.validate import load

V3: dict[str, Any] = config_from_spec(load("modelspec:deepseek-v3"), "bfloat16")


def read(**changes: Any) -> None:
    """Reads V3's config with these keys changed; ... removes one."""
    config = V3 | changes
    spec_from_config({key: value for key, value in config.items() if value is not ...}, "model")


def test_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelspec.hf_config.keys.MAX_JSON_BYTES", 10)
    (tmp_path / "config.json").write_text('{"a": "0123456789"}')
    with pytest.raises(HFError, match="larger than 10 bytes"):
        read_json(tmp_path / "config.json")


NO_JSON_OBJECT = {
    b"\xff\xfe": "byte 0 is not UTF-8",
    b"": "Expecting value at line 1, column 1",
    b'{"a": 1,\n  b}': "at line 2, column 3",
    b"{} {}": "Extra data at line 1, column 4",
    b'{"a": Infinity}': "Infinity is not a number in JSON",
    b'{"a": 1, "a": 1}': "the key 'a' stands twice",
    b'{"a": ' + b"1" * 5000 + b"}": "a number of 5,000 digits",
    b"null": "not a JSON object",
    b"[" * 100_000: "nested more than 32 deep",
    b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}": "nested more than 32 deep",
}


@pytest.mark.parametrize(("content", "reason"), NO_JSON_OBJECT.items(), ids=lambda value: None)
def test_what_is_not_one_json_object_is_unreadable(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        read_json(file)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{file}: ") and reason in str(caught.value)
    assert "recursion" not in str(caught.value) and "sys." not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe"])
def test_what_is_no_file_is_unreadable(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    with pytest.raises(Unreadable, match=r"config\.json: cannot be read: "):
        read_json(file)


COMMANDS = {
    "import": ["import", "{}", "-o", "out"],
    "init": ["init", "--from", "{}", "--name", "new", "-o", "out"],
    "diff": ["diff", "modelspec:deepseek-v3", "{}"],
    "doctor": ["doctor", "{}"],
}


def run(command: str, folder: Path, config: str, *more: str) -> tuple[int, str]:
    """The exit code of a command for a Hugging Face folder with this config, and all that it says."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    arguments = [argument.format(folder) for argument in COMMANDS[command]]
    program = [sys.executable, "-m", "modelspec", *arguments, *more]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert not (folder.parent / "out").exists()
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_that_is_no_json_is_an_unreadable_input(command: str, tmp_path: Path) -> None:
    code, said = run(command, tmp_path / "hf", '{"model_type": ')
    assert code == 2
    assert str(tmp_path / "hf" / "config.json") in said and "not valid JSON: Expecting value at line 1" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_that_no_spec_can_say_is_an_answer_and_names_file_and_key(command: str, tmp_path: Path) -> None:
    code, said = run(command, tmp_path / "hf", json.dumps(V3 | {"hidden_act": "gelu"}))
    assert code == 1
    assert str(tmp_path / "hf" / "config.json") in said and "hidden_act is 'gelu'" in said


def test_doctor_answers_in_json_of_a_config_too(tmp_path: Path) -> None:
    code, said = run("doctor", tmp_path / "hf", "{", "--format", "json")
    (diagnostic,) = json.loads(said)["diagnostics"]
    assert (code, diagnostic["code"], diagnostic["file"]) == (2, "MS017", str(tmp_path / "hf" / "config.json"))


def test_doctor_examines_the_model_of_a_config(tmp_path: Path) -> None:
    code, said = run("doctor", tmp_path / "hf", json.dumps(V3), "--device", "cpu")
    assert code == 3
    assert "FAIL  memory     2.5 TiB for weights" in said


SCALING: dict[str, Any] = V3["rope_scaling"]
# Keys of a config, and what is said of them: the names in the config, then the place in the spec.
NAMED_TWICE: dict[str, tuple[dict[str, Any], str]] = {
    "type": (
        {"vocab_size": "many"},
        "vocab_size makes no valid spec: model.vocab_size: Input should be a valid integer, not 'many'",
    ),
    "range": ({"rms_norm_eps": -1.0}, "rms_norm_eps makes no valid spec: model.norm.eps: "),
    "nested": (
        {"rope_scaling": SCALING | {"beta_fast": "x"}},
        "rope_scaling.beta_fast makes no valid spec: model.attention.mla.rope.scaling.beta_fast: ",
    ),
    "repeated in the config": (
        {"num_attention_heads": 2**21, "num_key_value_heads": 2**21},
        "num_attention_heads makes no valid spec: model.attention.mla.num_heads: ",
    ),
    "relation": (
        {"n_group": 7},
        "n_group and n_routed_experts make no valid spec: model.ffn.moe.router.selection.groups.num: 7 groups do not",
    ),
    "relation of which the config says one side": (
        {"n_group": ..., "n_routed_experts": 250},
        "n_routed_experts makes no valid spec: model.ffn.moe.router.selection.groups.num: 8 groups do not divide 250",
    ),
}


@pytest.mark.parametrize(("changes", "said"), NAMED_TWICE.values(), ids=NAMED_TWICE.keys())
def test_a_value_that_no_spec_may_have_is_named_as_the_config_and_as_the_spec_call_it(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(HFError) as caught:
        read(**changes)
    assert str(caught.value).startswith(f"config.json: {said}")


def test_long_values_are_cut() -> None:
    for changes in ({"hidden_act": "x" * 10**6}, {"vocab_size": "x" * 10**6}):
        with pytest.raises(HFError) as caught:
            read(**changes)
        assert len(str(caught.value)) < 300
