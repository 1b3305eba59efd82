from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.text import IncrementalDetokenizer, Tokenizer
from tests.budget import budget


def pieces_of(draw_cuts: list[int], ids: list[int]) -> list[list[int]]:
    cuts = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in draw_cuts)})
    return [ids[start:end] for start, end in itertools.pairwise(cuts)]


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_joined_pieces_equal_the_text_for_every_split(byte_tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = byte_tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    shown = [detokenizer.push(piece) for piece in pieces_of(cuts, ids)]
    assert "".join(shown) + detokenizer.flush() == text


@settings(max_examples=budget(100, long=3000))
@given(seed=st.lists(st.integers(0, 10_000), max_size=25), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_joined_pieces_of_arbitrary_tokens_equal_the_one_shot_decode(
    byte_tokenizer: Tokenizer, seed: list[int], cuts: list[int]
) -> None:
    ids = [value % (byte_tokenizer.vocab_size + 3) for value in seed]  # also ids that no token has
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    shown = "".join(detokenizer.push(piece) for piece in pieces_of(cuts, ids)) + detokenizer.flush()
    assert shown == byte_tokenizer.decode(ids) == byte_tokenizer._backend.decode(ids)


@given(text=st.text(alphabet="aé€🎉 ", max_size=30))
def test_no_replacement_character_is_shown_while_a_character_is_incomplete(
    byte_tokenizer: Tokenizer, text: str
) -> None:
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    for token_id in byte_tokenizer.encode(text):
        assert "�" not in detokenizer.push([token_id])


def test_an_unfinished_character_appears_only_at_flush(byte_tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    assert [detokenizer.push([token_id]) for token_id in byte_tokenizer.encode("🎉")[:-1]][-1] == ""
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_special_tokens_are_left_out_or_shown(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("hello<|end|>")
    assert ids[-1] in byte_tokenizer.special_token_ids
    assert IncrementalDetokenizer(byte_tokenizer).push(ids) == "hello"
    assert IncrementalDetokenizer(byte_tokenizer, skip_special_tokens=False).push(ids) == "hello<|end|>"


def test_an_added_token_outside_the_byte_alphabet_keeps_its_spelling(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("<|naïve sign|>")
    assert len(ids) == 1
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == "<|naïve sign|>"
