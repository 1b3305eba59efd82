"""Shortens prompts that a request allows to be shortened (vLLM's `truncate_prompt_tokens` and `truncation_side`)."""

from __future__ import annotations

from kvist.api.schemas import Generation
from kvist.checking.sampling import require
from kvist.errors import RequestError

_SIDES = ("left", "right")


def check_truncation(request: Generation) -> None:
    """Raises `RequestError` for a number or a side that is out of range."""
    num_tokens, side = request.truncate_prompt_tokens, request.truncation_side
    if num_tokens is not None:
        require(
            num_tokens == -1 or num_tokens >= 1,
            "truncate_prompt_tokens",
            "must be at least 1, or -1: as many tokens as fit",
            num_tokens,
        )
    if side == "right" and num_tokens is None:
        problem = "`truncation_side` needs `truncate_prompt_tokens`: no prompt is cut without it"
        raise RequestError(problem, param="truncation_side")
    if side is not None and side not in _SIDES:
        raise RequestError(
            f"`truncation_side` is {side[:64]!r}; supported: {', '.join(_SIDES)}", param="truncation_side"
        )


def truncated(token_ids: list[int], request: Generation, room: int) -> list[int]:
    """Return the tokens of a prompt that are kept. `room`: tokens of the context beside those of the answer."""
    num_tokens = request.truncate_prompt_tokens
    if num_tokens is None:
        return token_ids
    most = max(room, 1) if num_tokens == -1 else num_tokens
    return token_ids[:most] if request.truncation_side == "right" else token_ids[-most:]
