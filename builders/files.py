"""Files that are either whole or not there.

Everything that a run keeps is written under a temporary name beside its final one, forced to disk and renamed. The
rename is the only moment at which it appears, so a kill at any time leaves the old state, never half of the new one.
Temporary names start with `.tmp-`; what a killed process left is swept by the next one.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelspec.builders.errors import EnvironmentFailed

TEMPORARY = ".tmp-"


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns an error of the file system while writing `path` into EnvironmentFailed, which names the path."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailed(f"cannot write {path}: {error.strerror or error}") from error


def require_free(folder: Path, needed: int) -> None:
    """Raises EnvironmentFailed unless the disk of `folder` has room for `needed` bytes."""
    with disk(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFailed(f"cannot write {folder}: {needed:,} bytes are needed and {free:,} are free")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` when the block ends; on an exception it is removed.

    A folder that stands there already is replaced. Raises EnvironmentFailed for errors of the disk.
    """
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    replaced = folder.with_name(f"{TEMPORARY}{os.getpid()}-replaced-{folder.name}")
    with disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                _force(path)
            _force(temporary)
            if folder.exists():
                folder.rename(replaced)
            temporary.rename(folder)
            _force(folder.parent)
        finally:
            for leftover in (temporary, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by `text` in one moment. Raises EnvironmentFailed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file by `content` in one moment. Raises EnvironmentFailed."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with disk(path):
        try:
            temporary.write_bytes(content)
            _force(temporary)
            temporary.replace(path)
            _force(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Deletes a folder that was published; it is gone in one moment, its files a little later."""
    doomed = folder.with_name(f"{TEMPORARY}{os.getpid()}-discarded-{folder.name}")
    with disk(folder):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Whether the name is one of those that this module gives and takes away."""
    return re.match(rf"{re.escape(TEMPORARY)}\d+-", path.name) is not None


def sweep(folder: Path, older_than: float = 0.0) -> None:
    """Removes what killed processes left directly in `folder`.

    Where several may write, `older_than` seconds spare what a living one is writing.
    """
    for path in filter(is_temporary, folder.glob(f"{TEMPORARY}*")):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime < older_than:
                continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _force(path: Path) -> None:
    """Waits until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
