"""Starts `modelspec train` on a small spec as a user would, and reads what a run left."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

ROOT = Path(__file__).parents[3]
SPEC = """spec_version: 1
name: small
extends: modelspec:deepseek-v3-nano
model:
  vocab_size: 300
  hidden_size: 64
  ffn: {dense: {intermediate_size: 64}, moe: {intermediate_size: 32}}
  layers: [{repeat: 1, attention: mla, ffn: dense}, {repeat: 3, attention: mla, ffn: moe}]
training:
  stages: [{name: main, steps: 6, sequence_length: 32, batch_size: 8, learning_rate: 3.0e-3}]
  evaluation: {every_steps: 3, tokens: 1024}
  checkpoint: {every_steps: 3, keep_last: 3}
data:
  sources: [{type: text, files: TEXT}]
  tokenizer: {type: bpe_trained, vocab_size: 300}
"""


def small_folder(folder: Path) -> Path:
    """The folder, with a small spec over text of its own."""
    text = folder / "text.txt"
    text.write_text("".join(f"{number} times {number % 7} makes {number * (number % 7)}\n" for number in range(1500)))
    (folder / "small.yaml").write_text(SPEC.replace("TEXT", str(text)))
    return folder


def settings(folder: Path) -> dict[str, str]:
    """The environment for runs in a folder."""
    return os.environ | {"MODELSPEC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(folder: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Starts `modelspec train small.yaml` with these arguments."""
    command = [sys.executable, "-m", "modelspec", "train", "small.yaml", "--device", "cpu", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=settings(folder) | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def done(process: "subprocess.Popen[str]", code: int = 0, timeout: float = 120) -> str:
    """What a run said, once it ended with this code."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, said
    return said


def sets(*overrides: str) -> Iterator[str]:
    for override in overrides:
        yield from ("--set", override)


def rows(run: Path) -> dict[tuple[int, str], float]:
    """Losses and norms of a run by step and name."""
    found: dict[tuple[int, str], float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        found |= {(row["step"], key): row[key] for key in ("loss", "mtp_loss", "grad_norm", "val_loss") if key in row}
    return found


def wait_for_step(run: Path, step: int) -> None:
    """Returns once the metrics of a run have a step."""
    end = monotonic() + 150
    while monotonic() < end:
        if (run / "metrics.jsonl").exists() and (step, "loss") in rows(run):
            return
        sleep(0.1)
    raise AssertionError(f"{run} did not come to step {step}")
