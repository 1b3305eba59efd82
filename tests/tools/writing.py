"""Writes random answers that a grammar allows."""

from __future__ import annotations

import random

import numpy as np

from kvist.grammar.backend import Grammar
from kvist.testing.tokenizers import END
from kvist.text import Tokenizer

# Written often, so that texts, numbers and lists come to an end; so are special tokens.
_ENDS = ["</parameter>", "</arg_value>", "</tool_call>", "</think>", '"', '"', "}", "]", ")", "`", "\n"]


def write(grammar: Grammar, tokenizer: Tokenizer, draw: random.Random, most: int = 1500) -> str | None:
    """Return a random answer that ends within the limit of tokens, or None."""
    matcher = grammar.matcher()
    mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    token_ids: list[int] = []
    wanted: list[int] = []
    ends = [*_ENDS, *(text for text in tokenizer.special_tokens if text != END)]
    for place in range(most):
        matcher.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if tokenizer.special_tokens[END] in allowed and draw.random() < 0.2 + place / most:
            allowed = np.array([tokenizer.special_tokens[END]])
        if not wanted and draw.random() < 0.3:
            wanted = tokenizer.encode(draw.choice(ends))
        token_id = int(draw.choice(allowed))
        if wanted and wanted[0] in allowed:
            token_id = wanted.pop(0)
        else:
            wanted = []
        if token_id == tokenizer.special_tokens[END]:
            return tokenizer.decode(token_ids, skip_special_tokens=False)
        assert matcher.accept([token_id])
        token_ids.append(token_id)
    return None
