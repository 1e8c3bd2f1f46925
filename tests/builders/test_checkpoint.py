"""Checkpoints come back bit for bit, are whole or not there, and a bad one is passed over."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modelspec import schema
from modelspec.builders import checkpoint
from modelspec.builders.checkpoint import Checkpoint, Position
from modelspec.builders.errors import EnvironmentFailed, Refused
from modelspec.builders.optim import AdamW, build_optimizer

RECIPE = schema.AdamW(type="adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


class Small(nn.Module):
    """A model with a tied weight, a buffer that is kept and one that is not."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.head = nn.Linear(width, 8)
        self.head.weight = self.embed.weight
        self.register_buffer("selection_bias", torch.randn(8))
        self.register_buffer("table", torch.arange(3), persistent=False)


def _trained(seed: int = 0, states: schema.Dtype = "bfloat16", width: int = 4) -> tuple[Small, AdamW]:
    torch.manual_seed(seed)
    model = Small(width)
    optimizer = build_optimizer(model, RECIPE, schema.Precision(optimizer_states=states))
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def _save(folder: Path, step: int, model: nn.Module, optimizer: AdamW) -> Checkpoint:
    return checkpoint.save(
        folder,
        Position(step=step, tokens=step * 10, sequences=step, stage=0, data="abc"),
        checkpoint.model_tensors(model),
        checkpoint.optimizer_tensors(model, optimizer),
        "name: small\n",
        "{}",
    )


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("states", ["bfloat16", "float32"])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, states: schema.Dtype) -> None:
    model, optimizer = _trained(states=states)
    with torch.no_grad():
        model.embed.weight[0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])
    _save(tmp_path, 7, model, optimizer)
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.position == Position(7, 70, 7, 0, "abc")

    other, other_optimizer = _trained(seed=1, states=states)
    checkpoint.load_model(found, other)
    checkpoint.load_optimizer(found, other, other_optimizer)
    for before, after in (
        (checkpoint.model_tensors(model), checkpoint.model_tensors(other)),
        (checkpoint.optimizer_tensors(model, optimizer), checkpoint.optimizer_tensors(other, other_optimizer)),
    ):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name


def test_each_tensor_is_kept_once_and_tables_are_not(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1, *_trained())
    assert set(load_file(saved.path / "model.safetensors")) == {"embed.weight", "head.bias", "selection_bias"}
    assert json.loads((saved.path / "manifest.json").read_text())["tensors"] == {
        "model.safetensors": 3,
        "optimizer.safetensors": 6,
    }


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def _step_back(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["position"]["step"] *= -1
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_bit, "model.safetensors does not match its SHA-256"),
        (lambda path: os.truncate(path / "optimizer.safetensors", 20), "optimizer.safetensors has 20 bytes"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text(""), "manifest.json is not one of ours"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json is not one of ours"),
        (lambda path: (path / "manifest.json").write_text('{"format": 9}'), "format 9; this version reads 1"),
        (_step_back, "manifest.json is not one of ours"),
    ],
    ids=[
        *("bit", "truncated", "no tensors", "no manifest", "empty manifest", "foreign manifest", "other format"),
        "negative step",
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: object, reason: str) -> None:
    assert callable(damage)
    _save(tmp_path, 9, *_trained())
    damage(_save(tmp_path, 10, *_trained()).path)
    heard: list[tuple[str, str]] = []
    found = checkpoint.latest_valid(tmp_path, lambda path, why: heard.append((path.name, why)))
    assert found is not None and found.position.step == 9
    assert heard[0][0] == "step-10" and reason in heard[0][1]


def test_folders_that_are_no_checkpoints_do_not_count(tmp_path: Path) -> None:
    for name in ("step-", "step-x", "latest", ".tmp-1-step-3"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest_valid(tmp_path) is None
    assert checkpoint.latest_valid(tmp_path / "absent") is None


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    _flip_a_bit(_save(tmp_path, 3, *_trained()).path)
    _save(tmp_path, 3, *_trained())
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.position.step == 3
    assert _hidden(tmp_path) == []


def test_pruning_counts_only_whole_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, *_trained())
    (tmp_path / "step-4" / "manifest.json").unlink()
    deleted = checkpoint.prune(tmp_path, keep_last=2)
    assert [path.name for path in deleted] == ["step-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3", "step-4"]


def test_a_model_of_another_shape_is_refused_before_any_value_is_read(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1, *_trained())
    wider, _ = _trained(width=5)
    before = {name: tensor.clone() for name, tensor in checkpoint.model_tensors(wider).items()}
    with pytest.raises(
        Refused, match=r"embed\.weight is F32\[8, 4\] in the file and F32\[8, 5\] in the model \(1 of 3"
    ):
        checkpoint.load_model(saved, wider)
    assert all(torch.equal(before[name], tensor) for name, tensor in checkpoint.model_tensors(wider).items())


def test_moments_of_another_dtype_are_refused(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1, *_trained(states="bfloat16"))
    model, optimizer = _trained(states="float32")
    with pytest.raises(Refused, match=r"BF16.* in the file and F32"):
        checkpoint.load_optimizer(saved, model, optimizer)


def test_too_little_room_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(EnvironmentFailed, match=r"bytes are needed and 1,000 are free"):
        _save(tmp_path, 1, *_trained())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    _save(tmp_path, 1, *_trained())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            EnvironmentFailed, match=r"cannot write .*step-2, [\d,]+ bytes of tensors: .*File too large"
        ):
            _save(tmp_path, 2, *_trained(width=4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.position.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    _save(tmp_path, 1, *_trained())

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(EnvironmentFailed, match=r"cannot write .*step-2: Input/output error"):
        _save(tmp_path, 2, *_trained())
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailed, match="cannot write"):
        _save(tmp_path / "file" / "checkpoints", 1, *_trained())


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from modelspec.builders import checkpoint
folder = Path(sys.argv[1])
for step in range(1, 10_000):
    values = {f"tensor{i}": torch.full((40_000,), float(step)) for i in range(4)}
    checkpoint.save(folder, checkpoint.Position(step), values, {}, "", "")
    checkpoint.prune(folder, 2)
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    reported = [1, *map(int, process.stdout.read().split())]
    process.wait()
    process.stdout.close()
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.position.step >= reported[-1]
    values = load_file(found.path / "model.safetensors")
    assert all(bool((value == found.position.step).all()) for value in values.values())
