"""A spec as it was at a git revision: it and what it extended there, copied into a folder that lives for one `with`.

The tree is walked as a checkout would be, links included; a link that leads out of the tree is left out.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click

from modelspec.cli.git import commit, git, repository
from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.document import read
from modelspec.resolve import MAX_FILES, SHIPPED, plain

_LINK, _FOLDER, _FILES = b"120000", b"040000", (b"100644", b"100755")
_MAX_LINKS = 40


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a path led to at a revision: a copy of it, in a folder that stands for the repository."""

    folder: str
    path: str
    revision: str

    def said(self, text: str) -> str:
        """A text as it reads without the folder."""
        return text.replace(f"{self.folder}/", "").replace(self.folder, f"the repository at {self.revision}")

    def named(self, file: str) -> str:
        """The name of a file: its path in the repository, and the revision."""
        inside = self.said(file)
        return inside if file in (inside, self.folder) else f"{inside} at {self.revision}"

    def told(self, error: SpecError) -> SpecError:
        """The error in terms of the repository."""

        def at(place: Place) -> Place:
            return replace(place, file=self.named(place.file))

        def of(found: Diagnostic) -> Diagnostic:
            related = tuple(Related(note.path, at(note.place), self.said(note.message)) for note in found.related)
            help = found.help and self.said(found.help)
            return replace(
                found, place=at(found.place), message=self.said(found.message), help=help, related=related, fix=None
            )

        sources = {self.named(file): text for file, text in error.sources.items()}
        return SpecError(map(of, error.diagnostics), sources, error.exit_code)


@contextmanager
def at_revision(path: str, revision: str) -> Iterator[Earlier]:
    """A file or a folder as it was; nothing is there if it was not. Raises UsageError and NoGit."""
    is_folder = os.path.isdir(path)
    beside = os.path.realpath(path if is_folder else os.path.dirname(path))
    top = repository(beside)
    tree = _Tree(top, commit(top, revision))
    inside = os.path.relpath(beside if is_folder else os.path.join(beside, os.path.basename(path)), top)
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.realpath(temporary)
        wanted = [os.path.join(inside, name) for name in ("spec.yaml", "config.json")] if is_folder else [inside]
        try:
            for each in wanted:
                _copy(tree, each, folder)
        except OSError as error:
            raise click.UsageError(f"{path} at {revision}: {error.strerror}") from None
        # Marks the root that specs may not reach out of.
        if not os.path.lexists(mark := os.path.join(folder, "pyproject.toml")):
            Path(mark).touch()
        yield Earlier(folder, os.path.normpath(os.path.join(folder, inside)), revision)


def _copy(tree: "_Tree", path: str, folder: str) -> None:
    """Copies a file and all that it extends, each once; what cannot be read is told when the spec is."""
    ahead, done = [path], set[str]()
    while ahead and len(done) <= MAX_FILES:
        path = ahead.pop()
        if path in done:
            continue
        done.add(path)
        tree.copy(path, folder)
        ahead += (os.path.join(os.path.dirname(path), name) for name in _extended(os.path.join(folder, path)))


def _extended(file: str) -> Iterator[str]:
    """The names of files that a spec extends."""
    try:
        entry = read(file).root.entries.get("extends")
    except SpecError:
        return
    said = plain(entry.node) if entry else None
    for name in said if isinstance(said, list) else [said]:
        if isinstance(name, str) and not os.path.isabs(name) and not name.startswith(SHIPPED) and "\0" not in name:
            yield name


class _Tree:
    """The files, folders and links of a commit, by path."""

    def __init__(self, top: str, commit: str) -> None:
        self.top = top
        listed = git(top, "ls-tree", "-r", "-t", "-z", "--full-tree", commit).split(b"\0")
        lines = (line.partition(b"\t") for line in listed if line)
        self.entries = {os.fsdecode(name): about.split() for about, _, name in lines}

    def copy(self, path: str, folder: str) -> None:
        """Copies what a path leads to, with the folders and links on the way, if it leads to something in the tree."""
        here: list[str] = []
        ahead, links = path.split("/")[::-1], list[tuple[str, str]]()
        while ahead:
            step = ahead.pop()
            if step in ("", "."):
                continue
            if step == "..":
                if not here:
                    return
                here.pop()
                continue
            here.append(step)
            name = "/".join(here)
            mode, _, blob = self.entries.get(name, (b"", b"", b""))
            where = os.path.join(folder, name)
            if mode == _LINK:
                target = os.fsdecode(git(self.top, "cat-file", "blob", blob.decode()))
                links.append((where, target))
                if os.path.isabs(target) or len(links) > _MAX_LINKS:
                    return
                here.pop()
                ahead += target.split("/")[::-1]
            elif mode == _FOLDER:
                os.makedirs(where, exist_ok=True)
            elif mode in _FILES and not ahead:
                Path(where).write_bytes(git(self.top, "cat-file", "blob", blob.decode()))
            else:
                return
        # Only now is it known that they stay inside.
        for where, target in links:
            if not os.path.lexists(where):
                os.symlink(target, where)
