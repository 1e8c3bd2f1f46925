"""What the commands that move weights share: progress, a signal that ends them, dtypes by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch


def dtype_option(*more: str) -> Callable[..., Callable[..., object]]:
    """`--dtype`, for what the weights are kept in."""
    return click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float32", "float64", *more]),
        help="Convert every tensor to this; selection biases stay float32 at least. [default: as in the files]",
    )


def named(dtype: str | None) -> "torch.dtype | None":
    """The dtype of a name."""
    from modelspec.builders.build import DTYPES

    return None if dtype is None else DTYPES[dtype]


@contextmanager
def transferring(activity: str) -> Iterator[Callable[[int, int], None]]:
    """What to tell of bytes written and of how many in all; shown while the block runs.

    Once SIGINT or SIGTERM came, telling raises Stopped: what was being written is not kept.
    """
    from modelspec.builders.errors import Stopped
    from modelspec.builders.events import Preparing
    from modelspec.cli.progress import Terminal, shown
    from modelspec.cli.train import stop_signals

    with stop_signals() as stop, shown(Terminal()) as show:

        def progress(written: int, total: int) -> None:
            if (number := stop()) is not None:
                raise Stopped(number)
            show(Preparing(activity, written / max(total, 1)))

        try:
            yield progress
        except Stopped as stopped:
            click.echo("stopped by a signal; nothing was written", err=True)
            raise click.exceptions.Exit(stopped.exit_code) from None
