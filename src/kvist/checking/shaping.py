"""Checks the fields that change the logits before a token is sampled: penalties, bias, allowed tokens and bad words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvist.api.schemas import Generation, SamplingFields
from kvist.checking.sampling import FieldNames, check_token_ids, require
from kvist.errors import RequestError
from kvist.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS
from kvist.text import SamplingDefaults, Tokenizer

_MAX_WORD_CHARS = 256
_LARGEST_BIAS = 100.0
_LARGEST_REPETITION_PENALTY = 100.0  # and its reciprocal is the smallest: others leave the range of float32


def shaping(
    fields: SamplingFields,
    tokenizer: Tokenizer,
    *,
    defaults: SamplingDefaults,
    vocab_size: int,
    stop_token_ids: Sequence[int],
    names: FieldNames,
) -> dict[str, object]:
    """Return the values of `SamplingParams` that change logits, without those that change nothing. `stop_token_ids` are
    those that `min_tokens` suppresses. Raises `RequestError`."""
    penalty = defaults.repetition_penalty if fields.repetition_penalty is None else fields.repetition_penalty
    found: dict[str, object] = {
        "frequency_penalty": _penalty(fields.frequency_penalty, names.inside + "frequency_penalty"),
        "presence_penalty": _penalty(fields.presence_penalty, names.inside + "presence_penalty"),
        "repetition_penalty": _repetition_penalty(penalty, names.inside + "repetition_penalty"),
        "logit_bias": _bias(fields.logit_bias or {}, vocab_size, names.inside + "logit_bias"),
    }
    if isinstance(fields, Generation):
        words = _bad_words(fields.bad_words or (), tokenizer)
        never = {word[0] for word in words if len(word) == 1} | set(stop_token_ids)
        found["allowed_token_ids"] = _allowed(fields.allowed_token_ids, vocab_size, never)
        found["bad_words"] = words
    return {name: value for name, value in found.items() if value not in (None, ())}


def _penalty(value: float | None, param: str) -> float | None:
    require(value is None or -2 <= value <= 2, param, "must be between -2 and 2", value)
    return value


def _repetition_penalty(value: float | None, param: str) -> float | None:
    least, most = 1 / _LARGEST_REPETITION_PENALTY, _LARGEST_REPETITION_PENALTY
    rule = f"must be between {least:g} and {most:g}, where 1 is off"
    require(value is None or least <= value <= most, param, rule, value)
    return value


def _bias(bias: Mapping[str, float], vocab_size: int, param: str) -> tuple[tuple[int, float], ...]:
    require(len(bias) <= MAX_LOGIT_BIAS, param, f"may have at most {MAX_LOGIT_BIAS} token ids", len(bias))
    for key, value in bias.items():
        is_id = key.isascii() and key.isdecimal() and str(int(key)) == key and int(key) < vocab_size
        require(is_id, param, f"must have token ids as keys, 0 to {vocab_size - 1} written as text", repr(key))
        rule = f"must be between {-_LARGEST_BIAS:g} and {_LARGEST_BIAS:g}"
        require(-_LARGEST_BIAS <= value <= _LARGEST_BIAS, f"{param}.{key}", rule, value)
    return tuple((int(key), value) for key, value in bias.items())


def _allowed(asked: Sequence[int] | None, vocab_size: int, never: set[int]) -> tuple[int, ...]:
    """Return the allowed tokens without duplicates; () when every token is allowed. `never`: tokens that other fields
    exclude."""
    param = "allowed_token_ids"
    if asked is None:
        if len(never) >= vocab_size:
            raise RequestError("`bad_words` excludes every token of the vocabulary", param="bad_words")
        return ()
    if not asked:
        raise RequestError(f"`{param}` is empty: omit the field to allow every token", param=param)
    check_token_ids(asked, vocab_size, param)
    if never.issuperset(asked):
        raise RequestError(
            f"`{param}` leaves no token: `bad_words`, or `min_tokens` with `stop_token_ids`, excludes each of them",
            param=param,
        )
    return tuple(dict.fromkeys(asked))


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of the words, each with and without a space before it, as in vLLM: a tokenizer may
    write a word in two ways, at the start of a text and inside it."""
    param = "bad_words"
    most = MAX_BAD_WORDS // 2
    require(len(words) <= most, param, f"may have at most {most} words", len(words))
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        require(
            0 < len(word) <= _MAX_WORD_CHARS, param, f"words must have 1 to {_MAX_WORD_CHARS} characters", len(word)
        )
        bare = word.lstrip() or word
        for text in (bare, " " + bare):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    sequences.pop((), None)
    num_tokens = sum(map(len, sequences))
    require(num_tokens <= MAX_BAD_WORD_TOKENS, param, f"may have at most {MAX_BAD_WORD_TOKENS} tokens", num_tokens)
    return tuple(sequences)
