"""Which window of text each training sequence is: a pure function of the seed and the sequence's number in the run.

Sequences are numbered from 0 through the whole run. Neither the batch size nor the number of processes enters, so a
run that resumes, or goes on with another world, reads exactly the windows that it would have read.

Two shuffles give the window. Numbers are dealt in blocks: a block holds every source as often as its weight says, in
an order of its own. The n-th sequence of a source is then the n-th window of a permutation of all its windows, a new
one for each pass over the text. The permutation is computed at one place at a time, never kept: a four-round Feistel
network on the bits of the number, repeated until the result is in range.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelspec.builders.corpus import Corpus
from modelspec.builders.errors import Misuse

_BLOCK = 1024
_ROUNDS = 4


class Samples:
    """Training sequences of a corpus, by number."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._rows = [rows.train for rows in corpus.rows]
        self._seed = seed
        self._shares = _shares([rows.weight for rows in corpus.rows], max(_BLOCK, len(corpus.rows)))
        self._deal = lru_cache(maxsize=4)(self._dealt)

    def require(self, length: int) -> None:
        """Raises Misuse if a source is shorter than one sequence of `length` tokens."""
        for number, row in enumerate(self._rows):
            if len(row) <= length:
                raise Misuse(
                    f"data.sources.{number}: {len(row):,} training tokens, fewer than the {length + 1:,} of one "
                    "sequence; add text or set a smaller sequence_length"
                )

    def window(self, index: int, length: int) -> NDArray[np.int64]:
        """Sequence number `index`: `length` tokens and the one after them, int64 [length + 1]."""
        source, ordinal = self._place(index)
        row = self._rows[source]
        windows = (len(row) - 1) // length
        turn, within = divmod(ordinal, windows)
        start = shuffled(within, windows, _hash(self._seed, "window", source, length, turn)) * length
        return row[start : start + length + 1].astype(np.int64)

    def batch(self, first: int, size: int, length: int) -> Tensor:
        """Sequences `first` to `first + size`, int64 [size, length + 1]."""
        return torch.from_numpy(np.stack([self.window(first + offset, length) for offset in range(size)]))

    def _place(self, index: int) -> tuple[int, int]:
        """The source of a sequence, and how many sequences of that source came before it."""
        block, position = divmod(index, sum(self._shares))
        sources, ranks = self._deal(block)
        source = int(sources[position])
        return source, block * self._shares[source] + int(ranks[position])

    def _dealt(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source at each position of a block, and how many of the same source stand before it there."""
        in_order = np.repeat(np.arange(len(self._shares)), self._shares)
        key = _hash(self._seed, "block", block)
        sources = in_order[[shuffled(position, len(in_order), key) for position in range(len(in_order))]]
        ranks = np.empty_like(sources)
        for source, share in enumerate(self._shares):
            ranks[sources == source] = np.arange(share)
        return sources, ranks


def shuffled(index: int, count: int, key: int) -> int:
    """Where a permutation of range(count), chosen by `key`, sends `index`."""
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = 2**half - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + (turn << 56) + right) & mask)
        index = left << half | right
        if index < count:
            return index


def validation_windows(corpus: Corpus, length: int, tokens: int) -> NDArray[np.int64]:
    """About `tokens` held-out tokens as windows spread evenly over each source, int64 [windows, length + 1].

    Sources share by weight. Where all are shorter than a window, the windows are shorter. Raises Misuse without text.
    """
    longest = max(len(rows.validation) for rows in corpus.rows)
    if longest < 2:
        raise Misuse("data.sources: too little text to hold any out for validation")
    length = min(length, longest - 1)
    usable = [rows for rows in corpus.rows if len(rows.validation) > length]
    whole = sum(rows.weight for rows in usable)
    windows = []
    for rows in usable:
        available = (len(rows.validation) - 1) // length
        wanted = min(max(math.ceil(tokens * rows.weight / whole / length), 1), available)
        starts = np.arange(wanted) * available // wanted * length
        windows.append(rows.validation[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return np.concatenate(windows)


def unigram_loss(corpus: Corpus, windows: NDArray[np.int64]) -> float:
    """Mean cross-entropy, in nats per token, of predicting each token by how often it stands in the training text.

    Counts are smoothed by one; sources mix by weight. What a model must beat to have learned anything from context.
    """
    whole = sum(rows.weight for rows in corpus.rows)
    probability = np.zeros(len(corpus.rows[0].train_counts))
    for rows in corpus.rows:
        counts = rows.train_counts + 1.0
        probability += rows.weight / whole * counts / counts.sum()
    return float(-np.log(probability)[windows[:, 1:]].mean())


def bytes_per_token(corpus: Corpus) -> float:
    """Mean bytes of held-out text behind one token."""
    tokens = sum(len(rows.validation) for rows in corpus.rows)
    return sum(rows.validation_bytes for rows in corpus.rows) / max(tokens, 1)


def _shares(weights: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights, at least 1 each, that sum to about `total`."""
    return [max(round(weight / sum(weights) * total), 1) for weight in weights]


def _hash(*parts: object) -> int:
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """The finalizer of splitmix64: 64 bits in, 64 well-mixed bits out."""
    value &= 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return value ^ value >> 31
