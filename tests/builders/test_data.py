"""Sources, tokenizer, corpus and the order of sequences."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modelspec import schema
from modelspec.builders import tokenizer as bpe
from modelspec.builders.corpus import Corpus, Rows, cache_folder, prepare
from modelspec.builders.data import Samples, bytes_per_token, shuffled, unigram_loss, validation_windows
from modelspec.builders.errors import Misuse, Stopped
from modelspec.builders.sources import documents, files

BPE = schema.TrainedBPE(type="bpe_trained", vocab_size=300)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "some",
    "dog",
    "lay",
    "by",
    "that",
    "door",
    "of",
    "an",
    "old",
    "house",
]


def _text(pattern: str, weight: float = 1.0) -> schema.TextFiles:
    return schema.TextFiles(type="text", files=pattern, weight=weight)


def _jsonl(path: Path) -> schema.JSONLines:
    return schema.JSONLines(type="jsonl", files=str(path))


def _write(folder: Path, number: int, words: int = 200) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        text = " ".join(WORDS[(index * 7 + word * word) % len(WORDS)] for word in range(words))
        (folder / f"{index:03}.txt").write_text(f"document {index}\n{text}\n")


def _rows(tokens: int, weight: float = 1.0, start: int = 0) -> Rows:
    row = np.arange(start, start + tokens, dtype="<u4")
    return Rows(weight, row, row[: tokens // 10], np.ones(8, np.int64), tokens)


def _corpus(*rows: Rows) -> Corpus:
    return Corpus("", rows, "")


def test_stdlib_source_is_text_of_the_running_python_without_installed_packages() -> None:
    names = [file.name for file in files(schema.PythonStdlib(type="python_stdlib"))]
    assert "json/decoder.py" in names
    assert names == sorted(set(names), key=names.index)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


def test_documents_of_a_glob_come_in_order_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "a", 3)
    (tmp_path / "a" / "001.txt").write_text("")
    found = [document.text.split("\n")[0] for document in documents(_text(f"{tmp_path}/**/*.txt"))]
    assert found == ["document 0", "document 2"]


def test_a_glob_that_matches_nothing_is_named() -> None:
    with pytest.raises(Misuse, match=r"no file matches 'nowhere/\*\.txt'"):
        files(_text("nowhere/*.txt"))


def test_text_that_is_not_utf8_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(Misuse, match=r"latin\.txt: not UTF-8"):
        list(documents(_text(f"{tmp_path}/*.txt")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", r"bad\.jsonl:3:1: not JSON"),
        (b"[1]", r"bad\.jsonl:3: expected an object whose 'text' is text"),
        (b'{"txt": "a"}', r"bad\.jsonl:3: expected"),
        (b'{"text": 5}', r"bad\.jsonl:3: expected"),
        (b'{"text": "\xff"}', r"bad\.jsonl:3: not UTF-8"),
        (rb'{"text": "a \ud800 b"}', r"bad\.jsonl:3: half of a surrogate pair in 'text'"),
        (b"[" * 100_000, r"bad\.jsonl:3: JSON that is nested too deeply"),
        (b"1" * 10_000, r"bad\.jsonl:3: JSON that is nested too deeply or holds a number too long"),
    ],
    ids=["syntax", "list", "no field", "number", "encoding", "surrogate", "depth", "digits"],
)
def test_a_bad_jsonl_line_names_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(Misuse, match=reason):
        list(documents(_jsonl(path)))


def test_trained_tokenizer_keeps_every_byte_and_never_reads_marks_from_text() -> None:
    tokenizer = bpe.train_bpe(["the cat sat on the mat"] * 20, 280)
    text = "naïve 漢字 \x00\r\n\t<|endoftext|> 🙂"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert bpe.end_of_text(tokenizer) not in ids
    assert 257 <= bpe.size(tokenizer) <= 280


def test_decoded_pieces_join_to_the_text_and_never_split_a_character() -> None:
    tokenizer = bpe.train_bpe(["plain text"], 257)
    text = "a漢字🙂é, done"
    pieces = list(bpe.decoded(tokenizer, tokenizer.encode(text).ids))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_decoding_survives_bytes_that_are_no_text() -> None:
    tokenizer = bpe.train_bpe(["plain text"], 257)
    broken = tokenizer.encode("🙂").ids[:2]
    assert "".join(bpe.decoded(tokenizer, [*broken, *tokenizer.encode("ok").ids])).endswith("ok")
    assert "".join(bpe.decoded(tokenizer, broken)) == "\N{REPLACEMENT CHARACTER}"


def test_a_tokenizer_file_without_end_mark_or_without_sense_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(Misuse, match=r"bad\.json: not a tokenizer\.json"):
        bpe.read(tmp_path / "bad.json")
    with pytest.raises(Misuse, match="cannot be read"):
        bpe.read(tmp_path / "absent.json")


def test_corpus_is_the_same_when_made_again_and_when_read_from_the_cache(tmp_path: Path) -> None:
    _write(tmp_path / "text", 120)
    source = _text(f"{tmp_path}/text/*.txt")
    made = prepare([source], BPE, cache=tmp_path / "one")
    again = prepare([source], BPE, cache=tmp_path / "two")
    heard: list[str] = []
    cached = prepare([source], BPE, cache=tmp_path / "one", progress=lambda activity, share: heard.append(activity))
    assert made.fingerprint == again.fingerprint == cached.fingerprint
    assert heard == []
    np.testing.assert_array_equal(made.rows[0].train, cached.rows[0].train)


def test_documents_fall_whole_on_one_side_and_end_with_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which side a file falls on is by its path: another in every run could leave one side too little.
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "text", 120)
    corpus = prepare([_text("text/*.txt")], BPE, cache=tmp_path / "cache")
    (rows,), tokenizer = corpus.rows, corpus.tokenizer
    sides = [
        {
            text.strip().split("\n")[0]
            for text in tokenizer.decode(list(row), skip_special_tokens=False).split(bpe.END_OF_TEXT)
            if text
        }
        for row in (rows.train, rows.validation)
    ]
    assert sides[0] | sides[1] == {f"document {index}" for index in range(120)}
    assert not sides[0] & sides[1]
    assert 1 <= len(sides[1]) <= 24
    assert rows.train[-1] == rows.validation[-1] == bpe.end_of_text(tokenizer)
    np.testing.assert_array_equal(rows.train_counts, np.bincount(rows.train, minlength=len(rows.train_counts)))


def test_few_documents_are_each_cut_so_that_both_sides_have_text(tmp_path: Path) -> None:
    _write(tmp_path / "text", 1, words=4000)
    corpus = prepare([_text(f"{tmp_path}/text/*.txt")], BPE, cache=tmp_path / "cache")
    held_out = len(corpus.rows[0].validation)
    assert 0.03 < held_out / (held_out + len(corpus.rows[0].train)) < 0.07


def test_a_long_text_is_tokenized_in_pieces_without_losing_any(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(60_000))
    (tmp_path / "long.txt").write_text(text)
    corpus = prepare([_text(str(tmp_path / "long.txt"))], BPE, cache=tmp_path / "cache")
    joined = "".join(corpus.tokenizer.decode(list(row)) for row in (corpus.rows[0].train, corpus.rows[0].validation))
    assert joined == text


def test_a_changed_file_makes_a_new_corpus_and_a_cut_cache_is_made_again(tmp_path: Path) -> None:
    _write(tmp_path / "text", 30)
    source = _text(f"{tmp_path}/text/*.txt")
    before = prepare([source], BPE, cache=tmp_path / "cache").fingerprint
    for row in (tmp_path / "cache" / "corpora").glob("*/0.train.bin"):
        os.truncate(row, 10)
    assert prepare([source], BPE, cache=tmp_path / "cache").fingerprint == before
    (tmp_path / "text" / "000.txt").write_text("another text of another length")
    assert prepare([source], BPE, cache=tmp_path / "cache").fingerprint != before


def test_a_stop_while_preparing_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    _write(tmp_path / "text", 30)

    def stop(activity: str, share: float) -> None:
        if activity == "encoding text":
            raise Stopped(15)

    with pytest.raises(Stopped):
        prepare([_text(f"{tmp_path}/text/*.txt")], BPE, cache=tmp_path / "cache", progress=stop)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_an_error_in_text_passes_through_the_tokenizers_training(tmp_path: Path) -> None:
    _write(tmp_path / "text", 3)
    (tmp_path / "text" / "zzz.txt").write_bytes(b"\xff")
    with pytest.raises(Misuse, match=r"zzz\.txt"):
        prepare([_text(f"{tmp_path}/text/*.txt")], BPE, cache=tmp_path / "cache")


def test_a_kill_while_preparing_never_leaves_a_bad_cache(tmp_path: Path) -> None:
    _write(tmp_path / "text", 60)
    code = f"""
from pathlib import Path
from modelspec import schema
from modelspec.builders.corpus import prepare
source = schema.TextFiles(type="text", files="{tmp_path}/text/*.txt")
tokenizer = schema.TrainedBPE(type="bpe_trained", vocab_size=300)
for number in range(1000):
    prepare([source], tokenizer, cache=Path("{tmp_path}") / f"cache{{number}}")
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    published = [path for path in tmp_path.glob("cache*/corpora/*") if not path.name.startswith(".tmp-")]
    indices = [json.loads((path / "index.json").read_text()) for path in published]
    assert len({index["fingerprint"] for index in indices}) == 1
    for path, index in zip(published, indices, strict=True):
        assert {name: (path / name).stat().st_size for name in index["bytes"]} == index["bytes"]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELSPEC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_shuffled_is_a_permutation(count: int) -> None:
    assert sorted(shuffled(index, count, key=5) for index in range(count)) == list(range(count))


def test_shuffles_of_two_keys_differ_and_mix() -> None:
    first, second = ([shuffled(index, 1000, key) for index in range(1000)] for key in (1, 2))
    assert first != second
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1


def test_each_pass_reads_every_window_once_in_another_order() -> None:
    samples = Samples(_corpus(_rows(1001)), seed=3)
    passes = [[int(samples.window(turn * 100 + index, 10)[0]) for index in range(100)] for turn in range(3)]
    assert all(sorted(starts) == list(range(0, 1000, 10)) for starts in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_window_holds_its_tokens_and_the_one_after() -> None:
    window = Samples(_corpus(_rows(1001)), seed=0).window(7, 10)
    np.testing.assert_array_equal(window, window[0] + np.arange(11))


def test_the_order_does_not_depend_on_batch_size_or_on_who_asks() -> None:
    corpus = _corpus(_rows(5000), _rows(3000, weight=0.5, start=10_000))
    one, other = Samples(corpus, seed=1), Samples(corpus, seed=1)
    whole = one.batch(2000, 12, 16)
    parts = [other.batch(2000 + first, 4, 16) for first in (8, 0, 4)]
    assert whole.tolist() == [*parts[1].tolist(), *parts[2].tolist(), *parts[0].tolist()]
    assert whole.tolist() != Samples(corpus, seed=2).batch(2000, 12, 16).tolist()


def test_sources_share_by_weight_and_each_is_read_without_repeats() -> None:
    corpus = _corpus(_rows(50_001), _rows(50_001, weight=3.0, start=100_000))
    samples = Samples(corpus, seed=0)
    starts = [int(samples.window(index, 10)[0]) for index in range(4096)]
    shares = Counter(start >= 100_000 for start in starts)
    assert shares[True] == 3 * shares[False]
    assert len(set(starts)) == len(starts)


def test_a_source_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(Misuse, match=r"data\.sources\.1: 10 training tokens, fewer than the 11"):
        Samples(_corpus(_rows(100), _rows(10)), seed=0).require(10)


def test_validation_windows_are_fixed_spread_out_and_about_as_many_as_asked() -> None:
    corpus = _corpus(_rows(100_000))
    windows = validation_windows(corpus, 50, 1000)
    assert windows.shape == (20, 51)
    assert windows[0, 0] == 0 and windows[-1, 0] > 9000
    assert validation_windows(corpus, 50, 10**9).shape == (199, 51)
    assert validation_windows(_corpus(_rows(100)), 50, 1000).shape == (1, 10)


def test_unigram_loss_is_the_smoothed_cross_entropy() -> None:
    rows = Rows(1.0, np.empty(0), np.array([0, 0, 1, 2, 0]), np.array([7, 1, 0]), 10)
    expected = -np.mean(np.log([8 / 11, 2 / 11, 1 / 11, 8 / 11]))
    assert unigram_loss(_corpus(rows), np.array([[0, 0, 1, 2, 0]])) == pytest.approx(expected)
    assert bytes_per_token(_corpus(rows)) == 2.0


def test_jsonl_and_text_train_together(tmp_path: Path) -> None:
    _write(tmp_path / "text", 40)
    lines = [json.dumps({"text": f"record {index} " + " ".join(WORDS)}) for index in range(100)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    corpus = prepare([_text(f"{tmp_path}/text/*.txt"), _jsonl(tmp_path / "lines.jsonl")], BPE, cache=tmp_path / "cache")
    assert len(corpus.rows) == 2
    samples = Samples(corpus, seed=0)
    samples.require(16)
    assert samples.batch(0, 8, 16).shape == (8, 17)
