"""From documents to two long rows of tokens per source, one to train on and one to validate on; cached.

Documents are tokenized, each is followed by the end-of-text token, and the rows are kept as plain little-endian
integers (two bytes each if the vocabulary allows). A document falls to validation when a hash of its identity is in
the lowest 5 %, so the split never moves when documents are added. Where that leaves validation a share of text outside
1 to 20 %, as with few or very uneven documents, the last 5 % of each document is held out instead.

The cache is keyed by everything that determines its content: the names, sizes and modification times of the files, and
the tokenizer. A folder in it is whole or not there.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, assert_never

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from modelspec import schema
from modelspec.builders import tokenizer as bpe
from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.files import published, sweep
from modelspec.builders.sources import Document, documents, files

Progress = Callable[[str, float], None]

_FORMAT = 1
_DAY = 24 * 3600.0
_HELD_OUT = 0.05
_ACCEPTED_SHARES = (0.01, 0.2)
# The tokenizer works on pieces of this size: long texts use all cores, and memory stays bounded.
_PIECE, _BATCH = 2**18, 2**21


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one source: `train` and `validation` are long rows on disk.

    `train_counts` [vocabulary] counts each token of `train`; `validation_bytes` is the size of the text behind
    `validation`; `weight` is the source's share, relative to the others.
    """

    weight: float
    train: NDArray[Any]
    validation: NDArray[Any]
    train_counts: NDArray[np.int64]
    validation_bytes: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """All text of a spec as tokens. Equal fingerprints mean equal tokens and tokenizer."""

    tokenizer_json: str
    rows: tuple[Rows, ...]
    fingerprint: str

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return bpe.parse(self.tokenizer_json, "tokenizer.json")


@dataclass(slots=True)
class _Survey:
    """What a first look at a source says about its split."""

    characters: int = 0
    held_out: int = 0

    def add(self, document: Document) -> None:
        self.characters += len(document.text)
        self.held_out += len(document.text) * _is_held_out(document)

    @property
    def by_document(self) -> bool:
        """Whether whole documents are held out, not the end of each."""
        least, most = _ACCEPTED_SHARES
        return least <= self.held_out / max(self.characters, 1) <= most


def cache_folder() -> Path:
    """$MODELSPEC_CACHE, or the platform's folder for what may be made again."""
    if named := os.environ.get("MODELSPEC_CACHE"):
        return Path(named)
    match sys.platform:
        case "darwin":
            base = Path.home() / "Library" / "Caches"
        case "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        case _:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "modelspec"


def prepare(
    sources: Sequence[schema.Source],
    tokenizer: schema.TrainedBPE | schema.TokenizerFile,
    *,
    cache: Path | None = None,
    progress: Progress = lambda activity, share: None,
) -> Corpus:
    """The corpus of the sources, from the cache if it is there.

    `progress` hears what is done and the share of it that is behind, 0 to 1; what it raises ends the work.
    Raises Misuse for bad text and EnvironmentFailed for a bad disk.
    """
    folder = (cache or cache_folder()) / "corpora" / _key(sources, tokenizer)
    corpus = _opened(folder, sources)
    if corpus is None:
        sweep(folder.parent, older_than=_DAY)
        try:
            with published(folder) as fresh:
                _fill(fresh, sources, tokenizer, progress)
        except EnvironmentFailed as error:
            raise EnvironmentFailed(f"{error}\n  help: MODELSPEC_CACHE names another folder for the cache") from error
        corpus = _opened(folder, sources)
        assert corpus is not None, f"{folder} was written a moment ago"
    return corpus


def _key(sources: Sequence[schema.Source], tokenizer: schema.TrainedBPE | schema.TokenizerFile) -> str:
    match tokenizer:
        case schema.TrainedBPE():
            tokens: object = ["bpe_trained", tokenizer.vocab_size]
        case schema.TokenizerFile():
            text = bpe.read(Path(tokenizer.path)).to_str()
            tokens = ["file", hashlib.sha256(text.encode()).hexdigest()]
        case _:
            assert_never(tokenizer)
    listing = [
        [source.type, getattr(source, "field", None), [_stamp(file.name, file.path) for file in files(source)]]
        for source in sources
    ]
    content = json.dumps([_FORMAT, tokens, listing])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _stamp(name: str, path: Path) -> list[object]:
    try:
        status = path.stat()
    except OSError as error:
        raise Misuse(f"{path}: {error.strerror}") from error
    return [name, status.st_size, status.st_mtime_ns]


def _fill(
    folder: Path,
    sources: Sequence[schema.Source],
    spec: schema.TrainedBPE | schema.TokenizerFile,
    progress: Progress,
) -> None:
    """Writes all files of a corpus into an empty folder."""
    surveys = [_Survey() for _ in sources]
    texts = _read(sources, surveys, progress)
    match spec:
        case schema.TrainedBPE():
            tokenizer = bpe.train_bpe(texts, spec.vocab_size)
        case schema.TokenizerFile():
            for _ in texts:
                pass
            tokenizer = bpe.read(Path(spec.path))
        case _:
            assert_never(spec)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    entries = [
        _encode(folder, number, source, survey.by_document, tokenizer, progress, sum(s.characters for s in surveys))
        for number, (source, survey) in enumerate(zip(sources, surveys, strict=True))
    ]
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    index = {
        "format": _FORMAT,
        "sources": entries,
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "fingerprint": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), "utf-8")


def _read(sources: Sequence[schema.Source], surveys: Sequence[_Survey], progress: Progress) -> Iterator[str]:
    """All text in pieces, while the surveys fill."""
    total = max(sum(file.path.stat().st_size for source in sources for file in files(source)), 1)
    done = 0
    for number, (source, survey) in enumerate(zip(sources, surveys, strict=True)):
        for document in documents(source):
            survey.add(document)
            done += len(document.text)
            progress("reading text", min(done / total, 1.0))
            yield from _pieces(document.text)
        if survey.characters < 2:
            raise Misuse(f"data.sources.{number} ({source.type}): its files hold no text")
    progress("finding the vocabulary", 0.0)


def _encode(
    folder: Path,
    number: int,
    source: schema.Source,
    by_document: bool,
    tokenizer: Tokenizer,
    progress: Progress,
    total: int,
) -> dict[str, int]:
    """Writes the rows of one source; gives what the index says of it."""
    size = bpe.size(tokenizer)
    dtype = np.dtype("<u2" if size <= 2**16 else "<u4")
    end = bpe.end_of_text(tokenizer)
    counts = np.zeros(size, np.int64)
    validation_bytes = done = 0
    with _row(folder, number, "train").open("wb") as train, _row(folder, number, "validation").open("wb") as held_out:
        for batch in _batches(_sides(documents(source), by_document)):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                row = np.array([*encoding.ids, end] if piece.last else encoding.ids, dtype)
                _append(held_out if piece.held_out else train, row)
                if piece.held_out:
                    validation_bytes += len(piece.text.encode())
                else:
                    counts += np.bincount(row, minlength=size)
                done += len(piece.text)
            progress("encoding text", min(done / total, 1.0))
    counts.astype("<i8").tofile(_row(folder, number, "counts"))
    return {"vocabulary": size, "validation_bytes": validation_bytes}


def _append(file: IO[bytes], row: NDArray[Any]) -> None:
    file.write(row.tobytes())


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    held_out: bool
    last: bool  # The document's side ends here.


def _sides(found: Iterable[Document], by_document: bool) -> Iterator[_Piece]:
    """Documents in pieces, each on its side of the split."""
    for document in found:
        text = document.text
        if by_document:
            parts = [(text, _is_held_out(document))]
        else:
            cut = len(text) - max(round(len(text) * _HELD_OUT), 1)
            parts = [(text[:cut], False), (text[cut:], True)] if cut else [(text, False)]
        for part, held_out in parts:
            pieces = list(_pieces(part))
            for piece in pieces[:-1]:
                yield _Piece(piece, held_out, last=False)
            yield _Piece(pieces[-1], held_out, last=True)


def _pieces(text: str) -> Iterator[str]:
    """The text cut after line ends, where a piece would grow too long."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_held_out(document: Document) -> bool:
    digest = hashlib.blake2b(document.identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < _HELD_OUT * 2**64


def _opened(folder: Path, sources: Sequence[schema.Source]) -> Corpus | None:
    """The corpus in a folder of the cache; None where it is missing or has lost bytes."""
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
        if any((folder / name).stat().st_size != size for name, size in index["bytes"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    rows = [
        _rows(folder, number, entry, source.weight)
        for number, (entry, source) in enumerate(zip(index["sources"], sources, strict=True))
    ]
    return Corpus((folder / "tokenizer.json").read_text("utf-8"), tuple(rows), index["fingerprint"])


def _rows(folder: Path, number: int, entry: dict[str, int], weight: float) -> Rows:
    dtype = np.dtype("<u2" if entry["vocabulary"] <= 2**16 else "<u4")
    return Rows(
        weight=weight,
        train=_mapped(_row(folder, number, "train"), dtype),
        validation=_mapped(_row(folder, number, "validation"), dtype),
        train_counts=_mapped(_row(folder, number, "counts"), np.dtype("<i8")),
        validation_bytes=entry["validation_bytes"],
    )


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _row(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number}.{kind}.bin"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
