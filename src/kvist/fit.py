"""Whether a request fits an engine: the tokens that it needs there, and what limits them. Pure.

An engine that writes the answer holds prompt and answer. One that only reads the prompt for another holds that, and
writes one token.
"""

from __future__ import annotations

from kvist.request import EngineRequest, Mode


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
