"""Prompts whose pieces are remembered have the ids of the whole text, and cost only their new part."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from kvist.text import PromptEncoder, remembered
from kvist.text.remembered import PIECE_CHARS
from kvist.text.tokenizer import Alphabet, Tokenizer
from tests.budget import budget
from tests.text.test_bounded import SEPARATORS, WORDS, Counting, byte_backend, counting, made_up, smollm2

__all__ = ["smollm2"]  # a fixture

PLENTY = 1 << 24
TURN_WORDS = st.lists(st.sampled_from([*WORDS, "<s>", "</s>", "<two words>"]), min_size=1, max_size=30)


def say(words: list[str], seed: int, num_words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(words) + draw.choice(SEPARATORS) for _ in range(num_words))


@settings(max_examples=budget(30, long=1000))
@given(
    turns=st.lists(st.tuples(TURN_WORDS, st.integers(0, 9), st.integers(1, 3000)), min_size=1, max_size=6),
    add_special_tokens=st.booleans(),
)
def test_every_turn_of_a_chat_has_the_ids_of_its_whole_text(
    turns: list[tuple[list[str], int, int]], add_special_tokens: bool
) -> None:
    backend = byte_backend()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    encoder, tokenizer = PromptEncoder(counting(backend)), counting(backend)
    text = ""
    for turn in turns:
        text += say(*turn)
        ids = encoder.encode_up_to(text, PLENTY, add_special_tokens=add_special_tokens)
        assert ids == tokenizer.encode(text, add_special_tokens=add_special_tokens)
        half = text[: len(text) // 2]
        assert encoder.encode_up_to(half, PLENTY) == tokenizer.encode(half)


@pytest.mark.model
@pytest.mark.parametrize("seed", range(6))
def test_a_real_tokenizer_gives_the_same_ids_for_growing_and_changed_texts(smollm2: Tokenizer, seed: int) -> None:
    encoder, text = PromptEncoder(smollm2), ""
    for turn in range(8):
        text += f"<|im_start|>user\n{made_up(100 * seed + turn, 6000)}<|im_end|>\n"
        assert encoder.encode_up_to(text, PLENTY) == smollm2.encode(text)
    place = random.Random(seed).randrange(len(text))
    changed = text[:place] + "ß" + text[place:]
    assert encoder.encode_up_to(changed, PLENTY) == smollm2.encode(changed)


@pytest.mark.parametrize("unit", ["word ", "日本語" * 900 + "<s>"])
def test_the_next_turn_costs_its_new_part_and_a_piece(unit: str) -> None:
    tokenizer = counting()
    encoder, text = PromptEncoder(tokenizer), unit * (200_000 // len(unit))
    encoder.encode_up_to(text, PLENTY)
    tokenizer.num_chars = 0
    longer = text + unit * (1 + 500 // len(unit))
    assert encoder.encode_up_to(longer, PLENTY) == counting().encode(longer)
    assert tokenizer.num_chars < len(longer) - len(text) + 2 * PIECE_CHARS + 1000


def test_a_text_without_places_to_cut_is_tokenised_as_a_whole() -> None:
    text = "日本語" * 20_000
    assert PromptEncoder(counting()).encode_up_to(text, PLENTY) == counting().encode(text)


def test_a_tokenizer_that_merges_across_words_remembers_nothing() -> None:
    tokenizer = Counting(byte_backend(), alphabet=Alphabet.SENTENCEPIECE, chat_template=None)
    encoder, text = PromptEncoder(tokenizer), "word " * 10_000
    assert encoder.encode_up_to(text, PLENTY) == counting().encode(text)
    assert encoder.num_remembered_tokens == 0


def test_a_prompt_over_the_limit_is_refused_before_it_is_tokenised_as_a_whole() -> None:
    tokenizer = counting()
    encoder = PromptEncoder(tokenizer)
    assert encoder.encode_up_to("word " * 1_000_000, 50_000) is None
    assert tokenizer.num_chars < 100_000
    text = "word " * 20_000
    num_tokens = len(counting().encode(text))
    assert encoder.encode_up_to(text, num_tokens) is not None
    assert encoder.encode_up_to(text, num_tokens - 1) is None


def test_the_memory_is_bounded_by_tokens() -> None:
    encoder = PromptEncoder(counting())
    with mock.patch.object(remembered, "MAX_TOKENS", 20_000):
        for number in range(30):
            encoder.encode_up_to(f"{number} " + "word " * 4000, PLENTY)
            assert 0 < encoder.num_remembered_tokens <= 20_000
    held = sum(len(piece.ids) for piece in encoder._pieces.values())
    assert held == encoder.num_remembered_tokens


def test_another_salt_saves_no_time() -> None:
    tokenizer = counting()
    encoder, text = PromptEncoder(tokenizer), "word " * 10_000
    tokenizer.num_chars = 0
    ids = encoder.encode_up_to(text, PLENTY, salt="a")
    num_chars, tokenizer.num_chars = tokenizer.num_chars, 0
    assert encoder.encode_up_to(text, PLENTY, salt="b") == ids
    assert tokenizer.num_chars == num_chars
