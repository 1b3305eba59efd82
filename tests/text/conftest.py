from __future__ import annotations

import pytest

from kvist.testing.tokenizers import END
from kvist.testing.tokenizers import byte_tokenizer as tokenizer_of_bytes
from kvist.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token per byte, some longer tokens, some that end inside a character, and two special
    tokens."""
    return tokenizer_of_bytes(
        special_tokens=(END, "<|naïve sign|>"),
        merges=[("h", "e"), ("l", "l"), ("Ġ", "w"), ("ð", "Ł"), ("â", "Ĥ")],
    )
