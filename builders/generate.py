"""Text from a trained model, one token at a time.

Each token is drawn from the model's prediction over the window of text so far. At temperature 0 it is the likeliest
one; otherwise it is drawn with a seed, so the same call gives the same text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modelspec.builders import tokenizer as bpe
from modelspec.builders import weights
from modelspec.builders.checkpoint import (
    MANIFEST,
    SPEC,
    TOKENIZER,
    Checkpoint,
    Damaged,
    latest_valid,
    open_checkpoint,
)
from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.model import Transformer
from modelspec.builders.run import read_spec
from modelspec.builders.weights import Weights
from modelspec.timeline import stage_spec


@dataclass(frozen=True, slots=True)
class Trained:
    """A model out of a checkpoint, ready to predict, and what it came from."""

    model: Transformer
    checkpoint: Checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises Misuse where the folder has none."""
        return bpe.read(self.checkpoint.path / TOKENIZER)


def find_checkpoint(directory: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint in a folder, or the newest valid one of a run, or that of a step. Raises Misuse."""
    if (directory / MANIFEST).is_file():
        return open_checkpoint(directory)
    folder = directory / "checkpoints"
    if not folder.is_dir():
        raise Misuse(
            f"{directory} is neither a run nor a checkpoint nor a Hugging Face directory: "
            f"it has no checkpoints/, no {MANIFEST} and no config.json"
        )
    if step is not None:
        if not (folder / f"step-{step}").is_dir():
            there = ", ".join(path.name for path in sorted(folder.glob("step-*")))
            raise Misuse(f"{directory} has no checkpoint of step {step}; there are: {there or 'none'}")
        return open_checkpoint(folder / f"step-{step}")
    damaged: list[str] = []
    found = latest_valid(folder, lambda path, reason: damaged.append(f"; {path.name}: {reason}"))
    if found is None:
        raise Misuse(f"{directory} has no valid checkpoint{''.join(damaged)}")
    return found


def find_weights(directory: Path, step: int | None = None) -> tuple[Weights, Checkpoint]:
    """The weights of a run, a checkpoint or a weights folder, with the rotary scaling of the stage that it stands in.

    Raises Misuse where there is no valid checkpoint, Refused where it does not fit its own spec.
    """
    checkpoint = find_checkpoint(directory, step)
    spec = read_spec(checkpoint.path / SPEC)
    if spec.training is not None:
        if checkpoint.position.stage >= len(spec.training.stages):
            raise Damaged(f"{checkpoint.path / MANIFEST} names stage {checkpoint.position.stage}, which {SPEC} lacks")
        spec = stage_spec(spec, checkpoint.position.stage)
    return weights.open_checkpoint(checkpoint, spec), checkpoint


def load(directory: Path, *, step: int | None = None, device: str = "cpu", dtype: torch.dtype | None = None) -> Trained:
    """The model of a run, a checkpoint or a weights folder of ours.

    `dtype` None keeps that of the files. Raises as `find_weights` does, and Refused for FP8 without a dtype.
    """
    found, checkpoint = find_weights(directory, step)
    return Trained(weights.load(found, device=device, dtype=dtype).eval(), checkpoint)


def sample(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    end: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Token ids that follow `prompt`, at most `max_tokens`, up to and without `end`.

    Ids from `vocabulary` on, which the tokenizer does not have, are never drawn. Raises Refused where the model's
    prediction is not finite.
    """
    assert prompt, "there must be a token to go on from"
    device = model.embed_tokens.weight.device
    random = torch.Generator().manual_seed(seed)
    window = list(prompt)
    for _ in range(max_tokens):
        window = window[-model.spec.model.max_position :]
        token = _drawn(_prediction(model, window, device)[:vocabulary], temperature, random)
        if token == end:
            return
        yield token
        window.append(token)


def _prediction(model: Transformer, window: list[int], device: torch.device) -> Tensor:
    """Logits of the token after the window, [vocab], on the CPU."""
    with torch.no_grad():
        logits = model(torch.tensor([window], device=device)).logits
        assert logits is not None
        prediction = logits[0, -1].float().cpu()
    if not prediction.isfinite().all():
        raise Refused(
            "the model's predictions are not finite: its training diverged; take an earlier checkpoint, or train with "
            "a lower learning_rate"
        )
    return prediction


def _drawn(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    # In float64 and from the largest logit down, so that a tiny temperature tends to the likeliest token, not to NaN.
    scaled = (logits.double() - logits.max()) / temperature
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=random))
