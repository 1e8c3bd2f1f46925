"""export: weights of ours as a Hugging Face checkpoint."""

from pathlib import Path

import click

from modelspec.amount import amount_of_bytes
from modelspec.cli.transfer import dtype_option, named, transferring


@click.command(name="export")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["hf"]), required=True, help="Form to write: a Hugging Face directory.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist, or be empty."
)
@dtype_option("fp8")
@click.option(
    "--skip-mtp", is_flag=True, help="Leave multi-token prediction out: its weights, and its number in the config."
)
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run. [default: the newest valid one]")
def command(directory: Path, form: str, out: Path, dtype: str | None, skip_mtp: bool, step: int | None) -> int:
    """Write the weights in DIR as a Hugging Face checkpoint, its config.json derived from the spec.

    DIR is a run, a checkpoint, a weights folder or a Hugging Face directory. FP8 keeps its bytes and scales unless
    --dtype converts them; --dtype fp8 scales the projections by blocks of 128 x 128,
    and keeps all else in bfloat16.
    """
    from modelspec.builders.hf.convert import export, open_weights

    found = open_weights(directory, step)
    for notice in found.notices:
        click.echo(f"warning: {notice}", err=True)
    with transferring(f"exporting {found.spec.name}") as progress:
        export(found, out, target="fp8" if dtype == "fp8" else named(dtype), with_mtp=not skip_mtp, progress=progress)
    total = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    click.echo(f"{out}: {amount_of_bytes(total)} of weights and config.json, for transformers to load")
    return 0
