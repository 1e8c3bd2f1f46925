"""Where a path leads, link by link, the project that it belongs to, and files that are whole or as they were. No torch.

A file is written aside, forced to disk and renamed.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# As many as Linux follows.
_MAX_LINKS = 40


def way(path: str | os.PathLike[str]) -> Iterator[str]:
    """The links that a path leads over, each by the real path of its own place, and at last what they lead to.

    Links in the target of a link count too. The last one is like `os.path.realpath`, and need not exist. Raises
    FileNotFoundError for a relative path where the working directory is gone.
    """
    written = os.fspath(path)
    here, ahead = (os.sep if os.path.isabs(written) else os.getcwd()), written.split(os.sep)[::-1]
    links = 0
    while ahead:
        step = ahead.pop()
        if step == os.pardir:
            here = os.path.dirname(here)
        if step in ("", os.curdir, os.pardir):
            continue
        here = os.path.join(here, step)
        try:
            target = os.readlink(here) if links < _MAX_LINKS else None
        except (OSError, ValueError):
            target = None
        if target is not None:
            yield here
            links += 1
            here = os.sep if os.path.isabs(target) else os.path.dirname(here)
            ahead += target.split(os.sep)[::-1]
    yield here


def project(spec: str | os.PathLike[str]) -> str:
    """The real folder of a spec's project, which it and what it extends may not leave.

    It is that of the folder where the spec stands; of a path over links, where the first link stands, so that no link
    in a project leads out of it. Links above all projects, as to a home on another disk, are followed.
    """
    *links, real = way(spec)
    # By an absolute path one may come through links that are not the project's.
    own = os.sep
    if os.path.isabs(spec):
        with suppress(FileNotFoundError):
            own = os.getcwd()
    last = os.path.join(os.path.realpath(os.path.dirname(spec)), os.path.basename(spec))
    for link in links:
        folder = os.path.dirname(link)
        if (root := _root(folder)) is not None or link == last or Path(folder).is_relative_to(own):
            return root or folder
    folder = os.path.dirname(real)
    return _root(folder) or folder


def _root(folder: str) -> str | None:
    """The nearest folder with the mark of a project, from a folder upwards."""
    above = (Path(folder), *Path(folder).parents)
    return next(
        (str(each) for each in above if any(os.path.exists(each / m) for m in (".git", "pyproject.toml"))), None
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Makes a file hold `content`, in one moment; a link is followed, and the mode of a file that exists stays.

    Raises OSError; the file is then as it was.
    """
    path = Path(os.path.realpath(path))
    # Not longer for a long name: what is legal for the file must be so for this one.
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.exists(path):
            temporary.chmod(path.stat().st_mode & 0o7777)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
