from __future__ import annotations

import random
import re
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from kvist.checkpoint import find_checkpoint
from kvist.text import load_tokenizer, plain_content
from kvist.text.bounded import PIECE_CHARS, encode_up_to
from kvist.text.gguf_pre_tokenizers import RULES, Rules
from kvist.text.plain_content import PlainContent
from kvist.text.tokenizer import Alphabet, Tokenizer

PLENTY = 1 << 24


class Counting(Tokenizer):
    """Records the largest single input and the total input in characters."""

    longest = 0
    num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.longest = max(self.longest, len(text))
        self.num_chars += len(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


def byte_backend() -> Backend:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "</s>", "<two words>")])
    return backend


def counting(backend: Backend | None = None, **settings: Any) -> Counting:
    return Counting(backend or byte_backend(), alphabet=Alphabet.BYTE_LEVEL, chat_template=None, **settings)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(find_checkpoint(None))


WORDS = (
    *("the", "Paris", "naïve", "日本語", "I'll", "x=1;", "12345", "🙂", "def", "...", "ſt"),
    *("<|im_end|>", "\n\n", "\t", "Δx", "3.14", "déjà-vu"),
)
SEPARATORS = [" "] * 8 + ["  ", "\n", "", ", ", " (", "-", " \n"]


def made_up(seed: int, num_chars: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(SEPARATORS) for _ in range(num_chars // 4))[:num_chars]


@pytest.mark.parametrize("rules", {id(rules): rules for rules in RULES.values()}.values())
def test_pieces_are_cut_where_every_known_pre_tokenizer_cuts(rules: Rules) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = rules.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([made_up(9, 20_000)], trainers.BpeTrainer(vocab_size=600, show_progress=False))
    tokenizer, text = counting(backend), made_up(1, 2 * PIECE_CHARS)
    assert encode_up_to(tokenizer, text, PLENTY) == counting(backend).encode(text)
    assert tokenizer.longest <= PIECE_CHARS


@pytest.mark.model
@pytest.mark.parametrize("seed", range(6))
def test_the_ids_of_pieces_are_the_ids_of_the_whole(smollm2: Tokenizer, seed: int) -> None:
    text = made_up(seed, 3 * PIECE_CHARS + seed * 1000)
    assert len(text) > 2 * PIECE_CHARS
    assert encode_up_to(smollm2, text, PLENTY) == smollm2.encode(text)


@pytest.mark.model
@pytest.mark.parametrize("unit", ["a", "7", "🙂", " ", "日本語", "-", "ab\n", "\n ", "word ", " . "])
def test_a_text_without_cut_points_is_tokenised_as_a_whole_if_it_fits(smollm2: Tokenizer, unit: str) -> None:
    text = unit * ((PIECE_CHARS * 5 // 2) // len(unit))
    ids = smollm2.encode(text)
    assert encode_up_to(smollm2, text, len(ids)) == ids
    assert encode_up_to(smollm2, text, len(ids) - 1) is None


def test_tokenising_a_text_that_is_too_long_stops_at_the_limit() -> None:
    tokenizer = counting()
    assert encode_up_to(tokenizer, "word " * 1_000_000, 2 * PIECE_CHARS) is None
    assert tokenizer.num_chars < 4 * PIECE_CHARS
    assert tokenizer.longest <= PIECE_CHARS


def test_the_tokenizer_gets_words_in_pieces_and_once() -> None:
    tokenizer = counting()
    text = "word " * 50_000
    assert encode_up_to(tokenizer, text, PLENTY) == counting().encode(text)
    assert tokenizer.longest <= PIECE_CHARS
    assert tokenizer.num_chars < len(text) * 1.02


def test_no_cut_falls_into_a_special_token_with_a_space() -> None:
    text = "<two words>" * 20_000
    assert encode_up_to(counting(), text, PLENTY) == counting().encode(text)


@pytest.mark.parametrize("start", ["", "<s>"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_tokens_added_around_a_text_are_present_once(start: str, add_special_tokens: bool) -> None:
    backend = byte_backend()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 257)])
    text = start + "word " * 20_000
    whole = counting(backend, prompt_start_id=256).encode(text, add_special_tokens=add_special_tokens)
    ids = encode_up_to(counting(backend, prompt_start_id=256), text, PLENTY, add_special_tokens=add_special_tokens)
    assert ids == whole
    assert (whole[0] == 256) == (add_special_tokens or start == "<s>")


def test_a_tokenizer_that_merges_across_words_gets_the_whole_text() -> None:
    tokenizer = Counting(byte_backend(), alphabet=Alphabet.SENTENCEPIECE, chat_template=None)
    text = "word " * 20_000
    assert encode_up_to(tokenizer, text, PLENTY) == counting().encode(text)
    assert tokenizer.longest == len(text)


@pytest.mark.parametrize("place", [0, 1, 5, 9, 10])
def test_control_tokens_across_a_piece_boundary_become_plain_text(place: int) -> None:
    special = {"<s>": 256, "<s><s>": 258, "<two words>": 259}
    backend = byte_backend()
    plain = PlainContent(backend, special, re.compile("<two words>|<s><s>|<s>"))
    start = "x" * (plain_content._PIECE_CHARS - place)
    for token in special:
        text = start + token + "y" * 10
        protected = plain.protect(text)
        assert token not in protected
        assert protected == start + plain.protect(token) + "y" * 10
        assert len(protected) == len(text) - len(token) + 1
