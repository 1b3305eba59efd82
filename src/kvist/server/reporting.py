"""Parts that all response formats share: usage, logprobs, and Kvist's report on workers and handoff."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvist.request import TokenLogprobs
from kvist.server.generation import ChoiceState
from kvist.text import Tokenizer

_LEAST_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express; OpenAI's number


def usage(choices: Sequence[ChoiceState], *, by_tier: bool = False) -> dict[str, object]:
    """Return OpenAI's `usage`. A prompt with n answers counts once."""
    first = [choice for choice in choices if not choice.repeats_prompt]
    num_prompt = sum(choice.request.num_prompt_tokens for choice in first)
    num_output = sum(len(choice.token_ids) for choice in choices)
    result: dict[str, object] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in first)},
    }
    if by_tier:
        tiers = ("device", "host", "storage")
        result["kvist"] = {"cached_tokens": {tier: sum(one.cached_by_tier[tier] for one in first) for tier in tiers}}
    return result


def usage_so_far(choice: ChoiceState, num_output: int) -> dict[str, object]:
    """Return `usage` for an event of one choice. As in vLLM, the numbers are those of that choice alone."""
    num_prompt = choice.request.num_prompt_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": choice.num_cached_tokens},
    }


def report(choices: Sequence[ChoiceState]) -> dict[str, object]:
    """Return the `kvist` field: the report of the first choice, and with several choices the report of each."""
    reports = [_report_one(choice) for choice in choices]
    return reports[0] if len(reports) == 1 else {**reports[0], "choices": reports}


def _report_one(choice: ChoiceState) -> dict[str, object]:
    handoff = choice.handoff
    return {
        "index": choice.index,
        "prefill_worker": choice.prefill_worker,
        "decode_worker": choice.decode_worker,
        "cached_tokens": choice.num_cached_tokens,
        "seed": choice.request.sampling.seed,
        "handoff": None
        if handoff is None
        else {
            "num_pages": handoff.num_pages,
            "num_pages_reused": handoff.num_pages_reused,
            "num_bytes": handoff.num_bytes,
            "duration_ms": round(handoff.duration_s * 1000, 3),
            "wait_ms": round(handoff.wait_s * 1000, 3),
        },
    }


def finite(logprob: float) -> float:
    """Return a number that JSON can express; NaN and minus infinity become `_LEAST_LOGPROB`."""
    return logprob if logprob >= _LEAST_LOGPROB else _LEAST_LOGPROB


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[msgspec.Raw]:
    """Return OpenAI's `logprobs.content`: one entry for each output token, including the token that ended the answer.
    Each entry is encoded to JSON at once: as Python objects the entries would take ten times the memory."""

    def entry(token_id: int, logprob: float) -> dict[str, object]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": tokenizer.token_text(token_id), "logprob": finite(logprob), "bytes": list(raw)}

    return [
        _encoded(
            {
                **entry(token_id, found.logprob),
                "top_logprobs": [
                    entry(top_id, top) for top_id, top in zip(found.top_token_ids, found.top_logprobs, strict=True)
                ],
            }
        )
        for token_id, found in zip(token_ids, logprobs, strict=True)
    ]


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    text_offsets: Sequence[int],
) -> dict[str, object]:
    """Return logprobs in the older shape of /v1/completions."""
    return {
        "tokens": [tokenizer.token_text(token_id) for token_id in token_ids],
        "token_logprobs": [finite(found.logprob) for found in logprobs],
        "top_logprobs": [
            _encoded(_by_text(tokenizer, token_id, found)) for token_id, found in zip(token_ids, logprobs, strict=True)
        ],
        "text_offset": text_offsets,
    }


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _by_text(tokenizer: Tokenizer, chosen_id: int, found: TokenLogprobs) -> dict[str, float]:
    """Return the logprobs of the top tokens and of the chosen token, by text. Of several tokens with the same text the
    chosen token wins, else the likeliest."""
    entries: dict[str, float] = {}
    for token_id, logprob in zip(found.top_token_ids, found.top_logprobs, strict=True):  # likeliest first
        entries.setdefault(tokenizer.token_text(token_id), finite(logprob))
    entries[tokenizer.token_text(chosen_id)] = finite(found.logprob)
    return entries
