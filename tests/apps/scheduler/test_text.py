"""Stop strings across token borders, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apps.scheduler.text import ChoiceText


class Letters:
    """A decoder whose tokens are code points."""

    def push(self, ids) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


def show(text: str, stops: list[str], cuts: list[int]) -> tuple[str, int, bool]:
    choice = ChoiceText(Letters(), stops)
    shown, tokens, at = "", 0, 0
    for end in [*sorted(cuts), len(text)]:
        piece = choice.push([ord(c) for c in text[at:end]])
        shown, tokens, at = shown + piece.text, tokens + piece.tokens, max(at, end)
        if piece.stop:
            return shown, tokens, True
    last = choice.flush()
    return shown + last.text, tokens, bool(last.stop)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_what_shows_is_the_text_before_the_first_complete_stop(text: str, stops: list[str], data) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    shown, tokens, stopped = show(text, stops, cuts)
    if not ends:
        assert (shown, tokens, stopped) == (text, len(text), False)
        return
    first_end = min(ends)
    begin = min(first_end - len(stop) for stop in stops if text[:first_end].endswith(stop))
    assert (shown, tokens, stopped) == (text[:begin], first_end, True)
