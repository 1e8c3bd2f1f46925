"""Where text comes from and how it becomes training sequences."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from modelspec.schema.base import AsTuple, Positive, Strict

Glob = Annotated[str, Field(min_length=1, max_length=4096)]


class PythonStdlib(Strict):
    """The source and documentation of the Python that runs: real text on every machine, without a network."""

    type: Literal["python_stdlib"] = Field(description="the standard library's own source and documentation")
    weight: Positive = Field(default=1.0, description="share of sequences, relative to the other sources; no unit")


class TextFiles(Strict):
    """Text files, each a document."""

    type: Literal["text"] = Field(description="plain UTF-8 text")
    files: Glob = Field(description="glob of files, ** included, relative to the working directory")
    weight: Positive = Field(default=1.0, description="share of sequences, relative to the other sources; no unit")


class JSONLines(Strict):
    """Files with one JSON object per line, each a document."""

    type: Literal["jsonl"] = Field(description="one JSON object per line")
    files: Glob = Field(description="glob of files, ** included, relative to the working directory")
    field: Annotated[str, Field(min_length=1)] = Field(
        default="text", description="key of the object that holds the text"
    )
    weight: Positive = Field(default=1.0, description="share of sequences, relative to the other sources; no unit")


Source = Annotated[PythonStdlib | TextFiles | JSONLines, Discriminator("type")]


class TrainedBPE(Strict):
    """A byte-level BPE trained on the sources themselves, and cached."""

    type: Literal["bpe_trained"] = Field(description="train a byte-level BPE on the sources")
    vocab_size: Annotated[int, Field(ge=257, le=2**22)] = Field(
        description="entries: 256 bytes, the end-of-text mark, and merges; tokens"
    )


class TokenizerFile(Strict):
    """A tokenizer that exists."""

    type: Literal["file"] = Field(description="read a tokenizer.json")
    path: Glob = Field(description="path of a tokenizer.json, relative to the working directory")


Tokenizer = Annotated[TrainedBPE | TokenizerFile, Discriminator("type")]


class Packing(Strict):
    """How documents fill sequences: one after the other, cut where a sequence is full."""

    document_mask: bool = Field(default=False, description="keep attention inside each document of a sequence")


class FillInMiddle(Strict):
    """Documents rearranged so that the model learns to fill a gap (arXiv 2207.14255)."""

    rate: Annotated[float, Field(ge=0, le=1)] = Field(description="share of documents rearranged; 0 to 1")
    format: Literal["psm"] = Field(description="prefix, suffix, middle")


class Data(Strict):
    """Text sources and their treatment."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1), AsTuple] | None = Field(
        default=None, description="where text comes from; training needs at least one"
    )
    tokenizer: Tokenizer | None = Field(default=None, description="from text to tokens; training needs one")
    packing: Packing = Field(default=Packing(), description="how documents fill sequences")
    fill_in_middle: FillInMiddle | None = Field(default=None, description="gap filling; left out: none")
