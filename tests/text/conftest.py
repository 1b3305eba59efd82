from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvist.text.tokenizer import Alphabet, Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token per byte, some longer tokens, some that end inside a character, and two special
    tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("ð", "Ł"), ("â", "Ĥ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken("<|end|>", normalized=False), AddedToken("<|naïve sign|>", normalized=False)]
    )
    return Tokenizer(backend, alphabet=Alphabet.BYTE_LEVEL, chat_template=None)
