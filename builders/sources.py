"""Documents: where text comes from.

A source is a list of files, and a document is a file of it or a line of it. Order and identity of documents depend on
nothing but names, so that two machines with the same files see the same documents.
"""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from modelspec import schema
from modelspec.builders.errors import Misuse

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Installed packages are not the standard library, and bytecode is not text.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text and the name that decides on which side of the split it falls."""

    identity: str
    text: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source; `name` is relative to the source's root, and the same on every machine."""

    name: str
    path: Path


def files(source: schema.Source) -> list[SourceFile]:
    """The files of a source by name. Raises Misuse where there are none."""
    match source:
        case schema.PythonStdlib():
            return list(_stdlib_files(Path(sysconfig.get_path("stdlib"))))
        case schema.TextFiles() | schema.JSONLines():
            names = sorted(glob.glob(os.path.expanduser(source.files), recursive=True, include_hidden=False))
            found = [SourceFile(Path(name).as_posix(), Path(name)) for name in names if Path(name).is_file()]
            if not found:
                raise Misuse(f"data.sources: no file matches {source.files!r} (from {Path.cwd()})")
            return found
        case _:
            assert_never(source)


def documents(source: schema.Source) -> Iterator[Document]:
    """The documents of a source that have any text, in order.

    Raises Misuse with the file, and the line of a jsonl file, for what is not UTF-8, not JSON or without the field.
    """
    for file in files(source):
        match source:
            case schema.PythonStdlib():
                # The library tests other encodings on files of its own.
                text = _decoded(file.path)
                found = iter([Document(f"python_stdlib:{file.name}", text)] if text is not None else [])
            case schema.TextFiles():
                text = _decoded(file.path)
                if text is None:
                    raise Misuse(f"{file.path}: not UTF-8 text; data.sources takes UTF-8 only")
                found = iter([Document(file.name, text)])
            case schema.JSONLines():
                found = _json_lines(file, source.field)
            case _:
                assert_never(source)
        yield from (document for document in found if document.text)


def _stdlib_files(root: Path) -> Iterator[SourceFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _STDLIB_SKIPPED)
        for name in sorted(names):
            if name.endswith(_STDLIB_SUFFIXES):
                path = Path(folder, name)
                yield SourceFile(path.relative_to(root).as_posix(), path)


def _decoded(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise Misuse(f"{path}: {error.strerror}") from error


def _json_lines(file: SourceFile, field: str) -> Iterator[Document]:
    try:
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Document(f"{file.name}:{number}", _field(line, field, f"{file.path}:{number}"))
    except OSError as error:
        raise Misuse(f"{file.path}: {error.strerror}") from error


def _field(line: bytes, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise Misuse(f"{place}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise Misuse(f"{place}:{error.colno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise Misuse(f"{place}: JSON that is nested too deeply or holds a number too long to read") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise Misuse(f"{place}: expected an object whose {field!r} is text; `field` of the source names another key")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise Misuse(f"{place}: half of a surrogate pair in {field!r}, which is no text; write both halves or none")
    return text
