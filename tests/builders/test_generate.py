"""Sampling, and finding the model of a run."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from modelspec.builders import checkpoint
from modelspec.builders.checkpoint import Position
from modelspec.builders.errors import Misuse
from modelspec.builders.generate import find_checkpoint, sample
from modelspec.builders.model import Transformer


class Counting(nn.Module):
    """Predicts the token after the last one, and remembers how long the windows were."""

    def __init__(self, vocabulary: int = 10, max_position: int = 8, sharpness: float = 4.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, 1)
        self.spec = SimpleNamespace(model=SimpleNamespace(max_position=max_position))
        self.sharpness = sharpness
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        self.lengths.append(tokens.shape[1])
        following = (tokens + 1) % self.embed_tokens.num_embeddings
        one_hot = nn.functional.one_hot(following, self.embed_tokens.num_embeddings)
        return SimpleNamespace(logits=self.sharpness * one_hot.float())


def _model(**values: float) -> Transformer:
    return cast(Transformer, Counting(**values))  # type: ignore[arg-type]


def test_at_temperature_0_the_likeliest_token_is_taken() -> None:
    assert list(sample(_model(), [3], max_tokens=4, temperature=0.0)) == [4, 5, 6, 7]


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    first, again, other = (list(sample(_model(), [0], max_tokens=40, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_temperature_spreads_the_draw_as_the_softmax_says() -> None:
    draws = Counter(
        next(sample(_model(sharpness=2.0), [0], max_tokens=1, temperature=2.0, seed=seed)) for seed in range(1500)
    )
    expected = math.e / (math.e + 9)
    assert draws[1] / 1500 == pytest.approx(expected, abs=0.04)


def test_the_end_of_a_text_ends_the_sample_and_is_not_part_of_it() -> None:
    assert list(sample(_model(), [3], max_tokens=9, temperature=0.0, end=6)) == [4, 5]


def test_tokens_that_the_tokenizer_lacks_are_never_drawn() -> None:
    tokens = list(sample(_model(), [0], max_tokens=200, temperature=5.0, vocabulary=4))
    assert max(tokens) <= 3


def test_the_window_never_grows_beyond_what_the_model_is_meant_for() -> None:
    model = Counting()
    list(sample(cast(Transformer, model), list(range(5)), max_tokens=10, temperature=0.0))
    assert model.lengths == [5, 6, 7, 8, 8, 8, 8, 8, 8, 8]


def _save(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, Position(step), {"x": torch.zeros(2)}, {}, "", "").path


def test_a_checkpoint_is_found_in_a_run_by_step_or_by_itself(tmp_path: Path) -> None:
    paths = [_save(tmp_path / "checkpoints", step) for step in (5, 10)]
    assert find_checkpoint(tmp_path).position.step == 10
    assert find_checkpoint(tmp_path, step=5).position.step == 5
    assert find_checkpoint(paths[0]).position.step == 5


def test_what_is_no_run_has_no_checkpoint_or_only_damaged_ones_is_said(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="neither a run nor a checkpoint nor a Hugging Face directory"):
        find_checkpoint(tmp_path)
    path = _save(tmp_path / "checkpoints", 5)
    with pytest.raises(Misuse, match="no checkpoint of step 7; there are: step-5"):
        find_checkpoint(tmp_path, step=7)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["position"]["step"] = "5"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Misuse, match=r"no valid checkpoint; step-5: manifest\.json is not one of ours"):
        find_checkpoint(tmp_path)
