"""What commands ask of git."""

import os
import subprocess
from pathlib import Path

import click


class NoGit(click.ClickException):
    """The environment has no git."""

    exit_code = 3


def git(folder: Path, *arguments: str) -> bytes:
    """What git prints in a folder. Raises UsageError with git's last word if it fails, NoGit if there is none."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise NoGit("git is not installed, or not in PATH") from None
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        raise click.UsageError(f"git: {told[-1] if told else arguments[0]}")
    return done.stdout


def changed_since(revision: str, folder: Path) -> frozenset[str]:
    """The full paths of all files of a repository that differ from where its history left that of a revision.

    What is not committed yet counts, and so do files that git does not know and does not ignore. Raises UsageError
    and NoGit.
    """
    if revision.startswith("-"):
        raise click.UsageError(f"{revision} is no revision")
    top = Path(git(folder, "rev-parse", "--show-toplevel").decode().rstrip("\n"))
    try:
        commit = git(top, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    except click.UsageError:
        raise click.UsageError(f"{revision} is no revision of {top}; a shallow clone must fetch it first") from None
    try:
        base = git(top, "merge-base", commit, "HEAD").decode().strip()
    except click.UsageError:
        # A shallow clone does not know where they parted.
        base = commit
    names = git(top, "diff", "--name-only", "--no-renames", "-z", base, "--")
    names += git(top, "ls-files", "--others", "--exclude-standard", "-z")
    return frozenset(os.path.join(os.path.realpath(top), os.fsdecode(name)) for name in names.split(b"\0") if name)
