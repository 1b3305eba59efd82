"""Decides whether a request fits an engine: the tokens that it needs and computes there, and which limit applies. Pure.

An engine that generates the answer needs room for prompt and answer. A prefill engine needs room for the prompt and one
token.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import EngineRequest, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The longest request, prompt and answer together, that a fleet can hold."""

    num_tokens: int
    text: str  # for errors: "at most N tokens ...", the limit that applies, and its option
    num_tokens_offline: int = 0  # the largest limit among workers that are lost or draining

    @property
    def most(self) -> int:
        """The limit if every worker were ready."""
        return max(self.num_tokens, self.num_tokens_offline)


def num_tokens_needed(request: EngineRequest, mode: Mode) -> int:
    if mode is Mode.PREFILL:
        return request.num_prompt_tokens + len(request.output_token_ids) + min(1, request.sampling.max_tokens)
    return request.num_prompt_tokens + request.sampling.max_tokens


def num_tokens_to_compute(request: EngineRequest, mode: Mode, num_uncomputed: int | None) -> int:
    """Return how many tokens an engine computes before it generates: `num_uncomputed` by the gateway, or all (None)."""
    if mode is Mode.DECODE:
        return 0
    return request.num_prompt_tokens + len(request.output_token_ids) if num_uncomputed is None else num_uncomputed


def limit_text(max_model_len: int, num_pages: int, page_size: int) -> str:
    """Return the number of tokens that an engine holds, the limit that applies, and its option, as text for errors."""
    if num_pages * page_size <= max_model_len:
        limit = "the size of its page pool (--max-total-tokens)"
    else:
        limit = "its context length (--context-length)"
    return f"at most {max_model_len} tokens for prompt and answer together, limited by {limit}"
