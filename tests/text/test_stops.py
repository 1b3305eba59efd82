from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.text import StopMatcher

ALPHABET = st.text(alphabet="ab\n", max_size=25)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads one character at a time and stops as soon as a stop string ends there; of several, the longest."""
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500)
@given(pieces=st.lists(ALPHABET, max_size=6), stops=STOPS)
def test_the_cut_equals_a_naive_reader_for_every_split(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    if matcher.matched is None:
        shown += matcher.flush()
    assert (shown, matcher.matched) == naive_cut("".join(pieces), stops)


@given(pieces=st.lists(ALPHABET, max_size=6), stops=STOPS)
def test_nothing_shown_is_ever_taken_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert naive_cut("".join(pieces), stops)[0].startswith(shown)


@given(text=ALPHABET, stops=STOPS)
def test_only_a_beginning_of_a_stop_string_is_withheld(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if matcher.matched is None:
        withheld = text[len(shown) :]
        assert withheld == "" or any(stop.startswith(withheld) for stop in stops)


def test_a_stop_string_across_pieces_is_found() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Hi.", "\n", "\nUs", "er: x")] == ["Hi.", "", "", ""]
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("more") == ""
