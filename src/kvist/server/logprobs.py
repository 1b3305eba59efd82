"""Writes logprobs in the forms of OpenAI, vLLM and SGLang.

The entries of a list are encoded to JSON one by one: as Python objects they would take ten times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from kvist.request import SamplingParams, TokenLogprobs
from kvist.server.generation import ChoiceState
from kvist.text import IncrementalDetokenizer, Tokenizer

_LEAST_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express; OpenAI's number

Entry = tuple[float | None, int, str | None]  # SGLang's: logprob, token id, text


def finite(logprob: float) -> float:
    """Return a number that JSON can express; NaN and minus infinity become `_LEAST_LOGPROB`."""
    return logprob if logprob >= _LEAST_LOGPROB else _LEAST_LOGPROB


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _listed(found: TokenLogprobs, num_top: int | None, sampling: SamplingParams) -> list[tuple[int, float]]:
    """Return id and logprob of the `num_top` likeliest tokens, then of the tokens that the request names."""
    top = list(zip(found.top_token_ids[:num_top], found.top_logprobs[:num_top], strict=True))
    if sampling.logprob_token_ids:
        known = set(found.top_token_ids[:num_top])
        asked = zip(sampling.logprob_token_ids, found.requested_logprobs, strict=True)
        top += [(token_id, logprob) for token_id, logprob in asked if token_id not in known]
    return top


# ---------------------------------------------------------------- OpenAI


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], sampling: SamplingParams
) -> list[msgspec.Raw]:
    """Return OpenAI's `logprobs.content`: one entry for each output token, including the token that ended the
    answer."""

    def entry(token_id: int, logprob: float) -> dict[str, object]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": tokenizer.token_text(token_id), "logprob": finite(logprob), "bytes": list(raw)}

    return [
        _encoded(
            {
                **entry(token_id, found.logprob),
                "top_logprobs": [entry(*each) for each in _listed(found, sampling.num_logprobs, sampling)],
            }
        )
        for token_id, found in zip(token_ids, logprobs, strict=True)
    ]


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    text_offsets: Sequence[int],
    sampling: SamplingParams,
) -> dict[str, object]:
    """Return logprobs in the older form of /v1/completions. None: the first token of an echoed prompt, which has no
    logprob."""
    return {
        "tokens": [tokenizer.token_text(token_id) for token_id in token_ids],
        "token_logprobs": [None if found is None else finite(found.logprob) for found in logprobs],
        "top_logprobs": [
            None if found is None else _encoded(_by_text(tokenizer, token_id, found, sampling))
            for token_id, found in zip(token_ids, logprobs, strict=True)
        ],
        "text_offset": text_offsets,
    }


def _by_text(tokenizer: Tokenizer, chosen_id: int, found: TokenLogprobs, sampling: SamplingParams) -> dict[str, float]:
    """Return the logprobs of the top tokens and of the chosen token, by text. Of several tokens with the same text the
    chosen token wins, else the likeliest."""
    entries: dict[str, float] = {}
    for token_id, logprob in _listed(found, sampling.num_logprobs, sampling):  # likeliest first
        entries.setdefault(tokenizer.token_text(token_id), finite(logprob))
    entries[tokenizer.token_text(chosen_id)] = finite(found.logprob)
    return entries


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Return the number of characters of the prompt's `text` before each of its tokens. Special tokens count where the
    text spells them; a space that the tokenizer puts before a text does not count."""
    detokenizer, special = IncrementalDetokenizer(tokenizer, skip_special_tokens=False), tokenizer.special_token_ids
    offsets: list[int] = []
    num_chars, begun = 0, False
    for token_id in token_ids:
        offsets.append(min(max(num_chars, 0), len(text)))
        if token_id in special and not text.startswith(tokenizer.token_text(token_id), num_chars):
            continue
        shown = detokenizer.push((token_id,))
        if not begun and shown.startswith(" ") and not text.startswith(" ", num_chars):
            num_chars -= 1
        begun = True
        num_chars += len(shown)
    return offsets


# ---------------------------------------------------------------- vLLM


def prompt_logprobs(tokenizer: Tokenizer, choice: ChoiceState, num_top: int) -> list[msgspec.Raw | None]:
    """Return vLLM's `prompt_logprobs`: null for the first token, then for each token an object by token id."""
    prompt_ids, sampling = choice.request.prompt_token_ids[1:], choice.request.sampling

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, object]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}

    def entries(token_id: int, found: TokenLogprobs) -> dict[str, object]:
        by_id: dict[str, object] = {str(token_id): entry(token_id, found.logprob, found.rank)}
        for place, (other_id, logprob) in enumerate(_listed(found, num_top, sampling)):
            by_id.setdefault(str(other_id), entry(other_id, logprob, place + 1 if place < num_top else None))
        return by_id

    pairs = zip(prompt_ids, choice.prompt_logprobs, strict=True)
    return [None, *(_encoded(entries(token_id, found)) for token_id, found in pairs)]


# ---------------------------------------------------------------- SGLang


class LogprobEntries:
    """Writes entries of `meta_info`: (logprob, token id, text), with null for a text that is not requested."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """`tokenizer` None: without texts."""
        self._tokenizer = tokenizer

    def output(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], sampling: SamplingParams
    ) -> dict[str, object]:
        return dict(self._lists("output", token_ids, logprobs, sampling))

    def input(self, choice: ChoiceState) -> dict[str, object]:
        """Write the entries of the prompt from the token before the first scored one, whose logprob is null; without a
        scored token, of the prompt's last token alone."""
        prompt_ids, found = choice.request.prompt_token_ids, choice.prompt_logprobs
        return dict(self._lists("input", prompt_ids[-1 - len(found) :], [None, *found], choice.request.sampling))

    def _lists(
        self, side: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], sampling: SamplingParams
    ) -> Iterator[tuple[str, object]]:
        yield (
            f"{side}_token_logprobs",
            [self._entry(i, None if one is None else one.logprob) for i, one in zip(token_ids, logprobs, strict=True)],
        )
        yield (
            f"{side}_top_logprobs",
            [None if one is None else self._entries(one.top_token_ids, one.top_logprobs) for one in logprobs],
        )
        if asked := sampling.logprob_token_ids:
            yield (
                f"{side}_token_ids_logprobs",
                [None if one is None else self._entries(asked, one.requested_logprobs) for one in logprobs],
            )

    def _entries(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> list[Entry]:
        return [self._entry(token_id, logprob) for token_id, logprob in zip(token_ids, logprobs, strict=True)]

    def _entry(self, token_id: int, logprob: float | None) -> Entry:
        text = None if self._tokenizer is None else self._tokenizer.token_text(token_id)
        return None if logprob is None else finite(logprob), token_id, text
