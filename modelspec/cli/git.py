"""What commands ask of git: how it is run, a commit, and what changed since one."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import click

from modelspec.files import way

# What git says where not the call is wrong but the machine.
_OF_THE_MACHINE = ("dubious ownership", "current working directory")


class NoGit(click.ClickException):
    """The environment has no git, or none that works here."""

    exit_code = 3


def git(folder: str, *arguments: str) -> bytes:
    """What git prints in a folder. Raises UsageError with git's reason, NoGit if the machine is at fault."""
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise NoGit("git is not installed, or not in PATH") from None
    except OSError as error:
        raise NoGit(f"git cannot be run: {error.strerror or error}") from None
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines() or [arguments[0]]
        reason = next((line for line in told if line.startswith("fatal:")), told[-1])
        if any(words in reason for words in _OF_THE_MACHINE):
            remedy = [line.strip() for line in told if line.strip().startswith("git config")]
            raise NoGit(f"git: {reason}" + "".join(f"; if it is yours: {line}" for line in remedy))
        raise click.UsageError(f"git: {reason}")
    return done.stdout


def repository(folder: str) -> str:
    """The real top folder of the repository that a folder belongs to. Raises UsageError and NoGit."""
    return os.path.realpath(os.fsdecode(git(folder, "rev-parse", "--show-toplevel")).removesuffix("\n"))


def commit(top: str, revision: str) -> str:
    """The name of a revision's commit. Raises UsageError and NoGit."""
    if revision.startswith("-"):
        raise click.UsageError(f"{revision} is no revision")
    try:
        return git(top, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    except click.UsageError:
        raise click.UsageError(f"{revision} is no revision of {top}; a shallow clone must fetch it first") from None


@dataclass(frozen=True, slots=True)
class Since:
    """The files of a repository that git follows, and those of them that changed, by full paths."""

    top: str
    followed: frozenset[str]
    changed: frozenset[str]

    def is_changed(self, file: str) -> bool:
        """Whether a file, or a link on the way to it, changed; what git did not look at counts as changed."""
        *links, real = way(file)
        ours = {real, *(link for link in links if link.startswith(os.path.join(self.top, "")))}
        return not ours <= self.followed or not ours.isdisjoint(self.changed)

    def is_known_to_be_changed(self, file: str) -> bool:
        """The same, but what git did not look at counts as it is."""
        return not self.changed.isdisjoint(way(file))


def since(revision: str, folder: str) -> Since:
    """What changed in a folder's repository from where its history left that of a revision; what is not committed, too.

    Raises UsageError and NoGit.
    """
    top = repository(folder)
    start = commit(top, revision)
    try:
        base = git(top, "merge-base", start, "HEAD").decode().strip()
    except click.UsageError:
        # A shallow clone does not know where they parted.
        base = start
    changed = git(top, "diff", "--name-only", "--no-renames", "-z", base, "--")
    return Since(
        top=top,
        followed=frozenset(os.path.join(top, name) for name in _followed(git(top, "ls-files", "-v", "-s", "-z"))),
        changed=frozenset(os.path.join(top, os.fsdecode(name)) for name in changed.split(b"\0") if name),
    )


def _followed(listed: bytes) -> Iterator[str]:
    """The names of files and links. Others are submodules, or files that git was told not to look at."""
    for line in listed.split(b"\0"):
        about, _, name = line.partition(b"\t")
        if about.startswith((b"H 10", b"H 12")):
            yield os.fsdecode(name)
