"""Whether a request fits an engine: the tokens that it needs there, and what limits them. Pure.

An engine that writes the answer holds prompt and answer. One that only reads the prompt for another holds that, and
writes one token.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import EngineRequest, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a fleet holds of one request: prompt and answer together."""

    num_tokens: int
    text: str  # the same with the limit that binds, and its option
    num_tokens_offline: int = 0  # what a worker holds that is lost or drains at present

    @property
    def most(self) -> int:
        """A longer request would not even fit if every worker were there."""
        return max(self.num_tokens, self.num_tokens_offline)


def num_tokens_needed(request: EngineRequest, mode: Mode) -> int:
    if mode is Mode.PREFILL:
        return request.num_prompt_tokens + len(request.output_token_ids) + 1
    return request.num_prompt_tokens + request.sampling.max_tokens


def limit_text(max_model_len: int, num_pages: int, page_size: int) -> str:
    """What an engine holds, which limit that is, and the option that sets it."""
    if num_pages * page_size <= max_model_len:
        limit = "the size of its page pool (--max-total-tokens)"
    else:
        limit = "its context length (--context-length)"
    return f"{max_model_len} tokens, prompt and answer together: {limit}"
