"""How a text is cut into the pieces that are spoken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_daemon.runners.pieces import FIRST_CHARACTERS, MOST_CHARACTERS, longest, piece_end


def pieces(text: str) -> list[str]:
    cut, start = [], 0
    while start < len(text):
        end = piece_end(text, start, longest(start))
        cut.append(text[start:end])
        start = end
    return cut


@pytest.mark.parametrize(
    "marked",
    [
        "One sentence. |And another that is far too long for the same piece of them.",
        '"Really?" |she asked, and nobody in the room knew what to say to that.',
        "Mr. Jones and Dr. Smith met J. R. Brown at the U.S. embassy, |where they all ate.",
        "No sentence ends here, but there are clauses; |and words after them without an end",
        "Just words that go on and on and on and on and on and on and |on and on and on",
        "It costs 3.50 or 1,000,000 of them, |as the people who count such things say",
        "A heading\n|and a text of more than sixty characters that comes after it.",
        "x" * 60 + "|" + "x" * 40,
    ],
)
def test_the_first_piece_ends_at_the_mark(marked) -> None:
    assert pieces(marked.replace("|", ""))[0] == marked.split("|")[0]


def test_pieces_grow_and_hold_several_sentences() -> None:
    cut = pieces("This is a sentence. " * 40)
    assert [len(piece) for piece in cut[:4]] == [60, 120, 200, 200]


@given(st.text(alphabet=st.sampled_from("ab .,!?\n…—\"'”)1"), max_size=600))
def test_nothing_is_lost_and_every_piece_is_short(text) -> None:
    cut = pieces(text)
    assert "".join(cut) == text
    assert all(piece for piece in cut)
    assert all(len(piece.strip()) <= (MOST_CHARACTERS if i else FIRST_CHARACTERS) for i, piece in enumerate(cut))


@given(st.text(alphabet=st.sampled_from("ab .,"), min_size=1, max_size=400))
def test_whoever_goes_on_cuts_as_before(text) -> None:
    cut = pieces(text)
    start = sum(map(len, cut[:2]))
    if start < len(text):
        assert piece_end(text, start, longest(start)) == start + len(cut[2])
