"""import: a Hugging Face checkpoint becomes a spec and a weights folder."""

import json
from pathlib import Path

import click

from modelspec.amount import amount_of_bytes
from modelspec.cli.options import size
from modelspec.cli.transfer import dtype_option, named, transferring


@click.command(name="import")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist, or be empty."
)
@dtype_option()
def command(directory: Path, out: Path, dtype: str | None) -> int:
    """Take over the Hugging Face checkpoint in DIR: its spec, its weights, its tokenizer.

    Reads config.json and safetensors, in one file or many, FP8 with block scales too, and never a pickle. The folder
    that it writes is a checkpoint like those of a run, for generate, export and train --init-from.
    """
    from modelspec.builders import weights
    from modelspec.builders.errors import Misuse
    from modelspec.builders.hf import is_hugging_face
    from modelspec.builders.hf.convert import open_hub
    from modelspec.plan import parameters

    if not is_hugging_face(directory):
        raise Misuse(f"{directory}: not a Hugging Face directory: it has no config.json, or is a folder of ours")
    found, reading = open_hub(directory)
    for key, value in sorted(reading.ignored.items()):
        click.echo(f"no meaning here: {key} = {json.dumps(value)}")
    for notice in found.notices:
        click.echo(f"warning: {notice}", err=True)
    with transferring(f"importing {found.spec.name}") as progress:
        written = weights.save(found, out, named(dtype), progress)
    total = sum((written.path / name).stat().st_size for name in written.files)
    click.echo(f"{out}: {reading.family}, {size(parameters(found.spec))}, {amount_of_bytes(total)} of weights")
    return 0
