"""generate: text from a trained model, shown as it comes."""

import os
import sys
from math import isfinite
from pathlib import Path

import click

from modelspec.cli.transfer import dtype_option, named


@click.command(name="generate")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to go on from; - reads it from stdin.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens at most.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.8,
    show_default=True,
    help="How far from the likeliest token to stray; 0 always takes the likeliest.",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, show_default=True, help="Of the draw.")
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run. [default: the newest valid one]")
@dtype_option()
@click.option("--device", default="cpu", show_default=True, help="Like cpu or cuda:0.")
def command(
    directory: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    step: int | None,
    dtype: str | None,
    device: str,
) -> int:
    """Write what a model goes on with after a prompt. DIR is a run, a checkpoint or a Hugging Face directory.

    The text goes to stdout, without the prompt.
    """
    if not isfinite(temperature):
        raise click.UsageError("--temperature must be a finite number")
    text = _utf8(sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    from modelspec.builders import tokenizer as bpe
    from modelspec.builders.device import require_device
    from modelspec.builders.generate import load, sample
    from modelspec.builders.hf import from_pretrained, is_hugging_face

    target = require_device(device)
    if is_hugging_face(directory):
        model, tokenizer = (
            from_pretrained(directory, device=target, dtype=named(dtype)).eval(),
            bpe.read(directory / "tokenizer.json"),
        )
    else:
        trained = load(directory, step=step, device=str(target), dtype=named(dtype))
        model, tokenizer = trained.model, trained.tokenizer
    end = bpe.end_of_text(tokenizer)
    tokens = sample(
        model,
        # An empty prompt begins a new text, as after the end of another one.
        tokenizer.encode(text, add_special_tokens=False).ids or [end],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        end=end,
        vocabulary=bpe.size(tokenizer),
    )
    for piece in bpe.decoded(tokenizer, tokens):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    return 0


def _utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError("the prompt is not UTF-8 text") from error
