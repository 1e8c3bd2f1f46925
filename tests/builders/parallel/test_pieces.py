"""Pieces of a tensor: boxes, runs of boxes, and where their elements stand in the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from modelspec.builders.parallel.pieces import Piece


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    """A box of a tensor of up to three dims, and perhaps a run of it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    piece = Piece.whole(shape)
    for dim, length in enumerate(shape):
        start = draw(st.integers(0, length - 1))
        piece = piece.box(dim, start, draw(st.integers(0, length - start)))
    if draw(st.booleans()):
        first = draw(st.integers(0, piece.numel))
        piece = piece.run(first, draw(st.integers(first, piece.numel)))
    return piece


@given(pieces())
def test_runs_are_the_elements_of_the_piece_in_their_order(piece: Piece) -> None:
    whole = torch.arange(torch.Size(piece.shape).numel()).view(piece.shape)
    flat, wanted = whole.flatten(), piece.of(whole).flatten()
    found = torch.full((piece.numel,), -1)
    for place, begin, count in piece.runs():
        found[begin : begin + count] = flat[place : place + count]
    assert torch.equal(found, wanted)


@given(pieces())
def test_what_is_put_is_what_is_read_and_nothing_else_changes(piece: Piece) -> None:
    whole = torch.zeros(piece.shape)
    piece.put(whole, torch.arange(1.0, piece.numel + 1).view(-1))
    assert torch.equal(piece.of(whole).flatten(), torch.arange(1.0, piece.numel + 1))
    assert int((whole != 0).sum()) == piece.numel


@given(pieces())
def test_rows_that_a_piece_is_among_are_as_few_as_may_be_and_give_the_same_elements(piece: Piece) -> None:
    whole = torch.arange(torch.Size(piece.shape).numel()).view(piece.shape)
    first, mine = piece.among_rows()
    rows = whole if not piece.shape else whole[first : first + mine.shape[0]]
    assert torch.equal(mine.of(rows).flatten(), piece.of(whole).flatten())
    if piece.shape and piece.numel:
        row = whole[0].numel()
        elements = piece.of(whole).flatten()
        assert (first, first + mine.shape[0]) == (int(elements.min()) // row, int(elements.max()) // row + 1)


def test_a_run_that_spans_whole_rows_is_one_write() -> None:
    assert list(Piece.whole((4, 6)).run(5, 20).runs()) == [(5, 0, 15)]
    assert list(Piece.whole((4, 6)).part(0, 1, 2).runs()) == [(12, 0, 12)]
    assert list(Piece.whole((2, 6)).part(1, 1, 2).runs()) == [(3, 0, 3), (9, 3, 3)]
