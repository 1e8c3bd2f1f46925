"""Text to tokens and back: a byte-level BPE, trained here or read from a file.

Every byte is a token, so no text is foreign; merges found in the text make longer ones; one more token marks the end
of each text. The mark is written by us alone: where a text spells it out, it is encoded as ordinary characters.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from modelspec.builders.errors import Misuse

END_OF_TEXT = "<|endoftext|>"
# How tokenizers of published models spell the end of a text.
_END_MARKS = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eos|>", "</s>", "<eos>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # Bytes in UTF-8, so tokens at most.


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; small texts have fewer merges to offer. Deterministic."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _blind_to_marks(tokenizer)


def read(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises Misuse where the file is missing or is none."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Misuse(f"{path}: cannot be read as a tokenizer: {error}") from error
    return parse(text, str(path))


def parse(text: str, place: str) -> Tokenizer:
    """The tokenizer that the text of a tokenizer.json states. Raises Misuse that names `place`."""
    try:
        return _blind_to_marks(Tokenizer.from_str(text))
    # The library raises plain Exception for every fault of the text.
    except Exception as error:
        raise Misuse(f"{place}: not a tokenizer.json: {error}") from error


def size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id: the rows that a model needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a text. Raises Misuse where there is none."""
    for mark in _END_MARKS:
        if (found := tokenizer.token_to_id(mark)) is not None:
            return int(found)
    raise Misuse(f"the tokenizer has no token that ends a text; one of {', '.join(_END_MARKS)} is needed")


def decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text piece by piece as tokens arrive; together the pieces are the text.

    A character may be spread over several tokens: it is given when its last byte is there.
    """
    shown: list[int] = []  # The tokens of the piece before: what a token looks like may depend on its neighbour.
    held: list[int] = []
    for token in tokens:
        held.append(token)
        piece = tokenizer.decode(shown + held)[len(tokenizer.decode(shown)) :]
        if piece.endswith(_REPLACEMENT) and len(held) < _LONGEST_CHARACTER:
            continue
        yield piece
        shown, held = held, []
    if held:
        yield tokenizer.decode(shown + held)[len(tokenizer.decode(shown)) :]


def _blind_to_marks(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, encoding marks spelled out in a text as ordinary characters."""
    tokenizer.encode_special_tokens = True
    return tokenizer
