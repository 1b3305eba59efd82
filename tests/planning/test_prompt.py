"""Prompts: messages, holes, prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.planning.prompt import (
    ChatMessage,
    Prompt,
    PromptError,
    common_length,
    filled,
    hole,
    holes_of,
    plain_text,
    transcript_pieces,
    unsendable,
)


def _common(first: str, second: str) -> str:
    length = next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return first[:length]


def _chat() -> Prompt:
    return Prompt().with_open("system").with_text("Be short.").with_close("system").with_open("user").with_text("Hi")


def test_a_chat_prompt_gives_its_messages_and_its_open_role() -> None:
    prompt = _chat()
    assert prompt.messages() == (ChatMessage("system", "Be short."), ChatMessage("user", "Hi"))
    assert prompt.open_role == "user"
    assert prompt.with_close("user").open_role is None
    assert prompt.transcript() == "system: Be short.\nuser: Hi"
    assert prompt.num_chars == len("Be short.Hi")


def test_text_without_roles_is_its_own_outline() -> None:
    prompt = Prompt().with_text("Once upon ").with_text("a time")
    assert not prompt.is_chat
    assert prompt.outline == prompt.transcript() == "Once upon a time"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prompt("text").with_open("user"), "give that text a role"),
        (lambda: _chat().with_open("assistant"), "inside of a user message"),
        (lambda: _chat().with_close("system"), "inside of a user message"),
        (lambda: Prompt().with_close("user"), "outside of messages"),
        (lambda: _chat().with_close("user").with_text("more"), "has no role"),
    ],
)
def test_parts_at_a_wrong_place_are_errors_that_say_what_to_change(build: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        build()  # type: ignore[operator]


def test_holes_are_found_filled_and_cut_off() -> None:
    prompt = _chat().with_text(f" {hole(3)} and {hole(12)}, {hole(3)}")
    assert prompt.holes == (3, 12)
    assert not prompt.is_known
    assert prompt.known == _chat().with_text(" ")
    whole = prompt.filled({3: "three", 12: "twelve"})
    assert whole.is_known
    assert whole.messages()[-1].text == "Hi three and twelve, three"
    assert prompt.filled({3: "x"}).holes == (12,)
    assert transcript_pieces(prompt.outline)[-3:] == [12, ", ", 3]
    assert plain_text(_chat().outline) == "Be short.Hi"


@given(st.integers(0, 60))
def test_a_beginning_never_cuts_a_role_or_a_hole_in_two(length: int) -> None:
    prompt = _chat().with_text(f"{hole(12345)}!").with_close("user").with_open("assistant")
    cut = prompt.beginning(length)
    assert prompt.outline.startswith(cut.outline)
    assert len(cut.outline) <= length
    assert cut.holes in ((), (12345,))
    cut.messages()
    _ = cut.open_role  # each mark is whole


@given(st.text("ab", max_size=40), st.text("ab", max_size=40))
def test_the_common_length_is_found_by_comparing_characters(first: str, second: str) -> None:
    assert common_length(first, second) == len(_common(first, second))


def test_texts_that_utf8_cannot_encode_are_found_and_holes_are_not() -> None:
    assert unsendable(f"fine {hole(1)}") is None
    assert unsendable("bad \ud800") == "\ud800"
    assert holes_of("none") == ()
    assert filled("none", {1: "x"}) == "none"
