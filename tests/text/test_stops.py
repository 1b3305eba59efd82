from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.text import StopMatcher, special_token_marks
from tests.budget import budget

ALPHABET = st.text(alphabet="ab\n", max_size=25)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read one character at a time and stop as soon as a stop string ends; of several, the longest one counts."""
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=budget(100, long=5000))
@given(pieces=st.lists(ALPHABET, max_size=6), stops=STOPS)
def test_the_cut_equals_that_of_a_naive_reader_for_every_split(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    if matcher.matched is None:
        shown += matcher.flush()
    assert (shown, matcher.matched) == naive_cut("".join(pieces), stops)


@given(pieces=st.lists(ALPHABET, max_size=6), stops=STOPS)
def test_shown_text_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
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


@settings(max_examples=budget(100, long=5000))
@given(exempt=st.lists(ALPHABET, max_size=4), pieces=st.lists(ALPHABET, max_size=4), stops=STOPS)
def test_a_stop_string_that_ends_in_exempt_text_does_not_count(
    exempt: list[str], pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    shown = "".join([matcher.push(piece, armed=False) for piece in exempt])
    shown += "".join([matcher.push(piece) for piece in pieces])
    if matcher.matched is None:
        shown += matcher.flush()
    text, num_exempt = "".join([*exempt, *pieces]), len("".join(exempt))
    ends = [
        (end, -len(stop), stop)
        for end in range(num_exempt + 1, len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    expected = (text[: min(ends)[0] + min(ends)[1]], min(ends)[2]) if ends else (text, None)
    assert (shown, matcher.matched) == expected


def test_the_stop_string_is_shown_on_request() -> None:
    matcher = StopMatcher(["--"], include_match=True)
    assert [matcher.push(piece) for piece in ("a-", "-b")] == ["a", "--"]


def test_marks_are_matched_and_never_shown() -> None:
    marks = special_token_marks(["<e>x", "y"], re.compile("<e>|<f>"))
    assert list(marks) == ["<e>"]
    matcher = StopMatcher(["<e>x", "y"], marks=marks)
    assert [matcher.push(piece) for piece in ("a" + marks["<e>"], "b", marks["<e>"], "x")] == ["a", "b", "", ""]
    assert matcher.matched == "<e>x"
