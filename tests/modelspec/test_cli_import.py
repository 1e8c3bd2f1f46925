"""`import`, `export`, `build -o` and `train --init-from` as a user meets them: what they print, exit codes, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modelspec as library
from modelspec.builders import build
from modelspec.builders.hf import from_pretrained, save_pretrained
from modelspec.builders.tokenizer import train_bpe
from modelspec.cli import main

SPEC = """
spec_version: 1
name: tiny
model:
  vocab_size: 280
  hidden_size: 16
  max_position: 64
  init: {std: 0.05}
  norm: {type: rmsnorm, eps: 1.0e-6}
  attention:
    gqa: {type: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 4, rope: {theta: 10000, layout: half_split}}
  ffn:
    dense: {type: dense, intermediate_size: 24, activation: {type: swiglu}}
  layers: [{repeat: 2, attention: gqa, ffn: dense}]
training:
  optimizer: {type: adamw, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}
  stages: [{name: main, steps: 1, sequence_length: 16, batch_size: 4, learning_rate: 1.0e-2}]
data:
  sources: [{type: text, files: text.txt}]
  tokenizer: {type: file, path: hf/tokenizer.json}
"""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec, text, and a Hugging Face directory of the spec's model; and the process in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(SPEC)
    text = "".join(f"{n} times {n % 7} makes {n * (n % 7)}\n" for n in range(600))
    (tmp_path / "text.txt").write_text(text)
    save_pretrained(build(library.load("tiny.yaml"), seed=3), "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(train_bpe([text], 280).to_str())
    return tmp_path


@pytest.fixture
def modelspec(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modelspec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def test_an_import_tells_what_it_took_over_and_what_means_nothing_here(modelspec: Command, project: Path) -> None:
    config = json.loads((project / "hf/config.json").read_text())
    (project / "hf/config.json").write_text(json.dumps(config | {"use_cache": True, "eos_token_id": [1, 2]}))
    code, out, err = modelspec("import", "hf", "-o", "ours")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "no meaning here: use_cache = true" in lines and "no meaning here: eos_token_id = [1, 2]" in lines
    assert lines[-2] == "importing hf ..."
    assert re.fullmatch(r"ours: llama, 12\.\d+K parameters, 5\d\.\d+ KB of weights", lines[-1])
    assert {path.name for path in Path("ours").iterdir()} == {
        *("manifest.json", "model.safetensors", "spec.yaml", "tokenizer.json")
    }
    assert modelspec("validate", "ours/spec.yaml", "--strict")[0] == 0


def test_what_was_imported_generates_and_exports_like_its_source(modelspec: Command, project: Path) -> None:
    assert modelspec("import", "hf", "-o", "ours")[0] == 0
    prompt = ("--prompt", "3 times", "--max-tokens", "8")
    assert modelspec("generate", "ours", *prompt) == modelspec("generate", "hf", *prompt)
    code, out, _ = modelspec("export", "ours", "--to", "hf", "-o", "again")
    assert code == 0 and out.splitlines()[-1].startswith("again: ")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert Path("again", name).read_bytes() == Path("hf", name).read_bytes()
    tokens = torch.tensor([[1, 2, 3]])
    theirs = AutoModelForCausalLM.from_pretrained("again")(tokens).logits
    torch.testing.assert_close(from_pretrained("ours")(tokens).logits, theirs, rtol=1e-5, atol=1e-5)


def test_fp8_is_imported_as_it_is_and_generates_with_a_dtype(modelspec: Command, project: Path) -> None:
    assert modelspec("export", "hf", "--to", "hf", "-o", "hf8", "--dtype", "fp8")[0] == 0
    assert modelspec("import", "hf8", "-o", "ours")[0] == 0
    code, _, err = modelspec("generate", "ours", "--prompt", "3", "--max-tokens", "2")
    assert code == 1 and "--dtype bfloat16" in err
    assert modelspec("generate", "ours", "--prompt", "3", "--max-tokens", "2", "--dtype", "bfloat16")[0] == 0
    assert modelspec("import", "hf8", "-o", "plain", "--dtype", "float32")[0] == 0
    assert {str(tensor.dtype) for tensor in load_file("plain/model.safetensors").values()} == {"torch.float32"}


def test_build_writes_initial_weights_that_the_other_commands_take(modelspec: Command, project: Path) -> None:
    code, out, err = modelspec("build", "tiny.yaml", "-o", "init", "--seed", "7")
    assert (code, err) == (0, "") and out.splitlines()[-1].startswith("init: ") and "seed 7" in out
    model, other = from_pretrained("init"), build(library.load("tiny.yaml"), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert json.loads(Path("init/config.json").read_text())["model_type"] == "llama"
    assert modelspec("export", "init", "--to", "hf", "-o", "init-hf")[0] == 0
    assert modelspec("train", "tiny.yaml", "--init-from", "init")[0] == 0
    assert modelspec("build", "tiny.yaml", "-o", "init")[0] == 2


def test_build_says_which_field_keeps_it_from_writing_a_config(modelspec: Command, project: Path) -> None:
    key = "model.attention.gqa.rope.layout=interleaved"
    code, out, _ = modelspec("build", "tiny.yaml", "-o", "init", "--set", key)
    assert code == 0 and re.search(r"^no config\.json: .*layout", out, re.MULTILINE)
    assert not Path("init/config.json").exists()
    code, out, err = modelspec("export", "init", "--to", "hf", "-o", "hf2")
    assert code == 1 and "layout" in err and not Path("hf2").exists()


@pytest.mark.parametrize("source", ["ours", "hf"])
def test_training_starts_from_weights_and_not_from_initial_values(
    source: str, modelspec: Command, project: Path
) -> None:
    assert modelspec("import", "hf", "-o", "ours")[0] == 0
    key = "training.stages=[{name: a, steps: 1, sequence_length: 16, batch_size: 4, learning_rate: 1.0e-12}]"
    code, out, err = modelspec("train", "tiny.yaml", "--init-from", source, "--set", key)
    assert (code, err) == (0, "") and "warning" not in out
    trained, before = from_pretrained("runs/tiny"), from_pretrained("hf")
    torch.testing.assert_close(trained.embed_tokens.weight, before.embed_tokens.weight, rtol=0, atol=1e-9)


def test_training_refuses_weights_and_tokenizers_that_do_not_fit(modelspec: Command, project: Path) -> None:
    code, _, err = modelspec("train", "tiny.yaml", "--init-from", "hf", "--set", "model.hidden_size=20")
    assert code == 1 and "embed_tokens.weight is [280, 16] there and [280, 20] in the spec" in err
    code, _, err = modelspec("train", "tiny.yaml", "--init-from", "hf", "--set", "model.vocab_size=300")
    assert code == 1 and "set model.vocab_size=280" in err
    other = "data.tokenizer={type: bpe_trained, vocab_size: 270}"
    code, _, err = modelspec("train", "tiny.yaml", "--init-from", "hf", "--set", other)
    assert code == 1 and "set data.tokenizer={type: file, path: hf/tokenizer.json}" in err
    code, _, err = modelspec("train", "tiny.yaml", "--init-from", "nowhere")
    assert code == 2 and "nowhere: not a folder" in err
    assert modelspec("train", "tiny.yaml", "--init-from", "hf", "--dry-run")[0] == 2
    assert not list(Path("runs").rglob("checkpoints"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def edit_config(**keys: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return edit


BAD: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated": (lambda hf: truncate(hf / "model.safetensors"), 2, r"model\.safetensors: truncated"),
    "no config": (lambda hf: (hf / "config.json").unlink(), 2, "it has no config.json"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), 2, "neither model.safetensors nor"),
    "a pickle": (lambda hf: (hf / "model.safetensors").rename(hf / "pytorch_model.bin"), 2, "a pickle, which may run"),
    "unknown family": (edit_config(model_type="rwkv"), 1, "model_type 'rwkv' is not supported; supported: "),
    "unknown key": (edit_config(frobnicate=1), 1, "frobnicate: not known"),
    "other shapes": (
        edit_config(intermediate_size=25),
        1,
        r"gate_proj\.weight has shape \[24, 16\], config\.json asks",
    ),
    "more layers": (edit_config(num_hidden_layers=3), 1, "missing from the files"),
    "tokenizer not text": (lambda hf: (hf / "tokenizer.json").write_bytes(b"\xff"), 2, "not UTF-8 text"),
}


@pytest.mark.parametrize(("spoil", "exit_code", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_error_and_leaves_nothing(
    spoil: Callable[[Path], object], exit_code: int, message: str, modelspec: Command, project: Path
) -> None:
    spoil(project / "hf")
    before = sorted(project.iterdir())
    code, _, err = modelspec("import", "hf", "-o", "ours")
    assert code == exit_code and re.search(message, err) and err.startswith("error: ") and err.count("\n") <= 2
    assert sorted(project.iterdir()) == before


def test_misuse_is_told(modelspec: Command, project: Path) -> None:
    assert modelspec("import", "hf")[0] == 2
    assert modelspec("import", "nowhere", "-o", "ours")[0] == 2
    assert modelspec("export", "nowhere", "--to", "hf", "-o", "out")[0] == 2
    assert modelspec("export", "hf", "-o", "out")[0] == 2
    Path("full").mkdir()
    Path("full/file").touch()
    code, _, err = modelspec("import", "hf", "-o", "full")
    assert code == 2 and "exists already" in err
    assert modelspec("import", "hf", "-o", "ours")[0] == 0
    code, _, err = modelspec("import", "ours", "-o", "twice")
    assert code == 2 and "is a folder of ours" in err
    code, _, err = modelspec("import", "hf", "-o", "text.txt/ours")
    assert code == 3 and "cannot write" in err


def test_a_signal_ends_an_import_and_leaves_nothing(project: Path) -> None:
    wide = ["model.vocab_size=400000", "model.hidden_size=256"]
    save_pretrained(build(library.load("tiny.yaml", overrides=wide)), "wide")
    command = [sys.executable, "-m", "modelspec", "import", "wide", "-o", "ours", "--dtype", "float64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(project.glob(".tmp-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err.strip().splitlines()[-1:]) == (143, ["stopped by a signal; nothing was written"]), (
        out
    )
    assert not list(project.glob(".tmp-*")) and not Path("ours").exists()
