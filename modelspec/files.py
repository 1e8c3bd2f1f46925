"""Where a path leads, link by link, and files that are either whole or as they were. Without torch.

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
        if path.exists():
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
