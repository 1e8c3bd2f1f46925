"""The command line: parse, call one function, render. Nobody imports it.

Each command is a module of this package with one click command named `command`. A module is imported when its command
runs or its help is shown, and imports what it needs inside the function: the language commands never load torch.
Exit codes: 0 fine; 1 the answer is no; 2 misuse or unreadable input; 3 the environment failed; 130 and 143 after
SIGINT and SIGTERM.
"""

import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from keyword import iskeyword
from typing import NoReturn

import click

# Name and one-line help, here so that `--help` imports no command.
COMMANDS = {
    "init": "Write a new spec that starts from another one, at its size or another.",
    "validate": "Check specs: every error in one pass, with file, line and column.",
    "show": "Print the resolved spec and where each value comes from.",
    "plan": "Count parameters, without torch.",
    "diff": "Compare two specs as models: every change and what it does.",
    "explain": "Say what a key or a diagnostic code means.",
    "schema": "Print the language as JSON Schema, for editors and other programs.",
    "build": "Compile a spec on the meta device, at any size; -o writes initial weights.",
    "train": "Train a model: progress, metrics, checkpoints, resume.",
    "launch": "Write the job files that start training under torchrun, accelerate, Slurm or Kubernetes.",
    "generate": "Sample text from a trained model.",
    "doctor": "Compare the environment with a spec: versions, device, memory, disk.",
    "import": "Take over a Hugging Face checkpoint: spec and weights.",
    "export": "Write a Hugging Face checkpoint that transformers loads.",
}


class Commands(click.Group):
    """Loads a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command: click.Command = import_module(f"modelspec.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="modelspec", prog_name="modelspec")
def app() -> None:
    """modelspec: a model factory. A YAML spec says what a language model is; builders compile and train it."""


def main() -> NoReturn:
    """Runs the command line and exits; a user's mistake is a message, never a traceback."""
    try:
        # Not app(): that ends a broken pipe with exit code 1.
        with app.make_context("modelspec", sys.argv[1:]) as context:
            code = app.invoke(context)
            # Flushes; does nothing where whoever started the process has closed stdout.
            print(end="", flush=True)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader went away; the interpreter must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            click.echo(f"error: {error.filename}: {error.strerror}", err=True)
            sys.exit(2)
        if error.errno == errno.ENOENT and not _has_folder():
            click.echo("error: the working directory is gone; change into one that exists", err=True)
            sys.exit(3)
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT):
            raise
        click.echo(f"error: {error}", err=True)
        code = 3
    except Exception as error:
        # Errors made for users carry the exit code of their kind; any other is a bug and keeps its traceback.
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        click.echo(str(error) if hasattr(error, "diagnostics") else f"error: {error}", err=True)
        code = error.exit_code  # type: ignore[attr-defined]
    code = code if isinstance(code, int) else 0
    if "WORLD_SIZE" in os.environ:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Ends one of many processes, whose work is done, without taking the interpreter apart: a thread that comes back
    from gloo or the store meanwhile would abort it, and its launcher would take the run for failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _has_folder() -> bool:
    """Whether the working directory is still there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
